# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names from a stream that try to leave the target, hide there, or mean something to QEMU; and heads without names."""

import os
import shutil
import tempfile

import fuzzing
import mutation
import pytest
import samples
import servers

from vnb.format import frame as f

NAMES = pytest.mark.fault(
    "a stream has such names: ../x, /x, line breaks, NUL, very long ones, options and protocols of QEMU",
    holds="writes nothing outside the target, and nothing hidden in it",
)
REFUSED = [
    "../outside", "..", ".", "", "/outside", "a/../../outside", "a/b", ".hidden", "a\0b", "a\nb", "\x1b[2Ja",
    "x" * 256, "\u202eb", "a\u2028b",
]
ODD = [
    "nbd:localhost:1", "json:{}", "a,size=1T", "a,,b", "a=b", "-x", "--help", "%s%n", "a b", "a@b", "~", "$HOME",
    "`id`", "a;touch outside", "fat:rw:a", "é" * 100, "x" * 200, "VDA", "a\\..\\b",
]


def stream(name="vda", point="p0"):
    """A full of one disk of 64 KiB, with these names, and sums that are sound."""
    plain = b"a" * 4096
    return mutation.stream_of([
        [["vnb", 1, samples.head(point)], None],
        [["disk", 0, samples.disk(name, 65536)], None],
        [["data", 0, 0, 4096, "none", f.xxh3(plain)], plain],
        [["extent", 0, [4096, 61440, f.HOLE]], None],
        [["end", {}], None], [["tail", 0, 0], None],
    ])


def run(directory, *argv, stdin):
    """Run a command in directory/here, beside which nothing may come up; a servers.Done without a fault."""
    here = directory / "here"
    here.mkdir(exist_ok=True)
    done = servers.command("env", "-C", here, *argv, stdin=stdin)
    fault = fuzzing.fault_of(argv[0], done)
    assert fault is None, f"{' '.join(argv)}: {fault}"
    assert os.listdir(directory) == ["here"] and not os.path.lexists("/outside")
    assert set(os.listdir(here)) <= {"target"}
    return done


@NAMES
@pytest.mark.parametrize("name", REFUSED, ids=ascii)
def test_refused(tmp_path, name):
    store = ["vnb-pack", "-o", "target"]
    for argv in (["vnb-apply", "target"], ["vnb-apply", "--update", "target"], store, ["vnb-verify"], ["vnb-dump"]):
        assert run(tmp_path, *argv, stdin=stream(name=name)).status == 1
    assert run(tmp_path, *store, stdin=stream(point=name)).status == 1
    assert fuzzing.finished(tmp_path / "here") == []


@NAMES
@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_only_odd(tmp_path, name):
    """It is a name, and becomes that of a file in the target and of nothing else."""
    done = run(tmp_path, "vnb-apply", "--format", "raw", "target", stdin=stream(name))
    assert (done.status, done.err) == (0, "")
    (image,) = (tmp_path / "here" / "target").iterdir()
    assert image.name == f"{name}.raw" and image.read_bytes() == b"a" * 4096 + bytes(61440)


@NAMES
@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_odd_to_qemu(tmp_path, name):
    """Its options are separated by commas, and its file names may begin with a protocol."""
    done = run(tmp_path, "vnb-apply", "--image-options", "data_file=on", "target", stdin=stream(name))
    assert done.status == 0
    assert done.err.startswith(f"vnb-apply: {name}: its data is in target/{name}.data: ") and done.err.count("\n") == 1
    target = tmp_path / "here" / "target"
    assert sorted(os.listdir(target)) == [f"{name}.data", f"{name}.qcow2"]
    assert (target / f"{name}.qcow2").read_bytes()[:4] == b"QFI\xfb"


@NAMES
@pytest.mark.parametrize("point", ODD, ids=ascii)
def test_point_of_an_odd_name(tmp_path, point):
    assert run(tmp_path, "vnb-pack", "-o", "target", stdin=stream(point=point)).status == 0
    assert os.listdir(tmp_path / "here" / "target") == [f"{point}.full.vnb"]
    assert run(tmp_path, "vnb-cat", "--until", point, "./target", stdin=b"").status == 0


@NAMES
def test_disks_whose_names_differ_by_case(tmp_path):
    """On a file system that does not tell them apart, the second would replace the first: nothing is replaced."""
    disks = [samples.disk(name, 0) for name in ("vda", "VDA")]
    content = samples.segment(samples.head(), disks)
    assert run(tmp_path, "vnb-apply", "--format", "raw", "target", stdin=content).status == 0
    assert sorted(os.listdir(tmp_path / "here" / "target")) == ["VDA.raw", "vda.raw"]


@NAMES
def test_a_head_without_a_chain(tmp_path, monkeypatch):
    """The format lets it be missing: then it is of no chain that has a name."""
    image = tmp_path / "vda.qcow2"
    servers.qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    state = tempfile.mkdtemp(prefix="vnb-test.")  # a socket's path must be short
    monkeypatch.setenv("VNB_STATE_DIR", state)
    argv = ["vnb-checkpoint", "run", "--level", "auto", "--set", tmp_path / "set",
            "--image", f"vda={image}", "--", f"vnb-extents | vnb-read | vnb-pack -o {tmp_path}/set"]
    assert servers.command(*argv).status == 0
    shutil.rmtree(state)
    (path,) = (tmp_path / "set").iterdir()
    frames = mutation.frames_of(path.read_bytes())
    del frames[0][0][2]["chain"]
    path.write_bytes(mutation.stream_of(frames))
    done = servers.command(*argv)
    shutil.rmtree(state)
    assert done.status == 0 and "full backup: no earlier backup is saved" in done.err
