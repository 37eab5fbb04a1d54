# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that an increment names and does not store: found in the segment that holds them, wherever it went."""

import hashlib
import subprocess

import pytest
import samples
import servers
from samples import disk, head, part, segment

from vnb.base.errors import Error
from vnb.format.frame import HOLE
from vnb.store import backupset, chain

KERNELS = b"the kernel" * 200, b"another kernel"
XML = ("<domain><name>vm</name><uuid>u-1</uuid><os><kernel>/boot/k</kernel></os><devices>"
       "<disk type='file'><source file='/old/vda'/><target dev='vda'/></disk></devices></domain>")


def described(kernel, **more):
    sha256 = hashlib.sha256(kernel).hexdigest()
    return {"role": "kernel", "path": "/boot/k", "size": len(kernel), "sha256": sha256, **more}


def saved(number, kernel, stored, base=None, **fields):
    """A segment: the kernel is stored in it, or named as that of its base."""
    base = base or (f"p{number - 1}" if number else None)
    head_ = head(f"p{number}", base, domain_xml=XML, created=f"2026-01-31T12:00:{number:02}.000000Z",
                 files=[described(kernel, **({} if stored else {"base": True}))], **fields)
    frames = [(["file", part("kernel", "/boot/k", len(kernel), offset)], kernel[offset:][:999])
              for offset in range(0, len(kernel), 999)] if stored else [
                  ["same", {"role": "kernel", "path": "/boot/k", "mode": 0o640}]]
    whole = ["extent", 0, [0, 4096, HOLE]] if not base else ["extent", 0, [512 * number, 512, HOLE]]
    nvram = b"nvram %d" % number
    first = (["file", part(size=len(nvram))], nvram)
    return segment(head_, [disk(level="inc" if base else "full")], first, *frames, whole)


CHAIN = [(0, 0, True), (1, 0, False), (2, 0, False), (3, 1, True), (4, 1, False)]  # point, kernel, whether it is stored


@pytest.fixture
def full(tmp_path):
    """A set with these segments."""
    for number, kernel, stored in CHAIN:
        done = servers.command("vnb-pack", "-o", tmp_path / "set", stdin=saved(number, KERNELS[kernel], stored))
        done.ok()
    return tmp_path / "set"


def files(content):
    """{role: content} of the files of each segment of a stream; None of one that it does not hold."""
    found = []
    for _head, _disks, frames, _end, _length in samples.read(content):
        held = {}
        for frame in frames:
            if frame[0] == "File":
                held[frame[1]["role"]] = held.get(frame[1]["role"], b"") + frame[2]
            elif frame[0] == "Same":
                held[frame[1]["role"]] = None
        found.append(held)
    return found


@pytest.mark.parametrize("number, kernel, _stored", CHAIN)
def test_a_head_has_all_files_of_its_point(full, number, kernel, _stored):
    out = servers.command("vnb-cat", "--head", "--until", f"p{number}", full).ok()
    assert files(out) == [{"nvram": b"nvram %d" % number, "kernel": KERNELS[kernel]}]
    assert samples.read(out)[0][0]["files"] == [described(KERNELS[kernel])]


def test_a_stream_has_what_is_stored(full):
    kernels = [found["kernel"] for found in files(servers.command("vnb-cat", full).ok())]
    assert kernels == [KERNELS[0], None, None, KERNELS[1], None]


@pytest.mark.parametrize("number, kernel, _stored", CHAIN)
def test_a_merged_full_holds_them(full, number, kernel, _stored):
    out = servers.command("vnb-cat", "--merge", "--until", f"p{number}", full).ok()
    assert files(out) == [{"nvram": b"nvram %d" % number, "kernel": KERNELS[kernel]}]


def test_a_merged_increment_takes_from_its_base_what_its_parts_did(full):
    """The segments 1 and 2 as one: the kernel is in 0. And 2 and 3: in 3."""
    for first, last, kernel in ("p0", "p2", None), ("p1", "p3", KERNELS[1]), ("p2", "p4", KERNELS[1]):
        out = servers.command("vnb-cat", "--merge", "--from", first, "--until", last, full).ok()
        assert [found["kernel"] for found in files(out)] == [kernel]
        assert ("base" in samples.read(out)[0][0]["files"][0]) == (kernel is None)


