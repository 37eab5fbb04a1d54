# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-map - serve a saved chain as block devices

Usage:
  vnb-map [options] [--disk NAME]...
      (--socket PATH | --listen ADDR | --fuse DIR | --device DEV | --run CMD)
      SET_OR_FILE...
  vnb-map --stop FILE [options]
  vnb-map --help | --version

Serves each disk as an NBD export with the name of the disk, and disks of
other restore points as NAME@POINT. Never writes to the saved segments.

Options:
  --socket PATH  serve on this Unix socket
  --listen ADDR  serve on TCP: HOST:PORT, or PORT on the loopback address
  --fuse DIR     serve each disk as a file DIR/NAME
  --device DEV   serve as this NBD device of the kernel, such as /dev/nbd0
  --run CMD      run this shell command with the URI in $uri, and end with it
  --disk NAME    serve only this disk; may be given several times
  --export-name NAME
                 give the export of the only disk this name
  --until POINT  serve this restore point: its name, or a time such as
                 2026-01-31T12:00; a time is local unless Z or +01:00 follows,
                 and can be cut short as in 2026-01-31; the default is the
                 latest restore point
  --writable     take writes to the one disk, and forget them at the end
  --overlay FILE
                 take writes to the one disk, and keep them in this qcow2 file
  --tls-certificates DIR
                 with --listen: serve only over TLS, to clients with a
                 certificate; DIR contains ca-cert.pem, server-cert.pem and
                 server-key.pem
  --tls-psk FILE
                 with --listen: serve only over TLS, to clients with a key
  --cache SIZE   use this much memory for decompressed data; the number may
                 end in k, M or G [default: 8M]
  --daemon FILE  go to the background when ready, and write the process id to
                 FILE
  --stop FILE    end the vnb-map that wrote FILE
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
import subprocess
import syslog

from vnb.base import locks, log
from vnb.base.errors import Error, Interrupted, UsageError, os_error
from vnb.base.processes import wait_for
from vnb.cli import arguments
from vnb.cli.runner import show
from vnb.serve.address import directory as fuse_directory
from vnb.serve.address import private_directory, tcp_address, unix_address
from vnb.serve.device import Device
from vnb.serve.fuse import Fuse
from vnb.serve.nbdkit import Nbdkit
from vnb.serve.overlay import Overlay

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


DEFAULT_HOST = "127.0.0.1"
MAX_CACHE = 1 << 40


def main(args: dict[str, Any]) -> int | None:
    if args["--stop"]:
        return stop(args["--stop"])
    check(args)
    if args["--daemon"]:
        return in_background(args)
    return serve(args, lambda lines: show("".join(f"{line}\n" for line in lines), flush=True))


def check(args: dict[str, Any]) -> None:
    """Raise UsageError for options that do not go together, Error for what is missing."""
    for option, needed, others in (
        ("--tls-certificates", "--listen", ("--tls-psk", "--overlay")),
        ("--tls-psk", "--listen", ("--overlay",)),
        ("--overlay", None, ("--writable",)),
        ("--daemon", None, ("--run",)),
    ):
        if args[option]:
            if needed and not args[needed]:
                raise UsageError(option, f"goes with {needed}")
            for other in others:
                if args[other]:
                    raise UsageError(option, f"does not go with {other}")
    if args["--listen"]:
        host_and_port(args["--listen"])
    arguments.size(args, "--cache", 0, MAX_CACHE)
    for path in tls_files(args):
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise os_error(path, error) from None


def tls_files(args: dict[str, Any]) -> Any:
    """The files without which nbdkit has no TLS; it would not name the one that is missing."""
    if args["--tls-certificates"]:
        names = ("ca-cert.pem", "server-cert.pem", "server-key.pem")
        return [os.path.join(args["--tls-certificates"], name) for name in names]
    return [args["--tls-psk"]] if args["--tls-psk"] else []


def host_and_port(text: str) -> tuple[str, int]:
    """(host, port) of PORT, HOST:PORT or [HOST]:PORT."""
    match = re.fullmatch(r"(?:(?:\[([^]]+)\]|([^]:[]*)):)?([0-9]{1,5})", text)
    if match is None or int(match[3]) > 65535:
        raise UsageError("--listen", f'"{text}" is not PORT or HOST:PORT')
    return match[1] or match[2] or DEFAULT_HOST, int(match[3])


