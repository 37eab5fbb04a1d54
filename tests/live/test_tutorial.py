# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each task of the tutorial, with the commands as they stand in the page, on a domain that runs."""

import os
import re
import shutil
from pathlib import Path

import guest
import pytest
from host import blocks_of_page
from lab import ROOT, Disk, MiB, compare, wait_for

SECTIONS = dict(
    section.split("\n", 1) for section in
    re.split(r"^\.S[hs] ", (ROOT / "man" / "vnb-tutorial.7").read_text(), flags=re.MULTILINE)[1:]
)


@pytest.fixture(scope="module")
def vm(lab):
    """The domain of all tasks. It is the only one, since one task backs up the whole host."""
    for other in list(lab.domains.values()):
        other.remove()
    vm = guest.linux(lab, Disk("vda", 64 * MiB, filesystem="ext4"), Disk("vdb", 16 * MiB))
    vm.run("echo contents > /mnt/vda/file; sync")
    yield vm
    vm.remove()


@pytest.fixture
def task(host, vm):
    """A function that runs all blocks of a section; a shutdown is awaited, and so is a start."""
    def run(section, number=None):
        blocks = blocks_of_page(SECTIONS[section])
        assert blocks
        for block in blocks:
            done = host(block, vm)
            if f"virsh shutdown {vm.name}" in block.replace("vm1", vm.name):
                wait_for(lambda: not vm.handle.isActive(), "shutdown")
            elif "virsh start vm1" in block:
                vm.wait_until_up()
        return done

    run.path = host.path
    run.host = host
    return run


@pytest.fixture
def saved(task, vm):
    """A set with a full backup and an increment."""
    task.host("vnb-backup -z vm1 /backup/vm1\nvnb-backup -z vm1 /backup/vm1", vm)


def test_every_task_is_tried_here():
    source = Path(__file__).read_text(encoding="utf-8")
    with_blocks = [name for name, text in SECTIONS.items() if blocks_of_page(text)]
    assert [name for name in with_blocks if f'"{name}"' not in source] == []


def test_first_backup_and_restore(task, vm):
    task("A first backup, and a first restore")
    assert not (task.path / "restore/vm1").exists()
    assert os.listdir(task.path / "backup/vm1")


@pytest.mark.parametrize("section", [
    "Which restore points there are, and how old they are", "Delete old restore points", "How to be sure",
    "How much room a backup will take",
])
def test_of_a_set(task, vm, saved, section):
    assert task(section).returncode == 0


def test_one_file(task, vm, saved):
    task("One file back")
    assert (task.path / "restore/file").read_text() == "contents\n"
    assert (task.path / "home/the-file").read_text() == "contents\n"
    assert sorted(os.listdir(task.path / "home")) == ["mine", "the-file"]
    assert os.listdir(task.path / "run") == []


@pytest.mark.parametrize("section, image", [
    ("To a point in time", "restore/today/vdb.qcow2"), ("A single disk", "restore/disk/vdb.qcow2"),
    ("Onto another host", "restore/moved/vdb.qcow2"),
])
def test_restores(task, vm, saved, section, image):
    (task.path / "dev/vg/vdb").write_bytes(bytes(16 * MiB))
    reference = vm.reference()["vdb"]
    task(section)
    compare(reference, task.path / image, "qcow2")
    if section == "A single disk":
        compare(reference, task.path / "dev/vg/vdb", "raw")


def test_over_the_domain_that_is_there(task, vm, saved):
    vm.run("rm /mnt/vda/file; sync")
    task("Over the domain that is there")
    assert vm.run("cat /mnt/vda/file") == "contents\n"
    vm.run("echo more > /mnt/vda/more; sync")
    task.host("vnb-backup -z vm1 /backup/vm1\nvnb-verify /backup/vm1", vm)
    vm.run("echo most > /mnt/vda/most; sync")
    reference = vm.reference()["vda"]
    # A freeze would write to the file system.
    task.host("vnb-backup --no-freeze -z vm1 /backup/vm1\nvnb-cat /backup/vm1 | vnb-apply /restore/after", vm)
    compare(reference, task.path / "restore/after/vda.qcow2", "qcow2")


def test_every_night(task, vm):
    done = task("Every night, and who hears of a failure")
    assert (done.stdout, done.stderr) == (b"", "")
    assert task("Which domains have no recent backup").stdout == b""
    shutil.rmtree(task.path / "backup/all" / vm.name)
    assert task("Which domains have no recent backup").stdout.decode().split() == [vm.name]


@pytest.mark.skipif(shutil.which("rsync") is None, reason="not installed: rsync")
def test_a_copy_off_site(task, vm, saved):
    task("A copy off site")
    names = [name for name in os.listdir(task.path / "backup/vm1") if not name.startswith(".")]
    assert sorted(os.listdir(task.path / "offsite/vm1")) == sorted(names)


def test_other_places(task, vm):
    task("To another host, an object store, or plain files")
    reference = vm.reference()["vdb"]
    for name in ("ssh", "plain", "s3"):
        compare(reference, task.path / "restore" / name / "vdb.qcow2", "qcow2")


def test_a_standby(task, vm, saved):
    task("A standby that follows")
    compare(vm.reference()["vdb"], task.path / "standby/vm1/vdb.qcow2", "qcow2")


def test_a_domain_that_is_off(task, vm, saved):
    task("A domain that is off")
    assert vm.handle.isActive()


def shape(text, host, vm):
    """A text with its names, times and numbers made alike, as lines; what is said of an agent does not count."""
    text = text.replace(f"{host.path}/", "/").replace(vm.name, "vm1")
    text = re.sub(r"vnb\.main\.\S+Z\.[0-9a-f]+", "POINT", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", text)
    lines = [" ".join(re.sub(r"\b\d+\b", "N", line).split()) for line in text.splitlines()]
    return [line for line in lines if line and "frozen" not in line]


def test_what_the_page_shows_is_what_is_printed(task, vm):
    first, later = re.findall(r"(?ms)-compact\n(.*?)^\.Ed", SECTIONS["A first backup, and a first restore"])
    (listed,) = re.findall(
        r"(?ms)-compact\n(.*?)^\.Ed", SECTIONS["Which restore points there are, and how old they are"]
    )
    for text in first, later:
        done = task.host("vnb-backup -z vm1 /backup/vm1", vm)
        assert shape(done.stderr, task.host, vm) == shape(text, task.host, vm)
    done = task.host("vnb-dump --list /backup/vm1", vm)
    assert shape(done.stdout.decode(), task.host, vm) == shape(listed, task.host, vm)
