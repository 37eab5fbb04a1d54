# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-extents - ask NBD servers which extents are data, zero, hole and dirty

Usage:
  vnb-extents [options]
  vnb-extents [--name NAME] [--dirty BITMAP] [--parent POINT] [options] URI
  vnb-extents --help | --version

Reads a stream from vnb-checkpoint, and adds the extents of its disks. With a
URI, makes a stream of one disk from an NBD export.

Options:
  --name NAME     the name of the disk of URI [default: disk]
  --dirty BITMAP  write only what is dirty in this bitmap of the export
  --parent POINT  the base: the restore point since which the bitmap records
                  changes
"""

from __future__ import annotations

import collections
import functools

from vnb.base import log
from vnb.base.errors import Error, UsageError
from vnb.cli import output
from vnb.cli.stdio import stdin
from vnb.format import heads, rules
from vnb.format.frame import DATA
from vnb.format.runs import batches, joined
from vnb.nbd import block_status
from vnb.nbd.connections import MOST_OF_EXTENTS, Connections

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any



def writes_stream(_args: dict[str, Any]) -> bool:
    """Whether standard output gets a stream."""
    return True


def main(args: dict[str, Any]) -> None:
    # Output that the next stage has not taken yet is work for that stage. It may need the connection that we wait for.
    connections = Connections(MOST_OF_EXTENTS, is_used=lambda: output.unread(1) > 0, of_job=True)
    wait = functools.partial(connections.wait_for, give_back=True)
    if args["URI"]:
        log.name_run()
        walk, head = _from_uri(args, connections)
        _write(output.stdout(wait), head, [walk], (), connections)
        return
    out = output.stdout(wait)
    for segment in stdin(stage="disks", wait=wait):
        # We look at all disks before we write anything, so that a fault in one does not show hours later.
        walks = [_Walk(disk, connections) for disk in segment.disks]
        _write(out, segment.head, walks, segment, connections)


def _from_uri(args: dict[str, Any], connections: Connections) -> Any:
    """(walk, head) of a segment for an export that is in no stream."""
    name = args["--name"]
    if not rules.is_safe_name(name):
        raise UsageError("--name", f"a disk must not be named {name!r}")
    if bool(args["--dirty"]) != bool(args["--parent"]):
        raise UsageError("--dirty", "needs --parent, and --parent needs --dirty")
    source = {"uri": args["URI"]}
    if args["--dirty"]:
        source["dirty"] = f'qemu:dirty-bitmap:{args["--dirty"]}'
    disk = {"name": name, "size": None, "level": "inc" if args["--dirty"] else "full", "image": {}, "source": source}
    walk = _Walk(disk, connections)
    head = heads.new(domain=name, uuid=heads.uuid_of(name), level="inc" if args["--dirty"] else "copy",
                     parent=args["--parent"], stage="extents",
                     after=heads.created_of(args["--parent"]) if args["--parent"] else None)
    return walk, head


def _write(out: Any, head: Any, walks: Any, frames: Any, connections: Connections) -> None:
    """Write a segment: its frames (iterable), then the extents of all disks."""
    written = out.segment({**head, "stage": "extents"}, [walk.disk for walk in walks])
    for frame in frames:
        written.frame(frame)
    waiting = collections.deque(
        (walk, walk.runs(), _Batch(written, number)) for number, walk in enumerate(walks)
    )
    living: list[Any] = []
    while waiting or living:
        # Some disks at a time: as many as there are connections for, but one at least.
        while waiting and (
            not living or waiting[0][0].needs + sum(walk.needs for walk, _, _ in living) <= connections.most
        ):
            living.append(waiting.popleft())
        # Each disk gives one list in its turn, so that the next stage has work on all of them.
        for one in tuple(living):
            walk, lists, batch = one
            runs = next(lists, None)
            if runs is None:
                batch.flush()
                walk.close()
                living.remove(one)
            else:
                batch.add(runs)
        out.flush()
    written.end()


class _Walk:
    """
    The walk of one disk. It asks the server at once whether the server has the meta contexts that are needed.

    disk: as it goes into the stream; a size that is None becomes that of the export. needs: connections.
    """

    def __init__(self, disk: Any, connections: Connections) -> None:
        name, source = disk["name"], disk.get("source", {})
        if not isinstance(source.get("uri"), str):
            raise Error(name, "the stream does not say where this disk is exported")

        def context(what: str | None, required: bool = False) -> Any:
            return block_status.Context(connections, source["uri"], name, what, disk["size"], required)

        # Without base:allocation everything that is dirty is data. --no-sparse-detection asks for this.
        sparse = disk["level"] == "full" or source.get("sparse") is not False
        self._base = context(block_status.BASE_ALLOCATION if sparse else None)
        self._contexts = [self._base]
        self._dirty = None
        if disk["level"] != "full":
            if not isinstance(source.get("dirty"), str):
                raise Error(name, "the stream does not say which bitmap this disk has")
            self._dirty = context(source["dirty"], required=True)
            self._contexts = [self._dirty, self._base] if sparse else [self._dirty]
        for found in self._contexts:
            found.open()
        self.disk = {**disk, "size": self._contexts[0].size}
        self.needs = len(self._contexts)

    def runs(self) -> Iterator[list[int]]:
        """A generator of lists of (offset, length, state)."""
        if self._dirty is None:
            return block_status.allocation(self._base, self.disk["size"])
        return block_status.changes(self._dirty, self._base, self.disk["size"])

    def close(self) -> None:
        """Let go of the connections."""
        for context in self._contexts:
            context.close()


class _Batch:
    """
    Extents of one disk on their way into frames; neighbours with one state become one.

    Data is passed on at once, to be read. The last extent of another state waits for the next list, which may go on
    with the same state: an empty disk of many TiB is one hole.
    """

    def __init__(self, out: Any, disk: int) -> None:
        self.out = out
        self.disk = disk
        self._held: list[int] = []

    def add(self, runs: list[int]) -> None:
        """Take runs (flat list of offset, length, state, ...) that follow those before."""
        runs = joined(self._held + runs)
        keep = 3 if runs and runs[-1] != DATA else 0
        self._held = runs[len(runs) - keep :]
        self._put(runs[: len(runs) - keep])

    def flush(self) -> None:
        """Pass on what waits."""
        self._put(self._held)

    def _put(self, runs: list[int]) -> None:
        for batch in batches(runs):
            self.out.extents(self.disk, batch)
