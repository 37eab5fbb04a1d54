# SPDX-License-Identifier: LGPL-2.1-or-later
"""Freeze, begin, thaw: a guest that a backup froze is thawed as soon as its agent answers, whatever happened."""

import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import libvirt
import pytest
from backups import STORE, backup, record
from lab import KiB, MiB, wait_for

from vnb.base.errors import Error
from vnb.virt.domain import Domain
from vnb.virt.failures import Unanswered


@pytest.fixture
def directory(lab):
    return lab.new_directory("set")


def status(vm):
    return vm.agent("guest-fsfreeze-status", timeout=10)


def agent_pid(vm):
    return vm.run("pidof qemu-ga").split()[0]


def pause_agent(vm, seconds):
    """Stop the agent, and have the guest let it go on after some seconds."""
    pid = agent_pid(vm)
    vm.run(f"(sleep 1; kill -STOP {pid}; sleep {seconds}; kill -CONT {pid}) > /dev/null 2>&1 &")
    wait_for(lambda: not vm._answers(), "the agent to stop")


def test_all_file_systems_are_frozen_while_the_job_starts(lab, linux, directory):
    done = backup(lab, linux, "full", directory)
    assert re.search(rf"{linux.name}: [1-9]\d* file systems frozen for \d+ ms\n", done.stderr)
    assert status(linux) == "thawed"


def test_chosen_mountpoints_none_and_required(lab, linux, directory):
    done = backup(lab, linux, "full", directory, "--freeze /mnt/vda")
    assert f"{linux.name}: 1 file systems frozen" in done.stderr
    done = backup(lab, linux, "inc", directory, "--no-freeze")
    assert "frozen" not in done.stderr
    assert status(linux) == "thawed"


def test_without_an_agent_it_is_a_warning_or_an_error(lab, vm, directory):
    done = backup(lab, vm, "full", directory)
    warning = f"vnb-checkpoint: {vm.name}: the guest is not frozen: it has no channel for a guest agent\n"
    assert done.stderr == warning
    done = backup(lab, vm, "inc", directory, "--strict", check=False)
    assert done.returncode == 3
    point = lab.sh(f"vnb-cat --base {directory}").stdout.decode().strip()
    assert done.stderr == (
        f"{warning}vnb-checkpoint: {vm.name}: {point} is saved, but with --strict 1 warnings are a failure\n"
    )
    before = vm.checkpoints()
    done = backup(lab, vm, "inc", directory, "--require-freeze", check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"vnb-checkpoint: {vm.name}: cannot freeze the guest: it has no channel for a guest agent\n"
    )
    assert vm.checkpoints() == before


def test_a_freeze_of_nothing_is_no_freeze(lab, linux, directory):
    """The agent knows no file system there, and says that it has frozen none."""
    done = backup(lab, linux, "full", directory, "--freeze /nonexistent")
    assert f"{linux.name}: the guest is not frozen: its agent knows no file system at /nonexistent\n" in done.stderr
    assert "0 file systems" not in done.stderr
    done = backup(lab, linux, "inc", directory, "--freeze /nonexistent --require-freeze", check=False)
    assert (done.returncode, linux.has_job(), status(linux)) == (1, False, "thawed")
    assert done.stderr == (f"vnb-checkpoint: {linux.name}: cannot freeze the guest: "
                           "its agent knows no file system at /nonexistent\n")
    backup(lab, linux, "inc", directory, "--require-freeze --strict")
    assert lab.leftovers() == []


def test_a_guest_is_frozen_before_it_is_suspended(lab, linux, directory):
    done = backup(lab, linux, "full", directory, "--pause --require-freeze --strict")
    assert re.search(r"[1-9]\d* file systems frozen for \d+ ms\n", done.stderr)
    assert status(linux) == "thawed"
    assert linux.state() == libvirt.VIR_DOMAIN_RUNNING


