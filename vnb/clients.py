# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The clients of an export, as the kernel lists the connections that were made to its sockets.

A QEMU that is told to stop its NBD server while a client is in its handshake may never come back: 7.2 then waits for
that client where it does not hear it (iohandler's context, while it polls the main one), older ones crash
(CVE-2024-7409). So a job must not be ended before its clients are through with it, or gone.
"""

import contextlib
import os
import re
import time

HANDSHAKE_SECONDS = 11  # QEMU hangs up on clients that have not ended theirs after ten (NBD_DEFAULT_HANDSHAKE_MAX_SECS)
MOST_SECONDS = 2 * HANDSHAKE_SECONDS  # over TCP there may always be new ones
LOOK_SECONDS = 0.05  # nothing tells when a connection of others ends
LISTS = {False: ("/proc/net/unix",), True: ("/proc/net/tcp", "/proc/net/tcp6")}  # by whether it is TCP
_UNIX_LISTENS = 0x10000  # __SO_ACCEPTCON of linux/net.h
# States of net/tcp_states.h in /proc/net/tcp. Of those that QEMU has closed nothing is left but the kernel's part.
_TCP_OPEN = (0x01, 0x03, 0x08)  # established, also those that were not yet accepted; syn received; the client hung up
_TCP_LISTENS = 0x0A


def read_lists(is_tcp):
    """This kernel's lists of sockets, as text, None where that fails. A kernel without IPv6 has one less."""
    text = ""
    try:
        for path in filter(os.path.exists, LISTS[is_tcp]):
            with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                text += file.read()
    except OSError:
        return None  # no descriptor is left
    return text


def clients_of(endpoint, is_tcp, sockets=()):
    """The Clients of an endpoint, as vnb.endpoint has its key (str), and of more unix sockets."""
    if is_tcp:
        return Clients(port=int(endpoint.rpartition(":")[2]))
    return Clients([endpoint, *sockets])


class Clients:
    """
    Connections to unix sockets (paths, list of str), or to a TCP port (int) of any address, and since when they are.

    Seconds are those of time.monotonic(). Lines that are not the kernel's are passed over: the name of somebody's
    abstract socket may have line breaks in it.
    """

    def __init__(self, paths=(), port=None):
        self.is_tcp = port is not None
        self._paths = sorted(paths)
        if self.is_tcp:
            # sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode
            line = rf"^ *\d+: \w+:{port:04X} \w+:\w+ ([0-9A-F]{{2}}) \w+:\w+ \w+:\w+ \w+ +\d+ +\d+ (\d+)"
        else:
            # Num RefCount Protocol Flags Type St Inode Path
            names = "|".join(map(re.escape, self._paths))
            line = rf"^\w+: \w+ \w+ ([0-9A-F]+) \w+ \w+ +(\d+) ({names})$"
        self._line = re.compile(line, re.ASCII | re.MULTILINE)
        self._is_here = False  # whether it was ever listened there
        self._since = {}  # when each was first seen, by inode
        self._waiting = 0  # those that QEMU has not accepted yet: they have no inode

    def look(self, lists, now):
        """How many there are by the kernel's lists (str or None); None where these have never had a listener there."""
        if lists is None:
            return None
        found = []
        for line in self._line.finditer(lists):
            state, inode = int(line[1], 16), int(line[2])
            if state == _TCP_LISTENS if self.is_tcp else state & _UNIX_LISTENS:
                self._is_here = True
            elif not self.is_tcp or state in _TCP_OPEN:
                found.append(inode)
        self._waiting = found.count(0)
        self._since = {inode: self._since.get(inode, now) for inode in found if inode != 0}
        return len(found) if self._is_here else None

    def in_handshake(self, now):
        """Whether, by the last look, one may not have ended its handshake."""
        return self._waiting > 0 or any(now - since < HANDSHAKE_SECONDS for since in self._since.values())

    def shut_out(self, careful=True):
        """
        On this host: let nobody connect any more, where that can be done, and wait for those who are about to.

        careful: see wait_for_handshakes().
        """
        for path in self._paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
        self.wait_for_handshakes(lambda: read_lists(self.is_tcp), careful)

    def wait_for_handshakes(self, read, careful, pause=LOOK_SECONDS):
        """
        Wait until no client is in its handshake.

        read: a function that gives the kernel's lists as text, or None. pause (float): seconds until it is asked again.
        careful (bool): somebody may be about to connect, who is on no list yet: look twice; and where the lists do not
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
            time.sleep(pause)
            lists = read()
            now = time.monotonic()
        if careful or self.in_handshake(now):
            time.sleep(max(0, first + HANDSHAKE_SECONDS - now))
