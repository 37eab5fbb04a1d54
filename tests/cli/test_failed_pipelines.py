# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pipeline whose first command fails says so once; nothing else is ever hidden."""

import subprocess

import pytest
import samples
import servers

FIRST = {
    "vnb-cat /nonexistent": "vnb-cat: /nonexistent: No such file or directory",
    "vnb-checkpoint begin --level copy --image vda=/nonexistent":
        "vnb-checkpoint: vda: /nonexistent: No such file or directory",
    "vnb-import /nonexistent": "vnb-import: /nonexistent: No such file or directory",
}
SHELL = {"shell": True, "capture_output": True, "text": True, "timeout": servers.DEADLINE}
LATER = [
    "vnb-extents | vnb-read | vnb-pack -o set", "vnb-apply images", "vnb-config", "vnb-verify | vnb-pack > /dev/null",
    "vnb-dump", "cat | vnb-apply images",
]


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("later", LATER)
def test_one_line(tmp_path, first, later):
    done = subprocess.run(["bash", "-c", f'{first} | {later}; echo "${{PIPESTATUS[*]}}"'], cwd=tmp_path,
                          capture_output=True, text=True, timeout=servers.DEADLINE)
    assert done.stderr.splitlines() == [FIRST[first]]
    assert set(done.stdout.split()) - {"0"} == {"1"}
    assert done.stdout.split()[0] == done.stdout.split()[-1] == "1"
    assert list(tmp_path.iterdir()) == []


def test_with_v_all_say_it(tmp_path):
    done = subprocess.run("vnb-cat /nonexistent | vnb-apply -v images", **SHELL, cwd=tmp_path)
    assert done.stderr.splitlines() == [
        "vnb-cat: /nonexistent: No such file or directory",
        "vnb-apply: stdin: the command that was to write this has failed",
    ]


def test_a_file_is_not_passed_over_in_silence(tmp_path):
    """As where a pipeline went through another program into a file, and nobody saw the first line."""
    with open(tmp_path / "file", "wb") as file:
        subprocess.run("vnb-cat /nonexistent 2> /dev/null | cat", shell=True, stdout=file)  # noqa: S602
    with open(tmp_path / "file", "rb") as file:
        done = subprocess.run(["vnb-apply", tmp_path / "images"], stdin=file, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "vnb-apply: stdin: the command that was to write this has failed\n")
    assert "the command that was to write this has failed" in servers.command("vnb-verify", tmp_path / "file").err


def test_a_file_stays_empty(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        subprocess.run(["vnb-cat", "/nonexistent"], stdout=file, stderr=subprocess.DEVNULL)
    assert (tmp_path / "file").read_bytes() == b""


def test_whoever_was_killed_has_said_nothing(tmp_path):
    done = subprocess.run("sh -c 'kill -9 $$' | vnb-apply images", **SHELL, cwd=tmp_path)
    assert "vnb-apply: stdin: empty input, expected a stream: the command before this one" in done.stderr


def test_a_stream_that_is_cut_is_named_by_all(tmp_path):
    """What has been written cannot be taken back: a reader says where it ends."""
    content = samples.every_kind(required=False)
    (tmp_path / "x.vnb").write_bytes(content[: len(content) // 2])
    done = subprocess.run("vnb-pack < x.vnb | vnb-dump > /dev/null", **SHELL, cwd=tmp_path)
    assert len([line for line in done.stderr.splitlines() if line.startswith("vnb-")]) == 2


def test_a_table_is_no_stream():
    """What is for people has no frame in it."""
    assert servers.command("vnb-cat", "--point", "/nonexistent").out == b""
    assert servers.command("vnb-dump", "/nonexistent").out == b""
    assert servers.command("vnb-verify", "/nonexistent").out == b""
