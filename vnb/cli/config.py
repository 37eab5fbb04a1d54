# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-config - print the domain XML of a stream, adjusted for where it is restored

Usage:
  vnb-config [options] [--disk DISK]...
  vnb-config --help | --version

Reads a stream at any stage, and prints the XML of its last segment, for virsh
define. Restores the other files of the domain: nvram, loader, kernel, initrd.

Options:
  --name NAME         call the domain so; default: restore_ and its old name
  --disk-dir DIR      name the disks DIR/NAME.FORMAT, and restore files there;
                      without it the XML names disks and files where they were
  --format FORMAT     the format of these disks, qcow2 or raw [default: qcow2]
  --disk DISK         NAME=TARGET: this disk is at TARGET, a block device,
                      [qcow2:|raw:]FILE, or an NBD URI as vnb-map prints it;
                      may be given several times
  --keep-identity     keep name, UUID and MAC addresses
  --keep-graphics     keep VNC and Spice as they were, but without a password
  --files-in-place    restore files to their old places, if missing there
  --no-files          restore no files
  -o FILE             write the XML to a new file that only its owner may read
  --define            define the domain instead of printing its XML
  --autostart         with --define: start it with the host, if it was so
  --check             check whether all this can be done, and do none of it
  -c URI, --connect URI
                      connect to libvirt at this URI; default:
                      LIBVIRT_DEFAULT_URI, or else qemu:///system for root and
                      qemu:///session for others
  --user NAME         log in to libvirt with this name
  --password-file FILE
                      log in with the password in the first line of FILE
