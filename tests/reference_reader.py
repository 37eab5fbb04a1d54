# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A reader of the extent stream that is slow and simple: formats/extent-stream.md in msgpack and xxh3, nothing of vnb.

It is there to be compared with: what this one and the fast one say of a stream must be the same.
"""

import hashlib
import re

import msgpack
from xxhash import xxh3_64_intdigest as xxh3

KiB, MiB = 1 << 10, 1 << 20
TYPES = ("vnb", "disk", "file", "same", "extent", "data", "index", "end", "tail")


class Refused(Exception):
    """Not a sound stream."""


def need(condition, reason):
    if not condition:
        raise Refused(reason)


def frames(content):
    """Yield (start, elements before the sum, sum, payload or None) of all frames."""
    at = 0
    while at < len(content):
        start = at
        unpacker = msgpack.Unpacker(max_buffer_size=8 * MiB)
        unpacker.feed(content[start : start + 8 * MiB])
        try:
            elements, starts = [], []
            for _ in range(unpacker.read_array_header()):
                starts.append(start + unpacker.tell())
                elements.append(unpacker.unpack())
        except (msgpack.UnpackException, ValueError, TypeError) as error:
            raise Refused(f"no frame: {error}") from None
        at = start + unpacker.tell()
        need(3 <= len(elements) <= 31 and is_name(elements[0]), "no type")
        payload = elements.pop() if isinstance(elements[-1], bytes) else None
        sum_at = starts[len(elements) - 1]
        sum_ = elements.pop()
        header = content[start:sum_at]
        size = at - start - (len(payload) if payload is not None else 0)
        kind = elements[0]
        need(len(elements) >= 1 and content[sum_at] == 0xCF, "no sum")
        need(payload is None or content[sum_at + 9] == 0xC6, "the payload is no bin 32")
        need(size <= (4 * MiB if kind == "vnb" else 256 * KiB) and len(payload or b"") <= 4 * MiB, "too large")
        need(sum_ == xxh3(header + (payload if payload is not None and kind != "data" else b"")), "bad sum")
        need(header == encoded(elements, payload is not None), "another form")
        for element in elements:
            need(is_value(element, 16), "a value that the format does not know")
        need(sum(map(values_in, elements)) <= 12288, "too many values")
        yield start, elements, sum_, payload


def encoded(elements, has_payload):
    """The bytes before the sum, as they must be."""
    count = len(elements) + 1 + has_payload
    header = bytes([0x90 + count]) if count < 16 else b"\xdc" + count.to_bytes(2, "big")
    fixed = {"data": (None, 2, 8, 4, None, 8), "tail": (None, 8, 8)}.get(elements[0], ())
    need(elements[0] not in ("data", "tail") or len(fixed) == len(elements), "malformed")
    for element, size in zip(elements, fixed or [None] * len(elements)):
        if size is None:
            header += msgpack.packb(element)
        else:
            need(type(element) is int and 0 <= element < 1 << 8 * size, "malformed")
            header += {2: b"\xcd", 4: b"\xce", 8: b"\xcf"}[size] + element.to_bytes(size, "big")
    return header


def is_value(value, room):
    if isinstance(value, (list, dict)):
        inner = value.values() if isinstance(value, dict) else value
        return room > 0 and all(is_value(one, room - 1) for one in inner)
    return value is None or isinstance(value, (bool, str)) or (isinstance(value, int) and 0 <= value < 1 << 64)


def values_in(value):
    """How many values are in an array or a map, and in those in it."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return len(inner) + sum(map(values_in, inner))


def is_name(value):
    return isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable()


def is_integer(*values):
    return all(type(value) is int for value in values)


def segments(content):
    """A list of (head, disks, frames after the disks, end, length); frames are (elements, payload)."""
    need(content, "empty")
    result, source, start = [], frames(content), 0
    while start < len(content):
        found = segment(source, start)
        result.append(found)
        start += found[-1]
    need("next" not in result[-1][0], "another segment was to follow")
    return result


