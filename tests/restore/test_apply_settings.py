# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-apply makes new images as the originals were, or as it is told."""

import json
import os

import applied
import makers
import pytest
import samples
from applied import qemu_img, refused, restored, same

from vnb.qemu import image_writer
from vnb.restore.imagedir import EXISTS

TEXT = "1M:A 1M:- 64k:? 64k:0 512k:B"
EXPECTED = makers.images([{"vda": TEXT}])[0]["vda"]


def content(info=None, plan=None):
    """A full of vda, with what qemu-img said of its image."""
    with samples.written() as (writer, written):
        for number, disks in enumerate(plan or [{"vda": TEXT}]):
            sizes = {name: len(image) for name, image in makers.images(plan or [{"vda": TEXT}])[number].items()}
            described = [
                {"name": name, "size": sizes[name], "level": "inc" if number else "full", "image": {}} for name in disks
            ]
            out = writer.segment(makers.head(number), described)
            if info is not None and not number:
                text = info if isinstance(info, bytes) else json.dumps(info).encode()
                half = len(text) // 2
                part = {"role": "image-info", "path": "vda", "mode": 0o600, "size": len(text)}
                for start, end in ((0, half), (half, len(text))) if half else ((0, len(text)),):
                    out.file({**part, "offset": start}, text[start:end])
            for disk, runs in enumerate(disks.values()):
                for offset, length, kind in makers.extents(runs):
                    if kind in makers.KINDS:
                        out.extents(disk, [offset, length, makers.KINDS[kind]])
                    elif kind != ".":
                        samples.data(out, disk, offset, makers.content_of(kind, offset, length, number))
            out.end()
        return written()


def info_of(path):
    return json.loads(qemu_img("info", "--output=json", path))


@pytest.mark.parametrize("options", [
    "cluster_size=512", "cluster_size=2M", "compat=0.10", "cluster_size=128k,extended_l2=on", "lazy_refcounts=on",
    "refcount_bits=1", "refcount_bits=64", "compression_type=zstd", "data_file=vda.data",
    "data_file=vda.data,data_file_raw=on",
])
def test_as_the_original(tmp_path, options):
    (tmp_path / "original").mkdir()
    original = tmp_path / "original/vda.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", options, original, len(EXPECTED), cwd=original.parent)
    told = json.loads(qemu_img("info", "--backing-chain", "--output=json", original))
    done = applied.apply(content(told), tmp_path / "out")
    data = f"vnb-apply: vda: its data is in {tmp_path}/out/vda.data: QEMU's user has to read and write it, and libvirt "
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr.startswith(data) if "data_file" in options else done.stderr == ""
    image = tmp_path / "out/vda.qcow2"
    assert same(image, "qcow2", EXPECTED, tmp_path)
    assert settings_of(image) == settings_of(original)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(original.parent))
    for name in os.listdir(tmp_path / "out"):
        assert os.stat(tmp_path / "out" / name).st_mode & 0o777 == 0o600
    if "data_file_raw" in options:
        assert (tmp_path / "out/vda.data").read_bytes() == EXPECTED


def settings_of(path):
    info = info_of(path)
    data = info["format-specific"]["data"]
    if "data-file" in data:
        # Absolute, as QEMU may be started anywhere.
        assert data["data-file"] in ("vda.data", str(path.parent / "vda.data"))
        data["data-file"] = "vda.data"
    return info["cluster-size"], data


def test_options_come_before_the_original(tmp_path):
    qemu_img("create", "-f", "qcow2", "-o", "cluster_size=128k,data_file=vda.data", tmp_path / "vda", 1 << 20,
             cwd=tmp_path)
    options = "cluster_size=4k,data_file=off,lazy_refcounts=on"
    restored(content([info_of(tmp_path / "vda")]), "--image-options", options, tmp_path / "out")
    info = info_of(tmp_path / "out/vda.qcow2")
    assert info["cluster-size"] == 4096
    assert info["format-specific"]["data"]["lazy-refcounts"]
    assert os.listdir(tmp_path / "out") == ["vda.qcow2"]


def test_settings_of_a_raw_original(tmp_path):
    restored(content({"format": "raw", "cluster-size": 512}), tmp_path / "out")
    assert info_of(tmp_path / "out/vda.qcow2")["cluster-size"] == 65536


@pytest.mark.parametrize("info", [
    b"", b"{", b"[]", b"[1]", b"7", b"[" * 100000, b"\xff", b'{"format": "qcow2", "format-specific": 1}',
    b'{"format": "qcow2", "cluster-size": -1, "format-specific": {"data": []}}', b"1" * 5000,
])
def test_information_that_is_none(tmp_path, info):
    """Only settings depend on it, and there are others."""
    restored(content(info), tmp_path / "out")
    assert same(tmp_path / "out/vda.qcow2", "qcow2", EXPECTED, tmp_path)


