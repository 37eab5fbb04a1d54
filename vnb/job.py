# SPDX-License-Identifier: LGPL-2.1-or-later
"""
One backup job of a domain and its checkpoint: begun, then committed or aborted.

All that is needed to end a job is on disk before it begins, so whoever finds the record can end it: the keeper
that began it, or after its death the next command.
"""

import contextlib
import json
import os
import urllib.parse

from vnb import chain, domxml, heads
from vnb.errors import Error
from vnb.ledger import Ledger
from vnb.state import owner
from vnb.virt import BrokenBitmap, Domain

KEPT_CHECKPOINTS = 2  # the newest ones, beside the last full's: a lost increment can be taken once more
QCOW2_MAGIC = b"QFI\xfb"


class Job:
    """
    directory (vnb.state.JobDirectory): where its record is. record (dict): see begin().

    note: a function for lines to the user.
    """

    def __init__(self, directory, record, note):
        self.directory = directory
        self.record = record
        self.note = note

    @property
    def head(self):
        return self.record["head"]

    def domain(self):
        """The domain, by a connection made now: the daemon may have been restarted."""
        return Domain(self.record["uri"], self.head["uuid"])

    def ledger(self, directory=None):
        """The ledger that the job was begun with, or the one in a directory."""
        if directory is not None:
            return Ledger(directory)
        return Ledger(self.record["ledger"], self.record["own_ledger"])

    def commit(self, ledger_directory=None):
        """
        The segment is safe: end the job, keep its checkpoint, drop older ones that nothing needs.

        Raises Error, and leaves the job as it is, where a ledger that others write does not hold the segment.
        """
        if self.record["phase"] == "ended":
            raise Error(self.head["domain"], f'the job was ended already: {self.record["reason"]}')
        ledger = self.ledger(ledger_directory)
        if ledger.own:
            if not ledger.holds(self.head):
                ledger.record(self.head, self.record["disks"])
        elif not ledger.holds(self.head):
            raise Error(ledger.directory, f'does not hold {self.head["point"]}: not committed')
        with self.domain() as domain:
            self._end(domain)
            self._drop_old(domain, ledger)
        self.directory.remove()

    def abort(self, reason=None):
        """
        End the job and delete its checkpoint, unless the ledger holds its segment: then it counts.

        reason (str or None): why, kept for whoever asks later.
        """
        checkpoint = self.head["checkpoint"]
        if self.record["phase"] != "ended":
            with self.domain() as domain:
                self._end(domain)
                if checkpoint is not None:
                    if self._is_saved():
                        self.note(f"{self.head['point']} is in {self.record['ledger']}: its checkpoint stays")
                    else:
                        domain.delete_checkpoint(checkpoint)
        if reason is None:
            self.directory.remove()
        else:
            self.record.update(phase="ended", reason=reason)
            self.directory.save(self.record)

    def _is_saved(self):
        try:
            return self.ledger().holds(self.head)
        except Error as error:
            # A ledger that cannot be read may hold it: a checkpoint too many does no harm, one too few costs a full.
            self.note(f"{error}: keeping checkpoint {self.head['checkpoint']}")
            return True

    def _end(self, domain):
        """End the job if it runs and is this one."""
        if domain.is_active and domain.backup_socket() == self.record["socket"]:
            domain.end_backup()
        for path in (self.record["socket"], *self.record["scratch"]):
            with contextlib.suppress(OSError):  # libvirt removes them; after a crash of its own it may not have
                os.unlink(path)

    def _drop_old(self, domain, ledger):
        have = domain.checkpoints()
        ours = sorted(
            (
                segment.head for segment in ledger.segments()
                if segment.head["chain"] == self.head["chain"] and segment.head["checkpoint"] in have
            ),
            key=lambda head: head["created"],
        )
        fulls = [head for head in ours if head["level"] == "full"]
        kept = {head["checkpoint"] for head in ours[-KEPT_CHECKPOINTS:] + fulls[-1:]}
        for head in ours:
            if head["checkpoint"] not in kept:
                domain.delete_checkpoint(head["checkpoint"])


