# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which segment follows which: examples of each error, and a slow model of it all."""

import itertools
import random
import time

import pytest
import samples
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vnb.base.errors import Error
from vnb.store import chain


class Segment:
    def __init__(self, point, parent=None, disks=None, **fields):
        self.head = samples.head(point, parent, **fields)
        self.disks = disks if disks is not None else [samples.disk(level="inc" if parent else "full")]
        self.name = f"{self.head['id']}.vnb"

    def __repr__(self):
        return f"{self.head['parent']}->{self.head['point']} ({self.head['id']})"


def day(number):
    return f"2026-01-{number:02}T12:00:00.000000Z"


def a_chain(count, first="p"):
    """A full and increments, a day apart, in a wrong order."""
    made = [
        Segment(f"{first}{n}", f"{first}{n - 1}" if n else None, created=day(n + 1))
        for n in range(count)
    ]
    random.Random(count).shuffle(made)
    return made


def names(path):
    return [segment.head["point"] for segment in path]


def refused(segments, reason, until=None):
    with pytest.raises(Error) as caught:
        chain.path(segments, "set", until)
    assert reason in str(caught.value)
    assert str(caught.value).startswith("set: ")


def test_order_is_that_of_the_links():
    assert names(chain.path(a_chain(5), "set")) == ["p0", "p1", "p2", "p3", "p4"]
    assert names(chain.path(a_chain(5), "set", "p2")) == ["p0", "p1", "p2"]
    assert names(chain.path(a_chain(1), "set")) == ["p0"]


@pytest.mark.parametrize("until, last", [
    ("2026-01-03", "p2"), ("2026-01-03Z", "p2"), ("2026-01-03 12:00", "p2"), ("2026-01-03T14:00+02:00", "p2"),
    ("2026-01-03T13:59+02:00", "p1"), ("2026-01-03T06:30-05:30", "p2"), ("2026-01-04+12:00", "p2"), ("9999", "p4"),
    ("2026-01-03T12", "p2"), ("2026-01-03T12:00:00Z", "p2"),
    ("2026-01-03T12:00:00.000000Z", "p2"),
    ("2026-01-03T11:59:59.999999Z", "p1"), ("2026-01-03T11:59", "p1"), ("2026", "p4"), ("2027-01", "p4"),
])
def test_until_a_time(until, last, utc):
    assert names(chain.path(a_chain(5), "set", until))[-1] == last


@pytest.mark.parametrize("zone, until, last", [
    ("Europe/Berlin", "2026-01-03T13:00", "p2"), ("Europe/Berlin", "2026-01-03T12:59:59", "p1"),
    ("Europe/Berlin", "2026-01-03T12:59:59Z", "p2"), ("Pacific/Auckland", "2026-01-03", "p1"),
    ("Pacific/Auckland", "2026-01-04T01", "p2"), ("Pacific/Auckland", "2026-01-03Z", "p2"),
    ("America/New_York", "2026-01-03T07", "p2"), ("America/New_York", "2026-01-03T06", "p1"),
])
def test_until_a_time_of_ours(until, last, zone, utc, monkeypatch):
    """As the days of --keep-daily are: what is typed is what the clock on the wall says."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    assert names(chain.path(a_chain(5), "set", until))[-1] == last


@pytest.mark.parametrize("until, last", [
    ("2026-10-25T02:30", "p1"), ("2026-10-25T01:59", "before"), ("2026-10-25T02:29", "p0"),
    ("2026-10-25T02:30+02:00", "p0"), ("2026-10-25T02:30+01:00", "p1"),
])
def test_until_a_time_that_is_there_twice(until, last, utc, monkeypatch):
    """When clocks are put back."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    made = {"before": "2026-10-24T23:00", "p0": "2026-10-25T00:30", "p1": "2026-10-25T01:30"}
    segments = [Segment(point, parent, created=f"{created}:00.000000Z")
                for (point, created), parent in zip(made.items(), (None, *made))]
    assert names(chain.path(segments, "set", until))[-1] == last


@pytest.mark.parametrize("until", [
    "2026-13-45", "2026-02-30", "2026-01-31T25", "2026-01-31T12:60", "20260131", "31.1.2026", "2026-01-31T12:00+1",
    "2026-01-31T12:00+99:00", "0000", "2026-01-31TZ", "12",
])
def test_until_what_only_looks_like_a_time(until):
    refused(a_chain(5), f'"{until}" is no time such as 2026-01-31T12:00 or 2026-01-31T12:00Z', until)
    assert names(chain.path([Segment(until)], "set", until)) == [until]  # it may be the name of a point


def test_until_something_that_is_not_there():
    refused(a_chain(5), "no restore point p9", "p9")
    refused(a_chain(5), "no restore point is as old as 2025: the oldest is of 2026-01-01T12:00:00.000000Z", "2025")
    refused(a_chain(5), "no restore point yesterday", "yesterday")


