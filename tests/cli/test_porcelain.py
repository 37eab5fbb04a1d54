# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-backup and vnb-restore without a libvirt: which pipelines they make, and what they restore."""

import json
import os
import shlex
import signal
import stat
import subprocess
import time

import pytest
import samples
from applied import eventually, processes_with, segments_of
from makers import images, make_set, point

from vnb.restore.imagedir import EXISTS
from vnb.virt.domain_rewrite import NO_XML

PLAN = [{"vda": "64k:A 64k:-", "vdb": "64k:B"}, {"vda": "96k:. 32k:C", "vdb": "64k:."}]
ODD = "it's $(touch gone) `touch gone`; \"touch\" *\n\\x & -o"  # for a shell, anything but a name
CHECKPOINT = ["vnb-checkpoint", "begin", "--level", "copy", "--image", "vda=/nonexistent"]
SCRIPTS = ("vnb-backup", "vnb-backup-all", "vnb-restore")


def porcelain(name, *arguments, cwd=None, path=None):
    """The finished process."""
    argv = [os.path.join(samples.ROOT, "bin", name), *map(str, arguments)]
    env = {**os.environ, "PATH": path or os.environ["PATH"]}
    return subprocess.run(argv, capture_output=True, text=True, cwd=cwd, env=env, timeout=60)


def printed(*arguments):
    done = porcelain(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture
def stubs(tmp_path):
    """Commands, to be first in PATH, that write down their arguments, each with a NUL behind it, and succeed."""
    directory = tmp_path / "stubs"
    directory.mkdir()
    for name in ("vnb-checkpoint", "vnb-cat", "vnb-apply", "vnb-config", "vnb-extents", "vnb-read", "vnb-pack",
                 "vnb-verify", "vnb-prune"):
        script = directory / name
        # vnb-checkpoint runs its last argument, as the real one does
        script.write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" >> '{directory}/{name}.seen'\n" + (
            'exec bash -o pipefail -c "${@: -1}"\n' if name == "vnb-checkpoint" else
            f'case " $* " in *" --point "*) echo {point(1)};; esac\n'
        ))
        script.chmod(0o755)
    return directory


def seen(stubs, name):
    path = stubs / f"{name}.seen"
    return path.read_text().split("\0")[:-1] if path.exists() else None


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_version(name):
    text = printed(name, "--help")
    assert text.startswith(f"{name} - ")
    assert max(map(len, text.splitlines())) <= 80
    assert printed(name, "--version").startswith(f"{name} ")


