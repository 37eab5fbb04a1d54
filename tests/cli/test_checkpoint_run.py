# SPDX-License-Identifier: LGPL-2.1-or-later
"""run and its command: what proves that all was taken, and how the command ends. On images, without libvirt."""

import json
import os
import pty
import shlex
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from vnb.job import proof
from vnb.job.pipeline import leaves_by_stdout
from vnb.job.state import process_table

DEADLINE = 60
MiB = 1 << 20
READ = "vnb-extents | vnb-read"
NO_PROOF = "no command says that it has taken the segment to its end: not committed"


class Image:
    """A qcow2 image with some data, and backups of it. path: where all is."""

    def __init__(self, path):
        self.path = path
        self.environment = {**os.environ, "VNB_STATE_DIR": str(path / "state")}
        self.words = ["--image", "vda=vda.qcow2"]
        self.sh("qemu-img create -q -f qcow2 vda.qcow2 32M && qemu-io -c 'write -P 7 1M 8M' vda.qcow2 > qemu-io.log")

    def start(self, script, **more):
        return subprocess.Popen(
            ["bash", "-c", script], cwd=self.path, env=self.environment, stdin=subprocess.DEVNULL, text=True,
            **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, **more},
        )

    def sh(self, script, status=0):
        process = self.start(script)
        _, said = process.communicate(timeout=DEADLINE)
        assert process.returncode == status, said
        return said

    def line(self, command, options=""):
        place = "" if "--set" in options else "--destination x"
        return f"vnb-checkpoint run --image vda=vda.qcow2 --level full {place} {options} -- {shlex.quote(command)}"

    def run(self, command, options="", status=0):
        return self.sh(self.line(command, options), status)

    def bitmaps(self):
        done = subprocess.run(
            ["qemu-img", "info", "--output=json", "vda.qcow2"], cwd=self.path, capture_output=True, check=True
        )
        return json.loads(done.stdout)["format-specific"]["data"].get("bitmaps", [])

    def left(self):
        """What a backup that came to nothing has left: files of a job that has not ended, processes."""
        stay = ("lock", "keeper.log", "control")
        files = [path for path in self.path.glob("state/jobs/*/*") if path.name not in stay]
        jobs = [path for path in files if path.name != "job.json" or json.loads(path.read_text())["phase"] != "ended"]
        return jobs + [pid for pid in process_table() if works_in(pid, self.path)]


def works_in(pid, directory):
    try:
        return os.readlink(f"/proc/{pid}/cwd") == str(directory)
    except OSError:
        return False


def wait_for(condition, what):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def image():
    with tempfile.TemporaryDirectory(prefix="vnb") as path:  # a socket's path is short
        image = Image(Path(path))
        yield image
        image.environment["PATH"] = os.environ["PATH"]
        image.sh("vnb-checkpoint abort --image vda=vda.qcow2")  # a test that failed would leave its keeper behind


@pytest.mark.parametrize("command", [
    "true", "cat > /dev/null", "vnb-extents > some.vnb", "vnb-extents > /dev/null; exit 0",
    f"{READ} > all.vnb; head -c 9000 all.vnb | vnb-pack > cut.vnb; true",
])
def test_what_nobody_took_whole_is_not_committed(image, command):
    """The next increment would start from a point that is nowhere."""
    assert image.run(command, status=1).strip()
    assert (image.bitmaps(), image.left()) == ([], [])


@pytest.mark.parametrize("command", [
    f"{READ} > all.vnb", f"{READ} | vnb-pack -z > all.vnb", f"{READ} | cat > all.vnb", f"{READ} | vnb-pack -o set",
    f"{READ} | vnb-apply restored", f"{READ} | vnb-apply --update copy",
    'cat > mine; echo taken mine $$ >> "$VNB_TAKEN"',
    # A second try makes up for the first one.
    f"{READ} > all.vnb; vnb-pack < all.vnb | head -c 9000 > cut; vnb-pack < all.vnb > again.vnb",
])
def test_what_somebody_took_whole_is_committed(image, command):
    image.run(command)
    assert len(image.bitmaps()) == 1
    assert image.left() == []


