# SPDX-License-Identifier: LGPL-2.1-or-later
"""Domain, checkpoint and backup XML: what libvirt says and what we ask of it. Pure: text in, text out."""

from __future__ import annotations

import json
from xml.etree import ElementTree
from xml.parsers import expat

from vnb.base.errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Sequence
    from typing import Any


class Disk:
    """
    A disk of a domain.

    name: the target, as vda. device: disk, cdrom, floppy, lun. type: file, block, network, ...
    format: of the image. path: of the image, if it is a local file or block device.
    layers: what names its image, and those below it as far as the XML has them; a path, or what a
    network's or volume's source says. formats: of these. data: what names
    their data files. ends: the XML says that nothing is below the last of them; where it does not, that is for
    the image to say. readonly, empty. encrypted, sliced: it, one below, or the data file of one is.
    shareable: other domains may use it at the same time. volume ((pool, name) or None): of a storage pool.
    no_job_because: why libvirt can make no backup job of it. on_iothread: it or its controller.
    """

    def __init__(self, element: ElementTree.Element, on_iothread: bool = False) -> None:
        self.on_iothread = on_iothread
        source = element.find("source")
        driver = element.find("driver")
        self.name = _target(element).get("dev", "")
        self.device = element.get("device", "disk")
        self.type = element.get("type", "file")
        self.format = "raw" if driver is None else driver.get("type", "raw")
        self.empty = source is None or not (source.attrib or len(source))
        self.path = None if source is None or self.type not in ("file", "block") else _image_of(element)
        self.volume = None
        if source is not None and self.type == "volume" and not self.empty:
            self.volume = (source.get("pool"), source.get("volume"))
        self.shareable = element.find("shareable") is not None
        self.no_job_because = _no_job_because(element)
        self.readonly = element.find("readonly") is not None
        places = list(_chain(element))
        stores = places[1:]
        named = [place for place in places if _image_of(place)]
        self.layers = [image for image in map(_image_of, named) if image]
        self.formats = [self.format if place is element else _format_of(place) for place in named]
        self.ends = any(place.find("source") is None for place in stores)
        outside = [place.find("source/dataStore") for place in named]
        self.data = [None if place is None else _image_of(place) for place in outside]
        places += [place for place in outside if place is not None]
        # Whoever defined it may have put it into either.
        self.encrypted = _has(("encryption", "source/encryption"), places)
        self.sliced = _has(("source/slices",), places)

    @property
    def left_out_because(self) -> str | None:
        """Why this is no disk to back up, or None."""
        if self.device != "disk":
            return f"is a {self.device}"
        if self.empty:
            return "is empty"
        if self.readonly:
            return "is read-only"
        return None

    @property
    def kind_of_qemu(self) -> str | None:
        """What it is, where what the guest sees is not in its file as it stands there, or None."""
        if self.path is None:
            return f"a disk of type {self.type}"
        if self.encrypted:
            return "an encrypted disk"
        if self.sliced:
            return "a disk that is a slice of a file"
        return None


def _target(element: ElementTree.Element) -> ElementTree.Element:
    found = element.find("target")
    return ElementTree.Element("target") if found is None else found


def _chain(element: ElementTree.Element | None) -> Iterator[ElementTree.Element]:
    """A disk element, then the backingStore elements below it; a mirror, the copy of a block job, has others."""
    while element is not None:
        yield element
        element = element.find("backingStore")


def _has(paths: Sequence[str], places: Sequence[ElementTree.Element]) -> bool:
    return any(place.find(path) is not None for place in places for path in paths)


def _no_job_because(element: ElementTree.Element) -> str | None:
    """See Disk: what libvirt's qemuDomainDiskBlockJobIsSupported() refuses."""
    if element.get("type") == "vhostuser":
        return "is a vhost-user disk, whose data QEMU does not read"
    if element.find("transient") is not None:
        return "is transient, and libvirt makes no backup job of such a disk"
    if _target(element).get("bus") == "sd":
        return "is on the bus sd, and libvirt makes no backup job of such a disk"
    return None


def _format_of(store: ElementTree.Element) -> str | None:
    """The format of a backingStore element's image, or None."""
    format_ = store.find("format")
    return None if format_ is None else format_.get("type")


def _image_of(element: ElementTree.Element) -> str | None:
    """What names the image of a disk, backingStore or dataStore element, or None."""
    source = element.find("source")
    if source is None:
        return None
    path = source.get("file") or source.get("dev") or source.get("dir")
    if path:
        return path
    words = [source.get(key) for key in ("protocol", "pool", "name", "volume", "namespace")]
    words += [value for address in source.iterfind("address") for value in address.attrib.values()]  # of an NVMe disk
    return " ".join(word for word in words if word) or None


