# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Frames as lines of JSON and back: one object a frame, and nothing lost; vnb-dump(1) has the keys.

Sums, hashes and the digest are strings of 16 hexadecimal digits: many JSON readers round what is over 2^53.
"""

from __future__ import annotations

import base64
import json
import re

from vnb.base.errors import StreamError, os_error
from vnb.format import frame as f
from vnb.format import stream, values
from vnb.format.frame import FrameError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, BinaryIO

    from vnb.format.types import Fields


# The elements of the frames that the format knows, after their type. Others, and malformed ones, have "elements".
KEYS = {
    "vnb": ("version", "fields"),
    "disk": ("disk", "fields"),
    "file": ("fields",),
    "same": ("fields",),
    "extent": ("disk", "runs"),
    "data": ("disk", "offset", "length", "codec", "hash"),
    "index": ("disk", "rows", "back"),
    "end": ("fields",),
    "tail": ("length", "back"),
}
COMMON = ("frame", "sum", "payload", "size", "elements")
# A payload of 4 MiB is 5.6 MiB in base64; text of 4 MiB in a head is 24 MiB, if all of it has to be escaped.
MAX_LINE = 26 << 20
MAX_COMMAS = 2 * f.MAX_VALUES  # outside strings: values between more of them could take gigabytes of memory
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_HEX = re.compile("[0-9a-f]{16}")


def line_of(raw: values.Raw, payloads: bool = True) -> str:
    """
    The line, without a newline, of a frame. It is plain ASCII, so it does no harm to a terminal.

    payloads: False puts their size in their place.
    """
    kind, *elements = raw.fields
    line = {"frame": kind}
    names = KEYS.get(kind, ())
    if elements and len(names) == len(elements):
        line.update(zip(names, elements))
        if kind == "data":
            line["hash"] = f'{line["hash"]:016x}'
        if kind == "end" and isinstance(line["fields"], dict) and type(line["fields"].get("digest")) is int:
            line["fields"] = {**line["fields"], "digest": f'{line["fields"]["digest"]:016x}'}
    else:
        line["elements"] = elements
    line["sum"] = f"{raw.sum:016x}"
    if raw.payload is not None:
        if payloads:
            line["payload"] = base64.b64encode(raw.payload).decode()
        else:
            line["size"] = len(raw.payload)
    return json.dumps(line, separators=(",", ":"))


class JsonReader(stream.Reader):
    """
    A stream from lines of JSON: a Reader, with all its checks, whose places are lines.

    What follows from the rest may be left out of a line: "sum"; "hash" where the codec is none; in the frame "end"
    any key of "fields", or all of it; in "tail" "length" and "back".
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        super().__init__(-1, name)
        self._file = file
        self._number = 0
        self._next: bytes | None = None

    def error(self, reason: object, offset: int | None = None) -> StreamError:
        return StreamError(self.input.name, reason, f"line {self._number}")

    def more(self) -> bool:
        self._next = self._line()
        if self._next is None and self._number == 0:
            raise StreamError(self.input.name, "empty input, expected lines of JSON")
        return self._next is not None

    def raw(self) -> values.Raw:
        line = self._line() if self._next is None else self._next
        self._next = None
        if line is None:
            raise self.error("the input ends before the end of the segment")
        try:
            raw = self._raw(_parse(line))
        except (FrameError, ValueError) as error:
            raise self.error(error) from None
        self.input.offset += len(raw.header) + (0 if raw.payload is None else len(raw.payload))
        return raw

    def _line(self) -> bytes | None:
        try:
            line = self._file.readline(MAX_LINE + 1)
        except OSError as error:
            raise os_error(self.input.name, error, f"line {self._number + 1}") from None
        if not line:
            return None
        self._number += 1
        if len(line) > MAX_LINE:
            raise self.error(f"longer than {MAX_LINE} bytes")
        return line

    def _raw(self, line: dict[str, Any]) -> values.Raw:
        kind = line.get("frame")
        if not isinstance(kind, str) or not f.is_name(kind):
            raise ValueError('no frame: "frame" must name its type')
        names = ("elements",) if "elements" in line or kind not in KEYS else KEYS[kind]
        for key in line:
            if key not in names and (key not in COMMON or key == "elements"):
                raise ValueError(f'frame "{kind}" has no key "{key}"')
        if "size" in line:
            raise ValueError("its payload was left out")
        payload = _base64(line["payload"]) if "payload" in line else None
        if names == ("elements",):
            if not isinstance(line.get("elements"), list):
                raise ValueError('"elements" must be a list')
            fields = [kind, *line["elements"]]
        else:
            line = self._completed(kind, line, payload)
            missing = [name for name in names if name not in line]
            if missing:
                raise ValueError(f'frame "{kind}" needs "{missing[0]}"')
            fields = [kind, *(line[name] for name in names)]
        header, sum_ = _encode(fields, payload)
        if "sum" in line and _hex(line["sum"], "sum") != sum_:
            raise ValueError('"sum" is not that of the frame; left out it is made')
        return values.Raw(fields, sum_, self.input.offset, header, None if payload is None else memoryview(payload))

    def _completed(self, kind: str, line: dict[str, Any], payload: bytes | None) -> dict[str, Any]:
        """The line with what follows from the rest, and with numbers for hexadecimal digits."""
        line = dict(line)
        if kind == "data":
            if "hash" in line:
                line["hash"] = _hex(line["hash"], "hash")
            elif payload is not None and line.get("codec") == "none":
                line["hash"] = f.xxh3(payload)
        elif kind == "end":
            fields = line.setdefault("fields", {})
            if isinstance(fields, dict):
                if "digest" in fields:
                    fields["digest"] = _hex(fields["digest"], "digest")
                if self.segment is not None:
                    for key, value in self.segment.counts.fields().items():
                        fields.setdefault(key, value)
        elif kind == "tail" and self.segment is not None:
            last_index = self.segment.last_index
            line.setdefault("length", self.input.offset + f.TAIL.size - self.segment.start)
            line.setdefault("back", self.input.offset - last_index if last_index else 0)
        return line


