# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a backup takes: its level and parent, its disks, their names in sockets, scratch files and XML."""

import contextlib
import json
import os
import stat

from vnb import chain, domxml, heads
from vnb.errors import Error
from vnb.ledger import Ledger
from vnb.state import owner
from vnb.virt import BrokenBitmap

QCOW2_MAGIC = b"QFI\xfb"
SUN_PATH = 107  # bytes of a socket's path, without the zero behind it


class Plan:
    """
    source (see vnb.source). options (dict): see vnb.job.begin. directory (str): of the job.

    head, disks: what goes into the stream. note, warn: functions for lines to the user. Raises Error.
    """

    def __init__(self, source, options, directory, note, warn):
        self.source = source
        self.options = options
        self.note = note
        self.warn = warn
        self.ledger = Ledger.of(options["state"], source.uuid, options["ledger"])
        self.have = source.have()
        # What the set will refuse is refused before the guest is frozen.
        self.held = self.ledger.of_domain(source.uuid, source.name)
        self.broken = False  # bitmaps of older checkpoints turned out to be: these checkpoints are of no use
        self.level, self.parent, self.known = self._level()
        self.marks = self.level in ("full", "inc")  # a point that the next increment may start from
        everything = source.disks()
        chosen = self._choose(everything)
        self.others = [disk.name for disk in everything if disk not in chosen]
        self.head = heads.new(
            source.name, source.uuid, self.level, "disks", parent=self.parent, chain=options["chain"],
            after=self._newest(), **source.head_fields(),
        )
        if self.marks:
            self.head["checkpoint"] = self.head["point"]
        self.union = f"{self.head['point']}.union"  # of one bitmap over several layers, while the job lasts
        self.directory = directory
        self.endpoint = source.endpoint(options, directory, _socket_name(self.head))
        if not self.endpoint.is_tcp and len(os.fsencode(self.endpoint.path)) > SUN_PATH:
            raise Error(
                self.endpoint.path, f"the path is too long for a socket ({SUN_PATH} bytes at most): see --socket"
            )
        self.sources = {disk.name: disk for disk in chosen}
        self.saved = self._saved_images()
        self.images_then = self._images_then() if self.parent else {}
        self.disks = [self._disk(disk) for disk in chosen]
        self.scratch = {disk.name: self._scratch(disk) for disk in chosen} if source.kind == "running" else {}

    def record(self):
        """The job's record: all that is needed to end it."""
        options = self.options
        return {
            "kind": self.source.kind,
            "owner": owner(),
            "uri": None if self.source.kind == "images" else self.source.domain.uri,  # not the default of who ends it
            "user": options["user"],
            "password_file": options["password_file"],
            "images": options["images"],
            "phase": "starting",
            "reason": None,
            "ledger": self.ledger.directory,
            "own_ledger": self.ledger.own,
            "ssh": options["ssh"],
            "endpoint": self.endpoint.key,
            "tcp": self.endpoint.is_tcp,
            "scratch": list(self.scratch.values()),
            "scratch_made": False,
            "started": self.source.started,
            "suspended": False,
            "frozen": False,
            "broken": False,
            "servers": [],
            "sockets": [],
            "unions": [],
            "added": [],
            "head": self.head,
            "disks": self.disks,
        }

    def start(self, job):
        """Start the job. A disk whose bitmap turns out to be broken is taken in full."""
        while True:
            try:
                self.source.start(self, job)
                break
            except BrokenBitmap as error:
                inc = [disk for disk in self.disks if disk["level"] == "inc"]
                broken = [disk for disk in inc if f"'{disk['name']}'" in error.reason] or inc
                if not broken:
                    raise
                self.broken = True
                for disk in broken:
                    self._take_in_full(disk, error.reason)
        if self.marks:
            self.head["checkpoint_xml"] = self.source.mark(self)
        exports = self.source.exports(self)
        for disk in self.disks:
            uri, dirty = exports[disk["name"]]
            disk["source"] = {"uri": uri}
            if disk["level"] == "inc":
                disk["source"]["dirty"] = dirty
            if not self.options["sparse"]:
                disk["source"]["sparse"] = False
            del disk["bitmap"]

    def export(self, disk):
        """
        The name of a disk's export. Another job may listen where we did, on the same port or socket that its user has
        named, and have a disk of the same name: who comes there for ours must not read that.
        """
        return f"{disk}-{self.head['id'][:8]}"

    def backup_xml(self):
        """The XML of libvirt's backup job."""
        wanted = []
        for disk in self.disks:
            name = disk["name"]
            since = self.parent if disk["level"] == "inc" else None
            wanted.append((name, self.export(name), since, self.scratch[name]))
        return domxml.backup(self.endpoint.attributes(), wanted, self.others)

    def checkpoint_xml(self):
        """The XML of the new checkpoint, or None. Its description says whose it is."""
        if not self.marks:
            return None
        with_bitmap = [disk["name"] for disk in self.disks if disk["bitmap"]]
        without = [disk["name"] for disk in self.disks if not disk["bitmap"]] + self.others
        about = {"owner": owner(), "ledger": self.ledger.name, "run": self.head["run"], "chain": self.head["chain"]}
        return domxml.checkpoint(self.head["checkpoint"], f"vnb {json.dumps(about)}", with_bitmap, without)

    def estimate(self):
        """Bytes that the backup would read."""
        names = [disk["name"] for disk in self.disks]
        return sum(self.source.estimate(self.parent, names).values())

    def _newest(self):
        """
        The latest time (str) of all points that are known, or None.

        A clock that went back must not make of a new full, or of a diff, one that is older than what it is to follow.
        """
        times = [segment.head["created"] for segment in self.held]
        if self.known is None and self.parent:
            times.append(heads.created_of(self.parent) or "")
        return max(times, default=None)

    def _level(self):
        """(level, parent's point or None, parent's segment where the ledger has it or None)."""
        level, since = self.options["level"], self.options["since"]
        if level in ("full", "copy"):
            return level, None, None
        known = self.held
        ours = [segment for segment in known if segment.head.get("chain") == self.options["chain"]]
        if since not in (None, "last", "full"):
            if since not in self.have:
                raise Error(self.source.name, f"there is no checkpoint {since}")
            parent = next((segment for segment in known if segment.head["checkpoint"] == since), None)
            return "inc" if level == "auto" else level, since, parent
        if since == "full":
            ours = [segment for segment in ours if segment.head["level"] == "full"]
        whole = ours
        if not self.ledger.own:
            # The set would refuse an increment to what it cannot restore.
            restorable = set(chain.restorable(known))
            whole = [segment for segment in ours if segment.head["point"] in restorable]
        usable = {name for name, disks in self.have.items() if disks}
        parent = chain.tip(whole, usable)
        if parent is not None:
            if level == "auto":
                self.note(f"{self.source.name}: level inc, since {parent.head['point']}")
            return "inc" if level == "auto" else level, parent.head["point"], parent
        why = (
            f"nothing of chain {self.options['chain']} is saved in {self.ledger.directory}" if not ours
            else f"{self.ledger.directory} does not hold what its points need" if not whole
            else "no disk has a sound bitmap that goes back to a saved point"
            if any(segment.head["checkpoint"] in self.have for segment in whole)
            else "the checkpoints of the saved points are all gone"
        )
        self.broken = any(segment.head["checkpoint"] in self.have for segment in whole)
        if level == "auto":
            self.note(f"{self.source.name}: level full: {why}")
            return "full", None, None
        raise Error(self.source.name, f"{why}: a full backup is needed first")

    def _choose(self, everything):
        """The disks to back up; says which are left out, and refuses what cannot be done."""
        names = {disk.name for disk in everything}
        for option in ("include", "exclude"):
            unknown = sorted(set(self.options[option]) - names)
            if unknown:
                raise Error(f"--{option}", f"{self.source.name} has no disk {', '.join(unknown)}")
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
                raise Error(disk.name, "is encrypted and would be stored in plain text: --allow-plaintext, or exclude")
            chosen.append(disk)
        if not chosen:
            raise Error(self.source.name, "no disk is left to back up")
        return chosen

    def _disk(self, disk):
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
        without = _no_bitmap_because(disk, self.source.is_local)
        if without and self.level != "copy" and not self.options["raw"]:
            raise Error(disk.name, f"{without}: --raw takes it in full each time, --exclude {disk.name} leaves it out")
        found["bitmap"] = self.marks and not without
        if self.level in ("inc", "diff"):
            why = without or self._full_because(disk, found["size"])
            if why:
                self._take_in_full(found, why)
            else:
                found["level"] = "inc"
        return found

    def _full_because(self, disk, size):
        """Why an increment has to take all of a disk, or None."""
        if self.known is not None:
            before = next((known for known in self.known.disks if known["name"] == disk.name), None)
            if before is None:
                return f"{self.parent} does not have it"
            if size < before["size"]:
                return f"it shrank from {before['size']} to {size} bytes"
        if disk.name not in self.have[self.parent]:
            return f"no sound bitmap of it goes back to {self.parent}"
        # The bitmaps of all disks have the checkpoint's name: one in an image that was another disk's then would do.
        then = self.images_then.get(disk.name)
        if then is not None and not self._is_among(then, self.source.layers_now(disk)):
            return f"its image is another one than {then}, which it was at {self.parent}"
        other = self._whose_file(disk)
        if other is not None:
            return f"its image is the file that {other} had at {self.parent}"
        return None

    def _saved_images(self):
        """{disk name: image map} of the parent's segment, as far as the ledger has it."""
        if self.known is None:
            return {}
        with contextlib.closing(self.known):
            return {disk["name"]: disk.get("image", {}) for disk in self.known.open().disks}

    def _images_then(self):
        """{disk name: what named its image at the parent}, as far as libvirt or the ledger knows."""
        found = self.source.images_then(self.parent)
        if not found and self.source.kind != "images":
            found = {name: image.get("path") for name, image in self.saved.items()}
        return found

    def _whose_file(self, disk):
        """The name of the other disk whose file at the parent is now among this one's images, or None: by inodes."""
        then = {name: image["inode"] for name, image in self.saved.items() if _is_inode(image.get("inode"))}
        if disk.name not in then or not self.source.is_local:
            return None
        now = [inode for inode in map(_inode, self.source.layers_now(disk)) if inode is not None]
        own = then.pop(disk.name)
        return next((name for name, other in then.items() if are_moved(now, own, other)), None)

    def _is_among(self, image, layers):
        if image in layers:
            return True
        # By another path, through a link.
        return self.source.is_local and os.path.realpath(image) in map(os.path.realpath, layers)

    def _take_in_full(self, disk, why):
        disk["level"] = "full"
        self.warn(f"{self.source.name}: {disk['name']}: full in this increment: {why}")

    def _scratch(self, disk):
        """Where the old data goes that the guest overwrites: beside the image, as libvirt itself would do."""
        directory = self.options["scratch_dir"] or (
            os.path.dirname(disk.path) if disk.type == "file" and disk.path else self._private_directory()
        )
        self._warn_of_room(disk, directory)
        return os.path.join(os.path.abspath(directory), f"vnb-{self.head['id'][:12]}-{disk.name}.scratch")

    def _private_directory(self):
        return self.source.private_directory() if self.endpoint.is_tcp else os.path.dirname(self.endpoint.path)

    def _warn_of_room(self, disk, directory):
        try:
            free = self.source.room(directory)
        except OSError:
            return  # QEMU will say so
        used = self.source.estimate(None, [disk.name])[disk.name]
        if free is not None and free < used:
            self.warn(
                f"{self.source.name}: {disk.name}: the scratch directory {directory} has {free} bytes left, "
                f"the disk has {used} bytes of data"
            )


