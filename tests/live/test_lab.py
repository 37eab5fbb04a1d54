# SPDX-License-Identifier: LGPL-2.1-or-later
"""The laboratory itself: what other tests take from it has to be true."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lab as lab_module
import libvirt
import pytest
from lab import ROOT, Disk, MiB, alive, compare, wait_for


def content(path, offset, length):
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def test_reference_has_what_the_guest_wrote(vm):
    vm.write("vda", 10 * MiB, 1 * MiB, pattern=0x5A)
    vm.write_bytes("vda", 20 * MiB, b"some" * 128)
    vm.zero("vdb", 8 * MiB, 1 * MiB)
    reference = vm.reference()
    assert content(reference["vda"], 10 * MiB, 1 * MiB) == b"\x5a" * MiB
    assert content(reference["vda"], 20 * MiB, 512) == b"some" * 128
    assert content(reference["vdb"], 8 * MiB, 2 * MiB) == bytes(MiB) + b"\x22" * MiB


def test_discard_gives_space_back_only_where_it_is_on(lab, vm):
    vm.write("vda", 32 * MiB, 16 * MiB)
    vm.write("vdb", 32 * MiB, 16 * MiB)
    used = {name: os.stat(disk.path).st_blocks for name, disk in vm.disks.items()}
    vm.discard("vda", 32 * MiB, 16 * MiB)
    vm.discard("vdb", 32 * MiB, 16 * MiB)
    assert os.stat(vm.disks["vda"].path).st_blocks == used["vda"]
    assert os.stat(vm.disks["vdb"].path).st_blocks < used["vdb"]


def test_a_write_that_fails_is_noticed(vm):
    with pytest.raises(RuntimeError, match="Input/output error"):
        vm.write("vda", 64 * MiB, 1 * MiB)


def test_compare_tells_size_and_content(vm, tmp_path):
    reference = vm.reference("vda")["vda"]
    vm.destroy()
    compare(reference, vm.disks["vda"].path, "qcow2")
    with open(reference, "r+b") as file:
        file.seek(2 * MiB)
        file.write(b"x")
    with pytest.raises(AssertionError, match="offset 2097152"):
        compare(reference, vm.disks["vda"].path, "qcow2")
    os.truncate(reference, 32 * MiB)
    with pytest.raises(AssertionError, match="bytes"):
        compare(reference, vm.disks["vda"].path, "qcow2")


def test_leftovers_are_found(lab, vm):
    """A job, its scratch and its socket; and a process that has left its parent."""
    vm.handle.backupBegin(
        f"""<domainbackup mode="pull"><server transport="unix" socket="{vm.private_directory()}/x"/>
        <disks><disk name="vda" backup="yes" type="file"><scratch file="{vm.directory}/scratch"/></disk></disks>
        </domainbackup>""", None,
    )
    pid = int(lab.sh("setsid sleep 1000 > /dev/null 2>&1 & echo $!").stdout)
    try:
        wait_for(lambda: f"process {pid}: sleep 1000" in lab.leftovers(patience=0), "start of the process")
        found = lab.leftovers(patience=0)
    finally:
        os.kill(pid, signal.SIGKILL)
        vm.handle.abortJob()
    assert found[1:] == [f"{vm.name}: a job", f"{vm.directory}/scratch", f"{vm.private_directory()}/x"]
    wait_for(lambda: not vm.has_job(), "end of job")
    for path in (f"{vm.directory}/scratch", f"{vm.private_directory()}/x"):
        Path(path).unlink(missing_ok=True)


def test_machine_survives_the_death_of_libvirtd(lab, vm):
    pid = vm.qemu_pid()
    lab.restart_libvirtd()
    assert vm.qemu_pid() == pid
    assert vm.state() == libvirt.VIR_DOMAIN_RUNNING


def test_machine_can_be_killed_and_started_again(vm):
    vm.kill()
    assert not vm.is_active()
    vm.start()
    vm.write("vda", 0, 1 * MiB)


def test_images_can_be_of_any_kind(lab):
    vm = lab.domain(Disk("vda", 8 * MiB, format="raw"), Disk("vdb", 8 * MiB, compat="0.10", cluster_size=4096))
    try:
        vm.write("vda", 0, 1 * MiB)
        vm.write("vdb", 0, 1 * MiB)
        assert len(vm.reference()) == 2
    finally:
        vm.remove()


def test_nothing_survives_when_its_owner_is_killed():
    """The warden ends libvirtd, QEMU and what commands left behind, also when nobody can ask it to."""
    script = """if True:
        import os, signal, sys
        from lab import *
        lab = Lab().__enter__()
        vm = lab.domain(Disk("vda", MiB))
        left = lab.sh("setsid sleep 1000 > /dev/null 2>&1 & echo $!").stdout.decode().strip()
        print(lab.directory, lab.warden.pid, vm.qemu_pid(), left, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          cwd=os.path.dirname(lab_module.__file__))
    directory, *pids = done.stdout.split()
    wait_for(lambda: not any(alive(int(pid)) for pid in pids), "end of warden, QEMU and what was left")
    assert not os.path.exists(directory)


def test_on_the_command_line():
    """What it is, without a libvirtd; and a command beside a machine that runs, of which nothing is left."""
    argv = [sys.executable, ROOT / "tests" / "live" / "lab.py"]
    done = subprocess.run([*argv, "--help"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("A laboratory: ")
    done = subprocess.run([*argv, "--machine", "virsh", "list", "--name"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, ["vm1"])
