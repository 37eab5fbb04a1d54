# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every script in examples/ runs, as it stands."""

import contextlib
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import guest
import libvirt
import pytest
from backups import backup, levels, restores
from lab import ROOT, Disk, MiB, compare, wait_for
from remote import SSHD, Hypervisor
from stores import MOTO, S3

EXAMPLES = ROOT / "examples"
SSH = """#!/bin/sh
# ssh HOST COMMAND...: joined by spaces and given to a shell, as ssh(1) does
[ "$1" = store ] || { echo "ssh: $1: unreachable" >&2; exit 255; }
shift
exec sh -c "$*"
"""


def needs(*programs):
    missing = [name for name in programs if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(map(str, missing))}")


def run(lab, name, *arguments, **environment):
    argv = [EXAMPLES / name, *arguments]
    return subprocess.run(argv, env={**lab.env, **environment}, capture_output=True, text=True, timeout=200)


def test_each_example_has_a_test():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert {name for name in names if f'"{name}"' not in tests and f"/{name}" not in tests} == set()


def test_demo(lab):
    done = run(lab, "demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.endswith("/set: is not there yet: a new backup set will be made\n")
    assert done.stderr.count("\n") == 1
    assert lab.leftovers() == []


@pytest.fixture
def ssh(lab):
    """PATH with an ssh that reaches the host store, which is this one."""
    directory = Path(lab.new_directory("bin"))
    (directory / "ssh").write_text(SSH)
    (directory / "ssh").chmod(0o700)
    return f"{directory}:{lab.env['PATH']}"


def test_to_remote(lab, vm, ssh):
    """Full, then an increment, then full as it was asked; the path has what a shell would take apart."""
    directory = lab.path("a set; of $HOME")
    for number, options in enumerate(([], [], ["full"])):
        vm.write_random("vda", (4 + number) * MiB, MiB, seed=number)
        reference = vm.reference()
        done = run(lab, "to-remote", vm.name, "store", directory, *options, PATH=ssh)
        assert done.returncode == 0, done.stderr
    assert levels(directory) == ["full", "inc", "full"]
    restores(lab, f"'{directory}'", reference)


def test_to_remote_that_fails(lab, vm, ssh):
    """What was begun is aborted; a host that is not reached has no set that could be missing."""
    directory = lab.path(f"{vm.name}.set")
    with open(directory, "w"):
        done = run(lab, "to-remote", vm.name, "store", directory, PATH=ssh)
    assert done.returncode == 1
    assert (vm.has_job(), vm.checkpoints()) == (False, [])
    done = run(lab, "to-remote", vm.name, "elsewhere", directory, PATH=ssh)
    assert (done.returncode, done.stderr) == (1, "ssh: elsewhere: unreachable\n")


def test_to_remote_leaves_the_backup_of_another_alone(lab, vm, ssh):
    lab.sh(f"vnb-checkpoint begin {vm.name} --level copy --no-freeze > {lab.path('theirs')}")
    done = run(lab, "to-remote", vm.name, "store", lab.path("never"), PATH=ssh)
    assert done.returncode == 1
    assert "a backup runs already" in done.stderr
    assert vm.has_job()
    lab.sh(f"vnb-checkpoint abort {vm.name}")


def test_restore_drill(lab):
    """A machine that boots, without its network, beside the one that it is a copy of."""
    network = '<interface type="user"><mac address="52:54:00:11:22:33"/><model type="virtio"/></interface>'
    vm = guest.linux(lab, Disk("vda", 64 * MiB, filesystem="ext4"), extra_xml=network)
    below, directory = lab.new_directory("drill"), lab.new_directory("set")
    os.chmod(below, 0o711)  # noqa: S103 - QEMU's user must get through
    try:
        lab.sh(f"vnb-backup -z {vm.name} {directory}")
        done = run(lab, "restore-drill", directory, below, "100")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"{directory}: restore point vnb.main." in done.stdout
        assert os.listdir(below) == []
    finally:
        vm.remove()
    assert {domain.name() for domain in lab.connection.listAllDomains()} == set(lab.domains)
    assert lab.leftovers() == []


def test_restore_drill_of_what_does_not_live(lab, vm):
    """There is no system on these disks: nothing of the drill stays."""
    below, directory = lab.new_directory("drill"), lab.new_directory("set")
    os.chmod(below, 0o711)  # noqa: S103 - QEMU's user must get through
    lab.sh(f"vnb-backup --no-freeze {vm.name} {directory}")
    done = run(lab, "restore-drill", directory, below, "1")
    assert done.returncode == 1
    assert done.stderr == f"restore-drill: {directory}: its guest agent has not answered within 1 s\n"
    assert os.listdir(below) == []
    assert {domain.name() for domain in lab.connection.listAllDomains()} == set(lab.domains)


def test_restore_drill_that_is_ended(lab, vm):
    """A signal to the script alone is not kept waiting by the boot that it waits for."""
    below, directory = lab.new_directory("drill"), lab.new_directory("set")
    os.chmod(below, 0o711)  # noqa: S103 - QEMU's user must get through
    lab.sh(f"vnb-backup --no-freeze {vm.name} {directory}")
    argv = [EXAMPLES / "restore-drill", directory, below, "1000"]
    with subprocess.Popen(argv, env=lab.env, stderr=subprocess.PIPE) as child:
        wait_for(lambda: any(domain.name().startswith("drill") for domain in lab.connection.listAllDomains()
                             if domain.isActive()), "the drill's domain")
        child.terminate()
        assert (child.communicate(timeout=60)[1], child.returncode) == (b"", 143)
    assert os.listdir(below) == []
    assert {domain.name() for domain in lab.connection.listAllDomains()} == set(lab.domains)


def chain(vm, back_up, count=3):
    """Back up after each of some changes; the references: what the disks held then."""
    references = []
    for number in range(count):
        vm.write_random("vda", (4 + number) * MiB, MiB, seed=number)
        vm.zero("vdb", (8 + number) * MiB, MiB // 2)
        references.append(vm.reference())
        back_up(number)
    return references


def holds(directory, reference):
    """Hold the images of a directory against a reference."""
    for name, image in reference.items():
        compare(image, f"{directory}/{name}.qcow2", "qcow2")


def done_well(done):
    assert done.returncode == 0, done.stdout + done.stderr


def failing_program(lab, name):
    """PATH with a stage by this name that passes on a little and fails."""
    directory = Path(lab.new_directory("bin"))
    (directory / name).write_text("#!/bin/sh\nhead -c 1000\nexit 1\n")
    (directory / name).chmod(0o700)
    return f"{directory}:{lab.env['PATH']}"


@pytest.fixture
def s3(lab):
    server = S3(lab)
    yield server
    server.close()


@needs("aws", MOTO)
def test_s3(lab, vm, s3):
    """There and straight back: the last point, one before it, one that is not there. What is there is a backup set."""
    url = "s3://store/a b"
    wanted = [[], [], ["full"]]
    references = chain(vm, lambda number: done_well(run(lab, "to-s3", vm.name, url, *wanted[number], **s3.env)))
    points = [name.removesuffix(".vnb").rpartition(".") for name in s3.names("a b")]
    assert [level for _, _, level in points] == ["full", "inc", "full"]
    for number, point in ((2, []), (1, [points[1][0]])):
        directory = lab.new_directory("restored")
        done_well(run(lab, "from-s3", url, directory, *point, **s3.env))
        holds(directory, references[number])
    done = run(lab, "from-s3", url, lab.path("never"), "vnb.main.0", **s3.env)
    assert (done.returncode, done.stderr) == (1, f"from-s3: {url}: vnb.main.0: no such restore point\n")
    done = run(lab, "from-s3", f"{url}/nothing", lab.path("never"), **s3.env)
    assert (done.returncode, done.stderr) == (1, f"from-s3: {url}/nothing: no backup here\n")
    directory = lab.new_directory("set")
    s3.aws("sync", url, directory)
    restores(lab, directory, references[1], point=points[1][0])


@needs("aws", "gpg", "gpgconf", MOTO)
def test_a_backup_elsewhere_is_no_base_for_one_to_s3(lab, vm, s3):
    """Else the first object of an empty bucket is an increment to what only the other place has."""
    env = {**s3.env, "GNUPGHOME": lab.new_directory("keys")}
    key, files = "backup@example.org", lab.new_directory("files")
    lab.sh(f"gpg --batch --passphrase '' --quick-gen-key {key} default default never", env=env)
    try:
        done_well(run(lab, "encrypted", "backup", vm.name, "full", key, files, **env))
    finally:
        lab.sh("gpgconf --kill all", env=env)
    references = chain(vm, lambda _: done_well(run(lab, "to-s3", vm.name, "s3://store/vm1", **env)), 2)
    assert [name.split(".")[-2] for name in s3.names("vm1")] == ["full", "inc"]
    directory = lab.new_directory("restored")
    done_well(run(lab, "from-s3", "s3://store/vm1", directory, **env))
    holds(directory, references[-1])
    # A bucket that was emptied behind our back does not get an increment.
    s3.aws("rm", "--recursive", "s3://store/vm1")
    done = run(lab, "to-s3", vm.name, "s3://store/vm1", **env)
    assert done.returncode == 1
    assert "which this increment would start from, is not there any more: take a full one" in done.stderr
    assert s3.aws("ls", "--recursive", "s3://store") == ""


@needs("aws", MOTO)
def test_to_s3_that_fails(lab, vm, s3):
    """Where the store does not take it, and where a stage fails: nothing counts, and nothing that was cut stays."""
    temporary = lab.new_directory("tmp")
    done = run(lab, "to-s3", vm.name, "s3://elsewhere/vm1", **s3.env, TMPDIR=temporary)
    assert done.returncode == 1
    assert "NoSuchBucket" in done.stderr
    done = run(lab, "to-s3", vm.name, "s3://store/vm1", **s3.env, PATH=failing_program(lab, "vnb-pack"))
    assert done.returncode == 1
    assert s3.aws("ls", "--recursive", "s3://store") == ""
    assert os.listdir(temporary) == []
    assert (vm.has_job(), vm.checkpoints()) == (False, [])


@needs("age", "age-keygen", "gpg", "gpgconf")
@pytest.mark.parametrize("program", ["age", "gpg"])
def test_encrypted(lab, vm, program):
    """Full and an increment; in the files is nothing that can be read, and a key that is missing is said."""
    keys, files = lab.new_directory("keys"), Path(lab.new_directory("files"))
    env = {"GNUPGHOME": keys}
    if program == "age":
        lab.sh(f"age-keygen -o {keys}/key && age-keygen -y {keys}/key > {keys}/public")
        public, private = f"{keys}/public", f"{keys}/key"
    else:
        public = private = "backup@example.org"
        lab.sh(f"gpg --batch --passphrase '' --quick-gen-key {public} default default never", env=env)
    try:
        levels_wanted = ["full", "inc"]
        references = chain(vm, lambda number: done_well(
            run(lab, "encrypted", "backup", vm.name, levels_wanted[number], public, files, **env)), 2)
        stored = sorted(files.iterdir())
        assert [path.name.split(".", 2)[2] for path in stored] == [f"full.vnb.{program}", f"inc.vnb.{program}"]
        assert not any(path.read_bytes().startswith(b"\x94\xa3vnb") for path in stored)
        directory = lab.new_directory("restored")
        done_well(run(lab, "encrypted", "restore", private, directory, *stored, **env))
        holds(directory, references[-1])
    finally:
        lab.sh("gpgconf --kill all", env=env)
    done = run(lab, "encrypted", "backup", vm.name, "inc", "nobody@example.org", files, **env)
    assert done.returncode == 1
    assert sorted(files.iterdir()) == stored
    assert len(vm.checkpoints()) == 2
    lab.sh("gpgconf --kill all", env=env)


def test_volumes(lab, vm):
    """More than one volume each; what is there is not written to, and of a backup that failed nothing stays."""
    prefixes = [lab.path(f"{vm.name} {level}") for level in ("full", "inc")]
    references = chain(vm, lambda number: done_well(
        run(lab, "volumes", "backup", vm.name, prefixes[number].split()[-1], "300K", prefixes[number])), 2)
    assert all(os.path.getsize(f"{prefix}.0001") == 300 * 1024 for prefix in prefixes)
    directory = lab.new_directory("restored")
    done_well(run(lab, "volumes", "restore", directory, *prefixes))
    holds(directory, references[-1])
    done = run(lab, "volumes", "backup", vm.name, "inc", "300K", prefixes[0])
    assert (done.returncode, done.stderr) == (1, f"volumes: {prefixes[0]}.0000: is there already\n")
    done = run(lab, "volumes", "backup", vm.name, "inc", "300K", lab.path("never", "there"))
    assert done.returncode == 1
    assert len(vm.checkpoints()) == 2


@needs("rclone")
def test_to_rclone(lab, vm):
    store = lab.new_directory("remote")
    env = {"RCLONE_CONFIG": lab.path("rclone.conf"), "RCLONE_CONFIG_STORE_TYPE": "alias",
           "RCLONE_CONFIG_STORE_REMOTE": store}
    wanted = ["full", "full", "inc"]
    references = chain(vm, lambda number: done_well(
        run(lab, "to-rclone", "backup", vm.name, wanted[number], "store:a b", **env)))
    failing = failing_program(lab, "vnb-pack")
    assert run(lab, "to-rclone", "backup", vm.name, "inc", "store:a b", **env, PATH=failing).returncode == 1
    stored = sorted(path.name for path in Path(store).rglob("*") if path.is_file())
    assert [name.split(".")[-2] for name in stored] == wanted
    directory = lab.new_directory("restored")
    done_well(run(lab, "to-rclone", "restore", "store:a b", directory, **env))
    holds(directory, references[-1])
    os.mkdir(f"{store}/empty")
    done = run(lab, "to-rclone", "restore", "store:empty", directory, **env)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "to-rclone: store:empty: no backup there"


@needs("restic")
def test_to_restic(lab, vm):
    """A stream that was cut is there as a snapshot, but not taken."""
    password = lab.path("password")
    Path(password).write_text("secret\n")
    env = {"RESTIC_REPOSITORY": lab.path(f"{vm.name}.restic"), "RESTIC_PASSWORD_FILE": password,
           "RESTIC_CACHE_DIR": lab.path("restic-cache")}
    lab.sh("restic init", env=env)
    wanted = ["full", "inc"]
    references = chain(vm, lambda number: done_well(
        run(lab, "to-restic", "backup", vm.name, wanted[number], **env)), 2)
    failing = failing_program(lab, "vnb-read")
    assert run(lab, "to-restic", "backup", vm.name, "inc", **env, PATH=failing).returncode == 1
    directory = lab.new_directory("restored")
    done_well(run(lab, "to-restic", "restore", vm.name, directory, **env))
    holds(directory, references[-1])
    done = run(lab, "to-restic", "restore", "vm1", directory, **env)
    assert (done.returncode, done.stderr) == (1, "to-restic: vm1: no full backup of it in the repository\n")


@needs("parallel")
@pytest.mark.skipif(os.geteuid() != 0 or SSHD is None, reason="logs in as root, to an sshd")
def test_fleet(lab, vm):
    """Two machines of another host, of which one fails: the other is saved, and status, lines and joblog say which."""
    raw = lab.domain(Disk("vda", 8 * MiB, format="raw"))
    hypervisor = Hypervisor(lab)
    try:
        machines, directory = lab.path(f"{vm.name}.list"), lab.new_directory("fleet")
        Path(machines).write_text(f"hv {raw.name}\nhv {vm.name}\n")
        env = {**hypervisor.env, "HOME": lab.new_directory("home")}
        reference = vm.reference()
        done = run(lab, "fleet", machines, directory, "1", **env)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == f"fleet: hv: {raw.name}: not saved: status 1"
        assert "a raw image cannot hold a bitmap" in done.stderr
        jobs = [line.split("\t") for line in Path(directory, "joblog").read_text().splitlines()[1:]]
        assert {job[8]: job[6] for job in jobs} == {f"backup hv {raw.name}": "1", f"backup hv {vm.name}": "0"}
        restores(lab, f"{directory}/hv/{vm.name}", reference)
        Path(machines).write_text(f"hv {vm.name}\n")
        done_well(run(lab, "fleet", machines, directory, **env))
        assert levels(f"{directory}/hv/{vm.name}") == ["full", "inc"]
    finally:
        hypervisor.close()
        raw.remove()


@pytest.mark.skipif(os.geteuid() != 0 or SSHD is None, reason="logs in as root, to an sshd")
def test_restore_to_a_host_without_vnb(lab, vm):
    """As vnb-restore(1) has it: image and qemu-nbd there, a forwarded socket, and the XML through ssh."""
    page = (ROOT / "man" / "vnb-restore.1").read_text().partition(".Sh REMOTE RESTORE")[2]
    block = re.findall(r"(?ms)^\.Bd -literal.*?\n(.*?)^\.Ed", page)[1]
    hypervisor = Hypervisor(lab)
    name = f"restore_{vm.name}"
    try:
        directory, images = lab.new_directory("set"), lab.new_directory("images")
        reference = vm.reference("vda")
        backup(lab, vm, "copy", directory, "--no-freeze --include vda")
        for old, new in (("/backup/vm1", directory), ("/images", images), ("/run/", f"{images}/"), ("20G", "64M")):
            assert old in block
            block = block.replace(old, new)
        lab.sh(f"set -e\n{block}", env=hypervisor.env)
        compare(reference["vda"], f"{images}/vda.qcow2", "qcow2")
        assert f"{images}/vda.qcow2" in lab.connection.lookupByName(name).XMLDesc()
    finally:
        with contextlib.suppress(libvirt.libvirtError):
            lab.connection.lookupByName(name).undefine()
        hypervisor.close()


@needs("pv", "mbuffer")
def test_bandwidth(lab, vm, ssh):
    """The pipeline of vnb(7), as it stands there but for its places: not faster than it says."""
    page = (ROOT / "man" / "vnb.7").read_text()
    blocks = [block.partition("\n.Ed")[0] for block in page.split("indent\n")]
    command, = (block for block in blocks if "| pv " in block)
    vm.write_random("vdb", 16 * MiB, 24 * MiB, seed=3)
    directory, reference = lab.path(f"{vm.name}.set"), vm.reference()
    begun = time.monotonic()
    lab.sh(command.replace("/backup/vm1", directory).replace(" vm1 ", f" {vm.name} "), env={"PATH": ssh})
    assert time.monotonic() - begun > 24 / 10 - 1  # pv lets a first second's worth through at once
    restores(lab, directory, reference)


def test_demo_cleans_up_when_it_is_interrupted(lab):
    """Its machine and its directory go with it."""
    demo = subprocess.Popen([ROOT / "examples" / "demo"], env=lab.env, stdout=subprocess.PIPE, text=True)
    for line in demo.stdout:
        if "vnb-checkpoint begin" in line:
            break
    demo.terminate()
    demo.stdout.read()
    assert demo.wait(60) == 143
    assert {domain.name() for domain in lab.connection.listAllDomains()} == set(lab.domains)
    assert not list(Path("/var/tmp").glob("vnb-demo.*"))  # noqa: S108
    assert lab.leftovers() == []