def test_a_user_may_know_better(image):
    image.run("true; cat > /dev/null", "--no-proof")
    assert len(image.bitmaps()) == 1


def test_a_commit_after_what_was_cut_is_refused(image):
    """The three steps, without pipefail: the last command of the pipeline does not know what failed before it."""
    begin = "vnb-checkpoint begin --image vda=vda.qcow2 --level full --destination x"
    commit = "vnb-checkpoint commit --image vda=vda.qcow2"
    assert NO_PROOF in image.sh(f"{begin} | vnb-extents | head -c 300 | vnb-read | cat > cut.vnb; {commit}", status=1)
    image.sh("vnb-checkpoint abort --image vda=vda.qcow2")
    assert image.bitmaps() == []
    cut = "head -c 9000 all.vnb | vnb-pack | cat > cut.vnb"
    said = image.sh(f"{begin} | {READ} > all.vnb; {cut}; {commit}", status=1)
    assert "has not come to the end of the segment: not committed" in said
    image.sh(f"vnb-pack < all.vnb > whole.vnb && {commit}")
    assert len(image.bitmaps()) == 1


@pytest.mark.parametrize("command", ["vnb-extents", "vnb-extents -v", f"'{READ}'", f"'{READ} | vnb-pack -z'"])
def test_forgotten_quotes_are_refused_before_anything_begins(image, command):
    line = "vnb-checkpoint run --image vda=vda.qcow2 --level full --destination x --"
    rest = "vnb-read --requests 2 | vnb-pack -o 'a set'"
    said = image.sh(f"{line} {command} | {rest}; exit ${{PIPESTATUS[0]}}", status=2)
    typed = shlex.quote(f"{shlex.split(command)[0] if ' | ' in command else command} | {rest}")
    why = "COMMAND: is only the first part of the pipeline: all of it has to be in quotes"
    assert f"vnb-checkpoint: {why}: {line} {typed}\n" in said
    assert not image.path.joinpath("state").exists()
    assert not image.path.joinpath("a set").exists()


def test_a_stage_finds_that_its_stream_leaves_run(image):
    """Where only a shell could tell what a line does, nobody can before it runs."""
    said = image.sh(f"{image.line(f'x=1; {READ}')} | cat > some.vnb; exit ${{PIPESTATUS[0]}}", status=1)
    assert "vnb-read: stdout: this pipe leads out of vnb-checkpoint run" in said
    assert (image.bitmaps(), image.left()) == ([], [])


def test_what_is_said_may_go_into_a_pipe(image):
    """As under cron and systemd, or with tee(1)."""
    store = f'{READ} | vnb-pack -o "$VNB_SET"; echo stored'
    image.sh(f"set -o pipefail; {image.line(store, '--set set')} | tee log")
    assert image.path.joinpath("log").read_text() == "stored\n"


@pytest.mark.parametrize(("command", "leaves"), [
    (["vnb-extents"], True), (["/opt/vnb/vnb-read", "--connections", "2"], True), (["vnb-pack", "-z"], True),
    (["vnb-pack", "-o", "set"], False), (["vnb-pack", "-zo", "set"], False), (["vnb-extents | vnb-pack -oset"], False),
    (["cat"], False), (["vnb-extents | vnb-read | tee x"], False), (["vnb-extents | vnb-read > x"], False),
    (["vnb-extents |  vnb-read  "], True), (["vnb-read 'x"], False), (["vnb-pack $OPTIONS"], False), ([" "], False),
])
def test_whose_stream_leaves_by_standard_output(command, leaves):
    assert leaves_by_stdout(command) == leaves