def test_a_suspended_guest_is_no_warning_and_is_not_asked(lab, linux, directory):
    """Its agent could not answer for a minute, and might freeze it when it goes on."""
    linux.pause()
    try:
        done = backup(lab, linux, "full", directory, "--strict")
        assert done.stderr == (f"vnb-checkpoint: {linux.name}: the guest is not frozen: "
                               "it is suspended, and its agent cannot answer\n")
        done = backup(lab, linux, "inc", directory, "--require-freeze", check=False)
        assert done.returncode == 1
        assert "cannot freeze the guest: it is suspended, and its agent cannot answer\n" in done.stderr
        assert linux.state() == libvirt.VIR_DOMAIN_PAUSED
        assert record(lab, linux) is None
    finally:
        linux.resume()
    assert status(linux) == "thawed"


def test_pause_without_an_agent_is_no_warning(lab, vm, directory):
    done = backup(lab, vm, "full", directory, "--pause --strict")
    assert done.stderr == f"vnb-checkpoint: {vm.name}: the guest is not frozen: it has no channel for a guest agent\n"
    assert vm.state() == libvirt.VIR_DOMAIN_RUNNING


def test_a_begin_that_fails_thaws(lab, linux, directory):
    done = backup(lab, linux, "full", directory, "--scratch-dir /proc --scratch-reserve 0", check=False)
    assert done.returncode == 1
    assert "file systems frozen for" in done.stderr
    assert status(linux) == "thawed"
    assert lab.leftovers() == []


def test_a_freeze_of_somebody_else_is_left_alone(lab, linux, directory):
    linux.handle.fsFreeze()
    try:
        done = backup(lab, linux, "full", directory, "--no-freeze")
        assert status(linux) == "frozen"
        done = backup(lab, linux, "full", directory)
        assert "the guest is not frozen: " in done.stderr
        assert status(linux) == "frozen"
    finally:
        linux.handle.fsThaw()


@pytest.mark.parametrize("victim", ["keeper", "command", "both"])
def test_killed_between_freeze_and_thaw(lab, linux, directory, victim):
    before = linux.checkpoints()
    store = STORE.format(set=directory)
    script = f"exec vnb-checkpoint run {linux.name} --level full --set {directory} -- '{store}'"
    process = subprocess.Popen(["bash", "-c", script], env=lab.env, stderr=subprocess.PIPE, text=True)
    frozen = wait_for(lambda: (found := record(lab, linux)) and found["frozen"] and found, "the intent to freeze")
    keeper = frozen["owner"]["pid"]
    if victim in ("keeper", "both"):
        os.kill(keeper, signal.SIGKILL)
    if victim in ("command", "both"):
        process.kill()
    process.communicate(timeout=60)
    if victim == "both":
        lab.sh(f"vnb-checkpoint cleanup {linux.name} --set {directory}")
    wait_for(lambda: status(linux) == "thawed", "the thaw")
    wait_for(lambda: not linux.has_job(), "the end of the job")
    wait_for(lambda: record(lab, linux) is None or record(lab, linux)["phase"] == "ended", "the end of the record")
    lab.sh(f"vnb-checkpoint abort {linux.name}")
    assert linux.checkpoints() == before
    assert lab.leftovers() == []


def test_an_agent_that_stops_midway_keeps_nobody_waiting(linux, monkeypatch):
    """
    libvirt gives up by itself only where the agent did not answer the last time, either.

    It stops while libvirt does not look: the machine's console tells us.
    """
    for limit in ("FREEZE_SECONDS", "THAW_SECONDS", "INFO_SECONDS"):
        monkeypatch.setattr(f"vnb.virt.agent.{limit}", 2)
    pid = agent_pid(linux)
    linux.run(f"(sleep 1; kill -STOP {pid}; echo stopped > /dev/ttyS0; sleep 15; kill -CONT {pid}) > /dev/null 2>&1 &")
    wait_for(lambda: "stopped" in Path(linux.console).read_text(), "the agent to stop")
    with Domain(None, linux.name) as domain:
        with pytest.raises(Unanswered):
            domain.freeze([])
        with pytest.raises(Unanswered):
            domain.thaw()
        assert domain.guest_info() is None
        wait_for(linux._answers, "the agent")
        assert status(linux) == "frozen"  # as it was asked to
        assert domain.thaw() > 0
        assert domain.guest_info() is not None


