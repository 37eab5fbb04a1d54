# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A laboratory: a libvirtd of our own, and virtual machines whose disks are written as a guest would write them.

    with Lab() as lab:
        vm = lab.domain(Disk("vda", 64 * MiB), Disk("vdb", 64 * MiB, discard=True))     # defined and started
        vm.write("vda", 1 * MiB, 4 * MiB, pattern=0x22)     # or vm.write_random(disk, offset, length, seed)
        vm.zero("vda", 2 * MiB, 1 * MiB)                    # unmap=True: may punch a hole; vm.discard(...): TRIM
        lab.sh(f"vnb-checkpoint begin {vm.name} --level full --set ... | ... | vnb-pack -o {lab.path('set')}")
        reference = vm.reference()                          # {"vda": a raw image, ...}: the state now, by nbdcopy
        compare(reference["vda"], restored, "qcow2")
        assert lab.leftovers() == []

In tests, the fixture `lab` is the one Lab of the session, and `vm` a new machine of two small disks. On the command
line, `lab.py [--machine] COMMAND...` runs a command (without one, a shell) in a laboratory of its own; with --machine
vm1 runs there, which has such disks. guest.py has a machine that runs Linux and a guest agent.

As root, libvirt's directories are replaced by empty ones in a mount namespace that this process enters, so a
libvirtd that the user runs, its machines and its configuration are neither seen nor touched, and several laboratories
live side by side; where that is not allowed, a libvirtd that answers is used, or one is started in the usual
place. For other users XDG_RUNTIME_DIR and its like do the same for qemu:///session. All machines are
emulated (TCG): they are the same everywhere.

Everything that was started hangs on one process, the warden: it ends QEMU and libvirtd and removes all files when the
laboratory is closed, and also when the process that opened it is killed.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from xml.sax.saxutils import quoteattr

import libvirt
import libvirt_qemu

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ROOT / ".venv" / "bin"
DEADLINE = 60  # seconds for whatever should take one at most: the machine may be busy
NEW_MOUNTS = 0x00020000  # CLONE_NEWNS
MAKE_ALL_PRIVATE = 0x44000  # MS_PRIVATE | MS_REC
WRITE_SIZE = 32 * MiB  # QEMU's monitor does nothing else meanwhile

os.environ["PATH"] += ":/usr/sbin:/sbin"  # where libvirtd and mkfs are: not in the PATH of every user
libvirt.registerErrorHandler(lambda _context, _error: None, None)  # errors are raised, not printed


def wait_for(condition, what, deadline=DEADLINE):
    """Wait until condition() is true and return what it gave; after deadline seconds raise TimeoutError about what."""
    end = time.monotonic() + deadline
    while not (result := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {deadline} seconds")
        time.sleep(0.02)
    return result


def compare(reference, image, image_format):
    """Raise AssertionError unless image has the size and the content of the raw image reference."""
    size = virtual_size(image, image_format)
    assert size == os.path.getsize(reference), f"{image}: {size} bytes, the reference has {os.path.getsize(reference)}"
    done = subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", image_format, reference, image],
                          capture_output=True, text=True)
    assert done.returncode == 0, f"{image}: {done.stdout.strip()} {done.stderr.strip()}"


def virtual_size(image, image_format):
    """The size of the disk in an image file, in bytes."""
    return json.loads(run("qemu-img", "info", "-U", "-f", image_format, "--output=json", image))["virtual-size"]


