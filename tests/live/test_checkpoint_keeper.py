# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keeper: a job that nobody ends is ended, whoever was killed; a backup never costs the guest its life."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import libvirt
import pytest
from backups import STORE, backup, deaf, in_handshake, levels, listed, lose_job_data, record, restores, tip
from guest import linux
from lab import Disk, MiB, run, wait_for

from vnb.virt.backup_job import JOB_END_SECONDS
from vnb.virt.domain import Domain

NO_CUT = "setpriv --bounding-set=-sys_ptrace --"  # before a command: it may touch no connections of other processes
LISTEN = ["", "--nbd-listen 127.0.0.1"]
# A stage that has its input and does not end by itself: tail follows what never grows.
ENDLESS = "cat > /dev/null; exec tail -f /dev/null"


@pytest.fixture
def directory(lab):
    return lab.new_directory("set")


def start(lab, script):
    """A bash script in the background."""
    return subprocess.Popen(
        ["bash", "-c", "set -o pipefail\n" + script], env=lab.env, cwd=lab.directory, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )


def running(lab, vm):
    """Wait until the job runs; its record."""
    wait_for(lambda: (record(lab, vm) or {}).get("phase") == "running", "the job")
    return record(lab, vm)


def rewrite(lab, vm, **fields):
    """Have the record say what it said at an earlier moment."""
    changed = {**record(lab, vm), **fields}
    with open(lab.path("state", "jobs", vm.uuid, "job.json"), "w", encoding="utf-8") as file:
        json.dump(changed, file)


def keeper_log(lab, vm):
    with open(lab.path("state", "jobs", vm.uuid, "keeper.log"), encoding="utf-8") as file:
        return file.read()


def begin(lab, vm, directory, level="full", options="", prefix=""):
    lab.sh(f"{prefix} vnb-checkpoint begin {vm.name} --level {level} --set {directory} {options} > {lab.path('begun')}")


def test_run_killed_ends_the_job_and_loses_nothing(lab, vm, directory):
    backup(lab, vm, "full", directory)
    vm.write("vda", 0, MiB)
    process = start(lab, f"exec vnb-checkpoint run {vm.name} --level inc --set {directory} -- '{ENDLESS}'")
    running(lab, vm)
    before = vm.checkpoints()
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not vm.has_job(), "the end of the job")
    wait_for(lambda: len(vm.checkpoints()) == len(before) - 1, "the end of its checkpoint")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    vm.write("vda", 2 * MiB, MiB)
    backup(lab, vm, "inc", directory)
    restores(lab, directory, vm.reference())


