# SPDX-License-Identifier: LGPL-2.1-or-later
"""The decisions of a backup: tables of cases, and properties that hold for whatever a catalog and libvirt have."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vnb.job import decisions
from vnb.job.decisions import Candidates, DiskNow, Fate, Full, InFull, Left, Start, Unsaved
from vnb.store import chain

LEVELS = ("full", "inc", "diff", "copy")


def segment(point, parent=None, level=None, checkpoint=True, of="main", created=None):
    """A saved segment. point (str): one letter, which is its time of creation, too. checkpoint: whether it made one."""
    level = level or ("inc" if parent else "full")
    head = {
        "id": f"id-{point}-{level}", "uuid": "u", "domain": "d", "stage": "data", "level": level, "point": point,
        "parent": parent, "checkpoint": point if checkpoint and level in ("full", "inc") else None, "chain": of,
        "created": created or point,
    }
    return SimpleNamespace(head=head, disks=[{"name": "vda", "size": 10, "level": "full"}], name=f"/set/{point}")


A, B, C, D, E = segment("a"), segment("b", "a"), segment("c", "b"), segment("d", "c"), segment("e")
COPY, DIFF = segment("k", level="copy"), segment("m", "a", "diff")
ORPHAN = segment("z", "y")  # its base is not there
OTHER = segment("x", of="other")


def points(segments):
    return "".join(found.head["point"] for found in segments)


def has(points, without="", disks=("vda",)):
    """What libvirt has: of each point a checkpoint with sound bitmaps, and of some one without any."""
    return {**{point: dict.fromkeys(disks, point) for point in points}, **{point: {} for point in without}}


@pytest.mark.parametrize("held, base, is_set, ours, whole, wanted", [
    ([], None, True, "", "", ""),
    ([A, B], None, True, "ab", "ab", "ab"),
    ([A, B, OTHER], None, True, "ab", "ab", "ab"),
    ([OTHER], None, True, "", "", ""),
    ([A, ORPHAN], None, True, "az", "a", "a"),
    ([ORPHAN], None, True, "z", "", ""),
    ([ORPHAN], None, False, "z", "z", "z"),  # a destination's heads: what it needs is there, not here
    ([A, B, E], "full", True, "abe", "abe", "ae"),
    ([A, B, E], "last", True, "abe", "abe", "abe"),
    ([B], "full", False, "b", "b", ""),
])
def test_candidates(held, base, is_set, ours, whole, wanted):
    found = decisions.candidates(held, "main", base, is_set)
    assert [points(found.ours), points(found.whole), points(found.wanted)] == [ours, whole, wanted]


@pytest.mark.parametrize("level, held, have, expected", [
    ("auto", [A], has("a"), Start("inc", "a", A)),
    ("inc", [A], has("a"), Start("inc", "a", A)),
    ("diff", [A], has("a"), Start("diff", "a", A)),
    ("auto", [A, B, C], has("abc"), Start("inc", "c", C)),
    ("auto", [C, B, A], has("abc"), Start("inc", "c", C)),
    ("auto", [A, B, C], has("ab"), Start("inc", "b", B)),  # libvirt has lost the last one
    ("auto", [A, B, C], has("ab", "c"), Start("inc", "b", B)),  # or its bitmaps
    ("auto", [A, B, C], has("a", "bc"), Start("inc", "a", A)),
    ("auto", [A, B, COPY], has("ab"), Start("inc", "b", B)),
    ("auto", [A, DIFF], has("am"), Start("inc", "a", A)),
    ("auto", [], has("a"), Start("full", why=Full.NOTHING_SAVED)),
    ("inc", [], has("a"), Start("full", why=Full.NOTHING_SAVED, is_refused=True)),
    ("diff", [], has("a"), Start("full", why=Full.NOTHING_SAVED, is_refused=True)),
    ("auto", [OTHER], has("x"), Start("full", why=Full.NOTHING_SAVED)),
    ("auto", [ORPHAN], has("z"), Start("full", why=Full.NOTHING_WHOLE)),
    ("auto", [COPY], has(""), Start("full", why=Full.NO_CHECKPOINT)),
    ("auto", [A], has(""), Start("full", why=Full.FORGOTTEN)),
    ("auto", [A], has("xyz"), Start("full", why=Full.FORGOTTEN)),
    ("auto", [A], has("", "a"), Start("full", why=Full.NO_BITMAP, is_broken=True)),
    ("inc", [A, B], has("x", "b"), Start("full", why=Full.NO_BITMAP, is_refused=True, is_broken=True)),
])
def test_start(level, held, have, expected):
    assert decisions.start(level, decisions.candidates(held, "main", None, True), have) == expected


@pytest.mark.parametrize("held, have, expected", [
    ([A, B, C], has("abc"), Start("diff", "a", A)),
    ([A, B, E], has("abe"), Start("diff", "e", E)),
    ([A, B, E], has("ab"), Start("diff", "a", A)),
    ([B, C], has("bc"), Start("full", why=Full.NO_FULL, is_refused=True)),
])
def test_start_from_the_last_full(held, have, expected):
    found = decisions.candidates(held, "main", "full", False)
    assert decisions.start("diff", found, have) == expected


@pytest.mark.parametrize("level, expected", [
    ("auto", Start("inc", "a", A)), ("inc", Start("inc", "a", A)), ("diff", Start("diff", "a", A)),
])
def test_start_at_a_named_base(level, expected):
    assert decisions.start_at(level, "a", A, has("ab")) == expected
    assert decisions.start_at(level, "a", None, has("a")) == Start(expected.level, "a", None)
    assert decisions.start_at(level, "a", A, has("b")) == Start(
        "full", why=Full.NO_SUCH_BASE, is_refused=level != "auto")


@pytest.mark.parametrize("whole, known, expected", [
    ([], "", ""), ([COPY], "", ""),
    ([A], "a", ""), ([A], "", "a"), ([A], "x", "a"),
    ([A, B, C], "c", ""),  # the latest one is there: nothing was forgotten that is needed
    ([A, B, C], "ab", "c"),
    ([A, B, C, D], "", "abcd"),  # the last full, and the three latest
    ([D, C, B, A], "", "abcd"),
    ([A, B, C, D, segment("e", "d")], "", "acde"),
    ([A, B, E, segment("f", "e")], "", "bef"),
    ([A, B, C, D, segment("f", "d")], "ac", "df"),
])
def test_which_checkpoints_are_redefined(whole, known, expected):
    assert points(decisions.to_redefine(whole, set(known))) == expected


THEN = [{"name": "vda", "size": 100, "level": "full"}, {"name": "vdb", "size": 50, "level": "full"}]


@pytest.mark.parametrize("disk, then, expected", [
    (DiskNow("vda", 100), THEN, None),
    (DiskNow("vda", 101), THEN, None),  # one that grew needs no full
    (DiskNow("vda", 99), THEN, InFull.SHRANK),
    (DiskNow("vdb", 50), THEN, None),
    (DiskNow("vdb", 49), THEN, InFull.SHRANK),
    (DiskNow("vdc", 50), THEN, InFull.NEW),
    (DiskNow("vdc", 50), [], InFull.NEW),
    (DiskNow("vda", 99), None, None),  # the receiver knows what it has
    (DiskNow("vda", 100, has_bitmap=False), THEN, InFull.NO_BITMAP),
    (DiskNow("vda", 100, has_bitmap=False), None, InFull.NO_BITMAP),
    (DiskNow("vda", 100, can_hold_bitmap=False), THEN, InFull.NO_BITMAP_EVER),
    (DiskNow("vda", 100, can_hold_bitmap=False, has_bitmap=False), None, InFull.NO_BITMAP_EVER),
    (DiskNow("vda", 100, is_same_image=False), THEN, InFull.OTHER_IMAGE),
    (DiskNow("vda", 100, is_same_image=False), None, InFull.OTHER_IMAGE),
    (DiskNow("vda", 100, moved_from="vdb"), THEN, InFull.MOVED_FILE),
    (DiskNow("vdc", 1, False, False, False, "vda"), THEN, InFull.NO_BITMAP_EVER),
    (DiskNow("vdc", 1, True, False, False, "vda"), THEN, InFull.NEW),
    (DiskNow("vda", 1, True, False, False, "vdb"), THEN, InFull.SHRANK),
    (DiskNow("vda", 100, True, False, False, "vdb"), THEN, InFull.NO_BITMAP),
    (DiskNow("vda", 100, True, True, False, "vdb"), THEN, InFull.OTHER_IMAGE),
])
def test_disks_in_full(disk, then, expected):
    assert decisions.in_full(disk, then) is expected


@pytest.mark.parametrize("held, head, known, is_broken, expected", [
    ([A], A, "a", False, ""),
    ([A, B], B, "ab", False, ""),
    ([A, B, C], C, "abc", False, ""),  # the last full, and the two newest
    ([A, B, C, D], D, "abcd", False, "b"),
    ([A, B, C, D], D, "acd", False, ""),  # what libvirt does not have cannot be deleted
    ([A, B, C, D, E], E, "abcde", False, "abc"),
    ([A, B, C, D, E, segment("f", "e")], segment("f", "e"), "abcdef", False, "abcd"),
    ([A, B, C, D, E], E, "abcdexyz", False, "abc"),  # others' are left alone
    ([A, B, C, D, E, OTHER], E, "abcdex", False, "abc"),
    ([A, B, C, D, E, OTHER], OTHER, "abcdex", False, ""),
    ([A, B, COPY], COPY, "ab", False, ""),
    ([A, B, C, D, DIFF], DIFF, "abcd", False, "b"),
    # QEMU died hard: only the new one is of use.
    ([A, B, C], C, "abc", True, "ab"),
    ([A, B, E], E, "abe", True, "ab"),
    ([A, B, COPY], COPY, "ab", True, ""),
    ([A, B, DIFF], DIFF, "ab", True, ""),
    ([A, B, OTHER], OTHER, "abx", True, ""),
])
def test_which_checkpoints_go(held, head, known, is_broken, expected):
    assert "".join(decisions.superseded(held, head.head, set(known), is_broken)) == expected


def about(base, catalog=None):
    return {"base": base, "catalog": catalog}


@pytest.mark.parametrize("head, abouts, expected", [
    (A, {"a": about(None)}, None),
    (B, {"a": about(None), "b": about("a")}, None),
    (C, {"a": about(None), "b": about("a"), "c": about("b")}, "a"),
    (D, {"a": about(None), "b": about("a"), "c": about("b"), "d": about("c")}, "b"),
    (C, {"b": about("a"), "c": about("b")}, None),  # it is gone already
    (C, {"a": about(None, "set"), "b": about("a"), "c": about("b")}, None),  # a set's
    (C, {"a": about(None), "b": about("a", "set"), "c": about("b")}, None),
    (C, {"a": about(None), "b": about("a"), "c": about("b"), "q": about("a")}, None),  # another receiver starts there
    (C, {"a": about(None), "b": about("a"), "c": about("b"), "q": about("a", "set")}, None),
    (DIFF, {"a": about(None), "b": about("a")}, None),
    (segment("m", "b", "diff"), {"a": about(None), "b": about("a")}, None),
])
def test_the_checkpoint_before_the_base(head, abouts, expected):
    assert decisions.grandparent(head.head, abouts) == expected


@pytest.mark.parametrize("dropped, known, expected", [
    ((), ("vnb.main.1",), []),
    (("vnb.main.1",), ("vnb.main.1",), ["vnb.main.1"]),
    (("vnb.main.1",), (), []),
    (("vnb.main.2", "vnb.main.1"), ("vnb.main.1", "vnb.main.2"), ["vnb.main.1", "vnb.main.2"]),
    (("vnb.main.held",), ("vnb.main.held",), []),  # it was pruned, and came back
    (("vnb.other.1", "daily", "vnb.mainly.1"), ("vnb.other.1", "daily", "vnb.mainly.1"), []),
])
def test_pruned_checkpoints(dropped, known, expected):
    held = [segment("vnb.main.held")]
    assert decisions.pruned(dropped, "main", held, known) == expected


@pytest.mark.parametrize("has_ended, is_owner_dead, expected", [
    (True, True, Left.THAW), (True, False, Left.THAW), (False, True, Left.END), (False, False, Left.RUNS),
])
def test_what_was_left(has_ended, is_owner_dead, expected):
    assert decisions.left(has_ended, is_owner_dead) is expected


@pytest.mark.parametrize("has_checkpoint, is_saved, expected", [
    (True, True, Fate.SAVED), (True, None, Fate.UNKNOWN), (True, False, Fate.DELETE),
    (False, True, Fate.NONE), (False, None, Fate.NONE), (False, False, Fate.NONE),
])
def test_the_checkpoint_of_an_aborted_job(has_checkpoint, is_saved, expected):
    assert decisions.fate(has_checkpoint, is_saved) is expected


@pytest.mark.parametrize("force, is_known, is_dead, is_damaged, holds_any, is_alone, expected", [
    (False, True, True, False, True, False, Unsaved.DELETE),
    (False, True, True, False, True, True, Unsaved.DELETE),
    (False, True, True, False, False, True, Unsaved.DELETE),  # what a first backup leaves that crashed
    (False, True, True, False, False, False, Unsaved.EMPTY),
    (False, True, True, True, True, True, Unsaved.DAMAGED),
    (False, True, False, False, True, True, Unsaved.OTHER),
    (False, True, False, True, True, True, Unsaved.OTHER),
    (False, False, True, False, False, True, Unsaved.OTHER),
    (False, False, False, False, False, False, Unsaved.OTHER),
])
def test_a_checkpoint_of_which_nothing_is_saved(force, is_known, is_dead, is_damaged, holds_any, is_alone, expected):
    assert decisions.unsaved(force, is_known, is_dead, is_damaged, holds_any, is_alone) is expected
    assert decisions.unsaved(True, is_known, is_dead, is_damaged, holds_any, is_alone) is Unsaved.DELETE


@pytest.mark.parametrize("bitmap, of_catalog, known, expected", [
    (B, [A, B, C], "c", True),
    (B, [A, B, C], "", False),  # the newest may be wanted
    (B, [A, B, C], "a", False),
    (C, [A, B, C], "ab", False),
    (A, [A, B, C], "bc", False),  # a diff may start from the last full
    (A, [A, B, E], "e", True),
    (B, [A, B, E], "e", True),
    (B, [A, B, OTHER], "x", False),
    (B, [B, C], "c", True),
])
def test_a_bitmap_without_a_checkpoint(bitmap, of_catalog, known, expected):
    assert decisions.is_stale(bitmap, of_catalog, set(known)) is expected


@st.composite
def worlds(draw):
    """A catalog's segments, in any state of disorder, and what libvirt has of their checkpoints and of others."""
    names = [chr(ord("a") + number) for number in range(draw(st.integers(0, 8)))]
    held = []
    for number, name in enumerate(names):
        level = draw(st.sampled_from(LEVELS))
        parent = draw(st.sampled_from([*names[:number], "lost"])) if level in ("inc", "diff") else None
        held.append(segment(name, parent, level, of=draw(st.sampled_from(["main", "main", "other"]))))
    held = [found for found in held if draw(st.integers(0, 5))]  # some were lost
    known = {}
    for name in [*names, "foreign", "vnb.other.1"]:
        disks = draw(st.sampled_from([None, (), ("vda",), ("vda", "vdb")]))
        if disks is not None:
            known[name] = dict.fromkeys(disks, name)
    return held, known


