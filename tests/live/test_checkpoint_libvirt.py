# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-checkpoint among what libvirt does: its directories, its log, its language, its ends of jobs."""

import contextlib
import os
import socket
import subprocess
import sys

import libvirt
import pytest
from backups import STORE, backup, levels, lose_bitmap, lose_job_data, restores, tip
from lab import Disk, MiB, run, wait_for

from vnb.qemu import img
from vnb.virt import domxml
from vnb.virt.backup_job import PRESERVE_SHUTDOWN_SINCE
from vnb.virt.domain import Domain
from vnb.virt.failures import AddressInUse

FAIL = "cat > /dev/null; false"  # a command that has read its input, and fails


@pytest.fixture
def directory(lab):
    return lab.new_directory("set")


@pytest.mark.parametrize("name", ["short", "a-name-of-more-than-twenty-characters", "vm-äöü-with-other-letters"])
def test_directories_of_domains_before(lab, directory, name):
    """A crash leaves them behind, and libvirt counts ids from 1 again when the host has started."""
    vm = lab.domain(Disk("vda"), name=name)
    ours = vm.private_directory()
    others = [os.path.join(os.path.dirname(ours), f"domain-{vm.handle.ID()}-{other}") for other in ("other", name[:3])]
    for other in others:
        os.mkdir(other)
    try:
        backup(lab, vm, "full", directory)
    finally:
        for other in others:
            os.rmdir(other)
        vm.remove()


@pytest.fixture
def log(lab):
    """A function that gives the errors that libvirtd has logged since, or since it was called (list of str)."""
    lab.libvirtd_pid()  # skips the test where libvirtd is not ours
    path = lab.path("libvirtd.log")
    seen = os.path.getsize(path)

    def errors():
        nonlocal seen
        with open(path, encoding="utf-8", errors="replace") as file:
            file.seek(seen)
            found = file.read()
            seen = file.tell()
        return [line.partition(" : ")[2] for line in found.splitlines() if ": error :" in line]

    return errors


@pytest.mark.parametrize("count", [1, 3])
def test_a_good_backup_leaves_no_error_in_the_log_of_libvirtd(lab, directory, log, count):
    """
    Nothing is asked that libvirt has no answer to: administrators read that log.

    libvirt 9.0 itself stops QEMU's NBD server once for every disk of a job, whoever ends the job.
    """
    vm = lab.domain(*[Disk(f"vd{letter}") for letter in "abc"[:count]])
    for level in ("full", "inc", "copy"):
        backup(lab, vm, level, directory, "--no-freeze")
    lab.sh(f"""
        vnb-checkpoint begin {vm.name} --level inc --no-freeze --set {directory} | wc -c
        vnb-checkpoint list {vm.name} --set {directory}; vnb-checkpoint abort {vm.name}; vnb-checkpoint abort {vm.name}
        vnb-checkpoint list {vm.name} --set {directory}; vnb-checkpoint size {vm.name} --set {directory}
        vnb-checkpoint cleanup {vm.name} --set {directory}; vnb-checkpoint delete {vm.name} --set {directory}
    """)
    vm.remove()
    own = [line for line in log() if "'nbd-server-stop'" not in line or count == 1]
    assert own == []


CATALOGS = "/usr/share/locale/{}/LC_MESSAGES/libvirt.mo"  # of libvirt-l10n
LOCALES = {"de": "de_DE", "ru": "ru_RU"}


@pytest.fixture(params=LOCALES)
def foreign(lab, request):
    """libvirtd says its errors in another language, and has other quotation marks. It has few of these in German."""
    name = LOCALES[request.param]
    if not os.path.exists(CATALOGS.format(request.param)) or not os.path.exists(f"/usr/share/i18n/locales/{name}"):
        pytest.skip("libvirt-l10n or locales is not installed")
    place = lab.path("locales")  # one of our own: the host need not have made it, and C.UTF-8 is not always translated
    os.makedirs(place, exist_ok=True)
    run("localedef", "-i", name, "-f", "UTF-8", f"{place}/{name}.UTF-8")
    before = {key: os.environ.get(key, "") for key in ("LC_ALL", "LANGUAGE", "LOCPATH")}
    lab.restart_libvirtd(LC_ALL=f"{name}.UTF-8", LANGUAGE=request.param, LOCPATH=place)
    yield
    lab.restart_libvirtd(**before)


