# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The clients of an export, as the kernel lists the connections that were made to its sockets; and how they are cut.

When QEMU ends a backup job it waits until its NBD server has sent the replies that it has begun. Meanwhile neither its
monitor nor its guest goes on. So a client that does not read, since its own output hangs, stops the guest (QEMU 7.2,
10.0 and 11.1). QEMU 7.2 waits in the same way for a client that is in its handshake; older ones crash (CVE-2024-7409).
So nobody may be connected any more when a job is ended.

It does not help to have QEMU stop its server or remove the export. QEMU then shuts the connection down, and waits for
the reply all the same: the kernel says of a unix socket with a full buffer that the other end has hung up, but not that
it can be written to, and QEMU waits for the latter alone. So we cut the connections ourselves. pidfd_getfd(2) gives us
QEMU's end of each. We shut it down, and make its buffer so large that QEMU can write, and hears of the end. The client
reads what was sent to it, and then the end. Where we may not do that to QEMU, we take the client's end instead.

This file also runs on another host, as a program that needs nothing but Python: see main(). That may be Python 3.6,
which cannot import annotations from __future__: so types that it does not know stand in quotes.
"""

import contextlib
import json
import os
import re
import socket
import struct
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

CUT_SECONDS = 5  # for QEMU to notice that connections have ended: it takes milliseconds
HANDSHAKE_SECONDS = 11  # QEMU hangs up on clients that have not ended theirs after ten (NBD_DEFAULT_HANDSHAKE_MAX_SECS)
MOST_SECONDS = 2 * HANDSHAKE_SECONDS  # where connections cannot be cut, there may always be new ones
LOOK_SECONDS = 0.05  # nothing tells when a connection of others ends
LISTS = {False: ("/proc/net/unix",), True: ("/proc/net/tcp", "/proc/net/tcp6")}  # by whether it is TCP
_UNIX_LISTENS = 0x10000  # __SO_ACCEPTCON of linux/net.h
# States of net/tcp_states.h in /proc/net/tcp. Of those that QEMU has closed nothing is left but the kernel's part.
_TCP_OPEN = (0x01, 0x03, 0x08)  # established, also those that were not yet accepted; syn received; the client hung up
_TCP_LISTENS = 0x0A
_MAPPED = "0000000000000000FFFF0000"  # an IPv4 address as one of IPv6 starts so, in /proc/net/tcp6
_TCP_ENDS = re.compile(
    r"^ *\d+: (\w+:\w+) (\w+:\w+) \w+ (\w+):\w+ \w+:\w+ \w+ +\d+ +\d+ (\d+)", re.ASCII | re.MULTILINE
)
_PIDFD_OPEN, _PIDFD_GETFD = 434, 438  # system calls, by the same numbers on all machines but alpha
_SO_SNDBUFFORCE = 32
_HUGE = 1 << 30  # bytes: more than any buffer of a socket has
_WHOLE = 16 << 20  # bytes: more than a unix socket holds
# Of linux/netlink.h, linux/sock_diag.h and linux/unix_diag.h.
_NETLINK_SOCK_DIAG, _BY_FAMILY, _REQUEST, _DUMP = 4, 20, 1, 0x300
_PEER, _QUEUES = 2, 4  # attributes; each is asked for by the bit of its number


def read_lists(is_tcp: bool) -> "str | None":
    """This kernel's lists of sockets, as text, None where that fails. A kernel without IPv6 has one less."""
    text = ""
    try:
        for path in filter(os.path.exists, LISTS[is_tcp]):
            with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                text += file.read()
    except OSError:
        return None  # no descriptor is left
    return text


def clients_of(endpoint: str, is_tcp: bool, sockets: "Iterable[str]" = ()) -> "Clients":
    """The Clients of an endpoint, as vnb.nbd.endpoint has its key, and of more unix sockets."""
    if is_tcp:
        address, _, port = endpoint.rpartition(":")
        return Clients(port=int(port), address=address)
    return Clients([endpoint, *sockets])


def wait_blindly(careful: bool, since: float = 0) -> None:
    """Wait as long as a handshake may take that has lasted for some seconds (since); careful: see Clients."""
    if careful:
        time.sleep(max(0, HANDSHAKE_SECONDS - since))


