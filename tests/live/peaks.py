# SPDX-License-Identifier: LGPL-2.1-or-later
"""The peak memory of each stage on a disk of 1 TiB with a million extents."""

import sys
from pathlib import Path

SIZE = 1 << 40
LIMIT = 64 << 20  # DESIGN: of any stage, whatever the disk, the extents and the chain
MANY_EXTENTS = Path(__file__).with_name("many_extents.py")


def peaks(lab):
    """
    Send such a disk through all stages: {command: its peak in bytes, with that of its children}.

    vnb-map is asked for all its extents, and for data at both ends.
    """
    directory = lab.new_directory("peaks")

    def stage(command):
        name = command.split()[0]
        return f"/usr/bin/time -f %M -o {directory}/{name} {command}"

    big = f"{directory}/big.vnb"
    map_ = f"vnb-map --run '{sys.executable} {__file__} $uri' {big}"
    lab.sh(f"""
        nbdkit -U - -r python {MANY_EXTENTS} size={SIZE} --run '
            {stage('vnb-extents "$uri"')} | {stage("vnb-read")} | {stage("vnb-pack -z")} > {big}'
        {stage(f"vnb-cat {big}")} | {stage(f"vnb-apply --format raw {directory}/out")} || exit 1
        {stage("vnb-verify")} < {big} > /dev/null || exit 1
        {stage("vnb-dump")} < {big} > /dev/null || exit 1
        {stage(map_)}
    """)
    found = {path.name: int(path.read_text().split()[-1]) << 10 for path in Path(directory).glob("vnb-*")}
    lab.sh(f"rm -r {directory}")
    return found


def walk(uri):
    """Ask for all extents of an export and for its first and last bytes, and keep nothing: nbdinfo keeps all."""
    import nbd

    extents = 0
    offset = 0

    def add(_context, _offset, entries, _error):
        nonlocal extents, offset
        extents += len(entries) // 2
        offset += sum(entries[::2])

    client = nbd.NBD()
    client.add_meta_context("base:allocation")
    client.connect_uri(uri)
    while offset < SIZE:
        client.block_status(min(SIZE - offset, 1 << 31), offset, add)
    client.pread(1 << 20, 0)
    client.pread(1 << 20, SIZE - (1 << 20))
    client.shutdown()
    if extents < 1_000_000:
        sys.exit(f"{extents} extents only")


if __name__ == "__main__":
    walk(sys.argv[1])