def serve(args: dict[str, Any], ready: Callable[..., Any], to_syslog: bool = False) -> Any:
    """
    Serve until a signal comes, the command has ended, or nobody can be served any more. Returns the exit status.

    ready: called with the lines that say where the disks are. to_syslog: what goes
    wrong with a request later is for the system's log.
    """
    debug = args["--debug"]
    with contextlib.ExitStack() as stack:
        private = stack.enter_context(private_directory())
        address = stack.enter_context(address_of(args, private))
        below = address
        if args["--overlay"]:
            below = stack.enter_context(unix_address(os.path.join(private, Overlay.BELOW)))
        choice = {
            "operands": args["SET_OR_FILE"],
            "until": args["--until"],
            "disks": args["--disk"],
            "cache": arguments.size(args, "--cache", 0, MAX_CACHE),
            "export_name": None if args["--overlay"] else args["--export-name"],
            "all_points": not args["--writable"],  # the cow filter has one overlay for whatever is written to
        }
        nbdkit: Any = stack.enter_context(Nbdkit(below, choice, private, nbdkit_options(args), debug, to_syslog))
        below.close()
        served = nbdkit.ready()
        for line in served["damaged"]:
            log.warn(line)
        disks = served["disks"]
        running: list[Any] = [nbdkit]
        for option in ("--writable", "--overlay", "--device", "--export-name"):
            if args[option] and len(disks) != 1:
                raise Error(option, f"is for one disk: choose one of {', '.join(disks)} with --disk")
        if args["--overlay"]:
            ((name, size),) = disks.items()
            base = f'{name}@{served["point"]}'
            export = args["--export-name"] or name
            overlay = Overlay(address, args["--overlay"], base, export, size, private, debug)
            running.append(stack.enter_context(overlay))
            address.close()
            overlay.ready()
        if args["--run"]:
            return run(args["--run"], address.uri(args["--export-name"] or served["default"] or ""), str(address.where))
        uris = [address.uri(args["--export-name"] or name) for name in disks]
        lines = uris
        clients: list[Any] = []
        if args["--fuse"]:
            directory = stack.enter_context(fuse_directory(args["--fuse"]))
            lines = [os.path.join(directory, name) for name in disks]
            for path, uri in zip(lines, uris):
                clients.append(stack.enter_context(Fuse(path, uri, private, debug)))
            for file in clients:
                file.ready()
        elif args["--device"]:
            is_writable = bool(args["--writable"] or args["--overlay"])
            device: Any = stack.enter_context(Device(args["--device"], lines[0], is_writable, debug))
            device.ready()
            clients.append(device)
            lines = [args["--device"]]
        ready(lines)
        wait(running, clients)
        return 0


def wait(programs: Any, clients: Any) -> None:
    """Wait until every client has been ended by somebody else, if there are any. Raises Error when a server ends."""
    while True:
        ended = wait_for([program.fd for program in (*programs, *clients)])
        for server in programs:
            if server.fd == ended:
                raise server.failure()
        clients = [client for client in clients if client.fd != ended]
        if not clients:
            return


def address_of(args: dict[str, Any], private: str) -> Any:
    """A context manager of the Address to serve at."""
    if args["--listen"]:
        tls = args["--tls-certificates"] or args["--tls-psk"]
        return tcp_address(args["--listen"], *host_and_port(args["--listen"]), bool(tls))
    return unix_address(args["--socket"] or os.path.join(private, "socket"))


def nbdkit_options(args: dict[str, Any]) -> list[str]:
    """What nbdkit is to do beside the plugin."""
    options = []
    if args["--tls-certificates"]:
        # Without --tls-verify-peer any client would do, and all of the disk is in what it reads.
        options += ["--tls=require", f'--tls-certificates={args["--tls-certificates"]}', "--tls-verify-peer"]
    if args["--tls-psk"]:
        options += ["--tls=require", f'--tls-psk={args["--tls-psk"]}']
    return options + (["--filter=cow"] if args["--writable"] else ["--readonly"])


def run(command: str, uri: str, where: Any) -> Any:
    """Run a shell command to its end and return its exit status."""
    forward = Forward()
    with contextlib.ExitStack() as stack:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                stack.callback(signal.signal, signum, signal.signal(signum, forward))
        environment = {**os.environ, "uri": uri, "socket": where}
        return forward.run(["/bin/sh", "-c", command], environment)