class Clients:
    """
    Connections to unix sockets, by their paths, or to a TCP port of an address, and since when they are.

    address: a name, or what stands for all addresses: nobody else listens on the port then. Seconds are those of
    time.monotonic(). Lines that are not the kernel's are passed over: the name of somebody's abstract socket may have
    line breaks in it.
    """

    def __init__(self, paths: "Iterable[str]" = (), port: "int | None" = None, address: str = "") -> None:
        self.is_tcp = port is not None
        self._paths = sorted(paths)
        if self.is_tcp:
            # sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode
            local = f"(?:{'|'.join(_in_lists(address))}):{port:04X}"
            line = rf"^ *\d+: {local} \w+:\w+ ([0-9A-F]{{2}}) \w+:\w+ \w+:\w+ \w+ +\d+ +\d+ (\d+)"
        else:
            # Num RefCount Protocol Flags Type St Inode Path
            names = "|".join(map(re.escape, self._paths))
            line = rf"^\w+: \w+ \w+ ([0-9A-F]+) \w+ \w+ +(\d+) (?:{names})$"
        self._line = re.compile(line, re.ASCII | re.MULTILINE)
        self._is_here = False  # whether it was ever listened there
        self._listening: list[int] = []  # inodes of what listens there
        self._since: dict[int, float] = {}  # when each was first seen, by inode
        self._waiting = 0  # those that QEMU has not accepted yet: they have no inode

    def look(self, lists: "str | None", now: float) -> "int | None":
        """How many there are by the kernel's lists; None where these have never had a listener there."""
        if lists is None:
            return None
        found, self._listening = [], []
        for line in self._line.finditer(lists):
            state, inode = int(line[1], 16), int(line[2])
            if state == _TCP_LISTENS if self.is_tcp else state & _UNIX_LISTENS:
                self._listening.append(inode)
            elif not self.is_tcp or state in _TCP_OPEN:
                found.append(inode)
        self._is_here = self._is_here or bool(self._listening)
        self._waiting = found.count(0)
        self._since = {inode: self._since.get(inode, now) for inode in found if inode != 0}
        return len(found) if self._is_here else None

    def in_handshake(self, now: float) -> bool:
        """Whether, by the last look, one may not have ended its handshake."""
        return self._waiting > 0 or any(now - since < HANDSHAKE_SECONDS for since in self._since.values())

    def shut_out(self, careful: bool = True) -> int:
        """
        On this host: let nobody connect any more, cut the connections, and wait until they are gone.

        careful: see wait_for_handshakes(), which has to do for those that we may not cut. Returns how many of them have
        not taken what QEMU wants to send: to end the job would stop the guest.
        """
        for path in self._paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
        begin = now = time.monotonic()
        again = careful  # somebody may be about to connect
        while now - begin < CUT_SECONDS:
            lists = read_lists(self.is_tcp)
            count = self.look(lists, now)
            if count is None or count == 0 and not again:
                break
            again = again and count > 0
            self._cut(lists)
            time.sleep(LOOK_SECONDS)
            now = time.monotonic()
        else:
            careful = False  # what is there has been seen
        if count != 0:
            self.wait_for_handshakes(lambda: read_lists(self.is_tcp), careful)
            lists = read_lists(self.is_tcp)
            self.look(lists, time.monotonic())
            return len(self._stalled(lists))
        return 0

    def wait_for_handshakes(self, read: "Callable[[], str | None]", careful: bool) -> None:
        """
        Wait until no client is in its handshake.

        read: a function that gives the kernel's lists as text, or None.
        careful: somebody may be about to connect, who is on no list yet: look twice; and where the lists do not
        tell, wait for as long as a handshake may take.
        Where new ones come all the time that ends, too.
        """
        lists = read()
        first = now = time.monotonic()
        again = careful
        while self.look(lists, now) is not None:
            if not (again or self.in_handshake(now)) or now - first >= MOST_SECONDS:
                return
            again = False
            time.sleep(LOOK_SECONDS)
            lists = read()
            now = time.monotonic()
        wait_blindly(careful or self.in_handshake(now), now - first)

    def _cut(self, lists: "str | None") -> None:
        """
        Cut the connections of the last look, as far as we may.

        A unix socket has lost its name; a TCP port is closed: we shut its listener down. Then QEMU looks at that again
        and again, which costs it some time of a processor until the job has ended.
        """
        ours = set(self._since) | set(self._listening if self.is_tcp else ())
        refused = ours - _each(ours, _cut_server)
        if refused:
            peers = {inode: peer for inode, (peer, _) in self._ends(lists).items()}
            _each({peers[inode] for inode in refused if inode in peers}, _cut_client)

    def _stalled(self, lists: "str | None") -> "set[int]":
        """The connections of the last look, by inode, through which QEMU has not sent all that it wants to."""
        return {inode for inode, (_, queued) in self._ends(lists).items() if queued and inode in self._since}

    def _ends(self, lists: "str | None") -> "Mapping[int, tuple[int | None, int]]":
        """{inode: (inode of the other end or None, bytes that are not sent)} of the connections of this host."""
        if not self.is_tcp:
            return _unix_ends()
        inodes = {}
        for local, remote, queued, inode in _TCP_ENDS.findall((lists or "").replace(_MAPPED, "")):
            inodes[local, remote] = int(inode), int(queued, 16)
        return {
            inode: (inodes.get((remote, local), [None])[0], queued)
            for (local, remote), (inode, queued) in inodes.items()
        }


