# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ways out of vnb-map: files, TCP with and without TLS, a device; and writes that the set never sees."""

import contextlib
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import makers
import nbd
import pytest
from mapping import copy, mapped, needs_fuse, needs_root, run

from vnb.base.errors import Error
from vnb.serve import device

PLAN = [{"vda": "200k:? 64k:- 32k:0 7k:A", "vdb": "64k:B 64k:0"}, {"vda": "4k:C", "vdb": "1k:.  1k:D"}]
EXPECTED = makers.images(PLAN)
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("saved") / "set")
    makers.make_set(directory, PLAN, spec="lz4")
    return directory


def content(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def mounts():
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def connect(uri, **settings):
    handle = nbd.NBD()
    for name, value in settings.items():
        getattr(handle, f"set_{name}")(value)
    handle.connect_uri(uri)
    return handle


# Files


@needs_fuse
def test_a_file_for_each_disk(saved, tmp_path):
    directory = tmp_path / "mnt"
    with mapped("--fuse", directory, saved, lines=2) as map_:
        assert map_.lines == [f"{directory}/vda", f"{directory}/vdb"]
        for name in ("vda", "vdb"):
            assert (directory / name).read_bytes() == EXPECTED[-1][name]
            assert stat.S_IMODE((directory / name).stat().st_mode) & 0o222 == 0
        assert map_.end() == (-15, "vnb-map: ended by SIGTERM\n")
    assert not directory.exists()
    assert not [path for path in mounts() if path.startswith(str(tmp_path))]


@needs_fuse
def test_a_directory_that_was_there_stays(saved, tmp_path):
    (tmp_path / "other").write_text("precious")
    with mapped("--fuse", tmp_path, "--disk", "vda", saved):
        assert (tmp_path / "vda").read_bytes() == EXPECTED[-1]["vda"]
    assert os.listdir(tmp_path) == ["other"]


@needs_fuse
def test_a_file_that_was_there_is_left_alone(saved, tmp_path):
    (tmp_path / "vdb").write_text("precious")
    done = run("vnb-map", "--fuse", tmp_path, saved)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"vnb-map: {tmp_path}/vdb: File exists\n")
    assert os.listdir(tmp_path) == ["vdb"]
    assert (tmp_path / "vdb").read_text() == "precious"


@needs_fuse
def test_a_file_that_is_open_while_it_ends(saved, tmp_path):
    with mapped("--fuse", tmp_path / "mnt", saved, lines=2) as map_:
        fd = os.open(tmp_path / "mnt" / "vda", os.O_RDONLY)
        try:
            assert os.read(fd, 1) == EXPECTED[-1]["vda"][:1]
            assert map_.end() == (-15, "vnb-map: ended by SIGTERM\n")
            assert not [path for path in mounts() if path.startswith(str(tmp_path))]
        finally:
            with contextlib.suppress(OSError):  # it has nothing behind it any more
                os.close(fd)
    assert not (tmp_path / "mnt").exists()


@needs_fuse
@needs_root
def test_it_ends_when_everything_is_unmounted(saved, tmp_path):
    with mapped("--fuse", tmp_path / "mnt", saved, lines=2) as map_:
        for line in map_.lines:
            assert run("umount", line).returncode == 0
        assert map_.process.wait(30) == 0
    assert not (tmp_path / "mnt").exists()


