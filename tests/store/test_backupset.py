# SPDX-License-Identifier: LGPL-2.1-or-later
"""A set takes what belongs to it, durably or not at all, and finds it again."""

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys

import makers
import pytest
import samples

from vnb.base.errors import Error, StreamError
from vnb.format import frame, stream
from vnb.store import backupset, chain, storing
from vnb.store.catalog import Catalog

PLAN = [{"vda": "64k:A 64k:- 32k:0"}, {"vda": "96k:. 64k:B"}, {"vda": "8k:C"}]
DISKS = [samples.disk(size=100)]
FRAME = ["extent", 0, [0, 100, 3]]


def store(directory, head, disks=DISKS, frames=(FRAME,)):
    """Store a segment; returns its path."""
    with storing.Store(str(directory), head, disks) as out:
        os.write(out.fd, samples.segment(head, disks, *frames))
        return out.commit()


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, content):
    with open(path, "wb") as file:
        file.write(content)


def inc(number):
    return samples.head(f"p{number}", f"p{number - 1}", created=f"2026-01-31T12:00:0{number}.000000Z")


def store_inc(directory, number):
    return store(directory, inc(number), [samples.disk(size=100, level="inc")])


def refused(directory, reason, head, disks=DISKS):
    before = sorted(os.listdir(directory))
    with pytest.raises(Error) as caught, storing.Store(str(directory), head, disks):
        pytest.fail("not refused")
    assert reason in str(caught.value)
    assert sorted(os.listdir(directory)) == before


def test_a_chain_is_stored_and_found(tmp_path):
    directory = tmp_path / "a" / "b" / "set"
    paths = [store(directory, samples.head("p0")), store_inc(directory, 1), store_inc(directory, 2)]
    assert [os.path.basename(path) for path in paths] == ["p0.full.vnb", "p1.inc.vnb", "p2.inc.vnb"]
    assert sorted(os.listdir(directory)) == ["p0.full.vnb", "p1.inc.vnb", "p2.inc.vnb"]
    for path in paths:
        assert os.stat(path).st_mode & 0o777 == 0o600
    for made in (directory, directory.parent, directory.parent.parent):
        assert os.stat(made).st_mode & 0o777 == 0o700
    found = chain.path(backupset.segments([str(directory)]), "set")
    assert [segment.name for segment in found] == paths
    for segment, path in zip(found, paths):
        (whole,) = samples.read(read(path))
        assert (segment.head, segment.disks) == chain.outline(*whole[:2])
        assert segment.length == whole[-1]


def test_nothing_stays_without_commit(tmp_path):
    with storing.Store(str(tmp_path), samples.head(), DISKS) as out:
        os.write(out.fd, b"abc")
    with pytest.raises(RuntimeError), storing.Store(str(tmp_path), samples.head(), DISKS):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_what_a_set_does_not_take(tmp_path):
    store(tmp_path, samples.head("p0"))
    store_inc(tmp_path, 1)
    changes = [samples.disk(size=100, level="inc")]
    refused(tmp_path, "segment id-p0 is already here", samples.head("p0"))
    refused(tmp_path, "restore point p1 is already here", {**inc(1), "id": "another"}, changes)
    merged = {**samples.head("p1"), "id": "another"}
    refused(tmp_path, "restore point p1 is already here with other disks", merged, [samples.disk("other", 100)])
    refused(tmp_path, "does not hold p8, the base of p9", samples.head("p9", "p8"), changes)
    refused(tmp_path, "is a set of domain vm (u-1), not of vm (u-2)", samples.head("q", uuid="u-2"))
    refused(tmp_path, "less than the 100 before", inc(2), [samples.disk(size=99, level="inc")])
    refused(tmp_path, "nothing before it has", inc(2), [samples.disk("vdb", 100, "inc")])
    refused(tmp_path, "must not be named", samples.head(".hidden"))
    refused(tmp_path, "must not be named", samples.head("a/b"))
    refused(tmp_path, "must not be named", samples.head("x" * 250))
    store(tmp_path, samples.head("p1", id="merged"))  # a full with the same point is an alternative
    store(tmp_path, samples.head("q0"))  # a second full


def test_increment_into_an_empty_set(tmp_path):
    refused(tmp_path, "does not hold p0, the base of p1", inc(1), [samples.disk(size=100, level="inc")])


def test_increment_behind_a_gap(tmp_path):
    store(tmp_path, samples.head("p0"))
    os.unlink(tmp_path / "p0.full.vnb") if store_inc(tmp_path, 1) else None
    refused(tmp_path, "gap: p1 needs p0", inc(2), [samples.disk(size=100, level="inc")])