def parse(text: str, what: str, comments: bool = False) -> ElementTree.Element:
    """
    The root element of XML that has no document type, so no entities; Error.

    A prefix is a part of a name, and xmlns:PREFIX is an attribute: what is written again has them as they were. So
    have comments and processing instructions, which libvirt keeps in metadata alone, where comments says so.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise Error(what, "XML with a document type is not accepted")
    builder = ElementTree.TreeBuilder(insert_comments=True, insert_pis=True)
    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data
    if comments:
        parser.CommentHandler, parser.ProcessingInstructionHandler = builder.comment, builder.pi
    try:
        parser.Parse(text.encode(), True)
    except (expat.ExpatError, UnicodeEncodeError) as error:
        raise Error(what, f"malformed XML: {error}") from None
    return builder.close()


def disks(domain_xml: str) -> list[Disk]:
    """The disks (list of Disk) of a domain's XML, in its order."""
    root = parse(domain_xml, "domain XML")
    return [Disk(element, _is_on_iothread(element, root)) for element in root.iterfind("./devices/disk")]


def _is_on_iothread(element: ElementTree.Element, root: ElementTree.Element) -> bool:
    """Whether a disk, or the controller that it is at, has an iothread or several."""
    address = element.find("address[@type='drive']")
    index = None if address is None else address.get("controller")
    drivers = element.findall("driver")
    if index is not None and _target(element).get("bus") == "scsi":
        drivers += root.findall(f"./devices/controller[@type='scsi'][@index='{int(index)}']/driver")
    return any(driver.get("iothread") or driver.find("iothreads") is not None for driver in drivers)


def emulator(domain_xml: str) -> str:
    """The path of the program that runs a domain."""
    return parse(domain_xml, "domain XML").findtext("./devices/emulator", "")


def disk_names(domain_xml: str) -> set[str]:
    """The names of the disks in a domain's XML, which may come from a stream."""
    return {target.get("dev", "") for target in parse(domain_xml, "domain XML").iterfind("./devices/disk/target")}


def bitmaps(checkpoint_xml: str) -> dict[str, str]:
    """{disk name: bitmap name} of a checkpoint's XML: the disks that it can give changes for."""
    return {
        disk.get("name", ""): disk.get("bitmap", "") or disk.get("name", "")
        for disk in parse(checkpoint_xml, "checkpoint XML").iterfind("./disks/disk")
        if disk.get("checkpoint") == "bitmap"
    }


def images_then(checkpoint_xml: str) -> dict[str, str]:
    """{disk name: what names its image} of the domain as a checkpoint's XML has it; {} where it does not have it."""
    found = parse(checkpoint_xml, "checkpoint XML").iterfind("./domain/devices/disk")
    return {disk.name: disk.layers[0] for disk in map(Disk, found) if disk.layers}


def backup_endpoint(backup_xml: str) -> str | None:
    """Where the server of a running backup job listens: the key of its endpoint (see vnb.nbd.endpoint), or None."""
    # libvirt writes a tab, which a domain's name and so its directory may have, as it is: in an attribute a parser
    # takes that for a space. It indents by spaces.
    server = parse(backup_xml.replace("\t", "&#9;"), "backup XML").find("server")
    if server is None:
        return None
    return server.get("socket") or f"{server.get('name')}:{server.get('port')}"


def backup(server: dict[str, str], wanted: Iterable[tuple[str, str, str | None, str]], others: Iterable[str]) -> str:
    """
    The XML of a pull-mode backup job.

    server: {attribute: value} of where it listens.
    wanted: list of (disk name, name of its export, checkpoint its changes are counted from or None, scratch path).
    others: names of the domain's disks that take no part.
    """
    root = ElementTree.Element("domainbackup", mode="pull")
    ElementTree.SubElement(root, "server", server)
    disks_ = ElementTree.SubElement(root, "disks")
    for name, export, since, scratch in wanted:
        mode = {"backupmode": "incremental", "incremental": since} if since else {"backupmode": "full"}
        attributes = {"name": name, "backup": "yes", "type": "file", "exportname": export, **mode}
        disk = ElementTree.SubElement(disks_, "disk", attributes)
        ElementTree.SubElement(disk, "driver", type="qcow2")
        ElementTree.SubElement(disk, "scratch", file=scratch)
    for name in others:
        ElementTree.SubElement(disks_, "disk", name=name, backup="no")
    return ElementTree.tostring(root, encoding="unicode")