def test_another_set_than_that_of_the_run_is_refused(image):
    """Nothing would be found where it is looked for; it is refused before it costs anything."""
    said = image.run(f"{READ} | vnb-pack -o other", "--set set", status=1)
    why = f'is not the set that vnb-checkpoint run is for: -o "$VNB_SET" is, {image.path}/set'
    assert f"vnb-pack: other: {why}" in said
    assert not image.path.joinpath("other").exists()
    image.path.joinpath("set").mkdir()
    image.path.joinpath("link").symlink_to("set")
    image.run(f"{READ} | vnb-pack -o link", "--set set")
    image.run(f'{READ} | vnb-pack -o "$VNB_SET" && vnb-cat set | env -u VNB_SET vnb-pack -o other', "--set set")
    assert [len(list(image.path.glob(f"{name}/*.vnb"))) for name in ("set", "other")] == [2, 1]


STUBBORN = "trap '' TERM; setsid sleep 1000 & "


@pytest.mark.parametrize(("how", "stubborn"), [
    ("deadline", ""), ("the keeper dies", ""), ("SIGTERM", ""), ("a stage fails", ""), ("deadline", STUBBORN),
    ("SIGTERM", STUBBORN),
])
def test_the_command_ends_with_the_job(image, how, stubborn):
    """With all that has come of it: what stalls would keep QEMU, and run, waiting."""
    end = "exit 5" if how == "a stage fails" else "sleep 1000"
    options = "--deadline 2s" if how == "deadline" else ""
    process = image.start(f"exec {image.line(f'{stubborn}{READ} | (head -c 100 > begun; {end})', options)}")
    wait_for(lambda: image.path.joinpath("begun").exists(), "the command")
    if how == "the keeper dies":
        record, = image.path.glob("state/jobs/*/job.json")
        os.kill(json.loads(record.read_text())["owner"]["pid"], signal.SIGKILL)
    elif how == "SIGTERM":
        process.terminate()
    _, said = process.communicate(timeout=DEADLINE)
    assert process.returncode == (-signal.SIGTERM if how == "SIGTERM" else 1), said
    reason = {
        "deadline": "the job is ended: its deadline of 2 seconds has passed", "SIGTERM": "ended by SIGTERM",
        "the keeper dies": "the keeper has died",
        "a stage fails": "the command ended with status 5: nothing is committed",
    }[how]
    assert reason in said
    assert (image.bitmaps(), image.left()) == ([], [])


@pytest.mark.parametrize(("command", "status"), [
    (f'{READ} | vnb-pack -o "$VNB_SET"; exit 9', "the command ended with status 9"),
    (f'{READ} | vnb-pack -o "$VNB_SET"; sleep 1000', "the job is ended: its deadline of 3 seconds has passed"),
])
def test_saved_but_is_a_status_of_its_own(image, command, status):
    """The next increment starts from it: nobody has to do the backup again."""
    said = image.run(command, "--set set --deadline 3s", status=3)
    segment, = image.path.glob("set/*.vnb")
    point = segment.name.removesuffix(".full.vnb")
    assert said.endswith(f"vnb-checkpoint: vda: {status}, but {point} is saved\n")
    assert [bitmap["name"] for bitmap in image.bitmaps()] == [point]


def test_a_new_set_is_said_to_be_one(image):
    """It may be the mount point of a file system that is not mounted, and takes a full backup."""
    store = f'{READ} | vnb-pack -o "$VNB_SET"'
    said = image.run(store, "--set set --must-exist", status=1)
    assert said == (f"vnb-checkpoint: {image.path}/set: is not there, and --must-exist is given: is its file system "
                    "mounted?\n")
    line = f"vnb-checkpoint: {image.path}/set: is not there yet: a new backup set will be made\n"
    assert image.run(store, "--set set") == line
    assert image.run(store, "--set set --must-exist") == ""


def test_a_set_that_must_exist_is_not_made(image):
    image.run(f"{READ} > all.vnb")
    said = image.sh("vnb-pack --must-exist -o set < all.vnb", status=1)
    assert said == "vnb-pack: set: is not there, and --must-exist is given: is its file system mounted?\n"
    assert not image.path.joinpath("set").exists()