def run(*command):
    """Run a tool that has to work, and return what it printed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


@dataclasses.dataclass
class Disk:
    """
    A virtual disk: a new image, or the existing file path.

    size in bytes; cluster_size in bytes or None; compat: "0.10" makes a qcow2 of version 2; backing (path or None): a
    qcow2 below this one; discard: what the guest trims is given back; filesystem (None, "ext4" or "xfs"): on the whole
    disk; bus: "virtio" or "scsi"; iothread: it, or the controller of all such disks, is on an iothread.
    """

    name: str
    size: int = 64 * MiB
    format: str = "qcow2"
    discard: bool = False
    cluster_size: int = None
    compat: str = None
    backing: str = None
    filesystem: str = None
    path: str = None
    bus: str = "virtio"
    iothread: bool = False

    def create(self, directory):
        if self.path is not None:
            return
        self.path = os.path.join(directory, f"{self.name}.{self.format}")
        wanted = {"cluster_size": self.cluster_size, "compat": self.compat}
        options = [f"{key}={value}" for key, value in wanted.items() if value]
        command = ["qemu-img", "create", "-q", "-f", self.format]
        if options:
            command += ["-o", ",".join(options)]
        if self.backing:
            command += ["-b", self.backing, "-F", "qcow2"]
        run(*command, self.path, self.size)
        if self.filesystem:
            with tempfile.NamedTemporaryFile(dir=directory) as raw:
                raw.truncate(self.size)
                run(f"mkfs.{self.filesystem}", "-q", raw.name)
                run("qemu-img", "convert", "-n", "-f", "raw", "-O", self.format, raw.name, self.path)

    def xml(self):
        discard = ' discard="unmap"' if self.discard else ""
        iothread = ' iothread="1"' if self.iothread and self.bus == "virtio" else ""
        block = Path(self.path).is_block_device()
        kind, attribute = ("block", "dev") if block else ("file", "file")
        return f"""
            <disk type="{kind}" device="disk">
              <driver name="qemu" type="{self.format}"{discard}{iothread}/>
              <source {attribute}={quoteattr(self.path)}/>
              <target dev="{self.name}" bus="{self.bus}"/>
            </disk>"""


class Domain:
    """
    A virtual machine of the laboratory; made by Lab.domain().

    name, uuid (str); directory (str): its images; disks (dict of Disk by name).
    """

    def __init__(self, lab, name, disks, extra_xml="", os_xml="", memory=32 * MiB):
        self.lab = lab
        self.name = name
        self.uuid = str(uuid.uuid4())
        self.directory = lab.path(name)
        os.mkdir(self.directory, mode=0o711)
        self.disks = {disk.name: disk for disk in disks}
        for disk in disks:
            disk.create(self.directory)
        self.files = set(os.listdir(self.directory))  # what is there besides these is a leftover
        self.extra_xml = extra_xml
        self.os_xml = os_xml
        self.memory = memory
        lab.connection.defineXML(self.xml())

    def xml(self):
        iothreads = "<iothreads>1</iothreads>" if any(disk.iothread for disk in self.disks.values()) else ""
        scsi = {disk.iothread for disk in self.disks.values() if disk.bus == "scsi"}
        driver = '<driver iothread="1"/>' if True in scsi else ""
        controller = f'<controller type="scsi" index="0" model="virtio-scsi">{driver}</controller>' if scsi else ""
        return f"""
            <domain type="qemu">
              <name>{self.name}</name>
              <uuid>{self.uuid}</uuid>
              <memory unit="b">{self.memory}</memory>
              {iothreads}
              <os><type arch="x86_64" machine="q35">hvm</type>{self.os_xml}</os>
              <features><acpi/></features>
              <on_poweroff>destroy</on_poweroff>
              <devices>
                {"".join(disk.xml() for disk in self.disks.values())}
                {controller}
                <controller type="usb" model="none"/>
                <memballoon model="none"/>
                {self.extra_xml}
              </devices>
            </domain>"""

    @property
    def handle(self):
        """The libvirt.virDomain."""
        return self.lab.connection.lookupByUUIDString(self.uuid)

    def start(self, paused=False):
        self.handle.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)
        return self

    def destroy(self):
        """Pull the plug; QEMU ends in order. Nothing happens to a machine that is off."""
        if self.is_active():
            self.handle.destroy()

    def kill(self):
        """Kill QEMU the hard way, and wait until libvirt has seen it."""
        os.kill(self.qemu_pid(), signal.SIGKILL)
        wait_for(lambda: not self.is_active(), f"{self.name}: end of QEMU")

    def remove(self):
        """Destroy and undefine it, with its checkpoints and images."""
        if self.exists():
            self.destroy()
            self.handle.undefineFlags(
                libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
                | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
                | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
            )
        shutil.rmtree(self.directory, ignore_errors=True)
        self.lab.domains.pop(self.name, None)

    def exists(self):
        return self.uuid in (domain.UUIDString() for domain in self.lab.connection.listAllDomains())

    def is_active(self):
        return bool(self.handle.isActive())

    def state(self):
        """One of libvirt.VIR_DOMAIN_RUNNING, _PAUSED, _SHUTOFF and so on, as a number."""
        return self.handle.state()[0]

    def qemu_pid(self):
        """The process id of its QEMU."""
        mark = f"guest={self.name},".encode()
        for pid, arguments in processes("cmdline"):
            if len(arguments) > 2 and arguments[2].startswith(mark) and b"qemu-system" in arguments[0]:
                return pid
        raise ProcessLookupError(f"{self.name}: no QEMU")

    def status_file(self):
        """Where libvirtd writes what it will want to know of it when it is started again, the job that runs too."""
        runtime = "/run" if os.geteuid() == 0 else os.environ["XDG_RUNTIME_DIR"]
        return f"{runtime}/libvirt/qemu/{'' if os.geteuid() == 0 else 'run/'}{self.name}.xml"

    def private_directory(self):
        """Where only QEMU's user and root look: its monitor's socket is there. None when it is off."""
        for state in self.lab.state_directories:
            for path in Path(state).glob(f"domain-{self.handle.ID()}-*"):
                return str(path)
        return None

    def hmp(self, command):
        """Say something to QEMU's human monitor and return the answer."""
        return libvirt_qemu.qemuMonitorCommand(self.handle, command, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)

    def qemu_io(self, disk, command):
        """Run a qemu-io(1) command on what the guest sees as this disk. Raises RuntimeError if it failed."""
        start = os.path.getsize(self.lab.log_file(self.name))
        answer = self._qemu_io(disk, command)

        def result():  # qemu-io speaks to QEMU's own standard output, and that is libvirt's log
            with open(self.lab.log_file(self.name)) as log:
                log.seek(start)
                return re.search(r"^(?:wrote|read|discard) (\d+)/(\d+) .*$|^.*failed.*$", log.read(), re.MULTILINE)

        found = wait_for(lambda: answer or result(), f"{self.name}: {disk}: {command}")
        if answer or found[1] is None or found[1] != found[2]:
            raise RuntimeError(f"{self.name}: {disk}: {command}: {answer or found[0]}")

    def _qemu_io(self, disk, command):
        number = list(self.disks).index(disk)
        return self.hmp(f'qemu-io -d /machine/peripheral/virtio-disk{number}/virtio-backend "{command}"').strip()

    def flush(self):
        """Flush the disks: what was not flushed may be lost with QEMU, which has a part of qcow2's tables in memory."""
        for disk in self.disks:
            answer = self._qemu_io(disk, "flush")
            if answer:
                raise RuntimeError(f"{self.name}: {disk}: flush: {answer}")

    def write(self, disk, offset, length, pattern=0x77):
        """Fill [offset, offset + length) of a disk with one byte, in bytes."""
        for at, size in pieces(offset, length):
            self.qemu_io(disk, f"write -P {pattern} {at} {size}")

    def write_random(self, disk, offset, length, seed=None):
        """Fill it with random bytes, the same for the same seed."""
        generator = random.Random(seed)
        for at, size in pieces(offset, length):
            self.write_bytes(disk, at, generator.randbytes(size))

    def write_bytes(self, disk, offset, data):
        """Write these bytes, at most WRITE_SIZE."""
        with tempfile.NamedTemporaryFile(dir=self.lab.directory) as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            self.qemu_io(disk, f"write -s {file.name} {offset} {len(data)}")

    def zero(self, disk, offset, length, unmap=False):
        """Write zeroes as a guest does that has a command for it; unmap: and lets the disk give the space back."""
        self.qemu_io(disk, f"write -z {'-u ' if unmap else ''}{offset} {length}")

    def discard(self, disk, offset, length):
        """Trim. Without Disk.discard nothing happens, as in life."""
        self.qemu_io(disk, f"discard {offset} {length}")

    def pause(self):
        self.handle.suspend()

    def resume(self):
        self.handle.resume()

    def reference(self, *names):
        """
        Copy the state of the disks at this moment, with no code of ours: dict of raw image by disk.

        A backup job of its own, without a checkpoint, exports the running machine's disks, and nbdcopy reads
        them. No other job may run, as libvirt allows one at a time.
        """
        names = names or list(self.disks)
        target = tempfile.mkdtemp(dir=self.lab.directory, prefix=f"{self.name}.reference.")
        socket = f"{self.private_directory()}/reference"
        disks = "".join(
            f'<disk name="{name}" backup="yes" type="file"><scratch file="{self.directory}/{name}.reference"/></disk>'
            if name in names else f'<disk name="{name}" backup="no"/>'
            for name in self.disks
        )
        server = f'<server transport="unix" socket="{socket}"/>'
        self.handle.backupBegin(f'<domainbackup mode="pull">{server}<disks>{disks}</disks></domainbackup>', None)
        try:
            for name in names:
                run("nbdcopy", f"nbd+unix:///{name}?socket={socket}", f"{target}/{name}.raw")
        finally:
            self.handle.abortJob()
            wait_for(lambda: not self.has_job(), f"{self.name}: end of the reference's job")
            for name in names:
                Path(self.directory, f"{name}.reference").unlink(missing_ok=True)
        return {name: f"{target}/{name}.raw" for name in names}

    def has_job(self):
        """True while a backup job runs, or begins, or ends."""
        try:
            return self.is_active() and self.handle.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE
        except libvirt.libvirtError as error:
            # "backup job data missing": libvirt knows that it has one, and not yet, or no more, how far it is. Or it is
            # busy with what QEMU has said of it.
            if error.get_error_code() in (libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_ERR_OPERATION_TIMEOUT):
                return True
            raise

    def checkpoints(self):
        """The names of its checkpoints, sorted."""
        return sorted(checkpoint.getName() for checkpoint in self.handle.listAllCheckpoints())

    def bitmaps(self, disk):
        """The names of the bitmaps in the image of a disk that is in use, sorted."""
        text = libvirt_qemu.qemuMonitorCommand(self.handle, '{"execute": "query-named-block-nodes"}', 0)
        found = set()
        for node in json.loads(text)["return"]:
            if node.get("file") == self.disks[disk].path:
                found |= {bitmap["name"] for bitmap in node.get("dirty-bitmaps", ()) if "name" in bitmap}
        return sorted(found)

    def leftovers(self):
        """What a backup should have taken away with it, as a list of lines: jobs, scratch files, sockets."""
        if not self.exists():
            return []
        found = [f"{self.name}: a job"] if self.has_job() else []
        found += [f"{self.directory}/{name}" for name in sorted(set(os.listdir(self.directory)) - self.files)]
        private = self.private_directory()
        if private:
            usual = {"master-key.aes", "monitor.sock"}
            found += [f"{private}/{name}" for name in sorted(set(os.listdir(private)) - usual)]
        return found


