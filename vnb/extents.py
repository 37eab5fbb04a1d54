# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-extents - ask NBD servers which extents are data, zero, hole and dirty

Usage:
  vnb-extents [options]
  vnb-extents [--name NAME] [--dirty BITMAP] [--parent POINT] [options] URI
  vnb-extents --help | --version

Reads a stream from vnb-checkpoint and adds the extents of its disks; or makes
a stream of one disk from an NBD export.

Options:
  --name NAME     what to call the disk of URI [default: disk]
  --dirty BITMAP  only what is dirty in this bitmap of the export
  --parent POINT  the point that the bitmap counts from
"""

from operator import eq

from vnb import export, heads, log, output, stream
from vnb.errors import Error, UsageError
from vnb.frame import DATA, MAX_EXTENTS


def main(args):
    if args["URI"]:
        log.name_run()
        disk, head = _from_uri(args)
        _write(output.stdout(), head, [disk], ())
        return
    out = output.stdout()
    for segment in stream.stdin(stage="disks"):
        _write(out, segment.head, segment.disks, segment)


def _from_uri(args):
    """(disk, head) for an export that no stream speaks of."""
    name = args["--name"]
    if not stream.is_safe_name(name):
        raise UsageError("--name", f"a disk must not be named {name!r}")
    if bool(args["--dirty"]) != bool(args["--parent"]):
        raise UsageError("--dirty", "needs --parent, and --parent needs --dirty")
    source = {"uri": args["URI"]}
    if args["--dirty"]:
        source["dirty"] = f'qemu:dirty-bitmap:{args["--dirty"]}'
    connection = export.Connection(source["uri"], name)
    connection.close()
    disk = {"name": name, "size": connection.size, "level": "inc" if args["--dirty"] else "full", "image": {},
            "source": source}
    head = heads.new(domain=name, uuid=heads.uuid_of(name), level="inc" if args["--dirty"] else "copy",
                     parent=args["--parent"], stage="extents",
                     after=heads.created_of(args["--parent"]) if args["--parent"] else None)
    return disk, head


def _write(out, head, disks, frames):
    """Write a segment: its frames (iterable), then the extents of all disks."""
    walks = [_walk(disk) for disk in disks]
    written = out.segment({**head, "stage": "extents"}, disks)
    for frame in frames:
        written.frame(frame)
    batches = [_Batch(written, number) for number in range(len(disks))]
    living = list(zip(walks, batches))
    while living:
        # In turn, a list each, so that whoever reads the data has work on all disks.
        for walk, batch in tuple(living):
            runs = next(walk, None)
            if runs is None:
                batch.flush()
                living.remove((walk, batch))
            else:
                batch.add(runs)
        out.flush()
    written.end()


def _walk(disk):
    """A generator of lists of (offset, length, state); the server is asked for its contexts at once."""
    name, source = disk["name"], disk.get("source", {})
    if not isinstance(source.get("uri"), str):
        raise Error(name, "the stream does not say where this disk is exported")
    # Who does not want to wait for a slow base:allocation has all that is dirty read: without it everything is data.
    sparse = disk["level"] == "full" or source.get("sparse") is not False
    base = export.Connection(source["uri"], name, export.BASE_ALLOCATION if sparse else None)
    if base.size != disk["size"]:
        raise Error(name, f'the export has {base.size} bytes, the stream says {disk["size"]}')
    if disk["level"] == "full":
        return export.allocation(base, disk["size"])
    if not isinstance(source.get("dirty"), str):
        raise Error(name, "the stream does not say which bitmap this disk has")
    dirty = export.Connection(source["uri"], name, source["dirty"], required=True)
    return export.changes(dirty, base, disk["size"])


class _Batch:
    """
    Extents of one disk on their way into frames; neighbours with one state become one.

    Data is passed on at once, to be read. The last extent that is not waits for what the next list goes on with:
    a disk of many TiB of nothing is one hole.
    """

    def __init__(self, out, disk):
        self.out = out
        self.disk = disk
        self._held = []

    def add(self, runs):
        """Take runs (flat list of offset, length, state, ...) that follow those before."""
        runs = _merged(self._held + runs)
        keep = 3 if runs and runs[-1] != DATA else 0
        self._held = runs[len(runs) - keep :]
        self._put(runs[: len(runs) - keep])

    def flush(self):
        """Pass on what waits."""
        self._put(self._held)

    def _put(self, runs):
        for at in range(0, len(runs), 3 * MAX_EXTENTS):
            self.out.extents(self.disk, runs[at : at + 3 * MAX_EXTENTS])


def _merged(runs):
    """The runs, with neighbours of one state made one."""
    states = runs[2::3]
    if not any(map(eq, states, states[1:])):
        return runs  # as servers give them nearly always, and then nothing is done for each in Python
    merged = runs[:3]
    for offset, length, state in zip(runs[3::3], runs[4::3], runs[5::3]):
        if state == merged[-1] and merged[-3] + merged[-2] == offset:
            merged[-2] += length
        else:
            merged += (offset, length, state)
    return merged
