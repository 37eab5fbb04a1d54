# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-map as a process: how it starts, how it ends, and that nothing of it is left."""

import os
import re
import select
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import makers
import pytest
from mapping import DEADLINE, Map, mapped, processes_in, run, sign

from vnb.cli import map as command

PLAN = [{"vda": "64k:A 64k:0", "vdb": "64k:B"}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("saved") / "set")
    makers.make_set(directory, PLAN)
    return directory


@pytest.fixture
def clean(tmp_path, monkeypatch):
    """All that is started in this test; in the end nothing of it runs, and no private directory is left."""
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("VNB_TEST", str(tmp_path))
    yield runtime
    assert processes_in(tmp_path) == []
    assert list(runtime.iterdir()) == []


def connected(path):
    """A socket connected to a server that has greeted us."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(DEADLINE)
    client.connect(str(path))
    assert client.recv(8) == b"NBDMAGIC"
    return client


def hung_up(client):
    """Wait until the server has gone."""
    poll = select.poll()
    poll.register(client, select.POLLHUP | select.POLLRDHUP)
    return bool(poll.poll(1000 * DEADLINE))


@pytest.mark.parametrize(
    "signum, said",
    [(signal.SIGTERM, "ended by SIGTERM"), (signal.SIGHUP, "ended by SIGHUP"), (signal.SIGINT, None)],
)
def test_a_signal_takes_everything_down(saved, tmp_path, clean, signum, said):
    with mapped("--socket", tmp_path / "s", saved, lines=2) as map_, connected(tmp_path / "s") as client:
        assert map_.end(signum) == (-signum, f"vnb-map: {said}\n" if said else "")
        assert hung_up(client)
    assert not (tmp_path / "s").exists()


def test_a_killed_vnb_map_takes_its_server_along(saved, tmp_path, clean):
    """Its private directory is taken away by the next one, which leaves those alone that live."""
    with mapped("--socket", tmp_path / "living", saved, lines=2):
        (living,) = clean.iterdir()
        with mapped("--socket", tmp_path / "s", saved, lines=2) as map_, connected(tmp_path / "s") as client:
            map_.end(signal.SIGKILL)
            assert hung_up(client)
        (abandoned,) = set(clean.iterdir()) - {living}
        for path in abandoned, living:
            assert (path / "choice").exists()
        (clean / "vnb-map.link").symlink_to(living)
        (clean / "vnb-map.mine").mkdir()  # somebody may give a directory such a name
        assert run("vnb-map", "--run", "true", saved).returncode == 0
        assert set(clean.iterdir()) == {living, clean / "vnb-map.link", clean / "vnb-map.mine"}
        assert (living / "choice").exists()
        (clean / "vnb-map.link").unlink()
        (clean / "vnb-map.mine").rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a directory away")
def test_a_directory_of_another_user_is_left_alone(saved, clean):
    theirs = clean / "vnb-map.theirs"
    theirs.mkdir()
    (theirs / "lock").touch()
    for path in theirs, theirs / "lock":
        os.chown(path, 12345, 12345)
    assert run("vnb-map", "--run", "true", saved).returncode == 0
    (theirs / "lock").unlink()
    os.mkfifo(theirs / "lock", 0o644)  # nobody will ever write to it
    os.chown(theirs / "lock", 12345, 12345)
    assert run("vnb-map", "--run", "true", saved).returncode == 0
    (theirs / "lock").unlink()
    theirs.rmdir()


def test_a_killed_server_ends_vnb_map(saved, tmp_path, clean):
    with mapped("--socket", tmp_path / "s", saved, lines=2) as map_:
        children = Path(f"/proc/{map_.process.pid}/task/{map_.process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        _, stderr = map_.process.communicate(timeout=DEADLINE)
    assert (map_.process.returncode, stderr) == (1, "vnb-map: nbdkit: it was killed by SIGKILL\n")
    assert not (tmp_path / "s").exists()


def test_a_signal_while_it_starts(saved, tmp_path, clean):
    """Its first child is there before the plugin has loaded anything."""
    (tmp_path / "nbdkit").write_text(f"#!/bin/sh\necho > {tmp_path}/fifo\nexec tail -f /dev/null\n")
    (tmp_path / "nbdkit").chmod(0o755)
    with sign(tmp_path / "fifo") as started:
        served = Map("--socket", tmp_path / "s", saved, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
        started()
        assert served.end() == (-signal.SIGTERM, "vnb-map: ended by SIGTERM\n")
    assert not (tmp_path / "s").exists()


def test_the_socket_is_private(saved, tmp_path, clean):
    with mapped("--socket", tmp_path / "s", saved, lines=2):
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
        (private,) = clean.iterdir()
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
        assert stat.S_IMODE((private / "choice").stat().st_mode) == 0o600


def test_an_abandoned_socket_is_replaced(saved, tmp_path, clean):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
    with mapped("--socket", tmp_path / "s", saved, lines=2), connected(tmp_path / "s"):
        pass


def test_a_socket_in_use_is_left_alone(saved, tmp_path, clean):
    with mapped("--socket", tmp_path / "s", saved, lines=2):
        done = run("vnb-map", "--socket", tmp_path / "s", saved)
        assert (done.returncode, done.stderr) == (1, f"vnb-map: {tmp_path}/s: Address already in use\n")
        connected(tmp_path / "s").close()


def test_a_file_is_not_taken_for_a_socket(saved, tmp_path, clean):
    (tmp_path / "s").write_text("precious")
    done = run("vnb-map", "--socket", tmp_path / "s", saved)
    assert (done.returncode, done.stderr) == (1, f"vnb-map: {tmp_path}/s: Address already in use\n")
    assert (tmp_path / "s").read_text() == "precious"


def test_a_socket_path_that_is_too_long(saved, tmp_path, clean):
    path = tmp_path / ("s" * 120)
    done = run("vnb-map", "--socket", path, saved)
    assert (done.returncode, done.stderr) == (1, f"vnb-map: {path}: AF_UNIX path too long\n")


def test_nobody_listens_to_what_it_says(saved, tmp_path, clean):
    served = Map("--socket", tmp_path / "s", saved)
    served.process.stdout.close()
    with served.process:
        assert served.process.wait(DEADLINE) == -signal.SIGPIPE
    assert not (tmp_path / "s").exists()


def test_background_and_stop(saved, tmp_path, clean):
    pid_file = tmp_path / "pid"
    done = run("vnb-map", "--daemon", pid_file, "--socket", tmp_path / "s", saved)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == f"nbd+unix:///vda?socket={tmp_path}/s"
    assert stat.S_IMODE(pid_file.stat().st_mode) == 0o600
    os.kill(int(pid_file.read_text()), 0)
    again = run("vnb-map", "--daemon", pid_file, "--socket", tmp_path / "other", saved)
    assert (again.returncode, again.stderr) == (1, f"vnb-map: {pid_file}: is of a vnb-map that runs\n")
    with connected(tmp_path / "s") as client:
        stopped = run("vnb-map", "--stop", pid_file)
        assert (stopped.returncode, stopped.stdout, stopped.stderr) == (0, "", "")
        assert hung_up(client)
    assert not pid_file.exists() and not (tmp_path / "s").exists()
    stopped = run("vnb-map", "--stop", pid_file)
    assert (stopped.returncode, stopped.stderr) == (1, f"vnb-map: {pid_file}: No such file or directory\n")


def test_stop_of_one_that_was_killed(saved, tmp_path, clean):
    """Its process id may be another's by now: its lock is gone."""
    (tmp_path / "pid").write_text(f"{os.getpid()}\n")
    done = run("vnb-map", "--stop", tmp_path / "pid")
    assert (done.returncode, done.stderr) == (1, f"vnb-map: {tmp_path}/pid: the vnb-map that wrote this has ended\n")