def pieces(offset, length):
    """Cut a range into requests of WRITE_SIZE."""
    while length > 0:
        size = min(length, WRITE_SIZE)
        yield offset, size
        offset += size
        length -= size


def processes(file):
    """Yield (pid, list of bytes) of a NUL-separated file in /proc, as cmdline or environ, for all that may be read."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                yield int(entry), Path("/proc", entry, file).read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended, or is not ours


class Lab:
    """
    A libvirtd and its machines, from entering it as a context until it is left.

    directory (str): its files, on a disk that has room; env (dict): the environment for commands; domains (dict
    of Domain by name).
    """

    def __init__(self):
        self.domains = {}
        self.warden = None
        self.count = 0
        self._connection = None

    def __enter__(self):
        self.directory = tempfile.mkdtemp(prefix="vnb-lab-", dir="/var/tmp")  # noqa: S108 -- /tmp may be memory
        os.chmod(self.directory, 0o711)  # noqa: S103 -- QEMU's user must get through
        try:
            private = isolate(self.path("l"))
            self.env = {key: value for key, value in os.environ.items() if not key.startswith("LIBVIRT_")}
            self.env.pop("PYTHONDONTWRITEBYTECODE", None)  # a pipeline starts five times, as fast as when installed
            self.env["PATH"] = f"{COMMANDS}:{self.env['PATH']}"
            # A client of qemu:///session that finds none would start a libvirtd that is nobody's.
            self.env["LIBVIRT_AUTOSTART"] = os.environ["LIBVIRT_AUTOSTART"] = "0"
            self.env["VNB_LAB"] = self.directory  # tells whose child a process is, whoever its parent is now
            self.env["VNB_STATE_DIR"] = self.path("state")
            self.state_directories, self.logs = libvirt_directories()
            if private or not answers():
                self._start_warden(private)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End all of it. What was left behind before is not asked about here: see leftovers()."""
        try:
            for domain in list(self.domains.values()):
                domain.remove()
        finally:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            if self.warden is not None:
                self.warden.stdin.close()
                self.warden.wait(DEADLINE)
                self.warden.stdout.close()
                self.warden = None
            else:
                clear(self.directory)

    def _start_warden(self, private):
        command = [sys.executable, __file__, "--warden", self.directory, "private" if private else "usual"]
        env = {key: value for key, value in self.env.items() if key != "VNB_LAB"}
        self.warden = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True,
                                       start_new_session=True)
        self._await_warden()

    def _await_warden(self):
        if self.warden.stdout.readline() != "ready\n":
            raise RuntimeError("libvirtd did not start")
        wait_for(answers, "libvirtd")

    @property
    def connection(self):
        """An open libvirt.virConnect; a new one after libvirtd was started again."""
        if self._connection is not None and not self._connection.isAlive():
            self._connection = None
        if self._connection is None:
            self._connection = libvirt.open()
        return self._connection

    def restart_libvirtd(self, **environment):
        """
        Kill libvirtd the hard way and start it again; machines go on. Skip the test where it is not our own.

        environment: variables (str) that it has from now on.
        """
        self._must_be_ours()
        self._connection = None
        print(json.dumps(environment), file=self.warden.stdin, flush=True)
        self._await_warden()

    def _must_be_ours(self):
        if self.warden is None:
            import pytest

            pytest.skip("libvirtd is not the laboratory's own")

    def libvirtd_pid(self):
        """The process id of our own libvirtd. Skips the test where it is not ours."""
        self._must_be_ours()
        return int(Path(self.path("libvirtd.pid")).read_text())

    def path(self, *names):
        """A path in the laboratory's directory."""
        return os.path.join(self.directory, *names)

    def new_directory(self, prefix="dir"):
        """Make a directory in the laboratory's directory, that only we may enter, and return its path."""
        return tempfile.mkdtemp(prefix=f"{prefix}.", dir=self.directory)

    def log_file(self, name):
        """What the QEMU of a machine says."""
        return f"{self.logs}/{name}.log"

    def domain(self, *disks, name=None, start=True, kind=Domain, **options):
        """Make a machine with these disks, without an operating system, and start it. options are Domain's."""
        self.count += 1
        name = name or f"lab-{os.getpid()}-{self.count}"
        domain = self.domains[name] = kind(self, name, disks, **options)
        return domain.start() if start else domain

    def sh(self, script, check=True, timeout=300, stdin=None, env=None):
        """
        Run a bash script with our commands in PATH and pipefail; return subprocess.CompletedProcess.

        stdout is bytes, stderr str. check: raise AssertionError with stderr unless it succeeds. stdin (bytes or
        None), env: added to the environment. After timeout seconds it is killed with all its children.
        """
        __tracebackhide__ = True  # pytest: what failed is the script
        process = subprocess.Popen(
            ["bash", "-c", "set -o pipefail\n" + script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**self.env, **(env or {})}, cwd=self.directory, start_new_session=True,
        )
        try:
            stdout, stderr = process.communicate(stdin, timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        done = subprocess.CompletedProcess(script, process.returncode, stdout, stderr.decode(errors="replace"))
        assert not check or done.returncode == 0, f"{script}: exit status {done.returncode}\n{done.stderr}"
        return done

    def processes(self):
        """Processes that our commands left, {pid: command line}: those with this laboratory in their environment."""
        ours = marked(self.directory)
        lines = {pid: b" ".join(line).decode(errors="replace").strip() for pid, line in processes("cmdline")}
        return {pid: lines[pid] for pid in ours if lines.get(pid)}

    def leftovers(self, patience=5):
        """
        What backups left behind, as a list of lines: processes, jobs, sockets, scratch files. [] is as it should be.

        A process that is about to end has patience seconds for it. Checkpoints are not asked about: a finished backup
        leaves one, see Domain.checkpoints().
        """
        def found():
            lines = [f"process {pid}: {line}" for pid, line in self.processes().items()]
            return lines + [line for domain in self.domains.values() for line in domain.leftovers()]

        end = time.monotonic() + patience
        while (lines := found()) and time.monotonic() < end:
            time.sleep(0.05)
        return lines


# Where libvirt keeps what.
SYSTEM_DIRECTORIES = {
    "etc": "/etc/libvirt", "run": "/run/libvirt", "lib": "/var/lib/libvirt", "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
}
SESSION_DIRECTORIES = {  # short names: the path of a socket has at most 107 bytes
    "e": "XDG_CONFIG_HOME", "r": "XDG_RUNTIME_DIR", "d": "XDG_DATA_HOME", "c": "XDG_CACHE_HOME",
}
LIBVIRTD_CONF = """\
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_rw_perms = "0700"
"""
LOG_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND
# Disks are written from files of the laboratory, that a security driver knows nothing about; QEMU's own mount namespace
# and what isolate() does to /dev/kvm do not go together; with a file for the output of QEMU no virtlogd is needed.
QEMU_CONF = """\
security_driver = "none"
namespaces = []
stdio_handler = "file"
"""


def isolate(directory):
    """
    Give this process and its children libvirt directories of their own. False: not possible.

    They are under directory. /dev/kvm is taken out of sight: there is one on machines where it does not work, and
    libvirt then looks QEMU over anew, for seconds, whenever a machine is defined or started.
    """
    os.mkdir(directory, mode=0o711)
    if os.geteuid() != 0:
        for name, variable in SESSION_DIRECTORIES.items():
            os.mkdir(f"{directory}/{name}", mode=0o700)
            os.environ[variable] = f"{directory}/{name}"
        configure(f"{directory}/e/libvirt")
        return True
    for place in SYSTEM_DIRECTORIES.values():
        os.makedirs(place, exist_ok=True)
    try:
        leave_mounts()
    except OSError:
        return False
    try:
        for name, place in SYSTEM_DIRECTORIES.items():
            os.mkdir(f"{directory}/{name}", mode=0o755)
            run("mount", "--bind", f"{directory}/{name}", place)
        if os.path.exists("/dev/kvm"):
            Path(directory, "no-kvm").touch(mode=0o600)
            run("mount", "--bind", f"{directory}/no-kvm", "/dev/kvm")
    except RuntimeError as error:
        print(f"lab: no libvirt directories of our own: {error}", file=sys.stderr)
        return False
    configure("/etc/libvirt")
    return True


def leave_mounts():
    """
    Give this process and its children a mount namespace of their own. Raises OSError where that is not allowed.

    Whatever they mount, nobody else sees. Our root may be a chroot: its directory is then no mount point, so nothing
    can be said about the mounts above it before we stand there.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    here = os.getcwd()
    _checked(libc.unshare(NEW_MOUNTS), "unshare")
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with open("/proc/thread-self/ns/mnt") as ours:
            _checked(libc.setns(ours.fileno(), NEW_MOUNTS), "setns")  # out of the chroot, in our own namespace
        try:
            _checked(libc.mount(None, b"/", None, MAKE_ALL_PRIVATE, None), "mount")
        finally:
            change_root(root, here)
    finally:
        os.close(root)


def change_root(root, here):
    """Make a directory (descriptor) the root directory, and here (str) the working directory."""
    os.fchdir(root)
    os.chroot(".")
    os.chdir(here)


def _checked(result, what):
    if result != 0:
        raise OSError(ctypes.get_errno(), what)


def configure(directory):
    os.makedirs(directory, exist_ok=True)
    Path(directory, "libvirtd.conf").write_text(LIBVIRTD_CONF)
    # Nothing is there until somebody makes certificates.
    os.mkdir(f"{directory}/pki", mode=0o755)
    Path(directory, "qemu.conf").write_text(f'{QEMU_CONF}backup_tls_x509_cert_dir = "{directory}/pki"\n')


def libvirt_directories():
    """Where machines have their private directories, and where the logs of QEMU are."""
    if os.geteuid() == 0:
        return ["/var/lib/libvirt/qemu"], "/var/log/libvirt/qemu"
    config = os.environ.get("XDG_CONFIG_HOME", os.path.expanduser("~/.config"))
    cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return [f"{config}/libvirt/qemu/lib"], f"{cache}/libvirt/qemu/log"


def answers():
    """True if libvirtd does, at libvirt's default URI. Does not start one."""
    runtime = "/run" if os.geteuid() == 0 else os.environ["XDG_RUNTIME_DIR"]
    if not os.path.exists(f"{runtime}/libvirt/libvirt-sock"):
        return False
    try:
        libvirt.open().close()
        return True
    except libvirt.libvirtError:
        return False


def marked(directory):
    """The processes that were started with Lab.env, as a set of pids."""
    mark = f"VNB_LAB={directory}".encode()
    return {pid for pid, environment in processes("environ") if mark in environment} - {os.getpid()}


def clear(directory):
    """Kill what still has the laboratory in its environment, and remove its files, and what is mounted there."""
    for pid in marked(directory):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        if (place := line.split()[4]).startswith(f"{directory}/"):
            subprocess.run(["umount", "-l", place], check=False)
    shutil.rmtree(directory, ignore_errors=True)


def warden(directory, place):
    """
    Keep a libvirtd until standard input ends, then end it, every QEMU that it started, and what clear() finds.

    QEMU leaves its parent; as a subreaper we become its parent, and whoever has us for a parent is ours to end. It also
    means that a dead QEMU goes away at once, for libvirtd waits for that, and not all first processes are quick.
    A line on standard input, JSON of variables: kill libvirtd and start another that has them in its environment.
    """
    set_child_subreaper = 36
    ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # ours is the end of standard input

    signal.signal(signal.SIGCHLD, lambda *_: reap())

    def spawn(name, *options):
        return os.posix_spawnp(name, [name, *options], os.environ, file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, f"{directory}/{name}.log", LOG_FLAGS, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ])

    def start():
        pid = spawn("libvirtd", *(["--pid-file", f"{directory}/libvirtd.pid"] if place == "private" else []))
        wait_for(lambda: answers() or not alive(pid), "libvirtd")
        print("ready" if alive(pid) else "failed", flush=True)
        return pid

    def end(pid, signum):
        if alive(pid):
            os.kill(pid, signum)
            wait_for(lambda: not alive(pid), "end of libvirtd")

    try:
        socket = Path("/run/libvirt/virtlogd-sock")
        virtlogd = None
        if place != "private" and os.geteuid() == 0 and not socket.exists():
            virtlogd = spawn("virtlogd")  # there the configuration is not ours, and asks for it
            wait_for(socket.exists, "virtlogd")
        libvirtd = start()
        for line in sys.stdin:
            os.environ.update(json.loads(line))
            end(libvirtd, signal.SIGKILL)
            libvirtd = start()
        end(libvirtd, signal.SIGTERM)  # their own way: they take their files in /run along
        if virtlogd is not None:
            end(virtlogd, signal.SIGTERM)
    finally:
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        while rest := [int(pid) for pid in children.read_text().split()]:
            for pid in rest:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        clear(directory)
    return 0


def reap():
    """Take notice of the children that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0] != 0:
            pass


def alive(pid):
    """True for a process that runs, or that its parent has taken no notice of."""
    return os.path.exists(f"/proc/{pid}")


def main(arguments):
    if arguments[:1] == ["--warden"]:
        return warden(*arguments[1:])
    if arguments[:1] in (["--help"], ["-h"]):
        print(__doc__.strip())
        return 0
    with Lab() as lab:
        if arguments[:1] == ["--machine"]:
            vm = lab.domain(Disk("vda", 64 * MiB), Disk("vdb", 64 * MiB, discard=True), name="vm1")
            vm.write_random("vda", 1 * MiB, 4 * MiB, seed=1)
            arguments = arguments[1:]
        return subprocess.run(arguments or [os.environ.get("SHELL", "bash")], env=lab.env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