@needs_fuse
@needs_root
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_file_system_in_a_loop(tmp_path, kind):
    """One file back, without a restore: from a full, and from an increment that has it changed."""
    make = shutil.which(f"mkfs.{kind}")
    if not make:
        pytest.skip(f"no mkfs.{kind} here")
    image, mnt = tmp_path / "image", tmp_path / "mnt"
    mnt.mkdir()
    with open(image, "wb") as file:
        file.truncate(320 << 20)
    assert run(make, image).returncode == 0
    states = []
    for text in ("first\n", "second\n"):
        done = run("mount", "-o", "loop", image, mnt)
        if done.returncode:
            pytest.skip(done.stderr)
        (mnt / "file").write_text(text)
        assert run("umount", mnt).returncode == 0
        states.append(image.read_bytes())
    plan = [{"vda": makers.changes(states[0])}, {"vda": makers.changes(states[1], states[0])}]
    makers.make_set(tmp_path / "set", plan, spec="lz4")
    options = "loop,ro" + {"ext4": ",noload", "xfs": ",norecovery", "btrfs": ""}[kind]
    for number, text in enumerate(("first\n", "second\n")):
        with mapped("--fuse", tmp_path / "map", "--until", makers.point(number), tmp_path / "set") as map_:
            done = run("mount", "-o", options, *map_.lines, mnt)
            assert done.returncode == 0, done.stderr
            try:
                assert (mnt / "file").read_text() == text
            finally:
                assert run("umount", mnt).returncode == 0


@needs_fuse
def test_fuse_and_run_as_it_is_in_the_manual(saved, tmp_path):
    """In the background, for a script."""
    done = run("vnb-map", "--daemon", tmp_path / "pid", "--fuse", tmp_path / "mnt", saved)
    assert (done.returncode, done.stderr) == (0, "")
    try:
        assert (tmp_path / "mnt" / "vda").read_bytes() == EXPECTED[-1]["vda"]
    finally:
        stopped = run("vnb-map", "--stop", tmp_path / "pid")
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert not (tmp_path / "mnt").exists()


# TCP


@pytest.mark.parametrize("where", ["0", ":0", "127.0.0.1:0", "localhost:0"])
def test_tcp_on_the_loopback_address(saved, tmp_path, where):
    with mapped("--listen", where, saved, lines=2) as map_:
        host = "localhost" if where.startswith("localhost") else "127.0.0.1"
        assert re.fullmatch(rf"nbd://{re.escape(host)}:\d+/vda", map_.lines[0])
        assert copy(map_.lines[0], tmp_path / "out") == EXPECTED[-1]["vda"]


def test_tcp_on_ipv6(saved, tmp_path):
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    with mapped("--listen", "[::1]:0", saved, lines=2) as map_:
        assert map_.lines[0].startswith("nbd://[::1]:")
        assert copy(map_.lines[0], tmp_path / "out") == EXPECTED[-1]["vda"]


def test_a_port_that_is_taken(saved):
    with mapped("--listen", "0", saved, lines=2) as map_:
        port = re.search(r":(\d+)/", map_.lines[0])[1]
        done = run("vnb-map", "--listen", port, saved)
        assert (done.returncode, done.stderr) == (1, f"vnb-map: {port}: Address already in use\n")


@pytest.mark.parametrize("where", ["192.0.2.1:0", "nowhere.invalid:0"])
def test_an_address_that_is_not_ours(saved, where):
    done = run("vnb-map", "--listen", where, saved)
    assert done.returncode == 1
    assert re.fullmatch(rf"vnb-map: {where}: [^:\n]+\n", done.stderr)


@pytest.fixture
def keys(tmp_path):
    """A file with a pre-shared key for alice, and one with another."""
    for name, key in (("keys", "01" * 32), ("wrong", "02" * 32)):
        (tmp_path / name).write_text(f"alice:{key}\n")
        (tmp_path / name).chmod(0o600)
    return tmp_path / "keys", tmp_path / "wrong"


def test_tls_with_a_shared_key(saved, keys):
    right, wrong = keys
    with mapped("--listen", "0", "--tls-psk", right, saved, lines=2) as map_:
        assert map_.lines[0].startswith("nbds://127.0.0.1:")
        uri = map_.lines[0].replace("//", "//alice@")
        handle = connect(uri, tls_psk_file=str(right))
        assert handle.get_tls_negotiated()
        assert handle.pread(4096, 0) == EXPECTED[-1]["vda"][:4096]
        handle.shutdown()
        with pytest.raises(nbd.Error):
            connect(uri, tls_psk_file=str(wrong))
        with pytest.raises(nbd.Error):
            connect(map_.lines[0].replace("nbds:", "nbd:"))


