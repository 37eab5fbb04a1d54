# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rooms of vnb/: a package imports only what is below it, and no command imports another."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "vnb"
# From the ground up. A package may import itself and those before it; HACKING.md says what is in each.
FLOORS = ["base", "format", "nbd", "qemu", "store", "virt", "job", "restore", "serve", "virtnbdbackup", "cli"]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imported(name):
    """Names of vnb's modules, without "vnb.", that a module imports anywhere: at its top, or in a function."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vnb":
            below = node.module.split(".")[1:]
            for alias in node.names:
                whole = ".".join([*below, alias.name])
                yield whole if whole in MODULES else ".".join(below)
        elif isinstance(node, ast.Import):
            yield from (alias.name[len("vnb."):] for alias in node.names if alias.name.startswith("vnb."))


def libraries(name):
    """Names of the packages of others that a module imports anywhere."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def test_every_package_has_its_floor():
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} == set(FLOORS)
    assert {name for name in MODULES if "." not in name} == {"__init__"}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_no_import_points_up(module):
    own = FLOORS.index(module.split(".")[0])
    assert [name for name in sorted(imported(module)) if name and FLOORS.index(name.split(".")[0]) > own] == []


def test_no_command_imports_another():
    """A module whose docstring begins with "vnb-" is a command: the docstring is its usage text."""
    names = {name for name, tree in TREES.items() if (ast.get_docstring(tree) or "").startswith("vnb-")}
    assert len(names) >= 13
    for name in names:
        assert names.isdisjoint(imported(name)), name


@pytest.mark.parametrize("library, package", [("libvirt", "virt"), ("docopt", "cli"), ("nbd", "nbd")])
def test_a_library_has_one_package_that_uses_it(library, package):
    """But for vnb.cli.versions, which asks all libraries for their versions."""
    users = {name.split(".")[0] for name in MODULES if library in libraries(name) and name != "cli.versions"}
    assert users == {package}
