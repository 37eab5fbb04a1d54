# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A machine without a guest: an image that is written to as by one, its backup set, and the truth.

    machine = Machine(place, chance)
    machine.write()                     # by qemu-io
    machine.back_up()                   # a full, then increments
    machine.check_points()              # each one restores to what the disk was then, copied by qemu-img

No code of ours makes the truth. Since no guest holds the image, a backup takes a third of a second.
"""

import copy
import json
import shutil
from pathlib import Path

from lab import KiB, MiB, compare, run

SIZE = 8 * MiB


class Machine:
    """
    place (disturbing.Place); chance (random.Random): of what is written; compress (str): what vnb-pack is told.

    image, set (Path); truths (dict): a raw image for each point that was saved.
    """

    def __init__(self, place, chance, compress="-z"):
        self.place = place
        self.chance = chance
        self.image = place.directory / "vda.qcow2"
        self.set = place.directory / "set"
        self.truths = {}
        self._copies = 0
        self.script = (
            f"vnb-checkpoint run --image vda={self.image} --level auto --ledger {self.set} -- "
            f"'vnb-extents | vnb-read | vnb-pack {compress} -o {self.set}'"
        )
        run("qemu-img", "create", "-q", "-f", "qcow2", self.image, SIZE)
        self.write()

    def write(self):
        """Some writes, by chance: data, zeroes, and what is given back."""
        commands = []
        for _ in range(self.chance.randint(2, 6)):
            length = self.chance.choice([512, 4 * KiB, 64 * KiB, 300 * KiB, MiB])
            offset = self.chance.randrange(0, SIZE - length, 512)
            what = self.chance.choice(
                ["write -P {}", "write -P {}", "write -P {}", "write -z", "write -z -u", "discard"]
            )
            commands += ["-c", f"{what.format(self.chance.randrange(1, 256))} {offset} {length}"]
        run("qemu-io", "-f", "qcow2", "-d", "unmap", *commands, self.image)

    def elsewhere(self, set_, chance):
        """This machine, with another set, which is a copy, and chances; what becomes of it this one does not know."""
        other = copy.copy(self)
        other.chance, other.set, other.truths = chance, set_, dict(self.truths)
        other.script = self.script.replace(str(self.set), str(set_))
        shutil.copytree(self.set, set_)
        return other

    def truth(self):
        """A raw copy of the image as it is."""
        self._copies += 1
        path = self.place.directory / f"truth{self._copies}.raw"
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", self.image, path)
        return path

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
        return sorted(name.name.rsplit(".", 2)[0] for name in self.set.glob("[!.]*.vnb"))

    def bitmaps(self):
        """The names (set) of the bitmaps in the image."""
        info = json.loads(run("qemu-img", "info", "--output=json", self.image))
        return {bitmap["name"] for bitmap in info["format-specific"]["data"].get("bitmaps", ())}

    def check_points(self, points=None):
        """All points, or these, restore byte for byte."""
        for point in self.truths if points is None else points:
            self.check_restored(self.set, point)

    def check_restored(self, set_, point):
        """A point of a set, this machine's or one made from it, restores byte for byte."""
        target = self.place.directory / "restored"
        self.place.sh(f"vnb-cat --until {point} {set_} | vnb-apply --format raw {target}")
        self.check_image(target / "vda.raw", point)
        shutil.rmtree(target)

    def check_image(self, image, point):
        """An image, whose format its name says, is what the disk was at a point, byte for byte."""
        compare(self.truths[point], image, image.suffix[1:])