def test_nothing_at_all():
    refused([], "no segment here")


def test_gap():
    segments = [segment for segment in a_chain(5) if segment.head["point"] != "p2"]
    refused(segments, "gap: p3 needs p2, which is not here")
    assert names(chain.path(segments, "set", "p1")) == ["p0", "p1"]


def test_increment_without_its_full():
    refused([segment for segment in a_chain(3) if segment.head["point"] != "p0"], "gap: p1 needs p0")


def test_circle():
    """It costs the restore points in it, and what needs them."""
    segments = [*a_chain(3), Segment("a", "c"), Segment("b", "a"), Segment("c", "b"), Segment("d", "a")]
    for order in itertools.islice(itertools.permutations(segments), 0, 5040, 49):
        refused(list(order), "circular bases: ", "b")
        refused(list(order), "circular bases: ", "d")
        assert names(chain.path(list(order), "set", "p2")) == ["p0", "p1", "p2"]
        assert sorted(chain.restorable(list(order))) == ["p0", "p1", "p2"]
    refused(segments[3:6], "circular bases: a -> c -> b -> a")
    refused(segments, "circular bases: a -> c -> b -> a", "a")


def test_two_domains():
    refused([*a_chain(3), Segment("q", domain="other", uuid="u2")], "two domains: ")


def test_two_segments_claim_one_id():
    refused([*a_chain(3), Segment("q", id="id-p1")], "claim the same id id-p1")


def test_fork_and_second_full():
    """A diff is a leaf, and so is what a crash between storing and committing leaves."""
    segments = [*a_chain(3), Segment("diff", "p1", level="diff", created=day(20))]
    assert names(chain.path(segments, "set")) == ["p0", "p1", "diff"]
    assert names(chain.path(segments, "set", "p2")) == ["p0", "p1", "p2"]
    path = chain.path(segments, "set")
    assert names(chain.off_path(segments, path)) == ["p2"]
    segments += [Segment("f", created=day(25)), Segment("g", "f", created=day(26))]
    assert names(chain.path(segments, "set")) == ["f", "g"]
    assert names(chain.off_path(segments, chain.path(segments, "set"))) == ["p0", "p1", "p2", "diff"]


def test_merged_full_is_an_alternative():
    segments = [*a_chain(4), Segment("p2", id="merged", created=day(3))]
    assert [segment.head["id"] for segment in chain.path(segments, "set")] == ["merged", "id-p3"]
    assert chain.off_path(segments, chain.path(segments, "set", "p1")) != []
    assert names(chain.off_path(segments, chain.path(segments, "set", "p3"))) == ["p0", "p1"]


@pytest.mark.parametrize("id_", ["a", "z"])
@pytest.mark.parametrize("parent", ["p1", None])
def test_a_segment_with_fewer_disks_is_no_alternative(parent, id_):
    """As vnb-cat --disk makes it: whoever took it would lose the other disks."""
    both = [samples.disk("vda", 100), samples.disk("vdb", 100)]
    segments = [Segment(f"p{n}", f"p{n - 1}" if n else None, disks=both, created=day(n + 1)) for n in range(3)]
    segments.append(Segment("p2", parent, id=id_, disks=both[:1], created=day(3)))
    assert [segment.head["id"] for segment in chain.path(segments, "set")] == ["id-p0", "id-p1", "id-p2"]
    lost = [segment for segment in segments if segment.head["id"] != "id-p1"]
    refused(lost, "gap: p2 needs p1")  # better than a restore without vdb


@pytest.mark.parametrize("lost", ["id-p1", "id-p2", None])
@pytest.mark.parametrize("merged", ["a", "z"])
def test_merged_increment_and_a_part_of_what_it_replaces(lost, merged):
    """A crash while the merged ones are removed, whatever the ids."""
    segments = [segment for segment in a_chain(4) if segment.head["id"] != lost]
    segments.append(Segment("p2", "p0", id=merged, created=day(3)))
    assert [segment.head["id"] for segment in chain.path(segments, "set")] == ["id-p0", merged, "id-p3"]


def test_disks_that_come_go_and_grow():
    vda, vdb = samples.disk("vda", 100, "inc"), samples.disk("vdb", 100, "full")
    full = Segment("p0", disks=[samples.disk("vda", 50)], created=day(1))
    grown = Segment("p1", "p0", disks=[vda, vdb], created=day(2))
    assert chain.path([full, grown], "set") == [full, grown]
    shrunk = Segment("p2", "p1", disks=[samples.disk("vda", 99, "inc")], created=day(3))
    refused([full, grown, shrunk], "p2 has changes of disk vda with 99 bytes, less than the 100 before")
    shrunk_full = Segment("p2", "p1", disks=[samples.disk("vda", 99, "full")], created=day(3))
    assert len(chain.path([full, grown, shrunk_full], "set")) == 3
    unknown = Segment("p2", "p1", disks=[samples.disk("vdc", 99, "inc")], created=day(3))
    refused([full, grown, unknown], "p2 has changes of disk vdc, but nothing before it has")
    gone = Segment("p2", "p1", disks=[], created=day(3))
    back = Segment("p3", "p2", disks=[vda], created=day(4))
    refused([full, grown, gone, back], "p3 has changes of disk vda, but nothing before it has")


