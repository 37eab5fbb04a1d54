# SPDX-License-Identifier: LGPL-2.1-or-later
"""
How fast, and in how much memory: the pipelines beside the tools that people know, in one run.

Usage: bench.py [--json] [--rounds N] [--data MIB] [--only WORD]

On a running machine with 2 GiB of random data in a disk of 4 GiB. The jobs of a group take turns, since the page
cache may be three times as fast as it was a minute ago: the ratios, to the first job of the group, are worth more
than the times. A time is the median of the rounds; spread is the slowest by the fastest. What ends in files is
synced within its time.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "live"))

from lab import Disk, Lab, MiB, run, wait_for  # noqa: E402 -- after the path to it
from map import at_random, make, make_index, open_index, sequential, time_file, time_map  # noqa: E402
from peaks import LIMIT, peaks  # noqa: E402

INDEX = "open an index of ten million extents"
MANY = 10_000_000
MOST_SECONDS, MOST_MIB = 10, 400  # that this may take
MEMORY = "peak memory, 1 TiB in a million extents"
ADLER = """
import sys, time, zlib
start, sum_, left = time.monotonic(), 1, int(sys.argv[2])
with open(sys.argv[1], "rb") as file:
    while left and (block := file.read(1 << 20)):
        sum_ = zlib.adler32(block, sum_)
        left -= len(block)
