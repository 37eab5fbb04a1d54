# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What the files in formats/vectors are made of.

    PYTHONPATH=. python3 tests/vectors.py      writes those that are not there; to change one is to change the format
"""

import hashlib
import os
import sys

import samples
from samples import data, disk, extents, part

from vnb.format import frame as f
from vnb.format import index, values
from vnb.format.frame import DATA, HOLE, ZERO

DIRECTORY = os.path.join(samples.ROOT, "formats", "vectors")
UUID = "7f3d6a52-8c3e-4d0e-9d55-4b1d5f4f5b11"
PLAIN = b"".join(b"sector %03d of the disk\n" % number for number in range(90))[:2048]


def head(number, stage="data", **changes):
    """The head of the chain's segment number."""
    return {
        "id": f"{number:032x}", "stage": stage, "level": "inc" if number else "full", "point": f"vnb.main.{number}",
        "parent": f"vnb.main.{number - 1}" if number else None, "checkpoint": f"vnb.main.{number}", "chain": "main",
        "domain": "vm1", "uuid": UUID, "created": f"2026-01-31T12:00:{number:02}.000000Z", "run": "vectors", **changes,
    }


def minimal(writer):
    """The smallest segment with data: the one that the page takes apart."""
    out = writer.segment(head(0, domain="vm", uuid="u"), [{"name": "vda", "size": 16, "level": "full", "image": {}}])
    data(out, 0, 0, b"8 bytes.")
    extents(out, 0, [8, 8, HOLE])
    out.end()


def full_none(writer, number=0, **changes):
    """A full backup of one disk: data as they are, zeroes, holes; an index."""
    image = {"format": "qcow2", "path": "/images/vda.qcow2"}
    out = writer.segment(head(number, **changes), [disk("vda", 8192, image=image)])
    builder = index.Builder(out)
    extents(out, 0, [0, 1024, ZERO, 1024, 1024, HOLE], builder)
    data(out, 0, 2048, PLAIN[:1024], builder=builder)
    data(out, 0, 3072, PLAIN[1024:], builder=builder)
    extents(out, 0, [4096, 4096, HOLE], builder)
    builder.finish()
    out.end()


def full_lz4(writer):
    """The same disk with the codec lz4. A frame that does not get shorter has the codec none."""
    out = writer.segment(head(0), [disk("vda", 8192, image={"format": "qcow2", "path": "/images/vda.qcow2"})])
    builder = index.Builder(out)
    extents(out, 0, [0, 1024, ZERO, 1024, 1024, HOLE], builder)
    data(out, 0, 2048, PLAIN, "lz4", builder)
    data(out, 0, 4096, bytes(range(256)), "lz4", builder)
    extents(out, 0, [4352, 3840, HOLE], builder)
    builder.finish()
    out.end()


def inc(writer, number=1):
    """An increment: one range has new data, one became zero, one became a hole; nothing is said of the rest."""
    out = writer.segment(head(number), [disk("vda", 8192, "inc", image={})])
    builder = index.Builder(out)
    extents(out, 0, [2048, 512, ZERO], builder)
    data(out, 0, 3072, b"changed " * 64, builder=builder)
    extents(out, 0, [3584, 512, HOLE], builder)
    builder.finish()
    out.end()


def chain(writer):
    """A full and two increments, in the order in which they are applied."""
    full_none(writer)
    inc(writer)
    inc(writer, 2)


def disks_interleaved(writer):
    """Two disks, one of them new and so full inside an increment; their frames come as they were read."""
    out = writer.segment(head(1), [disk("vda", 8192, "inc", image={}), disk("vdb", 1024, "full", image={})])
    builder = index.Builder(out)
    data(out, 1, 0, b"b" * 512, builder=builder)
    data(out, 0, 0, b"a" * 512, builder=builder)
    extents(out, 1, [512, 512, ZERO], builder)
    data(out, 0, 4096, b"c" * 512, builder=builder)
    builder.finish()
    out.end()


