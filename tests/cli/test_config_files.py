# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-config as it is run: streams in, XML and files out, and what is refused."""

import os
import re
import stat
import subprocess
import sys

import pytest
import samples
from makers import make_set
from samples import disk, head, segment

from vnb.base.errors import Error
from vnb.cli.runner import outcome
from vnb.restore.domain_files import check_path
from vnb.restore.imagedir import EXISTS
from vnb.virt.domain_rewrite import NO_XML

CONFIG = [sys.executable, os.path.join(samples.ROOT, "bin", "vnb-config")]
ENV = {**os.environ, "PYTHONPATH": samples.ROOT}
DISKS = "<disk type='file'><source file='/old/vda'/><target dev='vda'/></disk>"


def xml(os_="<nvram>/var/lib/vm1_VARS.fd</nvram>", name="vm1"):
    return f"<domain><name>{name}</name><uuid>u-1</uuid><os>{os_}</os><devices>{DISKS}</devices></domain>"


def file(payload=b"content", role="nvram", path="/var/lib/vm1_VARS.fd", offset=0, size=None, mode=0o644):
    size = len(payload) if size is None else size
    return ["file", {"role": role, "path": path, "mode": mode, "size": size, "offset": offset}], payload


def stream(*files, text=None, **fields):
    """A segment of disks alone."""
    return segment(head(stage="disks", domain_xml=text or xml(), **fields), [disk("vda", 4096)], *files)


def config(*arguments, stdin=b"", cwd=None):
    """(status, stdout, stderr)"""
    command = [*CONFIG, *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, env=ENV, cwd=cwd, timeout=60)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_disks_and_files_in_a_directory(tmp_path):
    parts = [file(b"con", size=7), file(b"tent", size=7, offset=3)]
    status, out, err = config("--disk-dir", "restored", stdin=stream(*parts), cwd=tmp_path)
    assert (status, err) == (0, "")
    assert f"<nvram>{tmp_path}/restored/vm1_VARS.fd</nvram>" in out
    assert f'<source file="{tmp_path}/restored/vda.qcow2" />' in out
    assert os.listdir(tmp_path / "restored") == ["vm1_VARS.fd"]
    restored = tmp_path / "restored" / "vm1_VARS.fd"
    assert restored.read_bytes() == b"content"
    assert stat.S_IMODE(restored.stat().st_mode) == 0o600


def test_a_kernel_stays_readable_as_far_as_it_was(tmp_path):
    """QEMU is another user; but an initrd may have secrets."""
    text = xml("<kernel>/boot/k</kernel><initrd>/boot/i</initrd>")
    parts = [file(role="kernel", path="/boot/k", mode=0o777), file(role="initrd", path="/boot/i", mode=0o600)]
    assert config("--disk-dir", tmp_path, stdin=stream(*parts, text=text))[0] == 0
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ki"] == [0o644, 0o600]


def test_without_a_directory_all_stays_where_it_was(tmp_path):
    status, out, err = config("--keep-identity", stdin=stream(file()), cwd=tmp_path)
    assert status == 0
    assert "<nvram>/var/lib/vm1_VARS.fd</nvram>" in out
    assert '<source file="/old/vda" />' in out
    assert "stays where it was" not in err
    assert os.listdir(tmp_path) == []


def test_a_new_domain_on_the_original_s_disk_is_said_and_never_defined():
    """Whoever looks at the XML may know better; nobody looks at what is defined."""
    status, out, err = config(stdin=stream(file()))
    assert (status, '<source file="/old/vda" />' in out) == (0, True)
    assert err.splitlines() == [
        "vnb-config: vda: stays where it was, and the original writes to it: see --disk-dir and --disk",
        "vnb-config: nvram /var/lib/vm1_VARS.fd was not restored: the domain gets a new one",
    ]
    status, _, err = config("--define", "-c", "test:///default", stdin=stream(file()))
    assert status == 1
    assert err.startswith("vnb-config: vda: the new domain would write to the original's disk: ")


def test_nvram_that_no_definition_names_is_restored(tmp_path):
    """A domain that was off: its XML says only that it boots by UEFI."""
    text = xml("").replace("<os>", "<os firmware='efi'>")
    sample = stream(file(b"vars", size=8), file(b"vars", size=8, offset=4), text=text)
    status, out, _ = config("--disk-dir", tmp_path, stdin=sample)
    assert (status, f"<nvram>{tmp_path}/vm1_VARS.fd</nvram>" in out) == (0, True)
    assert (tmp_path / "vm1_VARS.fd").read_bytes() == b"varsvars"
    status, out, _ = config("--no-files", "--disk-dir", tmp_path, stdin=sample)
    assert (status, "<nvram" in out) == (0, False)