"""

from __future__ import annotations

import os
import shlex
import stat
from urllib.parse import parse_qs, unquote, urlsplit

from vnb.base import log
from vnb.base.errors import Error, UsageError, os_error
from vnb.cli.runner import show
from vnb.cli.stdio import stdin
from vnb.format import rules, values
from vnb.nbd.endpoint import NBD_PORT
from vnb.restore.domain_files import Earlier, Files, check_path, destinations, originals
from vnb.restore.imagedir import EXISTS
from vnb.virt import domxml
from vnb.virt.domain_rewrite import Domain, Place, Wishes, is_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vnb.format.stream import Segment


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


FORMATS = ("qcow2", "raw")


def main(args: dict[str, Any]) -> None:
    chosen = _check(args)
    restored: Any = None
    try:
        with Earlier() as earlier:
            for segment in stdin(consumer=True):
                if restored is not None:
                    restored.files.close()
                restored = Restored(segment, args)
                earlier.begin()
                for frame in segment:
                    if frame.__class__ in (values.File, values.Same):
                        restored.take(frame, earlier)
        domain = restored.adjusted(args, chosen)
        try:
            xml = domain.xml()
        except RecursionError:
            raise Error("domain XML", "is nested too deeply") from None
        if args["--define"]:
            _define(args, domain, xml, restored)
        else:
            if args["-o"]:
                restored.files.add_text(os.path.abspath(args["-o"]), xml)
            if args["--check"]:
                return
            restored.files.publish()
            if not args["-o"]:
                show(xml)
            if args["--keep-identity"] and not any(_bitmaps(restored.places).values()):
                every = f"$(virsh checkpoint-list {shlex.quote(domain.name)} --name --topological | tac)"
                log.note(f"{domain.name}: if this libvirt has checkpoints of an earlier domain of this name, "
                         f"delete them before the next backup: {_forget_checkpoints(domain.name, None, every)}")
    finally:
        if restored is not None:
            restored.files.close()


def _check(args: dict[str, Any]) -> dict[str, Place]:
    """{disk name: Place} of --disk; UsageError for options that do not go together."""
    if args["--format"] not in FORMATS:
        raise UsageError("--format", f'"{args["--format"]}" is not qcow2 or raw')
    if args["--name"] is not None and not is_name(args["--name"]):
        raise UsageError("--name", f'"{args["--name"]}" is no name for a domain')
    if args["--files-in-place"] and args["--no-files"]:
        raise UsageError("--no-files", "contradicts --files-in-place")
    if args["--define"] and args["-o"]:
        raise UsageError("-o", "contradicts --define")
    for option in ("--autostart", "--connect", "--user", "--password-file"):
        if args[option] and not args["--define"]:
            raise UsageError(option, "has no meaning without --define")
    chosen = {}
    for value in args["--disk"]:
        name, _, target = value.partition("=")
        if not target or not rules.is_safe_name(name):
            raise UsageError("--disk", f'"{value}" is not NAME=TARGET')
        if name in chosen:
            raise UsageError("--disk", f"{name} is given twice")
        chosen[name] = _place(target)
    return chosen


def _place(target: str) -> Place:
    """The Place that a TARGET, as vnb-apply has it, means."""
    format_, colon, path = target.partition(":")
    if not colon or format_ not in FORMATS:
        if target.startswith(("nbd:", "nbds:", "nbd+", "nbds+")):
            return _nbd_place(target)
        format_, path = "raw", target
    path = os.path.abspath(path)
    try:
        kind = "block" if stat.S_ISBLK(os.stat(path).st_mode) else "file"
    except OSError:
        kind = "block" if path.startswith("/dev/") else "file"
    return Place(kind, path, format_)


def _nbd_place(uri: str) -> Place:
    """The Place that an NBD URI, as vnb-map prints it, means."""
    try:
        parts = urlsplit(uri)
        socket = parse_qs(parts.query).get("socket", [""])[0]
        if parts.scheme == "nbd+unix" and socket.startswith("/") and not parts.netloc:
            server = {"transport": "unix", "socket": socket}
        elif parts.scheme == "nbd" and parts.hostname:
            server = {"name": parts.hostname, "port": str(parts.port or NBD_PORT)}
        else:
            raise ValueError(uri)
    except ValueError:
        reason = f'"{uri}" is not nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=/PATH'
        raise UsageError("--disk", reason) from None
    return Place("network", unquote(parts.path[1:]), "raw", server)


class Restored:
    """A segment's domain, and its files (Files) on their way. args: the options."""

    def __init__(self, segment: Segment, args: dict[str, Any]) -> None:
        self.head = segment.head
        self._args = args
        self._disks = [disk["name"] for disk in segment.disks]
        self._destinations: dict[tuple[str, str], str | None] = {}
        self._domain: Any = None
        self._failure: Any = None
        try:
            # Who only asks is told what stops it; what else there is to say, whoever does it says.
            self._domain = Domain(segment.head, (lambda _: None) if args["--check"] else log.note)
        except Error as error:
            self._failure = error  # of no account where another segment follows
        else:
            if self._restores_files:
                self._domain.adopt_firmware()
            self._choose_destinations()
        self.files = Files(self._destinations, args["--check"])

    @property
    def _restores_files(self) -> bool:
        return not self._args["--no-files"] and bool(self._args["--disk-dir"] or self._args["--files-in-place"])

    def _choose_destinations(self) -> Any:
        """Fill _destinations, which is the one that self.files has."""
        if not self._restores_files:
            return
        wanted = self._domain.files()
        if self._args["--files-in-place"]:
            self._destinations.update(originals(wanted))
        else:
            self._destinations.update(destinations(wanted, os.path.abspath(self._args["--disk-dir"])))

    def take(self, frame: Any, earlier: Earlier) -> None:
        """Take a part of a file, or all of one that the segment before had. earlier (Earlier)."""
        try:
            parts = earlier.parts(frame)
            if parts is not None:
                for part in parts:
                    self.add(part)
                return
        except OSError as error:
            raise os_error("temporary file", error) from None
        role, path = frame.fields["role"], frame.fields["path"]
        if self.files.wants(role, path):
            raise Error(
                "file", f"the {role} is in an earlier segment, which is not in this stream (vnb-cat --head SET has it)",
                path,
            )

    def add(self, frame: values.File) -> None:
        """Take a part of a file."""
        role, path = frame.fields["role"], frame.fields["path"]
        if role == "nvram" and self._restores_files and self._domain is not None and (role, path) not in \
                self._destinations:
            check_path(role, path)
            if self._domain.adopt_nvram(path):
                self._choose_destinations()
        self.files.add(frame)

    def adjusted(self, args: dict[str, Any], chosen: dict[str, Place]) -> Domain:
        """The Domain, once all frames were seen. chosen: {disk name: Place}. Raises Error."""
        if self._failure is not None:
            raise self._failure
        for name in chosen:
            if name not in self._disks:
                there = ", ".join(self._disks) or "no disk"
                raise Error("--disk", f'no disk {name} at restore point {self.head["point"]}, there is {there}')
        directory, format_ = args["--disk-dir"], args["--format"]
        self.places = {
            name: chosen.get(name) or (
                directory and Place("file", os.path.join(os.path.abspath(directory), f"{name}.{format_}"), format_)
            )
            for name in self._disks
        }
        files = {}
        for key, final in self._destinations.items():
            # What is where it was, and must not be replaced, is as good as a file that came.
            is_there = final is None or key in self.files.complete
            files[key] = (final or key[1]) if is_there else None
        wishes = Wishes(
            args["--name"], args["--keep-identity"], args["--keep-graphics"], directory and os.path.abspath(directory)
        )
        shared = [name for name in self._disks if self.places[name] is None and not args["--keep-identity"]]
        if shared and args["--define"]:
            raise Error(
                ", ".join(shared), "the new domain would write to the original's disk: give it another by --disk-dir "
                "or --disk NAME=TARGET, or restore the original with --keep-identity"
            )
        for name in shared:
            self._domain.say(f"{name}: stays where it was, and the original writes to it: see --disk-dir and --disk")
        self._domain.adjust(wishes, self.places, files)
        for path in self._domain.outputs:
            if os.path.lexists(path):
                raise Error(path, EXISTS)
        return self._domain


