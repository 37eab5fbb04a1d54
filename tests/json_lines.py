# SPDX-License-Identifier: LGPL-2.1-or-later
"""Streams as lines of JSON and back, by the functions that vnb-dump uses."""

import io

import samples

from vnb.cli.dump import check_data
from vnb.format import stream
from vnb.format.jsonlines import JsonReader, line_of


def to_lines(content, payloads=True):
    """The lines of a sound stream, as vnb-dump --json prints them."""
    lines = []
    with samples.memory(content) as fd:
        for raw in stream.Reader(fd, "sample").raws():
            lines.append(line_of(raw, payloads))
    return lines


def from_lines(lines):
    """The stream of lines, as vnb-dump --from-json writes it."""
    written = bytearray()
    text = b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines)
    reader = JsonReader(io.BytesIO(text), "stdin")
    for raw in reader.raws():
        check_data(reader, raw)
        written.extend(raw.header)
        written.extend(raw.payload or b"")
    return bytes(written)
