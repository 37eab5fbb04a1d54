# SPDX-License-Identifier: LGPL-2.1-or-later
"""Of exports: very many extents, small ones, and a line with a delay, beside nbdcopy and nbdinfo."""

import os
from pathlib import Path

import samples
from lab import MiB
from peaks import MANY_EXTENTS
from turns import Group, script

TiB = 1 << 40
PIECE = 64 << 10  # bytes: a cluster of qcow2, and a bit of its bitmaps
DELAY = "10ms"
DISKS, CLIENTS = 60, 16  # clients: what a pipeline is to take at most; with more it would wait
OURS = "vnb-extents | vnb-read > FILE"
# Ten million extents of 800 KiB on 8 TiB; a thousandth of that.
LARGE, SMALL = f"size={8 * TiB} extent=819200", f"size={8 * TiB // 1000 // 819200 * 819200} extent=819200"


def groups(lab, data):
    """Yield the Groups. data (int): bytes that each copies."""
    def many(size, text, end=""):
        return script(lab, f"nbdkit -U - -r python {MANY_EXTENTS} {size} --run '{text}'{end}")

    def first(size):
        # nbdkit 1.32 may abort when its client is cut off: only the time counts.
        return many(size, 'vnb-extents "$uri" | vnb-read | head -c 65536 > /dev/null', " || true")

    yield Group("first data of a disk of many extents", 0, {
        "vnb-read, ten thousand on 8 GiB": lambda at: first(SMALL),
        "vnb-read, ten million on 8 TiB": lambda at: first(LARGE),
    }, seconds={"vnb-read, ten million on 8 TiB": 0.3})
    yield Group("walk of ten million extents", 0, {
        "nbdinfo --map": lambda at: many(LARGE, 'nbdinfo --map "$uri" > /dev/null'),
        "vnb-extents": lambda at: many(LARGE, 'vnb-extents "$uri" > /dev/null'),
    }, {"vnb-extents": 1.5})

    image = lab.path("pieces.raw")
    with open(image, "wb") as file:
        for offset in range(0, 2 * data, 2 * PIECE):
            os.pwrite(file.fileno(), os.urandom(PIECE), offset)
        file.truncate(2 * data)
    yield Group("data in extents of 64 KiB", data, copies(lab, image, ""), {OURS: 1.3})
    os.unlink(image)
    yield from many_disks(lab, data)
    image = lab.path("whole.raw")
    with open(image, "wb") as file:
        for _ in range(data // MiB):
            file.write(os.urandom(MiB))
        file.truncate(2 * data)
    yield Group(f"a line with a delay of {DELAY} a request", data, copies(
        lab, image, f"--filter=delay rdelay={DELAY} delay-extents={DELAY}"), {OURS: 1.0})
    os.unlink(image)


def many_disks(lab, data):
    """Yield Groups that read as many bytes of one disk as of many, all fragmented, of a QEMU that takes few clients."""
    directory = lab.new_directory("disks")
    size = data // DISKS // PIECE * 2 * PIECE
    sizes = {"one": DISKS * size, **{f"d{number}": size for number in range(DISKS)}}
    options = []
    for name, size in sizes.items():
        image = f"{directory}/{size}"
        if not os.path.exists(image):
            lab.sh(f"""qemu-img create -q -f qcow2 {image} {size} && qemu-img bitmap --add {image} b0
                for ((at = 0; at < {size}; at += {2 * PIECE})); do echo "write -q -P 1 $at {PIECE}"; done |
                    qemu-io -f qcow2 -t unsafe {image} > /dev/null""")
        options.append(
            f"--blockdev driver=file,node-name=f{name},filename={image},read-only=on,locking=off "
            f"--blockdev driver=qcow2,node-name=q{name},file=f{name},read-only=on "
            f"--export nbd,id=e{name},node-name=q{name},name={name},bitmaps.0=b0"
        )
    path = f"{directory}/sock"
    lab.sh(f"qemu-storage-daemon --daemonize --pidfile {directory}/pid --nbd-server "
           f"addr.type=unix,addr.path={path},max-connections={CLIENTS} {' '.join(options)}")
    for level, title in (("full", "a full backup"), ("inc", "an increment")):
        for stream, names in (("one", ["one"]), ("many", list(sizes)[1:])):
            disks = [samples.disk(name, sizes[name], level, source={
                "uri": f"nbd+unix:///{name}?socket={path}", "dirty": "qemu:dirty-bitmap:b0"
            }) for name in names]
            head = samples.head("p1", "p0" if level == "inc" else None, stage="disks")
            Path(f"{directory}/{stream}.{level}").write_bytes(samples.segment(head, disks))

        def read(stream, level=level):
            return script(lab, f"vnb-extents < {directory}/{stream}.{level} | vnb-read > /dev/null")

        yield Group(f"fragmented disks of one QEMU, {title}", data, {
            "vnb-extents | vnb-read, one disk": lambda at, read=read: read("one"),
            f"vnb-extents | vnb-read, {DISKS} disks": lambda at, read=read: read("many"),
        }, {f"vnb-extents | vnb-read, {DISKS} disks": 1.0})
    lab.sh(f"kill $(cat {directory}/pid) && rm -r {directory}")


def copies(lab, image, options):
    """Jobs that copy an image, out of nbdkit, to a file that is synced."""
    def served(text):
        return script(lab, f"nbdkit -U - -r {options.partition(' ')[0]} file {image} {options.partition(' ')[2]}"
                           f" --run '{text}'")

    return {
        "nbdcopy --flush": lambda at: served(f'nbdcopy --flush "$uri" {at}/raw'),
        OURS: lambda at: served(f'vnb-extents "$uri" | vnb-read > {at}/vnb && sync {at}/vnb'),
    }
