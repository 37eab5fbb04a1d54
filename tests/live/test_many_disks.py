# SPDX-License-Identifier: LGPL-2.1-or-later
"""Domains of many disks: QEMU takes 100 NBD clients in all, and lets the next one wait without a word."""

import itertools
import string

from backups import backup, levels, restores
from lab import Disk, KiB, MiB

COUNT = 52  # with a connection of each stage to each disk there would be more than QEMU takes


def names():
    """vda to vdz, vdaa and so on."""
    letters = itertools.chain(string.ascii_lowercase, map("".join, itertools.product(string.ascii_lowercase, repeat=2)))
    return [f"vd{letter}" for letter in itertools.islice(letters, COUNT)]


def test_more_disks_than_qemu_takes_clients(lab):
    """Both stages waited for each other then, until the deadline ended the job."""
    vm = lab.domain(*(Disk(name, 1 * MiB) for name in names()))
    directory = lab.path("set")
    try:
        vm.write("vda", 0, 64 * KiB, 1)
        vm.write(names()[-1], 0, 64 * KiB, 2)
        options = "--no-freeze --deadline 100s"
        backup(lab, vm, "full", directory, options)
        for pattern, name in enumerate(names()[::4]):
            vm.write(name, 128 * KiB, 64 * KiB, 3 + pattern)
        vm.pause()
        reference = vm.reference(*names())
        backup(lab, vm, "inc", directory, options)
        assert levels(directory) == ["full", "inc"]
        restores(lab, directory, reference)
    finally:
        vm.remove()
