# SPDX-License-Identifier: LGPL-2.1-or-later
"""The record of a job, where the state directory cannot be written to any more."""

import errno
import os

import pytest
from job_records import record

from vnb.base.errors import Error
from vnb.job.job import Job
from vnb.job.record import Phase
from vnb.job.state import JobDirectory

RECORD = record(phase=Phase.ENDED)


@pytest.fixture
def directory(tmp_path):
    found = JobDirectory(str(tmp_path), "u-1")
    found.save(RECORD)
    return found


@pytest.fixture
def broken(monkeypatch):
    """From now on nothing can be synced."""
    def fail(_fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    return lambda: monkeypatch.setattr(os, "fsync", fail)


def test_it_is_an_error_that_names_the_record(directory, broken):
    broken()
    for change in (lambda: directory.save(RECORD), directory.remove):
        with pytest.raises(Error, match=r"^\S*/jobs/u-1/job\.json: Input/output error$"):
            change()


def test_a_job_that_is_over_is_over(directory, broken):
    """A keeper that tried until it can be written down would stay for ever, and `run` would wait for it."""
    said = []
    broken()
    Job(directory, RECORD, said.append).abort()
    assert len(said) == 1
    assert said[0].endswith(
        "Input/output error: the job has ended, but its record could not be removed: the next vnb-checkpoint command "
        "removes it"
    )
