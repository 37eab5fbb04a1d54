# SPDX-License-Identifier: LGPL-2.1-or-later
"""Standard output that is a file: written past the page cache, and left as any filter leaves it."""

import os
import signal
import subprocess
import sys

import pytest
import samples

from vnb.direct import ALIGNMENT, BLOCK
from vnb.errors import StreamError
from vnb.stream import Reader

SEGMENTS = """
import os, sys
sys.path.insert(0, sys.argv[1])
import samples
from vnb import direct, output, stream
{before}
out = output.stdout()
print(type(out).__name__, file=sys.stderr)
for number in range(2):
    written = out.segment(samples.head(), [samples.disk(size=1 << 27)])
    for at in range(12):
        written.data(0, at << 20, 1 << 20, "none", 0, bytes([at]) * (1 << 20))
    written.extents(0, [12 << 20, (1 << 27) - (12 << 20), 3])
    written.end()
"""


def run(stdout, before=""):
    """Write two segments of 12 MiB to stdout, and run before (str, Python) first; what was written, and with what."""
    directory = os.path.dirname(samples.__file__)
    process = subprocess.run([sys.executable, "-c", SEGMENTS.format(before=before), directory], stdout=stdout,
                             stderr=subprocess.PIPE, check=True)
    return process.stdout, process.stderr.decode().strip()


@pytest.fixture(scope="module")
def piped():
    """The bytes of the two segments, from a pipe."""
    return run(subprocess.PIPE)[0]


@pytest.mark.parametrize("begin", [0, ALIGNMENT])
def test_file(tmp_path, piped, begin):
    """Who wrote to it before, and who writes to it after us, share its offset."""
    path = tmp_path / "out"
    with path.open("wb") as file:
        file.write(b"x" * begin)
        file.flush()
        assert run(file)[1] == "Stdout"
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
        assert run(file)[1] == "Writer"
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
real, begun = stream.SegmentWriter.data, []
def data(self, disk, offset, *arguments):
    begun.append(offset)
    if begun.count(0) == 2:
        os.kill(os.getpid(), 9)
    return real(self, disk, offset, *arguments)
stream.SegmentWriter.data = data
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
