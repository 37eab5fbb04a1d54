# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is on disk of a job, and heads that follow others."""

import pytest

from vnb import heads
from vnb.errors import Error
from vnb.state import JobDirectory


@pytest.fixture
def job(tmp_path):
    return JobDirectory(str(tmp_path), "u-1")


def test_a_record_comes_back(job):
    assert job.load() is None
    job.save({"head": {"point": "p"}, "owner": {"pid": 5}})
    assert job.load() == {"head": {"point": "p"}, "owner": {"pid": 5}}
    job.remove()
    assert job.load() is None


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
