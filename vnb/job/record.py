# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The record of a job: all that whoever finds it after a crash needs to end it. It is on disk before anything is asked of
libvirt, and what has to be undone is written into it before it is done.

It is a map in JSON. Whoever changes its meaning gives it another VERSION: a program that ends a job by a record that
it misunderstands may leave a guest frozen.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import NamedTuple

from vnb.base.errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vnb.format.types import Disk, Head

VERSION = 1


class Phase(str, enum.Enum):
    """How far a job is."""

    STARTING = "starting"  # nothing of its segment was read
    RUNNING = "running"
    ENDED = "ended"  # all is undone, but perhaps for a thaw


class Server(NamedTuple):
    """A program that the job has started. start: when, in ticks since boot, as pids are used again."""

    pid: int
    start: int | None


class Union(NamedTuple):
    """A bitmap that is the union of one over several layers. path: of the image that has it."""

    disk: str
    path: str
    bitmap: str


class Added(NamedTuple):
    """An image that the checkpoint's bitmap was added to."""

    disk: str
    path: str


class Started(NamedTuple):
    """A domain that was started for the job: libvirt's number of it, and a mark in its live XML."""

    id: int
    mark: str


@dataclasses.dataclass
class Record:
    """
    owner: see vnb.job.state.owner(). kind: of the source, "running", "stopped" or "images". head, disks: of the stream.
    uri: libvirt's, not the default of whoever ends the job; None for images. ssh: see vnb.base.ssh.Host.of_uri().
    images: {disk: path}. catalog: the arguments of vnb.store.catalog.Catalog. endpoint, tcp: where QEMU listens.
    reason: why it has ended. strict: warnings, where they are to be no success. trouble: why it does not end.
    broken: older bitmaps are of no use. stuck: the guest had been stopped by an error before.

    What has to be undone: scratch, its files, which we have made ourselves where scratch_made. frozen, suspended:
    libvirt's number of the domain that we froze or suspended. started, servers, sockets, unions, added.
    """

    head: Head
    owner: dict[str, Any]
    kind: str = "images"
    disks: list[Disk] = dataclasses.field(default_factory=list)
    uri: str | None = None
    user: str | None = None
    password_file: str | None = None
    ssh: dict[str, Any] = dataclasses.field(default_factory=dict)
    images: dict[str, str] | None = None
    catalog: dict[str, str | None] = dataclasses.field(default_factory=dict)
    endpoint: str = ""
    tcp: bool = False
    phase: Phase = Phase.STARTING
    reason: str | None = None
    strict: int | None = None
    trouble: str | None = None
    broken: bool = False
    stuck: bool = False
    scratch: list[str] = dataclasses.field(default_factory=list)
    scratch_made: bool = False
    frozen: int | None = None
    suspended: int | None = None
    started: Started | None = None
    servers: list[Server] = dataclasses.field(default_factory=list)
    sockets: list[str] = dataclasses.field(default_factory=list)
    unions: list[Union] = dataclasses.field(default_factory=list)
    added: list[Added] = dataclasses.field(default_factory=list)

    @property
    def has_ended(self) -> bool:
        return self.phase is Phase.ENDED

    def end(self, reason: str) -> None:
        """All is undone, but perhaps for a thaw. reason: why, kept for whoever asks later."""
        self.phase, self.reason = Phase.ENDED, reason

    def text(self) -> str:
        """As it stands on disk."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({"version": VERSION, **fields}, indent=1)


def parse(text: str, name: str) -> Record:
    """The record that stands on disk. name: of the file, for messages. Raises Error."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Error(name, f"cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise Error(name, "is no record of a job")
    version = found.pop("version", None)
    if version != VERSION:
        raise Error(
            name, f"is the record of a job of another version of vnb (version {version}, here {VERSION}): end the job "
            "with that one (vnb-checkpoint abort); if it is gone, end the job with virsh domjobabort, thaw the guest "
            "with virsh domfsthaw, and remove this file"
        )
    values = {}
    for key, check in _CHECKS.items():
        try:
            values[key] = check(found[key])
        except (KeyError, TypeError, ValueError, RecursionError):
            raise Error(name, f'is no record of a job: "{key}"') from None
    return Record(**values)


def _is(*types: type | None) -> Callable[[Any], Any]:
    """A check of a value's type; None stands for nothing."""
    def check(value: Any) -> Any:
        if type(value) not in [type(None) if kind is None else kind for kind in types]:
            raise TypeError
        return value

    return check


def _several(check: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    return lambda values: [check(value) for value in _is(list)(values)]


def _tuple(kind: Callable[..., Any], *checks: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda values: kind(*(check(value) for check, value in zip(checks, _of_length(len(checks), values))))


def _of_length(length: int, values: Any) -> list[Any]:
    if len(_is(list)(values)) != length:
        raise ValueError
    return values


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


def _owner(value: Any) -> Any:
    for key, check in (("host", _text), ("boot", _text), ("pid", _is(int)), ("start", _number)):
        check(_is(dict)(value)[key])
    return value


def _head(value: Any) -> Any:
    """What the end of a job needs of a head, which was checked when it was made."""
    for key in ("id", "domain", "uuid", "point", "level", "chain", "created"):
        _is(str)(_is(dict)(value)[key])
    for key in ("parent", "checkpoint"):
        _is(str, None)(value[key])
    return value


_text, _flag, _table, _number = _is(str), _is(bool), _is(dict), _is(int, None)
_CHECKS: dict[str, Callable[[Any], Any]] = {
    "head": _head, "owner": _owner, "kind": _text, "disks": _several(_table), "uri": _is(str, None),
    "user": _is(str, None), "password_file": _is(str, None), "ssh": _table, "images": _is(dict, None),
    "catalog": _table, "endpoint": _text, "tcp": _flag, "phase": Phase, "reason": _is(str, None), "strict": _number,
    "trouble": _is(str, None), "broken": _flag, "stuck": _flag, "scratch": _several(_text), "scratch_made": _flag,
    "frozen": _number, "suspended": _number, "started": _optional(_tuple(Started, _is(int), _text)),
    "servers": _several(_tuple(Server, _is(int), _number)), "sockets": _several(_text),
    "unions": _several(_tuple(Union, _text, _text, _text)), "added": _several(_tuple(Added, _text, _text)),
}
