# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-apply --force-sequence, for those who know better; and what nobody knows better."""

import applied
import makers
import samples
from applied import refused, same, segments_of

PLAN = [{"vda": "64k:A 64k:B"}, {"vda": "64k:C"}, {"vda": "64k:. 64k:D"}]


def test_gap(tmp_path):
    first, _, third = segments_of(PLAN)
    does = f"{makers.point(2)} follows {makers.point(1)}, it does not come after {makers.point(0)} "
    does += "(vnb-cat FILE... finds the order)"
    assert refused(first + third, tmp_path / "out") == f"stdin: {does}"
    done = applied.apply(first + third, "--force-sequence", tmp_path / "out")
    assert done.returncode == 0
    assert done.stderr == f"vnb-apply: --force-sequence: {does}: applied because of --force-sequence\n"
    assert same(tmp_path / "out/vda.qcow2", "qcow2", b"A" * 65536 + b"D" * 65536, tmp_path)


def test_nothing_to_override(tmp_path):
    applied.restored(b"".join(segments_of(PLAN)), "--force-sequence", tmp_path / "out")


def test_after_what_was_forced_the_sequence_counts_again(tmp_path):
    first, second, third = segments_of(PLAN)
    done = applied.apply(first + third + second, "--force-sequence", tmp_path / "out")
    assert done.returncode == 0
    assert done.stderr.count("applied because of --force-sequence") == 2
    assert same(tmp_path / "out/vda.qcow2", "qcow2", b"C" * 65536 + b"D" * 65536, tmp_path)


def test_other_domain(tmp_path):
    other = samples.segment(makers.head(1, uuid="other", domain="vm2"), [])
    line = refused(segments_of(PLAN)[0] + other, "--force-sequence", tmp_path / "out")
    assert line.startswith(f"stdin: {makers.point(1)} is of another domain")


def test_increment_to_nothing(tmp_path):
    """There is nothing that it could change."""
    line = refused(segments_of(PLAN)[1], "--force-sequence", tmp_path / "out")
    assert line == f"stdin: {makers.point(1)} has changes of disk vda, but nothing before it has"


def test_increment_of_a_disk_that_nothing_before_has(tmp_path):
    """Of the disks there were one is known, and there is no image of the other."""
    plan = [{"vda": "64k:A"}, {"vda": "64k:B", "vdb": "64k:C"}, {"vda": "64k:.", "vdb": "32k:. 32k:D"}]
    first, _, third = segments_of(plan)
    done = applied.apply(first + third, "--force-sequence", tmp_path / "out")
    assert done.returncode == 1
    why = f"stdin: {makers.point(2)} has changes of disk vdb, and there is no image of it"
    assert done.stderr.splitlines()[-1] == f"vnb-apply: {why}"
    assert not (tmp_path / "out").exists()