def test_another_writer_was_faster(tmp_path):
    with storing.Store(str(tmp_path), samples.head(), DISKS) as slow:
        os.write(slow.fd, samples.segment(samples.head(), DISKS, FRAME))
        store(tmp_path, samples.head())
        with pytest.raises(Error, match="already here"):
            slow.commit()
    assert os.listdir(tmp_path) == ["p0.full.vnb"]


def test_a_file_of_that_name_is_not_overwritten(tmp_path):
    """Somebody has renamed a segment: the name is taken by another point."""
    path = store(tmp_path, samples.head("p0"))
    os.rename(path, tmp_path / "p1.full.vnb")
    named = pytest.raises(Error, match="another file has the name of this segment")
    with named, storing.Store(str(tmp_path), samples.head("p1"), DISKS) as out:
        out.commit()
    assert [segment.head["point"] for segment in backupset.segments([str(tmp_path)])] == ["p0"]


KILLED = """
import os, signal, sys
from vnb.store.storing import Store
import samples
with Store(sys.argv[1], samples.head("k"), []) as store:
    os.write(store.fd, b"abc")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run_python(program, *arguments, **options):
    env = {**os.environ, "PYTHONPATH": f"{samples.ROOT}:{samples.ROOT}/tests"}
    return subprocess.run([sys.executable, "-c", program, *map(str, arguments)], env=env, **options)


def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path):
    assert run_python(KILLED, tmp_path).returncode == -9
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".k.full.vnb.") and left.endswith(".partial")
    assert backupset.segments([str(tmp_path)]) == []
    with storing.Store(str(tmp_path), samples.head(), DISKS) as out:
        assert len(os.listdir(tmp_path)) == 1
        storing.remove_abandoned(str(tmp_path))
        assert os.path.exists(out.partial), "that of a living writer stays"


def test_partial_files_where_locks_want_a_file_open_for_writing(tmp_path, monkeypatch):
    """So it is on NFS, says flock(2); no machine of these tests has one. Where nothing can be locked, nothing fails."""
    flock = fcntl.flock

    def strict(fd, operation):
        if not locks or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", strict)
    path = tmp_path / f".a.vnb.0123abcd{storing.PARTIAL}"
    path.write_bytes(b"x")
    for locks in (False, True):
        storing.remove_abandoned(str(tmp_path))
        assert path.exists() != locks


def test_a_fifo_under_the_name_of_a_partial_file(tmp_path):
    """Opening it would wait for whoever writes to it. A link leads nowhere."""
    os.mkfifo(tmp_path / ".p.full.vnb.1.partial")
    (tmp_path / "outside").touch()
    (tmp_path / ".p.full.vnb.2.partial").symlink_to(tmp_path / "outside")
    storing.remove_abandoned(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [".p.full.vnb.2.partial", "outside"]


def test_writer_whose_file_was_taken_as_abandoned(tmp_path, monkeypatch):
    """Between its open and its lock another writer may come: it must notice before it writes a whole backup."""
    real = fcntl.flock
    calls = []

    def flock(fd, operation):
        if not calls:
            calls.append(fd)
            storing.remove_abandoned(str(tmp_path))
        return real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert store(tmp_path, samples.head())
    assert calls and os.listdir(tmp_path) == ["p0.full.vnb"]


def test_foreign_files_are_left_alone(tmp_path):
    names = ["notes.txt", ".x.partial", ".hidden.vnb", "a.vnb.bak", "p.vnb.partial", ".vnb.partial.txt"]
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / "dir").mkdir()
    store(tmp_path, samples.head())
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "dir", "p0.full.vnb"])


def test_damaged_segment_is_an_error(tmp_path):
    path = store(tmp_path, samples.head())
    whole = read(path)
    for content, reason in [
        (b"", "empty file"), (b"text\n", "cut short or not a stream"), (whole[:-1], "cut short or not a stream"),
        (whole[1:], "the tail points outside"), (bytes(5) + whole[5:], "not a stream"), (whole + b"\0", "cut short"),
        (frame.encode_tail(1 << 60, 0), "the tail points outside"), (frame.encode_tail(33, 0), "points outside"),
        (frame.encode_tail(10, 5), "points outside"), (frame.encode_tail(0, 0), "points outside"),
    ]:
        write(path, content)
        with pytest.raises(StreamError) as caught:
            backupset.segments([str(tmp_path)])
        assert reason in str(caught.value) and str(caught.value).startswith(path)
        # It costs nothing but what needs it.
        storing.Store(str(tmp_path), samples.head("q"), DISKS).__exit__()
        with pytest.raises(Error, match=r"does not hold p0, the base of q, which is"):
            storing.Store(str(tmp_path), samples.head("q", "p0"), [samples.disk(size=100, level="inc")])
        with pytest.raises(Error, match=r"another file has the name of this segment: .*--quarantine"):
            storing.Store(str(tmp_path), samples.head(), DISKS)


def test_operands_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "x.vnb")  # nobody will ever write to it
    for operand, reason in [
        (tmp_path / "none", "No such file"), ("/dev/null", "empty file"),
        (tmp_path, "x.vnb: is not a regular file"), (tmp_path / "x.vnb", "Illegal seek"),
    ]:
        with pytest.raises(Error, match=reason):
            backupset.segments([str(operand)])


def test_concatenated_segments_are_found(tmp_path):
    paths = makers.make_set(tmp_path / "set", PLAN)
    joined = tmp_path / "all.vnb"
    joined.write_bytes(b"".join(read(path) for path in paths))
    found = backupset.segments([str(joined)])
    assert [segment.head["point"] for segment in found] == [makers.point(n) for n in range(3)]
    assert found[1].start == found[0].length
    for segment in found:
        assert list(segment.open()) is not None
        segment.close()


def test_replaced_and_cut_while_in_use(tmp_path):
    path = store(tmp_path, samples.head())
    (segment,) = backupset.segments([path])
    write(path, samples.segment(samples.head("q"), DISKS, FRAME))
    with pytest.raises(Error, match="changed since"):
        segment.open()
    os.truncate(path, 0)
    with pytest.raises(Error, match="empty|cut short"):
        segment.open()


def test_cut_before_a_later_segment(tmp_path):
    paths = makers.make_set(tmp_path / "set", PLAN)
    joined = tmp_path / "all.vnb"
    joined.write_bytes(b"".join(read(path) for path in paths))
    last = backupset.segments([str(joined)])[-1]
    os.truncate(joined, last.start)
    with pytest.raises(StreamError, match="cut short"):
        last.open()


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


FULL = """
import os, sys
from vnb.format import values, writing
from vnb.store.storing import Store
from vnb.base.errors import Error
import samples
try:
    with Store(sys.argv[1], samples.head(), []) as store:
        writer = writing.Writer(store.fd, store.path)
        out = writer.segment(samples.head(), [])
        for _ in range(99):
            out.frame(values.Other(["+x", 5], bytes(100000)))
        out.end()
        store.commit()
