# SPDX-License-Identifier: LGPL-2.1-or-later
"""What commands say, how much of it, in which form, and under which run."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import samples
from makers import head, make_set, point

from vnb.format.values import FAILED

PLAN = [{"vda": "64k:A"}, {"vda": "32k:B"}]
MISSING = "/none/here: No such file or directory"
# Runs a command where the journal is a socket of our own, and prints what it was sent.
JOURNAL = """
import os, socket, subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)
os.makedirs("/run/systemd/journal")
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
    journal.bind("/run/systemd/journal/socket")
    journal.settimeout(30)
    done = subprocess.run(sys.argv[1:], stderr=subprocess.PIPE)
    sys.stdout.buffer.write(journal.recv(65536))
    sys.stderr.buffer.write(done.stderr)
"""


def run(*argv, stdin=b"", program=None, **environment):
    """(status, stdout, stderr) of a command."""
    env = {**os.environ, **environment}
    done = subprocess.run([*(program or ()), *map(str, argv)], input=stdin, capture_output=True, env=env, timeout=60)
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.parametrize("options, environment", [
    (["--log-format", "json"], {}), ([], {"VNB_LOG_FORMAT": "json"}),
    (["--log-format=json"], {"VNB_LOG_FORMAT": "text"}),
])
def test_errors_as_json(options, environment):
    status, _, err = run("vnb-cat", *options, "/none/here", **environment)
    line = json.loads(err)
    assert status == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {"command": "vnb-cat", "run": None, "priority": "error", "message": MISSING}


def test_usage_as_json_is_one_line():
    status, _, err = run("vnb-cat", VNB_LOG_FORMAT="json")
    assert (status, json.loads(err)["message"]) == (2, "SET_OR_FILE is missing")


@pytest.mark.parametrize("name, words", [
    ("VNB_LOG_FORMAT", "text, json, journald"), ("VNB_LOG_LEVEL", "quiet, normal, verbose"),
    ("VNB_PROGRESS", "auto, none, json"),
])
def test_what_the_environment_must_not_say(name, words):
    status, _, err = run("vnb-verify", "/none/here", **{name: "loud"})
    assert (status, err.splitlines()[0]) == (2, f'vnb-verify: {name}: "loud" is not one of {words}')


@pytest.mark.parametrize("options, reason", [
    (["-q", "-v"], "--quiet: contradicts --verbose"),
    (["--log-format", "xml"], '--log-format: "xml" is not one of text, json, journald'),
    (["--progress", "loud"], '--progress: "loud" is not one of auto, none, json'),
])
def test_options_that_make_no_sense(options, reason):
    status, _, err = run("vnb-verify", *options, "/none/here")
    assert (status, err.splitlines()[0]) == (2, f"vnb-verify: {reason}")


@pytest.mark.parametrize("name", ["a\nb", "x" * 256])
def test_run_that_is_no_name(name):
    status, _, err = run("vnb-cat", "/none/here", VNB_RUN=name)
    assert (status, err.splitlines()[0]) == (
        2, "vnb-cat: VNB_RUN: is not a name of at most 255 printable characters",
    )


def writes(*argv, **environment):
    """What a command writes to standard error, each write(2) by itself: a socket keeps them apart."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=theirs, env={**os.environ, **environment})
        found = []
        while part := ours.recv(1 << 20):
            found.append(part.decode())
    process.wait(60)
    return found


@pytest.mark.parametrize("encoding", ["UTF-8", "ASCII"])
@pytest.mark.parametrize("format_", ["text", "json"])
@pytest.mark.parametrize("length", [1, 3000])
def test_a_line_is_one_write(format_, length, encoding):
    """Else the lines of commands that run at once get into each other, and an end goes to another's line."""
    said = writes("vnb-cat", "/" + "\N{SNOWMAN}" * length, VNB_LOG_FORMAT=format_, PYTHONIOENCODING=encoding)
    assert len(said) == 1 and said[0].count("\n") == 1 and said[0].endswith("\n")


def test_all_lines_of_a_usage_are_one_write():
    (said,) = writes("vnb-cat", "--loud")
    assert said.startswith("vnb-cat: unknown option --loud\nUsage:\n")


def fork(directory):
    """A set with nothing new since the latest restore point, which vnb-cat says."""
    make_set(directory, PLAN)


def test_quiet_leaves_out_what_is_not_wrong(tmp_path):
    fork(tmp_path / "set")
    said = f"vnb-cat: {tmp_path}/set: nothing to do: {point(1)} is the last restore point\n"
    words = ["--merge", "--from", point(1), tmp_path / "set"]
    assert run("vnb-cat", *words)[2] == said
    for environment, options in ({"VNB_LOG_LEVEL": "quiet"}, []), ({}, ["--quiet"]), ({}, ["-q"]):
        assert run("vnb-cat", *options, *words, **environment)[2] == ""
        assert run("vnb-cat", *options, "/none/here", **environment)[2] == f"vnb-cat: {MISSING}\n"


