# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-extents against real servers: what it says of an export, and what it says when that fails."""

import os
import re
import signal
import subprocess

import pytest
import samples
from samples import disks_stream
from servers import DEADLINE, command, nbdkit, needs_nbdkit, needs_qemu, planned, qemu_img, qemu_io, qemu_nbd, stalled

from vnb.base import signals
from vnb.base.errors import Interrupted
from vnb.format.frame import DATA, HOLE, MAX_EXTENTS, ZERO
from vnb.nbd import block_status
from vnb.nbd.connections import Connections

KiB, MiB = 1 << 10, 1 << 20
pytestmark = needs_nbdkit


def extents(output):
    """(disks, {disk: its runs as tuples, neighbours merged}) of one segment."""
    ((head, disks, frames, _, _),) = samples.read(output)
    assert head["stage"] == "extents"
    found = {disk["name"]: [] for disk in disks}
    for kind, number, runs in frames:
        assert kind == "extent"
        assert len(runs) <= 3 * MAX_EXTENTS
        list_ = found[disks[number]["name"]]
        for offset, length, state in zip(runs[0::3], runs[1::3], runs[2::3]):
            if list_ and list_[-1][2] == state and sum(list_[-1][:2]) == offset:
                list_[-1] = (list_[-1][0], list_[-1][1] + length, state)
            else:
                list_.append((offset, length, state))
    return disks, found


def of_uri(server, *options):
    return extents(command("vnb-extents", *options, server.uri).ok())


def test_flags_become_states():
    """A hole that does not read as zeroes holds something, so it has to be read."""
    planned_ = [[1000, 0], [3, 3], [5000, 1], [7000, 2], [512, 0], [1, 2]]
    with planned(13516, planned_) as server:
        (disk,), found = of_uri(server)
    assert disk == {"name": "disk", "size": 13516, "level": "full", "image": {}, "source": {"uri": server.uri}}
    assert found["disk"] == [
        (0, 1000, DATA), (1000, 3, HOLE), (1003, 5000, DATA), (6003, 7000, ZERO), (13003, 512, DATA), (13515, 1, ZERO),
    ]


def test_answers_of_one_extent_each():
    with planned(600, [[100, 0], [100, 3]] * 3, replies=1) as server:
        assert of_uri(server)[1]["disk"] == [(100 * at, 100, HOLE if at % 2 else DATA) for at in range(6)]


def test_an_answer_of_very_many_extents():
    with planned(20000 * 512, [[512, 3], [512, 0]], repeat=10000) as server:
        found = of_uri(server)[1]["disk"]
    assert found == [(512 * at, 512, DATA if at % 2 else HOLE) for at in range(20000)]


def test_a_disk_of_nothing_is_one_extent():
    with nbdkit("memory", "5T") as server:
        output = command("vnb-extents", server.uri).ok()
    ((_, _, frames, _, _),) = samples.read(output)
    assert frames == [("extent", 0, [0, 5 << 40, HOLE])]


@pytest.mark.parametrize("size", [0, 1, 511, 1000003])
def test_sizes(size):
    with nbdkit("memory", size) as server:
        assert of_uri(server)[1]["disk"] == ([(0, size, HOLE)] if size else [])


def test_no_base_allocation_means_that_everything_is_data():
    with nbdkit("--no-sr", "memory", "3M") as server:
        assert of_uri(server)[1]["disk"] == [(0, 3 * MiB, DATA)]


def test_the_rest_of_the_last_block_is_data():
    """It cannot be asked for where the server has a minimum block size: a request must be a multiple of it."""
    policy = ["blocksize-minimum=4096", "blocksize-error-policy=error"]
    # One extent in a reply: else nbdkit tells of the rest without being asked, and is believed.
    with planned(999424 + 579, [[999424, 3], [579, 3]], ["blocksize-policy"], policy, replies=1) as server:
        assert of_uri(server)[1]["disk"] == [(0, 999424, HOLE), (999424, 579, DATA)]