def test_run_by_its_full_path_finds_the_stages(image):
    """As from cron: PATH of the command ends with the directory of run."""
    path = subprocess.run(["which", "vnb-checkpoint"], capture_output=True, text=True, check=True).stdout.strip()
    image.environment["PATH"] = "/usr/bin:/bin"
    image.sh(f"exec {path}{image.line(f'{READ} > all.vnb').removeprefix('vnb-checkpoint')}")


def test_a_program_that_is_not_there_is_said_to_be_that(image):
    said = image.run(f"{READ} | ssh-to-nowhere vnb-pack", status=1)
    assert "the command ended with status 127 (a program is not in PATH: on another host" in said


def on_terminal(image, script):
    """A script on a terminal of its own: (process id, the terminal)."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(image.path)
        os.execvpe("bash", ["bash", "-c", script], image.environment)  # noqa: S606
    return pid, terminal


def said_there(pid, terminal):
    """What a process said on its terminal until it ended, and how it ended."""
    said = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:
            part = b""
        if not part:
            break
        said += part
    os.close(terminal)
    return said.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_ctrl_c_reaches_all_of_the_command(image):
    pid, terminal = on_terminal(image, f"exec {image.line(f'{READ} | (head -c 100 > begun; sleep 1000)')}")
    wait_for(lambda: image.path.joinpath("begun").exists(), "the command")
    os.write(terminal, b"\x03")
    _, status = said_there(pid, terminal)
    assert status == -signal.SIGINT
    assert (image.bitmaps(), image.left()) == ([], [])


def test_ctrl_z_stops_all_and_it_goes_on(image):
    store = f'(sleep 0.5; touch begun; sleep 0.5) | cat > /dev/null; {READ} | vnb-pack -o "$VNB_SET"'
    line = image.line(store, "--set set")
    pid, terminal = on_terminal(image, f"set -m; {line}; echo stopped: $?; fg > /dev/null; exit $?")
    wait_for(lambda: image.path.joinpath("begun").exists(), "the command")
    os.write(terminal, b"\x1a")
    said, status = said_there(pid, terminal)
    assert "stopped: 148" in said
    assert status == 0, said
    assert len(list(image.path.glob("set/*.vnb"))) == 1


def test_begin_on_a_terminal_says_what_to_type(image):
    said, status = said_there(*on_terminal(image, "exec vnb-checkpoint begin --image vda=vda.qcow2 --level copy"))
    assert status == 1
    assert "type > FILE behind it, or | vnb-extents | vnb-read | vnb-pack -o DIR" in said
    assert not image.path.joinpath("state").exists()


@pytest.mark.parametrize(("lines", "lacking"), [
    ("", "no command says"), ("begun vnb-read 1\ntaken vnb-read 1\n", None), ("taken me\n", None),
    ("begun vnb-read 1\ntaken vnb-read 1\nbegun vnb-pack 2\n", "vnb-pack (process 2) has not"),
    ("begun vnb-pack 1\nbegun vnb-pack 2\ntaken vnb-pack 2\n", None),
    ("begun vnb-pack 1\nbegun vnb-pack 2\ntaken vnb-pack 1\n", "vnb-pack (process 2) has not"),
    ("begun vnb-pack 1\n", "vnb-pack (process 1) has not"), ("\xff\n\n \ntaken", None),
])
def test_proof(tmp_path, lines, lacking):
    segment = "0" * 32
    Path(proof.expect(tmp_path, segment)).write_text(lines, encoding="latin-1")
    found = proof.lack(tmp_path, segment)
    assert (found is None) == (lacking is None)
    assert lacking is None or found.startswith(lacking)
    proof.forget(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("segment", "uuid"), [
    ("../../x", "00000000-0000-0000-0000-000000000000"), ("0" * 32, "../../../tmp"), ("0" * 32, ""), ("x", "u" * 36),
])
def test_names_from_a_stream_are_no_paths(tmp_path, monkeypatch, segment, uuid):
    monkeypatch.setenv("VNB_STATE_DIR", str(tmp_path))
    opened = []
    monkeypatch.setattr(os, "open", lambda *words, **_: opened.append(words))
    proof.Report({"id": segment, "uuid": uuid, "stage": "data"}).taken()
    assert opened == []
