# SPDX-License-Identifier: LGPL-2.1-or-later
"""Another host: an sshd of our own, by the name of hv, whose sessions are in the laboratory as we are."""

import contextlib
import fcntl
import os
import random
import shutil
import subprocess
from pathlib import Path

from lab import COMMANDS, run, wait_for

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
PRIVILEGES = Path("/run/sshd")  # sshd wants this directory to be there


class Privileges:
    """The directory that sshd wants: made if it is not there, and removed by who made it unless others have an sshd."""

    def __init__(self):
        self.made = False
        while True:
            with contextlib.suppress(FileExistsError):
                PRIVILEGES.mkdir(mode=0o755)
                self.made = True
            with contextlib.suppress(FileNotFoundError):  # its maker has just removed it
                self.fd = os.open(PRIVILEGES, os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(self.fd, fcntl.LOCK_SH)
                if os.path.samestat(os.fstat(self.fd), PRIVILEGES.stat()):
                    break
                os.close(self.fd)

    def close(self):
        with contextlib.suppress(BlockingIOError):
            if self.made:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                PRIVILEGES.rmdir()
        os.close(self.fd)


class Gate:
    """
    A filter in a pipeline that passes on the first bytes, and the rest when the gate is opened.

    path (str): of a FIFO that it makes. filter (str): for a script.
    """

    def __init__(self, path):
        self.path = path
        self.filter = f"(head -c 1000000; touch {path}.reached; cat {path}; cat)"
        os.mkfifo(path)

    def start(self, script, env):
        """Start a bash script (subprocess.Popen), and come back when its pipeline waits at the gate."""
        process = subprocess.Popen(["bash", "-c", script], env=env, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: os.path.exists(f"{self.path}.reached"), "the pipeline")
        return process

    def open(self):
        """Let the rest pass."""
        with open(self.path, "w"):
            pass


class Hypervisor:
    """
    address (str): where it listens. prefix (list of str): before the command, as ["ip", "netns", "exec", NAME].

    env (dict): with it `ssh hv` comes here, and so does libvirt's qemu+ssh://root@hv/system.
    """

    def __init__(self, lab, address="127.0.0.1", prefix=()):
        self.lab = lab
        self.address = address
        self.prefix = list(prefix)
        self.directory = lab.new_directory("ssh")
        self.privileges = Privileges() if os.geteuid() == 0 else None
        for key in ("host_key", "key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.path(key))
        shutil.copy(self.path("key.pub"), self.path("authorized_keys"))
        environment = {**lab.env, "PATH": f"{COMMANDS}:{os.environ['PATH']}"}
        settings = " ".join(f'"{name}={environment[name]}"' for name in ("PATH", "VNB_LAB", "VNB_STATE_DIR"))
        self.config = f"""
            ListenAddress {address}
            HostKey {self.path("host_key")}
            AuthorizedKeysFile {self.path("authorized_keys")}
            PidFile none
            StrictModes no
            UsePAM no
            PasswordAuthentication no
            PermitRootLogin prohibit-password
            SetEnv {settings}
        """
        self.env = {"PATH": f"{self.path('bin')}:{lab.env['PATH']}"}
        os.mkdir(self.path("bin"))
        wrapper = Path(self.path("bin"), "ssh")
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.path("config")} "$@"\n')
        wrapper.chmod(0o755)
        self.start()

    def path(self, name):
        return os.path.join(self.directory, name)

    def start(self):
        """Start sshd, on a port that is free."""
        while True:
            self.port = random.randrange(20000, 32000)
            Path(self.path("sshd_config")).write_text(f"Port {self.port}\n{self.config}")
            with open(self.path("sshd.log"), "ab") as log:
                self.started = Path(self.path("sshd.log")).read_bytes().count(b"Server listening on")
                self.sshd = subprocess.Popen([*self.prefix, SSHD, "-D", "-e", "-f", self.path("sshd_config")],
                                             stdin=subprocess.DEVNULL, stderr=log, env=self.lab.env)
            wait_for(lambda: self.sshd.poll() is not None or self.answers(), "sshd")
            if self.sshd.poll() is None:
                break
        Path(self.path("config")).write_text(f"""Host hv
            HostName {self.address}
            Port {self.port}
            IdentityFile {self.path("key")}
            IdentitiesOnly yes
            UserKnownHostsFile {self.path("known_hosts")}
            StrictHostKeyChecking accept-new
            LogLevel ERROR
        """)

    def answers(self):
        return Path(self.path("sshd.log")).read_bytes().count(b"Server listening on") > self.started

    def sessions(self):
        """The processes of sshd that serve a connection."""
        found = Path(f"/proc/{self.sshd.pid}/task/{self.sshd.pid}/children").read_text().split()
        return [int(pid) for pid in found]

    def cut(self):
        """Cut all connections."""
        for pid in self.sessions():
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                os.kill(int(child), 9)
            os.kill(pid, 9)

    def sh(self, script, check=True, **kwargs):
        """Run a script from which hv can be reached, see Lab.sh."""
        return self.lab.sh(script, check=check, env={**self.env, **kwargs.pop("env", {})}, **kwargs)

    def close(self):
        self.sshd.terminate()
        self.sshd.wait()
        if self.privileges:
            self.privileges.close()


class Network:
    """
    Two hosts and a line between them: network namespaces with an address each.

    here, there (list of str): what comes before a command that is to run on one of them. address (str): of there.
    """

    address = "10.99.99.1"

    def __init__(self):
        names = [f"vnb-{os.getpid()}-{side}" for side in ("here", "there")]
        self.here, self.there = (["ip", "netns", "exec", name] for name in names)
        self.names = names
        try:
            for name in names:
                run("ip", "netns", "add", name)
            run("ip", "-n", names[0], "link", "add", "line", "type", "veth", "peer", "name", "line", "netns", names[1])
            for name, address in zip(names, ("10.99.99.2", self.address)):
                run("ip", "-n", name, "address", "add", f"{address}/30", "dev", "line")
                run("ip", "-n", name, "link", "set", "lo", "up")
            self.up()
        except BaseException:
            self.close()
            raise

    def down(self):
        run("ip", "-n", self.names[1], "link", "set", "line", "down")

    def up(self):
        for name in self.names:
            run("ip", "-n", name, "link", "set", "line", "up")

    def close(self):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)
