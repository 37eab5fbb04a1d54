# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Frames: one msgpack array each, as formats/extent-stream.md says. Bytes to fields and back, nothing more.

This module owns every msgpack setting and every limit of the format; it opens nothing.
"""

from __future__ import annotations

import struct

import msgpack
import xxhash

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vnb.format.types import Bytes, Fields


xxh3 = xxhash.xxh3_64_intdigest

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

VERSION = 1
MAX_DATA = 4 * MiB  # plain bytes of one data frame: a stage holds a few of them in 64 MiB
MAX_PAYLOAD = 4 * MiB  # of a file or index frame, and of a frame type we do not know
MAX_HEAD = 4 * MiB  # all of a "vnb" frame: four times the domain's XML, live and inactive, and both in the checkpoint's
MAX_DISK_FRAMES = 1 * MiB  # those of a segment together: a reader keeps them, and a byte may be a value of 64 in memory
MAX_HEADER = 256 * KiB  # all of any other frame but its payload
MAX_EXTENTS = 4096  # in one frame: 80 KiB at most, decoded in a few milliseconds
MAX_DISKS = 1024  # libvirt's own limit is lower; a stream of a million disks is an attack
MAX_ELEMENTS = 31  # of a frame
MAX_MAP = 1024  # keys of a map
MAX_VALUES = 3 * MAX_EXTENTS  # in all arrays and maps of a frame: a byte of a stream can be a value of 64 in memory
MAX_NESTING = 16  # arrays and maps in a field: every encoder, and every reader of JSON, gives up at some depth
MAX_NAME = 255  # characters of a frame's type, and of any name
MAX_INTEGER = (1 << 64) - 1
MAX_OFFSET = (1 << 63) - 1  # NBD's own limit

# States of an extent are the flags of base:allocation in the NBD protocol.
DATA = 0  # to be read
ZERO = 2  # allocated, reads as zeroes
HOLE = 3  # not allocated, reads as zeroes
STATE_NAMES = {DATA: "data", ZERO: "zero", HOLE: "hole"}

CODECS = ("none", "lz4", "zstd")

# A data frame has one encoding only, so that it is parsed at one go: 5 bytes of payload header included.
_DATA = {len(codec): struct.Struct(f">6sBHBQBI{1 + len(codec)}sBQ") for codec in CODECS}
_SUM = struct.Struct(">BQ")
_BIN = struct.Struct(">BI")
_DATA_MAGIC = b"\x98\xa4data"
_U16, _U32, _U64, _BIN32 = 0xCD, 0xCE, 0xCF, 0xC6
SUM_SIZE = _SUM.size
BIN_SIZE = _BIN.size
DATA_HEADER_SIZES = {codec: _DATA[len(codec)].size + SUM_SIZE + BIN_SIZE for codec in CODECS}
MAX_DATA_HEADER = max(DATA_HEADER_SIZES.values())

TAIL = struct.Struct(">6sBQBQBQ")
_TAIL_MAGIC = b"\x94\xa4tail"
HEAD_MAGIC = b"\x94\xa3vnb"
FAILED = "+failed"  # the type of the frame that stands for a stream, see formats/extent-stream.md


class FrameError(ValueError):
    """These bytes are no frame; the message is the reason."""


class Incomplete(Exception):
    """There may be a frame here, but more bytes are needed to tell."""


def encode(fields: Fields, payload: Bytes | None = None) -> tuple[bytes, int]:
    """
    The bytes of a frame up to its payload's first byte, and its sum.

    fields: all before the sum. payload: covered by the sum too.
    Raises FrameError for what no decoder accepts.
    """
    _check_fields(fields, payload is not None)
    try:
        body = _body(fields, payload is not None)
    except (ValueError, TypeError, OverflowError) as error:
        raise FrameError(f'frame "{fields[0]}": {error}') from None
    if len(body) > (MAX_HEAD if fields[0] == "vnb" else MAX_HEADER) - SUM_SIZE - BIN_SIZE:
        raise FrameError(f'frame "{fields[0]}" is too large: {len(body)} bytes')
    if payload is None:
        sum_ = xxh3(body)
        return body + _SUM.pack(_U64, sum_), sum_
    if len(payload) > MAX_PAYLOAD:
        raise FrameError(f'payload of frame "{fields[0]}" is too large: {len(payload)} bytes')
    sum_ = sum_over(body, payload)
    return body + _SUM.pack(_U64, sum_) + _BIN.pack(_BIN32, len(payload)), sum_


def encode_data(disk: int, offset: int, length: int, codec: str, hash_: int, stored: int) -> tuple[bytes, int]:
    """The bytes of a data frame up to its payload's first byte, and its sum. stored: bytes of payload."""
    body = _DATA[len(codec)].pack(
        _DATA_MAGIC, _U16, disk, _U64, offset, _U32, length, _CODEC_BYTES[codec], _U64, hash_
    )
    sum_ = xxh3(body)
    return body + _SUM.pack(_U64, sum_) + _BIN.pack(_BIN32, stored), sum_


