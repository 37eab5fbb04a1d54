# SPDX-License-Identifier: LGPL-2.1-or-later
"""The peak memory of each stage on a disk of 1 TiB with a million extents."""

from pathlib import Path

SIZE = 1 << 40
LIMIT = 64 << 20  # DESIGN: of any stage, whatever the disk, the extents and the chain
MANY_EXTENTS = Path(__file__).with_name("many_extents.py")


def peaks(lab):
    """
    Send such a disk through all stages: {command: its peak in bytes, with that of its children}.

    vnb-map is asked for the extents of the first 64 GiB, and for data at both ends.
    """
    directory = lab.new_directory("peaks")

    def stage(command):
        name = command.split()[0]
        return f"/usr/bin/time -f %M -o {directory}/{name} {command}"

    big = f"{directory}/big.vnb"
    lab.sh(f"""
        nbdkit -U - -r python {MANY_EXTENTS} size={SIZE} --run '
            {stage('vnb-extents "$uri"')} | {stage("vnb-read")} | {stage("vnb-pack -z")} > {big}'
        {stage(f"vnb-cat {big}")} | {stage(f"vnb-apply --format raw {directory}/out")} || exit 1
        {stage("vnb-verify")} < {big} > /dev/null || exit 1
        {stage("vnb-dump")} < {big} > /dev/null || exit 1
        look='qemu-img map -f raw --max-length=64G "$uri" > /dev/null &&
            qemu-io -r -f raw -c "read 0 64k" -c "read -P 0 1023G 4k" "$uri" > /dev/null'
        {stage(f'vnb-map --run "$look" {big}')}
    """)
    found = {path.name: int(path.read_text().split()[-1]) << 10 for path in Path(directory).glob("vnb-*")}
    lab.sh(f"rm -r {directory}")
    return found
