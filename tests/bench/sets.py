# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Of sets: a chain that is merged, mapped and compressed, beside nbdkit's file plugin on one flat image and lz4 alone.

The set is a full of random data, in frames of 512 KiB, and increments that each change 2 % of it in pieces of 64 KiB.
Random reads are of 4 KiB, from one connection.
"""

import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import makers
from mapping import mapped
from peaks import LIMIT, peaks
from turns import ROOT, Group, python, script, timed
from xxhash import xxh3_64_intdigest

from vnb.format import writing
from vnb.format.frame import MiB
from vnb.format.index import Builder
from vnb.store import backupset

INDEX = "open an index of ten million extents"
MANY = 10_000_000
MOST_SECONDS, MOST_MIB = 10, 400  # that this may take
MEMORY = "peak memory in MiB, 1 TiB in a million extents"
# The calls alone, on blocks as large as the frames: the file is read outside of the time.
LZ4 = """
import lz4.block, sys, time
size, seconds = int(sys.argv[2]), 0
with open(sys.argv[1], "rb") as file:
    while block := file.read(size):
        start = time.monotonic()
        lz4.block.compress(block, store_size=False)
        seconds += time.monotonic() - start
print(seconds)
"""
FRAME = 512 << 10
PIECE = 64 << 10
READS = 20_000


def make(directory, size, increments):
    """Make a set and the flat image (path) that it must read as. Half of its bytes could be packed."""
    os.makedirs(directory, mode=0o700)
    random_ = random.Random(1)

    def content(length):
        return b"".join(random_.randbytes(2048).ljust(4096, b"\0") for _ in range(length // 4096))

    flat = f"{directory}.flat"
    with open(flat, "wb") as image:
        image.truncate(size)
        for number in range(increments + 1):
            head = makers.head(number)
            disk = {"name": "vda", "size": size, "level": "inc" if number else "full", "image": {}}
            with open(os.path.join(directory, backupset.file_name(head)), "wb") as file:
                out = writing.Writer(file.fileno(), "set").segment(head, [disk])
                index = Builder(out)
                step = PIECE if number else FRAME
                places = range(0, size, step)
                for offset in places if number == 0 else sorted(random_.sample(places, len(places) // 50)):
                    plain = content(step)
                    index.data(0, offset, step, *out.data(0, offset, step, "none", xxh3_64_intdigest(plain), plain))
                    os.pwrite(image.fileno(), plain, offset)
                index.finish()
                out.end()
    return flat


CLIENT = """
import nbd, random, sys
uri, depth, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
handle = nbd.NBD()
handle.connect_uri(uri)
last = handle.get_size() // 4096 - 1
choose = random.Random(2)
buffers = [nbd.Buffer(4096) for _ in range(depth)]
flying = []
for number in range(count):
    if len(flying) == depth:
        cookie = flying.pop(0)
        while not handle.aio_command_completed(cookie):
            handle.poll(-1)
    flying.append(handle.aio_pread(buffers[number % depth], 4096 * choose.randint(0, last)))
while flying:
    cookie = flying.pop(0)
    while not handle.aio_command_completed(cookie):
        handle.poll(-1)
"""


def sequential(uri):
    return ["nbdcopy", uri, "null:"]


def at_random(depth):
    return lambda uri: ["/usr/bin/python3", "-c", CLIENT, uri, str(depth), str(READS)]


def time_file(flat, command):
    """Seconds that a command takes on nbdkit's file plugin."""
    with tempfile.TemporaryDirectory() as directory:
        socket = os.path.join(directory, "s")
        pid_file = os.path.join(directory, "pid")
        # It goes to the background when it is ready.
        subprocess.run(["nbdkit", "--readonly", f"--unix={socket}", f"--pidfile={pid_file}", "file", flat], check=True)
        try:
            return run(command(f"nbd+unix:///?socket={socket}"))
        finally:
            os.kill(int(Path(pid_file).read_text()), 15)