@pytest.mark.usefixtures("foreign")
def test_a_libvirtd_of_another_language(lab, vm, directory):
    """Its words are for people. Its codes, the names of disks, and QEMU's words, which are English, say enough."""
    with pytest.raises(libvirt.libvirtError) as none:
        lab.connection.lookupByName("nobody")
    assert "not found" not in none.value.get_error_message()
    backup(lab, vm, "full", directory)

    lose_bitmap(vm, "vdb", tip(lab, directory))
    said = backup(lab, vm, "inc", directory).stderr
    assert f"{vm.name}: vdb: full in this increment" in said
    assert "vda: full" not in said
    restores(lab, directory, vm.reference())

    closed = lab.new_directory("closed")
    said = backup(lab, vm, "full", directory, f"--scratch-dir {closed}", check=False).stderr
    assert " has to write in " in said

    with Domain(None, vm.name) as domain, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = {"transport": "tcp", "name": "127.0.0.1", "port": str(taken.getsockname()[1])}
        wanted = [("vda", "vda", None, f"{vm.private_directory()}/scratch")]
        with pytest.raises(AddressInUse):
            domain.begin_backup(domxml.backup(server, wanted, ["vdb"]), None)

    lose_job_data(lab, vm)
    with Domain(None, vm.name) as domain:
        assert (domain.running_job(), domain.backup_endpoint()) == ("backup", None)
    vm.destroy()


# What a libvirt does from 11.10 on with a guest that has shut down while its job ran. The second connection is for what
# the first one, which is busy telling, cannot do.
VANISHING = """import libvirt, sys
libvirt.virEventRegisterDefaultImpl()
first, second = libvirt.open(), libvirt.open()
gone = []
def vanish(*_):
    second.lookupByName(sys.argv[1]).destroy()
    gone.append(True)
first.domainEventRegisterAny(first.lookupByName(sys.argv[1]), libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, vanish, None)
print("ready", flush=True)
while not gone:
    libvirt.virEventRunDefaultImpl()
"""


@contextlib.contextmanager
def vanishing(lab, vm):
    """The machine is destroyed the moment that its job ends."""
    watcher = subprocess.Popen(
        [sys.executable, "-c", VANISHING, vm.name], stdout=subprocess.PIPE, env=lab.env, text=True
    )
    with watcher:
        assert watcher.stdout.readline() == "ready\n"
        try:
            yield
            assert watcher.wait(30) == 0
        finally:
            watcher.kill()
    assert not vm.exists() or not vm.is_active()


@pytest.mark.parametrize("level", ["full", "inc"])
def test_a_domain_that_vanishes_when_its_job_ends_is_backed_up(lab, vm, directory, level):
    """The point is safe, checkpoints that nothing needs go all the same, and the next increment starts from it."""
    for before in ("full", "inc", "inc"):
        backup(lab, vm, before, directory)
    vm.write("vda", 16 * MiB, MiB, pattern=3)
    reference = vm.reference()
    with vanishing(lab, vm):
        assert backup(lab, vm, level, directory, "--no-freeze").stderr == ""
    point = tip(lab, directory)
    restores(lab, directory, reference, point)
    assert point in vm.checkpoints()
    assert len(vm.checkpoints()) == (2 if level == "full" else 3)
    assert set(img.layers("vda", vm.disks["vda"].path, "qcow2")[0].bitmaps) == set(vm.checkpoints())
    backup(lab, vm, "inc", directory)
    assert levels(directory)[-1] == "inc"


