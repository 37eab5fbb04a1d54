# SPDX-License-Identifier: LGPL-2.1-or-later
"""Another user of the host: what that one can read, connect to, and put in our way. Needs root, to be another one."""

import contextlib
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import servers
from lab import Disk, MiB, marked, wait_for
from mapping import mapped

from vnb.base.errors import Error
from vnb.base.tempdir import temporary_directory

NOBODY = 65534
SECRET = "vNc-Key8"  # noqa: S105 - of nothing
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
FAULT = pytest.mark.fault(
    "another user of the host looks for sets, sockets and passwords, or waits in TMPDIR with links",
    holds="finds nothing to read, to connect to, or to overwrite",
)
# Prints what of the paths in its arguments it can read, list, write or connect to.
INTRUDER = """
import os, socket, stat, sys
for path in sys.argv[1:]:
    for what, call in {
        "read": lambda: os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK)),
        "write": lambda: os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK)),
        "connect": lambda: socket.socket(socket.AF_UNIX).connect(path),
    }.items():
        try:
            call()
        except OSError:
            continue
        print(what, path)
"""


def intruder(*paths):
    """What another user can do with these paths: lines of INTRUDER."""
    ids = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    done = subprocess.run(["setpriv", *ids, "/usr/bin/python3", "-c", INTRUDER, *map(str, paths)],
                          capture_output=True, text=True, timeout=servers.DEADLINE, check=True, cwd="/")
    return done.stdout.splitlines()


def below(*directories):
    """All that is in directories, and they themselves."""
    return [path for directory in directories for path in (Path(directory), *Path(directory).rglob("*"))]


def open_to_others(paths):
    """Those that somebody else than their owner may do anything with, as ls -l has it."""
    found = [(path, os.lstat(path).st_mode) for path in paths]
    return [f"{stat.filemode(mode)} {path}" for path, mode in found if mode & 0o077 and not stat.S_ISLNK(mode)]


def test_the_intruder_finds_what_is_open(tmp_path):
    """Else nothing that it does not find would mean anything."""
    with contextlib.ExitStack() as stack:
        import socket
        import tempfile

        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="vnb-test.", dir="/var/tmp"))
        os.chmod(directory, 0o755)  # noqa: S103
        Path(directory, "file").write_text("x")
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(f"{directory}/socket")
        listener.listen()
        os.chmod(f"{directory}/socket", 0o666)  # noqa: S103
        found = intruder(directory, f"{directory}/file", f"{directory}/socket")
    assert found == [f"read {directory}", f"read {directory}/file", f"connect {directory}/socket"]


@FAULT
@pytest.mark.parametrize("umask", ["0", "077"])
def test_while_a_backup_runs(lab, umask):
    """
    Whatever the umask: modes of all that is made, while it is made and afterwards; and nothing of it is said where all
    can read it. The images are QEMU's, in a directory that libvirt's own users can enter.
    """
    vnc = f"<graphics type='vnc' port='-1' passwd='{SECRET}'><listen type='none'/></graphics>"
    vm = lab.domain(Disk("vda", 8 * MiB), extra_xml=vnc)
    vm.write_random("vda", 1 * MiB, 2 * MiB, seed=1)
    here = lab.new_directory("secrets")
    os.chmod(here, 0o711)  # noqa: S103 - only what is in it keeps others out
    directory, restored, password, ready, go = (f"{here}/{name}" for name in ("set", "out", "password", "ready", "go"))
    Path(password).write_text(f"{SECRET}\n")
    for fifo in (ready, go):
        os.mkfifo(fifo, 0o600)
    script = f"""
        umask {umask}
        vnb-checkpoint run {vm.name} --level full --set {directory} --user me --password-file {password} -- '
            vnb-extents | vnb-read | {{ head -c 100000; echo > {ready}; cat {go}; cat; }} |
            vnb-pack -o {directory}'
    """
    images = set(os.listdir(vm.directory))
    running = subprocess.Popen(["bash", "-c", script], env=lab.env, cwd=lab.directory, stderr=subprocess.PIPE)
    try:
        Path(ready).read_bytes()
        wait_for(lambda: list(Path(directory).glob(".*.partial")), "a segment that is written")
        made = [path for path in below(vm.private_directory()) if path.name.startswith("vnb-")]
        assert any(path.is_socket() for path in made)  # QEMU's: who can get to it, the directory says
        ours = below(directory, lab.env["VNB_STATE_DIR"])
        assert [path.suffix for path in below(directory)[1:]] == [".partial"]
        scratch = [Path(vm.directory, name) for name in set(os.listdir(vm.directory)) - images]
        assert [path.suffix for path in scratch] == [".scratch"]
        assert open_to_others([*ours, *scratch]) == []
        assert intruder(*ours, *scratch, *made) == []
        told = [Path(f"/proc/{pid}/{name}").read_bytes() for pid in marked(lab.directory)
                for name in ("cmdline", "environ")]
        assert len(told) > 10 and not any(SECRET.encode() in text for text in told)
        Path(go).write_bytes(b"")
        _, said = running.communicate(timeout=servers.DEADLINE)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 0, said
    ours = below(directory, lab.env["VNB_STATE_DIR"])
    assert open_to_others(ours) == []
    assert intruder(*ours) == []
    texts = [path.read_bytes() for path in ours if path.is_file()]
    assert texts and not any(SECRET.encode() in text for text in [said, *texts])
    lab.sh(f"umask {umask}; vnb-restore {directory} {restored}")
    assert [line for line in open_to_others(below(restored)) if line[1:10] != "rwx--x--x"] == []
    assert intruder(*below(restored)) == []
    shutil.rmtree(here)
    vm.remove()
    assert lab.leftovers() == []