def time_map(set_, command):
    with tempfile.TemporaryDirectory() as directory, mapped("--socket", os.path.join(directory, "s"), set_) as map_:
        return run(command(map_.lines[0]))


def run(command):
    return timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))


def make_index(path, rows):
    """Make a segment whose index has this many rows, of holes and zeroes."""
    with open(path, "wb") as file:
        head = makers.head(0)
        out = writing.Writer(file.fileno(), path).segment(
            head, [{"name": "vda", "size": 65536 * rows, "level": "full", "image": {}}]
        )
        index = Builder(out)
        for at in range(0, rows, 4096):
            runs = []
            for number in range(at, min(at + 4096, rows)):
                runs += (65536 * number, 65536, 2 + number % 2)
            out.extents(0, runs)
            index.extents(0, runs)
        index.finish()
        out.end()


OPEN = """
import sys, time
start = time.monotonic()
from vnb.store.saved_disk import Images
import random
image = Images([sys.argv[1]]).open("vda")
opened = time.monotonic() - start
view = memoryview(bytearray(4096))
start = time.monotonic()
for _ in range(2000):
    image.read_into(view, random.randrange(image.size - 4096))
each = (time.monotonic() - start) / 2000
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))  # not the parent's too
print(opened, each, int(peak) / 1024)
"""


def open_index(path):
    """Open it in a process of its own: (seconds until it is open, seconds for a random look-up, MiB at most)."""
    command = [sys.executable, "-c", OPEN, path]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    return tuple(map(float, done.stdout.split()))


def groups(lab, data):
    """Yield the Groups, on a set of data (int) bytes and ten increments, half of whose bytes shrink."""
    chain = lab.path("chain")
    flat = make(chain, data, 10)
    full = f"{chain}/*.full.vnb"
    yield Group("compress with lz4, one thread", data, {
        "lz4.block.compress": lambda at: python(lab, LZ4, full, 512 << 10),
        "vnb-pack -z --threads 1": lambda at: script(lab, f"vnb-pack -z --threads 1 < {full} > /dev/null"),
        "vnb-pack -z": lambda at: script(lab, f"vnb-pack -z < {full} > /dev/null"),
    })
    # Old segments are on disk, and so is what they are read for: here the set is dropped from the page cache.
    yield Group("merge a full and ten increments", data, {
        "vnb-cat": lambda at: cold(lab, chain, f"vnb-cat {chain} | cat > /dev/null"),
        "vnb-cat --merge": lambda at: cold(lab, chain, f"vnb-cat --merge {chain} | cat > /dev/null"),
    })
    clients = {
        "read of the mapped chain, in order": (data, sequential),
        "4 KiB reads of it, one at a time": (0, at_random(1)),
        "4 KiB reads of it, 16 at a time": (0, at_random(16)),
    }
    for title, (size, client) in clients.items():
        yield Group(title, size, {
            "nbdkit file": lambda at, client=client: time_file(flat, client),
            "vnb-map": lambda at, client=client: time_map(chain, client),
        })


def cold(lab, directory, text):
    """Run a script, after the files of a directory were dropped from the page cache."""
    for path in Path(directory).iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return script(lab, text)


def large_index(lab):
    """Yield a row of what it takes to open an index of ten million extents."""
    path = lab.path("large.vnb")
    make_index(path, MANY)
    seconds, _, peak = open_index(path)
    os.unlink(path)
    for job, found, most in (("seconds", round(seconds, 2), MOST_SECONDS), ("MiB", round(peak), MOST_MIB)):
        yield {"group": INDEX, "job": job, "found": found, "most": most}


def memory(lab):
    """Yield a row of the peak of each stage on a disk of 1 TiB with a million extents."""
    for command, peak in peaks(lab).items():
        yield {"group": MEMORY, "job": command, "found": round(peak / MiB, 1), "most": LIMIT // MiB}
