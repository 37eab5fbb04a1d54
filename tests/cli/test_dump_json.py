# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lines of JSON are the stream, said otherwise: both ways, and nothing else passes."""

import base64
import io
import json

import pytest
import samples
from hypothesis import given, settings
from hypothesis import strategies as st
from json_lines import from_lines, to_lines
from samples import disk, head, segment

from vnb.base.errors import Error, StreamError
from vnb.format import frame as f
from vnb.format.jsonlines import MAX_LINE, JsonReader


def refused(lines, reason):
    with pytest.raises(Error) as caught:
        from_lines(lines)
    text = str(caught.value)
    assert reason in text and "\n" not in text and text.startswith("stdin: ") and len(text) < 5000
    return text


STREAM = samples.every_kind()
LINES = to_lines(STREAM)


def test_inverse_of_every_kind_of_frame():
    assert from_lines(LINES) == STREAM


@settings(max_examples=40)
@given(samples.contents())
def test_inverse(segments):
    whole = samples.written_from(segments)
    lines = to_lines(whole)
    assert from_lines(lines) == whole
    for line in lines:
        assert line.isascii() and line.isprintable()


@settings(max_examples=40)
@given(st.recursive(
    st.none() | st.booleans() | st.integers(0, f.MAX_INTEGER) | st.text(st.characters(blacklist_categories=["Cs"])),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(
        st.characters(blacklist_categories=["Cs"]), max_size=4), values, max_size=4),
    max_leaves=10,
))
def test_any_value_comes_back(value):
    whole = segment(head(extra=value), [disk(size=0, extra=value)], ["+x", value])
    assert from_lines(to_lines(whole)) == whole


def test_order_of_keys_comes_back():
    whole = segment(dict(reversed(head().items())), [dict(reversed(disk(size=0).items()))], ["+x", {"b": 1, "a": 2}])
    assert from_lines(to_lines(whole)) == whole


def test_stages_alone():
    for stage, frames in (("disks", []), ("extents", [["extent", 0, [0, 50, 0, 50, 50, 3]]])):
        whole = segment(head(stage=stage), [disk(size=100, source={"uri": "nbd://x"})], *frames)
        assert from_lines(to_lines(whole)) == whole


def test_what_follows_from_the_rest_may_be_left_out():
    """So that a line can be changed, and a stream written by hand."""
    short = []
    for text in LINES:
        line = json.loads(text)
        del line["sum"]
        if line["frame"] == "end":
            del line["fields"]
        if line["frame"] == "tail":
            del line["length"], line["back"]
        if line["frame"] == "data" and line["codec"] == "none":
            del line["hash"]
        short.append(json.dumps(line))
    assert from_lines(short) == STREAM


def test_hexadecimal_for_large_numbers():
    line = json.loads(next(text for text in LINES if '"frame":"data"' in text))
    assert len(line["hash"]) == len(line["sum"]) == 16
    end = json.loads(next(text for text in LINES if '"end"' in text))
    assert len(end["fields"]["digest"]) == 16


def test_left_out_payloads():
    lines = to_lines(STREAM, payloads=False)
    sizes = [json.loads(line)["size"] for line in lines if '"frame":"data"' in line]
    assert sizes == [21, 40, 20]
    refused(lines, "its payload was left out")


def test_cut_anywhere():
    """After a whole segment it is a stream; anywhere else it is an error that names the line."""
    ends = [number for number, line in enumerate(LINES, 1) if '"tail"' in line]
    for count in range(len(LINES)):
        if count in ends:
            assert from_lines(LINES[:count]) == STREAM[: len(from_lines(LINES[:count]))]
        elif count:
            assert refused(LINES[:count], "ends before the end").startswith(f"stdin: line {count}: ")
    refused([], "empty input, expected lines of JSON")


def test_lost_doubled_swapped_lines():
    for at in range(len(LINES)):
        with pytest.raises(Error):
            from_lines(LINES[:at] + LINES[at + 1:])
        with pytest.raises(Error):
            from_lines(LINES[:at + 1] + LINES[at:])
        if at:
            with pytest.raises(Error):
                from_lines([*LINES[:at - 1], LINES[at], LINES[at - 1], *LINES[at + 1:]])


