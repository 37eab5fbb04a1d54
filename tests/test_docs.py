# SPDX-License-Identifier: LGPL-2.1-or-later
"""Usage, pages and commands agree: what one of them says of an option, the others say too."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from samples import COMMANDS, ROOT, SOURCED

from vnb import __version__
from vnb.cli.checkpoint_usage import SUBCOMMANDS
from vnb.cli.usage import Usage

PAGES = sorted(Path(ROOT, "man").glob("*.[1-9]"))
EXAMPLES = sorted(path for path in Path(ROOT, "examples").iterdir() if path.name != "demo")  # which has no operands
COMMAND_PAGES = [path for path in PAGES if path.suffix == ".1" and path.stem != SOURCED]
OPTION = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")

by_page = pytest.mark.parametrize("page", COMMAND_PAGES, ids=lambda path: path.stem)
by_command = pytest.mark.parametrize("name", COMMANDS)


def run(*argv):
    return subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False)


@functools.cache
def usage(*command):
    done = run(*command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def usages(name):
    """The usage texts (list of str) of a command and of its subcommands."""
    return [usage(name), *(usage(name, word) for word in (SUBCOMMANDS if name == "vnb-checkpoint" else ()))]


def options_of(name):
    """{option: its default or None} of a command and of its subcommands."""
    return {
        word: option.default for text in usages(name) for option in Usage(text).options
        for word in (option.short, option.long) if word
    }


def items(page):
    """{option: text of its item} of a page."""
    found = {}
    for item in re.split(r"^\.It ", page.read_text(), flags=re.MULTILINE)[1:]:
        first, _, text = item.partition("\n")
        for name in re.findall(r"Fl (-?[A-Za-z][\w-]*)", first):
            assert f"-{name}" not in found, f"-{name} twice"
            found[f"-{name}"] = re.split(r"^\.(?:El|Sh)", text, flags=re.MULTILINE)[0]
    return found


@by_command
def test_help_is_for_a_terminal(name):
    for text in usages(name):
        assert text.endswith("\n")
        assert [line for line in text.splitlines() if len(line) > 80 or line != line.rstrip()] == []
        assert re.match(rf"{name}( [a-z]+)? - ", text)
        assert "\nUsage:\n" in text


@by_command
def test_version(name):
    done = run(name, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    first, _, libraries = done.stdout.partition(" (")
    assert first == f"{name} {__version__}"
    assert [part.split()[0] for part in libraries.rstrip(")\n").split(", ")] == [
        "Python", "libvirt", "libnbd", "lz4", "msgpack", "xxhash", "zstd",
    ]


def test_version_without_a_library(tmp_path):
    """What is not there is said to be so; no other option of this command needs it."""
    Path(tmp_path, "libvirt.py").write_text("raise ImportError('libvirt.so.0: cannot open shared object file')")
    argv = [sys.executable, "-c", "from vnb.cli.runner import command; command('vnb-cat', 'vnb.cli.cat')", "--version"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert ", no libvirt, libnbd " in done.stdout


def test_the_runner_starts_with_nothing_of_the_format():
    """What a command needs is imported where signals, and a lack of memory, are handled already."""
    code = "import sys, vnb.cli.runner; sys.exit(sorted({'msgpack', 'xxhash', 'vnb.format'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_libraries_are_asked_only_for_their_versions():
    """A stage of a pipeline starts without what it does not use."""
    code = "import sys, vnb.cli.runner, vnb.cli.cat; "
    code += "sys.exit(sorted({'vnb.cli.versions', 'libvirt', 'nbd'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@by_command
def test_an_option_that_is_not_there(name):
    """Usage goes to standard error, and the status is not that of a failure."""
    done = run(name, "--no-such-option")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{name}: unknown option --no-such-option\nUsage:\n")


@by_command
def test_each_option_of_the_usage_is_described(name):
    for text in usages(name):
        found = Usage(text)
        used = set(OPTION.findall(found.synopsis))
        listed = {word for option in found.options for word in (option.short, option.long) if word}
        assert used - listed == set()
        assert listed - used == set() or "[options]" in text or "SUBCOMMAND" in text


@by_command
def test_there_is_a_page(name):
    assert Path(ROOT, "man", f"{name}.1") in COMMAND_PAGES


@by_page
def test_page_and_usage_have_the_same_options(page):
    assert set(items(page)) == set(options_of(page.stem))


@by_page
def test_page_and_usage_have_the_same_defaults(page):
    described = items(page)
    for option, default in options_of(page.stem).items():
        if default is not None:
            assert re.search(rf"(?<![\w.]){re.escape(default)}(?![\w])", described[option]), (option, default)


@by_page
def test_page_and_usage_have_one_name_and_purpose(page):
    text = page.read_text()
    name = re.search(r"^\.Sh NAME\n\.Nm (\S+)\n\.Nd (.+)$", text, flags=re.MULTILINE)
    assert (name[1], f"{name[1]} - {name[2]}") == (page.stem, usage(page.stem).partition("\n")[0])
    assert re.search(r"^\.Dt (\S+) 1$", text, flags=re.MULTILINE)[1] == page.stem.upper()


@by_page
def test_sections(page):
    found = re.findall(r"^\.Sh (.+)$", page.read_text(), flags=re.MULTILINE)
    assert set(found) >= {"NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "EXAMPLES", "SEE ALSO"}
    assert found[:3] == ["NAME", "SYNOPSIS", "DESCRIPTION"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
@pytest.mark.skipif(shutil.which("mandoc") is None, reason="not installed: mandoc")
def test_lint(page):
    done = run("mandoc", "-T", "lint", "-W", "warning", page)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_that_are_named_are_there(page):
    named = re.findall(r"^\.Xr (vnb\S*) (\d)", page.read_text(), flags=re.MULTILINE)
    assert {f"{name}.{section}" for name, section in named} <= {path.name for path in PAGES}
    assert (page.stem, page.suffix[1:]) not in named


def test_every_page_is_found_from_the_overview():
    text = Path(ROOT, "man", "vnb.7").read_text()
    named = {f"{name}.{section}" for name, section in re.findall(r"^\.Xr (vnb\S*) (\d)", text, flags=re.MULTILINE)}
    assert {path.name for path in PAGES} - named == {"vnb.7"}


README = Path(ROOT, "README.md").read_text()
PLACEHOLDERS = re.compile(
    r"\b(?:(?:in |at )?(?:DIR|NAME)|TIME|HOST|POINT|REASON|N|main|backup(?= job)|raw(?= image)|qemu:\S+)(?!\w)")
NOT_OURS = {  # messages of libvirt and QEMU that users of vnb meet
    "Bitmap already exists", "Device has active dirty bitmaps", "checkpoint inconsistent", "missing or broken bitmap",
    "Permission denied", "cannot delete inactive domain with",
}


def commands_in(code):
    """Yield (command, its part of the line) for all commands of vnb in a piece of code."""
    command = r"(?<![\w/-])(vnb-[a-z]+(?:-[a-z]+)*)((?:(?!\bvnb-| -- )[^|&;`()'])*)"
    for found in re.finditer(command, code.partition("    #")[0]):
        yield found[1], found[2]


def commands_of_readme():
    """All of its code."""
    text = README.replace("\\\n", " ").replace("\\|", "|")
    return [command for code in re.findall(r"(?m)^    .+|`[^`\n]+`", text) for command in commands_in(code)]


def unknown_options(commands):
    known = {name: set(options_of(name)) for name in COMMANDS}
    known["vnb-backup-all"] |= known["vnb-backup"]
    return [
        f"{name} {option}" for name, rest in commands for option in OPTION.findall(rest)
        if option not in known.get(name, ())
    ]


def test_readme_has_only_options_that_there_are():
    assert unknown_options(commands_of_readme()) == []


def test_examples_of_pages_have_only_options_that_there_are():
    blocks = [block for page in PAGES
              for block in re.findall(r"(?ms)^\.Bd -literal.*?\n(.*?)^\.Ed", page.read_text())]
    lines = "\n".join(blocks).replace("\\e\n", " ").splitlines()
    commands = [command for line in lines for command in commands_in(line) if command[0] in COMMANDS]
    assert len(commands) > 40
    assert unknown_options(commands) == []


PEERS = Path(ROOT, "man", "vnb-from-virtnbdbackup.7")
# Of versions up to 2.47: all options of the three commands, but for those of version 1.9 that had other letters.
OPTIONS_OF_PEERS = {
    "VIRTNBDBACKUP": (
        "-d --domain -l --level -t --type -r --raw -o --output -C --checkpointdir --scratchdir -S "
        "--start-domain --pause -i --include -x --exclude -f --socketfile -n --noprogress -z --compress -w "
        "--worker -F --freeze-mountpoint -e --strict --no-sparse-detection -T --threshold -U --uri --user "
        "--ssh-user --ssh-port --ssh-private-key --password -P --nbd-port -I --nbd-ip --tls --tls-cert -L "
        "--syslog --quiet --nocolor -q --qemu -s --startonly -k --killonly -p --printonly -v --verbose -V "
        "--version -h --help"
    ),
    "VIRTNBDRESTORE": (
        "-a --action -i --input -o --output -u --until -s --sequence -d --disk -n --noprogress -f "
        "--socketfile -r --raw -c --adjust-config -D --define -C --config-file -N --name -B --buffsize -A "
        "--preallocate --compress -U --uri --user --ssh-user --ssh-port --ssh-private-key --password -P "
        "--nbd-port -I --nbd-ip --tls --tls-cert -L --logfile --nocolor -v --verbose -V --version -h --help"
    ),
    "VIRTNBDMAP": (
        "-f --file -b --blocksize -d --device -e --export-name -t --threads -l --listen-address -p "
        "--listen-port -n --noprogress -L --logfile --nocolor -r --readonly -H --hexdump -v --verbose -V "
        "--version -h --help"
    ),
}


@pytest.mark.parametrize("command", OPTIONS_OF_PEERS)
def test_each_option_of_the_peer_has_its_place(command):
    """Beside what does the same, or the reason why nothing does; an item without either would not help."""
    section = PEERS.read_text().partition(f".Sh OPTIONS OF {command}\n")[2].partition("\n.Sh ")[0]
    described = re.split(r"^\.It ", section, flags=re.MULTILINE)[1:]
    found = [f"-{name}" for item in described
             for name in re.findall(r"Fl (-?[A-Za-z][\w-]*)", item.partition("\n")[0])]
    assert sorted(found) == sorted(OPTIONS_OF_PEERS[command].split())
    for item in described:
        text = item.partition("\n")[2]
        assert ".Dl vnb-" in text or "Not needed" in text, item
    if shutil.which(command.lower()):  # of whatever version
        names = set(re.findall(r"(?m)^  (?:-\w(?: \S+)?, )?(--[a-z-]+)", run(command.lower(), "--help").stdout))
        assert len(names) > 10
        assert names - set(found) == set()


def test_commands_for_those_who_come_from_the_peer_have_only_options_that_there_are():
    lines = re.findall(r"(?m)^\.(?:Dl|Ic) (vnb-.*)$", PEERS.read_text())
    commands = [command for line in lines for command in commands_in(line) if command[0] in COMMANDS]
    assert len(commands) > 60
    assert unknown_options(commands) == []


def test_readme_names_every_command():
    assert set(COMMANDS) - {name for name, _rest in commands_of_readme()} == set()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_print_their_usage(path):
    """Where operands are missing, and where the first one is none of those that the example knows."""
    takes_a_verb = re.search(" restore (?!point)", path.read_text())
    for operands in [], ["x"], *([["bakup", "b", "c", "d"]] if takes_a_verb else []):
        done = run(path, *operands)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"Usage: examples/{path.name} ")


def test_restore_drill_into_what_is_not_there(tmp_path):
    done = run(Path(ROOT, "examples", "restore-drill"), "set", tmp_path / "none")
    reason = f"restore-drill: set: there is no directory {tmp_path}/none\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", reason)


def test_readme_leads_to_files_that_are_there():
    assert [path for path in re.findall(r"\]\(([^)#:]+)\)", README) if not Path(ROOT, path).exists()] == []


def test_readme_shows_the_two_commands_at_once():
    first_screen = README.splitlines()[:24]
    assert {"make demo", "make test"} <= {line.partition("#")[0].strip() for line in first_screen}


def test_trouble_is_told_in_the_words_that_are_printed():
    """A message that was changed would not be found in the page any more."""
    code = "".join(path.read_text() for path in Path(ROOT, "vnb").rglob("*.py"))
    page = Path(ROOT, "man", "vnb-troubleshooting.7").read_text()
    said = [line for line in re.findall(r"(?m)^\.Ss (.+)$", page) if not line.startswith("exit status")]
    assert len(said) > 20
    cut = [re.split(r": |, user|\(", PLACEHOLDERS.sub(": ", message)) for message in said]
    parts = {part.strip(" ,():") for pieces in cut for part in pieces}
    assert [part for part in sorted(parts - NOT_OURS) if part not in code] == []


@pytest.mark.parametrize("name", ["vnb-backup", "vnb-backup-all", "vnb-restore"])
def test_scripts_take_the_options_of_their_usage(name):
    """A script lists its options once for bash, and once for people."""
    script = Path(ROOT, "bin", name).read_text().partition("\narguments ")[0]
    code = f'{script}\nprintf "%s\\n" "${{flags[@]}}"; echo; printf "%s\\n" "${{values[@]}}"'
    done = run("env", f"PATH={ROOT}/bin:{os.environ['PATH']}", "bash", "-c", code)
    flags, values = (set(part.split()) for part in done.stdout.split("\n\n"))
    texts = usage(name) + (usage("vnb-backup") if name == "vnb-backup-all" else "")
    options = [option for text in texts.split("\nUsage:\n")[1:] for option in Usage(f"x - x\n\nUsage:\n{text}").options]
    names = {bool(value): {word for option in options if bool(option.value) == value
                           for word in (option.short, option.long) if word} for value in (False, True)}
    assert (flags, values) == (names[False], names[True])
