# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Saved segments from strings, and what they must read as.

    plan = [{"vda": "64k:A 64k:- 32k:0"}, {"vda": "96k:. 64k:B"}]    a full, then an increment

An extent is SIZE:CONTENT with sizes in bytes, k, M or G. Content: a letter fills it, `?` is data that does not
compress (the same in each run), `0` is zero, `-` a hole, `.` what an increment does not say anything of. A disk
has the size that its extents add up to; an increment may be shorter than its disk: the rest is clean. In the place
of a string there may be a list of (size, content), and content may be bytes; see changes().
"""

import os
import random

from xxhash import xxh3_64_intdigest

from vnb.format import codec, frame, writing
from vnb.format.index import Builder
from vnb.store import backupset

KINDS = {"0": frame.ZERO, "-": frame.HOLE}
UNITS = {"k": 10, "M": 20, "G": 30}


def changes(image, before=b"", block=64 << 10):
    """The extents of a disk's bytes, of blocks that are not what they were before."""
    found = []
    for at in range(0, len(image), block):
        part = bytes(image[at : at + block])
        if before and part == before[at : at + block]:
            found.append((len(part), "."))
        else:
            found.append((len(part), part if any(part) else "-"))
    return found


def extents(text):
    """Yield (offset, length, content) of a string, or a list, of extents."""
    offset = 0
    if not isinstance(text, str):
        for length, content in text:
            yield offset, length, content
            offset += length
        return
    for word in text.split():
        size, content = word.split(":")
        length = int(size[:-1]) << UNITS[size[-1]] if size[-1] in UNITS else int(size)
        yield offset, length, content
        offset += length


def content_of(content, offset, length, seed):
    """The bytes of an extent of data."""
    if isinstance(content, bytes):
        return content
    if content == "?":
        return random.Random(f"{seed} {offset}").randbytes(length)
    return content.encode() * length


def images(plan):
    """For each segment of a plan {disk: its bytes (bytearray) at that point}."""
    before = {}
    result = []
    for number, disks in enumerate(plan):
        now = {}
        for name, text in disks.items():
            found = list(extents(text))
            size = max([sum(length for _, length, _ in found), len(before.get(name, ""))])
            image = now[name] = bytearray(size)
            image[: len(before.get(name, ""))] = before.get(name, b"")
            for offset, length, content in found:
                if content in KINDS:
                    image[offset : offset + length] = bytes(length)
                elif content != ".":
                    image[offset : offset + length] = content_of(content, offset, length, number)
        result.append(now)
        before = now
    return result


def point(number):
    """The name of the point that a plan's segment brings one to."""
    return f"vnb.test.20260131T1200{number:02}.{number:04x}"


def head(number, **changes):
    """The head of a plan's segment."""
    return {
        "id": f"id-{number}",
        "stage": "data",
        "level": "inc" if number else "full",
        "point": point(number),
        "parent": point(number - 1) if number else None,
        "checkpoint": point(number),
        "chain": "test",
        "domain": "vm1",
        "uuid": "7f3d6a52-8c3e-4d0e-9d55-4b1d5f4f5b11",
        "created": f"2026-01-31T12:00:{number:02}.000000Z",
        "domain_xml": None,
        "checkpoint_xml": None,
        "run": "test",
        **changes,
    }


def write_segment(writer, number, disks, sizes, spec="none", frame_size=64 << 10, index=True, known=()):
    """Write one segment of a plan with a vnb.format.writing.Writer. known: the disks that are increments in it."""
    compress = codec.compressor(*codec.parse(spec))
    described = [
        {"name": name, "size": sizes[name], "level": "inc" if name in known else "full", "image": {}} for name in disks
    ]
    out = writer.segment(head(number), described)
    builder = Builder(out)
    for disk, text in enumerate(disks.values()):
        for offset, length, content in extents(text):
            if content in KINDS:
                out.extents(disk, [offset, length, KINDS[content]])
                builder.extents(disk, [offset, length, KINDS[content]])
            elif content != ".":
                plain = content_of(content, offset, length, number)
                for at in range(0, length, frame_size):
                    part = plain[at : at + frame_size]
                    name, payload = compress(part)
                    place = out.data(disk, offset + at, len(part), name, xxh3_64_intdigest(part), payload)
                    builder.data(disk, offset + at, len(part), *place)
    if index:
        builder.finish()
    out.end()


def make_set(directory, plan, **options):
    """Write the segments of a plan into a backup set; returns their paths. options: see write_segment."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    paths = []
    before = {}
    for number, (disks, image) in enumerate(zip(plan, images(plan))):
        path = os.path.join(directory, backupset.file_name(head(number)))
        with open(path, "wb") as file:
            sizes = {name: len(image[name]) for name in disks}
            write_segment(writing.Writer(file.fileno(), path), number, disks, sizes, known=before, **options)
        before = image
        paths.append(path)
    return paths
