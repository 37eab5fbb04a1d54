# SPDX-License-Identifier: LGPL-2.1-or-later
"""Small streams for tests, from their parts, in memory."""

import contextlib
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from vnb.format import codec, index, stream, values, writing
from vnb.format import frame as f
from vnb.format.frame import DATA, HOLE, ZERO

# A machine that has other work is no fault of a test.
settings.register_profile("vnb", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vnb")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SOURCED = "vnb-sh-setup"  # in bin/, and no command
COMMANDS = sorted(set(os.listdir(os.path.join(ROOT, "bin"))) - {SOURCED})


@contextlib.contextmanager
def memory(content=b""):
    """A file descriptor of a file in memory with this content, at its start."""
    fd = os.memfd_create("sample", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def written():
    """(writer, function that returns the bytes written so far)."""
    with memory() as fd:
        writer = writing.Writer(fd, "sample")

        def content():
            writer.flush()
            return os.pread(fd, os.fstat(fd).st_size, 0)

        yield writer, content


def head(point="p0", parent=None, **fields):
    return {
        "id": f"id-{point}", "stage": "data", "level": "inc" if parent else "full", "point": point, "parent": parent,
        "checkpoint": point, "chain": "main", "domain": "vm", "uuid": "u-1", "created": "2026-01-31T12:00:00.000000Z",
        "run": "r", **fields,
    }


def disk(name="vda", size=4096, level="full", **fields):
    return {"name": name, "size": size, "level": level, "image": {}, **fields}


def data(out, number, offset, plain, name="none", builder=None):
    """Write a data frame with these plain bytes into a SegmentWriter."""
    packed_as, payload = codec.compressor(name)(plain)
    place = out.data(number, offset, len(plain), packed_as, xxh3_64_intdigest(plain), payload)
    if builder is not None:
        builder.data(number, offset, len(plain), *place)


def extents(out, number, runs, builder=None):
    out.extents(number, runs)
    if builder is not None:
        builder.extents(number, runs)


def part(role="nvram", path="/v", size=3, offset=0, mode=0o600):
    return {"role": role, "path": path, "mode": mode, "size": size, "offset": offset}


def every_kind(required=True):
    """Two segments, a full and an increment, with every kind of frame in few bytes. required: an unknown one too."""
    with written() as (writer, content):
        out = writer.segment(head(), [disk("a", 300), disk("b", 64)])
        out.file(part(), b"ab")
        out.file(part(offset=2), b"c")
        index_ = index.Builder(out)
        data(out, 0, 0, b"xyz" * 33 + b"x", "lz4", index_)
        out.frame(values.Other(["+x", {"k": [1, None, True]}], None))
        extents(out, 1, [0, 64, HOLE], index_)
        data(out, 0, 100, b"12345678" * 5, "none", index_)
        extents(out, 0, [140, 100, ZERO, 240, 60, HOLE], index_)
        index_.finish()
        out.frame(values.Other(["+y", 7], b"payload"))
        out.end()
        out = writer.segment(head("p1", "p0"), [disk("a", 300, "inc")])
        if required:
            out.frame(values.Other(["x", "q"], None))
        data(out, 0, 10, b"q" * 20)
        out.end()
        return content()


def segment(head_, disks, *frames):
    """One segment, sound sums and counts, of these frames: lists (fields), or tuples of a list and a payload."""
    with written() as (writer, content):
        out = writer.segment(head_, disks)
        for frame in frames:
            fields, payload = frame if isinstance(frame, tuple) else (frame, None)
            header, sum_ = f.encode(fields, payload)
            writer.write(header, payload)
            out.counts.add(sum_)
            if fields[0] == "extent" and len(fields) == 3 and isinstance(fields[2], list):
                for length, state in zip(fields[2][1::3], fields[2][2::3]):
                    if isinstance(length, int) and state in (DATA, ZERO, HOLE):
                        out.counts.bytes[state] += length
        out.end()
        return content()


def read(content, check_plain=True, **options):
    """All that a Reader gives for these bytes, as lists that can be compared; raises what it raises."""
    found = []
    with memory(content) as fd:
        for segment_ in stream.Reader(fd, "sample", **options):
            frames = []
            for frame in segment_:
                kind = frame.__class__
                if kind is values.Data:
                    name = segment_.disks[frame.disk]["name"]
                    plain = bytes(codec.plain(frame, name)) if check_plain else None
                    frames.append(("data", frame.disk, frame.offset, frame.length, frame.codec, frame.hash,
                                   bytes(frame.payload), plain))
                elif kind is values.Extents:
                    frames.append(("extent", frame.disk, frame.runs))
                else:
                    payload = None if frame.payload is None else bytes(frame.payload)
                    frames.append((kind.__name__, frame.fields, payload))
            found.append((segment_.head, segment_.disks, frames, segment_.end, segment_.length))
    return found


@st.composite
def contents(draw):
    """[(head, disks, frames)]: what a writer may be told."""
    result = []
    for number in range(draw(st.integers(1, 3))):
        inc = draw(st.booleans()) if number else False
        disks, frames = [], []
        for name in ("a", "b")[: draw(st.integers(0, 2))]:
            size = draw(st.integers(0, 300))
            disks.append(disk(name, size, "inc" if inc else "full", extra=draw(st.none() | st.integers(0, 9))))
        for file in range(draw(st.integers(0, 2))):
            payload = draw(st.binary(max_size=9))
            frames.append(("File", part(path=f"/{file}", size=len(payload)), payload))
        for at, one in enumerate(disks):
            offset = 0
            while offset < one["size"]:
                length = draw(st.integers(1, one["size"] - offset))
                what = draw(st.sampled_from(["none", "lz4", "extent", "clean" if inc else "none", "+x"]))
                if what == "+x":
                    frames.append(("Other", ["+x", draw(st.integers(0, (1 << 64) - 1))], draw(st.none() | st.binary())))
                    continue
                if what == "extent":
                    frames.append(("extent", at, [offset, length, draw(st.sampled_from([ZERO, HOLE]))]))
                elif what != "clean":
                    frames.append((what, at, offset, bytes([draw(st.integers(0, 255))]) * length))
                offset += length
        result.append((head(f"p{number}", f"p{number - 1}" if inc else None), disks, frames))
    return result


def written_from(segments):
    """The stream (bytes) of contents()."""
    with written() as (writer, content):
        for head_, disks, frames in segments:
            out = writer.segment(head_, disks)
            builder = index.Builder(out)
            for frame in frames:
                if frame[0] == "File":
                    out.file(*frame[1:])
                elif frame[0] == "Other":
                    out.frame(values.Other(*frame[1:]))
                elif frame[0] == "extent":
                    extents(out, *frame[1:], builder)
                else:
                    data(out, *frame[1:], frame[0], builder)
            builder.finish()
            out.end()
        return content()


def applied(content, state=None, background=0):
    """{disk: bytes} after a stream, by the slow and simple way. background: of disks that nothing is known of."""
    state = state or {}
    for _head, disks, frames, _end, _length in read(content):
        after = []
        for disk in disks:
            image = bytearray([background]) * disk["size"]
            old = state.get(disk["name"], b"") if disk["level"] == "inc" else b""
            image[: len(old)] = old
            if old:
                image[len(old) :] = bytes(disk["size"] - len(old))
            after.append(image)
        for frame in frames:
            if frame[0] == "data":
                _, number, offset, length, *_, plain = frame
                after[number][offset : offset + length] = plain
            elif frame[0] == "extent":
                runs = frame[2]
                for offset, length, _state in zip(runs[0::3], runs[1::3], runs[2::3]):
                    after[frame[1]][offset : offset + length] = bytes(length)
        state = {disk["name"]: bytes(image) for disk, image in zip(disks, after)}
    return state


def disks_stream(*sources, **fields):
    """A stream as vnb-checkpoint makes it, of disks (name, size, source)."""
    disks = [disk(name, size, source=source, **fields) for name, size, source in sources]
    parent = "p0" if fields.get("level") == "inc" else None
    return segment(head("p1", parent, stage="disks"), disks)


def with_extents(*disks, **fields):
    """A stream as vnb-extents makes it. disks: (uri, size, runs), named vda, vdb, ..."""
    described = [
        disk(f"vd{chr(97 + number)}", size, source={"uri": uri}) for number, (uri, size, _) in enumerate(disks)
    ]
    return segment(
        head(stage="extents", **fields), described,
        *(["extent", number, runs] for number, (_, _, runs) in enumerate(disks) if runs),
    )


def read_disk(output, number=0):
    """(list of (offset, length, state), {offset: plain bytes}) of a disk in a segment."""
    ((head, disks, frames, _, _),) = read(output)
    assert head["stage"] == "data"
    assert all("source" not in disk for disk in disks)
    order, plains = [], {}
    for frame in frames:
        if frame[0] == "data" and frame[1] == number:
            order.append((frame[2], frame[3], DATA))
            plains[frame[2]] = frame[7]
        elif frame[0] == "extent" and frame[1] == number:
            order += zip(frame[2][0::3], frame[2][1::3], frame[2][2::3])
    return order, plains