def test_output_goes_to_no_file_that_exists(tmp_path):
    text = xml("").replace("<devices>", "<devices><serial type='file'><source path='/var/log/vm1'/></serial>")
    status, out, _ = config("--disk-dir", tmp_path, stdin=stream(text=text))
    assert (status, f'<source path="{tmp_path}/vm1" />' in out) == (0, True)
    (tmp_path / "vm1").write_text("mine")
    for arguments in ([], ["--check"]):
        done = config(*arguments, "--disk-dir", tmp_path, stdin=stream(text=text))
        assert (done[0], done[2].splitlines()[-1]) == (1, f"vnb-config: {tmp_path}/vm1: {EXISTS}")


def test_the_last_segment_counts(tmp_path):
    first = stream(file(b"old"), file(b"kernel", "kernel", "/boot/k"), text=xml("<nvram>/var/lib/vm1_VARS.fd</nvram>"
                   "<kernel>/boot/k</kernel>", name="before"))
    last = segment(head("p1", "p0", stage="disks", domain_xml=xml()), [disk("vda", 4096, "inc")], file(b"new"))
    status, out, _ = config("--disk-dir", tmp_path, stdin=first + last)
    assert status == 0
    assert "<name>restore_vm1</name>" in out
    assert os.listdir(tmp_path) == ["vm1_VARS.fd"]
    assert (tmp_path / "vm1_VARS.fd").read_bytes() == b"new"


def test_a_segment_without_xml_matters_only_if_it_is_the_last():
    without = segment(head(stage="disks"), [disk("vda", 4096)])
    last = segment(head("p1", "p0", stage="disks", domain_xml=xml()), [disk("vda", 4096, "inc")])
    assert config(stdin=without + last)[0] == 0
    assert config(stdin=without) == (1, "", f"vnb-config: stdin: p0 has no domain XML: {NO_XML}\n")


def test_a_stream_that_is_cut_short_leaves_nothing(tmp_path):
    whole = stream(file())
    status, out, err = config("--disk-dir", tmp_path / "new", stdin=whole[:-1])
    assert (status, out) == (1, "")
    assert "short record" in err
    assert not (tmp_path / "new").exists()


def test_nothing_is_replaced(tmp_path):
    (tmp_path / "vm1_VARS.fd").write_text("mine")
    status, out, err = config("--disk-dir", tmp_path, stdin=stream(file()))
    assert (status, out, err) == (1, "", f"vnb-config: {tmp_path}/vm1_VARS.fd: {EXISTS}\n")
    assert (tmp_path / "vm1_VARS.fd").read_text() == "mine"
    assert os.listdir(tmp_path) == ["vm1_VARS.fd"]


def test_no_symlink_is_followed(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "vm1_VARS.fd").symlink_to(tmp_path / "outside" / "file")
    assert config("--disk-dir", tmp_path / "in", stdin=stream(file()))[0] == 1
    assert os.listdir(tmp_path / "outside") == []


@pytest.mark.parametrize("path", [
    "/a/../../etc/passwd", "/a/..", "..", "../x", "x", "", "/", "/a/", "/a/.hidden", "/a/" + "n" * 300, "/a/new\nline",
    "/a/x\0",
])
def test_a_path_that_is_none(path):
    with pytest.raises(Error) as error:
        check_path("nvram", path)
    assert str(error.value).startswith("file: ") and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("os_", ["", "<nvram>/a/../x</nvram>"])
def test_a_path_that_is_none_ends_it(tmp_path, os_):
    """Whether something in the XML names it or not."""
    sample = stream(file(path="/a/../x"), text=xml(os_))
    assert config("--disk-dir", tmp_path / "new", stdin=sample) == (
        1, "", "vnb-config: file: /a/../x: nvram: is no absolute path, or leads upwards\n"
    )
    assert not (tmp_path / "new").exists()


