# SPDX-License-Identifier: LGPL-2.1-or-later
"""Elements of a domain that name files beside its disks: loader, nvram, kernel and others. Pure."""

from __future__ import annotations

from xml.etree import ElementTree

from vnb.virt.domxml import parse

FILE_ROLES = ("loader", "nvram", "varstore", "kernel", "initrd", "dtb", "shim")
WRITTEN_ROLES = ("nvram", "varstore")  # by the firmware, while the guest runs
STABLE_ROLES = tuple(role for role in FILE_ROLES if role not in WRITTEN_ROLES)  # the guest never writes to them


def files(domain_xml: str) -> list[tuple[str, str]]:
    """[(role, path)] of the files that the domain needs beside its disks; an nvram may be a block device."""
    root = parse(domain_xml, "domain XML")
    found = [(role, file_path(element)) for role in FILE_ROLES for element in root.iterfind(f"./os/{role}")]
    return [(role, path) for role, path in found if path]


def remote_firmware(domain_xml: str) -> list[str]:
    """What is no file and no device of the host, and a domain's firmware writes to it."""
    found = parse(domain_xml, "domain XML").iterfind("./os/nvram")
    return [f"its nvram, of type {element.get('type')}" for element in found
            if file_path(element) is None and is_named(element)]


def leaves_nvram_to_libvirt(root: ElementTree.Element) -> bool:
    """Whether a domain (Element) boots by UEFI that remembers something, and its definition does not say where."""
    os_ = root.find("os")
    if os_ is None or any(is_named(element) for tag in WRITTEN_ROLES for element in os_.iterfind(tag)):
        return False
    loader = os_.find("loader")
    if loader is None:
        loader = ElementTree.Element("loader")
    if loader.get("stateless") == "yes":
        return False
    return os_.get("firmware") == "efi" or (loader.get("type"), loader.get("readonly")) == ("pflash", "yes")


def file_path(element: ElementTree.Element) -> str | None:
    """The absolute path that an element of one of FILE_ROLES names, or None."""
    # An nvram may have a source, as disks have; a varstore has an attribute.
    source = element.find("source")
    if source is not None:
        path = source.get("file") or source.get("dev")
    else:
        path = element.get("path") if element.tag == "varstore" else element.text
    path = (path or "").strip()
    return path if path.startswith("/") else None


def is_named(element: ElementTree.Element) -> bool:
    """Whether an element of one of FILE_ROLES names anything: a file, a device, or a place on the network."""
    source = element.find("source")
    if source is not None:
        return bool(source.attrib or len(source))
    return bool(((element.get("path") if element.tag == "varstore" else element.text) or "").strip())


def set_file_path(element: ElementTree.Element, path: str) -> None:
    """Have an element of one of FILE_ROLES name another file."""
    source = element.find("source")
    if source is not None:
        element.set("type", "file")
        source.attrib = {"file": path}
        for child in list(source):
            source.remove(child)
    elif element.tag == "varstore":
        element.set("path", path)
    else:
        element.text = path


def forget_file(element: ElementTree.Element) -> None:
    """Have an nvram or varstore name nothing any more: libvirt makes a new one, of the same template."""
    kept = ("template", "templateFormat")
    element.attrib = {key: value for key, value in element.attrib.items() if key in kept and value}
    element.text = None
    for child in list(element):
        element.remove(child)