def test_the_keeper_killed_has_its_job_ended_by_run(lab, vm, directory):
    backup(lab, vm, "full", directory)
    before = vm.checkpoints()
    process = start(lab, f"exec vnb-checkpoint run {vm.name} --level inc --set {directory} -- '{ENDLESS}'")
    os.kill(running(lab, vm)["owner"]["pid"], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the keeper was killed by SIGKILL: ending its job" in said
    assert not vm.has_job()
    assert vm.checkpoints() == before


def test_run_says_what_it_waits_for(lab, vm, directory):
    """A libvirtd that hangs, at the start and at the end: nobody has to guess."""
    pid = lab.libvirtd_pid()
    for stop in "", f"kill -STOP {pid}":
        if not stop:
            os.kill(pid, signal.SIGSTOP)
        store = f"{STORE.format(set=directory)}; {stop or 'true'}"
        process = start(lab, f"exec vnb-checkpoint run {vm.name} --level full --set {directory} -- '{store}'")
        said = next(line for line in process.stderr if "waiting for" in line)
        os.kill(pid, signal.SIGCONT)
        assert re.fullmatch(r"vnb-checkpoint: waiting for libvirt .*, 5 seconds by now\n", said)
        _, rest = process.communicate(timeout=60)
        assert process.returncode == 0, rest
    assert len(levels(directory)) == 2


def test_both_killed_is_put_right_by_the_next_backup(lab, vm, directory):
    backup(lab, vm, "full", directory)
    begin(lab, vm, directory, "inc")
    os.kill(record(lab, vm)["owner"]["pid"], signal.SIGKILL)
    assert vm.has_job()
    vm.write("vda", 0, MiB)
    done = backup(lab, vm, "inc", directory)
    assert "ending the job of a keeper that died" in done.stderr
    assert len(vm.checkpoints()) == 2
    restores(lab, directory, vm.reference())


def test_abort_and_commit_after_the_keeper_was_killed(lab, vm, directory):
    begin(lab, vm, directory)
    os.kill(record(lab, vm)["owner"]["pid"], signal.SIGKILL)
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    assert vm.checkpoints() == []
    lab.sh(f"vnb-checkpoint begin {vm.name} --level full --set {directory} | vnb-extents | vnb-read"
           f" | vnb-pack -o {directory}")
    os.kill(record(lab, vm)["owner"]["pid"], signal.SIGKILL)
    lab.sh(f"vnb-checkpoint commit {vm.name}")
    assert vm.checkpoints() == [tip(lab, directory)]


@pytest.mark.parametrize(
    "command", ["cleanup --set {set} {vm}", "abort {vm}", "run --level copy --no-proof {vm} -- cat"]
)
@pytest.mark.parametrize("since", ["nothing", "resumed", "started anew", "stopped"])
def test_a_guest_that_is_suspended_for_a_dead_keeper_is_resumed_if_it_still_is(lab, vm, directory, command, since):
    """A guest that somebody has resumed cannot be resumed: that is no reason to refuse all backups."""
    begin(lab, vm, directory)
    os.kill(record(lab, vm)["owner"]["pid"], signal.SIGKILL)
    vm.pause()
    rewrite(lab, vm, suspended=vm.handle.ID())
    if since == "resumed":
        vm.resume()
    elif since != "nothing":
        vm.destroy()
    if since == "started anew":
        vm.start(paused=True)
    state = vm.state()
    lab.sh(f"vnb-checkpoint {command.format(set=directory, vm=vm.name)} > {lab.path('out')}")
    assert record(lab, vm) is None
    assert vm.state() == (libvirt.VIR_DOMAIN_RUNNING if since == "nothing" else state)


@pytest.mark.parametrize("listen", LISTEN, ids=["unix", "tcp"])
def test_begin_abandoned_is_ended_when_nobody_was_connected(lab, vm, directory, listen):
    begin(lab, vm, directory, options=f"--idle 1s {listen}")
    wait_for(lambda: not vm.has_job(), "the end of the job")
    wait_for(lambda: record(lab, vm)["phase"] == "ended", "the record")
    assert vm.checkpoints() == []
    done = lab.sh(f"vnb-checkpoint commit {vm.name}", check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("the job was ended already: nobody was connected for 1 seconds\n")
    lab.sh(f"vnb-checkpoint abort {vm.name}")


def test_a_log_that_cannot_be_written_does_not_leave_the_job_alone(lab, vm, directory):
    path = lab.path("state", "jobs", vm.uuid)
    os.makedirs(path)
    os.symlink("/dev/full", os.path.join(path, "keeper.log"))
    begin(lab, vm, directory, options="--idle 1s")
    wait_for(lambda: not vm.has_job(), "the end of the job")
    wait_for(lambda: record(lab, vm)["phase"] == "ended", "the record")
    assert vm.checkpoints() == []
    lab.sh(f"vnb-checkpoint abort {vm.name}")


@pytest.mark.parametrize("listen", LISTEN, ids=["unix", "tcp"])
def test_a_client_that_is_connected_keeps_the_job(lab, vm, directory, listen):
    begin(lab, vm, directory, options=f"--idle 1s --deadline 4s {listen}")
    uri = record(lab, vm)["disks"][0]["source"]["uri"]
    client = subprocess.Popen(["nbdsh", "-u", uri, "-c", "input()"], stdin=subprocess.PIPE)
    wait_for(lambda: record(lab, vm)["phase"] == "ended", "the record")
    client.communicate(b"\n")
    assert "deadline of 4 seconds" in keeper_log(lab, vm)
    assert vm.checkpoints() == []
    lab.sh(f"vnb-checkpoint abort {vm.name}")


@pytest.mark.parametrize("way", ["port", "socket", "socket of images"])
def test_another_job_that_listens_in_its_place_is_not_read(lab, vm, way):
    """It has a disk of the same name: who is late, and comes there for ours, gets nothing."""
    names = [vm.name]
    if way == "socket of images":
        names = [f"--image vda={lab.path(name)}.qcow2" for name in ("ours", "other")]
        for name in ("ours", "other"):
            run("qemu-img", "create", "-q", "-f", "qcow2", f"{lab.path(name)}.qcow2", "1M")
    else:
        other = lab.domain(Disk("vda"))
        names.append(other.name)
    listen = "--nbd-listen 127.0.0.1" if way == "port" else f"--socket {vm.private_directory()}/at"
    for number, name in enumerate(names):
        lab.sh(f"vnb-checkpoint begin {name} --level copy {listen} > {lab.path(f'begun.{number}')}")
        if number == 0:
            if way == "port":
                listen = f"--nbd-listen {record(lab, vm)['endpoint']}"
            lab.sh(f"vnb-checkpoint abort {name}")
    read = "vnb-extents < {} | vnb-read > /dev/null"
    lab.sh(read.format(lab.path("begun.1")))
    done = lab.sh(read.format(lab.path("begun.0")), check=False)
    assert done.returncode == 1
    assert re.search("vda.*export", done.stderr), done.stderr
    lab.sh(f"vnb-checkpoint abort {names[1]}")
    if way != "socket of images":
        other.remove()


def test_a_stage_that_fails_or_dies_leaves_the_chain_as_it_was(lab, vm, directory):
    backup(lab, vm, "full", directory)
    before = vm.checkpoints()
    for store in ("false", "vnb-extents | vnb-read | head -c 1000 > /dev/null; kill -9 $$",
                  "vnb-extents | vnb-read > /dev/full", "true"):
        vm.write("vda", 4 * MiB, MiB)
        done = backup(lab, vm, "inc", directory, check=False, store=store)
        assert done.returncode == 1, store
        assert vm.checkpoints() == before
        assert not vm.has_job()
    backup(lab, vm, "inc", directory)
    restores(lab, directory, vm.reference())


def test_a_second_backup_is_told_at_once_who_runs(lab, vm, directory):
    begin(lab, vm, directory)
    owner = record(lab, vm)["owner"]
    done = lab.sh(f"vnb-checkpoint begin {vm.name} --level full --destination x | cat", check=False, timeout=10)
    assert done.returncode == 1
    assert f"vnb-checkpoint: {vm.name}: a backup runs already, begun 20" in done.stderr
    assert f"(process {owner['pid']} on {owner['host']})" in done.stderr
    # Another state directory knows nothing of it, as another host would: libvirt does.
    done = lab.sh(f"vnb-checkpoint begin {vm.name} --level copy --state-dir {lab.path('other')} | cat", check=False,
                  timeout=10)
    assert done.stderr == f"vnb-checkpoint: {vm.name}: a backup job is active already\n"
    done = lab.sh(f"vnb-checkpoint cleanup {vm.name} --state-dir {lab.path('other')}", check=False)
    assert done.returncode == 1
    assert f"a backup job by process {owner['pid']} is active: left alone" in done.stderr
    assert vm.has_job()
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    lab.sh(f"vnb-checkpoint abort {vm.name}")  # harmless
    assert vm.checkpoints() == []


def test_a_job_that_is_not_ours_is_left_alone(lab, vm, directory):
    server = f'<server transport="unix" socket="{vm.private_directory()}/other"/>'
    vm.handle.backupBegin(f'<domainbackup mode="pull">{server}</domainbackup>', None)
    done = backup(lab, vm, "full", directory, check=False)
    assert done.stderr == f"vnb-checkpoint: {vm.name}: a backup job is active already\n"
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    done = lab.sh(f"vnb-checkpoint cleanup {vm.name}")
    assert "a backup job of another program is active: left alone" in done.stderr
    assert vm.has_job()
    vm.handle.abortJob()
    wait_for(lambda: not vm.has_job(), "the end of the job")


def other_job(vm):
    """Begin a backup job that is not ours."""
    disks = "".join(
        f'<disk name="{name}" type="file"><scratch file="{vm.directory}/{name}.other"/></disk>' for name in vm.disks
    )
    server = f'<server transport="unix" socket="{vm.private_directory()}/other"/>'
    vm.handle.backupBegin(f'<domainbackup mode="pull">{server}<disks>{disks}</disks></domainbackup>', None)


class Queued:
    """libvirt's domain of a machine for which somebody else's job waits: it begins as soon as ours has ended."""

    def __init__(self, vm):
        self.vm = vm
        self.aborted = 0

    def __getattr__(self, name):
        return getattr(self.vm.handle, name)

    def abortJob(self):
        self.aborted += 1
        self.vm.handle.abortJob()
        wait_for(lambda: not self.vm.has_job(), "the end of the job")
        other_job(self.vm)


def test_a_job_that_waits_for_the_end_of_ours_is_left_alone(lab, vm, directory):
    begin(lab, vm, directory)
    with Domain(None, vm.name) as domain:
        endpoint = domain.backup_endpoint()
        domain._domain = queued = Queued(vm)
        assert domain.end_backup(endpoint, lambda: None)
        assert queued.aborted == 1
        assert domain.backup_endpoint() == f"{vm.private_directory()}/other"
        assert not domain.end_backup(endpoint, lambda: None)
        assert queued.aborted == 1
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    assert vm.has_job()
    vm.handle.abortJob()
    wait_for(lambda: not vm.has_job(), "the end of the job")


def test_a_job_that_begins_while_ours_waits_for_its_end_is_left_alone(lab, vm, directory):
    """Somebody else has ended ours, and began one of their own."""
    begin(lab, vm, directory)

    def replace():
        vm.handle.abortJob()
        wait_for(lambda: not vm.has_job(), "the end of the job")
        other_job(vm)

    with Domain(None, vm.name) as domain:
        domain.end_backup(domain.backup_endpoint(), replace)
        assert domain.backup_endpoint() == f"{vm.private_directory()}/other"
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    assert vm.has_job()
    vm.handle.abortJob()
    wait_for(lambda: not vm.has_job(), "the end of the job")


def test_libvirtd_restarted_midway_loses_nothing(lab, vm, directory):
    backup(lab, vm, "full", directory)
    vm.write("vda", 0, 8 * MiB)
    begin(lab, vm, directory, "inc")
    lab.restart_libvirtd()
    lab.sh(f"vnb-extents < {lab.path('begun')} | vnb-read | vnb-pack -o {directory}")
    lab.sh(f"vnb-checkpoint commit {vm.name}")
    restores(lab, directory, vm.reference())
    begin(lab, vm, directory, "inc")
    lab.restart_libvirtd()
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    assert not vm.has_job()
    vm.write("vda", 9 * MiB, MiB)
    backup(lab, vm, "inc", directory)
    restores(lab, directory, vm.reference())


def test_others_may_ask_about_the_disks_while_backups_begin(lab, vm, directory):
    """As monitoring does. QEMU 7.2 does not survive that while it makes an image: the scratch is made without it."""
    over = threading.Event()

    def ask():
        while not over.is_set():
            with contextlib.suppress(libvirt.libvirtError):
                lab.connection.domainListGetStats([vm.handle], libvirt.VIR_DOMAIN_STATS_BLOCK)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            for number in range(24):
                vm.write("vda", number * MiB, MiB)
                backup(lab, vm, "auto", directory, "--no-freeze")
        finally:
            over.set()
            asking.result()
    assert vm.state() == libvirt.VIR_DOMAIN_RUNNING
    restores(lab, directory, vm.reference())


def qemu_img_in(path, create):
    """Have a qemu-img in a directory that does something (a script) before it creates an image."""
    stub = os.path.join(path, "qemu-img")
    with open(stub, "w") as file:
        file.write(f'#!/bin/sh\ncase $1 in create) {create};; esac\nexec {shutil.which("qemu-img")} "$@"\n')
    os.chmod(stub, 0o700)


@pytest.mark.parametrize("create", ["exit 1", "true"])
def test_a_scratch_is_made_by_us_or_else_by_libvirt(lab, vm, directory, create):
    """Where we have no right to write beside the image, QEMU may have it."""
    path = lab.new_directory("path")
    qemu_img_in(path, create)
    done = lab.sh(
        f"PATH={path}:$PATH vnb-checkpoint run {vm.name} --level full --set {directory} -- "
        f"'cp {lab.path('state', 'jobs', vm.uuid)}/job.json {path}; ls -l {vm.directory} > {path}/listed; "
        f"{STORE.format(set=directory)}'"
    )
    with open(os.path.join(path, "job.json"), encoding="utf-8") as file:
        job = json.load(file)
    assert job["scratch_made"] == (create != "exit 1"), done.stderr
    with open(os.path.join(path, "listed"), encoding="utf-8") as file:
        modes = [line.split()[0] for line in file if line.endswith(".scratch\n")]
    assert modes == ["-rw-------"] * len(vm.disks)
    assert lab.leftovers() == []
    restores(lab, directory, vm.reference())


def test_a_keeper_killed_while_scratch_is_made(lab, vm, directory):
    """qemu-img goes on without it: what it makes then is removed all the same."""
    path = lab.new_directory("path")
    qemu_img_in(path, "sleep 1")
    command = f"vnb-checkpoint run {vm.name} --level full --set {directory} -- true"
    process = start(lab, f"PATH={path}:$PATH exec {command}")
    wait_for(lambda: (record(lab, vm) or {}).get("scratch_made"), "the scratch to be made")
    os.kill(record(lab, vm)["owner"]["pid"], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert lab.leftovers() == []
    backup(lab, vm, "full", directory)


@pytest.fixture
def small(lab):
    """A file system of 48 MiB, mounted before a domain starts: QEMU sees none that comes later."""
    image, path = lab.path("small.img"), lab.path("small")
    with open(image, "wb") as file:
        file.truncate(48 * MiB)
    os.makedirs(path, exist_ok=True)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, path], check=True)
    os.chmod(path, 0o777)  # noqa: S103 - QEMU's user writes there
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_scratch_under_its_reserve_ends_the_job(lab, small, directory):
    vm = lab.domain(Disk("vda"))
    vm.write("vda", 0, 40 * MiB)
    begin(lab, vm, directory, options=f"--scratch-dir {small} --scratch-reserve 30m")
    vm.write("vda", 0, 20 * MiB, pattern=0x33)
    wait_for(lambda: not vm.has_job(), "the end of the job")
    wait_for(lambda: record(lab, vm)["phase"] == "ended", "the record")
    assert "bytes are left in" in keeper_log(lab, vm)
    assert vm.state() == libvirt.VIR_DOMAIN_RUNNING
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    vm.remove()


def test_a_scratch_that_is_full_does_not_cost_the_guest_its_life(lab, small, directory):
    """QEMU stops a guest whose old data finds no room: it must run again, and what it wrote must be there."""
    vm = linux(lab, Disk("vda", 128 * MiB, filesystem="ext4"))
    vm.run("dd if=/dev/zero bs=1M count=70 | tr '\\0' A > /mnt/vda/file; sync")
    begin(lab, vm, directory, options=f"--scratch-dir {small} --scratch-reserve 0 --no-freeze")
    vm.run("(dd if=/dev/zero bs=1M count=70 | tr '\\0' B | dd of=/mnt/vda/file conv=notrunc; sync; touch /run/done)"
           " > /dev/null 2>&1 &")
    wait_for(lambda: record(lab, vm)["phase"] == "ended", "the end of the job")
    assert "the guest was stopped by a write error" in keeper_log(lab, vm)
    assert vm.state() == libvirt.VIR_DOMAIN_RUNNING
    assert vm.checkpoints() == []
    vm.run("until [ -e /run/done ]; do sleep 0.1; done")
    assert vm.run("tr -d B < /mnt/vda/file | wc -c").strip() == "0"
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    backup(lab, vm, "full", directory)
    vm.remove()


def test_a_scratch_that_is_full_only_while_the_job_is_ended(lab, small, directory):
    """A client that just connects, and may not be cut off, makes that last: the guest must run again then, too."""
    vm = linux(lab, Disk("vda", 128 * MiB, filesystem="ext4"))
    vm.run("dd if=/dev/zero bs=1M count=70 | tr '\\0' A > /mnt/vda/file; sync")
    overwrite = "dd if=/dev/zero bs=1M count={} | tr '\\0' B | dd of=/mnt/vda/file bs=1M seek={} conv=notrunc; sync"
    begin(lab, vm, directory, options=f"--scratch-dir {small} --scratch-reserve 0 --no-freeze", prefix=NO_CUT)
    vm.run(overwrite.format(30, 0))
    with in_handshake(record(lab, vm)):
        ending = start(lab, f"exec vnb-checkpoint abort {vm.name}")
        vm.run(f"({overwrite.format(40, 30)}; touch /run/done) > /dev/null 2>&1 &")
        wait_for(lambda: vm.state() == libvirt.VIR_DOMAIN_PAUSED, "the guest to stop")
        assert ending.poll() is None
        _, said = ending.communicate(timeout=60)
    assert ending.returncode == 0, said
    assert vm.state() == libvirt.VIR_DOMAIN_RUNNING
    vm.run("until [ -e /run/done ]; do sleep 0.1; done")
    assert vm.run("tr -d B < /mnt/vda/file | wc -c").strip() == "0"
    vm.remove()


def test_a_guest_that_had_no_room_before_is_backed_up_and_left_alone(lab, small, directory):
    """It was not the scratch; and to resume it is for whoever makes room for it."""
    image = Disk("vda", 128 * MiB, filesystem="ext4")
    image.create(small)
    shutil.chown(image.path, "libvirt-qemu")
    vm = linux(lab, image)
    vm.run("(dd if=/dev/urandom of=/mnt/vda/file bs=1M count=80; sync) > /dev/null 2>&1 &")
    wait_for(lambda: vm.state() == libvirt.VIR_DOMAIN_PAUSED, "the guest to stop")
    vm.files |= {"vda.raw"}
    begin(lab, vm, directory, "copy", f"--scratch-dir {vm.directory} --scratch-reserve 0 --deadline 4s")
    wait_for(lambda: record(lab, vm)["phase"] == "ended", "the end of the job")
    assert "deadline of 4 seconds" in keeper_log(lab, vm)
    assert vm.handle.state() == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    vm.remove()


def test_a_job_that_did_not_begin_is_not_committed(lab, vm):
    """Else the next increment would start from a point that nobody has ever saved."""
    lab.sh(f"vnb-checkpoint begin {vm.name} --level full --destination x > {lab.path('begun')}")
    os.kill(record(lab, vm)["owner"]["pid"], signal.SIGKILL)
    rewrite(lab, vm, phase="starting")
    done = lab.sh(f"vnb-checkpoint commit {vm.name}", check=False)
    assert (done.returncode, done.stderr) == (
        1, f"vnb-checkpoint: {vm.name}: the job has not begun: there is nothing to commit\n"
    )
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    assert vm.checkpoints() == []


def test_the_guest_shuts_down_midway(lab, vm, directory):
    backup(lab, vm, "full", directory)
    before = vm.checkpoints()
    vm.write("vda", 0, MiB)
    begin(lab, vm, directory, "inc")
    vm.destroy()
    done = lab.sh(f"vnb-extents < {lab.path('begun')} | vnb-read | vnb-pack -o {directory}", check=False)
    assert done.returncode == 1
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    assert vm.checkpoints() == before
    vm.start()
    vm.write("vda", 2 * MiB, MiB)
    backup(lab, vm, "inc", directory)
    restores(lab, directory, vm.reference())


def test_the_domain_is_gone(lab, vm, directory):
    """As a transient one is when it shuts down: nobody is left to ask, and nothing left to end."""
    begin(lab, vm, directory)
    scratch = vm.leftovers()
    assert [path for path in scratch if path.endswith(".scratch")] != []
    keeper = record(lab, vm)["owner"]["pid"]
    vm.destroy()
    vm.handle.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
    wait_for(lambda: keeper not in lab.processes(), "the end of the keeper")
    assert "ending the job: its domain is gone" in keeper_log(lab, vm)
    assert sorted(os.listdir(vm.directory)) == sorted(vm.files)


def test_qemu_dies_midway(lab, vm, directory):
    backup(lab, vm, "full", directory)
    begin(lab, vm, directory, "inc")
    vm.kill()
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    vm.start()
    vm.write("vda", 2 * MiB, MiB)
    done = backup(lab, vm, "inc", directory)
    assert "full in this increment" in done.stderr
    restores(lab, directory, vm.reference())
    assert all(row["saved"] for row in listed(lab, vm, directory).values())


@pytest.mark.parametrize("ends, listen", zip(["cleanup", "abort"], LISTEN, strict=True), ids=["unix", "tcp"])
def test_a_client_in_its_handshake(lab, vm, directory, ends, listen):
    """QEMU 7.2 told to stop its server would wait for it, and the guest stand still, for good."""
    begin(lab, vm, directory, options=listen)
    job = record(lab, vm)
    with in_handshake(job) as client:
        if ends == "cleanup":
            os.kill(job["owner"]["pid"], signal.SIGKILL)
            lab.sh(f"vnb-checkpoint cleanup {vm.name} --set {directory}")
        else:
            lab.sh(f"vnb-checkpoint abort {vm.name}")
        assert client.recv(1) == b""
    assert not vm.has_job()
    assert vm.checkpoints() == []
    vm.write("vda", 0, MiB)  # QEMU answers
    backup(lab, vm, "full", directory)
    restores(lab, directory, vm.reference())


def test_a_client_that_cannot_be_cut_off(lab, vm, directory):
    """Where it does not read, to end the job would stop the guest, which is worth more: that waits until it is gone."""
    begin(lab, vm, directory, options="--no-freeze", prefix=NO_CUT)
    with deaf(record(lab, vm)):
        done = lab.sh(f"vnb-checkpoint abort {vm.name}", check=False)
        assert done.returncode == 1
        assert "clients of its export do not read (1)" in done.stderr
        assert vm.has_job()
        vm.write("vda", 0, MiB)  # QEMU answers
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    assert not vm.has_job()


def test_ctrl_c_in_the_middle(lab, vm, directory):
    process = start(lab, f"exec vnb-checkpoint run {vm.name} --level full --set {directory} -- '{ENDLESS}'")
    running(lab, vm)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in said
    assert vm.checkpoints() == []


def test_a_job_that_does_not_end_is_said_once_and_tried_more_and_more_rarely(lab, vm, directory):
    """libvirtd logs every question that it has no answer to; whoever looks is told, and when it ends all is well."""
    ours = start(lab, f"vnb-checkpoint run {vm.name} --level full --set {directory} -- '{ENDLESS}'")
    running(lab, vm)
    vm.handle.abortJob()
    wait_for(lambda: not vm.has_job(), "the end of the job")
    lose_job_data(lab, vm)
    os.killpg(ours.pid, signal.SIGTERM)
    log = lab.path("libvirtd.log")
    size = os.path.getsize(log)
    wait_for(lambda: "trouble" in (record(lab, vm) or {}), "the first attempt", 2 * JOB_END_SECONDS)
    reason = (
        "the backup job is still there after 60 seconds, and libvirt knows nothing about it, as after a crash: "
        "it ends when the domain is shut down"
    )
    assert f"vnb-checkpoint: {vm.name}: {reason}; its keeper goes on trying\n" in ours.communicate()[1]
    said = lab.sh(f"vnb-checkpoint list {vm.name} --set {directory}").stderr
    assert re.fullmatch(
        rf"vnb-checkpoint: {vm.name}: a backup runs already, begun .* \(process \d+ on .*\), and its job does not end: "
        rf"{reason}\n", said,
    )
    with open(log, encoding="utf-8") as file:
        file.seek(size)
        assert file.read().count(": error :") < JOB_END_SECONDS / 3
    vm.destroy()
    wait_for(lambda: record(lab, vm)["phase"] == "ended", "the end of the job", JOB_END_SECONDS)
    assert keeper_log(lab, vm).count(reason) == 1
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    assert vm.checkpoints() == []


def test_a_guest_that_resets_midway(lab, directory):
    """libvirt waits half a minute when an agent comes or goes during a job, and sees the end of the job after that."""
    vm = linux(lab, Disk("vda", 64 * MiB, filesystem="ext4"))
    backup(lab, vm, "full", directory)
    vm.run("echo something > /mnt/vda/file; sync")
    vm.pause()
    before = vm.reference()
    begin(lab, vm, directory, "inc", "--no-freeze")
    vm.resume()
    vm.handle.reset()
    lab.sh(f"vnb-extents < {lab.path('begun')} | vnb-read | vnb-pack -o {directory}")
    lab.sh(f"vnb-checkpoint commit {vm.name} --set {directory}")
    assert lab.leftovers() == []
    restores(lab, directory, before)
    vm.pause()  # Linux writes by itself
    assert "full" not in backup(lab, vm, "inc", directory, "--no-freeze").stderr
    restores(lab, directory, vm.reference())
    vm.remove()
