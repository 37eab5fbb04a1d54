# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A reader of an export that stalls, and the end of the job: the guest, which runs Linux, goes on.

QEMU waits for readers when a job ends, and meanwhile for nothing else; see vnb/virt/export_clients.py.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time

import pytest
from backups import STORE, deaf, record
from guest import linux
from lab import Disk, MiB, wait_for
from remote import SSHD, Hypervisor

from vnb.virt.export_clients import clients_of, read_lists

STILL = 10  # seconds that a guest may stand still on a busy machine; before, it did as long as the reader stalled
ENDED = {"phase": "ended"}
READERS = "vnb-extents | vnb-read"
FAULT = pytest.mark.fault(
    "the end of a job (deadline, scratch reserve, abort, cleanup, `run` killed) while its reader stalls: a pipe that "
    "nobody reads, vnb-read, vnb-extents, nbdcopy or ssh stopped, a client that takes no replies",
    holds="the guest's clock goes on, the job and all that it left ends within seconds",
)


@pytest.fixture(scope="module")
def small(lab):
    """A file system of 48 MiB for scratch files, which is there before QEMU starts."""
    image, path = lab.path("stalled.img"), lab.path("stalled")
    with open(image, "wb") as file:
        file.truncate(48 * MiB)
    os.makedirs(path)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    try:
        subprocess.run(["mount", "-o", "loop", image, path], check=True)
    except subprocess.CalledProcessError:
        pytest.skip("no loop devices")
    os.chmod(path, 0o777)  # noqa: S103 -- QEMU's user writes there
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.fixture(scope="module")
def guest(lab, small):
    """A machine that runs Linux, and says what time it is."""
    vm = linux(lab, Disk("vda", 64 * MiB))
    try:
        vm.write_random("vda", 0, 48 * MiB, seed=1)
        vm.agent("guest-exec", path="/bin/sh", arg=["-c", "while sleep 0.2; do cat /proc/uptime > /dev/ttyS0; done"])
        yield vm
    finally:
        vm.remove()


class Clock:
    """How long a guest stood still at most, while this is entered: seconds."""

    def __init__(self, vm):
        self.vm = vm
        self.longest = 0
        self.thread = threading.Thread(target=self.watch)
        self.is_over = threading.Event()

    def watch(self):
        said = os.path.getsize(self.vm.console)
        since = time.monotonic()
        while not self.is_over.wait(0.05):
            now = os.path.getsize(self.vm.console)
            self.longest = max(self.longest, time.monotonic() - since)
            if now != said:
                said, since = now, time.monotonic()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.is_over.set()
        self.thread.join()


@pytest.fixture
def clock(lab, guest):
    """The guest goes on, and did not stand still."""
    with Clock(guest) as clock:
        yield clock
        guest.agent("guest-ping")
        at = os.path.getsize(guest.console)
        wait_for(lambda: os.path.getsize(guest.console) > at, "the guest")
    assert clock.longest < STILL