def test_only_the_last_part_of_a_path_counts(tmp_path):
    text = xml("<nvram>/dev/sda</nvram><kernel>/a/x</kernel><initrd>/b/x</initrd>")
    parts = [file(path="/dev/sda"), file(b"k", "kernel", "/a/x"), file(b"i", "initrd", "/b/x")]
    status, out, _ = config("--disk-dir", tmp_path, stdin=stream(*parts, text=text))
    assert status == 0
    assert sorted(os.listdir(tmp_path)) == ["initrd.x", "sda", "x"]
    assert f"<initrd>{tmp_path}/initrd.x</initrd>" in out
    assert (tmp_path / "initrd.x").read_bytes() == b"i"


def test_a_file_that_is_there_twice(tmp_path):
    status, _, err = config("--disk-dir", tmp_path, stdin=stream(file(), file()))
    assert status == 1
    assert "is there twice" in err
    assert os.listdir(tmp_path) == []


def test_a_file_that_nothing_names_is_left_out(tmp_path):
    assert config("--disk-dir", tmp_path, stdin=stream(file(path="/etc/other"), text=xml("")))[0] == 0
    assert os.listdir(tmp_path) == []


def test_files_in_place(tmp_path):
    """To where they were, where they are missing, and nothing else is touched."""
    there, missing = tmp_path / "there", tmp_path / "missing"
    there.write_text("mine")
    text = xml(f"<nvram>{missing}</nvram><kernel>{there}</kernel>")
    parts = [file(b"nvram", path=str(missing)), file(b"kernel", "kernel", str(there))]
    status, out, err = config("--files-in-place", "--disk-dir", tmp_path / "d", stdin=stream(*parts, text=text))
    assert (status, err) == (0, "")
    assert f"<nvram>{missing}</nvram>" in out and f"<kernel>{there}</kernel>" in out
    assert there.read_text() == "mine"
    assert missing.read_bytes() == b"nvram"


def test_a_missing_device_is_not_made_in_place():
    sample = stream(file(path="/dev/vnb-x"), text=xml("<nvram>/dev/vnb-x</nvram>"))
    status, _, err = config("--files-in-place", stdin=sample)
    assert (status, err) == (
        1, "vnb-config: file: /dev/vnb-x: is not restored to a directory of the system's own\n",
    )


def test_no_files(tmp_path):
    status, out, _ = config("--no-files", "--disk-dir", tmp_path, stdin=stream(file()))
    assert status == 0
    assert "/var/lib/vm1_VARS.fd" not in out
    assert config("--no-files", "--keep-identity", stdin=stream(file()))[1].count("/var/lib/vm1_VARS.fd") == 1
    assert os.listdir(tmp_path) == []


def test_xml_into_a_file(tmp_path):
    """It may have what is nobody's business, so it is private; and an old one stays."""
    arguments = ("--disk-dir", tmp_path, "-o", tmp_path / "domain.xml")
    status, out, _ = config(*arguments, stdin=stream(file()))
    assert (status, out) == (0, "")
    assert sorted(os.listdir(tmp_path)) == ["domain.xml", "vm1_VARS.fd"]
    assert "restore_vm1" in (tmp_path / "domain.xml").read_text()
    assert stat.S_IMODE((tmp_path / "domain.xml").stat().st_mode) == 0o600
    os.unlink(tmp_path / "vm1_VARS.fd")
    assert config(*arguments, stdin=stream(file()))[0] == 1
    assert os.listdir(tmp_path) == ["domain.xml"]


def test_check_does_nothing(tmp_path):
    """Not even the directory is made, and what does not stay as it was is for the run to say that changes it."""
    text = xml("<nvram>/var/lib/vm1_VARS.fd</nvram><kernel>/boot/not-in-the-backup</kernel>")
    arguments = ("--check", "--disk-dir", tmp_path / "new", "-o", tmp_path / "new" / "domain.xml")
    assert config(*arguments, stdin=stream(file(), text=text)) == (0, "", "")
    assert config("--check", "--keep-identity", stdin=stream(file())) == (0, "", "")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["vm1_VARS.fd", "domain.xml"])
def test_check_finds_names_that_are_taken(tmp_path, name):
    (tmp_path / name).symlink_to("nowhere")
    arguments = ("--check", "--disk-dir", tmp_path, "-o", tmp_path / "domain.xml")
    assert config(*arguments, stdin=stream(file())) == (1, "", f"vnb-config: {tmp_path}/{name}: {EXISTS}\n")
    assert os.listdir(tmp_path) == [name]