def test_a_name_and_a_head_for_an_export():
    with nbdkit("memory", "1M") as server:
        output = command("vnb-extents", "--name", "data", server.uri).ok()
    ((head, disks, _, _, _),) = samples.read(output)
    assert (disks[0]["name"], head["domain"], head["level"], head["parent"]) == ("data", "data", "copy", None)


def test_disks_of_a_stream_come_in_turn():
    """Whoever reads the data has work on all disks; files and unknown frames pass."""
    with planned(20000 * 512, [[512, 3], [512, 0]], repeat=10000) as a, planned(4 * MiB) as b:
        disks = [samples.disk("vda", 20000 * 512, source={"uri": a.uri}), samples.disk("vdb", 4 * MiB,
                                                                                         source={"uri": b.uri})]
        head = samples.head(stage="disks")
        stdin = samples.segment(head, disks, (["file", samples.part()], b"abc"), (["+new", 5], None))
        ((head_, disks_, frames, _, _),) = samples.read(command("vnb-extents", stdin=stdin).ok())
    assert head_ == {**head, "stage": "extents"}
    assert disks_ == disks
    assert frames[:2] == [("File", samples.part(), b"abc"), ("Other", ["+new", 5], None)]
    assert [disk for _, disk, _ in frames[2:5]] == [0, 1, 0]


def test_segments_follow_each_other():
    with nbdkit("memory", "1M") as server:
        stdin = disks_stream(("vda", MiB, {"uri": server.uri}))
        assert len(samples.read(command("vnb-extents", stdin=2 * stdin).ok())) == 2


@pytest.fixture
def dirty_image(tmp_path):
    """A qcow2 image with 8 MiB of data, and after that, under a bitmap: data, zeroes, a hole."""
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", image, "16M")
    qemu_io(image, "write -P 1 0 8M")
    qemu_img("bitmap", "--add", image, "b0")
    qemu_io(image, "write -P 2 1M 64k", "write -z 2M 1M", "discard 4M 512k", "write -P 3 12M 4k")
    return image


@needs_qemu
def test_what_is_dirty_in_a_bitmap(dirty_image):
    """What became zero is dirty too, and must reach the restored disk."""
    with qemu_nbd("-f", "qcow2", "-B", "b0", dirty_image) as server:
        disks, found = of_uri(server, "--dirty", "b0", "--parent", "p0", "--name", "vda")
        assert disks[0]["level"] == "inc"
        stream = disks_stream(
            ("vda", 16 * MiB, {"uri": server.uri, "dirty": "qemu:dirty-bitmap:b0"}), level="inc",
        )
        assert extents(command("vnb-extents", stdin=stream).ok())[1] == found
    states = {offset: (length, state) for offset, length, state in found["vda"]}
    assert states.pop(4 * MiB) in ((512 * KiB, ZERO), (512 * KiB, HOLE))
    assert states.pop(2 * MiB) in ((MiB, ZERO), (MiB, HOLE))
    assert states == {MiB: (64 * KiB, DATA), 12 * MiB: (64 * KiB, DATA)}


@needs_qemu
def test_a_bitmap_that_is_not_there_is_an_error(dirty_image):
    """Everything would be wrong, and nothing as well."""
    with qemu_nbd("-f", "qcow2", "-B", "b0", dirty_image) as server:
        done = command("vnb-extents", "--dirty", "b1", "--parent", "p0", "--name", "vda", server.uri)
    assert done.failed('vnb-extents: vda: server does not support meta context "qemu:dirty-bitmap:b1"') == b""


# What goes wrong with the server


def test_no_server(tmp_path):
    done = command("vnb-extents", f"nbd+unix:///?socket={tmp_path}/none")
    said = f"cannot connect to {tmp_path}/none: No such file or directory (has its backup job ended)"
    assert done.failed(f"vnb-extents: disk: {said}") == b""


