# SPDX-License-Identifier: LGPL-2.1-or-later
"""Another host, through ssh(1): its files, its programs, and a socket of it forwarded to one of ours."""

from __future__ import annotations

import select
import shlex
import urllib.parse
from collections.abc import Iterable, Sequence

from vnb.base.errors import Error
from vnb.base.processes import Child, run

# A line that is down is noticed after half a minute: TCP alone would wait for a quarter of an hour.
OPTIONS = (
    "-oBatchMode=yes", "-oServerAliveInterval=10", "-oServerAliveCountMax=3", "-oConnectTimeout=30",
    # A master that other sessions share would outlive ours, with its forwarding.
    "-oControlMaster=no", "-oControlPath=none",
)
FORWARD = ("-oExitOnForwardFailure=yes", "-oStreamLocalBindMask=0177", "-oClearAllForwardings=no")
READY_SECONDS = 60
# Asked for the room in a directory, a line each; it ends with us, since its standard input does.
_ROOM = 'echo ready; while read -r directory; do stat -f -c "%a %S" -- "$directory" 2> /dev/null || echo - -; done'


class Host:
    """
    A host. destination: [user@]name, as ssh has it; options come before it. carries_libvirt:
    libvirt comes there by ssh as well, so it can be expected to work.

    Others than BatchMode's ways to log in are not tried: nobody is there to answer.
    """

    def __init__(self, destination: str, options: Iterable[str] = (), carries_libvirt: bool = False) -> None:
        self.carries_libvirt = carries_libvirt
        self.destination = destination
        self.options = list(options)

    @classmethod
    def of_uri(
        cls, uri: str, user: str | None = None, port: int | str | None = None, key: str | None = None,
    ) -> Host | None:
        """
        The host of libvirt's URI, None where it is ours.

        user, port, key: what ssh is to use instead of what is in the URI. From a URI that is not for
        ssh only the name of the host is taken.
        """
        parts = urllib.parse.urlsplit(uri)
        if not parts.netloc:
            return None
        name = parts.hostname or ""
        if not name or name.startswith("-"):
            raise Error(uri, "names no host")
        options = []
        is_ssh = parts.scheme.rpartition("+")[2] in ("ssh", "libssh", "libssh2")
        if is_ssh:
            query = dict(urllib.parse.parse_qsl(parts.query))
            user = user or (urllib.parse.unquote(parts.username) if parts.username else None)
            port = port or parts.port
            key = key or query.get("keyfile")
            if query.get("no_verify") == "1":
                options.append("-oStrictHostKeyChecking=no")
            if "known_hosts" in query:
                options.append(f"-oUserKnownHostsFile={query['known_hosts']}")
        if port:
            options.append(f"-p{port}")
        if key:
            options.append(f"-i{key}")
        if user:
            options.append(f"-l{user}")
        return cls(name, options, is_ssh)

    def argv(self, command: str, options: Sequence[str] = ()) -> list[str]:
        """The arguments of an ssh that runs a command, for a shell there."""
        return ["ssh", *OPTIONS, *self.options, *options, "--", self.destination, command]

    def run(self, what: str | None, *argv: str) -> bytes:
        """Run a program there, give its standard output. what: the object of an Error."""
        return run(what, *self.argv(shlex.join(argv)))

    def glob(self, what: str, pattern: str) -> list[str]:
        """The paths that match a pattern, which goes to a shell: it must hold no data. Raises Error."""
        found = run(what, *self.argv(f"for path in {pattern}; do printf '%s\\0' \"$path\"; done"))
        return [path for path in found.decode(errors="surrogateescape").split("\0") if path and path != pattern]

    def describe(self, path: str) -> tuple[int, int, str]:
        """(mode, size, SHA-256 as hexadecimal digits) of a regular file there. Raises Error."""
        name = shlex.quote(path)
        found = run(path, *self.argv(f"test -f {name} && stat -L -c '%a %s' -- {name} && sha256sum < {name}")).split()
        return int(found[0], 8) & 0o777, int(found[1]), found[2].decode()

    def read(self, path: str, limit: int) -> tuple[int, bytes]:
        """(mode, bytes) of a regular file or a block device there of at most limit bytes. Raises Error."""
        name = shlex.quote(path)
        # One byte more than the limit: a longer file is seen.
        found = run(path, *self.argv(
            f"{{ test -f {name} || test -b {name}; }} && stat -L -c %a -- {name} && head -c {limit + 1} -- {name}"
        ))
        mode, _, content = found.partition(b"\n")
        if len(content) > limit:
            raise Error(path, f"has more than {limit} bytes")
        return int(mode, 8) & 0o777, content


class Forward:
    """
    A unix socket here through which clients come to one there; and how much room its file systems have.

    It ends with us, even by SIGKILL. Raises Error where it does not work.
    """

    def __init__(self, host: Host, here: str, there: str) -> None:
        places = ":".join(path.replace("\\", "\\\\").replace(":", "\\:") for path in (here, there))
        self._asked: str | None = None
        self._room: dict[str, int | None] = {}
        self.child = Child(host.argv(_ROOM, [*FORWARD, "-L", places]), "openssh-client", talk=True)
        assert self.child.process.stdin is not None and self.child.process.stdout is not None
        self._questions, self._answers = self.child.process.stdin, self.child.process.stdout
        try:
            # Sockets that are to be forwarded are open before the session begins.
            if self._answer(READY_SECONDS) != "ready":
                if self.child.wait(1):
                    raise Error(host.destination, self.child.failure().reason)
                raise Error(host.destination, f"ssh did not connect within {READY_SECONDS} seconds")
        except BaseException:
            self.child.end()
            raise

    def room(self, directory: str) -> int | None:
        """Free bytes of a directory's file system, None while unknown. Never waits: asks for the next time."""
        if self._asked is not None:
            line = self._answer(0)
            if line is not None:
                blocks, _, size = line.partition(" ")
                self._room[self._asked] = int(blocks) * int(size) if blocks.isdigit() and size.isdigit() else None
                self._asked = None
        if self._asked is None and "\n" not in directory:
            try:
                self._questions.write(directory.encode(errors="surrogateescape") + b"\n")
                self._questions.flush()
            except BrokenPipeError:
                return None
            self._asked = directory
        return self._room.get(directory)

    def _answer(self, seconds: float) -> str | None:
        """A line, or None when none came within these seconds or will come."""
        if not select.select([self._answers], [], [], seconds)[0]:
            return None
        return self._answers.readline().decode(errors="replace").strip() or None