def test_check_of_what_is_not_in_the_stream(tmp_path):
    """What nothing comes for is in nobody's way."""
    (tmp_path / "vm1_VARS.fd").write_text("mine")
    assert config("--check", "--disk-dir", tmp_path, stdin=stream()) == (0, "", "")


def test_check_finds_bad_input(tmp_path):
    for content in (stream(text="<network/>"), stream(file(path="/a/../b")), stream(file())[:-9]):
        status, out, err = config("--check", "--disk-dir", tmp_path / "new", stdin=content)
        assert (status, out) == (1, "")
        assert err.startswith("vnb-config: ")
    assert os.listdir(tmp_path) == []


def test_disks_elsewhere(tmp_path):
    status, out, _ = config("--disk", f"vda=qcow2:{tmp_path}/other", stdin=stream(file()))
    assert status == 0
    assert f'<source file="{tmp_path}/other" />' in out
    assert '<driver name="qemu" type="qcow2" />' in out
    status, out, _ = config("--disk", "vda=/dev/vg/vm1", stdin=stream(file()))
    assert '<source dev="/dev/vg/vm1" />' in out
    reason = "vnb-config: --disk: no disk vdz at restore point p0, there is vda\n"
    assert config("--disk", "vdz=/x", stdin=stream()) == (1, "", reason)


@pytest.mark.parametrize("uri, export, server", [
    ("nbd+unix:///vda@a%20point?socket=/a%20b", "vda@a point", '<host transport="unix" socket="/a b" />'),
    ("nbd://127.0.0.1:4711/vda", "vda", '<host name="127.0.0.1" port="4711" />'),
    ("nbd://[::1]/vda", "vda", '<host name="::1" port="10809" />'),
])
def test_disk_on_a_map(uri, export, server):
    status, out, _ = config("--disk", f"vda={uri}", stdin=stream(file()))
    assert status == 0
    assert re.search(rf'<source protocol="nbd" name="{export}">\s*{re.escape(server)}\s*</source>', out)
    assert '<disk type="network"' in out
    assert '<driver name="qemu" type="raw" />' in out


@pytest.mark.parametrize("arguments", [
    ["--format", "vmdk"], ["--disk", "vda"], ["--disk", "a/b=/x"], ["--disk", "vda=/x", "--disk", "vda=/y"],
    ["--disk", "vda=nbds://h/x"], ["--disk", "vda=nbd:///x"], ["--disk", "vda=nbd+unix:///x"],
    ["--disk", "vda=nbd+unix:///x?socket=s"], ["--disk", "vda=nbd://h:port/x"], ["--disk", "vda=nbd://[h/x"],
    ["--name", "a/b"], ["--name", ""], ["--files-in-place", "--no-files"], ["--autostart"],
    ["-c", "test:///default"], ["--define", "-o", "x"],
])
def test_wrong_usage(arguments, capsys):
    assert outcome("vnb-config", "vnb.cli.config", arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Usage:" in said.err


def test_xml_that_nests_too_deeply():
    text = f"<domain><name>n</name>{'<a>' * 100_000}{'</a>' * 100_000}</domain>"
    sample = stream(text=text)
    assert config("--disk-dir", "d", stdin=sample) == (1, "", "vnb-config: domain XML: is nested too deeply\n")


def test_same_identity_names_what_to_do_about_checkpoints():
    status, _, err = config("--keep-identity", stdin=stream(file()))
    assert status == 0
    assert "virsh checkpoint-list vm1 --name" in err


def run(command, *arguments, stdin=b""):
    """The standard output (str) of a command that has to work."""
    argv = [sys.executable, os.path.join(samples.ROOT, "bin", command), *map(str, arguments)]
    return subprocess.run(argv, input=stdin, capture_output=True, env=ENV, check=True).stdout


def test_head_of_a_set(tmp_path):
    """vnb-cat --head: the last segment without its extents."""
    make_set(tmp_path / "set", [{"vda": "64k:A", "vdb": "64k:B"}, {"vda": "64k:C"}])
    lines = run("vnb-dump", "--json", stdin=run("vnb-cat", "--head", tmp_path / "set")).decode().splitlines()
    assert sum('"vda"' in line for line in lines) == 1
    assert not any("vdb" in line or '"hash"' in line for line in lines)
    assert run("vnb-cat", "--point", tmp_path / "set") == b"vnb.test.20260131T120001.0001\n"
