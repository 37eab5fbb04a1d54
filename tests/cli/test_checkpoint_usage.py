# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-checkpoint: what it refuses before it asks libvirt anything."""

import subprocess
import sys

import pytest

PROGRAM = 'from vnb.cli.runner import command; command("vnb-checkpoint", "vnb.cli.checkpoint")'


def checkpoint(*words, tmp_path=None):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
        env={"PATH": "/usr/bin:/bin", "VNB_STATE_DIR": str(tmp_path or "/nonexistent")},
    )


@pytest.mark.parametrize(("words", "reason"), [
    (["begin", "vm1"], "--level: is needed: one of full, copy, inc, diff, auto"),
    (["begin", "vm1", "--level", "half"], '--level: "half" is not one of full, copy, inc, diff, auto'),
    (["begin", "vm1", "--level", "full", "--base", "x"], "--base: level full starts from nothing"),
    (["begin", "vm1", "--level", "inc", "--base", "last"], '--base: "last" is for level diff'),
    (["begin", "vm1", "--level", "inc", "--chain", "a/b"],
     '--chain: "a/b" has other characters than letters, digits, - and _'),
    (["begin", "vm1", "--level", "inc", "--no-freeze", "--require-freeze"],
     "--no-freeze: contradicts --freeze and --require-freeze"),
    (["begin", "--image", "vda", "--level", "full"], '--image: "vda" is not NAME=FILE'),
    (["begin", "--image", "../a=b", "--level", "full"], '--image: "../a=b" is not NAME=FILE'),
    (["begin", "--image", "a=b", "--image", "a=c", "--level", "full"], "--image: a is given twice"),
    (["begin", "--image", "a=b", "--pause", "--level", "full"], "--pause: has no meaning with --image"),
    (["begin", "vm1", "--level", "inc", "--threshold", "lots"],
     '--threshold: "lots" is not a size such as 4096, 512k, 10M or 2G, within 0-1152921504606846976'),
    (["begin", "vm1", "--level", "inc", "--idle", "soon"], '--idle: "soon" is not a time such as 90s, 10m, 4h or 1d'),
    (["begin", "vm1", "--level", "auto"], "--level: auto needs --set DIR, or for what is no directory of this host "
     "--destination NAME, as s3://bucket/vm1"),
    (["run", "vm1", "--level", "full", "--", "true"], "--level: full needs --set DIR, or "),
    (["begin", "vm1", "--level", "diff", "--base", "last"], "--level: diff needs --set DIR, or "),
    (["begin", "vm1", "--level", "full", "--set", "s", "--destination", "d"], "--destination: contradicts --set"),
    (["begin", "vm1", "--level", "full", "--destination", "a\nb"],
     "--destination: has characters that cannot be printed"),
    (["commit", "vm1", "--destination", "d"], "unknown option --destination"),
])
def test_usage(words, reason):
    done = checkpoint(*words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"vnb-checkpoint: {reason}"), done.stderr
    assert "\nUsage:\n" in done.stderr
    assert done.stdout == ""


def test_no_libvirt_is_one_line(tmp_path):
    words = ["begin", "vm1", "--level", "copy", "-c", f"qemu:///system?socket={tmp_path}/none"]
    done = checkpoint(*words, tmp_path=tmp_path / "state")
    assert done.returncode == 1
    assert done.stderr.startswith(f"vnb-checkpoint: qemu:///system?socket={tmp_path}/none: Failed to connect socket")
    assert done.stderr.count("\n") == 1


def test_an_image_that_is_not_there_is_one_line(tmp_path):
    words = ["begin", "--image", f"vda={tmp_path}/none", "--level", "copy"]
    done = checkpoint(*words, tmp_path=tmp_path / "state")
    assert (done.returncode, done.stderr) == (1, f"vnb-checkpoint: vda: {tmp_path}/none: No such file or directory\n")


def test_password_file_is_needed_only_where_libvirt_asks(tmp_path):
    """A password is never an argument; that of a file that is not there is missed when it is asked for."""
    done = checkpoint("list", "vm1", "-c", "test:///default", "--user", "me", "--password-file", "/nonexistent")
    assert done.returncode == 1
    assert done.stderr == (
        "vnb-checkpoint: vm1: no such domain at test:///default (virsh -c test:///default list --all shows those that "
        "are)\n"
    )
