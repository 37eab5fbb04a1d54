# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is on disk of a job, and heads that follow others."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from vnb.base.errors import Error
from vnb.format import heads
from vnb.job.state import JobDirectory


@pytest.fixture
def job(tmp_path):
    return JobDirectory(str(tmp_path), "u-1")


def test_a_record_comes_back(job):
    assert job.load() is None
    job.save({"head": {"point": "p"}, "owner": {"pid": 5}})
    assert job.load() == {"head": {"point": "p"}, "owner": {"pid": 5}}
    job.remove()
    assert job.load() is None


def is_waited_for(path):
    """Whether somebody waits for a lock of this file."""
    inode = f":{os.stat(path).st_ino} "
    with open("/proc/locks", encoding="ascii") as file:
        return any("->" in line and inode in line for line in file)


def test_nothing_is_left_of_a_job_that_is_over(job, tmp_path):
    """Whoever waited for the lock has that of a file that was removed, and takes that of the new one."""
    held, leave = threading.Event(), threading.Event()

    def hold():
        with JobDirectory(str(tmp_path), "u-1").locked(wait=True) as got:
            held.set()
            assert leave.wait(30)
            return got

    with ThreadPoolExecutor(1) as pool:
        with job.locked() as got:
            assert got
            waiting = pool.submit(hold)
            while not is_waited_for(tmp_path / "jobs" / "u-1" / "lock"):
                assert not waiting.done()
        assert held.wait(30)
        with job.locked() as got:
            assert not got
        leave.set()
        assert waiting.result()
    assert os.listdir(tmp_path / "jobs") == []


def test_what_a_keeper_has_said_stays(job, tmp_path):
    with job.locked():
        (tmp_path / "jobs" / "u-1" / "keeper.log").write_text("said\n")
    assert (tmp_path / "jobs" / "u-1" / "keeper.log").exists()


@pytest.mark.parametrize("text", [
    "", "{", "[]", "5", "null", "{}", '{"head": {}}', '{"head": 5, "owner": {}}', "[" * 100_000, "\xff",
])
def test_a_record_that_is_none(job, tmp_path, text):
    (tmp_path / "jobs" / "u-1" / "job.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(Error, match="job.json: (cannot be read|is no record of a job)"):
        job.load()


@pytest.mark.parametrize("created", [
    "9999-12-31T23:59:59.999999Z", "9999-99-99T99:99:99.999999Z", "9999-02-31T00:00:00.000000Z",
])
def test_no_time_after_the_last_one(created):
    """Whatever a stream says of a parent's time, the new segment must not be older."""
    with pytest.raises(Error, match="no time that another can follow"):
        heads.new("vm", "u-1", "inc", "disks", parent="p", after=created)


def test_later_than_a_parent_of_the_future():
    made = heads.new("vm", "u-1", "inc", "disks", parent="p", after="2999-12-31T23:59:59.999999Z")
    assert made["created"] == "3000-01-01T00:00:00.000000Z"
