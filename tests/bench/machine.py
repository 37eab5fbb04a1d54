# SPDX-License-Identifier: LGPL-2.1-or-later
"""Of running machines: backups beside nbdcopy and virtnbdbackup, restores beside cp, nbdcopy and qemu-img."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

from lab import Disk, MiB, run, wait_for
from turns import Group, python, script

# What virtnbdrestore's verification does; the Debian package has none yet.
ADLER = """
import sys, time, zlib
start, sum_, left = time.monotonic(), 1, int(sys.argv[2])
with open(sys.argv[1], "rb") as file:
    while left and (block := file.read(1 << 20)):
        sum_ = zlib.adler32(block, sum_)
        left -= len(block)
print(time.monotonic() - start)
"""
# read(2) and the hash alone, in blocks as large as the frames.
XXH3 = """
import os, sys, time
from xxhash import xxh3_64_intdigest
start = time.monotonic()
buffer = memoryview(bytearray(512 << 10))
file = os.open(sys.argv[1], os.O_RDONLY)
while count := os.readv(file, [buffer]):
    xxh3_64_intdigest(buffer[:count])
print(time.monotonic() - start)
"""
PEER = shutil.which("virtnbdbackup")
LIKE = "as virtnbdbackup's"


class Machine:
    """A running machine, and what is done with it. handle: of libvirt."""

    def __init__(self, lab, *disks):
        self.lab = lab
        self.vm = lab.domain(*disks)

    def pipeline(self, last, level="full", options="--destination bench"):
        """Back up by a pipeline that ends in last: seconds."""
        start = f"vnb-checkpoint run {self.vm.name} --level {level} {options}"
        return script(self.lab, f"{start} -- 'vnb-extents | {last}'")

    def to_set(self, directory, pack="vnb-pack", level="full"):
        return self.pipeline(f"vnb-read | {pack} -o {directory}/set", level, f"--set {directory}/set")

    def porcelain(self, directory, options=""):
        return script(self.lab, f"vnb-backup {options} {self.vm.name} {directory}/set")

    def on_job(self, text):
        """The seconds that a script takes on an export, $uri; the job around it is not in them."""
        with self.job() as uri:
            return script(self.lab, f"uri='{uri}'; {text}")

    @contextlib.contextmanager
    def job(self):
        """A backup job that vnb-checkpoint did not begin: the URI of its export."""
        directory = self.vm.private_directory()
        scratch = f"{self.vm.directory}/bench.scratch"
        self.vm.handle.backupBegin(
            f"""<domainbackup mode="pull"><server transport="unix" socket="{directory}/bench"/><disks>
            <disk name="vda" backup="yes" type="file"><scratch file="{scratch}"/></disk></disks></domainbackup>""",
            None,
        )
        try:
            yield f"nbd+unix:///vda?socket={directory}/bench"
        finally:
            self.vm.handle.abortJob()
            wait_for(lambda: not self.vm.has_job(), "end of job")
            Path(scratch).unlink(missing_ok=True)

    def virtnbdbackup(self, directory, level="full", options=""):
        """A backup by the tool that users know: seconds."""
        uri = "qemu:///system" if os.geteuid() == 0 else "qemu:///session"
        return script(self.lab, f"virtnbdbackup -n -U {uri} -d {self.vm.name} -l {level} {options} -o {directory}/out"
                                f" && sync {directory}/out/*")

    def alone(self, function, *arguments):
        """Call a function where no checkpoint is: virtnbdbackup refuses a full backup beside those of others."""
        self.delete_checkpoints()
        try:
            return function(*arguments)
        finally:
            self.delete_checkpoints()

    def delete_checkpoints(self):
        for checkpoint in self.vm.handle.listAllCheckpoints():
            checkpoint.delete()

    def increment(self, back_up, directory, *arguments):
        """The seconds of the second of two backups, with nothing written in between."""
        back_up(directory)
        return back_up(directory, *arguments)


def groups(lab, data):
    """Yield the Groups. data (int): bytes of random data in the machine's disk, that is twice as large."""
    machine = Machine(lab, Disk("vda", 2 * data))
    machine.vm.write_random("vda", 0, data)
    yield from _backups(machine, data)
    yield from _restores(machine, data)
    machine.vm.destroy()
    yield from _compressible(lab, data)
    yield from _several_disks(lab, data)


def _backups(machine, data):
    whole = "vnb-checkpoint run, > FILE"
    yield Group("full backup of a running domain", data, {
        "nbdcopy --flush, of a job made before": lambda at: machine.on_job(f'nbdcopy --flush "$uri" {at}/raw'),
        "vnb-extents | vnb-read > FILE, of the same": lambda at: machine.on_job(
            f'vnb-extents "$uri" | vnb-read > {at}/vnb && sync {at}/vnb'),
        whole: lambda at: machine.pipeline(f"vnb-read > {at}/vnb && sync {at}/vnb"),
        "vnb-checkpoint run, vnb-pack > FILE": lambda at: machine.pipeline(
            f"vnb-read | vnb-pack > {at}/vnb && sync {at}/vnb"),
        "vnb-checkpoint run, vnb-pack -o SET": machine.to_set,
    }, {whole: 1.0})
    yield Group("read to nothing", data, {
        "nbdcopy": lambda at: machine.on_job('nbdcopy "$uri" null:'),
        "vnb-extents | vnb-read": lambda at: machine.on_job('vnb-extents "$uri" | vnb-read > /dev/null'),
    })
    jobs = {"vnb-backup": lambda at: machine.alone(machine.porcelain, at)}
    idle = {"vnb-backup": lambda at: machine.increment(machine.porcelain, at)}
    if PEER:
        jobs = {"virtnbdbackup": lambda at: machine.alone(machine.virtnbdbackup, at),
                whole: lambda at: machine.alone(machine.pipeline, f"vnb-read > {at}/vnb && sync {at}/vnb"), **jobs,
                "virtnbdbackup -z": lambda at: machine.alone(machine.virtnbdbackup, at, "full", "-z"),
                "vnb-backup, lz4": lambda at: machine.alone(machine.porcelain, at, "--compress lz4")}
        idle = {"virtnbdbackup": lambda at: machine.alone(machine.increment, machine.virtnbdbackup, at, "inc"), **idle}
    yield Group("full backup beside virtnbdbackup", data, jobs, {whole: 0.17} if PEER else {})
    yield Group("increment of an idle domain", 0, idle, {"vnb-backup": 0.33} if PEER else {}, {"vnb-backup": 0.5})


