# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A small Linux for machines of the laboratory: a kernel, busybox, and the guest agent.

    vm = linux(lab, Disk("vda", 256 * MiB, filesystem="ext4"))      # booted; vda is mounted at /mnt/vda
    vm.run("echo hello > /mnt/vda/file; sync")
    vm.agent("guest-fsfreeze-status")

It is made of the distribution's packages, which are downloaded and taken apart, not installed, and kept in
~/.cache/vnb-lab. It boots in a few seconds without KVM. File systems, ext4 and xfs, that it finds on /dev/vdX are
mounted on /mnt/vdX. Freeze and thaw work, and a shutdown that is asked of the agent.
"""

import base64
import fcntl
import functools
import hashlib
import json
import lzma
import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import libvirt
import libvirt_qemu
import pytest
from lab import DEADLINE, Domain, MiB, run, wait_for

CACHE = Path.home() / ".cache" / "vnb-lab"
MODULES = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_console")  # with all that these need
XFS_MODULES = ("xfs",)  # put in where a disk has it; ext4 is built in
AGENT_PORT = "org.qemu.guest_agent.0"
INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /run
for module in /modules/*; do [ -f $module ] && insmod $module; done
for disk in /sys/block/vd*; do
    disk=${{disk##*/}}
    type=ext4
    if [ "$(head -c 4 /dev/$disk)" = XFSB ]; then
        type=xfs
        for module in /xfs/*; do [ -f $module ] && insmod $module; done
    fi
    mkdir -p /mnt/$disk
    mount -t $type /dev/$disk /mnt/$disk || rmdir /mnt/$disk
done
# QEMU tells the names of ports a little later
until port=$(grep -ls {AGENT_PORT} /sys/class/virtio-ports/*/name); do sleep 0.1; done
port=${{port%/name}}
while :; do qemu-ga -m virtio-serial -p /dev/${{port##*/}} -t /run; sleep 1; done
"""
SHUTDOWN = """#!/bin/sh
sync
umount -a -r
poweroff -f
"""


class Linux(Domain):
    """
    A machine that runs it.

    firmware (str): XML of loader and nvram, where it is not to be a BIOS. console (str): what it has said there is in
    this file.
    """

    def __init__(self, lab, name, disks, kernel, initrd, extra_xml="", firmware="", memory=192 * MiB):
        self.console = lab.path(f"{name}.console")
        os_xml = f"""{firmware}<kernel>{kernel}</kernel><initrd>{initrd}</initrd>
            <cmdline>console=ttyS0 quiet no_timer_check panic=-1 rdinit=/init</cmdline>"""
        extra_xml += f"""
            <serial type="file"><source path="{self.console}"/></serial>
            <channel type="unix"><target type="virtio" name="{AGENT_PORT}"/></channel>"""
        super().__init__(lab, name, disks, extra_xml=extra_xml, os_xml=os_xml, memory=memory)

    def start(self, paused=False):
        super().start(paused)
        return self if paused else self.wait_until_up()

    def wait_until_up(self):
        """Wait until the agent answers: then it has mounted its file systems."""
        try:
            wait_for(self._answers, f"{self.name}: guest agent", 2 * DEADLINE)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{Path(self.console).read_text(errors='replace')}") from None
        return self

    def _answers(self):
        try:
            self.agent("guest-ping", timeout=2)
            return True
        except libvirt.libvirtError:
            return False

    def agent(self, command, timeout=DEADLINE, **arguments):
        """Say something to the guest agent and return its answer."""
        message = json.dumps({"execute": command, "arguments": arguments} if arguments else {"execute": command})
        return json.loads(libvirt_qemu.qemuAgentCommand(self.handle, message, timeout, 0))["return"]

    def run(self, script):
        """Run a shell script in the guest and return its standard output. Raises RuntimeError when it fails."""
        pid = self.agent("guest-exec", path="/bin/sh", arg=["-c", script], **{"capture-output": True})["pid"]

        def status():
            found = self.agent("guest-exec-status", pid=pid)
            return found if found["exited"] else None

        done = wait_for(status, f"{self.name}: {script}")
        if done.get("exitcode") != 0:
            error = base64.b64decode(done.get("err-data", "")).decode(errors="replace")
            raise RuntimeError(f"{self.name}: {script}: exit status {done.get('exitcode')}: {error}")
        return base64.b64decode(done.get("out-data", "")).decode(errors="replace")