def checkpoint(name: str, description: str, wanted: Iterable[str], others: Iterable[str]) -> str:
    """The XML of a checkpoint with bitmaps on the disks named in wanted and none on others."""
    root = ElementTree.Element("domaincheckpoint")
    ElementTree.SubElement(root, "name").text = name
    ElementTree.SubElement(root, "description").text = description
    disks_ = ElementTree.SubElement(root, "disks")
    for disk in wanted:
        ElementTree.SubElement(disks_, "disk", name=disk, checkpoint="bitmap", bitmap=name)
    for disk in others:
        ElementTree.SubElement(disks_, "disk", name=disk, checkpoint="no")
    return ElementTree.tostring(root, encoding="unicode")


def checkpoint_of_one(xml: str, disk: str) -> str:
    """The XML of a checkpoint with the bitmap of one of its disks alone."""
    root = parse(xml, "checkpoint XML")
    for parent in root.findall("parent"):
        root.remove(parent)
    for element in root.iterfind("./disks/disk"):
        if element.get("name") != disk:
            element.attrib = {"name": element.get("name", ""), "checkpoint": "no"}
    return ElementTree.tostring(root, encoding="unicode")


def checkpoint_of(xml: str, disks: Container[str], present: Container[str]) -> str:
    """
    The XML of a checkpoint without a parent, and with the bitmaps of some disks alone.

    present: the disks that the domain has: libvirt takes none that names others.
    """
    root = parse(xml, "checkpoint XML")
    for element in root.findall("parent"):
        root.remove(element)
    for parent in root.findall("disks"):
        for element in parent.findall("disk"):
            name = element.get("name", "")
            if name not in present:
                parent.remove(element)
            elif name not in disks:
                element.attrib = {"name": name, "checkpoint": "no"}
    return ElementTree.tostring(root, encoding="unicode")


def with_creation_time(xml: str, seconds: int) -> str:
    """The XML of a checkpoint with the time of its creation (Unix time): libvirt redefines none without."""
    root = parse(xml, "checkpoint XML")
    ElementTree.SubElement(root, "creationTime").text = str(seconds)
    return ElementTree.tostring(root, encoding="unicode")


def sizes(checkpoint_xml: str) -> dict[str, int]:
    """{disk name: bytes that an increment would have} of a checkpoint's XML that has them."""
    return {
        disk.get("name", ""): int(disk.get("size", 0))
        for disk in parse(checkpoint_xml, "checkpoint XML").iterfind("./disks/disk")
        if disk.get("size") is not None
    }


def has_tpm(domain_xml: str) -> bool:
    """Whether the domain has an emulated TPM, whose state is not in any disk."""
    return parse(domain_xml, "domain XML").find("./devices/tpm/backend[@type='emulator']") is not None


_AGENT = "./devices/channel/target[@name='org.qemu.guest_agent.0']"


def has_agent(domain_xml: str) -> bool:
    """Whether the domain has a channel for a guest agent."""
    root = parse(domain_xml, "domain XML")
    return root.find(_AGENT) is not None


def is_agent_away(domain_xml: str) -> bool:
    """Whether nobody in the guest has opened that channel, as libvirt says of a domain that runs."""
    target = parse(domain_xml, "domain XML").find(_AGENT)
    return target is not None and target.get("state") == "disconnected"


def qemu_user(domain_xml: str) -> str | None:
    """The user and group that QEMU runs as ("+64055:+107"), or None."""
    return parse(domain_xml, "domain XML").findtext("./seclabel[@model='dac']/label")


def default_qemu_user(capabilities_xml: str) -> str | None:
    """The user and group that QEMU runs as where a domain says nothing else ("+64055:+107"), or None."""
    return parse(capabilities_xml, "capabilities").findtext("./host/secmodel[model='dac']/baselabel")


def about(checkpoint_xml: str) -> dict[str, Any] | None:
    """What a checkpoint of ours says of itself (dict: owner, catalog, destination, base, run, chain), or None."""
    description = parse(checkpoint_xml, "checkpoint XML").findtext("description") or ""
    word, _, text = description.partition(" ")
    if word != "vnb":
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def pool_path(pool_xml: str) -> str | None:
    """The directory of a storage pool, or None."""
    return parse(pool_xml, "storage pool XML").findtext("./target/path")
