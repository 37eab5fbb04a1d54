# SPDX-License-Identifier: LGPL-2.1-or-later
"""What becomes of a command: its exit status, what it says, and the signal that it dies by."""

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import samples

from vnb.cli.usage import Usage

ROOT = Path(samples.ROOT)
DEADLINE = 60

TOY = '''
"""toy - does what it is told

Usage:
  toy [--debug] WHAT
  toy --help | --version
"""

import os, signal, sys
from vnb.base.errors import Error, StreamError, UsageError, OutputClosed

def main(args):
    what = args["WHAT"]
    if what == "error":
        raise StreamError("vda", "Input/output error", "offset 5")
    if what == "usage":
        raise UsageError("--x", "no such thing")
    if what == "status":
        return 3
    if what == "bug":
        raise KeyError("bug")
    if what == "missing":
        open("/none/here")
    if what == "memory":
        raise MemoryError
    if what == "print":
        for _ in range(100000):
            print("line")
    if what == "print-then-fail":
        print("line")
        raise Error(None, "failed")
    if what == "closed":
        raise OutputClosed
    if what == "letters":
        print("\\u20ac \\u00e9")
    if what == "evil":
        raise Error("a\\x1b[2J\\nb", "x" * 9999, "\\u202e")
    if what == "open":
        fd = os.open("/dev/null", os.O_RDONLY)
        assert fd > 2, fd
    if what == "wait":
        try:
            print("ready", file=sys.stderr, flush=True)
            signal.pause()
        finally:
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), signum)  # cleaning up goes on whatever comes
            print("cleaned up", file=sys.stderr, flush=True)
'''
RUN = "from vnb.cli.runner import command; command('toy', 'toy')"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    directory = tmp_path_factory.mktemp("toy")
    (directory / "toy.py").write_text(TOY)
    (directory / "slow.py").write_text('"""Usage: slow"""\nimport os\nos.write(2, b"ready\\n")\nos.read(0, 1)\n')

    def start(*arguments, program=RUN, **options):
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{directory}", **options.pop("env", {})}
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen([sys.executable, "-c", program, *arguments], env=env, text=True, **options)

    return start


def outcome(process):
    out, err = process.communicate(timeout=DEADLINE)
    return process.returncode, out, err


@pytest.mark.parametrize("what, status, err", [
    ("nothing", 0, ""),
    ("status", 3, ""),
    ("error", 1, "toy: vda: offset 5: Input/output error\n"),
    ("missing", 1, "toy: /none/here: No such file or directory\n"),
    ("memory", 1, "toy: out of memory\n"),
    ("evil", 1, f"toy: a\\x1b[2J\\nb: \\u202e: {'x' * 4096}...\n"),
    ("usage", 2, "toy: --x: no such thing\nUsage:\n  toy [--debug] WHAT\n  toy --help | --version\n"),
    ("closed", -signal.SIGPIPE, ""),
])
def test_outcomes(toy, what, status, err):
    assert outcome(toy(what)) == (status, "", err)


def test_wrong_usage(toy):
    status, out, err = outcome(toy("a", "b"))
    assert (status, out) == (2, "")
    assert err.startswith("toy: unexpected operand \"b\"\nUsage:\n")
    status, out, err = outcome(toy("--nonsense"))
    assert (status, out) == (2, "")
    assert err.startswith("toy: ") and "\nUsage:\n" in err


def test_traceback_for_a_bug_and_for_debug(toy):
    status, _, err = outcome(toy("bug"))
    assert status == 1 and err.startswith("Traceback") and "KeyError: 'bug'" in err
    status, _, err = outcome(toy("error", "--debug"))
    assert status == 1 and err.startswith("Traceback")
    assert err.endswith("toy: vda: offset 5: Input/output error\n")


def test_what_was_printed_before_it_failed(toy):
    process = toy("print-then-fail", stderr=subprocess.STDOUT)
    assert outcome(process)[:2] == (1, "line\ntoy: failed\n")


