# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine that starts from a saved point, before anything is restored, and writes."""

import shutil
from pathlib import Path

import makers
import pytest
from mapping import BOOT, FAILED, QEMU, WORKED, mapped, run

pytestmark = pytest.mark.skipif(not shutil.which(QEMU), reason=f"no {QEMU} here")


def disk(text):
    """A disk that boots and says text."""
    return (BOOT + text.encode().ljust(512, b"\0")).ljust(1 << 20, b"\0")


@pytest.fixture
def saved(tmp_path):
    full, increment = disk("hello from the full\n"), disk("hello from the increment\n")
    directory = tmp_path / "set"
    makers.make_set(
        directory, [{"vda": makers.changes(full)}, {"vda": makers.changes(increment, full)}], spec="lz4"
    )
    return directory


GUEST = (
    f"{QEMU} -accel tcg -m 32 -nodefaults -display none -serial stdio -device isa-debug-exit,iobase=0xf4,iosize=4"
    " -drive 'if=virtio,format=raw,file='\"$uri\""
)


def test_a_guest_boots_from_a_point_and_writes(saved, tmp_path):
    """The command of the manual, and its first words."""
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    out = tmp_path / "out"
    for until, text in ((makers.point(0), "full"), (makers.point(1), "increment")):
        command = f'{GUEST}; echo "status $?"; nbdcopy "$uri" {out}'
        done = run("vnb-map", "--disk", "vda", "--until", until, "--writable", "--run", command, saved)
        text = f"hello from the {text}\n"
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{text}status {2 * WORKED + 1}\n", "")
        assert out.read_bytes()[1024:1536] == text.encode().ljust(512, b"\0")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_what_it_wrote_is_in_the_overlay(saved, tmp_path):
    overlay, out = tmp_path / "overlay", tmp_path / "out"
    done = run("vnb-map", "--disk", "vda", "--overlay", overlay, "--run", GUEST, saved)
    assert (done.returncode, done.stdout, done.stderr) == (2 * WORKED + 1, "hello from the increment\n", "")
    done = run("vnb-map", "--disk", "vda", "--overlay", overlay, "--run", f'nbdcopy "$uri" {out}', saved)
    assert done.returncode == 0
    assert out.read_bytes()[1024:1536] == b"hello from the increment\n".ljust(512, b"\0")


def test_an_overlay_that_qemu_opens_itself(saved, tmp_path):
    """Read-only exports of several disks, and for each an image of the user's own making on top of one."""
    overlay = tmp_path / "overlay.qcow2"
    with mapped("--socket", tmp_path / "s", saved) as map_:
        done = run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", map_.lines[0], overlay)
        assert done.returncode == 0, done.stderr
        command = GUEST.replace("format=raw,file='\"$uri\"", f"format=qcow2,file={overlay}'")
        done = run("sh", "-c", command)
        assert (done.returncode, done.stdout) == (2 * WORKED + 1, "hello from the increment\n")
    assert Path(overlay).stat().st_size > 0


def test_a_guest_cannot_write_to_a_map_that_is_not_writable(saved):
    done = run("vnb-map", "--disk", "vda", "--run", GUEST.replace("if=virtio", "if=virtio,readonly=on"), saved)
    assert done.returncode == 2 * FAILED + 1, done.stderr
