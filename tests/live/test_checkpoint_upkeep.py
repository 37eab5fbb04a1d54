# SPDX-License-Identifier: LGPL-2.1-or-later
"""list, size, cleanup, redefine, delete: checkpoints that were lost, left behind, or are no longer wanted."""

import json
import os
import re
import signal
import socket

import libvirt
import pytest
from backups import backup, levels, listed, record, restores, snapshot, tip
from lab import Disk, MiB, run

from vnb.store.backupset import segments


@pytest.fixture
def directory(lab):
    return lab.new_directory("set")


def begin_and_kill_keeper(lab, vm, directory, level="full"):
    lab.sh(f"vnb-checkpoint begin {vm.name} --level {level} --set {directory} > {lab.path('begun')}")
    os.kill(record(lab, vm)["owner"]["pid"], signal.SIGKILL)


def forget(vm):
    """libvirt loses what it knew of the checkpoints, as when a domain is moved; the bitmaps stay."""
    for checkpoint in vm.handle.listAllCheckpoints():
        checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)


def test_list_and_size_say_what_an_increment_would_have(lab, vm, directory):
    backup(lab, vm, "full", directory)
    vm.write("vda", 0, 2 * MiB)
    vm.write("vdb", 0, MiB)
    point = tip(lab, directory)
    row = listed(lab, vm, directory)[point]
    assert row["increment"] == 3 * MiB
    assert row["disks"] == ["vda", "vdb"]
    assert row["saved"] == os.path.join(directory, f"{point}.full.vnb")
    assert lab.sh(f"vnb-checkpoint size {vm.name} --set {directory}").stdout.decode() == (
        f"vda  {2 * MiB}\nvdb  {MiB}\ntotal  {3 * MiB}\n"
    )
    done = lab.sh(f"vnb-checkpoint size {vm.name} --set {directory} --json")
    assert json.loads(done.stdout) == {
        "level": "inc", "base": point, "disks": {"vda": 2 * MiB, "vdb": MiB}, "bytes": 3 * MiB,
    }


