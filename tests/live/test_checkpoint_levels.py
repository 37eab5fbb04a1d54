# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-checkpoint: every level of a running domain, and what a disk that cannot follow gets."""

import json
import os
import re
import shutil
import sys

import libvirt
import makers
import pytest
from backups import STORE, backup, levels, listed, lose_bitmap, restores, snapshot, tip
from lab import Disk, MiB, wait_for


@pytest.fixture
def directory(lab):
    return lab.new_directory("set")


def change(vm, step):
    """Write, zero and trim at places that differ from step to step and overlap with what was there."""
    for name in vm.disks:
        vm.write(name, step * MiB, 3 * MiB, pattern=0x10 + step)
        vm.write_random(name, (20 + step) * MiB, 2 * MiB, seed=step)
        vm.zero(name, (step + 1) * MiB, MiB // 2)
        vm.zero(name, (20 + step) * MiB, MiB, unmap=True)
        vm.discard(name, (step + 2) * MiB, MiB // 4)


def test_each_point_of_a_chain_restores(lab, vm, directory):
    points = []
    for step, level in enumerate(["full", "inc", "auto", "inc"]):
        change(vm, step)
        backup(lab, vm, level, directory)
        points.append((tip(lab, directory), vm.reference()))
    assert levels(directory) == ["full", "inc", "inc", "inc"]
    for point, reference in points:
        restores(lab, directory, reference, point)
    assert lab.leftovers() == []


def test_a_range_that_the_guest_zeroed_restores_as_zero(lab, vm, directory):
    """Dirty and zero in the source must not be left out: the old bytes would come back."""
    vm.write("vda", 8 * MiB, 12 * MiB, pattern=0x22)
    backup(lab, vm, "full", directory)
    vm.zero("vda", 8 * MiB, 4 * MiB)
    vm.zero("vda", 12 * MiB, 4 * MiB, unmap=True)
    vm.discard("vda", 16 * MiB, 4 * MiB)
    backup(lab, vm, "inc", directory)
    restores(lab, directory, vm.reference())


@pytest.mark.parametrize("level", ["full", "auto"])
@pytest.mark.parametrize("place, reason", [
    ("file", "Not a directory"), ("file/set", "Not a directory"), ("other", "is a set of domain vm1 "),
])
def test_a_set_that_cannot_take_it_is_refused_before_anything_begins(lab, vm, directory, level, place, reason):
    with open(os.path.join(directory, "file"), "w"):
        pass
    makers.make_set(os.path.join(directory, "other"), [{"vda": "64k:A"}])
    done = backup(lab, vm, level, os.path.join(directory, place), check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"vnb-checkpoint: {directory}/{place}: {reason}")
    assert done.stderr.count("\n") == 1
    assert vm.checkpoints() == []


def test_auto_says_what_it_chose_and_why(lab, vm, directory):
    done = backup(lab, vm, "auto", directory)
    assert f"{vm.name}: full backup: no earlier backup is saved in {directory}" in done.stderr
    done = backup(lab, vm, "auto", directory)
    assert f"{vm.name}: increment since {sorted(vm.checkpoints())[0]}" in done.stderr
    assert levels(directory) == ["full", "inc"]


def test_auto_makes_a_full_when_the_checkpoints_are_gone(lab, vm, directory):
    backup(lab, vm, "full", directory)
    for checkpoint in vm.handle.listAllCheckpoints():
        checkpoint.delete()
    assert backup(lab, vm, "inc", directory, check=False).returncode == 1
    done = backup(lab, vm, "auto", directory)
    assert (f"full backup: the checkpoints of the restore points in {directory} are all gone, and cannot be redefined: "
            in done.stderr)
    assert levels(directory) == ["full", "full"]
    restores(lab, directory, vm.reference())


def test_copy_leaves_no_checkpoint_and_takes_any_format(lab, directory):
    vm = lab.domain(Disk("vda"), Disk("vdb", format="raw"), Disk("vdc", compat="0.10"))
    for name in vm.disks:
        vm.write(name, MiB, MiB)
    backup(lab, vm, "copy", directory)
    assert vm.checkpoints() == []
    restores(lab, directory, vm.reference())


def test_diff_leaves_no_checkpoint_and_counts_from_where_it_is_told(lab, vm, directory):
    change(vm, 0)
    backup(lab, vm, "full", directory)
    full = tip(lab, directory)
    change(vm, 1)
    backup(lab, vm, "inc", directory)
    before = vm.checkpoints()
    change(vm, 2)
    backup(lab, vm, "diff", directory)
    reference = vm.reference()
    restores(lab, directory, reference)
    backup(lab, vm, "diff", directory, "--base full")
    restores(lab, directory, reference)
    backup(lab, vm, "diff", directory, f"--base {full}")
    restores(lab, directory, reference)
    assert vm.checkpoints() == before
    # A diff is a leaf: the next increment goes on from the last point with a checkpoint.
    change(vm, 3)
    backup(lab, vm, "inc", directory)
    restores(lab, directory, vm.reference())


def test_only_the_last_fulls_checkpoint_and_the_newest_two_stay(lab, vm, directory):
    backup(lab, vm, "full", directory)
    full = tip(lab, directory)
    made = []
    for _ in range(4):
        backup(lab, vm, "inc", directory)
        made.append(tip(lab, directory))
    assert vm.checkpoints() == sorted([full, *made[-2:]])


def test_two_chains_side_by_side_and_a_foreign_checkpoint(lab, vm):
    vm.handle.checkpointCreateXML("<domaincheckpoint><name>foreign</name></domaincheckpoint>", 0)
    sets = {"a": lab.new_directory("set"), "b": lab.new_directory("set")}
    points = []
    for step, chain in enumerate("abaabb"):
        change(vm, step)
        backup(lab, vm, "auto", sets[chain], f"--chain {chain}")
        points.append((sets[chain], tip(lab, sets[chain]), vm.reference()))
    for directory, point, reference in points:
        restores(lab, directory, reference, point)
    assert "foreign" in vm.checkpoints()
    rows = listed(lab, vm, sets["a"])
    assert not rows["foreign"]["ours"]
    assert {row["chain"] for row in rows.values()} == {None, "a", "b"}


def test_a_disk_that_is_new_or_whose_bitmap_is_missing_is_full_inside_an_increment(lab, vm, directory):
    change(vm, 0)
    backup(lab, vm, "full", directory, "--exclude vdb")
    change(vm, 1)
    done = backup(lab, vm, "inc", directory)
    assert f"{vm.name}: vdb: full in this increment: " in done.stderr
    restores(lab, directory, vm.reference())
    # QEMU died hard: no bitmap is sound any more.
    vm.kill()
    vm.start()
    change(vm, 2)
    done = backup(lab, vm, "inc", directory)
    assert "vda: full in this increment" in done.stderr
    assert "vdb: full in this increment" in done.stderr
    restores(lab, directory, vm.reference())
    change(vm, 3)
    assert "full" not in backup(lab, vm, "inc", directory).stderr
    restores(lab, directory, vm.reference())


def test_a_grown_disk_follows_and_a_shrunk_one_is_full(lab, vm, directory):
    change(vm, 0)
    backup(lab, vm, "full", directory)
    vm.handle.blockResize("vda", 96 * MiB, 1)  # bytes
    vm.write("vda", 80 * MiB, MiB)
    assert "full in" not in backup(lab, vm, "inc", directory).stderr
    grown = tip(lab, directory)
    reference = vm.reference()
    restores(lab, directory, reference)
    vm.handle.blockResize("vda", 32 * MiB, 1)
    done = backup(lab, vm, "inc", directory)
    assert f"vda: full in this increment: it shrank from {96 * MiB} to {32 * MiB} bytes" in done.stderr
    restores(lab, directory, vm.reference())
    restores(lab, directory, reference, grown)


def test_raw_and_v2_disks_are_refused_by_name_or_taken_in_full(lab, directory):
    vm = lab.domain(Disk("vda"), Disk("vdb", format="raw"))
    done = backup(lab, vm, "full", directory, check=False)
    assert done.returncode == 1
    assert done.stderr == (f"vnb-checkpoint: {vm.name}: vdb: a raw image cannot hold a bitmap: "
                           "--raw takes it in full each time, --exclude vdb leaves it out\n")
    change(vm, 0)
    backup(lab, vm, "full", directory, "--raw")
    change(vm, 1)
    assert "vdb: full in this increment: a raw image" in backup(lab, vm, "inc", directory, "--raw").stderr
    restores(lab, directory, vm.reference())
    done = backup(lab, vm, "inc", directory, "--raw -q")  # as cron does each night: it is meant, so it is no warning
    assert "full in this increment" not in done.stderr
    old = lab.domain(Disk("vda", compat="0.10"))
    done = backup(lab, old, "full", lab.new_directory("set"), check=False)
    assert done.returncode == 1
    assert "vda: a qcow2 image of version 2 cannot hold a bitmap" in done.stderr
    assert lab.leftovers() == []


@pytest.mark.parametrize("options", ["--scratch-dir /nonexistent", "--scratch-reserve 900T"])
def test_a_scratch_without_room_is_refused_before_the_job(lab, vm, directory, options):
    """The job would be ended at the first look, after the guest was frozen for it."""
    begun = vm.handle.jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED)
    done = backup(lab, vm, "full", directory, options, check=False)
    assert done.returncode == 1
    assert re.search("/nonexistent: no such directory|left, .* see --scratch-dir and --scratch-reserve", done.stderr)
    assert vm.handle.jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED) == begun
    assert vm.checkpoints() == []


