# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Types of what a stream holds, as vnb.format.rules has checked it. formats/extent-stream.md says what the keys mean.

Only annotations use this module: no command imports it. A map may have more keys than are here, and they are passed on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypedDict, Union

from vnb.format.values import Data, Extents, File, Other, Same

Bytes = Union[bytes, bytearray, memoryview]
Fields = list[Any]  # the elements of a frame before its sum: its type, then what that type has
Frame = Union[File, Same, Extents, Data, Other]
Runs = list[int]  # offset, length, state, offset, length, state, ...; see vnb.format.runs
Row = tuple[int, int, int, int]  # offset, length, position, size; see vnb.format.index
Wait = Callable[[int, int], None]  # is given a descriptor and an event of poll(2), returns when that has come


class _DescribedFile(TypedDict):
    role: str
    path: str
    size: int
    sha256: str


class DescribedFile(_DescribedFile, total=False):
    """What a head says of a file. base: true if the segment does not store it, because the base has it."""

    base: bool


class _Head(TypedDict):
    id: str
    stage: str
    level: str
    point: str
    parent: str | None
    checkpoint: str | None
    domain: str
    uuid: str
    created: str


class Head(_Head, total=False):
    """The head of a segment."""

    chain: str
    run: str
    next: str
    grows: dict[str, int]
    files: list[DescribedFile]
    domain_xml: str | None
    checkpoint_xml: str | None


class _Disk(TypedDict):
    name: str
    size: int
    level: str


class Disk(_Disk, total=False):
    """A disk of a segment. size: bytes."""

    image: dict[str, Any]
    source: dict[str, Any]


class SameFields(TypedDict):
    """A file that the base has."""

    role: str
    path: str
    mode: int


class FileFields(SameFields):
    """A part of a file. size: bytes of all of it. offset: where the part begins."""

    size: int
    offset: int


class Saved(Protocol):
    """A segment of which head and disks are known. name: for messages."""

    @property
    def name(self) -> str: ...
    @property
    def head(self) -> Head: ...
    @property
    def disks(self) -> list[Disk]: ...


class Buffers(Protocol):
    """Where payloads go, see vnb.base.buffers.Pool."""

    def take(self, size: int) -> memoryview: ...
    def give(self, view: memoryview) -> None: ...


class Taken(Protocol):
    """Who is told that a segment was written to its end."""

    def taken(self) -> None: ...
