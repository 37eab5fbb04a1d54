# SPDX-License-Identifier: LGPL-2.1-or-later
"""The XML of a saved domain, made to fit the place where it is restored. Pure: nothing is opened or asked."""

from __future__ import annotations

import dataclasses
import os.path
import re
from xml.etree import ElementTree  # noqa: S405 - vnb.virt.domxml.parse lets no document type in

from vnb.base.errors import Error
from vnb.format import rules
from vnb.virt import domxml, file_elements

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

    from vnb.format.types import Head


# What libvirt makes of a domain's id or name when it starts, and makes anew.
_MADE_PATH = re.compile(r"/domain-\d+-|/channel/target/|/run/libvirt/qemu/channel/|^/dev/pts/")
_MADE_INTERFACE = re.compile(r"(vnet|macvtap|macvlan|vif)\d+")
NO_XML = "it was no libvirt domain, and vnb-restore --no-config restores its disks alone"
_CHARACTER_DEVICES = ("serial", "parallel", "console", "channel")


def is_name(text: str) -> bool:
    """Whether libvirt takes it as the name of a domain."""
    return text.strip() != "" and "/" not in text and "\n" not in text


@dataclasses.dataclass
class Place:
    """
    Where a disk is now. type: file, block, or network for NBD. path: absolute, or the name of the export.
    format: of the image there. server: attributes of libvirt's host element, for network.
    """

    type: str
    path: str
    format: str
    server: dict[str, str] | None = None

    def source(self) -> ElementTree.Element:
        """The element that tells libvirt."""
        if self.type != "network":
            return ElementTree.Element("source", {"dev" if self.type == "block" else "file": self.path})
        source = ElementTree.Element("source", {"protocol": "nbd", "name": self.path})
        ElementTree.SubElement(source, "host", self.server or {})
        return source


@dataclasses.dataclass
class Wishes:
    """
    What the user wants. name: of the domain; directory: where its files go, absolute; the
    others as the options of vnb-config.
    """

    name: str | None = None
    keep_identity: bool = False
    keep_graphics: bool = False
    directory: str | None = None