def begin(directory, options, note):
    """
    Begin a backup job; returns its Job. The caller holds the domain's lock.

    options (dict): domain, uri, level, ledger, since, chain, include, exclude, raw, scratch_dir, socket, state.
    Raises Error; nothing is left then.
    """
    with Domain(options["uri"], options["domain"]) as domain:
        if not domain.is_active:
            raise Error(options["domain"], "is not running")
        running = domain.running_job()
        if running is not None:
            raise Error(options["domain"], f"a {running} job is active already")
        plan = _Plan(domain, options, note)
        job = Job(directory, plan.record(), note)
        directory.save(job.record)
        try:
            plan.start()
            job.record.update(phase="running", head=plan.head, disks=plan.disks)
            directory.save(job.record)
        except BaseException:
            job.abort()
            raise
        return job


class _Plan:
    """What is to be backed up, since when, under which names."""

    def __init__(self, domain, options, note):
        self.domain = domain
        self.options = options
        self.note = note
        self.ledger = Ledger.of(options["state"], domain.uuid, options["ledger"])
        self.have = domain.checkpoints()
        self.level, self.parent, self.known = self._level()
        live = domain.xml()
        everything = domxml.disks(live)
        chosen = self._choose(everything)
        self.others = [disk.name for disk in everything if disk not in chosen]
        fields = {"domain_xml": live, "checkpoint_xml": None}
        if domain.is_persistent:
            fields["inactive_xml"] = domain.xml(inactive=True)
        self.head = heads.new(
            domain.name, domain.uuid, self.level, "disks", parent=self.parent, chain=options["chain"],
            after=self.known.head["created"] if self.known else None, **fields,
        )
        self.marks = self.level in ("full", "inc")  # a point that the next increment may start from
        if self.marks:
            self.head["checkpoint"] = self.head["point"]
        self.socket = options["socket"] or os.path.join(domain.private_directory(), _socket_name(self.head))
        if len(os.fsencode(self.socket)) > 107:
            raise Error(self.socket, "the path is too long for a socket (107 bytes at most)")
        self.disks = [self._disk(disk) for disk in chosen]
        self.sources = {disk.name: disk for disk in chosen}
        self.scratch = {disk.name: self._scratch(disk) for disk in chosen}

    def record(self):
        return {
            "owner": owner(),
            "uri": self.domain.uri,
            "phase": "starting",
            "reason": None,
            "ledger": self.ledger.directory,
            "own_ledger": self.ledger.own,
            "socket": self.socket,
            "scratch": list(self.scratch.values()),
            "head": self.head,
            "disks": self.disks,
        }

    def start(self):
        """Start the job. A disk whose bitmap turns out to be broken is taken in full."""
        while True:
            try:
                self.domain.begin_backup(self._backup_xml(), self._checkpoint_xml())
                break
            except BrokenBitmap as error:
                broken = [
                    disk for disk in self.disks if disk["level"] == "inc" and f"'{disk['name']}'" in error.reason
                ] or [disk for disk in self.disks if disk["level"] == "inc"]
                if not broken:
                    raise
                for disk in broken:
                    self._take_in_full(disk, error.reason)
        if self.marks:
            self.head["checkpoint_xml"] = self.domain.checkpoint_xml(self.head["checkpoint"])

    def _level(self):
        """(level, parent's point or None, parent's segment where the ledger has it or None)."""
        level, since = self.options["level"], self.options["since"]
        if level in ("full", "copy"):
            return level, None, None
        known = self.ledger.of_domain(self.domain.uuid, self.domain.name)
        ours = [segment for segment in known if segment.head["chain"] == self.options["chain"]]
        if since not in (None, "last", "full"):
            if since not in self.have:
                raise Error(self.options["domain"], f"libvirt has no checkpoint {since}")
            parent = next((segment for segment in known if segment.head["checkpoint"] == since), None)
            return "inc" if level == "auto" else level, since, parent
        if since == "full":
            ours = [segment for segment in ours if segment.head["level"] == "full"]
        parent = chain.tip(ours, self.have)
        if parent is not None:
            if level == "auto":
                self.note(f"{self.domain.name}: level inc: since {parent.head['point']}")
            return "inc" if level == "auto" else level, parent.head["point"], parent
        why = (
            f"nothing of chain {self.options['chain']} is saved in {self.ledger.directory}" if not ours
            else "libvirt has none of the checkpoints of the saved points any more"
        )
        if level == "auto":
            self.note(f"{self.domain.name}: level full: {why}")
            return "full", None, None
        raise Error(self.options["domain"], f"{why}: a full backup is needed first")

    def _choose(self, everything):
        """The disks to back up; says which are left out, and refuses what cannot be done."""
        names = {disk.name for disk in everything}
        for option in ("include", "exclude"):
            unknown = sorted(set(self.options[option]) - names)
            if unknown:
                raise Error(f"--{option}", f"{self.domain.name} has no disk {', '.join(unknown)}")
        chosen = []
        for disk in everything:
            if disk.name in self.options["exclude"] or (
                self.options["include"] and disk.name not in self.options["include"]
            ):
                continue
            if disk.left_out_because:
                self.note(f"{self.domain.name}: {disk.name} {disk.left_out_because}: left out")
                continue
            if disk.encrypted and not self.options["allow_plaintext"]:
                raise Error(disk.name, "is encrypted and would be stored in plain text: --allow-plaintext, or exclude")
            chosen.append(disk)
        if not chosen:
            raise Error(self.options["domain"], "no disk is left to back up")
        return chosen

    def _disk(self, disk):
        """The fields of a disk's frame."""
        found = {
            "name": disk.name,
            "size": self.domain.size_of(disk.name),
            "level": "full",
            "image": {"format": disk.format, "path": disk.path, "type": disk.type},
            "source": {"uri": "nbd+unix:///{}?{}".format(
                urllib.parse.quote(disk.name, safe=""), urllib.parse.urlencode({"socket": self.socket}, safe="/")
            )},
        }
        without = _no_bitmap_because(disk)
        if without and self.level != "copy" and not self.options["raw"]:
            raise Error(disk.name, f"{without}: --raw takes it in full each time, --exclude {disk.name} leaves it out")
        found["bitmap"] = self.marks and not without
        if self.level in ("inc", "diff"):
            why = without or self._full_because(disk, found["size"])
            if why:
                self._take_in_full(found, why)
            else:
                found["level"] = "inc"
                found["source"]["dirty"] = f"qemu:dirty-bitmap:backup-{disk.name}"
        return found

    def _full_because(self, disk, size):
        """Why an increment has to take all of a disk, or None."""
        if disk.name not in domxml.bitmaps(self.have[self.parent]):
            return f"checkpoint {self.parent} has no bitmap of it"
        if self.known is not None:
            before = next((known for known in self.known.disks if known["name"] == disk.name), None)
            if before is None:
                return f"{self.parent} does not have it"
            if size < before["size"]:
                return f"it shrank from {before['size']} to {size} bytes"
        return None

    def _take_in_full(self, disk, why):
        disk["level"] = "full"
        disk["source"].pop("dirty", None)
        self.note(f"{self.domain.name}: {disk['name']}: full in this increment: {why}")

    def _scratch(self, disk):
        """Where the old data goes that the guest overwrites: beside the image, as libvirt itself would do."""
        directory = self.options["scratch_dir"] or (
            os.path.dirname(disk.path) if disk.type == "file" and disk.path else self.domain.private_directory()
        )
        return os.path.join(os.path.abspath(directory), f"vnb-{self.head['id'][:12]}-{disk.name}.scratch")

    def _backup_xml(self):
        wanted = [
            (disk["name"], self.parent if disk["level"] == "inc" else None, self.scratch[disk["name"]])
            for disk in self.disks
        ]
        return domxml.backup(self.socket, wanted, self.others)

    def _checkpoint_xml(self):
        if not self.marks:
            return None
        with_bitmap = [disk["name"] for disk in self.disks if disk["bitmap"]]
        without = [disk["name"] for disk in self.disks if not disk["bitmap"]] + self.others
        about = {"owner": owner(), "ledger": self.ledger.name, "run": self.head["run"], "chain": self.head["chain"]}
        return domxml.checkpoint(self.head["checkpoint"], f"vnb {json.dumps(about)}", with_bitmap, without)


def _no_bitmap_because(disk):
    """Why an image cannot hold a persistent bitmap, or None (also where that is for libvirt to find out)."""
    if disk.format != "qcow2":
        return f"a {disk.format} image cannot hold a bitmap"
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