def test_an_agent_that_hangs_and_comes_back_is_told_to_thaw(lab, linux, directory):
    """It does what it was asked to when it goes on, also the freeze that nobody waits for any more."""
    pause_agent(linux, 30)
    done = backup(lab, linux, "full", directory)
    assert "the guest is not frozen: " in done.stderr
    assert record(lab, linux)["frozen"], done.stderr
    wait_for(lambda: record(lab, linux) is None, "the thaw", 120)
    assert status(linux) == "thawed"
    linux.run("echo alive > /mnt/vda/alive; sync")


def test_an_agent_that_others_keep_busy_was_not_asked(linux):
    """libvirt waits half a minute for its turn. What is frozen then is not ours to thaw, now or later."""
    script = r"#!/bin/sh\necho busy > /dev/ttyS0\nexec sleep 33\n"  # the agent waits for its end
    linux.run(f"printf '{script}' > /sbin/shutdown; chmod +x /sbin/shutdown")
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(linux.agent, "guest-shutdown", 35)
        wait_for(lambda: "busy" in Path(linux.console).read_text(), "the agent to be busy")
        with Domain(None, linux.name) as domain, pytest.raises(Error, match="state change lock") as refused:
            domain.freeze([])
        with pytest.raises(libvirt.libvirtError):  # it answers only where it could not be done
            other.result()
    assert not isinstance(refused.value, Unanswered)
    assert status(linux) == "thawed"


SIGN_AT = 128 * MiB - 64 * KiB  # the end of vda, where no file is


@pytest.fixture
def hanging(lab, linux):
    """
    Freeze the guest and stop its agent, as it is when the agent has frozen too late for whoever asked for it.

    Returns what lets the agent go on. The guest reads the sign from its disk: nothing else comes to it.
    """
    pid = agent_pid(linux)
    sign = f"echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vda bs=4096 skip={SIGN_AT // 4096} count=1 | md5sum"
    linux.run(f"(sleep 2; kill -STOP {pid}; before=$({sign}); while [ \"$({sign})\" = \"$before\" ]; do sleep 0.2; "
              f"done; kill -CONT {pid}) > /dev/null 2>&1 &")
    assert linux.handle.fsFreeze() > 0
    wait_for(lambda: not linux._answers(), "the agent to stop")

    def go_on():
        linux.write_random("vda", SIGN_AT, 4 * KiB)

    try:
        yield go_on
    finally:
        go_on()
        wait_for(linux._answers, "the agent")
        linux.handle.fsThaw()


def keeper(lab, vm):
    """The keeper that stays to thaw the guest (its process id), and no other."""
    found, = lab.processes()
    assert record(lab, vm)["frozen"]
    wait_for(lambda: record(lab, vm)["owner"]["pid"] == found, "the keeper to take over")
    return found


def thawed(lab, vm):
    """Wait until the last keeper has done what it stays for."""
    wait_for(lambda: not lab.processes(), "the end of the keeper")
    assert record(lab, vm) is None
    assert status(vm) == "thawed"


def test_an_agent_that_hangs_hinders_no_other_backup(lab, linux, directory, hanging):
    """Whoever backs up next takes over what the keeper of the last one stays for, also where that was killed."""
    done = backup(lab, linux, "full", directory)
    assert "the guest is not frozen: " in done.stderr
    first = keeper(lab, linux)
    backup(lab, linux, "inc", directory, "--no-freeze")
    second = keeper(lab, linux)
    assert second != first
    os.kill(second, signal.SIGKILL)
    backup(lab, linux, "inc", directory, "--no-freeze")
    third = keeper(lab, linux)
    done = lab.sh(f"vnb-checkpoint abort {linux.name}")
    assert f"process {third} on " in done.stderr
    assert "stays until the guest agent has thawed the guest" in done.stderr
    assert keeper(lab, linux) == third
    with open(lab.path("state", "jobs", linux.uuid, "keeper.log"), encoding="utf-8") as file:
        assert file.read().count("cannot thaw the guest yet") <= 1
    hanging()
    thawed(lab, linux)


