# SPDX-License-Identifier: LGPL-2.1-or-later
"""What vnb-map serves, read by the tools that users have: nbdcopy, nbdinfo, qemu-img."""

import json
import subprocess
import threading
from pathlib import Path

import makers
import nbd
import pytest
from mapping import copy, mapped, run

PLAN = [
    {"vda": "200k:? 64k:- 32k:0 300k:A 512k:- 7k:?", "vdb": "64k:B 64k:0"},
    {"vda": "10k:. 20k:C 200k:. 100k:0 40k:? 3k:-", "vdb": "1k:. 512:?"},
    {"vda": "1M:. 64k:D 1M:.", "vdb": "128k:E"},
]
EXPECTED = makers.images(PLAN)


@pytest.fixture(scope="module", params=["none", "lz4"])
def saved(request, tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("saved") / "a set")
    makers.make_set(directory, PLAN, spec=request.param)
    return directory


@pytest.fixture(scope="module")
def served(saved, tmp_path_factory):
    """(vnb-map with all disks, its socket)."""
    socket = str(tmp_path_factory.mktemp("served") / "a socket")
    with mapped("--socket", socket, saved, lines=2) as map_:
        yield map_, socket


def connect(uri):
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.connect_uri(uri)
    return handle


def test_it_says_where_the_disks_are(served):
    map_, socket = served
    escaped = socket.replace(" ", "%20")
    assert map_.lines == [f"nbd+unix:///{disk}?socket={escaped}" for disk in ("vda", "vdb")]


def test_nbdcopy_of_every_export(served, tmp_path):
    map_, _ = served
    for number, expected in enumerate(EXPECTED):
        for disk, line in zip(("vda", "vdb"), map_.lines):
            uri = line.replace(f"/{disk}?", f"/{disk}@{makers.point(number)}?")
            assert copy(uri, tmp_path / "out") == expected[disk]
            assert number < len(EXPECTED) - 1 or copy(line, tmp_path / "out") == expected[disk]


def test_qemu_img_compares_equal(served, tmp_path):
    map_, _ = served
    (tmp_path / "vda").write_bytes(EXPECTED[-1]["vda"])
    done = run("qemu-img", "compare", "-f", "raw", "-F", "raw", map_.lines[0], tmp_path / "vda")
    assert "Images are identical." in done.stdout


def test_list_of_exports(served):
    done = run("nbdinfo", "--list", "--json", served[0].lines[0])
    exports = json.loads(done.stdout)["exports"]
    assert [export["export-name"] for export in exports] == ["vda", "vdb"] + [
        f"{disk}@{makers.point(number)}" for number in (1, 0) for disk in ("vda", "vdb")
    ]


def test_what_an_export_can_do(served):
    done = run("nbdinfo", "--json", served[0].lines[0])
    (export,) = json.loads(done.stdout)["exports"]
    assert export["export-size"] == len(EXPECTED[-1]["vda"])
    assert export["is_read_only"] and export["can_multi_conn"] and not export["is_rotational"]
    assert export["block_size_minimum"] == 1
    assert export["description"] == f"vda of vm1 at {makers.point(2)}"
    assert export["contexts"] == ["base:allocation"]


def test_extents_tell_holes_and_zeroes(served):
    uri = served[0].lines[0].replace("/vda?", f"/vda@{makers.point(0)}?")
    extents = json.loads(run("nbdinfo", "--map", "--json", uri).stdout)
    assert [(extent["offset"], extent["length"], extent["type"]) for extent in extents] == [
        (0, 200 << 10, 0), (200 << 10, 64 << 10, 3), (264 << 10, 32 << 10, 2),
        (296 << 10, 300 << 10, 0), (596 << 10, 512 << 10, 3), (1108 << 10, 7 << 10, 0),
    ]  # fmt: skip


def test_qemus_map(served):
    uri = served[0].lines[0].replace("/vda?", f"/vda@{makers.point(0)}?")
    extents = json.loads(run("qemu-img", "map", "--output=json", uri).stdout)
    assert [(extent["start"], extent["length"], extent["data"], extent["zero"]) for extent in extents] == [
        (0, 200 << 10, True, False), (200 << 10, 64 << 10, False, True), (264 << 10, 32 << 10, True, True),
        (296 << 10, 300 << 10, True, False), (596 << 10, 512 << 10, False, True), (1108 << 10, 7 << 10, True, False),
    ]  # fmt: skip


def test_qemus_map_of_many_extents(tmp_path):
    """It asks for one at a time: a thousand made for each one that it takes were half a minute here, not a second."""
    count = 1 << 15
    makers.make_set(tmp_path / "set", [{"vda": [(4096, "0-"[number % 2]) for number in range(count)]}])
    with mapped("--socket", tmp_path / "s", tmp_path / "set") as map_:
        extents = json.loads(run("qemu-img", "map", "--output=json", map_.lines[0]).stdout)
    assert [(extent["start"], extent["data"]) for extent in extents] == [
        (4096 * number, number % 2 == 0) for number in range(count)
    ]