@settings(max_examples=300)
@given(worlds(), st.sampled_from(["auto", "inc", "diff"]), st.sampled_from([None, "last", "full"]), st.booleans())
def test_an_increment_starts_from_what_is_saved_and_covered(world, level, base, is_set):
    """From a restore point of the chain that the catalog has, and of which a disk has a sound bitmap; else in full."""
    held, have = world
    found = decisions.candidates(held, "main", base, is_set)
    start = decisions.start(level, found, have)
    if start.why is None:
        assert start.segment in held and start.segment.head["point"] == start.base
        assert have[start.segment.head["checkpoint"]]
        assert start.segment.head["chain"] == "main"
        assert start.level == ("inc" if level == "auto" else level)
        if is_set:
            assert start.base in chain.restorable(held)
        if base == "full":
            assert start.segment.head["level"] == "full"
        # No newer one would do.
        newer = [found for found in found.wanted if found.head["created"] > start.segment.head["created"]]
        assert not any(have.get(found.head["checkpoint"]) for found in newer)
    else:
        assert (start.level, start.base, start.segment) == ("full", None, None)
        assert start.is_refused == (level != "auto")


@settings(max_examples=300)
@given(worlds(), st.booleans())
def test_no_checkpoint_goes_that_is_needed(world, is_broken):
    """Not the newest restore point's, not the last full's, and none of another chain or of somebody else."""
    held, have = world
    mine = [found for found in held if found.head["chain"] == "main"]
    if not mine:
        return
    new = max(mine, key=lambda found: found.head["created"])
    gone = decisions.superseded(held, new.head, have, is_broken)
    assert set(gone) <= {found.head["checkpoint"] for found in mine} & set(have)
    assert new.head["checkpoint"] not in gone
    if not is_broken:
        marked = [found for found in mine if found.head["checkpoint"] in have]
        assert not {found.head["checkpoint"] for found in marked[-2:]} & set(gone)
        fulls = [found for found in marked if found.head["level"] == "full"]
        assert not {found.head["checkpoint"] for found in fulls[-1:]} & set(gone)
        # What is left is bounded, whatever the chain's length.
        assert len({found.head["checkpoint"] for found in marked} - set(gone)) <= 3


@settings(max_examples=300)
@given(worlds())
def test_what_is_redefined_is_what_a_commit_keeps(world):
    held, have = world
    wanted = decisions.to_redefine(held, have)
    assert not {found.head["checkpoint"] for found in wanted} & set(have)
    assert len(wanted) <= decisions.LATEST + 1
    assert wanted == sorted(wanted, key=lambda found: found.head["created"])


def test_candidates_are_not_mixed_up():
    """The fields by their names, as start() reads them."""
    assert decisions.start("auto", Candidates([A], [A], []), has("a")) == Start("full", why=Full.NO_FULL)
    assert decisions.start("auto", Candidates([A], [], []), has("a")) == Start("full", why=Full.NOTHING_WHOLE)
