# SPDX-License-Identifier: LGPL-2.1-or-later
"""Directories as virtnbdbackup leaves them, made here: facts of its format, own code."""

import json
import random

from lz4.frame import compress

SIZE = 1 << 20
CPT = "virtnbdbackup"
DOMAIN = "<domain><name>vm</name><uuid>u-1</uuid><os><nvram>/var/lib/nvram/vm_VARS.fd</nvram></os>" \
         "<devices><disk><target dev='vda'/><source file='/images/a.qcow2'/></disk></devices></domain>"


def meta(disk="vda", number=0, parent=None, **changes):
    parent = number - 1 if parent is None and number else parent
    return {
        "virtualSize": SIZE, "dataSize": 0, "date": f"2026-01-31T1{number}:00:00.000000", "diskName": disk,
        "diskFormat": "qcow2", "checkpointName": f"{CPT}.{number}", "compressed": False, "compressionMethod": "lz4",
        "parentCheckpoint": "" if not number else f"{CPT}.{parent}", "incremental": bool(number), "streamVersion": 2,
        **changes,
    }


def frame(kind, start, length):
    return b"%s %016x %016x\r\n" % (kind.encode(), start, length)


def data_file(path, header, extents, chunk=64 << 10):
    """Write one: extents is [(offset, bytes, or the length of a zero one)]."""
    compressed = header["compressed"] is not False
    header = {**header, "dataSize": header.get("dataSize") or sum(
        len(content) for _, content in extents if isinstance(content, bytes))}
    text = json.dumps(header, indent=4).encode()
    parts = [frame("meta", 0, len(text)), text, b"\r\n"]
    sizes = []
    for offset, content in extents:
        if not isinstance(content, bytes):
            parts.append(frame("zero", offset, content))
            continue
        parts.append(frame("data", offset, len(content)))
        if compressed:
            pieces = [compress(content[at : at + chunk], content_checksum=True, block_checksum=True)
                      for at in range(0, len(content), chunk)]
            parts += pieces
            lengths = [len(piece) for piece in pieces]
            sizes.append({sum(lengths): lengths} if len(pieces) > 1 else lengths[0])
        else:
            parts.append(content)
        parts.append(b"\r\n")
    parts.append(frame("stop", 0, 0))
    if compressed:
        text = json.dumps(sizes).encode()
        parts += [text, b"\r\n", frame("comp", 0, len(text))]
    content = b"".join(parts)
    path.write_bytes(content)
    return content


def noise(length, seed=0):
    return random.Random(seed).randbytes(length)


def backup(directory, compressed=False, disks=("vda",), sizes=(70_000, 200_000), chunk=64 << 10):
    """A full backup and two increments, of so many bytes; returns {checkpoint: {disk: bytes}}."""
    directory.mkdir(exist_ok=True)
    image = {disk: bytearray(SIZE) for disk in disks}
    states = {}
    for number, disk in ((number, disk) for number in range(3) for disk in disks):
        level = "full" if number == 0 else f"inc.{CPT}.{number}"
        changes = [(4096 * (9 * number + 1), noise(sizes[number > 0], number)), (SIZE - 100, b"z" * 100)]
        extents = changes
        if number == 0:
            first, second = changes
            end = first[0] + len(first[1])
            extents = [(0, first[0]), first, (end, second[0] - end), second]
        for offset, content in changes:
            image[disk][offset : offset + len(content)] = content
        data_file(directory / f"{disk}.{level}.data", meta(disk, number, compressed=compressed), extents, chunk)
        states.setdefault(f"{CPT}.{number}", {})[disk] = bytes(image[disk])
        (directory / f"vmconfig.{CPT}.{number}.xml").write_text(DOMAIN)
    (directory / "vm.cpt").write_text(json.dumps(list(states)))
    return states