except Error as error:
    sys.exit(str(error))
"""


def test_file_that_may_not_grow(tmp_path):
    """As on a disk that is full: one line, nothing left."""
    run = run_python(FULL, tmp_path, preexec_fn=limit_file_size, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, f"{tmp_path}/p0.full.vnb: File too large\n")
    assert os.listdir(tmp_path) == []


def in_mount(options, where, *command, **more):
    """Run a command with a small file system of its own at a place, or skip."""
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]  # in a chroot root alone may
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("unshare(1) may not make a mount namespace here")
    script = f"mount -t tmpfs -o {options} tmpfs '{where}' && exec \"$@\""
    env = {**os.environ, "PYTHONPATH": f"{samples.ROOT}:{samples.ROOT}/tests"}
    return subprocess.run([*unshare, "sh", "-c", script, "sh", *command],
                          env=env, capture_output=True, text=True, **more)


def test_disk_that_is_full(tmp_path):
    run = in_mount("size=1m", tmp_path, sys.executable, "-c", FULL, str(tmp_path))
    assert run.returncode == 1
    assert run.stderr == f"{tmp_path}/p0.full.vnb: No space left on device\n"


def test_disk_without_room_leaves_nothing(tmp_path):
    run = in_mount("size=1m", tmp_path, "sh", "-c", '"$1" -c "$2" "$3" 2>/dev/null; ls -A "$3"', "sh",
                   sys.executable, FULL, str(tmp_path))
    assert run.stdout == ""


def test_read_only_set(tmp_path):
    run = in_mount("ro", tmp_path, sys.executable, "-c", FULL, str(tmp_path))
    assert run.returncode == 1
    assert run.stderr.endswith(".partial: Read-only file system\n") and run.stderr.count("\n") == 1


def test_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "set"):
        with pytest.raises(Error, match="Not a directory"):
            storing.Store(str(path), samples.head(), [])
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    with pytest.raises(Error):
        storing.Store(str(tmp_path / "dangling"), samples.head(), [])


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_order_of_syncs(tmp_path):
    """What a power failure may take: nothing, once commit() has returned."""
    program = """
import os, sys
from vnb.store.storing import Store
import samples
head = samples.head()
with Store(sys.argv[1], head, []) as store:
    os.write(store.fd, samples.segment(head, []))
    store.commit()