def test_no_server_of_a_stream(tmp_path):
    """The job that it was made for has ended, and has taken its socket along."""
    stdin = disks_stream(("vdb", MiB, {"uri": f"nbd+unix:///?socket={tmp_path}/none"}))
    done = command("vnb-extents", stdin=stdin)
    said = f"cannot connect to {tmp_path}/none: No such file or directory (has its backup job ended)"
    assert done.failed(f"vnb-extents: vdb: {said}") == b""


def test_no_such_export():
    with nbdkit("--filter=exportname", "memory", "1M", "exportname=a", "exportname-strict=true") as server:
        done = command("vnb-extents", server.uri.replace(":///", ":///b"))
    # The words are libnbd's; a newer one has the server's among them.
    assert done.status == 1
    assert re.fullmatch(
        r"vnb-extents: disk: cannot connect: (the )?server has no export named 'b': (.*: )?No such file or directory\n",
        done.err,
    )


def test_a_server_that_hangs_up_while_connecting():
    with nbdkit("--filter=exitlast", "--filter=error", "memory", "1M", "error=EIO", "error-rate=0") as server:
        server.process.send_signal(signal.SIGSTOP)
        with subprocess.Popen(["vnb-extents", server.uri], stderr=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            server.kill()
            _, err = child.communicate(timeout=DEADLINE)
    # Whether it had its connection yet when the server went is not known.
    assert re.fullmatch(
        r"vnb-extents: disk: cannot connect(: server closed the connection| to .*: Connection refused .*)",
        err.decode().strip(),
    )
    assert child.returncode == 1


def test_not_a_uri():
    done = command("vnb-extents", "disk.qcow2")
    assert done.status == 1
    assert done.err.startswith("vnb-extents: disk: cannot connect: NBD URI does not have a scheme: ")
    assert done.err.count("\n") == 1


def unfinished(output):
    """Whether a stream stops before its end."""
    with pytest.raises(samples.stream.StreamError, match="the input ends before the end of the segment"):
        samples.read(output)
    return True


def test_an_extents_request_that_fails():
    with planned(MiB, [[MiB // 2, 0], [MiB // 2, 3]], replies=1, fail=["extents", MiB // 2 + 1]) as server:
        done = command("vnb-extents", server.uri)
    assert done.failed("vnb-extents: disk: offset 0: Input/output error")
    with planned(64 * MiB, [[32 * MiB, 0], [32 * MiB, 3]], replies=1, fail=["extents", 40 * MiB]) as server:
        done = command("vnb-extents", server.uri)
    assert unfinished(done.failed("vnb-extents: disk: offset 33554432: Input/output error"))


def test_a_server_that_dies():
    with planned(64 * MiB, [[32 * MiB, 0], [32 * MiB, 3]], replies=1, die=["extents", 40 * MiB]) as server:
        done = command("vnb-extents", server.uri)
    assert unfinished(done.failed("vnb-extents: disk: offset 33554432: server closed the connection"))


@pytest.mark.parametrize(
    "signum, said", [(signal.SIGINT, ""), (signal.SIGTERM, "vnb-extents: ended by SIGTERM\n")],
)
def test_a_signal_while_the_server_does_not_answer(tmp_path, signum, said):
    """libnbd would wait in C, where no signal handler of Python's runs."""
    fifo = str(tmp_path / "stalled")
    with (
        stalled(fifo) as wait, planned(MiB, [[MiB, 0]], stall=["extents", 5], stalled=fifo) as server,
        subprocess.Popen(["vnb-extents", server.uri], stderr=subprocess.PIPE, stdout=subprocess.PIPE) as child,
    ):
        wait()
        child.send_signal(signum)
        _, err = child.communicate(timeout=DEADLINE)
    assert (child.returncode, err.decode()) == (-signum, said)


def test_the_size_of_the_stream_and_of_the_export_differ():
    with nbdkit("memory", "1M") as server:
        done = command("vnb-extents", stdin=disks_stream(("vda", MiB + 1, {"uri": server.uri})))
    assert done.failed("vnb-extents: vda: the export has 1048576 bytes, the stream says 1048577") == b""


@pytest.mark.parametrize("source", [{}, {"uri": 5}])
def test_a_stream_that_does_not_say_where(source):
    done = command("vnb-extents", stdin=disks_stream(("vda", 5, source)))
    assert done.failed("vnb-extents: vda: the stream does not say where this disk is exported") == b""


@pytest.mark.parametrize("changes, level", [({"uri": "nbd://a\0b"}, "full"), ({"dirty": "a\0b"}, "inc")])
def test_a_text_that_no_library_in_c_can_take(changes, level):
    with nbdkit("memory", "1M") as server:
        content = disks_stream(("vda", MiB, {"uri": server.uri, **changes}), level=level)
        done = command("vnb-extents", stdin=content)
    assert done.failed("vnb-extents: vda: cannot connect: embedded null character") == b""


def test_an_increment_that_does_not_say_which_bitmap():
    with nbdkit("memory", "1M") as server:
        done = command("vnb-extents", stdin=disks_stream(("vda", MiB, {"uri": server.uri}), level="inc"))
    assert done.failed("vnb-extents: vda: the stream does not say which bitmap this disk has") == b""


# What goes wrong with the output


def test_a_reader_that_closes_the_pipe():
    with nbdkit("memory", "1M") as server:
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(["vnb-extents", server.uri], stdout=write, stderr=subprocess.PIPE, timeout=DEADLINE,
                              check=False)
        os.close(write)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


def test_a_full_disk():
    with nbdkit("memory", "1M") as server, open("/dev/full", "wb") as full:
        done = subprocess.run(["vnb-extents", server.uri], stdout=full, stderr=subprocess.PIPE, timeout=DEADLINE,
                              check=False)
    assert (done.returncode, done.stderr) == (1, b"vnb-extents: stdout: No space left on device\n")


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--dirty", "b", "nbd://x"], "--dirty: needs --parent, and --parent needs --dirty"),
        (["--parent", "b", "nbd://x"], "--dirty: needs --parent, and --parent needs --dirty"),
        (["--name", "../x", "nbd://x"], "--name: a disk must not be named '../x'"),
        (["a", "b"], 'unexpected operand "b"'),
        (["--dirty", "b"], "URI is missing"),
    ],
)
def test_wrong_usage(arguments, reason):
    done = command("vnb-extents", *arguments)
    assert (done.status, done.out) == (2, b"")
    assert done.err.splitlines()[0] == f"vnb-extents: {reason}"
    assert done.err.splitlines()[1] == "Usage:"


@pytest.fixture
def handled():
    """Signals that ask us to end are handled as by the commands."""
    before = [(signum, signal.signal(signum, signals.handle)) for signum in signals.SIGNALS]
    yield
    for signum, handler in before:
        signal.signal(signum, handler)


def test_a_signal_in_the_middle_of_libnbds_callback(capfd, monkeypatch, handled):
    """It is not printed there, nor taken for a fault of the server; it may come before our first line in it."""
    extent = block_status.Question._extent

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return extent(*args)

    monkeypatch.setattr(block_status.Question, "_extent", interrupted)
    with planned(600, [[600, 0]]) as server:
        context = block_status.Context(Connections(1), server.uri, "disk", block_status.BASE_ALLOCATION)
        question = context.ask(0, 600)
        with pytest.raises(Interrupted):
            question.answer()
        context.close()
    assert capfd.readouterr().err == ""


def test_no_memory_in_libnbds_callback(capfd):
    class Full(list):
        def __bool__(self):
            raise MemoryError

    with planned(600, [[600, 0]]) as server:
        context = block_status.Context(Connections(1), server.uri, "disk", block_status.BASE_ALLOCATION)
        question = context.ask(0, 600)
        question._entries = Full()
        with pytest.raises(MemoryError):
            question.answer()
        context.close()
    assert capfd.readouterr().err == ""
