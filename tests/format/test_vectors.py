# SPDX-License-Identifier: LGPL-2.1-or-later
"""The golden streams, the page and the magic entry say the same as the code."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import reference_reader
import samples
import vectors
from json_lines import from_lines, to_lines

from vnb.base.errors import Error
from vnb.format import codec, rules, stream, values
from vnb.format import frame as f
from vnb.store import chain

FORMATS = Path(samples.ROOT, "formats")
PAGE = (FORMATS / "extent-stream.md").read_text()
DIRECTORY = FORMATS / "vectors"
by_name = pytest.mark.parametrize("name", vectors.VECTORS)
by_refused = pytest.mark.parametrize("name", vectors.refused())


def content_of(name):
    return (DIRECTORY / f"{name}.vnb").read_bytes()


def use(content):
    """Do with a stream what who applies it does, but for the writing."""
    follow = chain.Follow("vector")
    with samples.memory(content) as fd:
        for number, segment in enumerate(stream.Reader(fd, "vector")):
            if number == 0 and segment.head["parent"] is not None and len(content) < 5000:
                follow.begin(segment.head, segment.disks)  # an increment alone
            else:
                follow.accept(segment.head, segment.disks)
            for frame in segment:
                if frame.__class__ is values.Data:
                    codec.plain(frame, segment.disks[frame.disk]["name"])


def test_all_are_here():
    """Each with a text that says what it is."""
    for directory, names in ((DIRECTORY, vectors.VECTORS), (DIRECTORY / "refused", vectors.refused())):
        assert {path.stem for path in directory.glob("*.vnb")} == set(names)
        for name in names:
            assert (directory / f"{name}.txt").read_text().count("\n") == 3


@by_name
def test_vector_is_what_it_was_made_of(name):
    """Bytes of lz4 are the library's: another release may pack otherwise."""
    made, kept = vectors.made(vectors.VECTORS[name]), content_of(name)
    if name == "full-lz4":
        made, kept = ([frame[:4] + frame[-1:] if frame[0] == "data" else frame for frame in found[0][2] if
                       frame[0] != "index"] for found in (samples.read(made), samples.read(kept)))
    assert made == kept


@by_name
def test_vector_and_its_json(name):
    lines = (DIRECTORY / f"{name}.json").read_text().splitlines()
    assert to_lines(content_of(name)) == lines
    assert from_lines(lines) == content_of(name)


@by_name
def test_vector_is_accepted(name):
    use(content_of(name))
    assert reference_reader.segments(content_of(name))


@by_refused
def test_refused(name):
    content = content_of(f"refused/{name}")
    assert content == vectors.refused()[name][0]
    with pytest.raises(Error):
        use(content)
    if name not in ("bit-flipped", "segments-swapped"):  # found by who uses the bytes, and who applies the segments
        with pytest.raises(reference_reader.Refused):
            reference_reader.segments(content)


def test_commands():
    """The files together are no chain: each is what it is."""
    sound = [DIRECTORY / f"{name}.vnb" for name in vectors.VECTORS]
    lines = b"".join(path.with_suffix(".json").read_bytes() for path in sound)
    for arguments, expected in ((["vnb-dump", "--json"], lines), (["vnb-verify", "--each"], b"")):
        program = [sys.executable, os.path.join(samples.ROOT, "bin", arguments[0]), *arguments[1:]]
        done = subprocess.run([*program, *sound], capture_output=True, env={**os.environ, "PYTHONPATH": samples.ROOT})
        assert (done.returncode, done.stdout, done.stderr) == (0, expected, b"")


def test_example_of_the_page():
    """The annotated bytes are those of the file."""
    block = PAGE.partition("## Example\n")[2]
    rows = re.findall(r"^    ([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+)", block, flags=re.MULTILINE)
    content = b""
    for offset, digits in rows:
        assert int(offset, 16) == len(content)
        content += bytes.fromhex(digits)
    assert content == content_of("minimal")


def test_limits_of_the_page():
    limits = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", PAGE.partition("## Limits\n")[2], flags=re.MULTILINE))
    assert {
        "head frame": f"{f.MAX_HEAD >> 20} MiB",
        "disk frames of a segment together": f"{f.MAX_DISK_FRAMES >> 20} MiB",
        "any other frame, without payload": f"{f.MAX_HEADER >> 10} KiB",
        "length of a data frame": f"{f.MAX_DATA >> 20} MiB",
        "payload of file, index, unknown": f"{f.MAX_PAYLOAD >> 20} MiB",
        "extents in a frame": f"{f.MAX_EXTENTS}",
        "values in all arrays and maps of a frame, nested or not": f"{f.MAX_VALUES}",
        "keys of a map": f"{f.MAX_MAP}",
        "nesting": f"{f.MAX_NESTING}",
        "disks in a segment": f"{f.MAX_DISKS}",
        "offset + length": "2^63 - 1",
        "names": f"{f.MAX_NAME} characters",
    }.items() <= limits.items()
    assert f"3 to {f.MAX_ELEMENTS} elements" in PAGE
    assert f"The version is {f.VERSION}." in PAGE
    assert f"at most {rules.LONGEST_PATH} characters" in PAGE


def test_stages_levels_and_codecs_of_the_page():
    for word in (*rules.STAGES, *rules.LEVELS, *f.CODECS):
        assert f"`{word}`" in PAGE


@pytest.mark.skipif(shutil.which("file") is None, reason="not installed: file")
def test_magic():
    def told(content):
        command = ["file", "-b", "-m", FORMATS / "magic", "-"]
        return subprocess.run(command, input=content, stdout=subprocess.PIPE, check=True).stdout.decode().strip()

    for name in vectors.VECTORS:
        assert told(content_of(name)) == "vnb extent stream, version 1"
    assert told(content_of("refused/newer-version")) == "vnb extent stream, version 2"
    assert told(b"\x94\xa3vnb\xcc\xc8") == "vnb extent stream, version 200"
    for other in (b"\x94\xa3vnc\x01", b"94a3766e62", content_of("inc")[-33:]):
        assert "vnb" not in told(other)