@FAULT
@pytest.mark.parametrize("umask", [0, 0o077])
def test_while_a_set_is_served(tmp_path, umask, monkeypatch):
    import makers

    makers.make_set(str(tmp_path / "set"), [{"vda": "64k:A"}])
    for directory in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        os.chmod(directory, 0o711)  # noqa: S103
    runtime = tmp_path / "runtime"
    runtime.mkdir(0o711)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    before = os.umask(umask)
    try:
        with mapped("--socket", tmp_path / "s", tmp_path / "set", lines=1):
            made = [tmp_path / "s", *below(*runtime.iterdir())]
            assert len(made) > 2
            assert open_to_others(made) == []
            assert intruder(*made) == []
    finally:
        os.umask(before)


NODE = f"""
    <node>
      <auth><user password='{SECRET}'>me</user></auth>
      <domain type='test'><name>vm</name><memory>8192</memory><os><type>hvm</type></os></domain>
    </node>"""


@FAULT
def test_password_of_libvirt(tmp_path, monkeypatch):
    """It comes from a file; a wrong one, or one that is no text, is told without it, and none at all in a line, too."""
    monkeypatch.setenv("VNB_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "node.xml").write_text(NODE)
    argv = ["vnb-checkpoint", "list", "-c", f"test://{tmp_path}/node.xml", "--user", "me", "vm"]
    password = tmp_path / "password"
    servers.command(*argv).failed("vnb-checkpoint: --password-file: libvirt asks for a password, and none is given")
    argv += ["--password-file", password]
    servers.command(*argv).failed(f"vnb-checkpoint: {password}: No such file or directory")
    password.write_bytes(b"\xff" + SECRET.encode())
    servers.command(*argv).failed(f"vnb-checkpoint: {password}: is not UTF-8")
    for text, refused in ((SECRET, False), (f"{SECRET}x", True), ("", True)):
        password.write_text(f"{text}\n")
        done = servers.command(*argv)  # the test driver has no checkpoints: it fails either way
        assert done.status == 1 and re.fullmatch("vnb-checkpoint: [^\n]*\n", done.err), done.err
        assert ("authentication failed" in done.err) == refused and SECRET not in done.err


def given_away(directory, mode=0o755):
    directory.mkdir()
    os.chmod(directory, mode)
    os.chown(directory, NOBODY, NOBODY)
    return directory


@FAULT
def test_a_temporary_directory_of_another_user(tmp_path, monkeypatch):
    """Its owner can replace what is made in it by a link to anything, between two steps of ours."""
    import makers

    (segment,) = makers.make_set(str(tmp_path / "set"), [{"vda": "64k:A"}])
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    for name, theirs in {
        "a": given_away(tmp_path / "a"),
        "b": given_away(tmp_path / "b", 0o1777),
        "c": tmp_path / "c",
    }.items():
        if name == "c":
            theirs.mkdir()
            os.chmod(theirs, 0o777)  # noqa: S103
        monkeypatch.setenv("TMPDIR", str(theirs))
        line = f"{theirs}: another user can replace what is made in it: set TMPDIR to a directory of your own"
        servers.command("vnb-map", "--run", "true", tmp_path / "set").failed(f"vnb-map: {line}")
        servers.command("vnb-apply", tmp_path / "out", stdin=Path(segment).read_bytes()).failed(f"vnb-apply: {line}")
        assert os.listdir(theirs) == [] and not (tmp_path / "out").exists()
    os.chmod(tmp_path / "c", 0o1777)  # noqa: S103
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "a"))  # as sudo -E leaves it: passed over
    servers.command("vnb-map", "--run", "true", tmp_path / "set").ok()
    assert os.listdir(tmp_path / "a") == os.listdir(tmp_path / "c") == []


