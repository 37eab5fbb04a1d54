# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-apply: new images are the disk as it was at the last segment's point."""

import json
import os

import applied
import makers
import pytest
from applied import qemu_img, restored, same, segments_of

FORMATS = pytest.mark.parametrize("format_", ["qcow2", "raw"])


def check(tmp_path, plan, format_="qcow2", arguments=(), **options):
    """Restore a plan and compare every disk of its last point."""
    directory = tmp_path / "out"
    restored(b"".join(segments_of(plan, **options)), "--format", format_, *arguments, directory)
    images = makers.images(plan)[-1]
    assert sorted(os.listdir(directory)) == sorted(f"{name}.{format_}" for name in images)
    for name, content in images.items():
        assert same(directory / f"{name}.{format_}", format_, content, tmp_path)
    return directory


@FORMATS
@pytest.mark.parametrize("spec", ["none", "lz4"])
def test_full(tmp_path, format_, spec):
    check(tmp_path, [{"vda": "64k:A 192k:- 64k:0 128k:? 1M:B 64k:-"}], format_, spec=spec)


@FORMATS
def test_increment_zeroes_what_became_zero(tmp_path, format_):
    """The restored disk would keep old bytes otherwise: nobody sees it until the file is read."""
    check(tmp_path, [
        {"vda": "64k:A 192k:B 64k:0 128k:? 1M:C"},
        {"vda": "64k:. 64k:0 64k:. 64k:- 64k:D 64k:0 64k:. 64k:-"},
        {"vda": "64k:- 64k:E 64k:0"},
    ], format_)


@FORMATS
def test_extents_that_are_no_clusters(tmp_path, format_):
    check(tmp_path, [{"vda": "512:A 1024:0 512:B 62k:- 4k:C 4k:-"}, {"vda": "1k:. 512:D 512:0 60k:. 512:E"}], format_)


@FORMATS
def test_disk_that_grew(tmp_path, format_):
    check(tmp_path, [{"vda": "128k:A"}, {"vda": "64k:B 64k:. 64k:. 64k:C"}, {"vda": "256k:. 1M:."}], format_)


@FORMATS
def test_several_disks(tmp_path, format_):
    check(tmp_path, [
        {"vda": "1M:A 64k:0", "vdb": "64k:- 3M:?", "sdc.x": "64k:Z"},
        {"vda": "64k:.", "vdb": "64k:q 1M:0", "sdc.x": "64k:0"},
    ], format_)


@FORMATS
def test_no_data_at_all_has_its_full_size(tmp_path, format_):
    directory = check(tmp_path, [{"vda": "64M:-", "vdb": "1M:0"}], format_)
    assert os.stat(directory / f"vda.{format_}").st_blocks * 512 < 1 << 20


@FORMATS
def test_disk_of_no_size(tmp_path, format_):
    directory = tmp_path / "out"
    restored(b"".join(segments_of([{"vda": ""}])), "--format", format_, directory)
    assert json.loads(qemu_img("info", "--output=json", directory / f"vda.{format_}"))["virtual-size"] == 0


@FORMATS
def test_no_disks(tmp_path, format_):
    restored(b"".join(segments_of([{}])), "--format", format_, tmp_path / "out")


@FORMATS
def test_holes_stay_unallocated(tmp_path, format_):
    directory = check(tmp_path, [{"vda": "64k:A 64M:- 64k:A 64M:0"}], format_)
    image = directory / f"vda.{format_}"
    assert os.stat(image).st_blocks * 512 < 1 << 20
    extents = json.loads(qemu_img("map", "--output=json", "-f", format_, image))
    assert sum(extent["length"] for extent in extents if extent["data"]) == 128 << 10


@FORMATS
def test_what_an_increment_zeroed_is_given_back(tmp_path, format_):
    directory = check(tmp_path, [{"vda": "32M:A"}, {"vda": "16M:0 15M:-"}], format_)
    assert os.stat(directory / f"vda.{format_}").st_blocks * 512 < 3 << 20


@FORMATS
@pytest.mark.parametrize("text", ["64k:- 64k:C 64k:0", "1M:- 64k:C 1M:0"])
def test_disk_that_is_full_in_an_increment_replaces_all_of_it(tmp_path, format_, text):
    """A shrunk disk, or one whose bitmap was lost, has nothing of what it was."""
    stream = segments_of([{"vda": "1M:A", "vdb": "64k:B"}])[0]
    stream += segments_of([{}, {"vda": text, "vdb": "64k:."}], known=["vdb"])[1]
    restored(stream, "--format", format_, tmp_path / "out")
    expected = makers.images([{"vda": text}])[0]["vda"]
    assert same(tmp_path / f"out/vda.{format_}", format_, expected, tmp_path)


@FORMATS
def test_new_disk_in_an_increment(tmp_path, format_):
    check(tmp_path, [
        {"vda": "64k:A"}, {"vda": "64k:.", "vdb": "64k:B 64k:-"}, {"vda": "64k:.", "vdb": "64k:C"},
    ], format_)


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_disk_that_one_point_in_between_does_not_have(tmp_path, comes_back):
    """What becomes of it is known at the end: it comes back in full, and nothing is to be said of it."""
    plan = [{"vda": "64k:A", "vdb": "64k:B"}, {"vda": "64k:.", }, {"vda": "64k:.", "vdb": "64k:C"}]
    segments = segments_of(plan)
    done = applied.apply(b"".join(segments if comes_back else segments[:2]), "--format", "raw", tmp_path / "out")
    said = f"vnb-apply: vdb: not part of restore point {makers.point(1)}: no image is made of it\n"
    assert (done.returncode, done.stderr) == (0, "" if comes_back else said)
    assert sorted(os.listdir(tmp_path / "out")) == (["vda.raw", "vdb.raw"] if comes_back else ["vda.raw"])
    if comes_back:
        assert (tmp_path / "out" / "vdb.raw").read_bytes() == b"C" * (64 << 10)


def test_only_chosen_disks(tmp_path):
    plan = [{"vda": "64k:A", "vdb": "64k:B 64k:-"}, {"vda": "64k:C", "vdb": "64k:. 64k:D"}]
    restored(b"".join(segments_of(plan)), "--disk", "vdb", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["vdb.qcow2"]
    assert same(tmp_path / "out/vdb.qcow2", "qcow2", makers.images(plan)[-1]["vdb"], tmp_path)


def test_images_are_private(tmp_path):
    """Others may look for a name in the directory, as QEMU has to, and read nothing."""
    directory = check(tmp_path, [{"vda": "64k:A"}])
    assert os.stat(directory / "vda.qcow2").st_mode & 0o777 == 0o600
    assert os.stat(directory).st_mode & 0o777 == 0o711


def test_directory_that_is_there_keeps_its_mode(tmp_path):
    (tmp_path / "out").mkdir(mode=0o750)
    directory = check(tmp_path, [{"vda": "64k:A"}])
    assert os.stat(directory).st_mode & 0o777 == 0o750


def test_largest_frames(tmp_path):
    check(tmp_path, [{"vda": "20M:? 4M:A"}], frame_size=4 << 20)
    (tmp_path / "out/vda.qcow2").unlink()
    check(tmp_path, [{"vda": "20M:A 4M:?"}], frame_size=4 << 20, spec="lz4")
