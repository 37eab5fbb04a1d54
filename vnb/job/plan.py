# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a backup takes: its level and parent, its disks, their names in sockets, scratch files and XML."""

from __future__ import annotations

import contextlib
import json
import os

from vnb.base.errors import Error
from vnb.format import frame, heads
from vnb.job import decisions, reasons, scratch
from vnb.job.images_moved import _inode, _is_inode, are_moved
from vnb.job.record import Record
from vnb.job.source import Wanted, WantedDisk
from vnb.job.state import owner
from vnb.nbd.endpoint import Unix
from vnb.qemu import img
from vnb.store import chain
from vnb.store.catalog import Catalog
from vnb.virt import file_elements
from vnb.virt.failures import BrokenBitmap, names_disk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from vnb.job.source import Journal, Source
    from vnb.store.saved_segment import SavedSegment


CHECKPOINT_ROOM = 64 << 10  # bytes: of a checkpoint's XML, beside the domain's in it
SUN_PATH = 107  # bytes of a socket's path, without the zero behind it


class Plan:
    """
    source. options: see vnb.job.job.begin. directory: of the job.

    head, disks: what goes into the stream. note, warn: functions for lines to the user. Raises Error.
    """

    def __init__(
        self, source: Source, options: dict[str, Any], directory: str, note: Callable[[str], Any],
        warn: Callable[[str], Any],
    ) -> None:
        self.source = source
        self.options = options
        self.note = note
        self.warn = warn
        self.catalog = Catalog.of(options["state"], source.uuid, options["set"], options["destination"])
        self.have = source.have()
        # What the set will refuse is refused before the guest is frozen.
        self.catalog.refuse_impossible()
        self.held = self.catalog.of_domain(source.uuid, source.name)
        for file in self.catalog.damaged:
            self.warn(file.line)
        self.forgotten: str | None = None  # why a checkpoint that libvirt does not know any more could not be redefined
        start = self._start()
        self.level, self.known = start.level, start.segment
        self.parent: Any = start.base  # of level inc and diff
        self.broken = start.is_broken  # bitmaps of older checkpoints turned out to be: these checkpoints are of no use
        self.marks = self.level in ("full", "inc")  # a point that the next increment may start from
        everything = source.disks()
        chosen = self._choose(everything)
        self.others = [disk.name for disk in everything if disk not in chosen]
        self.head: Any = heads.new(
            source.name, source.uuid, self.level, "disks", parent=self.parent, chain=options["chain"],
            after=self._newest(), **source.head_fields(),
        )
        if self.marks:
            self.head["checkpoint"] = self.head["point"]
        self.directory = directory
        self.endpoint: Any = source.endpoint(options, directory, _socket_name(self.head))
        if isinstance(self.endpoint, Unix) and len(os.fsencode(self.endpoint.path)) > SUN_PATH:
            raise Error(
                self.endpoint.path, f"the path is too long for a socket ({SUN_PATH} bytes at most): see --socket"
            )
        self.sources = {disk.name: disk for disk in chosen}
        self.saved = self._saved_images()
        self.images_then = self._images_then() if self.parent else {}
        self.disks: list[Any] = [self._disk(disk) for disk in chosen]
        self._check_head()
        self.scratch = {disk.name: self._scratch(disk) for disk in chosen} if source.needs_scratch else {}

    def _check_head(self) -> None:
        """Raise Error where the head will be too large for a stream: its checkpoint's XML is made with the job."""
        likely = dict(self.head)
        if self.marks:
            texts = [self.head.get(key) or "" for key in ("domain_xml", "inactive_xml")]
            likely["checkpoint_xml"] = "".join([*texts, " " * CHECKPOINT_ROOM])
        try:
            frame.encode(["vnb", frame.VERSION, likely])
        except frame.FrameError as error:
            raise Error(
                self.source.name, f"its XML does not fit into a backup: {error}, where {frame.MAX_HEAD} are the most "
                "(metadata that nobody needs can be removed: virsh metadata, virsh desc)"
            ) from None

    def describe_files(self) -> None:
        """
        Have the head say what is in the files that the guest never writes to, and which of them the base has.

        What cannot be read here is left to whoever writes the stream.
        """
        self.modes: dict[tuple[str, str], int] = {}  # of each file that the head describes, by its role and path
        if self.head["domain_xml"] is None:
            return
        before = [] if self.known is None else self.known.head.get("files", ())
        held = {(file["role"], file["path"], file["size"], file["sha256"]) for file in before}
        files = []
        for role, path in file_elements.files(self.head["domain_xml"]):
            if role not in file_elements.STABLE_ROLES or (role, path) in self.modes:
                continue
            try:
                self.modes[role, path], size, sha256 = self.source.describe(path)
            except Error:
                if not self.source.is_local:
                    return  # ssh does not get there: each try would take as long
                continue
            base: dict[str, Any] = {"base": True} if (role, path, size, sha256) in held else {}
            files.append({"role": role, "path": path, "size": size, "sha256": sha256, **base})
            self.head["files"] = files

    def record(self) -> Record:
        """The job's record: all that is needed to end it."""
        options = self.options
        return Record(
            head=self.head, owner=owner(), kind=self.source.kind, disks=self.disks,
            uri=self.source.uri, user=options["user"],
            password_file=options["password_file"], ssh=options["ssh"], images=options["images"],
            catalog=self.catalog.key, endpoint=self.endpoint.key, tcp=self.endpoint.is_tcp,
            scratch=list(self.scratch.values()), started=self.source.started,
        )

    def start(self, journal: Journal) -> None:
        """Start the job (see vnb.job.source.Journal). A disk whose bitmap turns out to be broken is taken in full."""
        while True:
            try:
                wanted = self._wanted()
                self.source.begin(wanted, journal)
                break
            except BrokenBitmap as error:
                inc = [disk for disk in self.disks if disk["level"] == "inc"]
                words = error.reason.replace(self.parent or "", "")  # which has a name, too
                broken = [disk for disk in inc if names_disk(words, disk["name"])] or inc
                if not broken:
                    raise
                self.broken = True
                for disk in broken:
                    self._take_in_full(disk, error.reason, self.warn)
        if self.marks:
            self.head["checkpoint_xml"] = self.source.mark(self.head["checkpoint"])
        exports = self.source.exports(wanted)
        for disk in self.disks:
            uri, dirty = exports[disk["name"]]
            disk["source"] = {"uri": uri}
            if disk["level"] == "inc":
                disk["source"]["dirty"] = dirty
            if not self.options["sparse"]:
                disk["source"]["sparse"] = False
            del disk["bitmap"]

    def _wanted(self) -> Wanted:
        """What the source is to begin (Wanted). The checkpoint's description says whose it is."""
        about = {
            "owner": owner(), "catalog": self.catalog.id, "destination": self.catalog.destination, "base": self.parent,
            "run": self.head["run"], "chain": self.head["chain"],
        }
        disks = [
            WantedDisk(
                self.sources[disk["name"]], disk["size"], self._export(disk["name"]), disk["level"] == "inc",
                disk["bitmap"], self.scratch.get(disk["name"], ""),
            )
            for disk in self.disks
        ]
        options = self.options
        return Wanted(
            self.head["point"], self.head["checkpoint"], f"vnb {json.dumps(about)}", self.parent, disks, self.others,
            self.endpoint, self.directory, options["freeze"], options["require_freeze"], options["pause"],
            options["listen"],
        )

    def _export(self, disk: str) -> str:
        """
        The name of a disk's export. Another job may listen where we did, on the same port or socket that its user has
        named, and have a disk of the same name: who comes there for ours must not read that.
        """
        return f"{disk}-{self.head['id'][:8]}"

    def estimate(self) -> dict[str, int]:
        """
        {disk: bytes} that the backup has at most: all data of a disk that is taken in full, else what has changed.

        What the guest zeroed or trimmed counts as changed, though it takes no room in a segment.
        """
        names = [disk["name"] for disk in self.disks if disk["level"] == "inc"]
        found = self.source.changed(self.parent, names) if names else {}
        for disk in self.disks:
            if disk["name"] in names and disk["name"] not in found:
                self.broken = True
                self._take_in_full(disk, f"its bitmap of {self.parent} is missing or inconsistent", self.warn)
        full = [disk["name"] for disk in self.disks if disk["name"] not in found]
        return {**found, **self.source.allocated(full)}

    def _newest(self) -> str | None:
        """
        The latest time of all points that are known, or None.

        A clock that went back must not make of a new full, or of a diff, one that is older than what it is to follow.
        """
        times = [segment.head["created"] for segment in self.held]
        if self.known is None and self.parent:
            times.append(heads.created_of(self.parent) or "")
        return max(times, default=None)

    def _start(self) -> decisions.Start:
        """Where the backup starts from (Start). Raises Error where a full backup is needed, and was not asked for."""
        level, base = self.options["level"], self.options["base"]
        if level in ("full", "copy"):
            return decisions.Start(level, why=decisions.Full.ASKED)
        if base in (None, "last", "full"):
            found = decisions.candidates(self.held, self.options["chain"], base, self.catalog.is_set)
            self._redefine(decisions.to_redefine(found.whole, self.have))
            start = decisions.start(level, found, self.have)
        else:
            segment = self._named(base)
            start = decisions.start_at(level, base, segment, self.have)
        if start.why is not None:
            why = reasons.full(start.why, self.catalog, self.options["chain"], base, self._why_forgotten())
            if start.why is not decisions.Full.NO_SUCH_BASE:
                why += self.catalog.lost()
            if start.is_refused:
                raise Error(self.source.name, f"{why}: a full backup is needed first (--level full, or auto)")
            self.note(f"{self.source.name}: full backup: {why}")
        elif level == "auto" and start.segment is not None and base is None:
            self.note(f"{self.source.name}: increment since {start.base}")
        return start

    def _named(self, base: str) -> SavedSegment | None:
        """The segment whose checkpoint the user names as the base, where the catalog has it."""
        segment = next((segment for segment in self.held if segment.head["checkpoint"] == base), None)
        if segment is None and self.catalog.is_set:
            raise Error(self.catalog.directory, f"does not hold {base}, which --base names")
        if segment is not None:
            if self.catalog.is_set:
                chain.path(self.held, str(self.catalog.directory), segment.head["point"], self.catalog.damaged)
            self._redefine(decisions.to_redefine([segment], self.have))
        return segment

    def _why_forgotten(self) -> str:
        """What else to say of checkpoints that libvirt does not know."""
        if self.forgotten is not None:
            return f", and cannot be redefined: {self.forgotten}"
        if self.source.uri is None:
            return ""
        return " (vnb-checkpoint redefine has libvirt know again what the images still hold)"

    def _redefine(self, segments: Sequence[SavedSegment]) -> None:
        """
        Have libvirt know the checkpoints of segments again, where the images still hold their bitmaps.

        It forgets them with a transient domain, and where one is defined anew. Their names are unique for ever, and a
        bitmap is copied and restored with its image, so that what it says of an image is true.
        """
        for segment in segments:
            try:
                self.source.redefine(checkpoint_xml(segment))
            except Error as error:
                self.forgotten = error.reason
            else:
                name = segment.head["checkpoint"]
                self.note(f"{name}: redefined: libvirt had forgotten it, and the images still hold its bitmaps")
        if segments:
            self.have = self.source.have()

    def _choose(self, everything: Sequence[Any]) -> list[Any]:
        """The disks to back up; says which are left out, and refuses what cannot be done."""
        names = {disk.name for disk in everything}
        for option in ("include", "exclude"):
            unknown = sorted(set(self.options[option]) - names)
            if unknown:
                there = ", ".join(sorted(names))
                raise Error(f"--{option}", f"{self.source.name} has no disk {', '.join(unknown)}: there is {there}")
        chosen = []
        for disk in everything:
            if disk.name in self.options["exclude"] or (
                self.options["include"] and disk.name not in self.options["include"]
            ):
                continue
            if disk.left_out_because:
                self.note(f"{self.source.name}: {disk.name} {disk.left_out_because}: left out")
                continue
            why = self.source.cannot_read_because(disk)
            if why:
                raise Error(disk.name, f"{why}: --exclude {disk.name} leaves it out")
            if disk.encrypted and not self.options["allow_plaintext"]:
                raise Error(disk.name, "is encrypted and would be stored in plain text: --allow-plaintext, or "
                            f"--exclude {disk.name}")
            chosen.append(disk)
        if not chosen:
            raise Error(self.source.name, "no disk is left to back up")
        return chosen

    def _disk(self, disk: Any) -> dict[str, Any]:
        """The fields of a disk's frame, and whether it gets a bitmap."""
        found = {
            "name": disk.name,
            "size": self.source.size_of(disk),
            "level": "full",
            "image": {"format": disk.format, "path": disk.path, "type": disk.type},
        }
        inode = _inode(disk.path) if self.source.is_local else None
        if inode is not None:
            found["image"]["inode"] = inode
        without = img.no_bitmap_because(disk.path, disk.format, self.source.is_local)
        if without and self.level != "copy" and not self.options["raw"]:
            raise Error(disk.name, f"{without}: --raw takes it in full each time, --exclude {disk.name} leaves it out")
        found["bitmap"] = self.marks and not without
        if self.level in ("inc", "diff"):
            why = self._in_full_because(disk, found["size"], without)
            if why:
                meant = without and self.options["raw"]
                self._take_in_full(found, why, self.note if meant else self.warn)
            else:
                found["level"] = "inc"
        return found

    def _in_full_because(self, disk: Any, size: int, cannot_hold: str | None) -> str | None:
        """Why an increment has to take all of a disk, in words, or None. cannot_hold: why its image holds no bitmap."""
        has_bitmap = not cannot_hold and disk.name in self.have[self.parent]
        then = self.images_then.get(disk.name)
        now = decisions.DiskNow(
            disk.name, size, not cannot_hold, has_bitmap,
            # Nobody is asked for the images where it is decided already.
            not has_bitmap or then is None or self._is_among(then, self.source.layers_now(disk)),
            self._whose_file(disk) if has_bitmap else None,
        )
        known = None if self.known is None else self.known.disks
        why = decisions.in_full(now, known)
        if why is None:
            return None
        before = next((other["size"] for other in known or () if other["name"] == disk.name), None)
        return reasons.in_full(why, now, self.parent, cannot_hold, before, then)

    def _saved_images(self) -> dict[str, Any]:
        """{disk name: image map} of the base's segment, as far as the catalog has it."""
        if self.known is None:
            return {}
        with contextlib.closing(self.known):
            return {disk["name"]: disk.get("image", {}) for disk in self.known.open().disks}

    def _images_then(self) -> dict[str, Any]:
        """{disk name: what named its image at the base}, as far as libvirt or the catalog knows."""
        found = self.source.images_then(self.parent)
        if not found and self.source.uri is not None:  # without libvirt, other images were another domain
            found = {name: image.get("path") for name, image in self.saved.items()}
        return found

    def _whose_file(self, disk: Any) -> str | None:
        """The name of the other disk whose file at the parent is now among this one's images, or None: by inodes."""
        then = {name: image["inode"] for name, image in self.saved.items() if _is_inode(image.get("inode"))}
        if disk.name not in then or not self.source.is_local:
            return None
        now = [inode for inode in map(_inode, self.source.layers_now(disk)) if inode is not None]
        own = then.pop(disk.name)
        return next((name for name, other in then.items() if are_moved(now, own, other)), None)

    def _is_among(self, image: str, layers: Sequence[str]) -> bool:
        if image in layers:
            return True
        # By another path, through a link.
        return self.source.is_local and os.path.realpath(image) in map(os.path.realpath, layers)

    def _take_in_full(self, disk: Any, why: str, say: Callable[[str], Any]) -> None:
        disk["level"] = "full"
        say(f"{self.source.name}: {disk['name']}: full in this increment: {why}")

    def _scratch(self, disk: Any) -> str:
        """Where the old data goes that the guest overwrites: beside the image, as libvirt itself would do."""
        directory = self.options["scratch_dir"] or (
            os.path.dirname(disk.path) if disk.type == "file" and disk.path
            else os.path.dirname(self.endpoint.path) if isinstance(self.endpoint, Unix)
            else self.source.private_directory()
        )
        scratch.check_room(self.source, disk.name, directory, self.options, self.warn)
        return os.path.join(os.path.abspath(directory), f"vnb-{self.head['id'][:12]}-{disk.name}.scratch")


def checkpoint_xml(segment: SavedSegment) -> str | None:
    """The XML of a saved segment's checkpoint: there may be many, and it is not kept in memory."""
    with contextlib.closing(segment):
        return segment.open().head.get("checkpoint_xml")


def _socket_name(head: Any) -> str:
    """Says whose it is: our process, this boot, the run."""
    us = owner()
    return f'vnb-{us["pid"]}-{us["boot"][:8]}-{head["id"][:8]}.sock'