print(time.monotonic() - start)
"""
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


class Group:
    """Jobs that do the same thing, the first of them the yardstick: {name: function that takes a fresh directory}."""

    def __init__(self, title, size, jobs):
        self.title = title
        self.size = size
        self.jobs = jobs


def timed(function):
    start = time.monotonic()
    function()
    return time.monotonic() - start


def measure(lab, group, rounds):
    """Yield a row, a dict, for each job of a group."""
    seconds = {name: [] for name in group.jobs}
    for number in range(rounds):
        names = list(group.jobs)
        for name in names if number % 2 == 0 else reversed(names):
            directory = lab.new_directory("job")
            try:
                seconds[name].append(group.jobs[name](directory))
            finally:
                shutil.rmtree(directory)
    yardstick = None
    for name, times in seconds.items():
        median = statistics.median(times)
        yardstick = yardstick or median
        yield {
            "group": group.title, "job": name, "seconds": round(median, 3), "ratio": round(median / yardstick, 2),
            "spread": round(max(times) / min(times), 2), "mib_per_second": round(group.size / MiB / median),
            "rounds": [round(value, 3) for value in times],
        }


class Bench:
    """The jobs. data (int): bytes of random data in the machine's disk."""

    def __init__(self, lab, data):
        self.lab = lab
        self.data = data
        self.size = 2 * data
        self.vm = lab.domain(Disk("vda", self.size))
        self.vm.write_random("vda", 0, data)
        self.raw = self.vm.reference()["vda"]
        self.set = lab.path("set")
        self.packed = lab.path("packed")
        for directory, pack in ((self.set, "vnb-pack"), (self.packed, "vnb-pack -z")):
            self.backup(f"{pack} -o {directory}", "copy")

    def backup(self, last, level="full", options=""):
        """Back up by a pipeline that ends in last, and return the seconds that it took."""
        start = f"vnb-checkpoint run {self.vm.name} --level {level} {options}"
        return timed(lambda: self.lab.sh(f"{start} -- 'vnb-extents | vnb-read | {last}'"))

    def python(self, program, path, *arguments):
        """Run a program with the distribution's Python, and return the seconds that it says it took."""
        words = " ".join(map(str, arguments))
        return float(self.lab.sh(f"/usr/bin/python3 -c '{program}' {path} {words}").stdout)

    def cold(self, directory, script):
        """Run it, after the files of a directory were dropped from the page cache."""
        for path in Path(directory).iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return self.script(script)

    def script(self, script):
        """Run it, and return the seconds that it took."""
        return timed(lambda: self.lab.sh(script))

    def nbdcopy(self, target):
        """What nbdcopy takes to copy the same export; the job around it is not in its time."""
        with self.job() as uri:
            return self.script(f"nbdcopy --flush '{uri}' {target}")

    @contextlib.contextmanager
    def job(self):
        """A backup job that vnb-checkpoint did not begin: the URI of its export."""
        directory = self.vm.private_directory()
        scratch = f"{self.vm.directory}/bench.scratch"
        self.vm.handle.backupBegin(
            f"""<domainbackup mode="pull"><server transport="unix" socket="{directory}/bench"/><disks>
            <disk name="vda" backup="yes" type="file"><scratch file="{scratch}"/></disk></disks></domainbackup>""",
            None,
        )
        try:
            yield f"nbd+unix:///vda?socket={directory}/bench"
        finally:
            self.vm.handle.abortJob()
            wait_for(lambda: not self.vm.has_job(), "end of job")
            Path(scratch).unlink(missing_ok=True)

    def virtnbdbackup(self, directory, options=""):
        """A full backup by the tool that users know."""
        uri = "qemu:///system" if os.geteuid() == 0 else "qemu:///session"
        self.delete_checkpoints()  # it refuses a full backup beside those of others
        try:
            return self.script(f"virtnbdbackup -n -U {uri} -d {self.vm.name} -l full {options} -o {directory}/out &&"
                               f" sync {directory}/out/*")
        finally:
            self.delete_checkpoints()

    def delete_checkpoints(self):
        for checkpoint in self.vm.handle.listAllCheckpoints():
            checkpoint.delete()

    def groups(self):
        """Yield the Groups."""
        jobs = {
            "nbdcopy --flush": lambda at: self.nbdcopy(f"{at}/raw"),
            "pipeline > FILE": lambda at: self.backup(f"vnb-pack > {at}/vnb && sync {at}/vnb"),
            "pipeline -o SET": lambda at: self.backup(f"vnb-pack -o {at}/set", options=f"--ledger {at}/set"),
            "pipeline -z -o SET": lambda at: self.backup(f"vnb-pack -z -o {at}/set", options=f"--ledger {at}/set"),
        }
        if shutil.which("virtnbdbackup"):
            jobs["virtnbdbackup"] = self.virtnbdbackup
            jobs["virtnbdbackup -z"] = lambda at: self.virtnbdbackup(at, "-z")
        else:
            note("virtnbdbackup: not installed, left out")
        yield Group("full backup", self.data, jobs)
        yield Group("read to nothing", self.data, {
            "nbdcopy": lambda at: self.nbdcopy("null:"),
            "vnb-extents | vnb-read": lambda at: self.read_to_nothing(),
        })
        yield Group("increment, idle machine", 0, {"pipeline -o SET": self.increment})
        jobs = {
            "nbdcopy --flush to qemu-nbd": self.nbdcopy_to_qcow2,
            "qemu-img convert": lambda at: self.script(
                f"qemu-img convert -f raw -O qcow2 {self.raw} {at}/q && sync {at}/q"),
            "vnb-cat | vnb-apply": lambda at: self.restore(self.set, at, "qcow2"),
            "vnb-cat | vnb-apply, packed set": lambda at: self.restore(self.packed, at, "qcow2"),
        }
        if shutil.which("virtnbdrestore"):
            self.virtnbdbackup(theirs := self.lab.new_directory("theirs"))
            jobs["virtnbdrestore"] = lambda at: self.script(
                f"virtnbdrestore -i {theirs}/out -o {at}/r && sync {at}/r/*")
        yield Group("restore to qcow2", self.data, jobs)
        yield Group("restore to raw", self.data, {
            "cp --sparse=always": lambda at: self.script(f"cp --sparse=always {self.raw} {at}/raw && sync {at}/raw"),
            "vnb-cat | vnb-apply": lambda at: self.restore(self.set, at, "raw"),
            "vnb-cat | vnb-apply, packed set": lambda at: self.restore(self.packed, at, "raw"),
        })
        yield Group("read of the map, in order", self.data, {
            "nbdkit file": lambda at: self.script(f"nbdkit -U - -r file {self.raw} --run 'nbdcopy \"$uri\" null:'"),
            "vnb-map": lambda at: self.script(f"vnb-map --run 'nbdcopy \"$uri\" null:' {self.set}"),
            "vnb-map, packed set": lambda at: self.script(f"vnb-map --run 'nbdcopy \"$uri\" null:' {self.packed}"),
        })
        yield Group("verify", self.data, {
            # What virtnbdrestore's verification does; the Debian package has none yet.
            "Adler-32 over the file": lambda at: self.python(ADLER, self.raw, self.data),
            "sha1sum": lambda at: self.script(f"sha1sum {self.set}/*.vnb"),
            "vnb-verify": lambda at: self.script(f"vnb-verify < {self.set}/*.vnb > /dev/null"),
            "vnb-verify, packed set": lambda at: self.script(f"vnb-verify < {self.packed}/*.vnb > /dev/null"),
        })

    def groups_of_sets(self):
        """Yield the Groups that need no machine: a set of a full and ten increments, half of whose bytes shrink."""
        chain = self.lab.path("chain")
        make(chain, self.data, 10, "none", shrinks=True)
        full = f"{chain}/*.full.vnb"
        yield Group("compress with lz4, one thread", self.data, {
            "lz4.block.compress": lambda at: self.python(LZ4, full, 512 << 10),
            "vnb-pack -z --threads 1": lambda at: self.script(f"vnb-pack -z --threads 1 < {full} > /dev/null"),
            "vnb-pack -z": lambda at: self.script(f"vnb-pack -z < {full} > /dev/null"),
        })
        # Old segments are on disk, and so is what they are read for: here the set is dropped from the page cache.
        yield Group("merge a full and ten increments", self.data, {
            "vnb-cat": lambda at: self.cold(chain, f"vnb-cat {chain} | cat > /dev/null"),
            "vnb-cat --merge": lambda at: self.cold(chain, f"vnb-cat --merge {chain} | cat > /dev/null"),
        })

        clients = {
            "read of the mapped chain, in order": (self.data, sequential),
            "4 KiB reads of it, one at a time": (0, at_random(1)),
            "4 KiB reads of it, 16 at a time": (0, at_random(16)),
        }
        for title, (size, client) in clients.items():
            yield Group(title, size, {
                "nbdkit file": lambda at, client=client: time_file(f"{chain}.flat", client),
                "vnb-map": lambda at, client=client: time_map(chain, client),
            })

    def read_to_nothing(self):
        with self.job() as uri:
            return self.script(f"vnb-extents '{uri}' | vnb-read > /dev/null")

    def restore(self, source, directory, image_format):
        out = f"{directory}/r"
        return self.script(f"vnb-cat {source} | vnb-apply --format {image_format} {out} && sync {out}/*")

    def increment(self, directory):
        """Of a machine that has written nothing since."""
        ledger = f"--ledger {directory}/set"
        self.backup(f"vnb-pack -o {directory}/set", "full", ledger)
        return self.backup(f"vnb-pack -o {directory}/set", "inc", ledger)

    def nbdcopy_to_qcow2(self, directory):
        run("qemu-img", "create", "-q", "-f", "qcow2", f"{directory}/q", self.size)
        return self.script(f"nbdcopy --flush {self.raw} -- [ qemu-nbd -f qcow2 {directory}/q ]")