def encode_tail(segment_length: int, back: int) -> bytes:
    """The bytes of a tail: both are distances in bytes, see formats/extent-stream.md."""
    body = TAIL.pack(_TAIL_MAGIC, _U64, segment_length, _U64, back, _U64, 0)[:-8]
    return body + struct.pack(">Q", xxh3(body[:-1]))


def _body(fields: Fields, has_payload: bool) -> bytes:
    count = len(fields) + (2 if has_payload else 1)
    return _array(count) + b"".join(map(msgpack.packb, fields))


def decode_tail(view: memoryview) -> tuple[int, int]:
    """(segment length, distance to the last index frame or 0) of a tail's bytes; FrameError."""
    if len(view) != TAIL.size or view[:6] != _TAIL_MAGIC:
        raise FrameError("no tail at the end")
    return _decode_tail(view)[:2]


def _decode_tail(view: memoryview) -> tuple[int, int, int]:
    _, t1, length, t2, back, t3, sum_ = TAIL.unpack(view)
    if (t1, t2, t3) != (_U64, _U64, _U64):
        raise FrameError('frame "tail" is not in its one msgpack form')
    if xxh3(bytes(view[:-SUM_SIZE])) != sum_:
        raise FrameError('bad sum in frame "tail"')
    return length, back, sum_


def decode(view: memoryview) -> tuple[Fields, int, int, int | None]:
    """
    Read the frame at the start of view: (fields, sum, header size, payload size or None).

    fields: all before the sum; those of a data frame are checked. The sum is checked here where there
    is no payload, or where it does not cover the payload (data). Raises FrameError or Incomplete.
    """
    magic = view[:6]
    if magic == _DATA_MAGIC:
        return _decode_data(view)
    if magic == _TAIL_MAGIC:
        if len(view) < TAIL.size:
            raise Incomplete
        length, back, sum_ = _decode_tail(view[: TAIL.size])
        return ["tail", length, back], sum_, TAIL.size, None
    unpacker = msgpack.Unpacker(
        max_buffer_size=MAX_HEAD,
        max_array_len=MAX_VALUES,
        max_map_len=MAX_MAP,
        max_bin_len=0,
        max_ext_len=0,
        ext_hook=_refuse_ext,
    )
    unpacker.feed(view[:MAX_HEAD])
    try:
        _skip(view[:MAX_HEAD])
        return _decode(view, unpacker)
    except msgpack.OutOfData:
        kind = _kind(view)
        if len(view) >= (MAX_HEAD if kind == "vnb" else MAX_HEADER):
            raise FrameError("frame is too large") from None
        raise Incomplete from None
    except (msgpack.UnpackException, ValueError, TypeError, OverflowError, RecursionError) as error:
        if isinstance(error, FrameError):
            raise
        raise FrameError(f"not a frame ({error or type(error).__name__})") from None


