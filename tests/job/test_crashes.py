# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A process is killed at each change on its way through begin, commit, abort and the ending of a dead one's job. Whoever
comes next finds one right state, or makes it: nothing runs, the guest goes on, and no change is ever lost.
"""

import os
import shutil

import applied
import pytest
from fake_source import NOTHING, SIZE, Fake, World

from vnb.base.errors import Error
from vnb.format.frame import HOLE
from vnb.job import job as jobs
from vnb.job import left_behind, sources
from vnb.job.state import JobDirectory
from vnb.store import chain
from vnb.store.catalog import Catalog
from vnb.store.storing import Store

OPTIONS = {
    "domain": "fake", "uri": None, "user": None, "password_file": None, "base": None, "chain": "main", "include": [],
    "exclude": [], "raw": False, "allow_plaintext": False, "sparse": True, "start_paused": False, "pause": True,
    "freeze": [], "require_freeze": False, "strict": False, "threshold": None, "scratch_dir": None, "socket": None,
    "listen": None, "tls": False, "certificates": None, "ssh": {}, "reserve": 0, "level": "auto",
}


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "fake", Fake)


class Place:
    """A directory with a world, a state directory, and a set or a destination."""

    def __init__(self, path, destination):
        self.path = str(path)
        self.world = World(path)
        self.directory = JobDirectory(f"{path}/state", "fake")
        self.destination = destination
        self.options = {
            **OPTIONS, "images": {"vda": self.path}, "state": f"{path}/state", "destination": destination,
            "set": None if destination else f"{path}/set",
        }

    def catalog(self):
        return Catalog.of(self.options["state"], "fake", self.options["set"], self.options["destination"])

    def recover(self):
        """As each command does that finds a record."""
        with self.directory.locked(wait=True):
            left_behind.recover(self.directory, "fake", self.say)

    def begin(self, level="auto"):
        return jobs.begin(self.directory, Fake(self.path), {**self.options, "level": level}, self.say, self.say)

    def back_up(self, level="auto"):
        """A whole backup, after what was left is ended."""
        with self.directory.locked(wait=True):
            left_behind.recover(self.directory, "fake", self.say)
            job = self.begin(level)
            self.store(job)
            self.commit(job)

    def store(self, job):
        """What the stages of the pipeline do."""
        if self.destination:
            with open(self.directory.taken(job.head["id"]), "a", encoding="utf-8") as file:
                file.write("begun vnb-pack 1\ntaken vnb-pack 1\n")
            return
        head = {**job.head, "stage": "data"}
        disks = [{key: disk[key] for key in ("name", "size", "level", "image")} for disk in job.record.disks]
        with Store(self.options["set"], head, disks) as store:
            segment = store.writer.segment(head, disks)
            if disks[0]["level"] == "full":
                segment.extents(0, [0, SIZE, HOLE])
            segment.end()
            store.commit()

    def commit(self, job):
        job.commit()

    def abort(self, job):
        job.abort()

    def say(self, _text):
        """Nobody listens."""

    def points(self):
        """The restore points that are saved, the oldest first."""
        heads = [segment.head for segment in self.catalog().segments()]
        return [head["point"] for head in sorted(heads, key=lambda head: head["created"])]


def begun(place, level="auto"):
    with place.directory.locked(wait=True):
        job = place.begin(level)
        place.store(job)
        place.commit(job)


def aborted(place, level="auto"):
    with place.directory.locked(wait=True):
        place.abort(place.begin(level))


def left(place):
    """Begin, and die with the job running; the next one ends it."""
    with place.directory.locked(wait=True):
        place.begin()


def check_recovered(place, before, is_marked=True):
    """
    The one right state, after the next command has looked.

    before: restore points that were saved, the oldest first. is_marked: the level makes a checkpoint.
    """
    world = place.world.look()
    assert {**world, "checkpoints": []} == NOTHING
    assert place.world.scratch() == []
    assert place.directory.load() is None
    saved = place.points()
    assert saved[:len(before)] == before
    assert len(saved) - len(before) in (0, 1)
    # What was saved last has its checkpoint, and nothing has one that is not saved.
    assert set(world["checkpoints"]) <= set(saved)
    assert world["checkpoints"][-1:] == (saved if is_marked else before)[-1:]


def check_next(place):
    """The next backup is an increment to the newest restore point with a checkpoint, if there is any."""
    saved = place.points()
    marked = place.world.look()["checkpoints"]
    place.back_up()
    after = place.points()
    assert after[:-1] == saved
    newest = next(segment for segment in place.catalog().segments() if segment.head["point"] == after[-1])
    assert newest.head["parent"] == (marked[-1] if marked else None)
    assert [disk["level"] for disk in newest.disks] == ["inc" if marked else "full"]
    if not place.destination:
        assert chain.path(place.catalog().segments(), "set")[-1].head["point"] == after[-1]
    checkpoints = place.world.look()["checkpoints"]
    assert checkpoints[-1] == after[-1]
    assert len(checkpoints) <= 3


NEVER = 1_000_000  # steps: more than there are

SCENARIOS = {
    "first": (0, begun, ()), "increment": (2, begun, ()), "fifth": (5, begun, ()), "full": (2, begun, ("full",)),
    "diff": (2, begun, ("diff",)), "copy": (1, begun, ("copy",)),
    "abort": (2, aborted, ()), "abort of the first": (0, aborted, ()), "left": (1, left, ()),
}


class Again:
    """A place that is put back to what it was when this was made."""

    def __init__(self, place, tmp_path):
        self._place, self._saved = place, tmp_path / "saved"
        shutil.copytree(place.path, self._saved, symlinks=True)

    def __call__(self):
        shutil.rmtree(self._place.path)
        shutil.copytree(self._saved, self._place.path, symlinks=True)


@pytest.fixture(params=[None, "s3://bucket/fake"], ids=["set", "destination"])
def place(request, tmp_path):
    (tmp_path / "place").mkdir()
    World.made(tmp_path / "place")
    return Place(tmp_path / "place", request.param)


@pytest.mark.parametrize("count, function, arguments", SCENARIOS.values(), ids=SCENARIOS)
def test_killed_at_every_step(place, tmp_path, count, function, arguments):
    for _ in range(count):
        place.back_up()
    before, put_back = place.points(), Again(place, tmp_path)
    steps, lived = 0, False
    while not lived:
        steps += 1
        put_back()
        lived = applied.killed_at(steps, function, place, *arguments)
        place.recover()
        check_recovered(place, before, is_marked=arguments not in (("copy",), ("diff",)))
        check_next(place)
    assert steps > 15


@pytest.mark.parametrize("stored", [False, True])
def test_the_one_who_ends_it_is_killed_too(place, tmp_path, stored):
    """At every step of the end of a job whose process was killed, and then the next one ends it."""
    place.back_up()
    before = place.points()

    def die():
        with place.directory.locked(wait=True):
            job = place.begin()
            if stored:
                place.store(job)
            os._exit(0)

    assert applied.killed_at(NEVER, die)
    assert place.world.look()["job"] is not None
    put_back = Again(place, tmp_path)
    steps, lived = 0, False
    while not lived:
        steps += 1
        put_back()
        lived = applied.killed_at(steps, place.recover)
        place.recover()
        check_recovered(place, before)
        # With a destination, nobody but a commit can know that it is there.
        assert (len(place.points()) > len(before)) == (stored and not place.destination)
        check_next(place)
    assert steps > 5


def test_a_domain_that_is_busy_is_left_alone(tmp_path):
    """Somebody else's job: nothing is begun, nothing is written."""
    world = World.made(tmp_path)
    world.change(job="another")
    place = Place(tmp_path, None)
    with pytest.raises(Error, match="active already"):
        place.back_up()
    assert world.look()["job"] == "another"
    assert place.directory.load() is None
