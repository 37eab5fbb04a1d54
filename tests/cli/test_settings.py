# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb.ini: what it adds to the options of vnb-backup and vnb-restore."""

import os
import subprocess

import pytest
from samples import ROOT

INI = """
# for all
[backup]
compress = zstd:3
verify
keep-daily=14
strict = no
[backup db]
exclude = vdb
    vdc
verify = no
level = inc
[restore]
format = raw
"""


def command(*argv, **environment):
    return subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=60, cwd=ROOT,
                          stdin=subprocess.DEVNULL, env={**os.environ, **environment})


@pytest.fixture
def ini(tmp_path):
    path = tmp_path / "vnb.ini"
    path.write_text(INI)
    (tmp_path / "virsh").write_text("#!/bin/sh\necho vm1\necho db\n")
    (tmp_path / "virsh").chmod(0o755)
    return path


def options(path, section, *typed):
    usage = command(f"vnb-{section}", "--help").stdout
    argv = ["vnb-options", path, section, *typed]
    done = subprocess.run(argv, input=usage, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("typed, printed", [
    (["vm1", "/b"], ["--compress=zstd:3", "--verify", "--keep-daily=14"]),
    (["db", "/b"], ["--compress=zstd:3", "--keep-daily=14", "--exclude=vdb", "--exclude=vdc", "--level=inc"]),
    (["--level", "full", "db", "/b", "--exclude=vda"], ["--compress=zstd:3", "--keep-daily=14"]),
    (["-c", "db", "vm1", "/b"], ["--compress=zstd:3", "--verify", "--keep-daily=14"]),
    (["--verify", "--", "db", "/b"], ["--compress=zstd:3", "--keep-daily=14", "--exclude=vdb", "--exclude=vdc",
                                      "--level=inc"]),
    ([], ["--compress=zstd:3", "--verify", "--keep-daily=14"]),
])
def test_what_was_typed_counts(ini, typed, printed):
    assert options(ini, "backup", *typed) == printed


def test_all_machines_have_no_section_of_one(ini):
    """Its operand is a directory, whatever its name. What each machine's section says its own vnb-backup reads."""
    done = command("vnb-backup-all", "--dry-run", "db", VNB_CONFIG=str(ini), PATH=f"{ini.parent}:{os.environ['PATH']}")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = (line for line in done.stdout.splitlines() if line.startswith("vnb-checkpoint"))
    assert first == "vnb-checkpoint run --level auto --set db/vm1 vm1 -- "\
                    "'vnb-extents | vnb-read | vnb-pack --compress zstd:3 -o db/vm1' &&"
    assert second.startswith("vnb-checkpoint run --level inc --set db/db --exclude vdb --exclude vdc db -- ")


def test_short_options_are_long_ones(tmp_path):
    (tmp_path / "vnb.ini").write_text("[backup]\nconnect = test:///a\nstart-paused\nverbose\n")
    assert options(tmp_path / "vnb.ini", "backup", "-c", "test:///b", "-S", "vm1", "/b") == ["--verbose"]


@pytest.mark.parametrize("text, reason", [
    ("[backup]\nfrobnicate = 1\n", '[backup]: "frobnicate" is no option that can stand here'),
    ("[backup]\ndry-run\n", '[backup]: "dry-run" is no option that can stand here'),
    ("[backup]\nverify = sometimes\n", '[backup]: "verify" is yes or no, not "sometimes"'),
    ("[backup]\nlevel\n", '[backup]: "level" needs a value'),
    ("[backup]\nkeep-daily = 14 ; two weeks\n", '[backup]: "; two weeks" is a comment only on a line of its own'),
    ("[backup]\nverify # each night\n", '[backup]: "# each night" is a comment only on a line of its own'),
    ("[backup]\nverify = # each night\n", '[backup]: "# each night" is a comment only on a line of its own'),
    ("[back]\nlevel = inc\n", "[[back]]: is for no command: [backup], [backup NAME] and [restore] are"),
    ("[backup]\nraw\n[backup]\n", "While reading from "),
    ("# all\nlevel = inc\n", "line 2: is in no section: [[backup]], [[backup NAME]] and [[restore]] are"),
])
def test_a_file_that_makes_no_sense(tmp_path, text, reason):
    """Found by vnb-backup before anything is run, in one line."""
    path = tmp_path / "vnb.ini"
    path.write_text(text)
    done = command("vnb-backup", "--dry-run", "vm1", "/b", VNB_CONFIG=str(path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"vnb-options: {path}: {reason.replace('[[', '[').replace(']]', ']')}")
    assert done.stderr.count("\n") == 1


def test_a_comment_is_a_line(tmp_path):
    path = tmp_path / "vnb.ini"
    path.write_text("; all\n[backup]\n# two weeks\nkeep-daily = 14\nexclude = vdb#1\n  ; not needed\n  vdc;2\n")
    assert options(path, "backup", "vm1", "/b") == ["--keep-daily=14", "--exclude=vdb#1", "--exclude=vdc;2"]


@pytest.mark.parametrize("name", ["vnb-backup", "vnb-backup-all", "vnb-restore"])
def test_help_with_a_file_that_makes_no_sense(tmp_path, name):
    """It may be why somebody asks for help."""
    (tmp_path / "vnb.ini").write_text("frobnicate\n")
    for option in ("--help", "--version"):
        done = command(name, option, VNB_CONFIG=str(tmp_path / "vnb.ini"))
        assert (done.returncode, done.stderr, done.stdout[:4]) == (0, "", "vnb-")


def test_a_value_that_makes_no_sense(tmp_path):
    """The file is named, since nobody typed it; what is typed counts in its place."""
    path = tmp_path / "vnb.ini"
    path.write_text("[backup]\nkeep-daily = two weeks\n")
    done = command("vnb-backup", "--dry-run", "vm1", "/b", VNB_CONFIG=str(path))
    reason = f'vnb-backup: {path}: --keep-daily: "two weeks" is not a number within 0-1000000\n'
    assert (done.returncode, done.stdout, done.stderr) == (1, "", reason)
    assert command("vnb-backup", "--dry-run", "--keep-daily=1", "vm1", "/b", VNB_CONFIG=str(path)).returncode == 0


def test_no_text(tmp_path):
    (tmp_path / "vnb.ini").write_bytes(b"\xff[backup]\n")
    done = command("vnb-backup", "--dry-run", "vm1", "/b", VNB_CONFIG=str(tmp_path / "vnb.ini"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_backup_and_restore_read_it(ini):
    lines = command("vnb-backup", "--dry-run", "-z", "vm1", "/b", VNB_CONFIG=str(ini)).stdout.splitlines()
    assert lines == [
        "vnb-checkpoint run --level auto --set /b vm1 -- 'vnb-extents | vnb-read | vnb-pack -z -o /b' &&",
        "vnb-verify /b &&", "vnb-prune --keep-daily 14 /b",
    ]
    done = command("vnb-restore", "--dry-run", "formats/vectors/chain.vnb", "/r", VNB_CONFIG=str(ini))
    assert "| vnb-apply --format raw /r" in done.stdout
    assert "raw" not in command("vnb-restore", "--dry-run", "formats/vectors/chain.vnb", "/r").stdout


def test_where_it_is(tmp_path):
    """In the user's own directory, unless VNB_CONFIG says where or that there is none."""
    (tmp_path / "vnb.ini").write_text("[backup]\nraw\n")
    environment = {key: value for key, value in os.environ.items() if key != "VNB_CONFIG"}
    argv = ["vnb-backup", "--dry-run", "vm1", "/b"]
    for changes, there in (
        ({"XDG_CONFIG_HOME": str(tmp_path)}, True), ({"XDG_CONFIG_HOME": str(tmp_path), "VNB_CONFIG": ""}, False),
    ):
        done = subprocess.run(argv, capture_output=True, text=True, env={**environment, **changes}, timeout=60)
        assert (" --raw " in done.stdout) == there


@pytest.mark.parametrize("typed, exported", [
    (["-v"], "VNB_LOG_LEVEL=verbose"), (["--quiet"], "VNB_LOG_LEVEL=quiet"),
    (["--log-format", "json", "--progress=json"], "VNB_LOG_FORMAT=json VNB_PROGRESS=json"),
])
@pytest.mark.parametrize("name, operands", [
    ("vnb-backup", ["vm1", "/b"]), ("vnb-restore", ["formats/vectors/chain.vnb", "/r"]),
])
def test_what_is_said_is_said_by_all(name, operands, typed, exported):
    """What the scripts run learns it from the environment."""
    done = command(name, "--dry-run", *typed, *operands)
    assert done.stdout.splitlines()[0] == f"export {exported}"