@pytest.fixture
def certificates(tmp_path):
    """Directories with certificates: of the server, of a client, of a client that another authority knows."""

    def openssl(*arguments):
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)

    def authority(directory):
        directory.mkdir()
        openssl(
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test", "-days", "2",
            "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
            "-keyout", directory / "ca-key.pem", "-out", directory / "ca-cert.pem",
        )  # fmt: skip

    def issue(directory, name, source):
        directory.mkdir(exist_ok=True)
        request, extensions = directory / f"{name}.csr", directory / f"{name}.ext"
        extensions.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        openssl(
            "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost",
            "-keyout", directory / f"{name}-key.pem", "-out", request,
        )  # fmt: skip
        openssl(
            "x509", "-req", "-in", request, "-CA", source / "ca-cert.pem", "-CAkey", source / "ca-key.pem",
            "-set_serial", "1", "-days", "2", "-extfile", extensions, "-out", directory / f"{name}-cert.pem",
        )  # fmt: skip
        if not (directory / "ca-cert.pem").exists():
            shutil.copy(source / "ca-cert.pem", directory)

    ours, other, client, stranger = (tmp_path / name for name in ("server", "other", "client", "stranger"))
    authority(ours)
    authority(other)
    issue(ours, "server", ours)
    issue(client, "client", ours)
    stranger.mkdir()
    shutil.copy(ours / "ca-cert.pem", stranger)  # it trusts the server, but the server does not trust it
    issue(stranger, "client", other)
    return ours, client, stranger


def test_tls_with_certificates(saved, certificates):
    server, client, stranger = certificates
    with mapped("--listen", "0", "--tls-certificates", server, saved, lines=2) as map_:
        uri = map_.lines[0].replace("127.0.0.1", "localhost")
        handle = connect(uri, tls_certificates=str(client))
        assert handle.pread(4096, 0) == EXPECTED[-1]["vda"][:4096]
        handle.shutdown()
        with pytest.raises(nbd.Error):
            handle = connect(uri, tls_certificates=str(stranger))
            handle.pread(4096, 0)  # with TLS 1.3 the client learns it only here
        with pytest.raises(nbd.Error):
            connect(uri.replace("nbds:", "nbd:"))


@pytest.mark.parametrize("option", ["--tls-psk", "--tls-certificates"])
def test_tls_without_its_files(saved, tmp_path, option):
    """No fallback: without keys nothing is served."""
    done = run("vnb-map", "--listen", "0", option, tmp_path / "nowhere", saved)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"vnb-map: {tmp_path}/nowhere\S*: No such file or directory\n", done.stderr)


# The kernel's devices


@pytest.mark.skipif(os.path.exists("/sys/module/nbd"), reason="the kernel has NBD devices")
def test_a_device_without_the_kernels_module(saved):
    done = run("vnb-map", "--disk", "vda", "--device", "/dev/nbd0", saved)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "vnb-map: /dev/nbd0: No such file or directory (type: modprobe nbd)\n"


@pytest.mark.skipif(os.path.exists("/sys/module/nbd"), reason="the kernel has NBD devices")
def test_a_device_beyond_those_that_the_module_makes(saved):
    done = run("vnb-map", "--disk", "vda", "--device", "/dev/nbd20", saved)
    assert done.stderr == "vnb-map: /dev/nbd20: No such file or directory (type: modprobe nbd nbds_max=21)\n"


@needs_root
@pytest.mark.skipif(os.path.exists("/sys/module/nbd"), reason="the kernel has NBD devices")
def test_a_device_node_without_the_kernels_module(saved, tmp_path):
    """It can't be seen before qemu-nbd has tried."""
    os.mknod(tmp_path / "nbd0", 0o600 | stat.S_IFBLK, os.makedev(43, 0))
    done = run("vnb-map", "--disk", "vda", "--device", tmp_path / "nbd0", saved)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"vnb-map: {tmp_path}/nbd0: No such device or address (type: modprobe nbd)\n"