def _define(args: dict[str, Any], domain: Domain, xml: str, restored: Restored) -> None:
    """Define it through libvirt; all is as it was where that fails."""
    from vnb.virt.connection import Host
    from vnb.virt.domain import Domain as Defined

    access = args["--user"], args["--password-file"]
    with Host(args["--connect"], *access) as host:
        uuid = (domain.root.findtext("uuid") or "").strip()
        host.refuse_to_replace(domain.name, uuid)
        if not host.is_local and restored.files.complete:
            raise Error(
                host.uri, "is another host, and files of the domain would be restored on this one: run vnb-config "
                "there, or give --no-files"
            )
        if args["--check"]:
            return
        restored.files.publish()
        try:
            host.define(domain.name, xml)
        except BaseException:
            restored.files.withdraw()
            raise
        for name, place in restored.places.items():
            if place and place.type != "network" and host.is_local and not os.path.exists(place.path):
                log.note(f"{name}: {place.path} is not there")
        if host.is_local and os.geteuid() == 0:
            _give_data_files(restored, host.user_for_data_files(xml))
        paths = {place.path for place in restored.places.values() if place and place.type == "file"}
        for directory in sorted(set(map(os.path.dirname, paths))):
            host.refresh_pool(directory, log.note)
    with Defined(args["--connect"], domain.name, *access) as defined:
        if args["--autostart"] and restored.head.get("autostart") is True:
            defined.call("setAutostart", 1)
        log.note(f"{domain.name}: defined")
        left = _without_bitmaps(defined.checkpoints(), restored.places if defined.is_local else {})
        if left:
            delete = _forget_checkpoints(domain.name, args["--connect"], shlex.join(left))
            log.note(f"{domain.name}: libvirt knows {len(left)} checkpoints that the restored disks do not have: "
                     f"delete them before the next backup: {delete}")


def _without_bitmaps(checkpoints: dict[str, str], places: Any) -> list[str]:
    """
    The names of those checkpoints ({name: XML}) of which no image holds a bitmap, the newest first.

    An image that was restored over an existing one still has the bitmaps of that, in which the restore has left its
    marks: the next increment is right.
    """
    held = _bitmaps(places)
    return [
        name for name, xml in sorted(checkpoints.items(), reverse=True)
        if not any(bitmap in held.get(disk, ()) for disk, bitmap in domxml.bitmaps(xml).items())
    ]


def _bitmaps(places: Any) -> dict[str, Any]:
    """{disk name: the sound bitmaps that its image holds}, of the images here. places: see Restored."""
    from vnb.qemu import img  # and libnbd with it

    found = {}
    for name, place in places.items():
        if place and place.type in ("file", "block") and place.format == "qcow2" and os.path.exists(place.path):
            layers = img.layers(name, place.path, place.format, shared=True)
            found[name] = {bitmap for layer in layers for bitmap in layer.bitmaps if img.holders(layers, bitmap)}
    return found


def _give_data_files(restored: Restored, user: Any) -> None:
    """Let QEMU have the data files that vnb-apply made beside images. user: (uid, gid), or None."""
    for name, place in restored.places.items() if user else ():
        if place is None or place.type != "file" or os.path.basename(place.path) != f"{name}.qcow2":
            continue
        path = os.path.join(os.path.dirname(place.path), f"{name}.data")
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                os.fchown(fd, *user)
                log.note(f"{name}: {path} is QEMU's now (user {user[0]}): libvirt before 10.10 does not see to it")
        finally:
            os.close(fd)


def _forget_checkpoints(name: str, uri: str | None, which: str) -> str:
    """The command that has libvirt forget some checkpoints of a domain. which: their names, for a shell."""
    virsh = f"virsh -c {shlex.quote(uri)}" if uri else "virsh"
    return f'for c in {which}; do {virsh} checkpoint-delete {shlex.quote(name)} "$c" --metadata; done'