@pytest.mark.parametrize("options", [
    "--require-freeze", "--threshold 1t", "--no-freeze --scratch-dir /proc --scratch-reserve 0",
])
def test_a_backup_that_does_not_begin_sees_to_the_thaw(lab, linux, directory, hanging, options):
    if "--require-freeze" not in options:
        backup(lab, linux, "full", directory, "--freeze /mnt/vda")
        before = keeper(lab, linux)
    level = "inc" if "threshold" in options else "copy"
    done = backup(lab, linux, level, directory, options, check=False)
    assert done.returncode == (0 if "threshold" in options else 1)
    after = keeper(lab, linux)
    assert "--require-freeze" in options or before != after
    assert not linux.has_job()
    hanging()
    thawed(lab, linux)


def test_recover_dismisses_a_keeper_that_stays_for_an_agent(lab, linux, directory, hanging):
    backup(lab, linux, "full", directory)
    done = lab.sh(f"vnb-checkpoint cleanup {linux.name} --set {directory}", check=False)
    assert done.returncode == 1
    assert f"process {keeper(lab, linux)} on " in done.stderr
    done = lab.sh(f"vnb-checkpoint cleanup {linux.name} --set {directory} --force")
    assert "nobody waits any more to thaw the guest" in done.stderr
    assert record(lab, linux) is None
    assert lab.leftovers() == []


@pytest.mark.parametrize("command", ["cleanup --set {set}", "abort"])
def test_who_ends_the_job_of_a_dead_keeper_leaves_one_for_the_thaw(lab, linux, directory, hanging, command):
    backup(lab, linux, "full", directory)
    before = keeper(lab, linux)
    os.kill(before, signal.SIGKILL)
    lab.sh(f"vnb-checkpoint {command.format(set=directory)} {linux.name}")
    assert keeper(lab, linux) != before
    hanging()
    thawed(lab, linux)


def test_run_whose_keeper_is_killed_leaves_one_for_the_thaw(lab, linux, directory, hanging):
    store = "cat > /dev/null; exec tail -f /dev/null"
    command = f"vnb-checkpoint run {linux.name} --level full --set {directory} -- '{store}'"
    process = subprocess.Popen(["bash", "-c", f"exec {command}"], env=lab.env, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (record(lab, linux) or {}).get("phase") == "running", "the job")
    os.kill(record(lab, linux)["owner"]["pid"], signal.SIGKILL)
    process.wait(60)
    assert process.returncode == 1
    keeper(lab, linux)
    hanging()
    thawed(lab, linux)
    process.communicate()


def test_a_command_that_fails_does_not_wait_for_the_agent(lab, linux, directory, hanging):
    done = backup(lab, linux, "full", directory, store="false", check=False)
    assert done.returncode == 1
    keeper(lab, linux)
    hanging()
    wait_for(lambda: not lab.processes(), "the end of the keeper")
    assert status(linux) == "thawed"
    lab.sh(f"vnb-checkpoint abort {linux.name}")


def test_a_guest_that_was_started_anew_is_not_the_one_that_was_frozen(lab, linux, directory, hanging):
    backup(lab, linux, "full", directory)
    os.kill(keeper(lab, linux), signal.SIGKILL)
    linux.destroy()
    linux.start()
    linux.handle.fsFreeze()
    backup(lab, linux, "full", directory, "--no-freeze")
    assert status(linux) == "frozen"
    assert record(lab, linux) is None