def linux(lab, *disks, name=None, start=True, **options):
    """Make a machine that runs Linux, and boot it. Skips the test where its packages cannot be had."""
    kernel, initrd = images(lab)
    return lab.domain(*disks, name=name, start=start, kind=Linux, kernel=kernel, initrd=initrd, **options)


@functools.lru_cache
def images(lab):
    """Copies of kernel and initrd where QEMU's user can read them; libvirt makes it their owner."""
    os.makedirs(CACHE, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until they are copied: tests of another tree remove others
        try:
            kept = build()
        except RuntimeError as error:
            pytest.skip(f"no Linux for the laboratory: {error}")
        return [shutil.copy(kept / file, lab.path(file)) for file in ("vmlinuz", "initrd")]


def build():
    """Make kernel and initrd, unless they are there; return their directory."""
    directory = CACHE / hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    if not directory.exists():
        for old in CACHE.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            made = Path(temporary, "made")
            made.mkdir()
            download(temporary)
            assemble(Path(temporary, "root"), made)
            made.rename(directory)
    return directory


def download(directory):
    """Get the packages and take them apart under directory/root."""
    depends = run("apt-cache", "depends", "linux-image-cloud-amd64")
    found = re.search(r"Depends: (linux-image-\d\S*)", depends)
    if found is None:
        raise RuntimeError("linux-image-cloud-amd64: no such package, or no package lists")
    done = subprocess.run(["apt-get", "download", "-q", found[1], "qemu-guest-agent", "busybox-static"],
                          cwd=directory, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    for package in Path(directory).glob("*.deb"):
        run("dpkg", "-x", package, f"{directory}/root")


def assemble(root, target):
    """Put vmlinuz and initrd into target, from what the packages have."""
    shutil.copy(next(root.glob("boot/vmlinuz-*")), target / "vmlinuz")
    agent = root / "usr/sbin/qemu-ga"
    busybox = next(path for path in (root / "bin/busybox", root / "usr/bin/busybox") if path.exists())
    files = {
        "init": INIT.encode(), "sbin/shutdown": SHUTDOWN.encode(), "bin/sh": None,
        "bin/busybox": busybox.read_bytes(), "bin/qemu-ga": agent.read_bytes(),
    }
    for directory, names in ("modules", MODULES), ("xfs", XFS_MODULES):
        for number, module in enumerate(modules(root, names)):
            files[f"{directory}/{number:02}.ko"] = module
    linked = run("ldd", agent)
    if "not found" in linked:
        raise RuntimeError(f"qemu-guest-agent: this host lacks a library of it: {linked}")
    for library in re.findall(r"(/\S+) \(0x", linked):
        files[library.lstrip("/")] = Path(library).read_bytes()
    directories = {"proc", "sys", "dev", "run", "mnt", "tmp", "etc", "var"}
    for name in files:
        directories |= {str(parent) for parent in Path(name).parents} - {"."}
    with open(target / "initrd", "wb") as archive:
        for number, name in enumerate(sorted(directories) + sorted(files), start=1):
            if name in directories:
                add(archive, number, name, stat.S_IFDIR | 0o755, b"")
            elif files[name] is None:
                add(archive, number, name, stat.S_IFLNK | 0o777, b"busybox")
            else:
                add(archive, number, name, stat.S_IFREG | 0o755, files[name])
        add(archive, 0, "TRAILER!!!", 0, b"")


def modules(root, names):
    """The content of these modules, and of all that they need, in the order to put them in; none that is built in."""
    builtin = {Path(line).stem for path in root.rglob("modules.builtin") for line in path.read_text().splitlines()}
    found = {}

    def put(name):
        if name in found or {name, name.replace("_", "-")} & builtin:
            return
        path = next(root.rglob(f"{name.replace('_', '[-_]')}.ko*"))
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        for needed in re.search(rb"\0depends=([^\0]*)\0", content)[1].decode().split(","):
            if needed:
                put(needed)
        found[name] = content

    for name in names:
        put(name)
    return list(found.values())


def add(archive, inode, name, mode, data):
    """A file of a cpio archive as the kernel reads it, "newc": 14 fields, name and data, each padded to 4 bytes."""
    encoded = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    archive.write(header + encoded + bytes(-(len(header) + len(encoded)) % 4))
    archive.write(data + bytes(-len(data) % 4))
