# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the filters between a server and a set say of input that is not sound: one line, 1, and no end of a stream."""

import pytest
import samples
from servers import command, forked, needs_nbdkit, planned

from vnb.cli import extents, pack, read
from vnb.format import frame as f
from vnb.format.frame import DATA, HOLE

MODULES = {"vnb-extents": extents, "vnb-read": read, "vnb-pack": pack}
STAGES = {"vnb-extents": "disks", "vnb-read": "extents", "vnb-pack": "data"}
SIZE = 3000
pytestmark = needs_nbdkit


@pytest.fixture(scope="module")
def inputs():
    """{command: a small stream as it needs}: two disks, a file, a frame of a type to come, two segments."""
    with planned(SIZE, [[1000, 0], [2000, 3]]) as server:
        disks = [samples.disk(name, SIZE, source={"uri": server.uri}) for name in ("vda", "vdb")]
        heads = samples.head("p0", stage="disks"), samples.head("p1", "p0", stage="disks")
        frames = (["file", samples.part()], b"abc"), ["+note", {"a": [1, None]}]
        made = b"".join(samples.segment(head, disks, *frames) for head in heads)
        found = {}
        for name in MODULES:
            found[name] = made
            made = command(name, stdin=made).ok()
        yield found


def run(name, stdin):
    return forked(name, MODULES[name], stdin=stdin)


def refused(name, stdin):
    """The one line with which a command refuses its input."""
    done = run(name, stdin)
    assert done.status == 1, done.err
    assert "Traceback" not in done.err
    assert done.err.endswith("\n")
    assert done.err.count("\n") == 1
    assert done.err.startswith(f"{name}: ")
    assert done.err[:-1].isprintable()
    # The first of two segments may be sound. What follows must not look like one.
    if done.out:
        try:
            assert len(samples.read(done.out)) == 1
        except samples.stream.StreamError:
            pass
    return done.err[len(name) + 2 : -1]


@pytest.fixture(params=MODULES)
def name(request):
    return request.param


def test_the_inputs_are_sound(name, inputs):
    assert run(name, inputs[name]).status == 0


def test_empty(name):
    assert refused(name, b"") == "stdin: empty input, expected a stream"


@pytest.mark.parametrize("text", [b"hello\n", b"<domain>\n", b"\x94\xa3vn", b"\0" * 5000, b"\x94\xa3vnc" * 30])
def test_something_else(name, text):
    assert refused(name, text).startswith(
        f"stdin: stream offset 0: not a stream of vnb (it starts with {text[:5].hex(' ')})"
    )


def test_cut(name, inputs):
    content = inputs[name]
    for end in {*range(1, len(content), 131), *range(len(content) - 36, len(content), 3)}:
        if not content[end:].startswith(f.HEAD_MAGIC):  # that is one segment, and sound
            said = refused(name, content[:end])
            assert any(word in said for word in ("the input ends", "short record", "not a stream", "not another")), said


def test_one_bit_flipped(name, inputs):
    content = inputs[name]
    for at in range(0, len(content), 61):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        refused(name, bytes(flipped))


def test_a_newer_version(name, inputs):
    newer = bytearray(inputs[name])
    newer[5] = 2
    assert "sum" in refused(name, bytes(newer))
    with samples.written() as (writer, content):
        header, _ = f.encode(["vnb", 2, samples.head(stage=STAGES[name])])
        writer.write(header)
        assert refused(name, content()) == (
            "stdin: stream offset 0: format version 2, this vnb knows version 1: a newer vnb is needed"
        )


@pytest.mark.parametrize(
    "name, given, said",
    [
        ("vnb-read", "disks",
         "the segment holds disks where extents are needed: is vnb-extents missing before this stage"),
        ("vnb-pack", "disks", "the segment holds disks where data are needed: is vnb-read missing before this stage"),
        ("vnb-pack", "extents",
         "the segment holds extents where data are needed: is vnb-read missing before this stage"),
        ("vnb-extents", "extents", "the segment holds extents already, where disks are needed"),
        ("vnb-extents", "data", "the segment holds data already, where disks are needed"),
        ("vnb-read", "data", "the segment holds data already, where extents are needed"),
    ],
)
def test_stages_in_the_wrong_order(inputs, name, given, said):
    content = next(inputs[command_] for command_, stage in STAGES.items() if stage == given)
    assert refused(name, content) == f"stdin: stream offset 0: {said}"


def test_a_payload_of_4_gib(inputs):
    """Refused before memory is taken for it."""
    content = bytearray(inputs["vnb-pack"])
    at = content.index(b"\x98\xa4data")
    header = f.encode_data(0, 0, 1000, "none", 5, 1000)[0]
    content[at + len(header) - 4 : at + len(header)] = b"\xff" * 4
    assert "has a payload of 4294967295" in refused("vnb-pack", bytes(content))


def test_unknown_frames_pass(inputs):
    """A filter passes on what it does not know; whoever acts on it refuses it."""
    source = {"uri": "nbd://never-asked.invalid"}
    stdin = samples.segment(samples.head(stage="data"), [samples.disk("vda", 5)], ["new", 5], (["newer"], b"payload"),
                            ["extent", 0, [0, 5, HOLE]])
    frames = samples.read(run("vnb-pack", stdin).out)[0][2]
    assert frames[:2] == [("Other", ["new", 5], None), ("Other", ["newer"], b"payload")]
    stdin = samples.segment(samples.head(stage="extents"), [], ["new", 5])
    assert samples.read(run("vnb-read", stdin).out)[0][2] == [("Other", ["new", 5], None)]
    stdin = samples.segment(samples.head(stage="extents"), [samples.disk("vda", 5, source=source)],
                            ["extent", 0, [0, 4, DATA]])
    assert "never-asked.invalid" in refused("vnb-read", stdin)


def test_data_that_is_missing_in_the_middle(inputs):
    """A full disk's extents leave nothing out."""
    with planned(SIZE) as server:
        disks = [samples.disk("vda", SIZE, source={"uri": server.uri})]
        stdin = samples.segment(samples.head(stage="extents"), disks, ["extent", 0, [0, 1000, DATA]])
        assert refused("vnb-read", stdin).endswith(": vda: 2000 bytes of a full disk are missing")


def test_data_that_is_not_what_was_read(inputs):
    """No sum covers the payload of a data frame: vnb-pack is the first to hold it against its hash."""
    content = bytearray(inputs["vnb-pack"])
    at = content.index(b"\x98\xa4data") + f.MAX_DATA_HEADER + 500
    content[at] ^= 4
    assert refused("vnb-pack", bytes(content)) == "vda: offset 0: 1000 bytes differ from what was read from the source"
