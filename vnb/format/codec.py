# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compression of data frames and the hash of their plain bytes. This module owns all lz4 and zstd settings."""

from __future__ import annotations

import re
import threading

from xxhash import xxh3_64_intdigest

from vnb.base.errors import Error, NotInstalled, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vnb.format.types import Bytes
    from vnb.format.values import Data


LZ4_MAX_LEVEL = 16  # lz4's LZ4HC_CLEVEL_MAX is 12, the library takes up to 16; 0 is the fast mode
ZSTD_MAX_LEVEL = 22
ZSTD_WINDOW = 4 << 20  # a frame is never longer than this, so neither is what it looks back on

# A compressed payload starts with the xxh3-64 of what follows. The hash of the plain bytes is not enough: damaged lz4
# or zstd often gives the right bytes all the same, and would stay in a set unseen. And no decompressor gets damaged
# input.
_CHECK_SIZE = 8


def compressor(codec: str, level: int | None = None) -> Callable[[Bytes], tuple[str, Bytes]]:
    """
    A function (plain bytes) -> (codec, payload): payload is shorter than plain, or plain itself ("none").

    It may be called from several threads at once. Raises Error for a codec that is not installed.
    """
    if codec == "none":
        return lambda plain: ("none", plain)
    compress = _lz4(level) if codec == "lz4" else _zstd(level)

    def pack(plain: Bytes) -> tuple[str, Bytes]:
        compressed = compress(plain)
        if len(compressed) + _CHECK_SIZE >= len(plain):
            return "none", plain
        return codec, xxh3_64_intdigest(compressed).to_bytes(_CHECK_SIZE, "big") + compressed

    return pack


def parse(text: str) -> tuple[str, int | None]:
    """(codec, level or None) of an argument CODEC[:LEVEL]; UsageError."""
    match = re.fullmatch(r"(none|lz4|zstd)(?::([0-9]{1,2}))?", text)
    if match is None or (match[1] == "none" and match[2]):
        raise UsageError("--compress", f'"{text}" is not none, lz4[:LEVEL] or zstd[:LEVEL]')
    level = None if match[2] is None else int(match[2])
    top = LZ4_MAX_LEVEL if match[1] == "lz4" else ZSTD_MAX_LEVEL
    if level is not None and level > top:
        raise UsageError("--compress", f"level {level} is not within 0-{top}")
    return match[1], level


def plain(data: Data, where: str) -> Bytes:
    """
    The plain bytes of a Data frame, decompressed and held against the hash of their source.

    where: the disk, for messages. Raises Error: these bytes are not what was read from the source.
    """
    payload = data.payload if data.codec == "none" else _decompress(data, where)
    if len(payload) != data.length or xxh3_64_intdigest(payload) != data.hash:
        raise Error(where, f"{data.length} bytes differ from what was read from the source", f"offset {data.offset}")
    return payload


def check(data: Data, where: str) -> None:
    """Raise Error if the payload of a Data frame has changed since it was made. Nothing is decompressed."""
    if data.codec == "none":
        plain(data, where)
    else:
        _compressed(data, where)


def _lz4(level: int | None) -> Callable[[Bytes], bytes]:
    from lz4.block import compress

    if level:
        return lambda plain: compress(plain, mode="high_compression", compression=level, store_size=False)
    return lambda plain: compress(plain, store_size=False)


def _zstd(level: int | None) -> Callable[[Bytes], bytes]:
    zstandard = _zstandard()
    own = threading.local()  # a compressor serves one thread at a time, and its memory is worth keeping

    def compress(plain: Bytes) -> bytes:
        if not hasattr(own, "compressor"):
            own.compressor = zstandard.ZstdCompressor(level=3 if level is None else level, write_content_size=True)
        compressed: bytes = own.compressor.compress(plain)
        return compressed

    return compress


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        reason = "this codec needs the Python package zstandard (Debian: python3-zstandard)"
        raise NotInstalled("zstd", reason) from None
    return zstandard


def _compressed(data: Data, where: str) -> memoryview:
    """The payload of a compressed frame without its checksum, which is right."""
    compressed = memoryview(data.payload)[_CHECK_SIZE:]
    if len(compressed) == 0 or xxh3_64_intdigest(compressed) != int.from_bytes(data.payload[:_CHECK_SIZE], "big"):
        raise Error(where, f"damaged {data.codec} data (its checksum differs)", f"offset {data.offset}")
    return compressed


def _decompress(data: Data, where: str) -> Bytes:
    compressed = _compressed(data, where)
    if data.codec == "lz4":
        from lz4.block import LZ4BlockError, decompress

        try:
            unpacked: bytes = decompress(compressed, uncompressed_size=data.length)
            return unpacked
        except (LZ4BlockError, ValueError) as error:
            reason = error
    else:
        zstandard = _zstandard()
        try:
            if zstandard.get_frame_parameters(compressed).content_size != data.length:
                raise zstandard.ZstdError("length differs")
            decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
            plain: bytes = decompressor.decompress(compressed, max_output_size=data.length)
            return plain
        except zstandard.ZstdError as error:
            reason = error
    raise Error(where, f"damaged {data.codec} data ({reason})", f"offset {data.offset}")

