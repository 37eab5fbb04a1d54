# SPDX-License-Identifier: LGPL-2.1-or-later
"""HACKING.md names what is there: files, and functions and classes in them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "HACKING.md").read_text(encoding="utf-8")
FILES = sorted(set(re.findall(r"`((?:vnb|tests|formats|man|bin)/(?![^`]*NAME)[\w./-]+\.\w+)`", PAGE)))
# `name()` or `Name`, perhaps "and" another, perhaps "of `Class`", in `file`; the text is broken into lines anywhere.
NAMED = re.findall(r"`(\w+)(?:\(\))?`(?: and `(\w+)\(\)`)?(?: of `(\w+)`)?,? in\s+(?:the\s+)?`(vnb/[\w/]+\.py)`", PAGE)


@pytest.mark.parametrize("name", FILES)
def test_files_are_there(name):
    assert (ROOT / name).is_file()


@pytest.mark.parametrize("first, second, owner, file", NAMED)
def test_names_are_in_their_files(first, second, owner, file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    scope = next(node for node in tree.body if getattr(node, "name", None) == owner) if owner else tree
    names = {getattr(node, "name", None) for node in scope.body}
    assert {name for name in (first, second) if name} <= names


def test_the_page_names_enough_to_be_worth_checking():
    assert len(NAMED) >= 15
    assert len(FILES) >= 15


def test_every_room_is_told():
    rooms = {path.parent.name for path in (ROOT / "vnb").glob("*/__init__.py")}
    assert rooms == set(re.findall(r"^    (\w+)  +\S", PAGE, re.MULTILINE)) & rooms