def files(writer):
    """Files that belong to the domain: one in two parts, an empty one. The domain has no disk."""
    out = writer.segment(head(0), [])
    out.file(part("nvram", "/var/lib/libvirt/qemu/nvram/vm1_VARS.fd", 12), b"variables")
    out.file(part("nvram", "/var/lib/libvirt/qemu/nvram/vm1_VARS.fd", 12, 9), b"...")
    out.file(part("guest-info", "guest-info", 0), b"")
    out.end()


KERNEL = {
    "role": "kernel", "path": "/boot/vmlinuz", "size": 6,
    "sha256": hashlib.sha256(b"kernel").hexdigest(),
}


def file_unchanged(writer):
    """A full with a kernel, and an increment whose kernel has not changed: its head says so, and a frame names it."""
    out = writer.segment(head(0, files=[KERNEL]), [])
    out.file(part("kernel", "/boot/vmlinuz", 6), b"kernel")
    out.end()
    out = writer.segment(head(1, files=[{**KERNEL, "base": True}]), [])
    out.same({"role": "kernel", "path": "/boot/vmlinuz", "mode": 0o600})
    out.end()


def domain_name(writer):
    """A domain whose name has a tab, a no-break space and the joiner of an emoji, as libvirt takes them."""
    name = "a tab\there, a no-break\u00a0space, a joiner: \U0001f469\u200d\U0001f52c"
    writer.segment(head(0, domain=name, uuid="u-2"), []).end()


def unknown_optional(writer):
    """Frames of types that nobody knows, which consumers skip."""
    out = writer.segment(head(0), [disk("vda", 512)])
    out.frame(values.Other(["+note", "text", {"any": [1, None, True]}], None))
    extents(out, 0, [0, 512, HOLE])
    out.frame(values.Other(["+blob", 5], b"payload"))
    out.end()


def unknown_required(writer):
    """A frame of a type that nobody knows, which filters pass on and consumers refuse."""
    out = writer.segment(head(0), [disk("vda", 512)])
    extents(out, 0, [0, 512, HOLE])
    out.frame(values.Other(["note", "text"], None))
    out.end()


def stage_disks(writer):
    """What vnb-checkpoint writes: no extents yet. The end frame counts none, and nothing is missing."""
    source = {"uri": "nbd+unix:///vda?socket=/run/vnb.sock", "dirty": "qemu:dirty-bitmap:backup-vda"}
    writer.segment(head(1, "disks", domain_xml="<domain/>", checkpoint_xml="<domaincheckpoint/>"),
                   [disk("vda", 8192, "inc", image={}, source=source)]).end()


def stage_extents(writer):
    """What vnb-extents writes: data are named, and not there yet."""
    out = writer.segment(head(0, "extents"), [disk("vda", 8192, source={"uri": "nbd://localhost/vda"})])
    extents(out, 0, [0, 2048, ZERO, 2048, 2048, DATA, 4096, 4096, HOLE])
    out.end()


VECTORS = {
    "minimal": minimal, "full-none": full_none, "full-lz4": full_lz4, "inc": inc, "chain": chain,
    "disks-interleaved": disks_interleaved, "files": files, "file-unchanged": file_unchanged,
    "domain-name": domain_name, "unknown-optional": unknown_optional, "unknown-required": unknown_required,
    "stage-disks": stage_disks, "stage-extents": stage_extents,
}


def made(function):
    """The bytes of a vector."""
    with samples.written() as (writer, content):
        function(writer)
        return content()


def replaced(content, fields, new):
    """The stream with another frame (bytes) in the place of one."""
    old = f.encode(fields)[0]
    assert content.count(old) == 1
    return content.replace(old, new)