@pytest.mark.parametrize("encoding, expected", [("ascii", "\\u20ac \\xe9\n"), ("utf-8", "€ é\n")])
def test_letters_that_the_terminal_does_not_have(toy, encoding, expected):
    assert outcome(toy("letters", env={"PYTHONIOENCODING": encoding})) == (0, expected, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_that_goes_away(toy, unbuffered):
    """`| head -c 1`: no line, and the shell sees SIGPIPE."""
    process = toy("print", env={"PYTHONUNBUFFERED": unbuffered})
    assert process.stdout.read(1) == "l"
    process.stdout.close()
    assert process.wait(DEADLINE) == -signal.SIGPIPE
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("what", ["--help", "--version", "letters"])
def test_device_that_is_full(toy, what, unbuffered):
    with open("/dev/full", "w") as full:
        status, _, err = outcome(toy(what, stdout=full, env={"PYTHONUNBUFFERED": unbuffered}))
    assert status == 1
    assert re.fullmatch("toy: (stdout: )?No space left on device\n", err)


def closing(*fds):
    """A program that closes these, and only then is a command."""
    closes = "; ".join(f"os.close({fd})" for fd in fds)
    return f"import os, sys; {closes}; os.execv(sys.executable, [sys.executable, '-c', {RUN!r}, *sys.argv[1:]])"


def test_closed_descriptors(toy):
    """The next file that is opened must not become standard output."""
    for fds in ((0,), (1,), (2,), (0, 1, 2)):
        status, _, err = outcome(toy("open", program=closing(*fds)))
        assert (status, err) == (0, "")
    # Nor is it a failure that nothing can be written to it, where there is nothing to write; also where a command that
    # was started so has started this one.
    reopened = f"import os; os.close(1); os.open(os.devnull, os.O_RDONLY); {RUN}"
    assert outcome(toy("nothing", program=reopened)) == (0, "", "")
    assert outcome(toy("--help", program=closing(1))) == (1, "", "toy: stdout: Bad file descriptor\n")
    assert outcome(toy("error", program=closing(2))) == (1, "", "")


@pytest.mark.parametrize("signum, err", [
    (signal.SIGINT, ""), (signal.SIGTERM, "toy: ended by SIGTERM\n"), (signal.SIGHUP, "toy: ended by SIGHUP\n"),
])
def test_signals(toy, signum, err):
    """Clean up, whatever else comes, then die by the first."""
    process = toy("wait")
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signum)
    assert outcome(process) == (-signum, "", "cleaned up\n" + err)


def test_signal_while_it_starts(toy):
    process = toy(program="from vnb.cli.runner import command; command('slow', 'slow')", stdin=subprocess.PIPE)
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert outcome(process) == (-signal.SIGINT, "", "")


def test_every_command_starts_so():
    scripts = [path for path in ROOT.glob("bin/vnb-*") if "python" in path.read_text().splitlines()[0]]
    own = {re.sub('"vnb[.-][a-z._]+"', "", path.read_text()) for path in scripts}
    assert (len(scripts), len(own)) == (len(list(ROOT.glob("bin/*"))) - 4, 1)  # the others are of bash


def test_signal_that_is_ignored_stays_so(toy):
    """nohup(1), and what a shell without job control starts with `&`."""
    process = toy("wait", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert outcome(process)[0] == -signal.SIGTERM


def test_signal_that_is_blocked(toy):
    """It can be died by all the same."""
    process = toy("closed", preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPIPE]))
    assert outcome(process)[0] == -signal.SIGPIPE


def on_terminal(command, **options):
    """Run a command with a terminal as standard output or input; (status, what the terminal showed, stderr)."""
    ours, theirs = pty.openpty()
    which = options.pop("which")
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, which: theirs, **options}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, **options)
    os.close(theirs)
    _, err = process.communicate(timeout=DEADLINE)
    shown = b""
    try:
        shown = os.read(ours, 9999)
    except OSError:
        pass  # nothing was written before it was closed
    os.close(ours)
    return process.returncode, shown, err.decode()


@pytest.mark.parametrize("name", ["vnb-pack", "vnb-cat"])
def test_no_stream_to_a_terminal(name, tmp_path):
    path = tmp_path / "x.vnb"
    path.write_bytes(samples.segment(samples.head(), []))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "bin" / name, *([path] if name == "vnb-cat" else [])]
    with open(path, "rb") as stdin:
        done = on_terminal(command, which="stdout", env=env, stdin=stdin)
    assert done == (
        1, b"", f"{name}: stdout: is a terminal: will not write a binary stream to it (vnb-dump prints one)\n"
    )


def test_no_stream_from_a_terminal():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = on_terminal([sys.executable, ROOT / "bin" / "vnb-pack"], which="stdin", env=env)
    assert done == (1, b"", "vnb-pack: stdin: is a terminal, expected a stream\n")


@pytest.mark.parametrize("argv, found", [
    (["--untill", "x"], "unknown option --untill"), (["--unt", "x"], None), (["-zz"], None),
    (["-y"], "unknown option -y"), (["-", "--", "-y"], None), (["--untill=x"], "unknown option --untill"),
    (["a", "b"], None), ([], None), (["--un=x"], "--un is not a unique prefix: --unit, --until?"),
])
def test_the_option_that_a_usage_does_not_have(argv, found):
    usage = Usage("toy - a toy\n\nUsage:\n  toy [-z] [options]\n\nOptions:\n  -z\n  --until POINT\n  --unit N\n")
    assert usage.wrong_option(argv) == found
