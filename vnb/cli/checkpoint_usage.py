# SPDX-License-Identifier: LGPL-2.1-or-later
"""The usage texts of the subcommands of vnb-checkpoint, put together from the options that they share."""

_CONNECTION = """\
  -c URI, --connect URI  libvirt's URI; default: LIBVIRT_DEFAULT_URI, else
                         qemu:///system for root, qemu:///session for others
  --user NAME            the user that libvirt asks for
  --password-file FILE   the first line is the password that libvirt asks for
"""
_SSH = """\
  --ssh-user USER        the user for ssh to the host of -c; default: the one
                         in the URI
  --ssh-port PORT        the port for ssh
  --ssh-key FILE         the key for ssh
"""
_IMAGE = """\
  --image NAME=FILE      back up this image, which no guest uses, without
                         libvirt; may be given several times
"""
_SET = """\
  --set DIR              the backup set that holds the segments
"""
_DESTINATION = """\
  --destination NAME     the name of a place for segments that is no directory
                         of this host, such as s3://bucket/vm1
"""
_CHAIN = """\
  --chain NAME           the series of checkpoints, so that several can grow
                         side by side [default: main]
"""
_STATE = """\
  --state-dir DIR        the directory for jobs and catalogs; default:
                         VNB_STATE_DIR, else /var/lib/vnb for root
"""
_JSON = """\
  --json                 print JSON, one object a line
"""
_LEVEL = """\
  --level LEVEL          full, copy, inc, diff or auto
  --base CHECKPOINT      start from this checkpoint, which the receiver has
                         named; with diff, also "last" or "full"
"""
_DISKS = """\
  --include DISK         take only this disk; may be given several times
  --exclude DISK         leave out this disk; may be given several times
  --raw                  take disks that cannot hold a bitmap in full each time
  --allow-plaintext      take encrypted disks; their data leaves QEMU
                         decrypted
"""
_JOB = """\
  --must-exist           fail if the directory of --set is not there
  --no-sparse-detection  read everything that is dirty, also zeroes; for a
                         server that is slow to list its extents
  -S, --start-paused     start a domain that is off, paused, and destroy it
                         after the backup
  --pause                suspend the guest while the job starts
  --freeze MOUNTPOINTS   freeze only these file systems, separated by commas
  --no-freeze            freeze nothing
  --require-freeze       fail if the guest cannot be frozen
  --threshold SIZE       take no increment that has fewer bytes; begin then
                         exits with status 4, and run with 0
  --scratch-dir DIR      the directory for the old data that the guest
                         overwrites; default: beside each image
  --scratch-reserve SIZE
                         end the job when less room than this is left there
                         [default: 256m]
  --socket PATH          have QEMU listen on this socket; default: one in the
                         private directory of the domain
  --nbd-listen ADDRESS[:PORT]
                         have QEMU listen there instead; default: a free port;
                         write an IPv6 address as [ADDRESS]:PORT
  --tls                  with --nbd-listen: require verified certificates on
                         both sides
  --tls-certificates DIR
                         the directory with the certificates of this side;
                         default: libnbd's directory
  --deadline TIME        end the job after this time, such as 90s, 10m, 4h, 1d
                         [default: 1d]
  --idle TIME            end the job if no client was connected for this time
                         between begin and commit [default: 10m]
"""
_STRICT = """\
  --strict               exit with status 3 after warnings, when all is saved
"""
_NO_PROOF = """\
  --no-proof             commit although no stage has reported that it took
                         the whole segment; stages on other hosts cannot
"""
_FORCE = """\
  --force                also take what belongs to another set or destination,
                         or to a process on another host
"""