def memory(lab):
    """Yield a row of the peak of each stage on a disk of 1 TiB with a million extents."""
    for command, peak in peaks(lab).items():
        yield {"group": MEMORY, "job": command, "mib": round(peak / MiB, 1),
               "ratio": round(peak / LIMIT, 2)}


def large_index(lab):
    """Yield a row of what it takes to open an index of ten million extents."""
    path = lab.path("large.vnb")
    make_index(path, MANY)
    seconds, _, peak = open_index(path)
    os.unlink(path)
    for job, found, most in (("seconds", round(seconds, 2), MOST_SECONDS), ("MiB", round(peak), MOST_MIB)):
        yield {"group": INDEX, "job": job, "found": found, "most": most}


def note(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def print_row(row, last_group):
    if row["group"] != last_group:
        head = ("seconds", "ratio", "spread", "MiB/s")
        if "mib" in row:
            head = "MiB", "of 64 MiB"
        elif "most" in row:
            head = "found", "at most"
        print(f"\n{row['group']:42}" + "".join(f"{word:>10}" for word in head))
    if "mib" in row:
        print(f"  {row['job']:40}{row['mib']:>10}{row['ratio']:>10}", flush=True)
    elif "most" in row:
        print(f"  {row['job']:40}{row['found']:>10}{row['most']:>10}", flush=True)
    else:
        figures = (f"{row[key]:>10.2f}" for key in ("seconds", "ratio", "spread"))
        print(f"  {row['job']:40}{''.join(figures)}{row['mib_per_second'] or '':>10}", flush=True)
    return row["group"]


def main():
    parser = argparse.ArgumentParser(prog="bench")
    parser.add_argument("--json", action="store_true", help="one array of objects on stdout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=int, default=2048, metavar="MIB", help="random data in the disk")
    parser.add_argument("--only", default="", metavar="WORD", help="groups with this in their title")
    options = parser.parse_args()
    rows = []
    last = None
    with Lab() as lab:
        bench = Bench(lab, options.data * MiB)
        groups = itertools.chain(bench.groups_of_sets(), bench.groups())
        found = (measure(lab, group, options.rounds) for group in groups if options.only in group.title)
        others = {INDEX: large_index, MEMORY: memory}
        others = [measured(lab) for title, measured in others.items() if options.only in title]
        for row in itertools.chain.from_iterable(itertools.chain(found, others)):
            rows.append(row)
            if not options.json:
                last = print_row(row, last)
    if options.json:
        json.dump(rows, sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