def _skip(view: memoryview) -> None:
    """
    Raise OutOfData unless all of a frame but its last element is here.

    It makes no objects: msgpack before 1.1 never frees those of an array that it could not finish, and a large frame
    is looked at before it is all here.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=MAX_HEAD)
    unpacker.feed(view)
    for _ in range(min(unpacker.read_array_header(), MAX_ELEMENTS) - 1):
        unpacker.skip()


def _decode(view: memoryview, unpacker: Any) -> tuple[Fields, int, int, int | None]:
    count = unpacker.read_array_header()
    if not 2 < count <= MAX_ELEMENTS:
        raise FrameError(f"not a frame (an array of {count})")
    kind = unpacker.unpack()
    if not is_name(kind):
        raise FrameError("not a frame (no type)")
    fields = [kind]
    limit = MAX_HEAD if kind == "vnb" else MAX_HEADER
    for _ in range(count - 3):
        fields.append(unpacker.unpack())
    # What is left is field and sum, or sum and payload. The first byte after the next value decides.
    start = unpacker.tell()
    value = unpacker.unpack()
    end = unpacker.tell()
    if end >= len(view):
        raise msgpack.OutOfData
    if view[end] in (0xC4, 0xC5, 0xC6):
        sum_at = start
        if len(view) < end + BIN_SIZE:
            raise msgpack.OutOfData
        marker, payload = _BIN.unpack_from(view, end)
        if marker != _BIN32:
            raise FrameError(f'payload of frame "{kind}" is not of type bin 32')
        if payload > MAX_PAYLOAD:
            raise FrameError(f'payload of frame "{kind}" is too large: {payload} bytes')
        size = end + BIN_SIZE
    else:
        sum_at = end
        fields.append(value)
        payload = None
        size = end + SUM_SIZE
    if len(view) < sum_at + SUM_SIZE:
        raise msgpack.OutOfData
    marker, sum_ = _SUM.unpack_from(view, sum_at)
    if marker != _U64 or (payload is not None and sum_at + SUM_SIZE + BIN_SIZE != size):
        raise FrameError(f'frame "{kind}" has no sum')
    if size > limit:
        raise FrameError(f'frame "{kind}" is too large: {size} bytes')
    body = bytes(view[:sum_at])
    if payload is None and xxh3(body) != sum_:
        raise FrameError(f'bad sum in frame "{kind}"')
    _check_fields(fields, payload is not None)
    # One frame has one form. Else two readers could differ on it: of a key that is there twice, each takes another.
    if _body(fields, payload is not None) != body:
        raise FrameError(f'frame "{kind}" is not in its one msgpack form')
    return fields, sum_, size, payload


def _decode_data(view: memoryview) -> tuple[Fields, int, int, int]:
    if len(view) < MAX_DATA_HEADER - 1:
        raise Incomplete
    name_length = view[23] & 0x1F  # a fixstr's length is in its first byte
    layout = _DATA.get(name_length)
    if layout is None:
        raise FrameError('unknown codec in frame "data"')
    size = layout.size + SUM_SIZE + BIN_SIZE
    if len(view) < size:
        raise Incomplete
    _, t1, disk, t2, offset, t3, length, codec, t4, hash_ = layout.unpack_from(view)
    t5, sum_ = _SUM.unpack_from(view, layout.size)
    t6, payload = _BIN.unpack_from(view, layout.size + SUM_SIZE)
    if (t1, t2, t3, t4, t5, t6) != (_U16, _U64, _U32, _U64, _U64, _BIN32):
        raise FrameError('frame "data" is not in its one msgpack form')
    if xxh3(bytes(view[: layout.size])) != sum_:
        raise FrameError('bad sum in frame "data"')
    codec = _CODEC_NAMES.get(codec)
    if codec is None:
        raise FrameError('unknown codec in frame "data"')
    if not 0 < length <= MAX_DATA:
        raise FrameError(f'frame "data" is too large: {length} bytes')
    if payload != length if codec == "none" else not 0 < payload < length:
        raise FrameError(f'frame "data" of {length} bytes has a payload of {payload} ({codec})')
    return ["data", disk, offset, length, codec, hash_], sum_, size, payload


def is_name(value: object) -> bool:
    """Whether a value is a string that may name something, and may be printed as it is."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable()


