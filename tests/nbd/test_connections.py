# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Connections are few, and taken and given back: no server is asked for more than it takes, and none is waited for without
end. What a server sends is taken, whoever keeps us waiting.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time

import pytest
import samples
from relay import Relay
from samples import disks_stream, read_disk, with_extents
from servers import DEADLINE, command, forked, nbdkit, needs_nbdkit, needs_qemu, pipe, qemu_img, qemu_io, serve

from vnb.cli import extents, read
from vnb.format.frame import DATA, HOLE
from vnb.nbd import connection, connections
from vnb.nbd.connections import MOST_OF_EXTENTS, MOST_OF_READ
from vnb.store import direct_writer

KiB, MiB = 1 << 10, 1 << 20
MANY_EXTENTS = os.path.join(os.path.dirname(__file__), "..", "live", "many_extents.py")
BOTH = "set -o pipefail; vnb-extents {} | vnb-read"  # side by side, as in a backup
pytestmark = needs_nbdkit


def many_extents(*options):
    """Far more of them than there is room for in a pipe, and 32 MiB of data."""
    return nbdkit("python", MANY_EXTENTS, f"size={16 << 30}", f"extent={128 * KiB}", *options)


def both(*arguments, stdin=b""):
    """What vnb-extents with these arguments and vnb-read make of a stream."""
    return command("bash", "-c", BOTH.format('"$@"'), "bash", *arguments, stdin=stdin)


def data(output):
    """{disk number: bytes of data} of a stream that was read."""
    ((_, disks, frames, _, _),) = samples.read(output)
    found = dict.fromkeys(range(len(disks)), 0)
    for frame in frames:
        if frame[0] == "data":
            found[frame[1]] += frame[3]
    return found