def _encode(fields: Fields, payload: bytes | None) -> tuple[bytes, int]:
    """(header, sum) of any frame; FrameError."""
    kind = fields[0]
    if kind == "data" and len(fields) == 6:
        _, disk, offset, length, codec, hash_ = fields
        numbers = (disk, offset, length, hash_)
        tops = (0xFFFF, f.MAX_INTEGER, f.MAX_DATA, f.MAX_INTEGER)
        if codec not in f.CODECS or payload is None or not _are_integers(numbers, tops):
            raise FrameError('malformed frame "data"')
        header, sum_ = f.encode_data(disk, offset, length, codec, hash_, len(payload))
        f.decode(memoryview(header))  # is as strict as any reader
        return header, sum_
    if kind == "tail" and len(fields) == 3:
        if payload is not None or not _are_integers(fields[1:], (f.MAX_INTEGER, f.MAX_INTEGER)):
            raise FrameError('malformed frame "tail"')
        header = f.encode_tail(*fields[1:])
        return header, f.decode(memoryview(header))[1]
    if kind in ("data", "tail"):
        raise FrameError(f'malformed frame "{kind}"')
    return f.encode(fields, payload)


def _are_integers(values: Iterable[object], tops: Iterable[int]) -> bool:
    return all(type(value) is int and 0 <= value <= top for value, top in zip(values, tops))


def _parse(line: bytes) -> dict[str, Any]:
    if _STRING.sub(b"", line).count(b",") > MAX_COMMAS:
        raise ValueError("more values than a frame may have")
    try:
        value = json.loads(
            line.decode(), parse_int=_integer, parse_float=_number, parse_constant=_number, object_pairs_hook=_map
        )
    except json.JSONDecodeError as error:
        part = line.strip() in (b"{", b"[")  # as jq prints it for people
        more = ": a frame takes one line, as jq -c writes it" if part else ""
        raise ValueError(f"not JSON: {error.msg} (column {error.colno}){more}") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("not an object of JSON")
    return value


def _integer(text: str) -> int:
    if len(text) > 20:  # more digits than 64 bits take; to convert millions of them takes minutes
        raise ValueError("an integer is out of range")
    return int(text)


def _number(text: str) -> int:
    raise ValueError(f"{text[:40]} is not an integer")


def _map(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key is there twice")
    return result


def _hex(text: object, key: str) -> int:
    if not isinstance(text, str) or not _HEX.fullmatch(text):
        raise ValueError(f'"{key}" must have 16 hexadecimal digits')
    return int(text, 16)


def _base64(text: object) -> bytes:
    if not isinstance(text, str):
        raise ValueError('"payload" must be base64')
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError('"payload" must be base64') from None