@pytest.mark.parametrize("content", ["", "nameserver 127.0.0.1\n", "0\n", "12 13\n"])
def test_stop_of_what_is_no_vnb_map(tmp_path, content):
    path = tmp_path / "file"
    path.write_text(content)
    done = run("vnb-map", "--stop", path)
    reason = f"vnb-map: {path}: has no process id in it, so no vnb-map wrote it with --daemon\n"
    assert (done.returncode, done.stderr) == (1, reason)
    assert path.read_text() == content


@pytest.mark.parametrize("options", [["--socket", "s"], ["--daemon", "pid", "--socket", "s"]])
def test_where_the_disks_are_cannot_be_told(saved, tmp_path, options, clean):
    with open("/dev/full", "w") as full:
        done = subprocess.run(["vnb-map", *options, saved], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
                              cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "vnb-map: stdout: No space left on device\n")
    assert os.listdir(tmp_path) == ["runtime"]  # nor does it serve in the background


def test_background_that_fails(tmp_path, clean):
    done = run("vnb-map", "--daemon", tmp_path / "pid", "--socket", tmp_path / "s", "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "vnb-map: nowhere: No such file or directory\n"
    assert not (tmp_path / "pid").exists()


def killed_in_the_background(tmp_path, saved, stderr):
    """Start it in the background, kill its nbdkit, and wait until it has ended."""
    command = ["vnb-map", "--daemon", tmp_path / "pid", "--socket", tmp_path / "s", saved]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, timeout=DEADLINE, check=True)
    assert done.stdout.startswith(b"nbd+unix:///vda?")
    pid = int((tmp_path / "pid").read_text())
    process = os.pidfd_open(pid)
    child = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
    os.kill(int(child), signal.SIGKILL)
    assert select.select([process], [], [], DEADLINE)[0]
    os.close(process)


