# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tests of backups do again and again: back up, restore a point, hold it against a reference."""

import json
import os
import re
import signal
import socket
import struct
import subprocess

import libvirt
import libvirt_qemu
from lab import compare, run, wait_for

STORE = "vnb-extents | vnb-read | vnb-pack -z -o {set}"


def backup(lab, vm, level, directory, options="", check=True, store=STORE):
    """One backup by `run`, stored in a set; returns the finished process."""
    command = store.format(set=directory)
    return lab.sh(
        f"vnb-checkpoint run {vm.name} --level {level} --set {directory} {options} -- '{command}'", check=check
    )


def tip(lab, directory):
    """The checkpoint that the next increment starts from."""
    return lab.sh(f"vnb-cat --base {directory}").stdout.decode().strip()


def levels(directory):
    """The levels of a set's segments, in the order of their names: by time, within one chain."""
    names = sorted(name for name in os.listdir(directory) if name.endswith(".vnb"))
    return [re.search(r"\.(full|copy|inc|diff)\.", name)[1] for name in names]


def restores(lab, directory, reference, point=None):
    """Restore a point and hold every disk against its reference (dict of raw image by disk)."""
    target = lab.new_directory("restored")
    until = f"--until {point}" if point else ""
    lab.sh(f"vnb-cat {until} {directory} | vnb-apply {target}")
    # Beside an image there may be its data file.
    assert {name.partition(".")[0] for name in os.listdir(target)} == set(reference)
    for name, image in reference.items():
        compare(image, f"{target}/{name}.qcow2", "qcow2")


def snapshot(lab, vm):
    """Put an overlay onto vda, as an external snapshot does: its path."""
    overlay = lab.path(vm.name, "overlay.qcow2")
    vm.handle.snapshotCreateXML(
        f"<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{overlay}'/></disk>"
        "<disk name='vdb' snapshot='no'/></disks></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA,
    )
    vm.files.add("overlay.qcow2")
    return overlay


def listed(lab, vm, directory):
    """What vnb-checkpoint list says: {checkpoint: row}."""
    lines = lab.sh(f"vnb-checkpoint list {vm.name} --json --set {directory}").stdout.splitlines()
    return {row["checkpoint"]: row for row in map(json.loads, lines)}


def record(lab, vm):
    """The record of the machine's job in the state directory (dict), or None."""
    try:
        with open(lab.path("state", "jobs", vm.uuid, "job.json"), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None


def connected(job):
    """A socket that is connected to the export of a job (its record)."""
    if job["tcp"]:
        host, _, port = job["endpoint"].rpartition(":")
        return socket.create_connection((host, int(port)))
    client = socket.socket(socket.AF_UNIX)
    client.connect(job["endpoint"])
    return client


def in_handshake(job):
    """A connected socket that has heard the greeting, and does not answer."""
    client = connected(job)
    assert client.recv(8) == b"NBDMAGIC"
    client.recv(1000)
    return client


def deaf(job, disk="vda"):
    """
    A connected socket that has asked for all of a disk, and takes nothing of it.

    It speaks NBD: newstyle without padding, NBD_OPT_EXPORT_NAME, then reads of a MiB, more than its buffer holds.
    """
    client = connected(job)
    name = f"{disk}-{job['head']['id'][:8]}".encode()
    client.recv(18, socket.MSG_WAITALL)
    client.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name)
    client.recv(10, socket.MSG_WAITALL)
    for number in range(16):
        client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, number, number << 20, 1 << 20))
    client.recv(1, socket.MSG_PEEK)  # they come
    return client


def lose_job_data(lab, vm):
    """
    Have libvirt believe for ever that the machine has a backup job, of which it knows nothing.

    That is what a libvirtd leaves that died while it began one: it waits for a QEMU that stands still, and is killed.
    """
    qemu = vm.qemu_pid()
    server = f'<server transport="unix" socket="{vm.private_directory()}/lost"/>'
    scratch = f'<scratch file="{vm.private_directory()}/lost.scratch"/>'
    job = lab.path("lost.xml")
    with open(job, "w", encoding="utf-8") as file:
        file.write(f'<domainbackup mode="pull">{server}<disks><disk name="vda" type="file">{scratch}</disk></disks>'
                   "</domainbackup>")
    os.kill(qemu, signal.SIGSTOP)
    try:
        client = subprocess.Popen(["virsh", "backup-begin", vm.name, job], env=lab.env, stderr=subprocess.DEVNULL)
        wait_for(lambda: "async='backup'" in run("cat", vm.status_file()), "the job")
        lab.restart_libvirtd()
    finally:
        os.kill(qemu, signal.SIGCONT)
    client.wait()


def lose_bitmap(vm, disk, name):
    """As when QEMU could not store it."""
    query = '{"execute": "query-named-block-nodes"}'
    nodes = json.loads(libvirt_qemu.qemuMonitorCommand(vm.handle, query, 0))["return"]
    node, = (
        node["node-name"] for node in nodes
        if node["file"] == vm.disks[disk].path and name in [bitmap["name"] for bitmap in node.get("dirty-bitmaps", ())]
    )
    command = {"execute": "block-dirty-bitmap-remove", "arguments": {"node": node, "name": name}}
    libvirt_qemu.qemuMonitorCommand(vm.handle, json.dumps(command), 0)