@contextlib.contextmanager
def running_in(lab, script, env=None):
    """A script in the background; what is left of it is killed at the end, stopped or not."""
    process = subprocess.Popen(
        ["bash", "-c", "set -o pipefail\n" + script], env={**lab.env, **(env or {})}, cwd=lab.directory,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in lab.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def begun(lab, vm):
    """The record of the job, when it has begun."""
    wait_for(lambda: (record(lab, vm) or {}).get("phase") == "running", "the job")
    return record(lab, vm)


def stop(lab, name, job):
    """Stop a program with SIGSTOP, when somebody is connected."""
    clients = clients_of(job["endpoint"], job["tcp"])
    wait_for(lambda: clients.look(read_lists(job["tcp"]), 0), "a client")
    for pid, line in lab.processes().items():
        if f"/{name} " in f"{line} " or line.startswith(f"{name} "):
            os.kill(pid, signal.SIGSTOP)


def run(guest, command="cat > /dev/null; exec tail -f /dev/null", options=""):
    options += f" --no-freeze --level full --set {guest.name}.set"
    return f"exec vnb-checkpoint run {guest.name} {options} -- '{command}'"


def check_end(lab, guest):
    """While its reader still stalls, the job ends with all that it left."""
    wait_for(lambda: not guest.has_job(), "the end of the job", STILL + 5)
    end = time.monotonic() + STILL
    while (left := [*guest.leftovers(), *guest.checkpoints(), (record(lab, guest) or ENDED)["phase"]]) != ["ended"]:
        assert time.monotonic() < end, left
        time.sleep(0.05)


def by_deadline(lab, guest, process, small):
    """It was begun with one."""


def by_reserve(lab, guest, process, small):
    with open(f"{small}/filler", "wb") as file:
        file.write(bytes(32 * MiB))
    wait_for(lambda: not guest.has_job(), "the end of the job", STILL + 5)
    os.unlink(f"{small}/filler")


def by_abort(lab, guest, process, small):
    lab.sh(f"vnb-checkpoint abort {guest.name}")


def by_cleanup(lab, guest, process, small):
    os.kill(record(lab, guest)["owner"]["pid"], signal.SIGSTOP)  # else it is faster than we are
    process.kill()
    os.kill(record(lab, guest)["owner"]["pid"], signal.SIGKILL)
    lab.sh(f"vnb-checkpoint cleanup {guest.name}")


def by_death_of_run(lab, guest, process, small):
    process.kill()


ENDS = {
    by_deadline: "--deadline 3s", by_reserve: "--scratch-dir {small} --scratch-reserve 20m", by_abort: "",
    by_cleanup: "", by_death_of_run: "",
}


@FAULT
@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_a_client_that_takes_no_replies(lab, guest, small, clock, end):
    options = ENDS[end].format(small=small)
    with running_in(lab, run(guest, options=options)) as process, deaf(begun(lab, guest)):
        end(lab, guest, process, small)
        check_end(lab, guest)


@FAULT
@pytest.mark.parametrize("options", ["--nbd-listen 127.0.0.1", "--nbd-listen ::1"])
def test_a_client_that_takes_no_replies_over_tcp(lab, guest, small, clock, options):
    with running_in(lab, run(guest, options=options)) as process, deaf(begun(lab, guest)):
        by_abort(lab, guest, process, small)
        check_end(lab, guest)


@FAULT
@pytest.mark.parametrize("command, stopped", [
    (f"{READERS} | tail -f /dev/null", None),
    (f"{READERS} | tail -f /dev/null", "vnb-read"),
    (f"{READERS} > /dev/null; exec tail -f /dev/null", "vnb-extents"),
])
@pytest.mark.parametrize("end", [by_abort, by_death_of_run], ids=lambda end: end.__name__)
def test_a_stage_that_stalls(lab, guest, small, clock, command, stopped, end):
    with running_in(lab, run(guest, command)) as process:
        stop(lab, stopped, begun(lab, guest))
        end(lab, guest, process, small)
        check_end(lab, guest)


@FAULT
def test_a_foreign_client_that_is_stopped(lab, guest, small, clock):
    with running_in(lab, run(guest)) as process:
        job = begun(lab, guest)
        uri = f"nbd+unix:///vda-{job['head']['id'][:8]}?socket={job['endpoint']}"
        with running_in(lab, f"exec nbdcopy '{uri}' - | tail -f /dev/null"):
            stop(lab, "nbdcopy", job)
            by_death_of_run(lab, guest, process, small)
            check_end(lab, guest)


@FAULT
@pytest.mark.skipif(SSHD is None or os.geteuid() != 0, reason="no sshd to log in to as root")
@pytest.mark.parametrize("is_stopped", [True, False])
def test_an_ssh_that_stalls(lab, guest, clock, is_stopped):
    """A client whose replies a stopped ssh does not pass on; and one that ssh does, but is deaf itself."""
    hypervisor = Hypervisor(lab)
    try:
        uri = "-c qemu+ssh://root@hv/system"
        with running_in(lab, run(guest, options=uri), env=hypervisor.env):
            job = begun(lab, guest)
            with deaf({**job, "endpoint": job["sockets"][0]}):
                if is_stopped:
                    os.kill(job["servers"][0][0], signal.SIGSTOP)
                hypervisor.sh(f"vnb-checkpoint abort {uri} {guest.name}")
                check_end(lab, guest)
    finally:
        hypervisor.close()


@FAULT
def test_a_commit_while_somebody_is_connected(lab, guest, clock):
    directory = lab.new_directory("set")
    lab.sh(f"vnb-checkpoint begin {guest.name} --level full --no-freeze --set {directory} "
           f"| {STORE.format(set=directory)}")
    with deaf(record(lab, guest)):
        lab.sh(f"vnb-checkpoint commit {guest.name}")
    assert len(guest.checkpoints()) == 1
    lab.sh(f"vnb-checkpoint delete {guest.name} --force")
