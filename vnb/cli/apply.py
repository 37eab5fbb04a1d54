# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-apply - write a stream onto disks

Usage:
  vnb-apply [--update [--resume]] [--format FORMAT]
            [--image-options OPTIONS] [--preallocate | --compress]
            [--disk DISK]... [--force-sequence] [options] [DIR]
  vnb-apply --help | --version

Reads a full backup and the increments that follow it, and makes an image
DIR/NAME.FORMAT of each disk, as it was at the last restore point.

Options:
  --format FORMAT   the format of new images, qcow2 or raw [default: qcow2]
  --image-options OPTIONS
                    options of new qcow2 images, as qemu-img create takes them;
                    they override those of the original image
  --preallocate     allocate the room for whole disks before anything is written
  --compress        compress the clusters of new qcow2 images
  --disk DISK       NAME restores only this disk; NAME=TARGET overwrites a
                    target that exists: an NBD URI, a block device, or
                    [qcow2:|raw:]FILE
  --update          keep a standby in DIR: apply the segments that follow its
                    restore point, each of them wholly or not at all
  --resume          finish what a killed --update has left unfinished, and read
                    no stream
  --force-sequence  apply segments although they do not follow each other
  --progress MODE   show the progress: auto, none or json; see vnb(7)
"""

from __future__ import annotations

from vnb.base.errors import UsageError
from vnb.cli.progress import Progress
from vnb.cli.stdio import stdin
from vnb.format import rules
from vnb.job import proof
from vnb.restore import targets
from vnb.restore.replica import Standby
from vnb.restore.restore import Restore, undisturbed
from vnb.restore.writer import Buffers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any


FORMATS = ("qcow2", "raw")
EXAMPLE = "vnb-cat SET | vnb-apply DIR"
# Those of qemu-img's options that say how an image is made, and nothing of what is in it or below it.
OPTIONS = (
    "cluster_size", "compat", "compression_type", "data_file", "data_file_raw", "extended_l2", "lazy_refcounts",
    "refcount_bits",
)


def main(args: dict[str, Any]) -> None:
    recipe = parse_recipe(args)
    chosen = parse_disks(args["--disk"])
    if args["DIR"] is None and (args["--update"] or not (chosen and all(chosen.values()))):
        raise UsageError(None, "DIR is missing: new images are made there")
    if args["--resume"] and not args["--update"]:
        raise UsageError("--resume", "is for --update")
    for option in ("--compress", "--force-sequence"):
        if args["--update"] and args[option]:
            raise UsageError(option, "does not go with --update")
    buffers = Buffers()
    if args["--update"]:
        update(args, recipe, chosen, buffers)
        return
    with Progress(args["--progress"]) as progress:
        with Restore(args["DIR"], recipe, chosen, buffers, args["--force-sequence"]) as restore:
            for segment in stdin(stage="data", consumer=True, pool=buffers, example=EXAMPLE):
                progress.begin(segment.head)
                report = proof.Report(segment.head)
                with progress.segment(segment):
                    restore.apply(segment)
            restore.finish()
            with undisturbed():
                restore.publish()
            report.taken()
        progress.summarize()


def update(
    args: dict[str, Any], recipe: targets.Recipe, chosen: dict[str, Callable[[str], Any] | None], buffers: Buffers,
) -> None:
    """Bring a copy from its point to the stream's."""
    words = [f"--format {recipe.format}", *(f"--disk {value}" for value in sorted(args["--disk"]))]
    words += [f"--image-options {args['--image-options']}"] if args["--image-options"] else []
    words += ["--preallocate"] if recipe.preallocate else []
    reader = None if args["--resume"] else stdin(stage="data", consumer=True, pool=buffers, example=EXAMPLE)
    with Progress(args["--progress"]) as progress, Standby(args["DIR"], recipe, chosen, words, buffers) as standby:
        standby.resume()
        if reader is not None:
            for segment in reader:
                progress.begin(segment.head)
                report = proof.Report(segment.head)
                with progress.segment(segment):
                    standby.take(segment)
                report.taken()
            standby.check_reached()
            progress.summarize()


def parse_recipe(args: dict[str, Any]) -> targets.Recipe:
    """The vnb.restore.targets.Recipe of the options; UsageError."""
    format_ = args["--format"]
    if format_ not in FORMATS:
        raise UsageError("--format", f'"{format_}" is not qcow2 or raw')
    options = {}
    for word in (args["--image-options"] or "").split(",") if args["--image-options"] else ():
        key, equals, value = word.partition("=")
        if key not in OPTIONS or not equals or not value:
            raise UsageError("--image-options", f'"{word}" is not KEY=VALUE, with a KEY of {", ".join(OPTIONS)}')
        options[key] = value
    if options.get("data_file", "on") not in ("on", "off"):
        raise UsageError("--image-options", "data_file is on or off: the file is NAME.data, beside the image")
    for option in ("--image-options", "--compress"):
        if args[option] and format_ != "qcow2":
            raise UsageError(option, "is for qcow2 images")
    if args["--compress"] and options.get("data_file") == "on":
        raise UsageError("--compress", "clusters in a data file cannot be compressed")
    return targets.Recipe(format_, options, args["--preallocate"], args["--compress"])


def parse_disks(values: Sequence[str]) -> dict[str, Callable[[str], Any] | None]:
    """{name: function (name) -> place, or None for a new image} of all --disk options; UsageError."""
    chosen = {}
    written = set()
    for value in values:
        name, equals, text = value.partition("=")
        if not rules.is_safe_name(name):
            raise UsageError("--disk", f'"{value}" names no disk')
        if name in chosen or (equals and text in written):
            raise UsageError("--disk", f'"{value}": {"the disk" if name in chosen else "the target"} is there twice')
        chosen[name] = targets.parse(text) if equals else None
        written.add(text)
    return chosen
