# SPDX-License-Identifier: LGPL-2.1-or-later
"""The packages: the Debian one is built, looked at, and what is in it runs; the others are read."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from samples import COMMANDS, ROOT, SOURCED

from vnb import __version__

PACKAGING = Path(ROOT, "packaging")
PAGES = sorted(path.name for path in Path(ROOT, "man").iterdir())


def run(*argv, **options):
    return subprocess.run(argv, capture_output=True, text=True, timeout=200, **options)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The directory into which the package is unpacked."""
    missing = [name for name in ("git", "dpkg-buildpackage", "dh", "lintian") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    needed = run("dpkg-checkbuilddeps", PACKAGING / "debian" / "control")
    if needed.returncode != 0:
        pytest.skip(needed.stderr.strip())
    tree = tmp_path_factory.mktemp("tree")
    files = run("git", "ls-files", "-z", cwd=ROOT)
    if files.returncode != 0:
        pytest.skip("this tree is no git repository")
    for file in files.stdout.split("\0")[:-1]:
        target = tree / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if Path(ROOT, file).exists():
            shutil.copy2(Path(ROOT, file), target)
    run("git", "init", "-q", cwd=tree, check=True)
    run("git", "add", "-A", cwd=tree, check=True)
    # lintian leaves files among the temporary ones.
    temporary = tmp_path_factory.mktemp("temporary")
    done = run("make", "deb", cwd=tree, env={**os.environ, "TMPDIR": str(temporary)})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    target = tree / "unpacked"
    run("dpkg-deb", "-x", *(tree / "build" / "deb").glob("*.deb"), target, check=True)
    return target


def test_all_is_where_it_belongs(package):
    found = {str(path.relative_to(package)) for path in package.rglob("*") if not path.is_dir()}
    expected = {f"usr/bin/{name}" for name in [*COMMANDS, SOURCED]}
    expected |= {f"usr/share/man/man{name[-1]}/{name}.gz" for name in PAGES}
    expected |= {f"usr/share/bash-completion/completions/{name}" for name in ["vnb.bash", *COMMANDS]}
    expected |= {
        "lib/systemd/system/vnb-backup@.service", "lib/systemd/system/vnb-backup@.timer", "usr/share/vnb/magic",
        "usr/share/zsh/vendor-completions/_vnb", "usr/share/vnb/apparmor/libvirt-qemu", "usr/share/doc/vnb/copyright",
    }
    here = {name.removeprefix("usr/") if name.startswith("usr/lib/systemd") else name for name in found}
    assert expected - here == set()
    rest = {name for name in here - expected if not name.startswith(("usr/share/doc/vnb/", "usr/lib/python3/"))}
    assert rest <= {"usr/share/lintian/overrides/vnb"}


def test_what_is_in_it_runs(package):
    """With nothing of this tree in the way: by the distribution's own Python."""
    environment = {"PATH": f"{package}/usr/bin:/usr/bin:/bin", "PYTHONPATH": f"{package}/usr/lib/python3/dist-packages"}
    for name in COMMANDS:
        done = run(name, "--version", env=environment, cwd="/")
        assert (done.returncode, done.stdout.split(" (")[0]) == (0, f"{name} {__version__}"), done.stderr
    done = run("bash", "-c", f"vnb-cat {ROOT}/formats/vectors/chain.vnb | vnb-verify | vnb-dump --brief",
               env=environment, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout != ""


def test_commands_in_it_start_as_those_of_the_tree(package):
    """By the distribution's Python, or bash; newer packaging tools write a space before the path."""
    for name in COMMANDS:
        first = Path(ROOT, "bin", name).read_text().splitlines()[0]
        assert (package / "usr/bin" / name).read_text().splitlines()[0].replace("#! ", "#!") == first


def test_examples_in_it_are_not_compressed(package):
    """All but the demo, which is for those who have the tree."""
    names = {path.name for path in Path(ROOT, "examples").iterdir()} - {"demo"}
    assert {path.name for path in (package / "usr/share/doc/vnb/examples").iterdir()} == names
    for name in names:
        assert os.access(package / "usr/share/doc/vnb/examples" / name, os.X_OK)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="not installed: systemd-analyze")
def test_units(tmp_path):
    """As systemd reads them, with our command in its place."""
    for unit in (PACKAGING / "systemd").iterdir():
        text = unit.read_text().replace("/usr/bin/vnb-backup", f"{ROOT}/bin/vnb-backup")
        (tmp_path / unit.name.replace("@", "@vm1")).write_text(text)
    for unit in tmp_path.iterdir():
        done = run("systemd-analyze", "verify", "--man=no", unit)
        assert [line for line in done.stderr.splitlines() if "vnb" in line] == []


def test_options_in_the_unit_are_there():
    usage = run("vnb-backup", "--help").stdout
    unit = (PACKAGING / "systemd/vnb-backup@.service").read_text()
    for options in re.findall(r"VNB_BACKUP_OPTIONS=([^\"]+)\"", unit):
        assert [word for word in options.split() if word.startswith("-") and f" {word} " not in usage] == []


def test_all_packages_have_one_version():
    assert (PACKAGING / "debian" / "changelog").read_text().startswith(f"vnb ({__version__}) ")
    assert re.search(r"^Version: +(\S+)$", (PACKAGING / "vnb.spec").read_text(), re.MULTILINE)[1] == __version__


@pytest.mark.skipif(shutil.which("rpmlint") is None, reason="not installed: rpmlint")
def test_spec():
    """It warns of an old tag, of sources that are on this disk, and that no tests are run: they want libvirtd."""
    done = run("rpmlint", PACKAGING / "vnb.spec")
    warnings = re.findall(r"^vnb\.spec: \w: (\S+)", done.stdout, re.MULTILINE)
    assert " 0 errors," in done.stdout, done.stdout
    assert set(warnings) <= {"no-buildroot-tag", "invalid-url", "no-url-tag", "no-%check-section"}


def test_dockerfile_needs_what_the_package_needs():
    """It builds the package: a dependency that is added there has to be known here."""
    control = (PACKAGING / "debian" / "control").read_text()
    text = (PACKAGING / "Dockerfile").read_text()
    lists = control.partition("Build-Depends:\n")[2].partition("\nStandards")[0], (
        control.partition("Recommends:\n")[2].partition("\nSuggests")[0])
    needed = re.findall(r"^ ([\w-]+)", "\n".join(lists), re.MULTILINE)
    names = {name.replace("debhelper-compat", "debhelper") for name in needed}
    assert {name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", text)} == set()


@pytest.mark.parametrize("file", ["debian/control", "vnb.spec", "Dockerfile"])
def test_what_a_map_in_files_needs_is_named(file):
    """nbdfuse mounts by fusermount3, which its own package need not bring."""
    text = (PACKAGING / file).read_text()
    assert re.search(r"\bfuse3\b", text) and re.search(r"\b(libnbd-bin|nbdfuse)\b", text)