@given(st.integers(0, len(LINES) - 1), st.data())
def test_any_character_changed(number, choose):
    """It is refused, or it was only another way to write the same."""
    line = LINES[number]
    at = choose.draw(st.integers(0, len(line) - 1))
    changed = line[:at] + choose.draw(st.characters(min_codepoint=32, max_codepoint=126)) + line[at + 1:]
    try:
        assert from_lines([*LINES[:number], changed, *LINES[number + 1:]]) == STREAM
    except Error as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("line, reason", [
    ("", "not JSON"), ("x", "not JSON: Expecting value (column 1)"), ("{", "as jq -c writes it"),
    ("[]", "not an object"),
    ("5", "not an object"), ("null", "not an object"), ('"x"', "not an object"), ("{}", '"frame" must name its type'),
    ('{"frame":5}', "must name its type"), ('{"frame":""}', "must name"), ('{"frame":"a\\nb"}', "must name"),
    ('{"frame":null,"elements":[5]}', "must name"), ('{"frame":"x"}', '"elements" must be a list'),
    ('{"frame":"x","elements":5}', "must be a list"), ('{"frame":"x","elements":[]}', "too few"),
    ('{"frame":"x","elements":[' + "5," * 40 + "5]}", "too few or too many"),
    ('{"frame":"x","elements":[5],"more":5}', 'has no key "more"'),
    ('{"frame":"x","frame":"y","elements":[5]}', "a key is there twice"),
    ('{"frame":"x","elements":[{"a":1,"a":2}]}', "a key is there twice"),
    ('{"frame":"x","elements":[NaN]}', "NaN is not an integer"), ('{"frame":"x","elements":[Infinity]}', "Infinity"),
    ('{"frame":"x","elements":[-Infinity]}', "Infinity"), ('{"frame":"x","elements":[1.0]}', "1.0 is not an integer"),
    ('{"frame":"x","elements":[1e999]}', "1e999 is not an integer"), ('{"frame":"x","elements":[-1]}', "out of range"),
    ('{"frame":"x","elements":[18446744073709551616]}', "out of range"),
    ('{"frame":"x","elements":[' + "9" * 1_000_000 + "]}", "out of range"),
    ('{"frame":"x","elements":[0.' + "9" * 1_000_000 + "]}", "is not an integer"),
    ('{"frame":"x","elements":["\\ud800"]}', "surrogates not allowed"),
    ('{"frame":"x\\ud800","elements":[5]}', "must name"),
    ("[" * 100_000, "nested too deep"), ('{"a":' * 100_000, "nested too deep"),
    ('{"frame":"x","elements":[' + "[" * 20 + "]" * 20 + "]}", "nested more than 16 deep"),
    ('{"frame":"x","elements":[' + "[" * 900 + "]" * 900 + "]}", "nested more than 16 deep"),
    ('{"frame":"x","elements":[[' + "5," * 20_000 + "5]]}", "more than 12288 values"),
    ('{"frame":"x","elements":["' + "x" * 300_000 + '"]}', "too large"),
    ('{"frame":"x","elements":[5],"sum":5}', '"sum" must have 16 hexadecimal digits'),
    ('{"frame":"x","elements":[5],"sum":"0x00000000000000"}', "16 hexadecimal digits"),
    ('{"frame":"x","elements":[5],"sum":"0000000000000000"}', '"sum" is not that of the frame'),
    ('{"frame":"x","elements":[5],"payload":5}', '"payload" must be base64'),
    ('{"frame":"x","elements":[5],"payload":"a"}', "must be base64"),
    ('{"frame":"x","elements":[5],"payload":"YQ= ="}', "must be base64"),
    ('{"frame":"x","elements":[5],"payload":"\\u00e9"}', "must be base64"),
    ('{"frame":"x","elements":[5],"payload":null}', "must be base64"),
    ('{"frame":"x","elements":[5],"size":5}', "its payload was left out"),
    ('{"frame":"vnb","version":1}', "needs"), ('{"frame":"disk","disk":1}', 'frame "disk" needs "fields"'),
    ('{"frame":"disk","disk":7,"fields":{"name":"z","size":5,"level":"full"}}', 'malformed frame "disk"'),
    ('{"frame":"data"}', 'frame "data" needs "disk"'), ('{"frame":"data","elements":[5]}', 'malformed frame "data"'),
    ('{"frame":"tail","elements":[5]}', "malformed"), ('{"frame":"tail","length":-1}', 'malformed frame "tail"'),
    ('{"frame":"tail","length":"5","back":0}', "malformed"), ('{"frame":"tail"}', 'frame "tail" out of order'),
    ('{"frame":"tail","length":5,"back":0,"payload":"YQ=="}', "malformed"),
    ('{"frame":"end"}', "bytes of a full disk are missing"), ('{"frame":"end","fields":5}', "malformed"),
    ('{"frame":"end","fields":{"digest":5}}', '"digest" must have 16'),
    ('{"frame":"end","fields":{"frames":5}}', "the end frame says 5 frames, there were 3"),
    ('{"frame":"extent","disk":0,"runs":5}', 'malformed frame "extent"'),
    ('{"frame":"extent","disk":0,"runs":["5",5,5]}', "unknown state"),
    ('{"frame":"extent","disk":0,"runs":[0,400,2]}', "is not in the disk"),
    ('{"frame":"index","disk":0,"rows":1,"back":0}', "malformed frame"),
    ('{"frame":"file","fields":{}}', "malformed"), ('{"frame":"vnb","elements":[2,{}]}', "out of order"),
    (b"\xff\n", "not UTF-8"), (b"\xef\xbb\xbf{}\n", "not JSON"), (b"\0\n", "not JSON"),
    (b'{\0"\0}\0\n', "not JSON"),
], ids=lambda value: repr(value)[:50])
def test_bad_line(line, reason):
    assert refused([*LINES[:3], line, *LINES[3:]], reason).startswith("stdin: line 4: ")