def refused():
    """{name: (bytes, what is wrong)} of streams that nobody may accept."""
    small, whole = made(minimal), made(chain)
    first = len(made(full_none))
    tail = f.TAIL.size
    head_fields = ["vnb", 1, head(0, domain="vm", uuid="u")]
    hole = ["extent", 0, [8, 8, HOLE]]
    twice = b"\x94\xa4disk\x01\x82\xa4name\xa1a\xa4name\xa1b"
    huge = b"\x94\xa2+x\x05\xcf" + f.xxh3(b"\x94\xa2+x\x05").to_bytes(8, "big") + b"\xc6\xff\xff\xff\xff"
    # Each with sound sums as far as its author could make them: what is wrong is one thing.
    end = small.rindex(b"\x93\xa3end")
    return {
        "no-end": (small[:end], "the input ends before the end frame"),
        "no-tail": (small[:-tail], "the input ends before the tail"),
        "cut-payload": (small[: small.index(b"8 bytes.") + 4], "the input ends inside a payload"),
        "newer-version": (replaced(small, head_fields, f.encode(["vnb", 2, head_fields[2]])[0]), "version 2"),
        "bit-flipped": (small.replace(b"8 bytes.", b"8 bytes/"), "plain bytes that differ from their hash"),
        "bad-sum": (small.replace(b"vda", b"vdb"), "fields that differ from their sum"),
        "frame-lost": (replaced(small, hole, b""), "a frame is missing"),
        "frame-doubled": (replaced(whole, ["extent", 0, [0, 1024, ZERO, 1024, 1024, HOLE]], f.encode(
            ["extent", 0, [0, 1024, ZERO, 1024, 1024, HOLE]])[0] * 2), "a frame is there twice"),
        "segments-swapped": (whole[first:] + whole[:first], "increments before their full"),
        "four-gib": (replaced(small, hole, huge), "a payload that claims 4 GiB"),
        "key-twice": (replaced(small, hole, twice + b"\xcf" + f.xxh3(twice).to_bytes(8, "big")),
                      "a map with one key twice"),
        "next-missing": (made(lambda writer: full_none(writer, next="vnb.main.1")), "a segment was to follow"),
        "domain-line-feed": (made(lambda writer: full_none(writer, domain="two\nlines")),
                             "a domain's name with a line feed"),
        "same-in-a-full": (made(lambda writer: _with_same(writer, 0, [{**KERNEL, "base": True}])),
                           "a full backup that has a file of its base"),
        "same-unknown": (made(lambda writer: _with_same(writer, 1, [KERNEL])),
                         "a file of the base, of which the head does not say so"),
        "file-differs": (made(lambda writer: _with_file(writer, [KERNEL])),
                         "a file that is not the one that the head describes"),
        "file-missing": (made(lambda writer: writer.segment(head(0, files=[KERNEL]), []).end()),
                         "a file that the head describes and that is not there"),
        "text": (b"This is not a stream.\n", "text"),
        "empty": (b"", "nothing at all"),
    }


def _with_same(writer, number, files):
    out = writer.segment(head(number, files=files), [])
    out.same({"role": "kernel", "path": "/boot/vmlinuz", "mode": 0o600})
    out.end()


def _with_file(writer, files):
    out = writer.segment(head(0, files=files), [])
    out.file(part("kernel", "/boot/vmlinuz", 6), b"Kernel")
    out.end()


def write():
    from json_lines import to_lines

    for name, function in VECTORS.items():
        path = os.path.join(DIRECTORY, name)
        if not os.path.exists(path + ".vnb"):
            content = made(function)
            _write(path + ".vnb", content)
            _write(path + ".json", "".join(line + "\n" for line in to_lines(content)).encode())
            text = " ".join(function.__doc__.split())
            _write(path + ".txt", f"{text}\n\nMade by {function.__name__}() in tests/vectors.py.\n".encode())
    for name, (content, wrong) in refused().items():
        path = os.path.join(DIRECTORY, "refused", name)
        if not os.path.exists(path + ".vnb"):
            _write(path + ".vnb", content)
            _write(path + ".txt", f"To be refused: {wrong}.\n\nMade by refused() in tests/vectors.py.\n".encode())


def _write(path, content):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)


if __name__ == "__main__":
    sys.exit(write())