def ours_below(directory):
    """A directory of ours, and private, below another one."""
    (directory / "sub").mkdir(0o700, parents=True)
    return directory / "sub"


@FAULT
@pytest.mark.parametrize("how", ["owner", "above", "all", "group", "link", "link above"])
def test_a_temporary_directory_below_one_of_another_user(tmp_path, monkeypatch, how):
    """Who can rename what leads to it can put another in its place, however private it is itself."""
    import makers

    makers.make_set(str(tmp_path / "set"), [{"vda": "64k:A"}])
    weak = tmp_path / "weak"
    if how in ("link", "link above"):
        ours = ours_below(tmp_path / "good")
        weak.symlink_to(ours if how == "link" else ours.parent)
        os.chown(weak, NOBODY, NOBODY, follow_symlinks=False)
        path = weak if how == "link" else weak / "sub"
    elif how == "above":
        path = ours_below(given_away(weak) / "between")
    else:
        path = ours_below(weak)
        os.chown(weak, NOBODY if how == "owner" else 0, NOBODY)
        os.chmod(weak, {"owner": 0o755, "all": 0o777, "group": 0o775}[how])
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    through = "" if how == "link" else f", through {weak}"
    servers.command("vnb-map", "--run", "true", tmp_path / "set").failed(
        f"vnb-map: {path}: another user can replace what is made in it{through}: "
        "set TMPDIR to a directory of your own"
    )
    assert list(path.iterdir()) == []
    # As sudo -E leaves it: passed over.
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    servers.command("vnb-map", "--run", "true", tmp_path / "set").ok()


@FAULT
@pytest.mark.parametrize("how", ["sticky", "group of root", "link", "chain", "upwards"])
def test_a_temporary_directory_that_nobody_else_can_replace(tmp_path, monkeypatch, how):
    """What is usual: below /tmp, by links of ours or of root's, with the umask of users who have their own group."""
    import makers

    makers.make_set(str(tmp_path / "set"), [{"vda": "64k:A"}])
    path = ours_below(tmp_path / "good")
    if how in ("sticky", "group of root"):
        os.chmod(path.parent, 0o1777 if how == "sticky" else 0o775)
    if how in ("link", "chain"):
        (tmp_path / "a").symlink_to("good")
        (tmp_path / "b").symlink_to(tmp_path / "a")
        path = tmp_path / ("a" if how == "link" else "b") / "sub"
    if how == "upwards":
        (tmp_path / "good/up").symlink_to("../good/./sub/..")
        path = tmp_path / "good/up/sub"
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    servers.command("vnb-map", "--run", "true", tmp_path / "set").ok()


@FAULT
@pytest.mark.parametrize("gid, mode, accepted", [(NOBODY, 0o775, True), (1, 0o775, False), (1, 0o755, True)])
def test_a_temporary_directory_of_a_user_with_a_group_of_his_own(gid, mode, accepted):
    """Who is alone in it lets it write everywhere, by umask; no other group may."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="vnb-test.", dir="/var/tmp") as home:
        os.chown(home, NOBODY, gid)
        os.chmod(home, mode)
        child = os.fork()
        if child == 0:
            status = 70
            try:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                tempfile.tempdir = home
                status = 0 if temporary_directory() == home else 1
            except Error:
                status = 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if accepted else 2)


@FAULT
def test_a_pid_file_of_another_user(tmp_path, monkeypatch):
    """Through a link it would overwrite anything, and what is in it says which process --stop ends."""
    import makers

    makers.make_set(str(tmp_path / "set"), [{"vda": "64k:A"}])
    victim, pid, theirs = tmp_path / "victim", tmp_path / "pid", tmp_path / "theirs"
    victim.write_text("kept")
    pid.symlink_to(victim)
    start = ["vnb-map", "--socket", tmp_path / "s", "--daemon"]
    for argv in ([*start, pid, tmp_path / "set"], ["vnb-map", "--stop", pid]):
        servers.command(*argv).failed(f"vnb-map: {pid}: Too many levels of symbolic links")
    theirs.write_text(f"{os.getpid()}\n")
    os.chown(theirs, NOBODY, NOBODY)
    for argv in ([*start, theirs, tmp_path / "set"], ["vnb-map", "--stop", theirs]):
        servers.command(*argv).failed(f"vnb-map: {theirs}: belongs to another user")
    os.mkfifo(tmp_path / "fifo")
    for argv in ([*start, tmp_path / "fifo", tmp_path / "set"], ["vnb-map", "--stop", tmp_path / "fifo"]):
        servers.command(*argv).failed(f"vnb-map: {tmp_path}/fifo: not a regular file")
    assert victim.read_text() == "kept" and not (tmp_path / "s").exists()