def test_a_set_that_was_pruned_has_them(full):
    servers.command("vnb-prune", "--keep-last", "2", full)
    assert [segment_.head["point"] for segment_ in backupset.segments([str(full)])] == ["p3", "p4"]
    assert files(servers.command("vnb-cat", "--head", full).ok())[0]["kernel"] == KERNELS[1]
    servers.command("vnb-verify", full).ok()
    servers.command("vnb-prune", "--keep-last", "1", full)
    assert files(servers.command("vnb-cat", "--head", full).ok())[0]["kernel"] == KERNELS[1]


def test_a_stream_of_all_segments_is_as_good_as_a_head(full, tmp_path):
    """vnb-config takes a file from the segment before, and that from the one before it."""
    for number, kernel, _ in CHAIN:
        out = servers.command("vnb-cat", "--until", f"p{number}", full).ok()
        target = tmp_path / f"restored{number}"
        servers.command("vnb-config", "--disk-dir", target, stdin=out).ok()
        assert (target / "k").read_bytes() == KERNELS[kernel]


def test_a_stream_that_begins_later_lacks_them(full, tmp_path):
    out = servers.command("vnb-cat", "--merge", "--from", "p0", "--until", "p2", full).ok()
    servers.command("vnb-config", "--disk-dir", tmp_path / "restored", stdin=out).failed(
        "vnb-config: file: /boot/k: the kernel is in an earlier segment, which is not in this stream "
        "(vnb-cat --head SET has it)"
    )
    assert b"<domain>" in servers.command("vnb-config", "--no-files", stdin=out).out


def test_a_set_takes_no_increment_whose_base_has_another_file(full):
    for fields in ({"kernel": KERNELS[0]}, {"kernel": b"unknown"}):
        done = servers.command("vnb-pack", "-o", full, stdin=saved(5, fields["kernel"], False))
        assert done.status == 1
        assert "/boot/k: p5 has the kernel of p4, which has another one, or none" in done.err
    servers.command("vnb-pack", "-o", full, stdin=saved(5, KERNELS[1], False)).ok()


def test_verify_names_what_a_base_lacks(tmp_path):
    (tmp_path / "a.vnb").write_bytes(saved(0, KERNELS[0], True))
    (tmp_path / "b.vnb").write_bytes(saved(1, KERNELS[1], False))
    done = servers.command("vnb-verify", tmp_path)
    assert done.status == 1
    assert "/boot/k: p1 has the kernel of p0, which has another one, or none" in done.err


def test_a_file_that_lies_damaged_in_the_full_is_not_restored(full):
    path = next(segment_.name for segment_ in backupset.segments([str(full)]) if segment_.head["point"] == "p0")
    with open(path, "r+b") as file:
        content = file.read()
        file.seek(content.index(KERNELS[0][:999]) + 5)
        file.write(b"X")
    for options in (["--head"], ["--merge"], []):
        done = servers.command("vnb-cat", *options, "--until", "p2", full)
        assert (done.status, "bad sum" in done.err) == (1, True)


def test_dump_says_so(full):
    out = subprocess.run(["vnb-dump", "--brief"], input=saved(1, KERNELS[0], False), stdout=subprocess.PIPE, check=True)
    assert b"file kernel /boot/k: not changed since the base, mode 640\n" in out.stdout


def test_any_base_with_the_file_will_do():
    """Two segments with one point are alternatives: a merged one, and one that it was merged from."""
    file = described(KERNELS[0], base=True)
    heads = [{"files": [described(KERNELS[1])]}, {"files": [described(KERNELS[0])]}]
    chain.check_files({"point": "p1", "parent": "p0", "files": [file]}, heads, "set")
    with pytest.raises(Error, match="which has another one, or none"):
        chain.check_files({"point": "p1", "parent": "p0", "files": [file]}, heads[:1], "set")
    with pytest.raises(Error, match="which has another one, or none"):
        chain.check_files({"point": "p1", "parent": "p0", "files": [file]}, [{}], "set")


def test_a_standby_takes_an_increment_that_names_a_file(full, tmp_path):
    """The files of a domain are not for it: only that nothing is in the way."""
    first = servers.command("vnb-cat", "--until", "p0", full).ok()
    servers.command("vnb-apply", "--update", "--format", "raw", tmp_path / "standby", stdin=first)
    later = servers.command("vnb-cat", "--merge", "--from", "p0", "--until", "p2", full).ok()
    done = servers.command("vnb-apply", "--update", "--format", "raw", tmp_path / "standby", stdin=later)
    assert (done.status, "Error" in done.err) == (0, False)