def test_unaligned_requests(served):
    handle = connect(served[0].lines[0])
    plain = EXPECTED[-1]["vda"]
    for offset, length in [(0, 1), (9999, 3), (65535, 2), (200_001, 300_003), (len(plain) - 1, 1), (0, len(plain))]:
        assert handle.pread(length, offset) == plain[offset : offset + length]
    handle.shutdown()


def test_readers_side_by_side(served):
    """Several connections, each with several requests in flight."""
    plain = EXPECTED[-1]["vda"]
    wrong = []

    def read(seed):
        handle = connect(served[0].lines[0])
        requests = []
        for number in range(50):
            offset = (seed * 7919 + number * 104_729) % (len(plain) - 70_000)
            buffer = nbd.Buffer(1 + number * 1000)
            requests.append((handle.aio_pread(buffer, offset), buffer, offset))
        for cookie, buffer, offset in requests:
            while not handle.aio_command_completed(cookie):
                handle.poll(-1)
            if buffer.to_bytearray() != plain[offset : offset + buffer.size()]:
                wrong.append(offset)
        handle.shutdown()

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_requests_leave_no_memory_behind(served):
    """nbdkit's Python plugin has forgotten to give back objects before; a mapped disk may be read for months."""
    map_, _ = served
    pid = nbdkit_of(map_)
    handle = connect(map_.lines[0])

    def ask(times):
        for number in range(times):
            handle.block_status(len(EXPECTED[-1]["vda"]), 0, lambda *_: 0)
            handle.pread(512, number)

    ask(200)
    before = resident(pid)
    ask(3000)
    handle.shutdown()
    assert resident(pid) - before < 1 << 20


def test_connections_leave_no_memory_behind(served):
    """Each has threads of its own in nbdkit, and Python keeps something for each of them while it lives."""
    map_, _ = served
    pid = nbdkit_of(map_)

    def come_and_go(times):
        for _ in range(times):
            handle = connect(map_.lines[0])
            buffers = [nbd.Buffer(512) for _ in range(32)]
            cookies = [handle.aio_pread(buffer, 512 * number) for number, buffer in enumerate(buffers)]
            for cookie in cookies:
                while not handle.aio_command_completed(cookie):
                    handle.poll(-1)
            handle.shutdown()

    come_and_go(50)
    before = resident(pid)
    come_and_go(300)
    assert resident(pid) - before < 2 << 20  # a thread's state has 16 KiB of stack, and there were 2400


def test_clients_that_go_away_in_the_middle(served):
    """With answers on their way to it: others are served on. nbdkit has ended by an assertion here."""
    map_, _ = served
    for number in range(200):
        handle = connect(map_.lines[0])
        for length in range(20):
            handle.aio_pread(nbd.Buffer(1000 + 10_000 * length), 1000 * number)
        del handle
    assert connect(map_.lines[0]).pread(4096, 0) == EXPECTED[-1]["vda"][:4096]


def nbdkit_of(map_):
    """The process id of the nbdkit that a vnb-map has started."""
    (pid,) = (
        int(pid)
        for pid in Path(f"/proc/{map_.process.pid}/task/{map_.process.pid}/children").read_text().split()
        if Path(f"/proc/{pid}/comm").read_text() == "nbdkit\n"
    )
    return pid


