# SPDX-License-Identifier: LGPL-2.1-or-later
"""Standard output: a file is written past the page cache, and each kind is left as any filter leaves it."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
import samples

from vnb.base.errors import StreamError
from vnb.cli import output
from vnb.format.stream import Reader
from vnb.store.direct_writer import ALIGNMENT, BLOCK

SEGMENTS = """
import os, select, sys
sys.path.insert(0, sys.argv[1])
import samples
from vnb.store import direct_writer
from vnb.cli import output
from vnb.format import writing
from vnb.format import stream
{before}
def wait(fd, event):
    waited.append(fd)
    poll = select.poll()
    poll.register(fd, event)
    poll.poll()

waited = []
out = output.stdout(wait)
print(type(out).__name__, file=sys.stderr)
for number in range(2):
    written = out.segment(samples.head(), [samples.disk(size=1 << 27)])
    for at in range(12):
        written.data(0, at << 20, 1 << 20, "none", 0, bytes([at]) * (1 << 20))
    written.extents(0, [12 << 20, (1 << 27) - (12 << 20), 3])
    written.end()
{after}
"""
# Without this nothing was waited for, and what is to be tested was not done.
WAITED = "assert waited"


def run(stdout, before="", after=""):
    """
    Write two segments of 12 MiB to stdout; what was written, and with what.

    before, after (str): Python that is run first and last.
    """
    directory = os.path.dirname(samples.__file__)
    process = subprocess.run([sys.executable, "-c", SEGMENTS.format(before=before, after=after), directory],
                             stdout=stdout, stderr=subprocess.PIPE, check=True)
    return process.stdout, process.stderr.decode().strip()


@pytest.fixture(scope="module")
def piped():
    """The bytes of the two segments, from a pipe."""
    return run(subprocess.PIPE, after=WAITED)[0]


def test_a_pipe_of_another_user(piped):
    """It cannot be opened once more, and its flags are not ours to change."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    before = "os.setgroups([]), os.setgid(65534), os.setuid(65534)"
    assert run(subprocess.PIPE, before, WAITED)[0] == piped


def test_a_socket(piped):
    """As a command has it that sshd started."""
    ours, theirs = socket.socketpair()
    found = []

    def take():
        while part := ours.recv(1 << 20):
            found.append(part)

    thread = threading.Thread(target=take)
    thread.start()
    run(theirs, after=WAITED)
    theirs.close()
    thread.join()
    ours.close()
    assert b"".join(found) == piped


def test_the_pipe_stays_as_it_is_for_others():
    """A flag of the pipe would be there for the shell that gave it to us, and for what it runs next."""
    read_end, write_end = os.pipe()
    before = fcntl.fcntl(write_end, fcntl.F_GETFL)
    with subprocess.Popen(["cat"], stdin=read_end, stdout=subprocess.DEVNULL) as cat:
        os.close(read_end)
        run(write_end, after=WAITED)
        assert fcntl.fcntl(write_end, fcntl.F_GETFL) == before
        os.close(write_end)
    assert cat.returncode == 0


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_was_not_read_yet_is_known_to_its_writer(tmp_path, kind):
    read_end, write_end = os.pipe() if kind == "pipe" else (end.detach() for end in socket.socketpair())
    assert output.unread(write_end) == 0
    os.write(write_end, b"abc")
    assert output.unread(write_end) >= 3  # a socket counts what holds the bytes, too
    os.read(read_end, 3)
    assert output.unread(write_end) == 0
    os.close(read_end)
    os.close(write_end)
    with open(tmp_path / "file", "wb") as file:
        file.write(b"abc")
        file.flush()
        assert output.unread(file.fileno()) == 0
    with open(os.devnull, "wb") as file:
        assert output.unread(file.fileno()) == 0


@pytest.mark.parametrize("begin", [0, ALIGNMENT])
def test_file(tmp_path, piped, begin):
    """Who wrote to it before, and who writes to it after us, share its offset."""
    path = tmp_path / "out"
    with path.open("wb") as file:
        file.write(b"x" * begin)
        file.flush()
        assert run(file, after=WAITED)[1] == "Stdout"
        subprocess.run(["echo", "end"], stdout=file, check=True)
    assert path.read_bytes() == b"x" * begin + piped + b"end\n"
    assert len(piped) > 6 * BLOCK


@pytest.mark.parametrize("mode, begin", [("ab", 0), ("ab", ALIGNMENT), ("wb", 100)])
def test_file_that_is_written_as_pipes_are(tmp_path, piped, mode, begin):
    """To append is not to write at an offset, and no disk begins a write anywhere."""
    path = tmp_path / "out"
    with path.open(mode) as file:
        file.write(b"x" * begin)
        file.flush()
        assert run(file, after=WAITED)[1] == "Writer"
    assert path.read_bytes() == b"x" * begin + piped


def test_file_that_we_may_not_open(tmp_path, piped):
    """A shell opened it, for a user who can't."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    path = tmp_path / "out"
    with path.open("wb") as file:
        path.chmod(0)
        assert run(file, "os.setgroups([]), os.setgid(65534), os.setuid(65534)")[1] == "Writer"
    path.chmod(0o600)
    assert path.read_bytes() == piped


def test_segment_that_is_not_finished(tmp_path):
    """Its start is in the file, so that nobody takes it for a whole stream, whatever ends the command."""
    path = tmp_path / "out"
    before = """
real, begun = writing.SegmentWriter.data, []
def data(self, disk, offset, *arguments):
    begun.append(offset)
    if begun.count(0) == 2:
        os.kill(os.getpid(), 9)
    return real(self, disk, offset, *arguments)
writing.SegmentWriter.data = data
"""
    with path.open("wb") as file, pytest.raises(subprocess.CalledProcessError) as raised:
        run(file, before)
    assert raised.value.returncode == -signal.SIGKILL
    whole = []
    with path.open("rb") as file, pytest.raises(StreamError, match="the input ends"):
        for segment in Reader(file.fileno(), "file"):
            segment.finish()
            whole.append(segment)
    assert len(whole) == 1
