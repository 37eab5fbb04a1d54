# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The clients of an export, as the kernel lists the connections that were made to its sockets.

A QEMU that is told to stop its NBD server while a client is in its handshake may never come back: 7.2 then waits for
that client where it does not hear it (iohandler's context, while it polls the main one), older ones crash
(CVE-2024-7409). So a job must not be ended before its clients are through with it, or gone.
"""

import contextlib
import os
import time

HANDSHAKE_SECONDS = 11  # QEMU hangs up on clients that have not ended theirs after ten (NBD_DEFAULT_HANDSHAKE_MAX_SECS)
LOOK_SECONDS = 0.05  # nothing tells when a connection of others ends
_LISTENS = 0x10000  # __SO_ACCEPTCON of linux/net.h
# States of net/tcp_states.h in /proc/net/tcp. Of those that QEMU has closed nothing is left but the kernel's part.
_TCP_OPEN = ("01", "03", "08")  # established, also those that were not yet accepted; syn received; the client hung up
_TCP_LISTEN = "0A"
LISTS = {False: ("/proc/net/unix",), True: ("/proc/net/tcp", "/proc/net/tcp6")}  # by whether it is TCP


def read_lists(is_tcp):
    """The kernel's lists of this host's sockets, as text. Raises OSError."""
    text = ""
    for path in LISTS[is_tcp]:
        with open(path, encoding="utf-8", errors="replace") as file:
            text += file.read()
    return text


def clients_of(endpoint, is_tcp, sockets=()):
    """The Clients of an endpoint, as vnb.endpoint has its key (str), and of more unix sockets."""
    if is_tcp:
        return Clients(port=int(endpoint.rpartition(":")[2]))
    return Clients([endpoint, *sockets])


class Clients:
    """
    Connections to unix sockets (paths, list of str), or to a TCP port (int), and for how long they have been there.

    Seconds are those of time.monotonic().
    """

    def __init__(self, paths=(), port=None):
        self.is_tcp = port is not None
        self._paths = frozenset(paths)
        self._port = port
        self._since = {}  # when each was first seen, by inode
        self._waiting = 0  # those that QEMU has not accepted yet: they have no inode

    def look(self, lists, now):
        """How many there are by the kernel's lists (str); None where nobody listens there: it is another's kernel."""
        found, listens = [], False
        for line in lists.splitlines():
            inode, is_listener = (self._in_tcp if self.is_tcp else self._in_unix)(line)
            listens = listens or is_listener
            if inode is not None:
                found.append(inode)
        self._waiting = found.count(0)
        self._since = {inode: self._since.get(inode, now) for inode in found if inode != 0}
        return len(found) if listens else None

    def in_handshake(self, now):
        """Whether, by the last look, one may not have ended its handshake."""
        return self._waiting > 0 or any(now - since < HANDSHAKE_SECONDS for since in self._since.values())

    def shut_out(self, blindly=True):
        """
        On this host: let nobody connect any more, where that can be done, and wait for those who are about to.

        blindly: see wait_for_handshakes().
        """
        for path in self._paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
        self.wait_for_handshakes(lambda: read_lists(self.is_tcp), blindly)

    def wait_for_handshakes(self, read, blindly):
        """
        Wait until no client is in its handshake. read: a function that gives the kernel's lists as text, None for none.

        blindly (bool): where they do not tell, wait for as long as one may take.
        """
        begin = now = time.monotonic()
        while (left := begin + HANDSHAKE_SECONDS - now) > 0:
            lists = read()
            if lists is None or self.look(lists, now) is None:
                if blindly:
                    time.sleep(max(0, begin + HANDSHAKE_SECONDS - time.monotonic()))
                return
            if not self.in_handshake(now):
                return
            time.sleep(min(LOOK_SECONDS, left))
            now = time.monotonic()

    def _in_unix(self, line):
        """(inode of a connection or None, whether it is a listener)"""
        # Num RefCount Protocol Flags Type St Inode Path
        fields = line.split(None, 7)
        if len(fields) < 8 or fields[7] not in self._paths:
            return None, False
        if int(fields[3], 16) & _LISTENS:
            return None, True
        return int(fields[6]), False

    def _in_tcp(self, line):
        # sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode ...
        fields = line.split()
        if len(fields) < 10 or not fields[0].endswith(":") or int(fields[1].rpartition(":")[2], 16) != self._port:
            return None, False
        if fields[3] == _TCP_LISTEN:
            return None, True
        return (int(fields[9]) if fields[3] in _TCP_OPEN else None), False