class Forward:
    """
    Passes on the signals that are meant to end us to a command, and waits for it.

    At a terminal the command belongs to our process group, as the shell's own commands do: it may read the
    terminal, and the terminal interrupts it. Otherwise all that it has started gets what we get.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._signum: int | None = None
        self._has_terminal = os.isatty(0)

    def run(self, command: Sequence[str], environment: dict[str, str]) -> Any:
        """Returns the exit status of the command, as the shell has it. Raises Interrupted if a signal was passed on."""
        self._process = process = subprocess.Popen(
            command, env=environment, start_new_session=not self._has_terminal
        )
        if self._signum is not None:
            self(self._signum, None)
        status = process.wait()
        if self._signum is not None and status in (-self._signum, 128 + self._signum):
            raise Interrupted(self._signum)
        return status if status >= 0 else 128 - status

    def __call__(self, signum: int, _stack: object) -> None:
        self._signum = signum
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if not self._has_terminal:
                os.killpg(self._process.pid, signum)
            elif signum != signal.SIGINT:
                self._process.send_signal(signum)


def in_background(args: dict[str, Any]) -> Any:
    """Serve in a process of its own, that goes on when this one ends: as soon as all is ready, or has failed."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        os.setsid()
        to_syslog = not is_file(2)
        is_detached = False

        def ready(lines: Sequence[str]) -> Any:
            nonlocal is_detached
            detach(theirs, lines)
            is_detached = True

        try:
            with pid_file(args["--daemon"]):
                serve(args, ready, to_syslog)
        except Interrupted as interrupted:
            if interrupted.signum != signal.SIGTERM:
                raise
        except Error as error:
            if not (to_syslog and is_detached):
                raise
            syslog.openlog("vnb-map", syslog.LOG_PID, syslog.LOG_DAEMON)
            syslog.syslog(syslog.LOG_ERR, str(error))
            return 1
        return 0  # SIGTERM is how it is meant to end
    os.close(theirs)
    try:
        with open(ours) as file:
            lines = file.read()
        if not lines:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or 1
        show(lines, flush=True)
    except BaseException:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    return 0


def detach(pipe: int, lines: Sequence[str]) -> None:
    """Tell who started us what is ready, and let go of what we have from it, but for a file that is to hold errors."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1) if is_file(2) else (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    with open(pipe, "w") as file:
        print(*lines, sep="\n", file=file)


def is_file(fd: int) -> bool:
    """Whether this descriptor is of a regular file."""
    return stat.S_ISREG(os.fstat(fd).st_mode)


@contextlib.contextmanager
def pid_file(path: str) -> Iterator[Any]:
    """Have our process id in a file, locked, for as long as this lasts."""
    with contextlib.ExitStack() as stack:
        try:
            # Whoever can write to it decides which process --stop ends: a link, or another's file, is not for us.
            fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, fd)
            check_pid_file(path, fd)
            locks.take(fd)
            stack.callback(os.unlink, path)
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()}\n".encode())
        except BlockingIOError:
            raise Error(path, "is of a vnb-map that runs") from None
        except OSError as error:
            raise os_error(path, error) from None
        yield


def check_pid_file(path: str, fd: int) -> None:
    """Raise Error unless a file is ours, and of a kind that a process id may be in."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise Error(path, "not a regular file")
    if found.st_uid != os.geteuid():
        raise Error(path, "belongs to another user")


def stop(path: str) -> Any:
    """End the vnb-map that wrote this file, and wait until it has ended."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise os_error(path, error) from None
    try:
        check_pid_file(path, fd)
        said = os.read(fd, 20).strip()
        if not re.fullmatch(rb"[1-9][0-9]*", said):
            raise Error(path, "has no process id in it, so no vnb-map wrote it with --daemon")
        locks.take(fd, shared=True)
    except BlockingIOError:
        # Its lock says that it lives. It may have taken the file over since it was read.
        os.kill(int(os.pread(fd, 20, 0).strip() or said), signal.SIGTERM)
        locks.wait_for(fd, path, shared=True)
    else:
        raise Error(path, "the vnb-map that wrote this has ended")
    finally:
        os.close(fd)