def resident(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError


def test_a_disk_has_to_be_named_where_there_are_several(served):
    map_, socket = served
    done = run("nbdinfo", map_.lines[0].replace("/vda?", "/?"))
    assert done.returncode != 0
    assert map_.stderr_line().endswith("one of several disks has to be named: vda, vdb\n")


@pytest.mark.parametrize("name", ["vdc", "vda@nowhere", "vdc@" + makers.point(0), "@", "vda@"])
def test_an_export_that_is_not_there(saved, tmp_path, name):
    with mapped("--socket", tmp_path / "s", saved, lines=2) as map_:
        done = run("nbdinfo", f"nbd+unix:///{name}?socket={tmp_path / 's'}")
        assert done.returncode != 0
        line = map_.stderr_line()
        assert line.startswith(f"vnb-map: {saved}: no ")
        assert run("nbdinfo", map_.lines[0]).returncode == 0
        assert map_.end()[1] == "vnb-map: ended by SIGTERM\n"


def test_a_disk_that_is_chosen_is_the_default(saved, tmp_path):
    with mapped("--socket", tmp_path / "s", "--disk", "vdb", "--until", makers.point(1), saved):
        assert copy(f"nbd+unix:///?socket={tmp_path / 's'}", tmp_path / "out") == EXPECTED[1]["vdb"]


@pytest.mark.parametrize("how", [[], ["--writable"], ["--overlay"]])
def test_an_export_of_a_name_that_was_asked_for(saved, tmp_path, how):
    """A client may know one name alone; with an overlay it is another server that has the export."""
    how = [*how, tmp_path / "overlay.qcow2"] if how == ["--overlay"] else how
    options = ["--disk", "vda", "--export-name", "sda of it", *how, "--socket", tmp_path / "s", saved]
    with mapped(*options) as served:
        assert served.lines == [f"nbd+unix:///sda%20of%20it?socket={tmp_path}/s"]
        size = subprocess.run(["nbdinfo", "--size", served.lines[0]], capture_output=True, text=True, check=True).stdout
        assert int(size) > 0
    done = subprocess.run(["vnb-map", "--export-name", "x", "--socket", tmp_path / "s", saved], capture_output=True)
    assert (done.returncode, b"vnb-map: --export-name: is for one disk: choose one of " in done.stderr) == (1, True)


def test_run_has_the_uri_and_our_status(saved, tmp_path):
    out = tmp_path / "out"
    done = run("vnb-map", "--disk", "vda", "--run", f'nbdcopy "$uri" {out} && exit 3', saved)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")
    assert out.read_bytes() == EXPECTED[-1]["vda"]


def test_run_has_the_socket(saved):
    done = run("vnb-map", "--run", 'nbdinfo --size "nbd+unix:///vdb?socket=$socket"', saved)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{128 << 10}\n", "")


@pytest.mark.parametrize("flip", [60, 20])
def test_a_damaged_frame_is_eio_and_named_once(tmp_path, flip):
    (path,) = makers.make_set(tmp_path / "set", [{"vda": "64k:A 64k:B 64k:C"}])
    content = bytearray(Path(path).read_bytes())
    second = content.index(b"\x98\xa4data", content.index(b"\x98\xa4data") + 1)
    content[second + flip] ^= 1
    Path(path).write_bytes(content)
    with mapped("--socket", tmp_path / "s", tmp_path / "set") as map_:
        handle = connect(map_.lines[0])
        for offset, length in [(65536, 65536), (65536, 1), (70_000, 10), (0, 196_608)]:
            with pytest.raises(nbd.Error) as error:
                handle.pread(length, offset)
            assert error.value.errno == "EIO"
        assert handle.pread(65536, 0) == b"A" * 65536
        assert handle.pread(65536, 131_072) == b"C" * 65536
        handle.shutdown()
        status, stderr = map_.end()
    reason = "65536 bytes differ from what was read from the source" if flip == 60 else 'bad sum in frame "data"'
    assert stderr == f"vnb-map: {path}: vda: offset 65536: {reason}\nvnb-map: ended by SIGTERM\n"


def test_a_set_that_vanishes_while_it_is_mapped(tmp_path):
    paths = makers.make_set(tmp_path / "set", PLAN)
    with mapped("--socket", tmp_path / "s", tmp_path / "set", lines=2) as map_:
        for path in paths:
            Path(path).unlink()
        assert copy(map_.lines[0], tmp_path / "out") == EXPECTED[-1]["vda"]


def test_an_empty_disk(tmp_path):
    makers.make_set(tmp_path / "set", [{"vda": ""}])
    with mapped("--socket", tmp_path / "s", tmp_path / "set") as map_:
        assert copy(map_.lines[0], tmp_path / "out") == b""


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["nowhere"], "vnb-map: nowhere: No such file or directory"),
        (["{empty}"], "vnb-map: {empty}: no segment here"),
        (["{text}"], "vnb-map: {text}: stream offset 5: cut short or not a stream (no tail at the end)"),
        (["{increment}"], f"vnb-map: {{increment}}: gap: {makers.point(1)} needs {makers.point(0)}, which is not here"),
        (["--until", "nowhere", "{set}"], "vnb-map: {set}: no restore point nowhere (vnb-dump --list has them), "
         "nor is that a time such as 2026-01-31T12:00"),
        (["--disk", "sda", "{set}"],
         f"vnb-map: --disk: no disk sda at restore point {makers.point(2)}, there is vda, vdb"),
        (["--writable", "{set}"], "vnb-map: --writable: is for one disk: choose one of vda, vdb with --disk"),
    ],
)
def test_what_cannot_be_served(saved, tmp_path, arguments, line):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("text\n")
    names = {
        "set": saved, "empty": tmp_path / "empty", "text": tmp_path / "text",
        "increment": next(Path(saved).glob("*.0001.inc.vnb")),
    }  # fmt: skip
    done = run("vnb-map", "--run", "echo no", *(word.format(**names) for word in arguments))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line.format(**names) + "\n")


def test_the_same_bytes_as_through_the_filters(saved, tmp_path):
    """What is mapped is what vnb-cat and vnb-apply restore."""
    script = f"vnb-cat {saved!r} | vnb-apply --format raw {tmp_path}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {script}"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no restore here: {done.stderr}")
    assert (tmp_path / "vda.raw").read_bytes() == EXPECTED[-1]["vda"]
