# SPDX-License-Identifier: LGPL-2.1-or-later
"""The examples that restore from several files: where one of them cannot be had, nothing is restored, not less."""

import os
import subprocess

import pytest
from applied import segments_of
from samples import ROOT

FULL, INCREMENT = segments_of([{"vda": "64k:A"}, {"vda": "64k:B"}])


def stub(directory, name, text):
    path = directory / name
    path.write_text(f"#!/bin/bash\ncd {directory}\n{text}")
    path.chmod(0o755)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name, program, text, arguments", [
    ("encrypted", "age", 'cat "${@: -1}"', ["restore", "key", "{target}", "1.full.vnb.age", "2.inc.vnb.age"]),
    ("from-s3", "aws", """case "$*" in *" ls "*) echo "- - - 1.full.vnb"; echo "- - - 2.inc.vnb" ;;
        *) cat "$(basename "${@: -2:1}").age" ;; esac""", ["s3://bucket/vm1", "{target}"]),
    ("to-rclone", "rclone", """case $1 in lsf) echo 1.full.vnb; echo 2.inc.vnb ;;
        cat) cat "$(basename "$2").age" ;; esac""", ["restore", "remote:vm1", "{target}"]),
    ("to-restic", "restic", """case "$*" in *snapshots*complete,full*) echo '"short_id":"1"' ;;
        *snapshots*) echo '"short_id":"1"'; echo '"short_id":"2"' ;; *) cat "$3".*.age ;; esac""",
     ["restore", "vm1", "{target}"]),
    ("volumes", "x", "", ["restore", "{target}", "1.full.vnb.age", "2.inc.vnb.age"]),
])
def test_a_file_that_cannot_be_had(tmp_path, name, program, text, arguments, whole):
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    stub(stubs, program, text)
    for file, content in (("1.full.vnb.age", FULL), ("2.inc.vnb.age", INCREMENT)):
        if whole or content is FULL:
            (stubs / file).write_bytes(content)
            (stubs / f"{file}.0000").write_bytes(content)
    argv = [word.format(target=tmp_path / "out") for word in arguments]
    done = subprocess.run([os.path.join(ROOT, "examples", name), *argv], capture_output=True, text=True, cwd=stubs,
                          env={**os.environ, "PATH": f"{stubs}:{os.environ['PATH']}"}, timeout=60)
    assert (done.returncode == 0) == whole, done.stderr
    assert (tmp_path / "out").exists() == whole