def _inode(path):
    """What tells an image file from others, whatever its path ([st_dev, st_ino]); None where it is no file of ours."""
    try:
        found = os.stat(path)
    except (OSError, TypeError, ValueError):
        return None
    # A device's node is made anew whenever the host starts, its number is the next one that is free.
    return [found.st_dev, found.st_ino] if stat.S_ISREG(found.st_mode) else None


def _is_inode(found):
    return isinstance(found, list) and len(found) == 2


def are_moved(now, own, other):
    """
    Whether a disk has, now, the file of another disk. now: inodes of its images; own, other: of both disks, then.

    A file system's st_dev may change when it is mounted again, so the numbers alone have to do; except where both disks
    had the same one, as the only files of two file systems do.
    """
    if own in now:
        return False
    return other in now or (other[1] != own[1] and other[1] in [number for _, number in now])


def _no_bitmap_because(disk, is_local):
    """Why an image cannot hold a persistent bitmap, or None (also where that is for libvirt to find out)."""
    if disk.format != "qcow2":
        return f"a {disk.format} image cannot hold a bitmap"
    if not is_local:
        return None
    try:
        with open(disk.path, "rb") as file:
            start = file.read(8)
    except (OSError, TypeError):
        return None
    if start[:4] == QCOW2_MAGIC and int.from_bytes(start[4:], "big") < 3:
        return "a qcow2 image of version 2 cannot hold a bitmap (qemu-img amend -o compat=1.1 makes it version 3)"
    return None


def _socket_name(head):
    """Says whose it is: our process, this boot, the run."""
    us = owner()
    return f'vnb-{us["pid"]}-{us["boot"][:8]}-{head["id"][:8]}.sock'
