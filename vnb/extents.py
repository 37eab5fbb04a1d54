# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-extents - ask NBD servers which extents are data, zero, hole and dirty

Usage:
  vnb-extents [--debug]
  vnb-extents [--name NAME] [--dirty BITMAP] [--parent POINT] [--debug] URI
  vnb-extents --help | --version

Reads a stream from vnb-checkpoint and adds the extents of its disks; or makes
a stream of one disk from an NBD export.

Options:
  --name NAME     what to call the disk of URI [default: disk]
  --dirty BITMAP  only what is dirty in this bitmap of the export
  --parent POINT  the point that the bitmap counts from
  --debug         show tracebacks
  --help          print this
  --version       print the version
"""

from vnb import export, heads, stream
from vnb.errors import Error, UsageError
from vnb.frame import MAX_EXTENTS


def main(args):
    out = stream.stdout()
    if args["URI"]:
        _from_uri(out, args)
        return
    for segment in stream.stdin(stage="disks"):
        walks = [_walk(disk) for disk in segment.disks]
        written = out.segment({**segment.head, "stage": "extents"}, segment.disks)
        for frame in segment:
            written.frame(frame)
        _write(written, walks)
        written.end()


def _from_uri(out, args):
    name = args["--name"]
    if not stream.is_safe_name(name):
        raise Error("--name", f"a disk must not be named {name!r}")
    if bool(args["--dirty"]) != bool(args["--parent"]):
        raise UsageError("--dirty", "needs --parent, and --parent needs --dirty")
    source = {"uri": args["URI"]}
    if args["--dirty"]:
        source["dirty"] = f'qemu:dirty-bitmap:{args["--dirty"]}'
    connection = export.Connection(source["uri"], name)
    connection.close()
    level = "inc" if args["--dirty"] else "full"
    disk = {"name": name, "size": connection.size, "level": level, "image": {}, "source": source}
    head = heads.new(domain=name, uuid=heads.uuid_of(name), level="inc" if args["--dirty"] else "copy",
                     parent=args["--parent"], stage="extents")
    walks = [_walk(disk)]
    written = out.segment(head, [disk])
    _write(written, walks)
    written.end()


def _walk(disk):
    """A generator of lists of (offset, length, state); the server is asked for its contexts at once."""
    name, source = disk["name"], disk.get("source", {})
    if not isinstance(source, dict) or not isinstance(source.get("uri"), str):
        raise Error(name, "the stream does not say where this disk is exported")
    base = export.Connection(source["uri"], name, export.BASE_ALLOCATION)
    if base.size != disk["size"]:
        raise Error(name, f'the export has {base.size} bytes, the stream says {disk["size"]}')
    if disk["level"] == "full":
        return export.allocation(base, disk["size"])
    if not isinstance(source.get("dirty"), str):
        raise Error(name, "the stream does not say which bitmap this disk has")
    dirty = export.Connection(source["uri"], name, source["dirty"], required=True)
    return export.changes(dirty, base, disk["size"])


def _write(out, walks):
    """Write the extents of all disks in turn, a reply each, so that whoever reads them works on all disks."""
    batches = [_Batch(out, disk) for disk in range(len(walks))]
    living = list(range(len(walks)))
    while living:
        for disk in tuple(living):
            reply = next(walks[disk], None)
            if reply is None:
                batches[disk].flush()
                living.remove(disk)
            else:
                batches[disk].add(reply)
        out.writer.flush()


class _Batch:
    """Extents of one disk on their way into frames; neighbours with one state become one."""

    def __init__(self, out, disk):
        self.out = out
        self.disk = disk
        self.runs = []

    def add(self, reply):
        runs = self.runs
        for offset, length, state in reply:
            if runs and runs[-1] == state and runs[-3] + runs[-2] == offset:
                runs[-2] += length
                continue
            if len(runs) == 3 * MAX_EXTENTS:
                self.out.extents(self.disk, runs)
                runs = self.runs = []
            runs += (offset, length, state)
        # All but the last one, which the next reply may go on with; data is passed on at once, to be read.
        if len(runs) > 3 and runs[-1] != 0:
            self.out.extents(self.disk, runs[:-3])
            self.runs = runs[-3:]
        elif runs and runs[-1] == 0:
            self.flush()

    def flush(self):
        if self.runs:
            self.out.extents(self.disk, self.runs)
            self.runs = []