def test_errors_in_the_background_go_to_a_file_that_is_standard_error(saved, tmp_path, clean):
    with open(tmp_path / "errors", "w") as errors:
        killed_in_the_background(tmp_path, saved, errors)
    assert (tmp_path / "errors").read_text() == "vnb-map: nbdkit: it was killed by SIGKILL\n"


def test_errors_in_the_background_go_to_the_systems_log(saved, tmp_path, clean, monkeypatch):
    """In the place of the system's log: a module that Python finds first."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import syslog\nsyslog.syslog = lambda _, text: open('{tmp_path}/log', 'a').write(text)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    killed_in_the_background(tmp_path, saved, subprocess.PIPE)
    assert (tmp_path / "log").read_text() == "nbdkit: it was killed by SIGKILL"


def test_run_passes_a_signal_on(saved, tmp_path, clean):
    """The command may clean up, with the disk still there; not only the shell gets it, but what that has started."""
    (tmp_path / "script").write_text(f"""if True:
        import os, signal, subprocess
        signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGTERM}})
        open("{tmp_path}/fifo", "w").write("up")
        signal.sigwait({{signal.SIGTERM}})
        subprocess.run(["nbdinfo", "--size", os.environ["uri"]])
        raise SystemExit(7)
    """)
    with sign(tmp_path / "fifo") as started:
        served = Map("--disk", "vda", "--run", f"trap : TERM; {sys.executable} {tmp_path}/script; exit $?", saved)
        started()
        served.process.terminate()
        stdout, stderr = served.process.communicate(timeout=DEADLINE)
    assert (served.process.returncode, stdout, stderr) == (7, "131072\n", "")


def test_run_of_a_command_that_the_signal_ends(saved, tmp_path, clean):
    with sign(tmp_path / "fifo") as started:
        served = Map("--run", f"echo > {tmp_path}/fifo; tail -f /dev/null; true", saved)
        started()
        assert served.end() == (-signal.SIGTERM, "vnb-map: ended by SIGTERM\n")


def test_run_of_a_command_that_dies(saved, clean):
    assert run("vnb-map", "--run", "kill -KILL $$", saved).returncode == 128 + signal.SIGKILL


def test_run_leaves_standard_input_to_the_command(saved, clean):
    done = subprocess.run(
        ["vnb-map", "--run", "cat", saved], input=b"hello", capture_output=True, timeout=DEADLINE, check=True
    )
    assert done.stdout == b"hello"


def test_nbdkit_is_missing(saved, tmp_path, clean):
    """Only what vnb-map needs before nbdkit is in PATH."""
    for name in ("sh", "python3", "env", "setpriv"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    script = run("sh", "-c", "command -v vnb-map").stdout.strip()
    done = run(script, "--run", "true", saved, env={**os.environ, "PATH": str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr == "vnb-map: nbdkit: not found (it is in the package nbdkit, with nbdkit-plugin-python)\n"


def test_nbdkit_says_why_it_cannot(saved, tmp_path, clean):
    (tmp_path / "nbdkit").write_text("#!/bin/sh\necho 'nbdkit: error: no plugin' >&2\nexit 1\n")
    (tmp_path / "nbdkit").chmod(0o755)
    done = run("vnb-map", "--run", "true", saved, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert (done.returncode, done.stderr) == (1, "vnb-map: nbdkit: error: no plugin\n")


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([], ""),
        (["--socket", "a", "--run", "b", "set"], ""),
        (["--run", "true"], ""),
        (["--listen", "here", "set"], '--listen: "here" is not PORT or HOST:PORT'),
        (["--listen", "65536", "set"], '--listen: "65536" is not PORT or HOST:PORT'),
        (["--listen", "::1:5", "set"], '--listen: "::1:5" is not PORT or HOST:PORT'),
        (["--tls-psk", "keys", "--socket", "s", "set"], "--tls-psk: goes with --listen"),
        (["--writable", "--overlay", "o", "--socket", "s", "set"], "--overlay: does not go with --writable"),
        (["--daemon", "pid", "--run", "true", "set"], "--daemon: does not go with --run"),
    ],
)
def test_wrong_usage(arguments, reason, clean):
    done = run("vnb-map", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"vnb-map: {reason}")
    assert "Usage:\n  vnb-map " in done.stderr


def test_help_fits_a_terminal(clean):
    done = run("vnb-map", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_every_option_is_in_the_manual():
    page = (Path(__file__).parents[2] / "man" / "vnb-map.1").read_text()
    for option in set(re.findall(r"--([a-z-]+)", command.__doc__)):
        assert f"Fl -{option}" in page, option