def test_follow():
    """The order of a stream's segments: the parent of each is the one before."""
    full, first, second = sorted(a_chain(3), key=lambda segment: segment.head["point"])

    def accepted(*segments, force=False):
        follow = chain.Follow("stdin", force)
        for segment in segments:
            follow.accept(segment.head, segment.disks)

    accepted(full, first, second)
    accepted(full, second, force=True)
    for segments, reason in [
        ((first,), "p1 is an increment to p0, which is not here"),
        ((full, second), "p2 follows p1, it does not come after p0 (vnb-cat FILE... finds the order)"),
        ((full, second, first), "p2 follows p1, it does not come after p0 (vnb-cat FILE... finds the order)"),
        ((full, first, first), "p1 follows p0, it does not come after p1 (vnb-cat FILE... finds the order)"),
        ((full, full), "p0 is a full backup of its own, it does not come after p0 (vnb-cat FILE... finds the order)"),
        ((full, Segment("p1", "p0", uuid="u2", domain="o")), "p1 is of another domain (o, u2) than p0 (vm, u-1)"),
    ]:
        with pytest.raises(Error) as caught:
            accepted(*segments)
        assert str(caught.value) == f"stdin: {reason}"


def test_refused_segment_changes_nothing():
    full, first, second = sorted(a_chain(3), key=lambda segment: segment.head["point"])
    follow = chain.Follow("stdin")
    follow.accept(full.head, full.disks)
    with pytest.raises(Error):
        follow.accept(second.head, second.disks)
    follow.accept(first.head, first.disks)
    follow.accept(second.head, second.disks)


def test_long_chain():
    segments = [Segment(f"{n}", f"{n - 1}" if n else None) for n in range(20_000)]
    assert len(chain.path(segments, "set", "19999")) == 20_000


def test_tip():
    segments = a_chain(3)
    assert chain.newest_base(segments).head["point"] == "p2"
    assert chain.newest_base(segments, {"p0", "p1", "foreign"}).head["point"] == "p1"
    assert chain.newest_base(segments, {"foreign"}) is None
    diff = Segment("diff", "p1", level="diff", checkpoint=None, created=day(9))
    assert chain.newest_base([*segments, diff]).head["point"] == "p2"


@st.composite
def sets(draw):
    """Segments of few points with any links, alternatives and gaps among them; often a sound chain, sometimes none."""
    result = []
    for number in range(draw(st.integers(1, 7))):
        point = draw(st.integers(0, 5))
        parent = draw(st.none() | st.integers(0, 6).filter(lambda other: other != point))  # noqa: B023
        result.append(Segment(
            f"p{point}", None if parent is None else f"p{parent}", id=f"{draw(st.integers(0, 99))}-{number}",
            created=day(1 + point),
        ))
    return result


def ways(segments, point, seen=()):
    """All ways to a point, as lists of segments: the slow model."""
    if point in seen:
        return
    for segment in segments:
        if segment.head["point"] == point:
            if segment.head["parent"] is None:
                yield [segment]
            else:
                for way in ways(segments, segment.head["parent"], (*seen, point)):
                    yield [*way, segment]


@settings(max_examples=60)
@given(sets())
def test_path_against_the_model(segments):
    """A way is found where there is one, it is a shortest one, and an error is raised where there is none."""
    points = {segment.head["point"] for segment in segments}
    for point in points:
        possible = list(ways(segments, point))
        try:
            found = chain.path(segments, "set", point)
        except Error as error:
            assert not possible or "circular" in str(error)
            continue
        assert found in possible
        assert len(found) == min(map(len, possible))


@settings(max_examples=60)
@given(sets())
def test_latest_against_the_model(segments):
    try:
        chain.check(segments, "set")
    except Error:
        assume(False)
    chosen = chain.points(segments)
    leaves = [point for point in chosen if not any(s.head["parent"] == point for s in chosen.values())]
    assert chain.latest(segments, "set") == max(leaves)  # in the model, days ascend with names


@settings(max_examples=60)
@given(sets())
def test_a_circle_is_only_claimed_where_there_is_one(segments):
    try:
        chain.check(segments, "set")
    except Error as error:
        assert "circular" in str(error)
        parents = {}
        for segment in segments:
            parents.setdefault(segment.head["point"], set()).add(segment.head["parent"])

        def reaches(point, target, seen=frozenset()):
            return any(
                parent == target or (parent not in seen and reaches(parent, target, seen | {parent}))
                for parent in parents.get(point, ()) if parent is not None
            )

        assert any(reaches(point, point) for point in parents)