def test_settings_from_a_stream_are_checked():
    """A value never becomes another option, or a file's name."""
    assert image_writer.settings({
        "format": "qcow2",
        "cluster-size": "64k,backing_file=/etc/passwd",
        "format-specific": {"data": {
            "compat": "1.1,backing_file=/etc/passwd", "refcount-bits": 3, "lazy-refcounts": "on",
            "data-file": "/dev/sda", "compression-type": "x",
        }},
    }) == {"data_file": "on"}
    assert image_writer.settings({"format": "qcow2", "cluster-size": True}) == {}
    assert image_writer.settings({"format": "qcow2", "cluster-size": 65537}) == {}
    assert image_writer.settings(None) == image_writer.settings([]) == {}


def test_settings_that_qemu_refuses(tmp_path):
    """The original cannot have had these; the user can say others."""
    info = {"format": "qcow2", "cluster-size": 512, "format-specific": {"data": {"compat": "1.1", "extended-l2": True}}}
    line = refused(content(info), tmp_path / "out")
    assert line.startswith("vda: ") and "xtended L2" in line
    assert not (tmp_path / "out").exists()
    restored(content(info), "--image-options", "extended_l2=off", tmp_path / "out")


def test_existing_data_file(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/vda.data").write_bytes(b"precious")
    done = refused(content(), "--image-options", "data_file=on", tmp_path / "out")
    assert done == f"{tmp_path}/out/vda.data: {EXISTS}"
    assert os.listdir(tmp_path / "out") == ["vda.data"]


PLAN = [{"vda": "4M:A 4M:- 1M:? 1M:0"}, {"vda": "64k:0 64k:B 64k:- 8M:. 1M:C 3M:."}]


@pytest.mark.parametrize("format_", ["qcow2", "raw"])
def test_preallocate(tmp_path, format_):
    """Room for all of it, whatever the increments zero, and however it grows."""
    restored(content(plan=PLAN), "--preallocate", "--format", format_, tmp_path / "out")
    image = tmp_path / f"out/vda.{format_}"
    expected = makers.images(PLAN)[-1]["vda"]
    assert same(image, format_, expected, tmp_path)
    assert os.stat(image).st_blocks * 512 >= len(expected)


def test_an_image_that_has_grown_already(tmp_path):
    """Whoever made it larger was killed before the state could say so; and qemu-img rounds sizes up."""
    image = tmp_path / "image"
    image_writer.create(str(image), "disk", "qcow2", 100_000, {})
    for _ in range(2):
        image_writer.resize(str(image), "disk", "qcow2", 100_100, preallocate=True)
        assert json.loads(qemu_img("info", "--output=json", image))["virtual-size"] == 100_352
    for _ in range(2):
        image_writer.resize(str(image), "disk", "qcow2", 200_001, preallocate=True)
        assert json.loads(qemu_img("info", "--output=json", image))["virtual-size"] == 200_192


@pytest.mark.parametrize("format_", ["qcow2", "raw"])
def test_preallocate_tells_at_once_that_there_is_no_room(tmp_path, format_):
    with applied.mounted(tmp_path / "small", "size=2m"):
        line = refused(content(), "--preallocate", "--format", format_, tmp_path / "small")
        assert line.startswith("vda: ") and line.endswith("No space left on device")
        assert applied.left_behind(tmp_path / "small") == []


@pytest.mark.parametrize("options", [[], ["--image-options", "compression_type=zstd,cluster_size=128k"]])
def test_compress(tmp_path, options):
    """All of it, what increments brought too."""
    restored(content(plan=PLAN), "--compress", *options, tmp_path / "out")
    image = tmp_path / "out/vda.qcow2"
    assert same(image, "qcow2", makers.images(PLAN)[-1]["vda"], tmp_path)
    assert os.listdir(tmp_path / "out") == ["vda.qcow2"]
    assert os.stat(image).st_mode & 0o777 == 0o600
    assert os.stat(image).st_blocks * 512 < 2 << 20
    found = json.loads(qemu_img("check", "--output=json", image))
    assert found["compressed-clusters"] * info_of(image)["cluster-size"] >= 4 << 20


def test_compress_without_room(tmp_path):
    """What is not compressed yet fits, and not both."""
    with applied.mounted(tmp_path / "out", "size=4m"):
        line = refused(content(plan=[{"vda": "3M:?"}]), "--compress", tmp_path / "out")
        assert line.startswith("vda: ") and "No space left on device" in line
        assert applied.left_behind(tmp_path / "out") == []


def test_usage(tmp_path):
    for arguments, reason in [
        (["--image-options", "backing_file=x"],
         '--image-options: "backing_file=x" is not KEY=VALUE, with a KEY of cluster_size, compat'),
        (["--image-options", "compat"], '--image-options: "compat" is not KEY=VALUE'),
        (["--image-options", "data_file=x"], "--image-options: data_file is on or off"),
        (["--compress", "--format", "raw"], "--compress: is for qcow2 images"),
        (["--image-options", "compat=1.1", "--format", "raw"], "--image-options: is for qcow2 images"),
        (["--compress", "--image-options", "data_file=on"], "--compress: clusters in a data file cannot be compressed"),
        (["--compress", "--preallocate"], ""),
    ]:
        done = applied.apply(b"", *arguments, tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith(f"vnb-apply: {reason}"), done.stderr
