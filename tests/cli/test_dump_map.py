# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-dump --map: what is drawn is what is there."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import makers
import pytest
import samples
from hypothesis import given, settings
from hypothesis import strategies as st

from vnb.cli import state_map
from vnb.format.frame import HOLE, ZERO

DUMP = [sys.executable, Path(samples.ROOT, "bin", "vnb-dump"), "--map"]
PLAN = [{"vda": "64k:A 64k:- 32k:0", "vdb": "128k:? 64k:0"}, {"vda": "96k:. 64k:B"}, {"vda": "8k:C"}]


def run(*arguments):
    command = [*DUMP, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, env={"PYTHONPATH": samples.ROOT}, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("columns", [1, 7, 64, 150])
@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 30), st.sampled_from(["data", "zero", "hole", "clean"])), max_size=12))
def test_strip_against_a_model_of_each_byte(columns, extents):
    rows, model = [], ""
    for length, kind in extents:
        if kind != "clean":
            rows.append((len(model), length, 5 if kind == "data" else 0, {"zero": ZERO, "hole": HOLE}.get(kind, 99)))
        model += kind[0] * length
    model = model or "c"
    size = len(model)
    drawn = state_map.strip(rows, size, columns)
    assert len(drawn) == columns
    for column in range(columns):
        part = [byte for at, byte in enumerate(model) if at * columns // size == column]
        if not part:
            assert drawn[column] == drawn[column - 1]
        elif "d" in part:
            assert drawn[column] == (state_map.MUCH if 2 * part.count("d") >= len(part) else state_map.SOME)
        elif "z" in part or "h" in part:
            assert drawn[column] == (state_map.ZEROES if part.count("z") >= part.count("h") else state_map.HOLES)
        else:
            assert drawn[column] == state_map.NOTHING


def test_a_chain(tmp_path):
    makers.make_set(tmp_path, PLAN, spec="lz4")
    status, out, err = run("--columns", 20, tmp_path)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "vda: 163840 bytes, 8192 a column",
        f"full {makers.point(0)} |########--------0000|",
        f"inc  {makers.point(1)} |............########|",
        f"inc  {makers.point(2)} |#...................|",
        "",
        "vdb: 196608 bytes, 9831 a column",
        f"full {makers.point(0)} |#############+000000|",
        "",
        "# data  + less than half of it data  0 zero  - hole  . not in the segment",
    ]


def test_image(tmp_path):
    makers.make_set(tmp_path, PLAN)
    status, out, err = run("--svg", tmp_path)
    assert (status, err) == (0, "")
    root = ElementTree.fromstring(out)  # noqa: S314
    space = "{http://www.w3.org/2000/svg}"
    titles = [title.text for title in root.iter(f"{space}title")]
    assert titles[:3] == ["0 to 65600: data", "65600 to 131200: hole", "131200 to 163840: zero"]
    assert f"full {makers.point(0)}" in [element.text for element in root.iter(f"{space}text")]
    height = float(root.get("height"))
    assert all(float(rect.get("y", 0)) + float(rect.get("height")) <= height for rect in root.iter(f"{space}rect"))


def test_names_do_no_harm(tmp_path):
    (tmp_path / "x.vnb").write_bytes(samples.segment(samples.head("a<b>&"), [samples.disk("<d>&", 0)]))
    assert ElementTree.fromstring(run("--svg", tmp_path)[1]) is not None  # noqa: S314


@pytest.mark.parametrize("arguments, line", [
    (["--columns", "0"], "--columns: "), (["--columns", "5000"], "--columns: "), ([], ""),
])
def test_wrong_usage(arguments, line, tmp_path):
    status, out, err = run(*arguments, *([tmp_path] if arguments else []))
    assert (status, out) == (2, "") and err.startswith(f"vnb-dump: {line}")


def test_damaged(tmp_path):
    (path,) = makers.make_set(tmp_path, PLAN[:1])
    content = bytearray(Path(path).read_bytes())
    content[-150] ^= 1  # in the index
    Path(path).write_bytes(content)
    status, _, err = run(tmp_path)
    assert status == 1 and err.startswith(f"vnb-dump: {path}: stream offset ") and err.count("\n") == 1
