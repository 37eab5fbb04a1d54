# SPDX-License-Identifier: LGPL-2.1-or-later
"""The examples of vnb-map's page, as they stand but for the places; that of libvirt is a live test."""

import os
import shutil

import makers
import pytest
from mapping import BOOT, QEMU, WORKED, example, needs_fuse, needs_root, run

TODAY = bytes(BOOT + b"hello from the increment\n".ljust(512, b"\0")).ljust(1 << 20, b"\0")


@pytest.fixture
def saved(tmp_path):
    """Two points: of a disk full of A, and of one that boots."""
    directory = tmp_path / "set"
    makers.make_set(directory, [{"vda": "1M:A"}, {"vda": makers.changes(TODAY, b"A" * (1 << 20))}], spec="lz4")
    return directory


@needs_fuse
@needs_root
def test_one_file_back(tmp_path):
    image, mnt, out = tmp_path / "image", tmp_path / "mnt", tmp_path / "out"
    content = tmp_path / "content" / "etc"
    content.mkdir(parents=True)
    (content / "fstab").write_text("/dev/vda1 / ext4\n")
    mnt.mkdir()
    out.mkdir()
    assert run("mkfs.ext4", "-q", "-d", content.parent, image, "16M").returncode == 0
    makers.make_set(tmp_path / "set", [{"vda": makers.changes(image.read_bytes())}])
    script = example("--fuse", {
        "/run/vm1.pid": tmp_path / "pid", "/mnt/vm1": tmp_path / "map", "/backup/vm1": tmp_path / "set",
        "/mnt/files": mnt,
    })
    done = run("sh", "-ec", script, cwd=out)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}/map/vda\n"
    assert (out / "fstab").read_text() == "/dev/vda1 / ext4\n"
    assert not (tmp_path / "pid").exists() and not (tmp_path / "map").exists()


def test_an_image_of_a_point(saved, tmp_path):
    script = example("convert", {"/backup/vm1": saved, "2026-01-31": makers.point(0)})
    done = run("sh", "-ec", script, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    run("qemu-img", "convert", "-O", "raw", tmp_path / "vda.qcow2", tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == b"A" * (1 << 20)


def test_what_has_changed(saved, tmp_path):
    script = example("compare", {"/backup/vm1": saved, "2026-01-31": makers.point(0)})
    done = run("sh", "-ec", script, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "Content mismatch at offset 0!\n", "")


@pytest.mark.skipif(not shutil.which(QEMU), reason=f"no {QEMU} here")
def test_a_guest_boots(saved, tmp_path):
    """QEMU gets options besides that let it run here, and tell how it went."""
    (tmp_path / QEMU).write_text(f"""#!/bin/sh
        exec {shutil.which(QEMU)} -accel tcg -nodefaults -display none -serial stdio \\
            -device isa-debug-exit,iobase=0xf4,iosize=4 "$@"
    """)
    (tmp_path / QEMU).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = example(QEMU, {"/backup/vm1": saved, "-m 1G": "-m 32M"})
    done = run("sh", "-ec", script, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2 * WORKED + 1, "hello from the increment\n", "")
