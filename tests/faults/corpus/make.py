# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Makes the streams beside it, from which hostile ones are bred: what a real machine gives, at each stage, in few bytes.

    .venv/bin/python tests/faults/corpus/make.py

    disks.vnb, extents.vnb    a full backup as it leaves vnb-checkpoint and vnb-extents
    full.vnb, inc.vnb         that backup, and an increment with a disk that is new, packed with lz4 and zstd
    copy.vnb                  a machine that is off, with a kernel and an initrd
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "live"))

from lab import Disk, KiB, Lab  # noqa: E402 - it is found there

EXTRA = """
    <channel type="unix"><target type="virtio" name="org.qemu.guest_agent.0"/></channel>
    <graphics type="vnc" port="-1" passwd="secret"><listen type="address" address="127.0.0.1"/></graphics>
    <serial type="pty"/>"""


def pipeline(vm, level, codec, out, before=""):
    return (f"vnb-checkpoint run {vm.name} --level {level} --destination corpus --no-freeze -- '{before} vnb-extents | "
            f"tee {HERE}/extents.vnb | vnb-read | vnb-pack --compress {codec} > {HERE}/{out}.vnb'")


def main():
    with Lab() as lab:
        disks = Disk("vda", 256 * KiB, cluster_size=4096), Disk("vdb", 128 * KiB, "raw")
        vm = lab.domain(*disks, name="sample", extra_xml=EXTRA)
        vm.write("vda", 64 * KiB, 12 * KiB, pattern=0x41)
        vm.write_random("vda", 128 * KiB, 2 * KiB, seed=1)
        lab.sh(pipeline(vm, "full --include vda", "lz4", "full", f"tee {HERE}/disks.vnb |"))
        extents = (HERE / "extents.vnb").read_bytes()
        vm.write("vda", 0, 8 * KiB, pattern=0x42)
        vm.zero("vda", 64 * KiB, 4 * KiB, unmap=True)
        lab.sh(pipeline(vm, "inc --include vda --include vdb --raw", "zstd", "inc"))
        (HERE / "extents.vnb").write_bytes(extents)
        for name in ("kernel", "initrd"):
            Path(lab.path(name)).write_text(f"the {name}\n" * 20)
        os_xml = f"<kernel>{lab.path('kernel')}</kernel><initrd>{lab.path('initrd')}</initrd><cmdline>quiet</cmdline>"
        off = lab.domain(Disk("vda", 64 * KiB), name="off", os_xml=os_xml, start=False)
        lab.sh(f"vnb-checkpoint run {off.name} --level copy -- 'vnb-extents | vnb-read | vnb-pack > {HERE}/copy.vnb'")


if __name__ == "__main__":
    main()