def _check_fields(fields: Fields, has_payload: bool) -> None:
    if not fields or not is_name(fields[0]):
        raise FrameError("a frame without a type")
    kind = fields[0]
    if kind in ("data", "tail"):
        raise FrameError(f'frame "{kind}" is not in its one msgpack form')  # they have a layout of their own
    if not 2 < len(fields) + (2 if has_payload else 1) <= MAX_ELEMENTS:
        raise FrameError(f'frame "{kind}" has too few or too many elements')
    if kind == "extent" and len(fields) == 3 and fields[1].__class__ is int and fields[2].__class__ is list:
        # The many: whoever uses them looks at each anyway.
        if len(fields[2]) > 3 * MAX_EXTENTS:
            raise FrameError(f'more than {MAX_EXTENTS} extents in frame "extent"')
        return
    _check_values(kind, fields)


def _check_values(kind: str, fields: Fields) -> None:
    """Raise FrameError for values that not everybody reads alike, that can't be said in JSON, or that are too many."""
    level = fields
    values = depth = 0
    while level:
        inner = []
        for value in level:
            if isinstance(value, str) or value is None or value is True or value is False:
                continue
            if isinstance(value, int):
                if not 0 <= value <= MAX_INTEGER:
                    raise FrameError(f'an integer in frame "{kind}" is out of range')
            elif isinstance(value, (list, tuple, dict)):
                if depth == MAX_NESTING:
                    raise FrameError(f'frame "{kind}" is nested more than {MAX_NESTING} deep')
                values += len(value)
                if values > MAX_VALUES:
                    raise FrameError(f'more than {MAX_VALUES} values in the arrays and maps of frame "{kind}"')
                if isinstance(value, dict):
                    if len(value) > MAX_MAP or not all(isinstance(key, str) for key in value):
                        raise FrameError(f'a map in frame "{kind}" is too large, or a key is no string')
                    value = value.values()
                inner += value
            else:
                raise FrameError(f'frame "{kind}" has a value of a type that the format does not know')
        level = inner
        depth += 1


def sum_over(header: Bytes, payload: Bytes) -> int:
    """xxh3-64 of header and payload together. header: all bytes before the sum."""
    state = xxhash.xxh3_64(bytes(header))
    state.update(payload)
    return state.intdigest()


def check_payload_sum(kind: str, header: Bytes, sum_: int, payload: Bytes) -> None:
    """Check the sum of a frame with a payload. header: its bytes up to the payload's first byte; FrameError."""
    if sum_over(header[: len(header) - SUM_SIZE - BIN_SIZE], payload) != sum_:
        raise FrameError(f'bad sum in frame "{kind}"')


def _kind(view: memoryview) -> object:
    """The type of a frame of which only the start is there, or None."""
    unpacker = msgpack.Unpacker(max_buffer_size=64)
    unpacker.feed(view[:40])
    try:
        unpacker.read_array_header()
        return unpacker.unpack()
    except (msgpack.UnpackException, ValueError):
        return None


def _array(count: int) -> bytes:
    return bytes([0x90 | count]) if count < 16 else struct.pack(">BH", 0xDC, count)


def _refuse_ext(code: int, _data: bytes) -> None:
    raise ValueError(f"extension type {code}")


_CODEC_BYTES = {name: msgpack.packb(name) for name in CODECS}
_CODEC_NAMES = {packed: name for name, packed in _CODEC_BYTES.items()}
