# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-backup and vnb-restore on a machine that runs."""

import json
import os
import signal
import subprocess
import time

import pytest
from backups import levels, restores
from lab import ROOT, Disk, MiB, compare, wait_for

BACKUP, RESTORE = ROOT / "bin" / "vnb-backup", ROOT / "bin" / "vnb-restore"


def test_a_chain_and_its_restore(lab, vm):
    """Full the first time, then increments; a name with a space all the way; each point comes back."""
    directory = lab.path("a set", vm.name)
    references = []
    for number in range(3):
        vm.write_random("vda", (10 + number) * MiB, MiB, seed=number)
        vm.zero("vda", 2 * MiB, number * MiB or 4096)
        references.append(vm.reference())
        lab.sh(f'{BACKUP} -z --no-freeze {vm.name} "{directory}"')
    assert levels(directory) == ["full", "inc", "inc"]
    restores(lab, f'"{directory}"', references[-1])
    middle = sorted(os.listdir(directory))[1].removesuffix(".inc.vnb")
    target = lab.new_directory("restored")
    lab.sh(f'{RESTORE} --until {middle} --format raw "{directory}" {target}')
    for disk, reference in references[1].items():
        compare(reference, f"{target}/{disk}.raw", "raw")
    assert os.path.exists(f"{target}/domain.xml")


def test_a_new_folder_begins_with_a_full_backup(lab, vm):
    """Rotation, with the old folder's checkpoints removed by the command that the page names."""
    old, new = lab.path(f"{vm.name}.old"), lab.path(f"{vm.name}.%Y", "set")
    lab.sh(f"{BACKUP} --no-freeze {vm.name} {old}")
    lab.sh(f"{BACKUP} --no-freeze {vm.name} {new}")
    done = lab.sh(f"{BACKUP} --no-freeze {vm.name} {new}")
    assert "inc" in done.stderr or done.stderr == ""
    this_year = time.strftime(new)
    assert levels(old) == ["full"]
    assert levels(this_year) == ["full", "inc"]
    assert len(vm.checkpoints()) == 3
    lab.sh(f"vnb-checkpoint delete --set {old} {vm.name}")
    assert len(vm.checkpoints()) == 2
    vm.write_random("vda", 20 * MiB, MiB, seed=3)
    reference = vm.reference()
    lab.sh(f"{BACKUP} --no-freeze {vm.name} {new}")
    restores(lab, this_year, reference)


def test_some_disks_and_a_threshold(lab, vm):
    directory = lab.new_directory("set")
    lab.sh(f"{BACKUP} --no-freeze --include vdb {vm.name} {directory}")
    restores(lab, directory, {"vdb": vm.reference()["vdb"]})
    done = lab.sh(f"{BACKUP} --no-freeze --include vdb --threshold 1G {vm.name} {directory}")
    assert "less than" in done.stderr
    assert levels(directory) == ["full"]


def test_verify(lab, vm):
    if lab.sh("vnb-verify --help", check=False).returncode != 0:
        pytest.skip("there is no vnb-verify yet")
    directory = lab.new_directory("set")
    lab.sh(f"{BACKUP} --verify --no-freeze {vm.name} {directory}")
    path = os.path.join(directory, os.listdir(directory)[0])
    with open(path, "r+b") as file:
        file.seek(3 * MiB)
        byte = file.read(1)
        file.seek(3 * MiB)
        file.write(bytes([byte[0] ^ 1]))
    done = lab.sh(f"{BACKUP} --verify --no-freeze {vm.name} {directory}", check=False)
    assert done.returncode == 3
    assert levels(directory) == ["full", "inc"]


def test_all_machines_and_what_is_kept_of_them(no_machines, lab, vm):
    """Two at a time, one of them off; one that fails does not keep the others from their backup."""
    other = lab.domain(Disk("vda", 16 * MiB), start=False)
    bad = lab.domain(Disk("vda", 16 * MiB, format="raw"), start=False)
    try:
        directory = lab.new_directory("all sets")
        for number in range(3):
            vm.write_random("vda", (10 + number) * MiB, MiB, seed=number)
            done = lab.sh(f'{BACKUP}-all --jobs 2 --no-freeze --verify --keep-last 1 "{directory}"', check=False)
            said = {line for line in done.stderr.splitlines() if line.startswith("vnb-backup-all: ")}
            assert done.returncode == 1
            assert said == {
                f"vnb-backup-all: {vm.name}: done", f"vnb-backup-all: {other.name}: done",
                f"vnb-backup-all: {bad.name}: failed with status 1",
            }
        for machine in (vm, other):
            assert levels(f"{directory}/{machine.name}") == ["full"]  # what was dropped is merged into it
        restores(lab, f'"{directory}/{vm.name}"', vm.reference())
    finally:
        other.remove()
        bad.remove()


def test_a_backup_that_fails_leaves_nothing(lab, vm):
    directory = lab.new_directory("set")
    commands = lab.new_directory("bin")
    with open(f"{commands}/vnb-pack", "w") as script:
        script.write("#!/bin/sh\necho vnb-pack: worn out >&2; exit 1\n")
    os.chmod(f"{commands}/vnb-pack", 0o700)
    done = lab.sh(f"PATH={commands}:$PATH {BACKUP} --no-freeze {vm.name} {directory}", check=False)
    assert done.returncode == 1
    assert "vnb-pack: worn out\n" in done.stderr
    assert os.listdir(directory) == []
    assert vm.checkpoints() == []
    assert lab.sh(f"{BACKUP} no-such-domain {directory}", check=False).returncode == 1


def test_a_backup_that_is_stopped_leaves_nothing(lab, vm):
    """It is vnb-checkpoint itself by then, so who ends the script ends the backup."""
    directory = lab.new_directory("set")
    vm.write_random("vda", 8 * MiB, 32 * MiB, seed=5)
    slow = lab.new_directory("bin")
    with open(f"{slow}/vnb-read", "w") as script:
        script.write("#!/bin/sh\nexec sleep 60\n")
    os.chmod(f"{slow}/vnb-read", 0o700)
    process = subprocess.Popen([BACKUP, "--no-freeze", vm.name, directory],
                               env={**lab.env, "PATH": f"{slow}:{lab.env['PATH']}"}, start_new_session=True)
    try:
        wait_for(lambda: any("sleep 60" in line for line in lab.processes().values()), "the pipeline")
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()
        for pid, line in lab.processes().items():
            if "sleep 60" in line:
                os.kill(pid, signal.SIGKILL)
    assert os.listdir(directory) == []
    assert vm.checkpoints() == []


def test_one_run_in_all_that_is_said(lab, vm):
    """By all commands, from the keeper's notes to the sum, in lines for programs; and in the head."""
    directory = lab.new_directory("set")
    done = lab.sh(f"{BACKUP} -v --log-format json --progress json --verify --no-freeze {vm.name} {directory}")
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    commands = {line["command"] for line in lines if line.get("message")}
    assert commands == {"vnb-checkpoint", "vnb-extents", "vnb-read", "vnb-pack", "vnb-verify"}
    run, = {line["run"] for line in lines}
    head = json.loads(lab.sh(f"vnb-cat --head {directory} | vnb-dump --json").stdout.splitlines()[0])
    assert run in json.dumps(head)
    summary, = [line["summary"] for line in lines if "summary" in line]
    assert summary["data"] + summary["zero"] + summary["hole"] == sum(disk.size for disk in vm.disks.values())
    assert summary["data"] >= summary["stored"] > 0