def test_a_device_that_the_module_was_not_asked_for(tmp_path, monkeypatch):
    """The kernel has NBD devices, but fewer."""
    (tmp_path / "module" / "nbd").mkdir(parents=True)
    monkeypatch.setattr(device.Device, "SYS", str(tmp_path))
    reason = r"No such file or directory \(type: modprobe -r nbd && modprobe nbd nbds_max=1001\)"
    with pytest.raises(Error, match=f"/dev/nbd1000: {reason}"):
        device.Device("/dev/nbd1000", "nbd://", False, False)


@needs_root
def test_a_device_in_use(tmp_path, monkeypatch):
    """As the kernel says it: with the process of whoever has connected it."""
    os.mknod(tmp_path / "nbd0", 0o600 | stat.S_IFBLK, os.makedev(43, 0))
    (tmp_path / "dev" / "block" / "43:0").mkdir(parents=True)
    (tmp_path / "dev" / "block" / "43:0" / "pid").write_text("4711\n")
    monkeypatch.setattr(device.Device, "SYS", str(tmp_path))
    with pytest.raises(Error, match="nbd0: is in use by process 4711; qemu-nbd --disconnect frees it"):
        device.Device(str(tmp_path / "nbd0"), "nbd://", False, False)


@pytest.mark.parametrize("path", ["/dev/null", "/etc/passwd", "/"])
def test_what_is_no_nbd_device(saved, path):
    done = run("vnb-map", "--disk", "vda", "--device", path, saved)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"vnb-map: {path}: is no NBD device\n")


@needs_root
def test_a_device(saved, tmp_path):
    """With a node that says it is one, and in the place of qemu-nbd a script that writes down how it is called."""
    device, log = tmp_path / "nbd0", tmp_path / "log"
    try:
        os.mknod(device, 0o600 | stat.S_IFBLK, os.makedev(43, 0))
    except OSError as error:
        pytest.skip(f"no device nodes here: {error}")
    (tmp_path / "qemu-nbd").write_text(f"""#!/bin/sh
        echo "$@" >> {log}
        case $1 in
        --disconnect) kill "$(cat {tmp_path}/pid)";;
        *) echo $$ > {tmp_path}/pid; echo "NBD device is now connected to it" >&2; exec tail -f /dev/null;;
        esac
    """)
    (tmp_path / "qemu-nbd").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with mapped("--disk", "vda", "--device", device, saved, env=environment) as map_:
        assert map_.lines == [str(device)]
        assert map_.end() == (-15, "vnb-map: ended by SIGTERM\n")
    connect_, disconnect = log.read_text().splitlines()
    assert re.fullmatch(
        rf"--verbose --connect={device} --format=raw --read-only nbd\+unix:///vda\?socket=\S+", connect_
    )
    assert disconnect == f"--disconnect {device}"


# Writes


def test_writes_are_forgotten(saved, tmp_path):
    before = content(saved)
    script = f"""python3 - "$uri" <<'END'
import nbd, sys
a, b = nbd.NBD(), nbd.NBD()
for handle in (a, b):
    handle.connect_uri(sys.argv[1])
    assert not handle.is_read_only() and handle.can_multi_conn()
a.pwrite(b"written", 5000)
a.flush()
print(b.pread(9, 4999))
END
nbdcopy "$uri" {tmp_path}/out"""
    environment = {**os.environ, "PATH": f"/usr/bin:{os.environ['PATH']}"}
    done = run("vnb-map", "--disk", "vda", "--writable", "--run", script, saved, env=environment)
    plain = EXPECTED[-1]["vda"]
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{bytearray(plain[4999:5000] + b'written' + plain[5007:5008])}\n"
    plain = bytearray(plain)
    plain[5000:5007] = b"written"
    assert (tmp_path / "out").read_bytes() == plain
    assert content(saved) == before
    assert run("vnb-map", "--disk", "vda", "--run", f'nbdcopy "$uri" {tmp_path}/out', saved).returncode == 0
    assert (tmp_path / "out").read_bytes() == EXPECTED[-1]["vda"]