def test_size_says_which_set_there_is(lab, vm, directory):
    done = lab.sh(f"vnb-checkpoint size {vm.name}", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "vnb-checkpoint: --set: is needed, or --destination: there is no checkpoint of vnb\n")
    backup(lab, vm, "full", directory)
    done = lab.sh(f"vnb-checkpoint size {vm.name}", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("vnb-checkpoint: --set: is needed, or --destination: there are checkpoints of set "
                                  f"{socket.gethostname()}:{directory}\n")
    done = lab.sh(f"vnb-checkpoint size {vm.name} --set {directory} > /dev/full", check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("\nvnb-checkpoint: stdout: No space left on device\n")


def test_checkpoints_of_points_that_were_pruned_go(lab, vm, directory):
    """As with vnb-backup --keep-last, night after night: each one is a bitmap that QEMU keeps up to date."""
    other = lab.new_directory("other")
    backup(lab, vm, "full", other)
    for number in range(5):
        vm.write("vda", number * MiB, MiB)
        backup(lab, vm, "auto", directory)
        lab.sh(f"vnb-prune --keep-last 1 {directory}")
    ours = {name for name, row in listed(lab, vm, directory).items() if row["catalog"].endswith(directory)}
    assert tip(lab, directory) in ours
    assert len(ours) <= 2
    assert tip(lab, other) in vm.checkpoints()
    backup(lab, vm, "inc", other)
    restores(lab, directory, vm.reference())


def test_disks_that_take_turns_at_one_path(lab, vm, directory):
    """Each has a set of its own, and neither knows of the other's checkpoints but that they are of this path."""
    for number in range(6):
        here, away = (f"{directory}.{name}" for name in ("ab" if number % 2 else "ba"))
        if os.path.exists(away):
            os.rename(away, directory)
        vm.write("vda", number * MiB, MiB)
        done = backup(lab, vm, "auto", directory)
        assert ("full backup: " in done.stderr) == (number < 2)
        os.rename(directory, away)
        assert not os.path.exists(here) or number
    restores(lab, away, vm.reference())


def test_recover_ends_what_a_crash_left_and_leaves_the_chain_usable(lab, vm, directory):
    backup(lab, vm, "full", directory)
    before = vm.checkpoints()
    vm.write("vda", 0, MiB)
    begin_and_kill_keeper(lab, vm, directory, "inc")
    done = lab.sh(f"vnb-checkpoint cleanup {vm.name} --set {directory}")
    assert f"vnb-checkpoint: {vm.name}: ending the job of a keeper that died" in done.stderr
    assert vm.checkpoints() == before
    assert lab.leftovers() == []
    backup(lab, vm, "inc", directory)
    restores(lab, directory, vm.reference())


def test_recover_without_the_state_directory_knows_the_owner_by_the_socket(lab, vm, directory):
    begin_and_kill_keeper(lab, vm, directory)
    other = f"--state-dir {lab.path('other')} --set {directory}"
    done = lab.sh(f"vnb-checkpoint cleanup {vm.name} {other}")
    assert "ending the backup job of process" in done.stderr
    assert "deleting checkpoint vnb.main." in done.stderr
    assert vm.checkpoints() == []
    assert lab.leftovers() == []
    lab.sh(f"vnb-checkpoint abort {vm.name}")


def test_recover_leaves_a_living_backup_and_another_ledger_alone(lab, vm, directory):
    other = lab.new_directory("set")
    backup(lab, vm, "full", other, "--chain other")
    lab.sh(f"vnb-checkpoint begin {vm.name} --level full --set {directory} > {lab.path('begun')}")
    done = lab.sh(f"vnb-checkpoint cleanup {vm.name} --set {directory}", check=False)
    assert done.returncode == 1
    assert "a backup runs already" in done.stderr
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    name, = vm.checkpoints()
    done = lab.sh(f"vnb-checkpoint cleanup {vm.name} --set {directory}")
    assert f"checkpoint {name} is of set " in done.stderr
    assert vm.checkpoints() == [name]
    lab.sh(f"vnb-checkpoint cleanup {vm.name} --set {directory} --force")
    assert vm.checkpoints() == []


def test_recover_of_a_domain_that_is_off_by_now(lab, vm, directory):
    backup(lab, vm, "full", directory)
    begin_and_kill_keeper(lab, vm, directory, "inc")
    before = [tip(lab, directory)]
    vm.destroy()
    lab.sh(f"vnb-checkpoint cleanup {vm.name} --set {directory}")
    assert vm.checkpoints() == before
    assert run("qemu-img", "info", "--output=json", vm.disks["vda"].path).count('"vnb.main.') == 1
    vm.start()
    backup(lab, vm, "inc", directory)
    restores(lab, directory, vm.reference())


def test_a_checkpoint_whose_bitmap_is_missing_on_one_disk_is_deleted_all_the_same(lab, vm, directory):
    backup(lab, vm, "full", directory)
    vm.destroy()
    run("qemu-img", "bitmap", "--remove", "-f", "qcow2", vm.disks["vda"].path, tip(lab, directory))
    vm.start()
    lab.sh(f"vnb-checkpoint delete {vm.name} --set {directory}")
    assert vm.checkpoints() == []
    assert vm.bitmaps("vdb") == []


def test_recover_leaves_alone_what_an_empty_ledger_does_not_hold(lab, vm, directory):
    """The set may be on a file system that is not mounted."""
    backup(lab, vm, "full", directory)
    backup(lab, vm, "inc", directory)
    before = vm.checkpoints()
    os.rename(directory, f"{directory}.away")
    done = lab.sh(f"vnb-checkpoint cleanup {vm.name} --set {directory}")
    assert done.stderr.count(f"left alone: nothing is saved in {directory} (see --force)") == 2
    os.rename(f"{directory}.away", directory)
    assert vm.checkpoints() == before
    backup(lab, vm, "inc", directory)


def test_recover_after_a_commit_into_a_set_that_begin_was_not_told_of(lab, vm, directory):
    """The checkpoint says that it is of the ledger that begin knew of: that one has to hold it, too."""
    store = f"vnb-extents | vnb-read | vnb-pack -o {directory}"
    lab.sh(f"vnb-checkpoint begin {vm.name} --level full --destination there | {store}")
    lab.sh(f"vnb-checkpoint commit {vm.name} --set {directory}")
    lab.sh(f"vnb-checkpoint cleanup {vm.name}")
    assert vm.checkpoints() == [tip(lab, directory)]
    vm.write("vda", 4 * MiB, MiB)
    backup(lab, vm, "inc", directory)
    restores(lab, directory, vm.reference())


def test_a_point_that_was_merged_before_its_commit_is_saved(lab, vm, directory):
    """The merged segment has an id of its own, and the same point."""
    backup(lab, vm, "full", directory)
    vm.write("vda", 10 * MiB, MiB)
    store = f"vnb-extents | vnb-read | vnb-pack -o {directory}"
    lab.sh(f"vnb-checkpoint begin {vm.name} --level inc --set {directory} | {store}")
    lab.sh(f"vnb-prune --keep-last 1 {directory}")
    assert levels(directory) == ["full"]
    lab.sh(f"vnb-checkpoint commit {vm.name}")
    assert tip(lab, directory) in vm.checkpoints()
    vm.write("vda", 20 * MiB, MiB)
    backup(lab, vm, "inc", directory)
    restores(lab, directory, vm.reference())


def test_a_job_is_ended_where_it_was_begun(lab, vm, directory):
    """The default of whoever ends it, after the keeper was killed, may be another libvirt."""
    uri = f"qemu:///{'system' if os.geteuid() == 0 else 'session'}"
    lab.sh(f"vnb-checkpoint begin {vm.name} --level full --set {directory} > {lab.path('begun')}",
           env={"LIBVIRT_DEFAULT_URI": uri})
    os.kill(record(lab, vm)["owner"]["pid"], signal.SIGKILL)
    lab.sh(f"vnb-checkpoint abort -c {uri} {vm.name}", env={"LIBVIRT_DEFAULT_URI": "test:///default"})
    assert not vm.has_job()
    assert record(lab, vm) is None
    assert vm.checkpoints() == []


def test_a_scratch_file_left_behind_is_removed(lab, vm, directory):
    left = os.path.join(vm.directory, "vnb-0123456789ab-vda.scratch")
    run("qemu-img", "create", "-q", "-f", "qcow2", left, "1M")
    kept = os.path.join(vm.directory, "vnb-mine.scratch")
    vm.files.add("vnb-mine.scratch")
    run("qemu-img", "create", "-q", "-f", "qcow2", kept, "1M")
    lab.sh(f"vnb-checkpoint cleanup {vm.name} --set {directory}")
    assert not os.path.exists(left)
    assert os.path.exists(kept)


def test_redefine_gives_a_domain_its_checkpoints_back(lab, vm, directory):
    backup(lab, vm, "full", directory)
    for _ in range(3):  # the parent of the last ones is pruned: libvirt wants one that it knows
        vm.write("vda", 0, MiB)
        backup(lab, vm, "inc", directory)
    before = vm.checkpoints()
    forget(vm)
    assert vm.checkpoints() == []
    vm.write("vda", 4 * MiB, MiB)
    done = lab.sh(f"vnb-checkpoint redefine {vm.name} --set {directory}")
    assert vm.checkpoints() == before
    assert f"{before[0]}: redefined" in done.stderr
    assert "full in this" not in backup(lab, vm, "inc", directory).stderr
    assert levels(directory) == ["full", *["inc"] * 4]
    restores(lab, directory, vm.reference())


def test_redefine_says_which_bitmap_is_gone_and_auto_makes_a_full(lab, vm, directory):
    backup(lab, vm, "full", directory)
    for checkpoint in vm.handle.listAllCheckpoints():
        checkpoint.delete()
    done = lab.sh(f"vnb-checkpoint redefine {vm.name} --set {directory}", check=False)
    assert done.returncode == 1
    assert f"vnb-checkpoint: {tip(lab, directory)}: not redefined: " in done.stderr
    assert done.stderr.endswith("no checkpoint is usable: the next backup must be a full one (--level auto)\n")
    backup(lab, vm, "auto", directory)
    assert levels(directory) == ["full", "full"]


def test_redefine_offline_looks_into_the_images(lab, vm, directory):
    backup(lab, vm, "full", directory)
    vm.destroy()
    forget(vm)
    lab.sh(f"vnb-checkpoint redefine {vm.name} --set {directory}")
    vm.start()
    vm.write("vda", 4 * MiB, MiB)
    backup(lab, vm, "inc", directory)
    restores(lab, directory, vm.reference())


def test_prune_drops_one_chain_and_no_other(lab, vm, directory):
    other = lab.new_directory("set")
    vm.handle.checkpointCreateXML("<domaincheckpoint><name>foreign</name></domaincheckpoint>", 0)
    backup(lab, vm, "full", directory)
    backup(lab, vm, "full", other, "--chain other")
    lab.sh(f"vnb-checkpoint delete {vm.name} --set {directory}")
    assert vm.checkpoints() == sorted(["foreign", tip(lab, other)])


def test_prune_ends_the_job_of_a_dead_keeper_first(lab, vm, directory):
    """Else it would go on without its checkpoint, and nobody would watch over it."""
    backup(lab, vm, "full", directory)
    begin_and_kill_keeper(lab, vm, directory, "inc")
    done = lab.sh(f"vnb-checkpoint delete {vm.name} --set {directory}")
    assert "ending the job of a keeper that died" in done.stderr
    assert vm.checkpoints() == []
    assert record(lab, vm) is None


def test_the_domains_files_and_what_qemu_img_says_are_in_the_stream(lab, directory):
    kernel = lab.path("kernel")
    with open(kernel, "wb") as file:
        file.write(os.urandom(3 * MiB))
    os.chmod(kernel, 0o644)  # noqa: S103 - QEMU's user reads it
    vm = lab.domain(Disk("vda"), os_xml=f"<kernel>{kernel}</kernel>")
    done = lab.sh(f"vnb-checkpoint begin {vm.name} --level copy | vnb-dump --json")
    frames = [json.loads(line) for line in done.stdout.splitlines()]
    files = [frame for frame in frames if "file" in (frame.get("type"), frame.get("frame"))]
    assert len(files) == 4  # three parts of the kernel
    text = json.dumps(frames[0])
    assert "<domain " in text
    assert "inactive_xml" in text
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    vm.remove()


def test_a_kernel_that_has_not_changed_is_stored_once(lab, directory, tmp_path):
    """In a set and for a destination; a new one is stored again, and each restore point has its own."""
    contents = [os.urandom(3 * MiB), os.urandom(2 * MiB)]
    kernel = lab.path("kernel")

    def install(content):
        with open(f"{kernel}.new", "wb") as file:
            file.write(content)
        os.chmod(file.name, 0o644)  # noqa: S103 - QEMU's user reads it
        os.rename(file.name, kernel)

    install(contents[0])
    vm = lab.domain(Disk("vda"), os_xml=f"<kernel>{kernel}</kernel>")
    other = lab.new_directory("other")
    to_other = f"--destination elsewhere -- 'vnb-extents | vnb-read | vnb-pack -o {other}'"
    expected = []
    for number, level in enumerate(["full", "inc", "inc", "inc", "diff"]):
        if number == 3:
            install(contents[1])
        backup(lab, vm, level, directory)
        lab.sh(f"vnb-checkpoint run {vm.name} --chain other --level {level} --no-freeze {to_other}")
        expected.append(contents[number >= 3])
    for set_ in (directory, other):
        points = [segment.head["point"] for segment in sorted(segments([set_]), key=lambda one: one.head["created"])]
        sizes = [segment.length > len(contents[1]) for segment in
                 sorted(segments([set_]), key=lambda one: one.head["created"])]
        assert sizes == [True, False, False, True, False]
        for point, content in zip(points, expected):
            target = lab.new_directory("restored")
            lab.sh(f"vnb-cat --head --until {point} {set_} | vnb-config --name x --disk-dir {target} > {target}/xml")
            with open(os.path.join(target, "kernel"), "rb") as file:
                assert file.read() == content
        lab.sh(f"vnb-verify {set_}")
    vm.remove()


def test_no_secret_is_fetched(lab, directory):
    graphics = '<graphics type="vnc" port="-1" autoport="yes" passwd="s3cret"/>'
    vm = lab.domain(Disk("vda"), extra_xml=graphics, start=False)
    done = lab.sh(f"vnb-checkpoint begin {vm.name} --level copy | cat")
    assert b"s3cret" not in done.stdout
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    vm.remove()


def bitmaps(vm):
    """The names of the bitmaps of vnb in the images of a machine that is off."""
    texts = [run("qemu-img", "info", "--output=json", disk.path) for disk in vm.disks.values()]
    return sorted({name for text in texts for name in re.findall(r'"(vnb\.[^"]+)"', text)})


@pytest.mark.parametrize("running", [True, False])
def test_cleanup_removes_bitmaps_that_no_catalog_needs(lab, vm, directory, running):
    """Those that are older than what the next increment starts from, of a domain that was defined anew meanwhile."""
    for _ in range(4):  # of each life the full's stays, and libvirt forgets it
        backup(lab, vm, "full", directory)
        vm.destroy()
        forget(vm)
        vm.start()
    backup(lab, vm, "inc", directory)  # it redefines the latest of them, and drops what is not needed of these
    kept = vm.checkpoints()
    vm.destroy()
    gone = sorted(set(bitmaps(vm)) - set(kept))
    assert gone
    if running:
        vm.start()
    done = lab.sh(f"vnb-checkpoint cleanup {vm.name} --set {directory}")
    assert [line.split("removing bitmap ")[1].split(",")[0] for line in done.stderr.splitlines()] == gone
    vm.destroy()
    assert bitmaps(vm) == kept
    vm.start()
    vm.write("vda", 0, MiB)
    backup(lab, vm, "inc", directory)
    restores(lab, directory, vm.reference())


@pytest.mark.parametrize("running", [True, False])
def test_bitmaps_of_no_catalog_that_is_known_are_named_and_stay(lab, vm, directory, running):
    """A copy of another domain's image has that one's bitmaps: only who names its set knows that nobody needs them."""
    backup(lab, vm, "full", directory)
    vm.destroy()
    point, = vm.checkpoints()
    copy = lab.domain(Disk("vda", path=vm.disks["vda"].path), start=running)
    try:
        done = lab.sh(f"vnb-checkpoint cleanup {copy.name}")
        assert f"{copy.name}: vda: bitmap {point} has no checkpoint, and is of no catalog that is known" in done.stderr
        done = lab.sh(f"vnb-checkpoint cleanup {copy.name} --set {directory}")
        assert done.stderr == (f"vnb-checkpoint: {copy.name}: vda: removing bitmap {point}, "
                               f"which is of domain {vm.name}, saved in {directory}\n")
        copy.destroy()
        assert bitmaps(copy) == []
    finally:
        copy.remove()


@pytest.mark.parametrize("running", [True, False])
def test_delete_takes_the_bitmaps_along_whose_checkpoints_were_forgotten(lab, vm, directory, running):
    backup(lab, vm, "full", directory)
    vm.destroy()
    forget(vm)
    if running:
        vm.start()
    lab.sh(f"vnb-checkpoint delete {vm.name} --set {directory}")
    vm.destroy()
    assert bitmaps(vm) == []


def test_disks_that_will_be_taken_in_full_are_counted(lab, vm, directory):
    """QEMU was killed: libvirt says nothing of their sizes, and that is not 0."""
    vm.write("vda", 0, 4 * MiB)
    vm.flush()
    backup(lab, vm, "full", directory)
    point, = vm.checkpoints()
    vm.kill()
    vm.start()
    row = listed(lab, vm, directory)[point]
    assert row["full"] == ["vda", "vdb"]
    assert row["increment"] >= 4 * MiB
    done = lab.sh(f"vnb-checkpoint size {vm.name} --set {directory} --json")
    assert "vda: full in this increment: its bitmap of " in done.stderr
    assert json.loads(done.stdout)["disks"]["vda"] >= 4 * MiB


def test_size_of_a_domain_that_is_off(lab, vm, directory):
    """qemu-nbd tells, over an overlay too: the changes of both layers, each once."""
    backup(lab, vm, "full", directory)
    vm.write("vda", 0, 2 * MiB)
    snapshot(lab, vm)
    vm.write("vda", MiB, 2 * MiB)
    vm.destroy()
    done = lab.sh(f"vnb-checkpoint size {vm.name} --set {directory} --json")
    assert json.loads(done.stdout)["disks"] == {"vda": 3 * MiB, "vdb": 0}


def test_a_threshold_of_a_domain_that_is_off(lab, vm, directory):
    """As one of many domains whose vnb.ini has it: a full is always taken, an increment only where there is enough."""
    vm.destroy()
    for written, saved in ((None, 1), (None, 1), ("write 0 2M", 2)):
        if written:
            run("qemu-io", "-f", "qcow2", "-c", written, vm.disks["vda"].path)
        done = backup(lab, vm, "auto", directory, "--threshold 1m")
        assert len(levels(directory)) == saved, done.stderr
    assert levels(directory) == ["full", "inc"]
    assert lab.leftovers() == []


def test_a_threshold_does_not_stop_the_first_full(lab, vm, directory):
    done = backup(lab, vm, "auto", directory, "--threshold 1t")
    assert levels(directory) == ["full"]
    done = backup(lab, vm, "auto", directory, "--threshold 1t")
    assert "0 bytes to back up, less than " in done.stderr
    assert levels(directory) == ["full"]


def test_a_set_with_only_a_copy_says_so(lab, vm, directory):
    backup(lab, vm, "copy", directory)
    done = backup(lab, vm, "auto", directory)
    why = f"no restore point in {directory} has a checkpoint: levels copy and diff make none"
    assert f"full backup: {why}\n" in done.stderr


def test_abort_names_the_job_of_another_program(lab, vm):
    server = f"<server transport='unix' socket='{vm.private_directory()}/x'/>"
    vm.handle.backupBegin(f"<domainbackup mode='pull'>{server}</domainbackup>", None)
    try:
        done = lab.sh(f"vnb-checkpoint abort {vm.name}")
        assert done.stderr == (f"vnb-checkpoint: {vm.name}: a backup job of another program is active: left alone "
                               "(virsh domjobabort ends it)\n")
        assert vm.has_job()
    finally:
        vm.handle.abortJob()