"""
    directory = tmp_path / "new" / "set"
    log = tmp_path / "log"
    env = {**os.environ, "PYTHONPATH": f"{samples.ROOT}:{samples.ROOT}/tests"}
    command = ["strace", "-y", "-o", log, "-e", "trace=mkdir,mkdirat,fsync,fdatasync,rename,renameat,renameat2,write",
               sys.executable, "-c", program, directory]
    if subprocess.run(["strace", "true"], capture_output=True).returncode:
        pytest.skip("strace may not trace here")
    subprocess.run(command, env=env, check=True)
    seen = []
    for line in log.read_text().splitlines():
        call = line.split("(")[0]
        if str(tmp_path) in line and call in ("mkdir", "fsync", "rename", "write") and "__pycache__" not in line:
            seen.append((call, "partial" if ".partial" in line else line.split("<")[1].split(">")[0]
                         if "<" in line else line.split('"')[1]))
    assert seen == [
        ("mkdir", f"{tmp_path}/new"), ("fsync", f"{tmp_path}"),
        ("mkdir", f"{tmp_path}/new/set"), ("fsync", f"{tmp_path}/new"),
        ("write", "partial"), ("fsync", "partial"), ("rename", "partial"), ("fsync", f"{directory}"),
    ]


def rows_of(segment):
    return [list(rows.lookup(0, frame.MAX_OFFSET)) for rows in segment.rows()]


def test_scan_finds_what_the_index_says(tmp_path):
    for number, spec in enumerate(("none", "lz4")):
        with_index = makers.make_set(tmp_path / f"a{number}", PLAN, spec=spec)
        without = makers.make_set(tmp_path / f"b{number}", PLAN, spec=spec, index=False)
        for one, other in zip(with_index, without):
            (one,), (other,) = backupset.segments([one]), backupset.segments([other])
            assert rows_of(one) == rows_of(other)


def test_scan_of_a_damaged_segment(tmp_path):
    """Each cut and each flip in it is an error, or leaves the rows as they are (a payload is not read)."""
    (path,) = makers.make_set(tmp_path, [{"vda": "80:A 20:- 30:?"}], index=False, spec="lz4")
    whole = read(path)
    (segment,) = backupset.segments([path])
    sound = rows_of(segment)
    with open(path, "r+b", buffering=0) as file:
        for bit in range(8 * (len(whole) - frame.TAIL.size)):
            at = bit // 8
            os.pwrite(file.fileno(), bytes([whole[at] ^ 1 << bit % 8]), at)
            try:
                (segment,) = backupset.segments([path])
                assert rows_of(segment) == sound
            except Error as error:
                assert "\n" not in str(error)
            finally:
                segment.close()
            os.pwrite(file.fileno(), whole[at:at + 1], at)


def test_open_gives_the_segment_as_a_reader_does(tmp_path):
    for path in makers.make_set(tmp_path, PLAN, spec="lz4"):
        (segment,) = backupset.segments([path])
        opened = segment.open()
        assert [frame_.__class__ for frame_ in opened]
        assert opened.end["frames"] and opened.length == segment.length
        assert isinstance(opened, stream.Segment)


def test_a_directory_of_virtnbdbackup_is_named(tmp_path):
    """To every command that reads a set, and to one that would begin a set in it."""
    for name in ("vda.full.data", "sda.inc.virtnbdbackup.1.data", "x.copy.data", "y.diff.1769900000.data"):
        directory = tmp_path / name
        directory.mkdir()
        assert backupset.paths(directory) == []
        (directory / "vda.data").write_bytes(b"")  # of a restored image
        assert backupset.paths(directory) == []
        (directory / name).write_bytes(b"")
        with pytest.raises(Error, match="is no set: virtnbdbackup wrote it. vnb-import reads it"):
            backupset.paths(directory)
        (directory / "segment.vnb").write_bytes(b"")
        assert len(backupset.paths(directory)) == 1


@pytest.mark.parametrize("place, reason", [
    ("/proc/vnb/set", "no directory can be made there"), ("{file}/set", "Not a directory"),
    ("{tmp}/" + "x" * 300, "File name too long"),
])
def test_a_set_that_can_never_be_is_refused_before_a_job_begins(tmp_path, place, reason):
    (tmp_path / "file").touch()
    place = place.format(file=tmp_path / "file", tmp=tmp_path)
    with pytest.raises(Error, match=reason):
        Catalog(place).refuse_impossible()


def test_a_set_that_can_be_is_not_made_yet(tmp_path):
    """The directories above it neither; one that is there stays."""
    Catalog(str(tmp_path / "new" / "set")).refuse_impossible()
    Catalog(str(tmp_path)).refuse_impossible()
    assert list(tmp_path.iterdir()) == []
