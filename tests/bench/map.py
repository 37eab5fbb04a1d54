# SPDX-License-Identifier: LGPL-2.1-or-later
"""
How fast a mapped set reads, beside nbdkit's file plugin on one flat image; and what a large index costs.

Usage: map.py [--rounds N] [--data MIB] [--increments N] [--rows N] [--only WORD]

The set is a full of random data, in frames of 512 KiB, and increments that each change 2 % of it in pieces of 64 KiB.
Once as it is, once compressed (half of it can be). Jobs take turns; a time is the median, its ratio is to the first
of the group. Random reads are of 4 KiB, from one connection, one or 16 at a time.
"""

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PATH"] = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"

import makers  # noqa: E402 -- after the path to it
from mapping import mapped  # noqa: E402
from xxhash import xxh3_64_intdigest  # noqa: E402

from vnb import backupset, codec, stream  # noqa: E402
from vnb.frame import MiB  # noqa: E402
from vnb.index import Builder  # noqa: E402

FRAME = 512 << 10
PIECE = 64 << 10
READS = 20_000


def make(directory, size, increments, spec, shrinks=False):
    """Make a set and the flat image (path) that it must read as. shrinks (bool): half of its bytes could be packed."""
    os.makedirs(directory, mode=0o700)
    random_ = random.Random(1)
    pack = codec.compressor(*codec.parse(spec))

    def content(length):
        if spec == "none" and not shrinks:
            return random_.randbytes(length)
        return b"".join(random_.randbytes(2048).ljust(4096, b"\0") for _ in range(length // 4096))

    flat = f"{directory}.flat"
    with open(flat, "wb") as image:
        image.truncate(size)
        for number in range(increments + 1):
            head = makers.head(number)
            disk = {"name": "vda", "size": size, "level": "inc" if number else "full", "image": {}}
            with open(os.path.join(directory, backupset.file_name(head)), "wb") as file:
                out = stream.Writer(file.fileno(), "set").segment(head, [disk])
                index = Builder(out)
                step = PIECE if number else FRAME
                places = range(0, size, step)
                for offset in places if number == 0 else sorted(random_.sample(places, len(places) // 50)):
                    plain = content(step)
                    name, payload = pack(plain)
                    index.data(0, offset, step, *out.data(0, offset, step, name, xxh3_64_intdigest(plain), payload))
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
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def group(title, jobs, rounds, unit):
    seconds = {name: [] for name in jobs}
    for number in range(rounds):
        for name in list(jobs) if number % 2 == 0 else reversed(list(jobs)):
            seconds[name].append(jobs[name]())
    first = None
    for name, times in seconds.items():
        median = statistics.median(times)
        first = first or median
        print(f"{title:24} {name:28} {median:7.2f} s  x{median / first:5.2f}  {unit(median)}", flush=True)


def make_index(path, rows):
    """Make a segment whose index has this many rows, of holes and zeroes."""
    with open(path, "wb") as file:
        head = makers.head(0)
        out = stream.Writer(file.fileno(), path).segment(
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
from vnb.image import Images
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


def large_index(rows):
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:  # noqa: S108
        path = os.path.join(directory, "large.vnb")
        make_index(path, rows)
        opened, each, peak = open_index(path)
    print(f"index of {rows} rows: opened in {opened:.2f} s, {each * 1e6:.0f} us a look-up, {peak:.0f} MiB at most")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=int, default=2048)
    parser.add_argument("--increments", type=int, default=10)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    if args.only in "index":
        large_index(args.rows)
    directory = tempfile.mkdtemp(prefix="vnb-bench.", dir="/var/tmp")  # noqa: S108
    try:
        size = args.data * MiB
        plain, packed = os.path.join(directory, "plain"), os.path.join(directory, "packed")
        flat = make(plain, size, args.increments, "none")
        make(packed, size, args.increments, "lz4")
        for title, command, unit in (
            ("sequential", sequential, lambda seconds: f"{size / seconds / 1e6:6.0f} MB/s"),
            ("random, one at a time", at_random(1), lambda seconds: f"{seconds / READS * 1e6:6.0f} us each"),
            ("random, 16 at a time", at_random(16), lambda seconds: f"{seconds / READS * 1e6:6.0f} us each"),
        ):
            jobs = {
                "nbdkit file": lambda command=command: time_file(flat, command),
                "vnb-map": lambda command=command: time_map(plain, command),
                "vnb-map, packed set": lambda command=command: time_map(packed, command),
            }
            if args.only in title:
                group(title, jobs, args.rounds, unit)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
