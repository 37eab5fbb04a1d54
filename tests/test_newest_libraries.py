# SPDX-License-Identifier: LGPL-2.1-or-later
"""The newest releases of the libraries that setup.cfg allows: those of the distribution are older, by years."""

import os
import subprocess
import sys
from pathlib import Path

import makers
import pytest
from samples import ROOT
from servers import DEADLINE

NEWEST = Path(ROOT, ".venv", "newest")
PLAN = [{"vda": "64k:A 64k:- 32k:0", "vdb": "128k:? 64k:0"}, {"vda": "96k:. 32k:B", "vdb": "64k:C"}]


@pytest.fixture
def newest():
    """An environment in which Python finds them first."""
    if not (NEWEST / "xxhash").exists():
        pytest.skip("the newest libraries could not be had")
    environment = {**os.environ, "PYTHONPATH": str(NEWEST)}
    code = "import lz4, msgpack, xxhash, zstandard; print(*{m.__file__ for m in (lz4, msgpack, xxhash, zstandard)})"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert all(path.startswith(str(NEWEST)) for path in found.stdout.split())
    return environment


@pytest.mark.parametrize("codec", ["none", "lz4", "lz4:9", "zstd"])
def test_every_command_that_reads_or_writes_a_set(newest, tmp_path, codec):
    """Restores ended in a traceback, while backups went on: vnb-cat --head and --disk hash text."""
    makers.make_set(tmp_path / "made", PLAN)

    def sh(command):
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], env=newest, cwd=tmp_path, capture_output=True,
                              text=True, timeout=DEADLINE)
        assert (done.returncode, done.stderr) == (0, ""), command
        return done.stdout

    sh(f"vnb-cat made | vnb-pack --compress {codec} -o set")
    sh("vnb-verify set")
    sh("vnb-cat --head set | vnb-verify > /dev/null")
    sh("vnb-cat set | vnb-dump --json | vnb-dump --from-json | vnb-verify | vnb-apply --format raw whole")
    sh("vnb-cat --merge set | vnb-apply --format raw merged")
    sh("vnb-cat --disk vdb set | vnb-apply --format raw one")
    sh("vnb-dump --list set; vnb-dump --map set")
    sh("vnb-map --fuse map --daemon pid set && cp map/* . ; vnb-map --stop pid")
    sh("vnb-prune --keep-last 1 set && vnb-cat set | vnb-apply --format raw pruned")
    for name, content in makers.images(PLAN)[-1].items():
        for path in (f"whole/{name}.raw", f"merged/{name}.raw", f"pruned/{name}.raw", name):
            assert (tmp_path / path).read_bytes() == content, path
    assert (tmp_path / "one" / "vdb.raw").read_bytes() == makers.images(PLAN)[-1]["vdb"]