def segment(source, start):
    sums, cursors, covered, found = [], {}, {}, []
    counts = {"frames": 0, "data": 0, "zero": 0, "hole": 0, "stored": 0}
    head, disks, last_index, part, places, described = None, [], 0, None, set(), {}
    came = []
    for at, elements, sum_, payload in source:
        kind, *rest = elements
        need((head is None) == (kind == "vnb"), "no head, or a second one")
        need(part is None or kind == "file", "a part of a file is missing")
        if kind == "vnb":
            need(len(rest) == 2 and payload is None and type(rest[0]) is int and rest[0] == 1, "version")
            head = rest[1]
            check_head(head)
            described = {(file["role"], file["path"]): file for file in head.get("files", [])}
            whole = b""
        elif kind == "disk":
            need(not places and len(rest) == 2 and payload is None and type(rest[0]) is int, "malformed disk")
            need(rest[0] == len(disks) < 1024, "number of a disk")
            check_disk(rest[1], head, disks)
            disks.append(rest[1])
        elif kind == "file":
            need("extent" not in places and len(rest) == 1 and payload is not None, "malformed file")
            if part is None and isinstance(rest[0], dict):
                came.append((rest[0].get("role"), rest[0].get("path")))
            part = check_file(rest[0], payload, part)
            whole += payload
            if part is None:
                check_content(rest[0], whole, described)
                whole = b""
        elif kind == "same":
            need("extent" not in places and len(rest) == 1 and payload is None and isinstance(rest[0], dict), "same")
            need(names_a_file(rest[0]) and is_integer(rest[0].get("mode")), "malformed same")
            need("base" in described.get((rest[0]["role"], rest[0]["path"]), {}), "a file that the base does not have")
            came.append((rest[0]["role"], rest[0]["path"]))
        elif kind in ("extent", "data"):
            if kind == "data":
                number, offset, length, codec, _hash = rest
                need(head["stage"] == "data" and codec in ("none", "lz4", "zstd") and 0 < length <= 4 * MiB, "data")
                need(len(payload) == length if codec == "none" else 0 < len(payload) < length, "size of a payload")
                runs = [offset, length, 0]
                counts["stored"] += len(payload)
            else:
                need(head["stage"] != "disks" and payload is None and len(rest) == 2, "malformed extent")
                number, runs = rest
                need(isinstance(runs, list) and is_integer(*runs) and len(runs) % 3 == 0, "malformed extent")
                need(runs and all(state in (0, 2, 3) for state in runs[2::3]), "state")
                need(head["stage"] == "extents" or 0 not in runs[2::3], "data that were never read")
            need(is_integer(number) and number < len(disks), "no such disk")
            for offset, length, state in zip(runs[0::3], runs[1::3], runs[2::3]):
                need(length > 0 and cursors.get(number, 0) <= offset, "order of extents")
                need(offset + length <= disks[number]["size"], "extent outside of the disk")
                cursors[number] = offset + length
                covered[number] = covered.get(number, 0) + length
                counts[{0: "data", 2: "zero", 3: "hole"}[state]] += length
        elif kind == "index":
            need(len(rest) == 3 and is_integer(*rest) and payload is not None, "malformed index")
            need(rest[0] < len(disks) and rest[1] > 0 and len(payload) == 32 * rest[1], "malformed index")
            need(rest[2] == (at - last_index if last_index else 0), "link of an index")
            last_index = at
        elif kind == "end":
            counts["digest"] = xxh3(b"".join(one.to_bytes(8, "big") for one in sums))
            counts["frames"] = len(sums)
            need(all(came.count(file) < 2 for file in described), "a file that is there twice")
            need(head["stage"] == "disks" or all(file in came for file in described), "a file that is not there")
            need(len(rest) == 1 and payload is None and isinstance(rest[0], dict), "malformed end")
            need(all(type(rest[0].get(key)) is int and rest[0][key] == counts[key] for key in counts), "counts")
            for number, disk in enumerate(disks):
                full = disk["level"] == "full" and head["stage"] != "disks"
                need(not full or covered.get(number, 0) == disk["size"], "a full disk with a gap")
            tail_at, tail, _, _ = next(source, (0, [None], 0, None))
            need(tail == ["tail", tail_at + 33 - start, tail_at - last_index if last_index else 0], "tail")
            return head, disks, found, rest[0], tail_at + 33 - start
        else:
            need(kind != "tail", "a tail without end")
        sums.append(sum_)
        if kind not in ("vnb", "disk"):
            places.add("extent" if kind in ("extent", "data") else "other")
            found.append((elements, payload))
    raise Refused("no end")