def test_a_log_file_has_what_all_commands_said(tmp_path):
    """Also what was said to nobody, with -q, and in whatever form the rest is; it is for its owner alone."""
    log = tmp_path / "log"
    fork(tmp_path / "set")
    words = ["--merge", "--from", point(1), tmp_path / "set"]
    for options in [], ["-q"], ["--log-format", "json"]:
        run("vnb-cat", *options, *words, VNB_LOG_FILE=str(log), VNB_RUN="night")
    run("vnb-cat", "/none/here", VNB_LOG_FILE=str(log))
    lines = [re.sub(r"^2\d{3}-\d\d-\d\dT[\d:]{8}\.\d{3}Z ", "", line) for line in log.read_text().splitlines()]
    nothing = f"vnb-cat: [night] {tmp_path}/set: nothing to do: {point(1)} is the last restore point"
    assert lines == [nothing, nothing, nothing, f"vnb-cat: {MISSING}"]
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_log_file_that_cannot_be_written(tmp_path):
    """It is found before anything is done; one that fills up later is no reason to stop."""
    status, _, err = run("vnb-cat", "/none/here", VNB_LOG_FILE=f"{tmp_path}/none/log")
    assert status == 2
    assert err.startswith(f"vnb-cat: VNB_LOG_FILE: {tmp_path}/none/log: No such file or directory\n")
    assert run("vnb-cat", "/none/here", VNB_LOG_FILE="/dev/full") == (1, FAILED, f"vnb-cat: {MISSING}\n")


def test_all_stages_say_the_run_of_the_head(tmp_path):
    """Each in its first line of --verbose, however it was started."""
    stream = samples.segment({**head(0), "stage": "disks", "run": "night"}, [])
    pipeline = f"vnb-extents -v | vnb-read -v | vnb-pack -v | vnb-verify | vnb-pack -v -o {tmp_path}/set"
    status, _, err = run("bash", "-c", f"set -o pipefail; {pipeline}", stdin=stream)
    assert status == 0
    begun = f"[night] vm1: {point(0)}: level full"
    names = ["vnb-extents", "vnb-read", "vnb-pack", "vnb-pack"]
    assert sorted(line for line in err.splitlines() if line.endswith("full")) == sorted(f"{n}: {begun}" for n in names)
    assert run("vnb-cat", "-v", tmp_path / "set", VNB_RUN="other")[2] == f"vnb-cat: {begun.replace('night', 'other')}\n"


def test_errors_have_the_run_too(tmp_path):
    """What names the stream's fault names the pipeline that it came from."""
    stream = samples.segment({**head(0), "stage": "data", "run": "night"}, [])
    _, _, err = run("vnb-pack", "-o", tmp_path / "set", "--log-format=json", stdin=stream[:-40])
    assert json.loads(err)["run"] == "night"


def test_journal_that_is_not_there(tmp_path):
    """No reason to do nothing: it is said, and the rest where it always was."""
    (tmp_path / "systemd.py").write_text("raise ImportError")
    status, _, err = run("vnb-cat", "--log-format", "journald", "/none/here", PYTHONPATH=str(tmp_path))
    assert (status, err.splitlines()) == (1, [
        "vnb-cat: --log-format: journald: systemd's Python module is not installed (package python3-systemd): "
        "logging to standard error instead",
        f"vnb-cat: {MISSING}",
    ])


def in_a_journal_of_its_own():
    """How to run something where /run is its own, or None where this user may not."""
    for argv in ["unshare", "-m"], ["unshare", "-rm"]:
        if shutil.which("unshare") and subprocess.run([*argv, "mount", "-t", "tmpfs", "none", "/run"],
                                                      stderr=subprocess.DEVNULL).returncode == 0:
            return argv
    return None


@pytest.mark.skipif(in_a_journal_of_its_own() is None, reason="not allowed: a mount namespace")
def test_journal(tmp_path):
    stream = samples.segment({**head(0), "run": "night"}, [])
    (tmp_path / "cut.vnb").write_bytes(stream[:-40])
    program = [*in_a_journal_of_its_own(), sys.executable, "-c", JOURNAL]
    command = f"vnb-pack --log-format journald -o {tmp_path}/set < {tmp_path}/cut.vnb"
    status, entry, err = run("sh", "-c", command, program=program)
    assert (status, err) == (0, "")
    fields = dict(line.split("=", 1) for line in entry.decode().splitlines())
    assert fields["MESSAGE"].startswith("stdin: stream offset ")
    assert (fields["PRIORITY"], fields["SYSLOG_IDENTIFIER"], fields["VNB_RUN"]) == ("3", "vnb-pack", "night")


def test_libnbd_says_what_it_does_where_it_is_asked_to():
    """On standard error, which no stream goes to."""
    _, out, err = run("vnb-extents", "nbd+unix:///?socket=/none/here", LIBNBD_DEBUG="1")
    assert out == FAILED
    assert "libnbd: debug: " in err
    assert "libnbd: debug: " not in run("vnb-extents", "nbd+unix:///?socket=/none/here")[2]