@pytest.mark.parametrize("name", ["vnb-backup", "vnb-restore"])
@pytest.mark.parametrize("arguments", [
    [], ["one"], ["one", "two", "three"], ["--frobnicate", "a", "b"], ["-x", "a", "b"], ["a", "b", "--name"],
    ["a", "b", "-c"], ["a", "b", "--level"],
])
def test_wrong_usage(name, arguments):
    done = porcelain(name, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{name}: ")
    assert done.stderr.partition("\n")[2].startswith("Usage:\n")


@pytest.mark.parametrize("line, reason", [
    ("vnb-backup vm1", "DIR is missing"), ("vnb-backup", "DOMAIN is missing"), ("vnb-backup-all", "DIR is missing"),
    ("vnb-restore set", "TARGET_DIR is missing"), ("vnb-backup vm1 /b c", 'unexpected operand "c"'),
    ("vnb-backup vm1 ''", "DIR: is empty"), ("vnb-backup '' /b", "DOMAIN: is empty"),
    ("vnb-backup-all ''", "DIR: is empty"), ("vnb-restore set ''", "TARGET_DIR: is empty"),
    ("vnb-restore '' target", "SET: is empty"), ("vnb-backup -c '' vm1 /b", "-c: is empty"),
    ("vnb-backup --freeze= vm1 /b", "--freeze: is empty"), ("vnb-restore --disk vda --disk '' a b", "--disk: is empty"),
    ("vnb-backup --keep-last 0 --keep-daily 00 vm1 /b", "give at least one --keep option a number greater than 0"),
    ("vnb-backup --progress loud vm1 /b", '--progress: "loud" is not one of auto, none, json'),
    ("vnb-backup-all --log-format=xml /b", '--log-format: "xml" is not one of text, json, journald'),
    ("vnb-backup --level 'full copy' vm1 /b", '--level: "full copy" is not one of full, copy, inc, diff, auto'),
    ("vnb-restore --format vmdk set target", '--format: "vmdk" is not one of qcow2, raw'),
    ("vnb-backup-all --jobs 100 /b", '--jobs: "100" is not a number within 1-99'),
])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_is_wrong_is_said_before_anything_runs(stubs, line, reason, dry):
    name, *arguments = shlex.split(line)
    done = porcelain(name, *dry, *arguments, path=f"{stubs}:{os.environ['PATH']}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{name}: {reason}\nUsage:\n")
    assert list(stubs.glob("*.seen")) == []


@pytest.mark.parametrize("option, values, filter_", [
    ("--keep-last", ["1", "014", "0x1", "-1", "1000000", "1000001", "1" * 19, "1 2", "\n1"], ["vnb-prune", "."]),
    ("--connections", ["1", "64", "0", "65", "064", "08", "x", " 1"], ["vnb-read"]),
    ("--compress", ["none", "none:1", "lz4", "lz4:0", "lz4:16", "lz4:17", "lz4:", "zstd:22", "zstd:23", "zstd:007",
                    "zstd:", "gzip", "lz4:x", "lz4:1:2", "LZ4", "lz4 "], ["vnb-pack"]),
    ("--progress", ["auto", "none", "json", "loud", "auto none"], ["vnb-pack"]),
    ("--threshold", ["0", "5x", "10M", "10mib", "10mb", "1e3", " 1", "5t"], CHECKPOINT),
    ("--scratch-reserve", ["1k", "-1", "k"], CHECKPOINT), ("--deadline", ["90s", "5x", "s", "1d", "10"], CHECKPOINT),
    ("--log-format", ["text", "json", "journal"], ["vnb-pack"]),
])
def test_backup_takes_the_values_that_its_filters_take(tmp_path, option, values, filter_):
    """What a filter refuses is refused before the job begins, and nothing else is."""
    for value in values:
        ours = porcelain("vnb-backup", "--dry-run", f"{option}={value}", "vm1", "/b")
        argv = [filter_[0], f"{option}={value}", *filter_[1:]]
        theirs = subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, cwd=tmp_path, timeout=60)
        assert (ours.returncode == 2) == (theirs.returncode == 2), value