def test_a_writable_map_has_no_other_points(saved, tmp_path):
    """They would all show what was written to one of them."""
    with mapped("--disk", "vda", "--writable", "--socket", tmp_path / "s", saved) as map_:
        exports = json.loads(run("nbdinfo", "--list", "--json", map_.lines[0]).stdout)["exports"]
        assert [export["export-name"] for export in exports] == ["vda"]
        assert run("nbdinfo", map_.lines[0].replace("/vda?", f"/vda@{makers.point(0)}?")).returncode == 1


@needs_fuse
def test_writes_through_a_file(saved, tmp_path):
    with mapped("--disk", "vdb", "--writable", "--fuse", tmp_path / "mnt", saved):
        with open(tmp_path / "mnt" / "vdb", "r+b") as file:
            file.seek(70_000)
            file.write(b"written")
        assert (tmp_path / "mnt" / "vdb").read_bytes()[69_999:70_008] == b"\0written\0"


def overlaid(saved, overlay, *options):
    """A vnb-map with an overlay, that copies vda out."""
    out = f"{overlay}.out"
    command = f'nbdcopy "$uri" {shlex.quote(out)}'
    return run("vnb-map", "--disk", "vda", "--overlay", overlay, *options, "--run", command, saved), out


def test_an_overlay_survives(saved, tmp_path):
    before = content(saved)
    overlay = tmp_path / "a overlay.qcow2"
    with mapped("--disk", "vda", "--overlay", overlay, "--socket", tmp_path / "s", saved) as map_:
        handle = connect(map_.lines[0])
        assert handle.pread(4096, 0) == EXPECTED[-1]["vda"][:4096]
        handle.pwrite(b"written", 5000)
        # Not flushed: whoever ends it may expect that it is there all the same.
        assert map_.end() == (-15, "vnb-map: ended by SIGTERM\n")
    assert stat.S_IMODE(overlay.stat().st_mode) == 0o600
    done, out = overlaid(saved, overlay)
    assert (done.returncode, done.stderr) == (0, "")
    plain = bytearray(EXPECTED[-1]["vda"])
    plain[5000:5007] = b"written"
    assert Path(out).read_bytes() == plain
    assert content(saved) == before


def test_an_overlay_belongs_to_one_point(saved, tmp_path):
    overlay = tmp_path / "overlay"
    assert overlaid(saved, overlay)[0].returncode == 0
    done, _ = overlaid(saved, overlay, "--until", makers.point(0))
    assert done.returncode == 1
    assert done.stderr == (
        f"vnb-map: {overlay}: belongs on top of vda@{makers.point(1)}, not of vda@{makers.point(0)}\n"
    )


def test_an_overlay_alone_is_an_error(saved, tmp_path):
    """Without vnb-map below it must not show zeroes in the place of what was saved."""
    overlay = tmp_path / "overlay"
    assert overlaid(saved, overlay)[0].returncode == 0
    assert run("qemu-img", "convert", "-O", "raw", overlay, tmp_path / "out", cwd=tmp_path).returncode == 1


@pytest.mark.parametrize("text", ["precious", ""])
def test_a_file_that_is_no_overlay_is_left_alone(saved, tmp_path, text):
    (tmp_path / "file").write_text(text)
    done, _ = overlaid(saved, tmp_path / "file")
    assert done.returncode == 1
    assert re.fullmatch(rf"vnb-map: {tmp_path}/file: [^\n]+\n", done.stderr)
    assert (tmp_path / "file").read_text() == text


def test_another_image_is_left_alone(saved, tmp_path):
    """A qcow2 image that somebody else made."""
    assert run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "image", "1M").returncode == 0
    done, _ = overlaid(saved, tmp_path / "image")
    assert done.stderr == f"vnb-map: {tmp_path}/image: belongs on top of nothing, not of vda@{makers.point(1)}\n"