SUBCOMMANDS = {
    "begin": f"""\
vnb-checkpoint begin - begin a backup job and write its stream

Usage:
  vnb-checkpoint begin [options] [--include DISK]... [--exclude DISK]...
                 [--] DOMAIN
  vnb-checkpoint begin [options] --image NAME=FILE...
  vnb-checkpoint begin --help | --version

Writes a stream with the head, disks and files of a new segment to standard
output. A keeper watches over the job until commit or abort.

Options:
{_LEVEL}{_SET}{_DESTINATION}{_CHAIN}{_DISKS}{_IMAGE}{_JOB}{_STRICT}{_CONNECTION}{_SSH}{_STATE}""",
    "run": f"""\
vnb-checkpoint run - begin a job, run a pipeline, and commit if it succeeds

Usage:
  vnb-checkpoint run [options] [--include DISK]... [--exclude DISK]...
                 [--] DOMAIN -- COMMAND...
  vnb-checkpoint run [options] --image NAME=FILE... -- COMMAND...
  vnb-checkpoint run --help | --version

Gives the stream to COMMAND on its standard input. Commits if COMMAND succeeds,
and aborts if it fails. Quote a whole pipeline, so that it is one word.

Options:
{_LEVEL}{_SET}{_DESTINATION}{_CHAIN}{_DISKS}{_IMAGE}{_JOB}{_STRICT}{_NO_PROOF}{_CONNECTION}{_SSH}{_STATE}""",
    "commit": f"""\
vnb-checkpoint commit - end a job and keep its checkpoint

Usage:
  vnb-checkpoint commit [options] [--] DOMAIN
  vnb-checkpoint commit [options] --image NAME=FILE...
  vnb-checkpoint commit --help | --version

Keeps the checkpoint only if the segment is saved: in the set, or as the stages
report. Then deletes older checkpoints that no increment needs any more.

Options:
{_SET}{_NO_PROOF}{_IMAGE}{_CONNECTION}{_STATE}""",
    "abort": f"""\
vnb-checkpoint abort - end a job and delete its checkpoint

Usage:
  vnb-checkpoint abort [options] [--] DOMAIN
  vnb-checkpoint abort [options] --image NAME=FILE...
  vnb-checkpoint abort --help | --version

Loses nothing: the next backup reads these changes too. Leaves the job of
another program alone.

Options:
{_IMAGE}{_CONNECTION}{_STATE}""",
    "list": f"""\
vnb-checkpoint list - list the checkpoints of a domain

Usage:
  vnb-checkpoint list [options] [--] DOMAIN
  vnb-checkpoint list --help | --version

Prints one checkpoint a line: its name, its disks, the bytes that an increment
from it would have, and the place where its segment is saved.

Options:
{_SET}{_DESTINATION}{_JSON}{_CONNECTION}{_STATE}""",
    "size": f"""\
vnb-checkpoint size - print how many bytes the next backup has to read

Usage:
  vnb-checkpoint size [options] [--include DISK]... [--exclude DISK]...
                 [--] DOMAIN
  vnb-checkpoint size --help | --version

Prints an upper limit, one line a disk, and a total. Areas that were zeroed or
trimmed count, although they take no room in a segment.

Options:
{_LEVEL}{_SET}{_DESTINATION}{_CHAIN}{_DISKS}{_JSON}{_CONNECTION}{_SSH}{_STATE}""",
    "cleanup": f"""\
vnb-checkpoint cleanup - put right what a crash has left

Usage:
  vnb-checkpoint cleanup [options] [--] DOMAIN
  vnb-checkpoint cleanup --help | --version

Ends the job of a dead keeper, removes its scratch, thaws its guest, and deletes
checkpoints that are not saved. Prints what it does and what it leaves alone.

Options:
{_SET}{_DESTINATION}{_FORCE}{_CONNECTION}{_STATE}""",
    "redefine": f"""\
vnb-checkpoint redefine - make libvirt know checkpoints again

Usage:
  vnb-checkpoint redefine [options] [--] DOMAIN
  vnb-checkpoint redefine --help | --version

Finds the checkpoints of a set or destination whose bitmaps the images still
hold. Use it after the domain was moved or defined anew.

Options:
{_SET}{_DESTINATION}{_CONNECTION}{_STATE}""",
    "delete": f"""\
vnb-checkpoint delete - delete the checkpoints of a chain

Usage:
  vnb-checkpoint delete [options] [--] DOMAIN
  vnb-checkpoint delete --help | --version

Deletes no segment. The next backup of this chain is a full one.

Options:
{_SET}{_DESTINATION}{_CHAIN}{_FORCE}{_CONNECTION}{_STATE}""",
}