def test_an_address_of_another_host_is_said_to_be_that(lab, vm, directory):
    done = backup(lab, vm, "full", directory, "--nbd-listen 192.0.2.1", check=False)
    assert done.returncode == 1
    assert "vnb-checkpoint: --nbd-listen: 192.0.2.1: QEMU cannot listen there (is it an address of " in done.stderr


def test_much_metadata_is_saved_or_refused_before_the_job(lab, vm, directory):
    """The head has the domain's XML four times. What does not fit there must not be found after the freeze."""
    both = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
    vm.handle.setMetadata(libvirt.VIR_DOMAIN_METADATA_DESCRIPTION, "x" * 700_000, None, None, both)
    backup(lab, vm, "full", directory)
    restores(lab, directory, vm.reference())
    assert lab.sh(f"vnb-cat --head {directory} | vnb-config | wc -c").stdout > b"700000"
    vm.handle.setMetadata(libvirt.VIR_DOMAIN_METADATA_DESCRIPTION, "x" * 1_200_000, None, None, both)
    done = backup(lab, vm, "full", directory, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f'vnb-checkpoint: {vm.name}: its XML does not fit into a backup: frame "vnb" is too large: ' in done.stderr
    assert not vm.has_job()
    vm.handle.setMetadata(libvirt.VIR_DOMAIN_METADATA_DESCRIPTION, None, None, None, both)


def test_run_hears_of_the_end_while_nobody_reads_its_stream(lab, vm, directory):
    """The head alone is more than a pipe takes."""
    both = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
    vm.handle.setMetadata(libvirt.VIR_DOMAIN_METADATA_DESCRIPTION, "x" * 100_000, None, None, both)
    done = backup(lab, vm, "full", directory, "--deadline 1s", check=False, store="exec sleep 1000")
    assert done.returncode == 1
    assert done.stderr.endswith("the job is ended: its deadline of 1 seconds has passed\n")
    assert (vm.has_job(), vm.checkpoints()) == (False, [])


def test_a_backing_chain_and_other_cluster_sizes(lab, directory):
    base = Disk("vda", cluster_size=4096)
    base.create(lab.directory)
    vm = lab.domain(Disk("vda", backing=base.path), Disk("vdb", cluster_size=2 * MiB))
    change(vm, 0)
    backup(lab, vm, "full", directory)
    change(vm, 1)
    backup(lab, vm, "inc", directory)
    restores(lab, directory, vm.reference())


def test_include_exclude_and_what_is_left_out(lab, vm, directory):
    done = backup(lab, vm, "full", directory, "--include vdz", check=False)
    assert done.returncode == 1
    assert done.stderr == f"vnb-checkpoint: --include: {vm.name} has no disk vdz: there is vda, vdb\n"
    done = backup(lab, vm, "full", directory, "--exclude vda --exclude vdb", check=False)
    assert (done.returncode, done.stderr) == (1, f"vnb-checkpoint: {vm.name}: no disk is left to back up\n")
    backup(lab, vm, "full", directory, "--include vda")
    restores(lab, directory, vm.reference("vda"))


def test_a_threshold_that_is_not_met_costs_nothing(lab, vm, directory):
    backup(lab, vm, "full", directory)
    before = vm.checkpoints()
    done = lab.sh(f"vnb-checkpoint begin {vm.name} --level inc --set {directory} --threshold 1m | cat", check=False)
    assert done.returncode == 4
    assert done.stdout == b""
    done = backup(lab, vm, "inc", directory, "--threshold 1m", store="echo started")
    assert b"started" not in done.stdout
    assert f"{vm.name}: 0 bytes to back up, less than {MiB}" in done.stderr
    assert vm.checkpoints() == before
    vm.write("vda", 0, 2 * MiB)
    backup(lab, vm, "inc", directory, "--threshold 1m")
    assert levels(directory) == ["full", "inc"]
    assert lab.leftovers() == []


def test_the_receiver_names_the_base_of_a_stream_that_goes_elsewhere(lab, vm):
    """With the name of the destination too, what was committed is remembered, and the next one needs no base."""
    elsewhere = lab.new_directory("set")
    change(vm, 0)
    script = (
        "vnb-checkpoint begin {vm} --level {level} --destination elsewhere {base} | "
        "vnb-extents | vnb-read | vnb-pack -z | vnb-pack -o {set} && "
        "vnb-checkpoint commit {vm} || {{ vnb-checkpoint abort {vm}; exit 1; }}"
    )
    lab.sh(script.format(vm=vm.name, level="full", base="", set=elsewhere))
    change(vm, 1)
    lab.sh(script.format(vm=vm.name, level="inc", base=f"--base $(vnb-cat --base {elsewhere})", set=elsewhere))
    change(vm, 2)
    lab.sh(script.format(vm=vm.name, level="inc", base="", set=elsewhere))  # by the heads in the state directory
    restores(lab, elsewhere, vm.reference())
    assert lab.leftovers() == []


def test_without_sparse_detection_dirty_zeroes_are_read(lab, vm, directory):
    backup(lab, vm, "full", directory)
    vm.zero("vda", MiB, 2 * MiB, unmap=True)
    extents = f"{directory}.extents"
    backup(lab, vm, "inc", directory, "--no-sparse-detection",
           store=f"vnb-extents | tee {extents} | vnb-read | vnb-pack -o {{set}}")
    for command, data in ((f"vnb-dump --json < {extents}", 2 * MiB), (f"vnb-cat {directory} | vnb-dump --json", 0)):
        text = lab.sh(command).stdout.decode()
        end = [line for line in text.splitlines() if '"digest"' in line][-1]
        assert json.loads(end)["fields"]["data"] == data
    restores(lab, directory, vm.reference())


def swap_images(lab, vm):
    """What happens where disks are unplugged and plugged in again in another order."""
    vm.destroy()
    one, other = vm.disks["vda"], vm.disks["vdb"]
    one.path, other.path = other.path, one.path
    lab.connection.defineXML(vm.xml())


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("given", ["", "--base {}"])
def test_images_that_have_changed_places_are_taken_in_full(lab, vm, directory, running, given):
    """Each has a bitmap of that name, and the changes that it tells of are those of the other disk."""
    vm.write("vdb", 20 * MiB, MiB, pattern=0x55)
    backup(lab, vm, "full", directory)
    swap_images(lab, vm)
    if running:
        vm.start()
        vm.write("vda", 30 * MiB, MiB, pattern=0x66)
    done = backup(lab, vm, "inc", directory, given.format(tip(lab, directory)))
    for name in ("vda", "vdb"):
        assert f"{vm.name}: {name}: full in this increment: its image is another one than " in done.stderr
    if not running:
        vm.start()
    restores(lab, directory, vm.reference())
    done = backup(lab, vm, "inc", directory)
    assert "full in this" not in done.stderr


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("is_set", [True, False])
def test_files_that_have_changed_places_under_the_same_paths(lab, vm, directory, running, is_set):
    """Neither libvirt nor the paths know of it; the heads in the state directory do as the set does."""
    def take(level):
        options = f"--level {level} " + (f"--set {directory}" if is_set else "--destination elsewhere")
        return lab.sh(f"vnb-checkpoint run {vm.name} {options} -- '{STORE.format(set=directory)}'").stderr

    vm.write("vdb", 20 * MiB, MiB, pattern=0x55)
    take("full")
    vm.destroy()
    one, other = vm.disks["vda"].path, vm.disks["vdb"].path
    os.rename(one, f"{one}.away")
    os.rename(other, one)
    os.rename(f"{one}.away", other)
    if running:
        vm.start()
        vm.write("vda", 30 * MiB, MiB, pattern=0x66)
    said = take("inc")
    for name, other in (("vda", "vdb"), ("vdb", "vda")):
        assert f"{vm.name}: {name}: full in this increment: its image is the file that {other} had at " in said
    if not running:
        vm.start()
    restores(lab, directory, vm.reference())
    assert "full in this" not in take("inc")


def test_images_that_have_changed_places_after_a_redefine(lab, vm, directory):
    """libvirt does not know any more which images its checkpoint was of, but the set does."""
    backup(lab, vm, "full", directory)
    for checkpoint in vm.handle.listAllCheckpoints():
        checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    swap_images(lab, vm)
    vm.start()
    lab.sh(f"vnb-checkpoint redefine {vm.name} --set {directory}")
    done = backup(lab, vm, "inc", directory)
    assert done.stderr.count("full in this increment: its image is another one than ") == 2
    restores(lab, directory, vm.reference())


def test_over_a_snapshot_and_back(lab, vm, directory):
    """An image below is one of the disk's; the overlay that was committed into it is gone, so it is taken in full."""
    backup(lab, vm, "full", directory)
    vm.write("vda", 30 * MiB, MiB)
    snapshot(lab, vm)
    vm.write("vda", 40 * MiB, MiB)
    assert "full in this" not in backup(lab, vm, "inc", directory).stderr
    restores(lab, directory, vm.reference())
    vm.write("vda", 50 * MiB, MiB)
    vm.handle.blockCommit("vda", None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
    wait_for(lambda: vm.handle.blockJobInfo("vda")["cur"] == vm.handle.blockJobInfo("vda")["end"] > 0, "end of commit")
    vm.handle.blockJobAbort("vda", libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    done = backup(lab, vm, "inc", directory)
    assert f"{vm.name}: vda: full in this increment: its image is another one than " in done.stderr
    assert "vdb: full" not in done.stderr
    restores(lab, directory, vm.reference())


def test_a_diff_with_a_broken_bitmap_leaves_the_checkpoints(lab, vm, directory):
    """It makes none that could take their place, and those of the other disks are sound."""
    backup(lab, vm, "full", directory)
    point = tip(lab, directory)
    lose_bitmap(vm, "vdb", point)
    assert f"{vm.name}: vdb: full in this increment" in backup(lab, vm, "diff", directory).stderr
    assert vm.checkpoints() == [point]
    done = backup(lab, vm, "inc", directory)
    assert "vda: full" not in done.stderr
    restores(lab, directory, vm.reference())


def test_auto_begins_anew_where_the_set_lost_a_segment(lab, vm, directory):
    backup(lab, vm, "full", directory)
    backup(lab, vm, "inc", directory)
    full, = (name for name in os.listdir(directory) if name.endswith(".full.vnb"))
    os.unlink(os.path.join(directory, full))
    done = backup(lab, vm, "inc", directory, check=False)
    why = f"no restore point in {directory} has all that it needs"
    assert done.stderr == f"vnb-checkpoint: {vm.name}: {why}: a full backup is needed first (--level full, or auto)\n"
    assert f"full backup: {why}" in backup(lab, vm, "auto", directory).stderr
    vm.write("vda", 20 * MiB, MiB)
    assert "increment since " in backup(lab, vm, "auto", directory).stderr
    restores(lab, directory, vm.reference())


def test_a_point_is_later_than_its_parent_whose_head_is_elsewhere(lab, vm, directory):
    """The clock went back since, and --base names it alone: its name has its time."""
    ahead = """import datetime, sys, vnb.format.heads as heads
now = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=2)
heads.now = lambda: now.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
from vnb.cli.runner import command
command("vnb-checkpoint", "vnb.cli.checkpoint")"""
    store = STORE.format(set=directory)
    lab.sh(f"{sys.executable} -c '{ahead}' run {vm.name} --level full --destination elsewhere -- '{store}'")
    shutil.rmtree(lab.path("state", "destinations"))
    full = tip(lab, directory)
    lab.sh(f"vnb-checkpoint run {vm.name} --level inc --base {full} -- '{store}'")
    assert tip(lab, directory) != full
    lab.sh(f"vnb-verify {directory}")