def _in_lists(address: str) -> "list[str]":
    """What an address looks like in the kernel's lists, as patterns."""
    if address in ("", "0.0.0.0"):  # noqa: S104 -- what QEMU was told
        return [r"[0-9A-F]{8}"]
    if address == "::":
        return [r"[0-9A-F]{32}"]
    found = set()
    with contextlib.suppress(OSError):  # a name that nobody knows any more
        for family, _, _, _, place in socket.getaddrinfo(address, None, type=socket.SOCK_STREAM):
            packed = socket.inet_pton(family, str(place[0]).partition("%")[0])
            found.add("".join(f"{word:08X}" for word in struct.unpack(f"={len(packed) // 4}I", packed)))
    return sorted(found) or ["x"]


def _each(inodes: "Iterable[int | None]", cut: "Callable[[socket.socket], bool]") -> "set[int]":
    """cut(socket) for the sockets of all processes that have these inodes; the inodes of those that were cut."""
    done = set()
    names = {f"socket:[{inode}]": inode for inode in inodes}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended, or is not ours
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    inode = names.get(os.readlink(f"/proc/{pid}/fd/{fd}"))
                    if inode is not None and _with_descriptor_of(int(pid), int(fd), inode, cut):
                        done.add(inode)
    return done


def _with_descriptor_of(pid: int, fd: int, inode: int, cut: "Callable[[socket.socket], bool]") -> bool:
    """cut(socket) for a process's socket, if its descriptor is still that; whether it was. Raises OSError."""
    process = _syscall(_PIDFD_OPEN, pid, 0)
    try:
        copy = _syscall(_PIDFD_GETFD, process, fd, 0)
    finally:
        os.close(process)
    if os.fstat(copy).st_ino != inode:
        os.close(copy)
        return False
    with socket.socket(fileno=copy) as found:
        return cut(found)


def _syscall(*arguments: int) -> int:
    import ctypes  # few need it

    result = _libc().syscall(*map(ctypes.c_long, arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _libc() -> "Any":
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def _cut_server(end: socket.socket) -> bool:
    """Shut QEMU's end down, and have a write that waits there go on; whether that could be done."""
    with contextlib.suppress(OSError):  # the client has hung up
        end.shutdown(socket.SHUT_RDWR)
    if end.family == socket.AF_UNIX:
        try:
            end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _HUGE)
        except PermissionError:
            return False  # it takes CAP_NET_ADMIN
    return True


def _cut_client(end: socket.socket) -> bool:
    """
    Shut a client's end down, and throw away what it has not read, at once: else it may take the rest for a whole reply.
    """
    with contextlib.suppress(OSError):  # the server has hung up
        end.shutdown(socket.SHUT_RDWR)
    if end.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            end.recv(_WHOLE, socket.MSG_DONTWAIT)  # nobody else reads meanwhile
    else:
        unspecified = bytes(16)
        _libc().connect(end.fileno(), unspecified, len(unspecified))  # resets it
    return True


def _unix_ends() -> "dict[int, tuple[int, int]]":
    """{inode: (inode of the other end, bytes that it has not read)} of unix sockets, as sock_diag(7) has them."""
    found: dict[int, tuple[int, int]] = {}
    with contextlib.suppress(OSError), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diag:
        # struct nlmsghdr; struct unix_diag_req: family, protocol, pad, states, inode, show, cookie
        request = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, 1 << _PEER | 1 << _QUEUES, 0, 0)
        diag.send(struct.pack("=IHHII", 16 + len(request), _BY_FAMILY, _REQUEST | _DUMP, 0, 0) + request)
        while True:
            answer = diag.recv(1 << 20)
            while answer:
                length, kind = struct.unpack_from("=IH", answer)
                if kind != _BY_FAMILY:
                    return found  # the last message, or an error
                inode, = struct.unpack_from("=I", answer, 20)  # struct unix_diag_msg, then attributes
                attributes, at = {}, 32
                while at < length:
                    size, name = struct.unpack_from("=HH", answer, at)
                    attributes[name] = at + 4
                    at += (size + 3) & ~3
                if _PEER in attributes:
                    peer, = struct.unpack_from("=I", answer, attributes[_PEER])
                    _, queued = struct.unpack_from("=II", answer, attributes[_QUEUES])
                    found[inode] = peer, queued
                answer = answer[(length + 3) & ~3:]
    return found


def main(endpoint: str, is_tcp: bool, careful: bool) -> None:
    """On another host: shut out the clients of an endpoint; prints what Clients.shut_out() returns."""
    print(clients_of(endpoint, is_tcp).shut_out(careful))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