@contextlib.contextmanager
def running(*argv, stdin=subprocess.PIPE):
    """A command with a pipe at each end."""
    with subprocess.Popen(argv, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        try:
            yield child
        finally:
            child.kill()


# The budget


@pytest.fixture
def many_disks(tmp_path):
    """A function that serves an image of 1 MiB, 64 KiB of it dirty, under many names; gives a stream of these disks."""
    if shutil.which("qemu-storage-daemon") is None:
        pytest.skip("not installed: qemu-storage-daemon")
    image = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    qemu_io(image, "write -P 1 0 512k")
    qemu_img("bitmap", "--add", image, "b0")
    qemu_io(image, "write -P 2 128k 64k")

    @contextlib.contextmanager
    def serving(count, clients, level):
        options = []
        for number in range(count):
            options += [
                "--blockdev", f"driver=file,node-name=f{number},filename={image},read-only=on,locking=off",
                "--blockdev", f"driver=qcow2,node-name=q{number},file=f{number},read-only=on",
                "--export", f"nbd,id=e{number},node-name=q{number},name=d{number},bitmaps.0=b0",
            ]
        path = tmp_path / "sock"
        with subprocess.Popen(["qemu-storage-daemon", "--daemonize", "--pidfile", tmp_path / "pid", "--nbd-server",
                               f"addr.type=unix,addr.path={path},max-connections={clients}", *options]) as starting:
            assert starting.wait(DEADLINE) == 0  # it listens
        try:
            yield disks_stream(*(
                (f"d{number}", MiB, {"uri": f"nbd+unix:///d{number}?socket={path}", "dirty": "qemu:dirty-bitmap:b0"})
                for number in range(count)
            ), level=level)
        finally:
            os.kill(int((tmp_path / "pid").read_text()), 9)

    return serving


@needs_qemu
@pytest.mark.parametrize("count, clients", [(30, MOST_OF_EXTENTS + MOST_OF_READ), (8, 1)])
@pytest.mark.parametrize("level, size", [("full", 512 * KiB), ("inc", 64 * KiB)])
def test_many_disks_of_a_server_that_takes_few_clients(many_disks, count, clients, level, size):
    """QEMU takes 100, and greets the next one when somebody has gone."""
    with many_disks(count, clients, level) as stream:
        assert data(both(stdin=stream).ok()) == dict.fromkeys(range(count), size)


def test_no_more_connections_than_the_budget():
    size = 8 * MiB
    with nbdkit("pattern", size) as server, Relay(server) as relay:
        stream = disks_stream(*((f"d{number}", size, {"uri": relay.export(number)}) for number in range(20)))
        found = command("vnb-extents", stdin=stream).ok()
        assert relay.peak == MOST_OF_EXTENTS
        relay.peak = 0
        # All disks in turn, a read each time, as another program might ask for them.
        runs = [["extent", disk, [at * MiB, MiB, DATA]] for at in range(8) for disk in range(20)]
        head, disks = samples.read(found)[0][:2]
        output = command("vnb-read", stdin=samples.segment(head, disks, *runs)).ok()
        assert relay.peak == MOST_OF_READ
    assert data(output) == dict.fromkeys(range(20), size)


def test_a_small_disk_needs_one_connection():
    with nbdkit("pattern", "1M") as server, Relay(server) as relay:
        command("vnb-extents", relay.uri).ok()
        assert relay.all == 1


def test_connections_that_have_nothing_to_do_make_way_for_a_disk_with_much():
    size = 64 * MiB
    with nbdkit("pattern", size) as server, Relay(server) as relay:
        runs = [0, 4096, DATA, 4096, size - 4096, HOLE]
        small = [(relay.export(number), size, runs) for number in range(MOST_OF_READ)]
        stream = with_extents(*small, (relay.export("large"), size, [0, size, DATA]))
        output = command("vnb-read", stdin=stream).ok()
        assert relay.peak == MOST_OF_READ
        assert relay.all == MOST_OF_READ + 4
    assert data(output)[MOST_OF_READ] == size


# Servers that take one client at a time


@pytest.mark.parametrize("limit", [1, 2])
def test_a_server_that_hangs_up_on_more_clients(limit):
    """Each stage gives back its connection as long as it waits for the other one."""
    with many_extents("--filter=limit", f"limit={limit}") as server:
        assert data(both(server.uri).ok()) == {0: 32 * MiB}


@pytest.mark.parametrize("clients", [1, 2])
def test_a_server_that_does_not_greet_more_clients(clients):
    with many_extents() as server, Relay(server, clients) as relay:
        assert data(both(relay.uri).ok()) == {0: 32 * MiB}


def test_several_disks_of_a_server_that_takes_one_client_at_a_time():
    with nbdkit("pattern", "8M", "--filter=limit", "limit=1") as server:
        uris = [server.uri.replace(":///", f":///{number}") for number in range(6)]
        stream = disks_stream(*((f"d{number}", 8 * MiB, {"uri": uri}) for number, uri in enumerate(uris)))
        assert data(both(stdin=stream).ok()) == dict.fromkeys(range(6), 8 * MiB)


@needs_qemu
def test_an_increment_of_a_qemu_nbd_for_one_client(tmp_path):
    """As it is without --shared."""
    image = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    qemu_img("bitmap", "--add", image, "b0")
    qemu_io(image, "write -P 2 1M 64k", "write -z 2M 1M", "write -P 3 32M 64k")
    with serve("qemu-nbd", "--persistent", "--read-only", "-f", "qcow2", "-B", "b0", image) as server:
        output = both("--name", "vda", "--dirty", "b0", "--parent", "p0", server.uri).ok()
    order, plains = read_disk(output)
    assert [(offset, length) for offset, length, _ in order] == [(MiB, 64 * KiB), (2 * MiB, MiB), (32 * MiB, 64 * KiB)]
    assert plains == {MiB: bytes([2]) * 64 * KiB, 32 * MiB: bytes([3]) * 64 * KiB}


@pytest.mark.parametrize("clients", [1, 2])
def test_one_stage_after_the_other(clients):
    """A further connection that is never greeted is not waited for, and the server is free when the stage has ended."""
    with nbdkit("pattern", 64 * MiB) as server, Relay(server, clients) as relay:
        for _ in range(2):
            assert data(pipe(["vnb-extents", relay.uri], ["vnb-read"])) == {0: 64 * MiB}


# What is waited for, and for how long


def patient_for(seconds):
    def prepare():
        connections.PATIENCE = read.PATIENCE = seconds

    return prepare


def fails(uri, reason):
    """Both commands say this, and nothing that was begun has an end."""
    stdin = with_extents((uri, MiB, [0, MiB, DATA]))
    for name, module, arguments, disk in (("vnb-extents", extents, [uri], "disk"), ("vnb-read", read, [], "vda")):
        done = forked(name, module, *arguments, stdin=stdin, prepare=patient_for(0.5))
        done.failed(f"{name}: {disk}: cannot connect: {reason}")


@contextlib.contextmanager
def listening(backlog):
    """(the URI of, a socket that listens and does no more)."""
    with tempfile.TemporaryDirectory(prefix="vnb-test.") as directory, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{directory}/s")
        listener.listen(backlog)
        yield f"nbd+unix:///?socket={directory}/s", listener


def test_a_server_that_never_greets():
    with listening(64) as (uri, _):
        fails(uri, "no greeting within 0.5 seconds: the server may have as many clients as it takes")


def test_a_server_whose_backlog_is_full():
    with listening(0) as (uri, _), socket.socket(socket.AF_UNIX) as other:
        other.connect(uri.partition("socket=")[2])
        fails(uri, "the server took no client within 0.5 seconds: it may have as many as it takes")


def test_a_port_that_does_not_answer():
    """As behind a firewall that drops what it does not let through: here there is no room for one more to wait."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(2):
            waits = stack.enter_context(socket.socket())
            waits.setblocking(False)
            waits.connect_ex(listener.getsockname())
        port = listener.getsockname()[1]
        fails(f"nbd://127.0.0.1:{port}", "no answer within 0.5 seconds: a firewall may be in between")
        fails(f"nbds://127.0.0.1:{port}", "no answer within 0.5 seconds: a firewall may be in between")


def test_a_server_that_stops_within_its_handshake():
    def greet():
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                client.sendall(b"NBDMAGICIHAVEOPT\0\3")
                clients.append(client)

    clients = []
    with listening(64) as (uri, listener):
        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        fails(uri, "the server did not end its handshake within 0.5 seconds")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for client in clients:
            client.close()


def test_a_server_that_hangs_up_on_everybody():
    with nbdkit("memory", "1M", "--filter=limit", "limit=1") as server:
        other = connections.Connections(1)
        other.open(server.uri, "vda")  # it has its one client
        fails(server.uri, "the server took no client within 0.5 seconds: it may have as many as it takes")


def test_the_end_of_a_connection_is_not_waited_for_without_end(monkeypatch):
    """The data is there; a server that has gone to sleep can keep it no more."""
    monkeypatch.setattr(connection, "CLOSE_SECONDS", 0.2)
    with nbdkit("memory", "1M") as server:
        ours = connections.Connections(1)
        ours.open(server.uri, "vda")
        server.process.send_signal(19)
        ours.give_back()


# While somebody else keeps us waiting


SIZE = 64 * MiB  # more than the pipes and the reads in flight can hold


def test_answers_are_taken_while_nobody_reads_the_output():
    """QEMU may stand still, with its guest, as long as it has answers that nobody takes."""
    with nbdkit("pattern", SIZE) as server, Relay(server) as relay, running("vnb-read") as child:
        child.stdin.write(with_extents((relay.uri, SIZE, [0, SIZE, DATA])))
        child.stdin.close()
        relay.wait_for(lambda: relay.sent >= read.MAX_IN_FLIGHT)
        assert relay.open > 0  # it has more to ask for
        assert data(child.stdout.read()) == {0: SIZE}
        assert child.wait(DEADLINE) == 0


@pytest.fixture
def hung_file(tmp_path):
    """(a file whose writes behind the first MiB do not end, a function that lets them), as on a server that is away."""
    gate, mount = tmp_path / "gate", tmp_path / "mount"
    gate.touch()
    mount.mkdir()
    if shutil.which("nbdfuse") is None or not os.access("/dev/fuse", os.W_OK):
        pytest.skip("not installed: nbdfuse, or no /dev/fuse")
    write = f"cat > /dev/null; while test $4 -ge {MiB} && test -e {gate}; do sleep 0.05; done"
    with (
        serve("nbdkit", "-f", "eval", "get_size=echo 128M", "pread=head -c $3 /dev/zero", "can_write=exit 0",
              f"pwrite={write}") as server,
        subprocess.Popen(["nbdfuse", mount, "--unix", server.uri.partition("socket=")[2]]) as fuse,
    ):
        try:
            while not os.path.ismount(mount):
                assert fuse.poll() is None
                time.sleep(0.02)
            yield mount / "nbd", gate.unlink
        finally:
            gate.unlink(missing_ok=True)
            subprocess.run(["fusermount3", "-u", "-z", mount], check=True)


def test_answers_are_taken_while_the_file_system_hangs(hung_file):
    path, go_on = hung_file
    with nbdkit("pattern", SIZE) as server, Relay(server) as relay, path.open("r+b") as file:
        with subprocess.Popen(["vnb-read"], stdin=subprocess.PIPE, stdout=file) as child:
            child.stdin.write(with_extents((relay.uri, SIZE, [0, SIZE, DATA])))
            child.stdin.close()
            relay.wait_for(lambda: relay.sent >= read.MAX_IN_FLIGHT + (direct_writer.BLOCKS - 1) * direct_writer.BLOCK)
            assert relay.open > 0
            go_on()
        assert child.returncode == 0


def test_data_leaves_while_there_is_no_input():
    """And there is no use for the connection then, while another stage may wait for it."""
    with nbdkit("pattern", SIZE) as server, Relay(server) as relay, running("vnb-read") as child:
        head, disks = samples.head(stage="extents"), [samples.disk("vda", SIZE, source={"uri": relay.uri})]
        # A reader of the stream looks ahead, as far as some frames of this length.
        holes = [["extent", 0, [MiB + at, 1, HOLE]] for at in range(100)]
        frames = [["extent", 0, [0, MiB, DATA]], *holes, ["extent", 0, [MiB + 100, SIZE - MiB - 100, DATA]]]
        whole = samples.segment(head, disks, *frames)
        begin = os.path.commonprefix([whole, samples.segment(head, disks, *frames[:-1])])
        child.stdin.write(begin)
        child.stdin.flush()
        found = child.stdout.read(MiB)
        relay.wait_for(lambda: relay.open == 0)
        child.stdin.write(whole[len(begin) :])
        child.stdin.close()
        assert data(found + child.stdout.read()) == {0: SIZE - 100}


def test_extents_that_nobody_reads_keep_no_connection():
    with many_extents() as server, Relay(server) as relay, running("vnb-extents", relay.uri) as child:
        relay.wait_for(lambda: relay.all > 0 and relay.open == 0)
        ((_, _, frames, _, _),) = samples.read(child.stdout.read())
        assert child.wait(DEADLINE) == 0
        ((_, _, expected, _, _),) = samples.read(command("vnb-extents", relay.uri).ok())
    assert [run for frame in frames for run in frame[2]] == [run for frame in expected for run in frame[2]]
    assert sum(len(frame[2]) for frame in frames) > 3 * 100_000
