# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine that runs Linux, whose backup is killed while the guest is frozen or about to be, or that shuts down."""

import time

import libvirt
import pytest
from backups import STORE, record
from guest import linux
from lab import Disk, MiB, compare, run, wait_for
from life import HOLDS, SIGNALS, SIZE, SLOW, STAGES, Life

FROZEN = 0.1  # and how long it is frozen


class Guest(Life):
    """A Life whose machine has a file system on vda, and in it a word; vdb is as without a guest."""

    def write(self):
        self.write_disk("vdb")
        self.word = str(self.chance.random())
        self.vm.run(f"echo {self.word} > /mnt/vda/word; sync")

    def reference(self):
        return self.word, self.vm.reference("vdb")["vdb"]

    def restores(self, reference, point):
        """The file system was frozen when the job began, so there is nothing to repair."""
        word, image = reference
        target = self.lab.new_directory("restored")
        self.lab.sh(f"vnb-cat --until {point} {self.set} | vnb-apply --format raw {target}")
        compare(image, f"{target}/vdb.raw", "raw")
        run("e2fsck", "-f", "-n", f"{target}/vda.raw")
        assert run("debugfs", "-R", "cat word", f"{target}/vda.raw").strip() == word

    def check_guest(self):
        super().check_guest()
        assert self.vm.agent("guest-fsfreeze-status") == "thawed"

    def wait_until_frozen(self, process):
        """Wait until the guest is asked to freeze, or the backup has ended."""
        end = time.monotonic() + 60
        while process.poll() is None and not (record(self.lab, self.vm) or {}).get("frozen"):
            assert time.monotonic() < end
            time.sleep(0.002)

    def shut_down(self):
        """Ask it to, as often as it refuses: while it is frozen, it does."""
        def asked():
            try:
                return self.vm.handle.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT) == 0
            except libvirt.libvirtError:
                return not self.vm.is_active()

        wait_for(asked, "the guest to shut down")
        wait_for(lambda: not self.vm.is_active(), "the end of the guest")


@pytest.fixture(scope="module")
def machine(lab):
    """One for all tests: it takes some seconds to boot."""
    vm = linux(lab, Disk("vda", 64 * MiB, filesystem="ext4"), Disk("vdb", SIZE, discard=True))
    try:
        yield vm
    finally:
        vm.remove()


@pytest.mark.fault(
    "before the guest is frozen, while it is frozen, and soon after, `run`, its keeper or a stage gets SIGKILL, "
    "SIGTERM or SIGINT, or `run` and keeper get SIGKILL",
    holds=f"the guest is thawed; {HOLDS}", rounds=1, share=6,
)
def test_a_begin_with_an_agent_is_killed(lab, machine, rounds):
    for chance in rounds:
        each = Guest(lab, chance, machine)
        for number in range(6 if rounds.is_soak else 3):
            each.write()
            process = each.start(STORE, at_once=True)
            if number % 3 == 0:
                each.wait_until_frozen(process)
                time.sleep(chance.uniform(0, FROZEN))
                whom = chance.choice([("run",), ("keeper",), ("both",)])
            else:
                time.sleep(chance.uniform(0.03, each.seconds))
                whom = chance.choice([("run",), ("keeper",), ("both",), STAGES])
            rounds.fault(each.kill(process, whom, chance.choice(SIGNALS)))
            each.check(process)
        each.check_points()


@pytest.mark.fault(
    "a guest shuts down while its backup begins, or in the middle of the backup",
    holds=(
        "the backup is right, or fails as a whole; nothing is left; when the domain runs again, the next "
        "increment is right"
    ),
    rounds=1, share=2,
)
def test_a_guest_shuts_down(lab, machine, rounds):
    for chance in rounds:
        each = Guest(lab, chance, machine)
        each.write()
        process = each.start(SLOW, at_once=True)
        time.sleep(chance.uniform(0, 2 * each.seconds))
        rounds.fault(process.poll() is None)
        try:
            each.shut_down()
            assert lab.leftovers(patience=60) == []
        finally:
            if not machine.is_active():
                machine.start()
        each.check(process)
        each.check_points()