def test_a_backup_of_a_domain_that_vanishes_when_its_job_ends_is_aborted(lab, vm, directory):
    backup(lab, vm, "full", directory)
    before = vm.checkpoints()
    with vanishing(lab, vm):
        done = backup(lab, vm, "inc", directory, "--no-freeze", check=False, store=FAIL)
    assert done.stderr == f"vnb-checkpoint: {vm.name}: the command ended with status 1: nothing is committed\n"
    assert vm.checkpoints() == before
    assert list(img.layers("vda", vm.disks["vda"].path, "qcow2")[0].bitmaps) == before
    backup(lab, vm, "inc", directory)


@pytest.mark.parametrize("store", [STORE, FAIL], ids=["stores", "fails"])
def test_a_transient_domain_that_vanishes_when_its_job_ends(lab, directory, store):
    """libvirt knows no such domain then, nor any checkpoint of it."""
    vm = lab.domain(Disk("vda"), start=False)
    vm.handle.undefine()
    lab.connection.createXML(vm.xml())
    backup(lab, vm, "full", directory, "--no-freeze")
    with vanishing(lab, vm):
        done = backup(lab, vm, "inc", directory, "--no-freeze", check=False, store=store)
    said = f"vnb-checkpoint: {vm.name}: the command ended with status 1: nothing is committed\n"
    assert (done.returncode, done.stderr) == ((0, "") if store == STORE else (1, said))
    assert levels(directory) == ["full", *["inc"] * (store == STORE)]
    vm.remove()
    assert lab.leftovers() == []


# Waits for a key, then asks ACPI for S5: mov ah,0; int 16h; mov dx,604h; mov ax,2000h; out dx,ax; hlt; jmp short -3
SHUTS_DOWN = bytes.fromhex("b400cd16ba0406b80020eff4ebfd").ljust(510, b"\0") + b"\x55\xaa"


@pytest.fixture
def guest(lab):
    """A machine whose guest shuts down when a key is pressed."""
    vm = lab.domain(Disk("vda"), start=False)
    sector = lab.path("sector")
    with open(sector, "wb") as file:
        file.write(SHUTS_DOWN)
    run("qemu-io", "-f", "qcow2", "-c", f"write -s {sector} 0 512", vm.disks["vda"].path)
    yield vm.start()
    vm.remove()


def test_a_guest_that_shuts_down_while_its_job_runs(lab, guest, directory):
    """
    Before libvirt 11.10 the job is lost with QEMU, after that libvirt keeps QEMU until the job has ended.

    In both the domain is off then, its checkpoints are sound, and the next increment is right.
    """
    for level in ("full", "inc", "inc"):
        backup(lab, guest, level, directory, "--no-freeze")
    before = guest.checkpoints()
    guest.write("vda", MiB, MiB)
    reference = guest.reference()
    begun = lab.path("begun")
    lab.sh(f"vnb-checkpoint begin {guest.name} --level inc --no-freeze --set {directory} > {begun}")

    def is_down():
        with contextlib.suppress(libvirt.libvirtError):
            guest.handle.sendKey(libvirt.VIR_KEYCODE_SET_LINUX, 50, [28], 1, 0)  # Enter
        return guest.state() != libvirt.VIR_DOMAIN_RUNNING

    wait_for(is_down, "the shutdown")
    if lab.connection.getLibVersion() >= PRESERVE_SHUTDOWN_SINCE:
        lab.sh(f"vnb-extents < {begun} | vnb-read | vnb-pack -o {directory}")
        assert lab.sh(f"vnb-checkpoint commit {guest.name} --set {directory}").stderr == ""
        restores(lab, directory, reference)
        assert tip(lab, directory) in guest.checkpoints()
    else:
        assert lab.sh(f"vnb-checkpoint abort {guest.name}").stderr == ""
        assert guest.checkpoints() == before
    wait_for(lambda: not guest.is_active(), "the end of the domain")
    assert set(img.layers("vda", guest.disks["vda"].path, "qcow2")[0].bitmaps) == set(guest.checkpoints())
    backup(lab, guest, "inc", directory)
    restores(lab, directory, reference)