class Domain:
    """
    The domain of a segment's head. root (Element): its XML, the definition rather than the state where both
    are there. say: takes a line to the user for each thing that does not stay as it was. outputs (list of
    str): paths of files that it will write, once adjust() was called. Raises Error.
    """

    def __init__(self, head: Head, say: Callable[[str], None]) -> None:
        live = _root(head, "domain_xml")
        inactive = _root(head, "inactive_xml")
        if live is None and inactive is None:
            raise Error("stdin", f'{head["point"]} has no domain XML: {NO_XML}')
        self.root = live if inactive is None else inactive
        self.name = (self.root.findtext("name") or "").strip()
        if not self.name:
            raise Error("domain XML", "has no name")
        self.say = say
        self.outputs: list[str] = []
        self._live = live

    def files(self) -> list[tuple[str, str]]:
        """[(role, path)] of the files that the domain needs beside its disks, once adopt_firmware() was called."""
        return [(role, path) for role, path, _ in self._files() if path]

    def _files(self) -> Iterator[tuple[str, str | None, Any]]:
        os_ = self.root.find("os")
        for role in file_elements.FILE_ROLES:
            for element in () if os_ is None else os_.findall(role):
                if file_elements.is_named(element):
                    yield role, file_elements.file_path(element), element

    def adopt_firmware(self) -> None:
        """
        Have the definition name loader and nvram as the running domain did.

        Where libvirt chooses the firmware when a domain starts, its definition does not say which: the nvram that is
        in the backup would be forgotten, and with it what the guest wrote there.
        """
        live = None if self._live is None or self._live is self.root else self._live.find("os")
        if live is None or live.find("nvram") is None or not file_elements.leaves_nvram_to_libvirt(self.root):
            return
        os_ = self.root.find("os")
        for tag in ("loader", "nvram"):
            if not any(map(file_elements.is_named, os_.findall(tag))):
                _remove(os_, ".", tag)
                os_.extend(live.findall(tag))
        smm = self._live.find("features/smm")
        if smm is not None and self.root.find("features/smm") is None:
            # A loader for secure boot goes with it alone, and libvirt has switched it on.
            features = self.root.find("features")
            if features is None:
                features = ElementTree.SubElement(self.root, "features")
            features.append(smm)

    def adopt_nvram(self, path: str) -> bool:
        """
        Have the definition name an nvram; True if it names none, and leaves that to libvirt.

        Of a domain that was off there is nothing but such a definition, and libvirt's nvram beside it.
        """
        if not file_elements.leaves_nvram_to_libvirt(self.root):
            return False
        os_ = self.root.find("os")
        nvram = os_.find("nvram")
        file_elements.set_file_path(ElementTree.SubElement(os_, "nvram") if nvram is None else nvram, path)
        return True

    def adjust(
        self, wishes: Wishes, places: Mapping[str, Place | None], files: Mapping[tuple[str, str], str | None],
    ) -> None:
        """
        Make it fit. places: {disk name: Place, or None where it stays where it was} of the disks in the backup.

        files: {(role, path): path it has now, or None where it is not in the backup}; without a key all stays.
        """
        self._identity(wishes)
        self._runtime()
        for disk in self.root.findall("./devices/disk"):
            self._disk(disk, places)
        self._restored_files(files, wishes)
        if not wishes.keep_identity:
            taken = {place.path for place in places.values() if place} | {path for path in files.values() if path}
            self._output(wishes.directory, taken)
            self._other_state()
        if not wishes.keep_graphics:
            self._graphics()
        if self.root.find("./devices/tpm/backend[@type='emulator']") is not None:
            found = "what this host still has of it, which may be newer than the disks" if wishes.keep_identity else \
                "a new one"
            self.say(f"the state of its TPM is not in the backup: the guest finds {found}")

    def xml(self) -> str:
        """The XML, ending with a newline. Metadata, which are not libvirt's, have white space of their own."""
        foreign = {place: element for place, element in enumerate(self.root) if element.tag == "metadata"}
        for place in foreign:
            self.root[place] = ElementTree.Element("metadata")
        ElementTree.indent(self.root)
        for place, element in foreign.items():
            element.tail = self.root[place].tail
            self.root[place] = element
        # As it stands there it would be read as a line feed.
        return ElementTree.tostring(self.root, encoding="unicode").replace("\r", "&#13;") + "\n"

    def _identity(self, wishes: Wishes) -> None:
        self.name = wishes.name or (self.name if wishes.keep_identity else f"restore_{self.name}")
        if not is_name(self.name):
            raise Error("domain XML", f'"{self.name}" is no name for a domain: give another with --name')
        self.root.find("name").text = self.name
        self.root.attrib.pop("id", None)
        for genid in self.root.findall("genid"):
            # The guest is to notice that time went back for it: libvirt makes another.
            genid.text = None
        if wishes.keep_identity:
            return
        _remove(self.root, ".", "uuid")
        # It must be the domain's own, and that is a new one.
        _remove(self.root, "sysinfo/system", "entry[@name='uuid']")
        _remove(self.root, "devices/interface", "mac")
        for parameters in self.root.findall("./devices/interface/virtualport/parameters"):
            for name in ("interfaceid", "instanceid"):
                parameters.attrib.pop(name, None)
        for cid in self.root.findall("./devices/vsock/cid"):
            cid.attrib = {"auto": "yes"}

    def _runtime(self) -> None:
        """Take away what libvirt adds while a domain runs: without a definition, the live XML is all there is."""
        devices = self.root.find("devices")
        for device in () if devices is None else devices.iter():
            for alias in device.findall("alias"):
                if not alias.get("name", "").startswith("ua-"):  # a user's own
                    device.remove(alias)
        for seclabel in self.root.findall("seclabel"):
            if seclabel.get("type", "dynamic") == "dynamic":
                for name in ("label", "imagelabel"):
                    _remove(seclabel, ".", name)
                if not len(seclabel):
                    self.root.remove(seclabel)
        for target in self.root.findall("./devices/channel/target"):
            target.attrib.pop("state", None)
        for console in self.root.findall("./devices/console"):
            console.attrib.pop("tty", None)
        for device in self.root.findall("./devices/*"):
            if device.tag != "disk":
                for source in device.findall("source"):
                    if _MADE_PATH.search(source.get("path", "")):
                        device.remove(source)
        for graphics in self.root.findall("./devices/graphics"):
            if graphics.get("autoport") == "yes":
                for name in ("port", "tlsPort"):
                    graphics.attrib.pop(name, None)
            for element in (graphics, *graphics.findall("listen")):
                if _MADE_PATH.search(element.get("socket", "")):
                    del element.attrib["socket"]
        for interface in self.root.findall("./devices/interface"):
            for target in interface.findall("target"):
                if _MADE_INTERFACE.fullmatch(target.get("dev", "")):
                    interface.remove(target)
            for source in interface.findall("source[@network]"):
                for name in ("portid", "bridge"):
                    source.attrib.pop(name, None)

    def _disk(self, disk: Any, places: Mapping[str, Place | None]) -> None:
        target = disk.find("target")
        name = "" if target is None else target.get("dev", "")
        device = disk.get("device", "disk")
        if device in ("cdrom", "floppy"):
            if disk.find("source") is not None:
                self.say(f"{name}: the {device} has no medium in it any more")
            for tag in ("source", "backingStore", "mirror"):
                _remove(disk, ".", tag)
            disk.set("type", "file")
        elif name not in places:
            self.say(f"{name}: was not restored: removed from the domain")
            self.root.find("devices").remove(disk)
        elif (place := places[name]) is not None:
            self._place(disk, name, place)

    def _place(self, disk: Any, name: str, place: Place) -> None:
        if disk.find(".//encryption") is not None:
            self.say(f"{name}: was encrypted, its restored image is not")
        # auth and encryption stood there in older versions. Backing images and a data file are found by libvirt in
        # the image itself; those of the original are not beside the new one.
        for tag in ("source", "backingStore", "mirror", "auth", "encryption"):
            _remove(disk, ".", tag)
        disk.set("type", place.type)
        disk.set("device", "disk")
        for attribute in ("rawio", "sgio"):
            disk.attrib.pop(attribute, None)
        driver = disk.find("driver")
        if driver is None:
            driver = ElementTree.SubElement(disk, "driver", name="qemu")
        driver.set("type", place.format)
        if place.format != "qcow2":
            _remove(driver, ".", "metadata_cache")
        elif disk.find("shareable") is not None:
            self.say(f"{name}: was shared by several domains, which a qcow2 image cannot be")
            _remove(disk, ".", "shareable")
        disk.insert(0, place.source())

    def _restored_files(self, files: Mapping[tuple[str, str], str | None], wishes: Wishes) -> None:
        os_ = self.root.find("os")
        for role, path, element in list(self._files()):
            key = role, path or ""
            restored = files.get(key)
            if restored is not None:
                file_elements.set_file_path(element, restored)
                if role == "loader" and restored != path:
                    # With it libvirt looks for a loader that it knows, and takes no other.
                    os_.attrib.pop("firmware", None)
                    _remove(os_, ".", "firmware")
                continue
            why = "is not in the backup" if key in files or path is None else "was not restored"
            if wishes.keep_identity or not _is_written(role, element, os_):
                if key in files or path is None:
                    self.say(f"{role} {path or 'on the network'} is not in the backup: the domain needs it there")
            elif role in file_elements.WRITTEN_ROLES:
                # The original's: two domains must not write to it.
                self.say(f"{role} {path or 'on the network'} {why}: the domain gets a new one")
                file_elements.forget_file(element)
            else:
                raise Error("domain XML", f"{role} {path} {why}, and the original writes to it: see --keep-identity")

    def _output(self, directory: str | None, taken: set[str]) -> None:
        """
        Have no output of the original's: files that its character devices write to.

        directory: for its own; without one libvirt has it for whoever opens the console. taken (set of
        str): paths in it that are others'.
        """
        moved: dict[str, str] = {}  # a console may be a serial device once more

        def own(device: Any, path: str, directory: str) -> str:
            if path not in moved:
                name = os.path.basename(path)
                new = os.path.join(directory, name if rules.is_safe_name(name) else f"{device.tag}.log")
                number = 1
                while new in taken or new in moved.values():
                    number += 1
                    new = os.path.join(directory, f"{device.tag}.{number}.log")
                moved[path] = new
                self.outputs.append(new)
                self.say(f"{device.tag}: its output goes to {new}: {path} is the original's")
            return moved[path]

        for device in self.root.findall("./devices/*"):
            source = device.find("source")
            if device.tag in _CHARACTER_DEVICES and device.get("type") == "file" and source is not None:
                path = source.get("path", "")
                if directory is not None:
                    source.set("path", own(device, path, directory))
                else:
                    self.say(f"{device.tag}: its output is for virsh console: {path} is the original's")
                    device.set("type", "pty")
                    device.remove(source)
            for log in device.findall("log"):
                if directory is not None and log.get("file"):
                    log.set("file", own(device, log.get("file"), directory))
                else:
                    self.say(f"{device.tag}: is not logged: {log.get('file')} is the original's")
                    device.remove(log)

    def _other_state(self) -> None:
        """Name nothing else that the original writes, and is not in a backup."""
        for memory in self.root.findall("./devices/memory"):
            path = memory.findtext("source/path")
            if path:
                self.say(f"{memory.get('model')} {path}: is not in the backup: removed from the domain")
                self.root.find("devices").remove(memory)
        for pstore in self.root.findall("./devices/pstore"):
            if pstore.find("path") is not None:
                self.say(f"pstore {pstore.findtext('path')}: is not in the backup: the domain gets a new one")
                _remove(pstore, ".", "path")
        _remove(self.root, "./devices/tpm/backend[@type='emulator']", "source")

    def _graphics(self) -> None:
        """Let nobody in whom a password kept out: it was not stored, and nothing tells whether there was one."""
        devices = self.root.find("devices")
        for graphics in self.root.findall("./devices/graphics"):
            kind = graphics.get("type")
            if kind not in ("vnc", "spice", "rdp") or graphics.get("passwd") is not None or not _is_open(graphics):
                continue
            self.say(
                f"{kind}: switched off, since its password, if it had one, is not in the backup: set one, "
                "or say --keep-graphics"
            )
            if kind == "rdp":
                devices.remove(graphics)
                continue
            # The device stays, for others depend on it; virt-viewer --attach still gets there, through libvirt.
            graphics.attrib = {"type": kind}
            _remove(graphics, ".", "listen")
            graphics.insert(0, ElementTree.Element("listen", type="none"))


def _is_open(graphics: Any) -> bool:
    """Whether somebody can connect to it who has no right to a socket file."""
    listens = graphics.findall("listen")
    if graphics.get("socket") is not None and not listens:
        return False
    return not listens or any(listen.get("type") not in ("none", "socket") for listen in listens)


def _is_written(role: str, element: Any, os_: Any) -> bool:
    """Whether a running guest writes to the file of an element of one of file_elements.FILE_ROLES."""
    if role != "loader":
        return role in file_elements.WRITTEN_ROLES
    return element.get("type") == "pflash" and element.get("readonly") != "yes" and os_.find("nvram") is None


def _root(head: Mapping[str, Any], key: str) -> Any:
    text = head.get(key)
    if not isinstance(text, str) or not text:
        return None
    root = domxml.parse(text, "domain XML", comments=True)
    if root.tag != "domain":
        raise Error("domain XML", f"is not a domain, but <{root.tag}>")
    return root


def _remove(root: Any, parents: str, tag: str) -> None:
    for parent in root.findall(parents):
        for element in parent.findall(tag):
            parent.remove(element)