def test_a_wrong_option_is_told_once_for_all_domains(stubs, virsh):
    done = porcelain("vnb-backup-all", "--keep-daily", "x", "/b", path=virsh("one", "two"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith('vnb-backup: --keep-daily: "x" is not a number within 0-1000000\nUsage:\n')
    assert done.stderr.count("keep-daily: ") == 1
    assert seen(stubs, "vnb-checkpoint") is None


def test_quiet_for_all_domains_says_what_failed(stubs, virsh):
    (stubs / "vnb-pack").write_text("#!/bin/sh\ncase $2 in */bad) exit 1; esac\n")
    path = virsh("good", "bad")
    assert porcelain("vnb-backup-all", "-q", "/b", path=path).stderr == "vnb-backup-all: bad: failed with status 1\n"


@pytest.mark.parametrize("line", [
    "vnb-backup --help", "vnb-backup --version", "vnb-backup --dry-run vm1 /b", "vnb-backup-all --help",
    "vnb-backup --dry-run -v vm1 /b", "vnb-restore --no-config --dry-run set target", "vnb-restore --version",
])
def test_a_standard_output_that_takes_nothing(stubs, line):
    path = f"{stubs}:{os.environ['PATH']}"
    name, _, rest = line.partition(" ")
    for where, reason in ((">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")):
        command = f"{samples.ROOT}/bin/{name} {rest} {where}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60,
                              env={**os.environ, "PATH": path})
        assert (done.returncode, done.stderr) == (1, f"{name}: stdout: {reason}\n")


def test_all_domains_are_backed_up_though_nobody_can_be_told(stubs, virsh):
    line = f"{samples.ROOT}/bin/vnb-backup-all -q --json /b > /dev/full"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PATH": virsh("one", "two")})
    assert (done.returncode, done.stderr) == (1, 2 * "vnb-backup-all: stdout: No space left on device\n")
    assert seen(stubs, "vnb-pack") == ["-o", "/b/one", "-o", "/b/two"]


def test_backup_dry_run_is_the_pipeline():
    assert printed("vnb-backup", "--dry-run", "-z", "--verify", "--exclude=vdb", "vm1", "/backup/vm1") == (
        "vnb-checkpoint run --level auto --set /backup/vm1 --exclude vdb vm1 -- "
        "'vnb-extents | vnb-read | vnb-pack -z -o /backup/vm1' &&\n"
        "vnb-verify /backup/vm1\n"
    )


def test_backup_into_the_folder_of_the_day(stubs, tmp_path):
    path = f"{stubs}:{os.environ['PATH']}"
    for _ in range(2):  # the day may change meanwhile
        today = time.strftime("%Y-%m-%d")
        assert porcelain("vnb-backup", "vm1", f"{tmp_path}/%Y-%m-%d/100%%/vm1", path=path).returncode == 0
    assert seen(stubs, "vnb-pack")[-2:] == ["-o", f"{tmp_path}/{today}/100%/vm1"]


def test_backup_passes_on_all_words_as_they_are(stubs, tmp_path):
    """Nothing that stands in a name is a command, through two shells."""
    path = f"{stubs}:{os.environ['PATH']}"
    options = ["--level", "inc", "-c", ODD, "--user=" + ODD, "--include", ODD, "--raw", "--compress", "zstd:9",
               "--connections", "8", "--freeze", "/,/home", "--verify"]
    done = porcelain("vnb-backup", *options, ODD, f"/{ODD}", cwd=tmp_path, path=path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert seen(stubs, "vnb-checkpoint")[:-1] == [
        "run", "--level", "inc", "--set", f"/{ODD}", "-c", ODD, "--user", ODD, "--include", ODD, "--raw",
        "--freeze", "/,/home", ODD, "--",
    ]
    assert seen(stubs, "vnb-read") == ["--connections", "8"]
    assert seen(stubs, "vnb-pack") == ["--compress", "zstd:9", "-o", f"/{ODD}"]
    assert seen(stubs, "vnb-verify") == [f"/{ODD}"]
    assert not (tmp_path / "gone").exists()


def test_backup_that_fails_is_not_verified(stubs):
    (stubs / "vnb-read").write_text("#!/bin/sh\nexit 1\n")
    done = porcelain("vnb-backup", "--verify", "vm1", "/backup", path=f"{stubs}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert seen(stubs, "vnb-verify") is None


def test_backup_with_a_fault_in_the_set(stubs):
    (stubs / "vnb-verify").write_text("#!/bin/sh\nexit 1\n")
    assert porcelain("vnb-backup", "--verify", "vm1", "/b", path=f"{stubs}:{os.environ['PATH']}").returncode == 3


def test_backup_is_pruned_last(stubs):
    path = f"{stubs}:{os.environ['PATH']}"
    keep = ["--keep-last=2", "--keep-daily", "14", "--keep-weekly", "8", "--keep-monthly", "12", "--keep-yearly", "1"]
    for name in ("vnb-read", "vnb-verify", "vnb-prune"):
        with open(stubs / name, "a") as script:
            script.write(f"echo {name} >> {stubs}/order\n")
    assert porcelain("vnb-backup", "--verify", *keep, "vm1", "/b", path=path).returncode == 0
    assert seen(stubs, "vnb-prune") == [
        "--keep-last", "2", "--keep-daily", "14", "--keep-weekly", "8", "--keep-monthly", "12", "--keep-yearly", "1",
        "/b",
    ]
    assert (stubs / "order").read_text().split() == ["vnb-read", "vnb-verify", "vnb-prune"]
    dry = porcelain("vnb-backup", "--dry-run", "--keep-last", "5", "--keep-last", "2", "vm1", "/b", path=path).stdout
    assert dry.splitlines()[1:] == ["vnb-prune --keep-last 2 /b"]


@pytest.mark.parametrize("failing, pruned, status", [
    ("vnb-read", False, 1), ("vnb-verify", False, 3), ("vnb-prune", True, 3),
])
def test_backup_after_which_something_fails(stubs, failing, pruned, status):
    with open(stubs / failing, "a") as script:
        script.write("exit 1\n")
    path = f"{stubs}:{os.environ['PATH']}"
    assert porcelain("vnb-backup", "--verify", "--keep-last", "2", "vm1", "/b", path=path).returncode == status
    assert (seen(stubs, "vnb-prune") is not None) == pruned


def test_a_backup_that_is_saved_but_is_pruned_all_the_same(stubs):
    """As with --strict and a warning each night: else the disk would fill up."""
    (stubs / "vnb-checkpoint").write_text("#!/bin/sh\nexit 3\n")
    path = f"{stubs}:{os.environ['PATH']}"
    assert porcelain("vnb-backup", "--strict", "--keep-last", "2", "vm1", "/b", path=path).returncode == 3
    assert seen(stubs, "vnb-prune") == ["--keep-last", "2", "/b"]


def test_a_directory_of_all_sets_that_must_exist(stubs, virsh, tmp_path):
    """Sets below it are made: a domain may be new."""
    path = virsh("one")
    done = porcelain("vnb-backup-all", "--must-exist", tmp_path / "none", path=path)
    assert done.returncode == 1
    assert "none: is not there, and --must-exist is given: is its file system mounted?" in done.stderr
    assert porcelain("vnb-backup-all", "--must-exist", tmp_path, path=path).returncode == 0
    assert seen(stubs, "vnb-pack") == ["-o", f"{tmp_path}/one"]
    assert porcelain("vnb-backup", "--must-exist", "vm1", "/b", path=path).returncode == 0
    assert seen(stubs, "vnb-pack")[2:] == ["--must-exist", "-o", "/b"]
    assert seen(stubs, "vnb-checkpoint")[-4:-1] == ["--must-exist", "vm1", "--"]


@pytest.fixture
def virsh(stubs):
    """Function that has virsh list these domains."""
    def lists(*names):
        (stubs / "virsh").write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" >> '{stubs}/virsh.seen'\n"
                                     f"printf '%s\\n' {shlex.join(names)} ''\n")
        (stubs / "virsh").chmod(0o755)
        return f"{stubs}:{os.environ['PATH']}"
    return lists


def test_backup_of_all_domains(stubs, virsh, tmp_path):
    """Each into a set of its name, with all options, and what stands in a name is a name."""
    names = ["vm1", "100%%d $(touch gone) 'x'", "vm2"]
    done = porcelain("vnb-backup-all", "-z", "-c", "test:///x", "--keep-last", "2", f"{tmp_path}/%%/%Y",
                     path=virsh(*names), cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [f"vnb-backup-all: {name}: done" for name in names]
    assert seen(stubs, "virsh") == ["-c", "test:///x", "list", "--all", "--name"]
    sets = [f"{tmp_path}/%/{time.strftime('%Y')}/{name}" for name in names]
    assert seen(stubs, "vnb-pack") == [word for path in sets for word in ("-z", "-o", path)]
    assert seen(stubs, "vnb-prune") == [word for path in sets for word in ("--keep-last", "2", path)]
    assert [word for word in seen(stubs, "vnb-checkpoint") if word in names] == names
    assert not (tmp_path / "gone").exists()


def test_sets_of_all_domains_are_below_the_directory(stubs, virsh, tmp_path):
    """libvirt takes . and .. for names, and what begins with a dash."""
    names = [".", "..", "...", ".hidden", "-dash", "tab\there", "100%Y"]
    assert porcelain("vnb-backup-all", tmp_path, path=virsh(*names)).returncode == 0
    words = seen(stubs, "vnb-pack")
    found = [words[at + 1] for at, word in enumerate(words) if word == "-o"]
    below = ["%2E", "%2E%2E", "...", ".hidden", "-dash", "tab\there", "100%Y"]
    assert found == [f"{tmp_path}/{name}" for name in below]
    words = seen(stubs, "vnb-checkpoint")
    assert words[words.index("-dash") - 1] == "--"


def test_backup_of_all_domains_for_programs(stubs, virsh):
    (stubs / "vnb-pack").write_text('#!/bin/sh\ncase $2 in *bad*) exit 1; esac\n')
    names = ["good", "a \"bad\" \\ one"]
    done = porcelain("vnb-backup-all", "--json", "/b", path=virsh(*names))
    assert done.returncode == 1
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows == [{"domain": names[0], "status": 0}, {"domain": names[1], "status": 1}]


@pytest.mark.parametrize("jobs", [[], ["--jobs", "2"], ["--jobs=9"]])
def test_backup_of_all_domains_says_which_failed(stubs, virsh, jobs):
    (stubs / "vnb-verify").write_text('#!/bin/sh\ncase $1 in */worn) exit 1; esac\n')
    path = virsh("good", "worn", "last")
    done = porcelain("vnb-backup-all", *jobs, "--verify", "/b", path=path)
    assert done.returncode == 3
    assert sorted(done.stderr.splitlines()) == [
        "vnb-backup-all: good: done", "vnb-backup-all: last: done",
        "vnb-backup-all: worn: saved, but with warnings, or what came after that failed",
    ]
    (stubs / "vnb-pack").write_text('#!/bin/sh\ncase $2 in */good) exit 1; esac\n')
    done = porcelain("vnb-backup-all", *jobs, "--verify", "/b", path=path)
    assert done.returncode == 1
    assert sorted(done.stderr.splitlines())[0] == "vnb-backup-all: good: failed with status 1"
    assert done.stderr.count("\n") == 3


def test_backup_of_all_domains_at_a_time(stubs, virsh):
    """Two meet: each waits for the other, so one after the other they would wait for ever."""
    os.mkfifo(stubs / "fifo")
    (stubs / "vnb-read").write_text(
        f"#!/bin/sh\ncd {stubs}\nif mkdir first; then echo x > fifo; else read x < fifo; fi 2> /dev/null\n"
    )
    assert porcelain("vnb-backup-all", "--jobs", "2", "/b", path=virsh("one", "two")).returncode == 0


def test_backup_of_all_domains_that_cannot_be_listed(stubs, virsh):
    path = virsh()
    assert porcelain("vnb-backup-all", "/b", path=path).stderr == "vnb-backup-all: there is no domain\n"
    (stubs / "virsh").write_text("#!/bin/sh\necho error: no connection >&2\nexit 1\n")
    done = porcelain("vnb-backup-all", "/b", path=path)
    assert (done.returncode, done.stderr) == (1, "error: no connection\n")


@pytest.mark.parametrize("arguments", [
    ["-all", "vm1", "/b"], ["-all"], ["-all", "--frobnicate", "/b"], ["-all", "-x", "/b"],
    ["", "--jobs", "2", "vm1", "/b"], ["", "--json", "vm1", "/b"],
    ["-all", "--jobs", "0", "/b"], ["-all", "--jobs", "x", "/b"], ["-all", "--keep-some", "/b"], ["", "/b"],
    ["", "--keep-some", "vm1", "/b"], ["", "vm1", "/b", "--keep-last"], ["-all", "/b", "--keep-last"],
])
def test_backup_wrong_usage(arguments):
    name, *arguments = arguments
    assert porcelain(f"vnb-backup{name}", *arguments).returncode == 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("arguments", [
    ["vnb-backup-all", "--jobs", "2", "/b"], ["vnb-backup", "--keep-last", "2", "vm1", "/b"],
])
def test_backup_that_is_stopped(stubs, virsh, tmp_path, arguments, signum):
    """The signal is for the script alone; when it is gone, so is all that it ran."""
    (stubs / "vnb-checkpoint").write_text(
        f"#!/bin/bash\nset -m\ntrap ': > {tmp_path}/$$.ended; kill %1; exit 1' INT TERM HUP\n"
        f": > {tmp_path}/$$.begun\nsleep 600 & wait\n"
    )
    number = 2 if "vnb-backup-all" in arguments else 1
    process = subprocess.Popen(
        [os.path.join(samples.ROOT, "bin", arguments[0]), *arguments[1:]], stderr=subprocess.DEVNULL,
        env={**os.environ, "PATH": virsh("one", "two", "three")},
    )
    try:
        eventually(lambda: len(list(tmp_path.glob("*.begun"))) == number)
        process.send_signal(signum)
        assert process.wait(60) == -signum
        assert len(list(tmp_path.glob("*.ended"))) == number
        assert len(list(tmp_path.glob("*.begun"))) == number
    finally:
        process.kill()
        process.wait()


def test_backup_dry_run_can_be_pasted(stubs, tmp_path):
    path = f"{stubs}:{os.environ['PATH']}"
    line = porcelain("vnb-backup", "--dry-run", ODD, f"/{ODD}", cwd=tmp_path, path=path).stdout
    subprocess.run(["bash", "-c", line], env={**os.environ, "PATH": path}, cwd=tmp_path, check=True)
    assert seen(stubs, "vnb-pack") == ["-o", f"/{ODD}"]
    assert not (tmp_path / "gone").exists()


def test_restore_dry_run_is_the_pipelines(tmp_path):
    make_set(tmp_path / "set", PLAN)
    where = f"{tmp_path}/target"
    options = ["--until", "2026-01-31T12:00:00Z", "--disk", "vda=raw:/x", "--name", "vm2", "--define"]
    machine = (
        f"vnb-cat --head --until {point(0)} --disk vda {tmp_path}/set | "
        f"vnb-config --disk-dir {where} --disk vda=raw:/x --name vm2 --define"
    )
    assert printed("vnb-restore", "--dry-run", *options, tmp_path / "set", where).splitlines() == [
        f"{machine} --check",
        f"vnb-cat --until {point(0)} --disk vda {tmp_path}/set | vnb-apply --disk vda=raw:/x {where}",
        machine,
    ]
    assert os.listdir(tmp_path) == ["set"]


def test_restore_dry_run_with_a_file_for_the_xml(tmp_path):
    make_set(tmp_path / "set", PLAN)
    lines = printed("vnb-restore", "--dry-run", "--config-file", "-x.xml", tmp_path / "set", "/t").splitlines()
    assert lines[-1].endswith(" | vnb-config --disk-dir /t -o ./-x.xml")
    for option in ("--define", "--no-config"):
        done = porcelain("vnb-restore", "--config-file", "x", option, tmp_path / "set", "/t")
        assert (done.returncode, done.stderr.splitlines()[0]) == (2, f"vnb-restore: --config-file contradicts {option}")


@pytest.mark.parametrize("options, default, refused", [
    (["-c", "qemu+ssh://root@hv/system"], None, True), (["--connect=qemu+tls://hv/system"], None, True),
    ([], "qemu+ssh://hv/system", True), (["-c", "qemu:///system"], "qemu+ssh://hv/system", False),
    (["-c", "qemu:///session"], None, False), ([], None, False),
])
def test_restore_does_not_define_a_domain_on_another_host_than_its_disks(stubs, monkeypatch, options, default, refused):
    """The disks would be here, and the domain there."""
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    if default:
        monkeypatch.setenv("LIBVIRT_DEFAULT_URI", default)
    path = f"{stubs}:{os.environ['PATH']}"
    done = porcelain("vnb-restore", "--define", *options, "set", "/t", path=path)
    assert done.returncode == (2 if refused else 0)
    assert ("is another host, and the disks are restored on this one" in done.stderr) == refused
    assert (seen(stubs, "vnb-cat") is None) == refused
    assert porcelain("vnb-restore", *options, "set", "/t", path=path).returncode == 0


def test_restore_passes_on_all_words_as_they_are(stubs, tmp_path):
    path = f"{stubs}:{os.environ['PATH']}"
    options = ["--until", ODD, "--disk=" + ODD, "--image-options", ODD, "--name", ODD, "--format=raw"]
    options += ["--define", "-c", ODD]
    done = porcelain("vnb-restore", *options, f"/{ODD}", f"/t{ODD}", cwd=tmp_path, path=path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    rest = ["--until", point(1), "--disk", ODD, f"/{ODD}"]
    assert seen(stubs, "vnb-cat") == [
        "--point", "--until", ODD, f"/{ODD}", "--head", *rest, *rest, "--head", *rest,
    ]
    assert seen(stubs, "vnb-apply") == ["--disk", ODD, "--image-options", ODD, "--format", "raw", f"/t{ODD}"]
    config = ["--disk-dir", f"/t{ODD}", "--name", ODD, "--format", "raw", "--define", "-c", ODD]
    assert seen(stubs, "vnb-config") == [*config, "--check", *config]
    assert not (tmp_path / "gone").exists()


def test_operands_that_look_like_options(stubs, tmp_path):
    path = f"{stubs}:{os.environ['PATH']}"
    assert porcelain("vnb-restore", "--no-config", "--", "-set", "-target", path=path).returncode == 0
    assert seen(stubs, "vnb-apply") == ["./-target"]
    assert porcelain("vnb-backup", "--", "vm1", "-set", path=path).returncode == 0
    assert seen(stubs, "vnb-pack") == ["-o", "./-set"]
    assert porcelain("vnb-backup", "--", "-vm1", "set", path=path).returncode == 0
    assert seen(stubs, "vnb-checkpoint")[-4:-1] == ["--", "-vm1", "--"]


def with_xml(directory, plan, xml):
    """make_set() with the XML of a domain in its heads."""
    import makers

    head = makers.head
    makers.head = lambda number, **changes: head(number, domain_xml=xml, **changes)
    try:
        make_set(directory, plan)
    finally:
        makers.head = head


XML = (
    "<domain type='kvm'><name>vm1</name><devices><disk type='block'><source dev='/dev/x'/><target dev='vda'/></disk>"
    "<disk type='file'><source file='/y'/><target dev='vdb'/></disk></devices></domain>"
)


def test_restore(tmp_path):
    with_xml(tmp_path / "set", PLAN, XML)
    target = tmp_path / "target"
    done = porcelain("vnb-restore", "--format", "raw", tmp_path / "set", target)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(os.listdir(target)) == ["domain.xml", "vda.raw", "vdb.raw"]
    for name, image in images(PLAN)[-1].items():
        assert (target / f"{name}.raw").read_bytes() == image
    assert f'<source file="{target}/vda.raw" />' in (target / "domain.xml").read_text()
    assert stat.S_IMODE((target / "domain.xml").stat().st_mode) == 0o600


def test_restore_of_one_disk_at_an_earlier_point(tmp_path):
    with_xml(tmp_path / "set", PLAN, XML)
    options = [f"--until={point(0)}", "--disk", "vdb", "--format=raw"]
    done = porcelain("vnb-restore", *options, tmp_path / "set", tmp_path / "t")
    assert (done.returncode, done.stderr) == (0, "vnb-config: vda: was not restored: removed from the domain\n")
    assert (tmp_path / "t" / "vdb.raw").read_bytes() == images(PLAN)[0]["vdb"]


def test_restore_without_xml(tmp_path):
    """A set that was made of images: said before the disks are restored, which then is what has to be asked for."""
    make_set(tmp_path / "set", PLAN)
    done = porcelain("vnb-restore", "--format", "raw", "set", "target", cwd=tmp_path)
    reason = f"vnb-config: stdin: {point(1)} has no domain XML: {NO_XML}\n"
    assert (done.returncode, done.stderr) == (1, reason)
    assert os.listdir(tmp_path) == ["set"]
    done = porcelain("vnb-restore", "--format", "raw", "--no-config", "set", "target", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(os.listdir(tmp_path / "target")) == ["vda.raw", "vdb.raw"]


def test_restored_disks_stay_where_the_machine_fails(stubs, tmp_path):
    """What was in nobody's way before is in the way now: the disks are there, and what failed is named."""
    (stubs / "vnb-config").write_text('#!/bin/bash\n[ "${@: -1}" = --check ]\n')
    path = f"{stubs}:{os.environ['PATH']}"
    done = porcelain("vnb-restore", "set", "target", cwd=tmp_path, path=path)
    assert (done.returncode, done.stderr) == (
        1,
        "vnb-restore: the disks are restored; what failed is: "
        f"vnb-cat --head --until {point(1)} set | vnb-config --disk-dir target -o target/domain.xml\n",
    )


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_restore_that_is_stopped_leaves_nothing(tmp_path, signum):
    """The signal is for the script alone. When that has ended, so has all of its pipeline, and cleaned up."""
    segment, target, commands = tmp_path / "segment", tmp_path / "target", tmp_path / "bin"
    segment.write_bytes(segments_of(PLAN)[0][:-50])
    commands.mkdir()
    (commands / "vnb-cat").write_text(
        f"#!/bin/bash\ncase $1 in --point) echo {point(0)} ;; *) cat {segment}; exec sleep 600 ;; esac\n"
    )
    (commands / "vnb-cat").chmod(0o755)
    process = subprocess.Popen(
        [os.path.join(samples.ROOT, "bin", "vnb-restore"), "--no-config", "set", target], stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"},
    )
    try:
        eventually(lambda: len(list(target.glob(".*/vd*"))) == 2)
        process.send_signal(signum)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == -signum
        assert stderr == ("" if signum == signal.SIGINT else f"vnb-apply: ended by {signum.name}\n")
        assert sorted(os.listdir(tmp_path)) == ["bin", "segment"]
        assert processes_with(tmp_path) == []
    finally:
        process.kill()
        process.communicate()


def test_restore_of_what_is_not_there(tmp_path):
    done = porcelain("vnb-restore", "set", "target", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "vnb-cat: set: No such file or directory\n")
    make_set(tmp_path / "set", PLAN)
    assert porcelain("vnb-restore", "--until", "nothing", "set", "target", cwd=tmp_path).returncode == 1
    assert os.listdir(tmp_path) == ["set"]


def test_restore_replaces_nothing(tmp_path):
    with_xml(tmp_path / "set", PLAN, XML)
    (tmp_path / "domain.xml").write_text("mine")
    done = porcelain("vnb-restore", tmp_path / "set", tmp_path)
    assert (done.returncode, done.stderr) == (1, f"vnb-config: {tmp_path}/domain.xml: {EXISTS}\n")
    assert sorted(os.listdir(tmp_path)) == ["domain.xml", "set"]


def test_restore_of_a_damaged_set_leaves_nothing(tmp_path):
    with_xml(tmp_path / "set", PLAN, XML)
    path = next((tmp_path / "set").glob("*.full.vnb"))
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"A" * 4096) + 100] ^= 1
    path.write_bytes(whole)
    done = porcelain("vnb-restore", "set", "target", cwd=tmp_path)
    assert done.returncode == 1
    assert os.listdir(tmp_path) == ["set"]


def test_commands_are_found_beside_the_script(tmp_path):
    """Who calls it by its path, in a virtual environment, has the others not in PATH."""
    environment = os.path.join(samples.ROOT, ".venv", "bin")
    done = subprocess.run([os.path.join(environment, "vnb-restore"), "--version"], capture_output=True, text=True,
                          env={"PATH": os.defpath})
    assert shlex.split(done.stdout)[:1] == ["vnb-restore"]
