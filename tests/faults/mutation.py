# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Variants of sound input, hostile or sound, by chance (a random.Random): the same seed gives the same ones.

A stream is taken apart into frames, one of them is changed, and sums, counts, digest, index and tail are made to fit
again: what is wrong with it then is not what a checksum finds.
"""

import json
import re
import struct

import msgpack
from xxhash import xxh3_64_intdigest

from vnb.format import codec, values
from vnb.format import frame as f

NUMBERS = [
    0, 1, 2, 7, 255, 256, 4095, 4096, 4097, 65535, 65536, 1 << 20, (4 << 20) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 32, (1 << 63) - 4096, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1,
]
TEXTS = [
    "", " ", ".", "..", "../outside", "/outside", "a/b", "a\0b", "a\nb", "\x1b[2J", "é" * 255, "x" * 255, "x" * 256,
    "x" * 4096, "x" * (1 << 20), "-x", "--help", "nbd:localhost:1", "json:{}", "file:/outside", "a,size=1T", "a=b",
    "%s%n", "a@b", "VDA", "vda", "inc", "full", "copy", "diff", "disks", "extents", "data", "lz4", "zstd", "none", "²",
    "²²²²-01-01T00:00:00.000000Z", "9999-12-31T23:59:59.999999Z", "0000-00-00T99:99:99.999999Z",
    "9999-99-99T99:99:99.999999Z", "0001-01-01T00:00:00.000000Z", "nbd+unix:///x?socket=/outside",
]
XML = [
    "<!DOCTYPE a [<!ENTITY b 'c'>]>", "&b;", "&#0;", "<a>" * 5000, "<a>" * 5000 + "</a>" * 5000, "</domain>", "<disk/>",
    "<disk><target/></disk>", "<nvram>../outside</nvram>", "<nvram>/a/../outside</nvram>", "<loader>/outside</loader>",
    "<kernel>/a\nb</kernel>", "<initrd/>", "<name/>", "<os/>", "<devices/>", "<a xmlns:q='q' q:b='c'/>", "]]>",
    "<![CDATA[x]]>", "<uuid>x</uuid>", "<graphics/>", "<interface><mac/></interface>", "<seclabel/>",
    "<vcpu>x</vcpu>", "\0", "é", "\ud7ff",
]
PARTS = [  # of names of files of virtnbdbackup
    "", "full", "inc", "diff", "copy", "²", "9" * 30, "vda", "x" * 200, "a\nb", "partial", "virtnbdbackup.1", "\x1b[2J",
]
DEEP = []
for _ in range(60):
    DEEP = [DEEP]


def frames_of(content):
    """The frames of a stream (bytes), as far as they are any: lists of [fields, payload or None]."""
    found = []
    view = memoryview(content)
    while len(view):
        try:
            fields, _, size, payload = f.decode(view)
        except (f.FrameError, f.Incomplete):
            break
        end = size + (payload or 0)
        found.append([fields, None if payload is None else bytes(view[size:end])])
        view = view[end:]
    return found


def encoded(fields, payload):
    """(bytes, sum) of a frame of any fields, sound or not. Raises what msgpack raises for what it cannot say."""
    kind = fields[0] if fields else None
    try:
        if kind == "data" and payload is not None:
            _, disk, offset, length, codec, hash_ = fields
            header, sum_ = f.encode_data(disk, offset, length, codec, hash_, len(payload))
            return header + payload, sum_
        if kind == "tail":
            tail = f.encode_tail(*fields[1:])
            return tail, int.from_bytes(tail[-8:], "big")
    except (KeyError, TypeError, ValueError, struct.error):
        pass  # then as any other frame
    count = len(fields) + (1 if payload is None else 2)
    array = bytes([0x90 | count]) if count < 16 else struct.pack(">BH", 0xDC, count)
    body = array + b"".join(map(msgpack.packb, fields))
    covered = body if payload is None or kind == "data" else body + payload
    sum_ = xxh3_64_intdigest(covered)
    return body + struct.pack(">BQ", 0xCF, sum_) + (
        b"" if payload is None else struct.pack(">BI", 0xC6, len(payload)) + payload), sum_


def stream_of(frames, spared=None):
    """
    The stream (bytes) of frames, whose counts, digest, index and tail are made to fit.

    spared (int or None): the number of the frame that stays as it is.
    """
    out = bytearray()
    counts, start, last_index = values.Counts(), 0, 0
    moved = {}  # position of a data frame as the index has it: as it is now
    for number, (fields, payload) in enumerate(frames):
        kind = fields[0] if fields else None
        at = len(out)
        if number != spared:
            if kind == "end" and len(fields) == 2 and isinstance(fields[1], dict):
                fields = ["end", {**fields[1], **counts.fields()}]
            elif kind == "tail":
                fields = ["tail", at + f.TAIL.size - start, at - last_index if last_index else 0]
            elif kind == "index" and len(fields) == 4 and payload is not None:
                words = list(struct.unpack(f"<{len(payload) // 8}Q", payload[: len(payload) // 8 * 8]))
                for row in range(0, len(words) - 3, 4):
                    words[row + 2 : row + 4] = moved.get((fields[1], words[row]), words[row + 2 : row + 4])
                payload = struct.pack(f"<{len(words)}Q", *words)
                fields = ["index", fields[1], len(payload) // 32, at - last_index if last_index else 0]
        bytes_, sum_ = encoded(fields, payload)
        if kind == "index":
            last_index = at
        elif kind == "data" and len(fields) == 6:
            moved[fields[1], fields[2]] = [at - start, len(bytes_)]
            if isinstance(fields[3], int):
                counts.bytes[f.DATA] += fields[3]
            counts.stored += len(payload or b"")
        elif kind == "extent" and len(fields) == 3 and isinstance(fields[2], list):
            for length, state in zip(fields[2][1::3], fields[2][2::3]):
                if isinstance(length, int) and isinstance(state, int) and state in counts.bytes:
                    counts.bytes[state] += length
        out += bytes_
        if kind == "tail":
            counts, start, last_index, moved = values.Counts(), len(out), 0, {}
        elif kind != "end":
            counts.add(sum_)
    return bytes(out)


def mutated_stream(chance, content, others):
    """A hostile variant of a stream (bytes). others: frames, as frames_of() gives them, that may come into it."""
    frames = frames_of(content)
    if not frames or chance.random() < 0.1:
        return mutated_bytes(chance, content)
    while True:
        changed = [[_copy(fields), payload] for fields, payload in frames]
        for _ in range(chance.choice([1, 1, 1, 2, 4])):
            spared = _change(chance, changed, others)
        try:
            return stream_of(changed, spared if chance.random() < 0.5 else None)
        except (ValueError, TypeError, OverflowError, struct.error):
            continue  # nothing that msgpack can say


def varied_stream(chance, content):
    """A variant of a sound stream (bytes) that is sound, too: other data, states, codecs, and what nobody knows."""
    stays = chance.random() < 0.5  # what the index says of it, but for sizes, which stream_of() sees to
    frames, states = [], (f.ZERO, f.HOLE)
    for fields, payload in frames_of(content):
        fields, kind = _copy(fields), fields[0]
        if kind == "vnb":
            states = (f.DATA, f.ZERO, f.HOLE) if fields[2]["stage"] == "extents" else (f.ZERO, f.HOLE)
        if kind in ("vnb", "disk") and chance.random() < 0.3:
            fields[2]["+x"] = chance.choice([None, True, 0, (1 << 64) - 1, "x", [], [[]], {"": {}}, ["x"] * 100])
        elif kind in ("data", "extent") and chance.random() < 0.1:
            frames.append([["+note", chance.choice(NUMBERS)], chance.choice([None, b"", b"x" * 5])])
        if kind == "data":
            frames += _varied_data(chance, fields, payload, stays)
        elif kind == "extent" and not stays:
            frames += _varied_extents(chance, fields, states)
        elif kind == "file":
            frames.append([fields, chance.randbytes(len(payload)) if chance.random() < 0.2 else payload])
        elif kind != "index" or stays:
            frames.append([fields, payload])
    return stream_of(frames)


def _varied_data(chance, fields, payload, stays):
    """Frames for the range of a data frame."""
    _, disk, offset, length, _, _ = fields
    if chance.random() < 0.3:
        return [[fields, payload]]
    if not stays and chance.random() < 0.3:
        return [[["extent", disk, [offset, length, chance.choice([f.ZERO, f.HOLE])]], None]]
    cut = chance.randrange(1, length) if not stays and length > 1 and chance.random() < 0.5 else length
    found = []
    for at, size in ((0, cut), (cut, length - cut)):
        if size:
            plain = chance.choice([bytes(size), b"x" * size, chance.randbytes(size)])
            name, packed = codec.compressor(chance.choice(["none", "lz4", "zstd"]))(plain)
            found.append([["data", disk, offset + at, size, name, xxh3_64_intdigest(plain)], bytes(packed)])
    return found


def _varied_extents(chance, fields, states):
    """Frames for the extents of a frame."""
    _, disk, runs = fields
    found = []
    for offset, length, state in zip(runs[0::3], runs[1::3], runs[2::3]):
        cut = chance.randrange(1, length) if length > 1 and chance.random() < 0.5 else length
        for at, size in ((offset, cut), (offset + cut, length - cut)):
            if size:
                found += [at, size, chance.choice([state, *states])]
    if len(found) > 3 and chance.random() < 0.5:
        return [[["extent", disk, found[:3]], None], [["extent", disk, found[3:]], None]]
    return [[["extent", disk, found], None]]


def varied_json(chance, lines):
    """Lines of JSON (list of str) that say the same in another way."""
    found = []
    for line in lines:
        fields = list(json.loads(line).items())
        chance.shuffle(fields)
        ascii_, spaces = chance.random() < 0.5, chance.choice([None, (",", ":"), (" , ", " : ")])
        found.append(json.dumps(dict(fields), ensure_ascii=ascii_, separators=spaces))
    return found


def _change(chance, frames, others):
    """Change one frame in place; its number, or None where none is to be spared."""
    at = chance.randrange(len(frames))
    what = chance.random()
    if what < 0.08:
        del frames[at]
    elif what < 0.14:
        frames.insert(at, frames[at])
    elif what < 0.2:
        other = chance.randrange(len(frames))
        frames[at], frames[other] = frames[other], frames[at]
    elif what < 0.28:
        fields, payload = chance.choice(others)
        frames.insert(at, [_copy(fields), payload])
    elif what < 0.45 and frames[at][1] is not None:
        frames[at][1] = _payload(chance, frames[at])
        return at
    else:
        frames[at][0] = mutated_value(chance, frames[at][0])
        if not frames[at][0] or not isinstance(frames[at][0], list):
            frames[at][0] = ["x", frames[at][0]]
        return at
    if not frames:
        frames.append([["vnb", 1, {}], None])
    return None


def _payload(chance, frame):
    fields, payload = frame
    if fields[0] == "index" and len(payload) >= 8 and chance.random() < 0.8:
        words = list(struct.unpack(f"<{len(payload) // 8}Q", payload[: len(payload) // 8 * 8]))
        at = chance.randrange(len(words))
        near = [(words[at] + 1) % (1 << 64), (words[at] - 1) % (1 << 64)]
        words[at] = chance.choice([*NUMBERS, *near, chance.choice(words)])
        return struct.pack(f"<{len(words)}Q", *words)
    if fields[0] == "data" and len(fields) == 6 and fields[4] != "none" and len(payload) > 8 and chance.random() < 0.8:
        packed = mutated_bytes(chance, payload[8:])  # sound as far as its own checksum goes
        return xxh3_64_intdigest(packed).to_bytes(8, "big") + packed
    return mutated_bytes(chance, payload)


def mutated_value(chance, value):
    """A copy of a value (list or dict of values) in which one, somewhere, is another."""
    value = _copy(value)
    places = []

    def visit(container):
        for key in container if isinstance(container, dict) else range(len(container)):
            places.append((container, key))
            if isinstance(container[key], (dict, list)):
                visit(container[key])

    if isinstance(value, (dict, list)):
        visit(value)
    if not places:
        return _other(chance, value)
    container, key = chance.choice(places)
    what = chance.random()
    if what < 0.1:
        del container[key]
    elif what < 0.15 and isinstance(container, list):
        container.insert(key, _copy(container[key]))
    elif what < 0.2 and isinstance(container, dict):
        container[chance.choice(TEXTS[:-1])] = _other(chance, container[key])
    else:
        container[key] = _other(chance, container[key])
    return value


def _other(chance, value):
    what = chance.random()
    if isinstance(value, str) and "<" in value and what < 0.9:
        return mutated_xml(chance, value)
    if isinstance(value, int) and what < 0.85:
        return chance.choice([*NUMBERS, abs(value - 1), value + 1, 2 * value])
    if isinstance(value, str) and what < 0.85:
        return chance.choice([*TEXTS, value + "x", value[:-1], value * 2])
    return chance.choice([None, True, False, 0, "", "x", [], {}, [[]], {"": {}}, ["x"] * 100, DEEP, 1.5, -1, b"x"])


def mutated_xml(chance, text):
    """XML with an element, an attribute or a text that is missing, doubled or another."""
    tags = [match.span() for match in re.finditer(r"<[^>]*>", text)] or [(0, len(text))]
    start, end = chance.choice(tags)
    what = chance.randrange(6)
    if what == 0:
        return text[:start] + text[end:]
    if what == 1:
        return text[:start] + chance.choice(XML) + text[start:]
    if what == 2:
        _, last = chance.choice(tags)
        return text[: min(start, last)] + text[max(start, last):]  # all between two places
    if what == 3:
        return text[:end] + text[start:end] + text[end:]
    if what == 4:
        attributes = list(re.finditer(r"='[^']*'|=\"[^\"]*\"", text))
        if attributes:
            start, end = chance.choice(attributes).span()
            value = chance.choice(TEXTS[:-1]).replace("\0", "").replace("\x1b", "")
            return f"{text[:start]}='{value}'{text[end:]}"
    following = text.find("<", end)
    return text[:end] + chance.choice(TEXTS) + text[max(end, following):]


def mutated_bytes(chance, content):
    """Bytes of which some are missing, doubled or others."""
    content = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(len(content) + 1)
        what = chance.randrange(6)
        if what == 0:
            del content[at:]
        elif what == 1:
            del content[at : at + chance.choice([1, 2, 8, 64, 4096])]
        elif what == 2:
            content[at:at] = content[at : at + chance.choice([1, 8, 64])]
        elif what == 3:
            content[at : at + 8] = struct.pack(chance.choice("<>") + "Q", chance.choice(NUMBERS))
        elif what == 4:
            content[at : at + 1] = bytes([chance.randrange(256)])
        elif at < len(content):
            content[at] ^= 1 << chance.randrange(8)
    return bytes(content)


def mutated_json(chance, text):
    """Text that was JSON: another value in it, or other characters."""
    what = chance.random()
    if what < 0.75:
        try:
            return json.dumps(mutated_value(chance, json.loads(text)))
        except (TypeError, ValueError, RecursionError):
            pass
    if what < 0.85:
        at = chance.randrange(len(text) + 1)
        nasty = ["[" * 100_000, "9" * 5000, "1e999", "NaN", '"\\ud800"', '{"a":' * 5000]
        return text[:at] + chance.choice(nasty) + text[at:]
    return mutated_bytes(chance, text.encode(errors="surrogateescape")).decode(errors="surrogateescape")


def _copy(value):
    if isinstance(value, list):
        return [_copy(one) for one in value]
    if isinstance(value, dict):
        return {key: _copy(one) for key, one in value.items()}
    return value


def mutated_backup(chance, files):
    """A hostile variant of a directory of virtnbdbackup, {name: bytes}: another file, header or name."""
    if not files:
        return {}
    files = dict(files)
    name = chance.choice(list(files))
    what = chance.random()
    content = files[name]
    if what < 0.1:
        del files[name]
    elif what < 0.25:
        parts = name.split(".")
        parts[chance.randrange(len(parts))] = chance.choice(PARTS)
        del files[name]
        files[".".join(parts)[:250] or "x"] = content
    elif name.endswith(".data") and what < 0.7:
        meta, separator, rest = content[40:].partition(b"\r\n")
        text = mutated_json(chance, meta.decode(errors="replace")).encode(errors="surrogateescape")
        files[name] = b"meta %016x %016x\r\n" % (0, len(text)) + text + separator + rest
    elif name.endswith(".cpt"):
        files[name] = mutated_json(chance, content.decode(errors="surrogateescape")).encode(errors="surrogateescape")
    elif name.endswith(".xml"):
        files[name] = mutated_xml(chance, content.decode(errors="surrogateescape")).encode(errors="surrogateescape")
    else:
        files[name] = mutated_bytes(chance, content)
    return files


def with_uri(content, uri):
    """A stream (bytes) before its data was read, whose disks are all at a URI."""
    frames = frames_of(content)
    for fields, _ in frames:
        if fields[0] == "disk":
            fields[2] = {**fields[2], "source": {**fields[2]["source"], "uri": uri}}
    return stream_of(frames)
