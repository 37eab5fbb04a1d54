# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is on disk of a job, and heads that follow others."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from job_records import HEAD, OWNER, record

from vnb.base.errors import Error
from vnb.format import heads
from vnb.job.record import Added, Phase, Server, Started, Union
from vnb.job.state import JobDirectory


@pytest.fixture
def job(tmp_path):
    return JobDirectory(str(tmp_path), "u-1")


def test_a_record_comes_back(job):
    assert job.load() is None
    made = record(
        kind="running", disks=[{"name": "vda"}], uri="qemu:///system", phase=Phase.RUNNING, frozen=7,
        started=Started(7, "mark"), servers=[Server(5, 10), Server(6, None)], sockets=["/s"],
        unions=[Union("vda", "/image", "bitmap")], added=[Added("vda", "/image")], scratch=["/scratch"],
    )
    job.save(made)
    assert job.load() == made
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


def test_a_record_of_another_version(job, tmp_path):
    """Who does not know what it means must not act on it."""
    job.save(record())
    path = tmp_path / "jobs" / "u-1" / "job.json"
    for version in '2', '"1"', "null":
        path.write_text(record().text().replace('"version": 1', f'"version": {version}'))
        with pytest.raises(Error, match=r"job\.json: is the record of a job of another version of vnb .*abort"):
            job.load()


WRONG = {
    "head": [5, {}, {**HEAD, "uuid": 5}, {**HEAD, "parent": 5}, {key: HEAD[key] for key in HEAD if key != "point"}],
    "owner": [[], None, {}, {**OWNER, "pid": "5"}, {**OWNER, "host": None}],
    "kind": [5], "disks": [{}, [5]], "uri": [5], "ssh": [None], "images": [[]], "tcp": [1, None],
    "phase": ["over", None, []], "strict": ["5", True], "broken": [0], "scratch": ["x", [5]], "frozen": [False, "7"],
    "suspended": [True], "started": [5, [5], ["5", "mark"], [5, "mark", 6]], "servers": [5, [5], [[5]], [["5", 6]]],
    "sockets": [[None]], "unions": [[["a", "b"]]], "added": [[["a", "b", "c"]]], "endpoint": [None],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in WRONG.items() for value in values])
def test_a_field_that_is_wrong_or_missing(job, tmp_path, key, value):
    found = json.loads(record().text())
    for wrong in ({**found, key: value}, {name: found[name] for name in found if name != key}):
        (tmp_path / "jobs" / "u-1" / "job.json").write_text(json.dumps(wrong))
        with pytest.raises(Error, match=f'job.json: is no record of a job: "{key}"'):
            job.load()


@pytest.mark.parametrize("text", [
    "", "{", "[]", "5", "null", "{}", '{"head": {}}', '{"head": 5, "owner": {}}', "[" * 100_000, "\xff",
])
def test_a_record_that_is_none(job, tmp_path, text):
    (tmp_path / "jobs" / "u-1" / "job.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(Error, match="job.json: (cannot be read|is no record of a job|is the record)"):
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