def _restores(machine, data):
    lab = machine.lab
    raw = machine.vm.reference()["vda"]
    plain, packed = lab.path("plain"), lab.path("packed")
    for directory, pack in ((plain, "vnb-pack"), (packed, "vnb-pack -z")):
        machine.pipeline(f"vnb-read | {pack} -o {directory}", "copy")

    def restore(source, directory, image_format):
        out = f"{directory}/r"
        return script(lab, f"vnb-cat {source} | vnb-apply --format {image_format} {out} && sync {out}/*")

    def to_qcow2(directory):
        run("qemu-img", "create", "-q", "-f", "qcow2", f"{directory}/q", 2 * data)
        return script(lab, f"nbdcopy --flush {raw} -- [ qemu-nbd -f qcow2 {directory}/q ]")

    jobs = {
        "nbdcopy --flush to qemu-nbd": to_qcow2,
        "vnb-cat | vnb-apply": lambda at: restore(plain, at, "qcow2"),
        "vnb-cat | vnb-apply, compressed set": lambda at: restore(packed, at, "qcow2"),
        "qemu-img convert": lambda at: script(lab, f"qemu-img convert -f raw -O qcow2 {raw} {at}/q && sync {at}/q"),
    }
    if shutil.which("virtnbdrestore"):
        machine.alone(machine.virtnbdbackup, theirs := lab.new_directory("theirs"))
        jobs["virtnbdrestore"] = lambda at: script(
            lab, f"virtnbdrestore -i {theirs}/out -o {at}/r && sync {at}/r/*")
    yield Group("restore to qcow2", data, jobs, {"vnb-cat | vnb-apply": 1.0})
    yield Group("restore to raw", data, {
        "cp --sparse=always": lambda at: script(lab, f"cp --sparse=always {raw} {at}/raw && sync {at}/raw"),
        "vnb-cat | vnb-apply": lambda at: restore(plain, at, "raw"),
        "vnb-cat | vnb-apply, compressed set": lambda at: restore(packed, at, "raw"),
    }, {"vnb-cat | vnb-apply": 1.2})
    yield Group("read of the map, in order", data, {
        "nbdkit file": lambda at: script(lab, f"nbdkit -U - -r file {raw} --run 'nbdcopy \"$uri\" null:'"),
        "vnb-map": lambda at: script(lab, f"vnb-map --run 'nbdcopy \"$uri\" null:' {plain}"),
        "vnb-map, compressed set": lambda at: script(lab, f"vnb-map --run 'nbdcopy \"$uri\" null:' {packed}"),
    })
    yield Group("verify", data, {
        "read(2) and xxh3 alone": lambda at: python(lab, XXH3, f"{plain}/*.vnb"),
        "vnb-verify": lambda at: script(lab, f"vnb-verify < {plain}/*.vnb > /dev/null"),
        "vnb-verify, compressed set": lambda at: script(lab, f"vnb-verify < {packed}/*.vnb > /dev/null"),
        "Adler-32 over the file": lambda at: python(lab, ADLER, raw, data),
        "sha1sum": lambda at: script(lab, f"sha1sum {plain}/*.vnb"),
    }, {"vnb-verify": 1.43})  # 70 % of what one core can do


def _compressible(lab, data):
    """What disks of machines hold: programs, text, and blocks of zeroes that were written."""
    raw, path = lab.path("filled.raw"), lab.path("filled.qcow2")
    parts = subprocess.Popen(["tar", "-c", "-C", "/", "usr/lib", "usr/share"], stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL)
    with parts, open(raw, "wb") as file:
        block = MiB
        for number in range(data // block):
            # A quarter of it zeroes, in turn with the rest.
            content = bytes(block) if number % 4 == 3 else parts.stdout.read(block).ljust(block, b"\1")
            file.write(content)
        file.truncate(2 * data)
        parts.kill()
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-S", "0", raw, path)
    os.unlink(raw)
    machine = Machine(lab, Disk("vda", 2 * data, path=path))
    yield Group("full backup, programs, text and zeroes", data, {
        "vnb-pack -o SET": machine.to_set,
        "vnb-pack -z -o SET": lambda at: machine.to_set(at, "vnb-pack -z"),
        "vnb-pack --compress zstd -o SET": lambda at: machine.to_set(at, "vnb-pack --compress zstd"),
    }, {"vnb-pack -z -o SET": 1.0})
    machine.vm.destroy()


def _several_disks(lab, data):
    one = Machine(lab, Disk("vda", 2 * data))
    one.vm.write_random("vda", 0, data)
    four = Machine(lab, *(Disk(name, data // 2) for name in ("vda", "vdb", "vdc", "vdd")))
    for name in four.vm.disks:
        four.vm.write_random(name, 0, data // 4)
    yield Group("full backup of several disks", data, {
        "all data in one disk": one.to_set, "in four disks": four.to_set,
    }, {"in four disks": 1.0})
