# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A machine without a guest: two images that are written to as by one, its backup set, and the truth.

    machine = Machine(place, chance)
    machine.write()                     # by qemu-io
    machine.back_up()                   # a full, then increments
    machine.check_points()              # each one restores to what the disks were then, copied by qemu-img

No code of ours makes the truth. Since no guest holds the images, a backup takes a third of a second.
"""

import copy
import json
import random
import re
import shutil
from pathlib import Path

from lab import KiB, MiB, compare, run

SIZES = {"vda": 8 * MiB, "vdb": 2 * MiB}


class Machine:
    """
    place (disturbing.Place); chance (random.Random): of what is written; compress (str): what vnb-pack is told.

    images (dict): the Path of each disk's; set (Path); truths (dict): {disk: raw image} for each point that was saved.
    """

    def __init__(self, place, chance, compress="-z"):
        self.place = place
        self.chance = chance
        self.images = {name: place.directory / f"{name}.qcow2" for name in SIZES}
        self.set = place.directory / "set"
        self.truths = {}
        self._copies = 0
        images = " ".join(f"--image {name}={path}" for name, path in self.images.items())
        self.script = (
            f"vnb-checkpoint run {images} --level auto --set {self.set} -- "
            f"'vnb-extents | vnb-read | vnb-pack {compress} -o {self.set}'"
        )
        for name, path in self.images.items():
            run("qemu-img", "create", "-q", "-f", "qcow2", path, SIZES[name])
        self.write()

    def write(self):
        """Some writes to each disk, by chance: data, zeroes, and what is given back."""
        for name, path in self.images.items():
            commands = []
            for _ in range(self.chance.randint(2, 6)):
                length = self.chance.choice([512, 4 * KiB, 64 * KiB, 300 * KiB, MiB])
                offset = self.chance.randrange(0, SIZES[name] - length, 512)
                what = self.chance.choice(
                    ["write -P {}", "write -P {}", "write -P {}", "write -z", "write -z -u", "discard"]
                )
                commands += ["-c", f"{what.format(self.chance.randrange(1, 256))} {offset} {length}"]
            run("qemu-io", "-f", "qcow2", "-d", "unmap", *commands, path)

    def elsewhere(self, set_, chance):
        """This machine, with another set, which is a copy, and chances; what becomes of it this one does not know."""
        other = copy.copy(self)
        other.chance, other.set, other.truths = chance, set_, dict(self.truths)
        other.script = self.script.replace(str(self.set), str(set_))
        shutil.copytree(self.set, set_)
        return other

    def truth(self):
        """Raw copies of the images as they are."""
        self._copies += 1
        copies = {name: self.place.directory / f"truth{self._copies}-{name}.raw" for name in self.images}
        for name, path in self.images.items():
            run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, copies[name])
        return copies

    def back_up(self):
        """A backup that has to work; and afterwards nothing of one before that did not may be left."""
        truth = self.truth()
        self.place.sh(self.script)
        self.saved(truth)
        assert [name.name for name in self.set.iterdir() if not name.name.endswith(".vnb")] == []
        assert list(Path(self.place.env["VNB_STATE_DIR"]).glob("jobs/*/job.json")) == []
        assert self.bitmaps() <= set(self.truths)

    def saved(self, truth):
        """Take note of the point that has come into the set, if one has; whether one has."""
        new = set(self.points()) - set(self.truths)
        assert len(new) <= 1
        self.truths.update(dict.fromkeys(new, truth))
        return bool(new)

    def points(self):
        """The points in the set, oldest first. All of it has to be sound."""
        if not list(self.set.glob("*.vnb")):
            return []
        self.place.sh(f"vnb-verify {self.set}")
        return sorted(re.split(r"\.(?:full|copy|inc|diff)\.", name.name)[0] for name in self.set.glob("[!.]*.vnb"))

    def bitmaps(self):
        """The names (set) of the bitmaps in the images."""
        found = set()
        for path in self.images.values():
            info = json.loads(run("qemu-img", "info", "--output=json", path))
            found |= {bitmap["name"] for bitmap in info["format-specific"]["data"].get("bitmaps", ())}
        return found

    def check_next(self):
        """The next increment is right, and each point there is restores."""
        self.write()
        self.back_up()
        self.check_points()

    def check_points(self, points=None):
        """All points, or these, restore byte for byte."""
        for point in self.truths if points is None else points:
            self.check_restored(self.set, point)

    def check_restored(self, set_, point):
        """A point of a set, this machine's or one made from it, restores byte for byte."""
        target = self.place.directory / "restored"
        self.place.sh(f"vnb-cat --until {point} {set_} | vnb-apply --format raw {target}")
        self.check_images([target / f"{name}.raw" for name in self.images], point)
        shutil.rmtree(target)

    def check_images(self, images, point):
        """Images, whose disks and formats their names say, are what the disks were at a point, byte for byte."""
        for image in images:
            compare(self.truths[point][image.stem], image, image.suffix[1:])


def with_points(place, count):
    """A Machine, the same each time, with a set of so many points."""
    machine = Machine(place, random.Random(0))
    for _ in range(count):
        machine.write()
        machine.back_up()
    return machine
