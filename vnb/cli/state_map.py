# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Strips: what each segment says of each part of a disk, small enough to see. Pure: from rows of an index to text or SVG.
"""

from __future__ import annotations

from xml.sax.saxutils import escape

from vnb.format.frame import DATA, HOLE, ZERO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any


MUCH, SOME, ZEROES, HOLES, NOTHING = tuple("#+0-.")
MEANING = {
    MUCH: "data", SOME: "less than half of it data", ZEROES: "zero", HOLES: "hole", NOTHING: "not in the segment",
}
_COLOURS = {MUCH: "#1f5f9e", SOME: "#7fb0dd", ZEROES: "#e0a030", HOLES: "#e8e0d0", NOTHING: "none"}
_ROW, _STRIP, _LETTER = 18, 1024, 8  # pixels: height of a row, width of a strip, width of a letter


def strip(rows: Iterable[Any], size: int, columns: int) -> str:
    """
    A string of columns characters, see MEANING: each stands for an equal part of [0, size).

    rows: iterable of (offset, length, position, size) as vnb.format.index has them.
    """
    bytes_of = {state: [0] * columns for state in (DATA, ZERO, HOLE)}
    for offset, length, position, state in rows:
        counts = bytes_of[DATA if position else state]
        end = min(offset + length, size)
        column = offset * columns // size
        while offset < end:
            # Where the next column begins: the first byte whose own column is a later one.
            border = -(-(column + 1) * size // columns)
            counts[column] += min(border, end) - offset
            offset = max(offset, border)
            column += 1
    text: list[str] = []
    for column in range(columns):
        width = -(-(column + 1) * size // columns) - -(-column * size // columns)
        data, zero, hole = (bytes_of[state][column] for state in (DATA, ZERO, HOLE))
        if width == 0:
            text.append(text[-1])  # more columns than bytes
        elif data:
            text.append(MUCH if 2 * data >= width else SOME)
        elif zero or hole:
            text.append(ZEROES if zero >= hole else HOLES)
        else:
            text.append(NOTHING)
    return "".join(text)


def text(disks: dict[str, Any], columns: int) -> Iterator[str]:
    """
    Lines for a terminal. disks: {name: (size, [(label, strip)])}, labels are one line each.
    """
    for name, (size, strips) in disks.items():
        width = max(len(label) for label, _ in strips)
        yield f"{name}: {size} bytes, {-(-size // columns)} a column"
        for label, drawn in strips:
            yield f"{label:{width}} |{drawn}|"
        yield ""
    yield "  ".join(f"{character} {meaning}" for character, meaning in MEANING.items())


def svg(disks: dict[str, Any], columns: int) -> Iterator[str]:
    """Lines of an SVG image: one row a segment, below its disk's name. disks: see text()."""
    height = _ROW * (sum(2 + len(strips) for _, strips in disks.values()) + 2)
    left = 2 * _ROW + _LETTER * max((len(label) for _, strips in disks.values() for label, _ in strips), default=0)
    width = left + _STRIP + 2 * _ROW
    yield (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
           f'viewBox="0 0 {width} {height}" font-family="monospace" font-size="12">')
    yield f'<rect width="{width}" height="{height}" fill="white"/>'
    y = _ROW
    for name, (size, strips) in disks.items():
        yield _text(_ROW, y + 13, f"{name}: {size} bytes")
        y += _ROW
        for label, drawn in strips:
            yield _text(_ROW, y + 13, label)
            yield f'<rect x="{left}" y="{y + 2}" width="{_STRIP}" height="{_ROW - 4}" fill="none" stroke="#c0c0c0"/>'
            yield from _boxes(drawn, size, columns, left, y)
            y += _ROW
        y += _ROW
    x = _ROW
    for character, meaning in MEANING.items():
        yield f'<rect x="{x}" y="{y + 2}" width="14" height="14" fill="{_COLOURS[character]}" stroke="#c0c0c0"/>'
        yield _text(x + 20, y + 13, meaning)
        x += 40 + _LETTER * len(meaning)
    yield "</svg>"


def _boxes(drawn: str, size: int, columns: int, left: int, y: int) -> Any:
    start = 0
    while start < columns:
        end = start + 1
        while end < columns and drawn[end] == drawn[start]:
            end += 1
        if drawn[start] != NOTHING:
            x = left + start * _STRIP / columns
            about = f"{-(-start * size // columns)} to {-(-end * size // columns)}: {MEANING[drawn[start]]}"
            yield (f'<rect x="{x:.2f}" y="{y + 2}" width="{(end - start) * _STRIP / columns:.2f}" height="{_ROW - 4}" '
                   f'fill="{_COLOURS[drawn[start]]}"><title>{about}</title></rect>')
        start = end


def _text(x: int, y: int, content: str) -> str:
    return f'<text x="{x}" y="{y}">{escape(content)}</text>'