def data_line(**changes):
    line = {"frame": "data", "disk": 0, "offset": 0, "length": 3, "codec": "none", "payload": "YWJj", **changes}
    return json.dumps({key: value for key, value in line.items() if value is not ...})


@pytest.mark.parametrize("changes, reason", [
    ({"disk": -1}, "malformed"), ({"disk": 65536}, "malformed"), ({"disk": "0"}, "malformed"), ({"disk": True}, "malf"),
    ({"disk": 9}, "does not have"), ({"offset": 1 << 64}, "malformed"), ({"offset": None}, "malformed"),
    ({"length": 0}, "too large"), ({"length": 4}, "has a payload of 3"), ({"length": 1 << 32}, "malformed"),
    ({"length": f.MAX_DATA + 1}, "malformed"), ({"codec": "lzma"}, 'needs "hash"'), ({"codec": ["none"]}, "needs"),
    ({"codec": "lzma", "hash": "0" * 16}, "malformed"), ({"codec": ["x"], "hash": "0" * 16}, "malformed"),
    ({"hash": "0" * 16}, "3 bytes differ from what was read"), ({"hash": 5}, "16 hexadecimal digits"),
    ({"payload": ...}, 'needs "hash"'), ({"payload": ..., "hash": "0" * 16}, "malformed"),
    ({"codec": "lz4", "hash": "0" * 16, "length": 99}, "damaged lz4 data"),
    ({"payload": base64.b64encode(bytes(f.MAX_DATA + 1)).decode()}, "has a payload of"),
])
def test_bad_data(changes, reason):
    refused([*LINES[:3], data_line(**changes), *LINES[3:]], reason)


def test_line_without_end():
    """Nobody has to have the memory for it."""

    class Endless(io.RawIOBase):
        given = 0

        def readable(self):
            return True

        def readinto(self, buffer):
            self.given += len(buffer)
            buffer[:] = b"x" * len(buffer)
            return len(buffer)

    endless = Endless()
    with pytest.raises(StreamError, match="line 1: longer than"):
        for _ in JsonReader(io.BufferedReader(endless), "stdin"):
            pass
    assert endless.given < 2 * MAX_LINE


def test_a_line_of_many_values_is_refused_before_it_is_taken_apart():
    """Each of them is three bytes of the line, and 64 in memory."""
    refused([b'{"frame":"+x","elements":[' + b"{}," * 100_000 + b'"a, [ {"]}'], "more values than a frame may have")
    commas = segment(head(domain_xml=", [ { \\\" " * 50_000), [disk(size=0)])
    assert from_lines(to_lines(commas)) == commas


def test_largest_frames():
    """What the format allows fits into a line."""
    payload = bytes(range(256)) * (f.MAX_DATA // 256)
    text = "\x01" * (f.MAX_HEAD - 2000)
    whole = segment(head(domain_xml=text), [disk(size=0)], (["+x", "\x01" * (f.MAX_HEADER - 60)], payload))
    lines = to_lines(whole)
    assert max(map(len, lines)) < MAX_LINE
    assert from_lines(lines) == whole