def check_head(head):
    need(isinstance(head, dict), "malformed head")
    for key in ("id", "point", "uuid"):
        need(is_name(head.get(key)), key)
    domain = head.get("domain")
    need(isinstance(domain, str) and 0 < len(domain) <= 255 and not set(domain) & set("\0\n"), "domain")
    for key in ("parent", "checkpoint"):
        need(key in head and (head[key] is None or is_name(head[key])), key)
    need(all(is_name(head[key]) for key in ("chain", "run", "next") if key in head), "chain, run or next")
    need(all(head.get(key) is None or isinstance(head[key], str) for key in ("domain_xml", "checkpoint_xml")), "XML")
    grows = head.get("grows", {})
    need(isinstance(grows, dict), "grows")
    need(all(is_name(name) and "/" not in name and name[0] != "." for name in grows), "grows")
    need(all(is_integer(size) and size < 1 << 63 for size in grows.values()), "grows")
    created = head.get("created")
    time = r"[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}\.[0-9]{6}Z"
    need(isinstance(created, str) and re.fullmatch(time, created), "created")
    files = head.get("files", [])
    need(isinstance(files, list) and all(isinstance(file, dict) and names_a_file(file) for file in files), "files")
    need(len({(file["role"], file["path"]) for file in files}) == len(files), "a file that is described twice")
    for file in files:
        need(is_integer(file.get("size")) and isinstance(file.get("sha256"), str), "files")
        need(re.fullmatch("[0-9a-f]{64}", file["sha256"]), "files")
        need("base" not in file or (file["base"] is True and head["parent"] is not None), "files")
    need(head.get("stage") in ("disks", "extents", "data"), "stage")
    need(head.get("level") in (("inc", "diff") if head["parent"] is not None else ("full", "copy")), "level")
    need(head["parent"] != head["point"], "its own parent")


def check_disk(disk, head, before):
    need(isinstance(disk, dict) and is_name(disk.get("name")), "name of a disk")
    need("/" not in disk["name"] and disk["name"][0] != "." and disk["name"] not in [one["name"] for one in before], "")
    need(is_integer(disk.get("size")) and disk["size"] < 1 << 63 and disk.get("level") in ("full", "inc"), "disk")
    need(isinstance(disk.get("image", {}), dict) and isinstance(disk.get("source", {}), dict), "image or source")
    need(disk["level"] == "full" or head["parent"] is not None, "changes in a full segment")
    need("source" not in disk or head["stage"] != "data", "a source with data")


def names_a_file(fields):
    return is_name(fields.get("role")) and isinstance(fields.get("path"), str) and len(fields["path"]) <= 4096


def check_content(file, whole, described):
    found = described.get((file["role"], file["path"]))
    if found is not None:
        need("base" not in found and found["size"] == file["size"], "another file than the head describes")
        need(found["sha256"] == hashlib.sha256(whole).hexdigest(), "another file than the head describes")


def check_file(file, payload, part):
    """The part (dict, with where it ends) if more are to come, else None."""
    need(isinstance(file, dict) and is_name(file.get("role")) and isinstance(file.get("path"), str), "file")
    need(len(file["path"]) <= 4096 and is_integer(*(file.get(key) for key in ("size", "offset", "mode"))), "file")
    end = file["offset"] + len(payload)
    need(end <= file["size"] and (payload or end == file["size"]), "part of a file")
    need(file["offset"] == (0 if part is None else part["end"]), "part of a file")
    need(part is None or all(file[key] == part[key] for key in ("role", "path", "size")), "part of another file")
    return {**file, "end": end} if end < file["size"] else None
