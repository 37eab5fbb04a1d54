# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-checkpoint - begin and end a backup job and its checkpoint

Usage:
  vnb-checkpoint begin DOMAIN --level LEVEL [options] [--include DISK]...
                 [--exclude DISK]...
  vnb-checkpoint run DOMAIN --level LEVEL [options] [--include DISK]...
                 [--exclude DISK]... [--] COMMAND...
  vnb-checkpoint commit DOMAIN [options]
  vnb-checkpoint abort DOMAIN [options]
  vnb-checkpoint list DOMAIN [--json] [options]
  vnb-checkpoint --help | --version

begin starts a job and writes a stream of its head and disks; a keeper process
watches over the job until commit or abort. run does all three around COMMAND,
which has the stream on its standard input.

Options:
  -c URI, --connect URI  libvirt's URI; default: LIBVIRT_DEFAULT_URI, else
                         qemu:///system for root, qemu:///session for others
  --level LEVEL          full, copy, inc, diff, or auto
  --ledger DIR           the backup set that the segment goes to: says what the
                         next increment starts from, and whether it was saved
  --since CHECKPOINT     start from this checkpoint; for diff also last or full
  --chain NAME           which chain of checkpoints [default: main]
  --include DISK         only this disk; may be given several times
  --exclude DISK         not this disk; may be given several times
  --raw                  take disks that cannot hold a bitmap in full each time
  --allow-plaintext      take encrypted disks, which leave QEMU decrypted
  --scratch-dir DIR      where the data goes that the guest overwrites meanwhile;
                         default: beside each image
  --scratch-reserve SIZE
                         end the job when less room than this is left there
                         [default: 256m]
  --socket PATH          where QEMU puts the NBD socket; default: in the
                         domain's private directory
  --deadline TIME        end the job after this time, as 90s, 10m, 4h, 1d
                         [default: 1d]
  --idle TIME            end the job when nobody was connected for this time,
                         between begin and commit [default: 10m]
  --state-dir DIR        default: VNB_STATE_DIR, else /var/lib/vnb for root
  --json                 print JSON, one object a line
  --debug                show tracebacks
  --help                 print this
  --version              print the version
"""

import json
import os
import re
import subprocess

from vnb import arguments, stream
from vnb.errors import Error, OutputClosed, UsageError
from vnb.run import note
from vnb.state import JobDirectory, default_directory

LEVELS = ("full", "copy", "inc", "diff", "auto")


def main(args):
    args["--state-dir"] = os.path.abspath(args["--state-dir"] or default_directory())
    if args["begin"]:
        return _begin(_options(args))
    if args["run"]:
        return _run(_options(args), args["COMMAND"])
    if args["commit"] or args["abort"]:
        return _finish(args, "commit" if args["commit"] else "abort")
    return _list(args)


def _options(args):
    """What the keeper needs, checked."""
    if args["--level"] not in LEVELS:
        raise UsageError("--level", f'"{args["--level"]}" is not one of {", ".join(LEVELS)}')
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", args["--chain"]):
        raise UsageError("--chain", f'"{args["--chain"]}" has other characters than letters, digits, - and _')
    if args["--since"] in ("last", "full") and args["--level"] != "diff":
        raise UsageError("--since", f'"{args["--since"]}" is for level diff')
    if args["--since"] and args["--level"] in ("full", "copy"):
        raise UsageError("--since", f'level {args["--level"]} starts from nothing')
    return {
        "domain": args["DOMAIN"],
        "uri": args["--connect"],
        "level": args["--level"],
        "ledger": args["--ledger"] and os.path.abspath(args["--ledger"]),
        "since": args["--since"],
        "chain": args["--chain"],
        "include": args["--include"],
        "exclude": args["--exclude"],
        "raw": args["--raw"],
        "allow_plaintext": args["--allow-plaintext"],
        "scratch_dir": args["--scratch-dir"],
        "socket": args["--socket"],
        "reserve": arguments.size(args, "--scratch-reserve", 0, 1 << 60),
        "deadline": arguments.seconds(args, "--deadline"),
        "idle": arguments.seconds(args, "--idle"),
        "state": args["--state-dir"],
    }


def _say(text):
    note("vnb-checkpoint", text)


def _begin(options):
    from vnb.keeper import Starter

    out = stream.stdout()
    keeper = Starter(options, _say)
    try:
        _write(out, keeper.begun)
        keeper.hand_over()
    except BaseException:
        keeper.leave()
        raise


def _write(out, begun):
    out.segment(begun["head"], begun["disks"]).end()


def _run(options, command):
    from vnb.keeper import Starter

    keeper = Starter(options, _say)
    try:
        status = _feed(command, keeper.begun)
        if status != 0:
            how = f"ended with status {status}" if status > 0 else f"was ended by signal {-status}"
            raise Error(options["domain"], f"the command {how}: nothing is committed")
        keeper.finish("commit")
    except BaseException:
        keeper.leave()
        raise


def _feed(command, begun):
    """Run the command with the stream on its standard input; its exit status, or minus the signal."""
    # One word is a pipeline for the shell, as typed; pipefail lets a stage in its middle fail it.
    argv = ["bash", "-o", "pipefail", "-c", command[0]] if len(command) == 1 else command
    environment = {**os.environ, "VNB_RUN": begun["head"]["run"]}
    try:
        child = subprocess.Popen(argv, stdin=subprocess.PIPE, env=environment)
    except OSError as error:
        raise Error(argv[0], error.strerror) from None
    try:
        with child.stdin:
            _write(stream.Writer(child.stdin.fileno(), "the command"), begun)
        return child.wait()
    except (Error, OutputClosed) as error:
        # It did not want all of the stream: whatever it did then, it did not store it.
        return child.wait() or _unread(error)
    except BaseException:
        child.terminate()
        child.wait()
        raise


def _unread(error):
    raise Error("the command", f"did not read its input ({error})")


def _directory(args):
    """The job directory of the domain, which need not be there for libvirt any more if a UUID is given."""
    from vnb.virt import Domain

    with Domain(args["--connect"], args["DOMAIN"]) as domain:
        return JobDirectory(args["--state-dir"], domain.uuid)


def _finish(args, what):
    from vnb.keeper import ask

    ledger = args["--ledger"] and os.path.abspath(args["--ledger"])
    found = ask(_directory(args), what, ledger, _say)
    if not found and what == "commit":
        raise Error(args["DOMAIN"], "has no backup job of ours to commit")


def _list(args):
    from vnb import domxml
    from vnb.virt import Domain

    with Domain(args["--connect"], args["DOMAIN"]) as domain:
        uuid = domain.uuid
        found = domain.checkpoints()
    saved = _saved(args, uuid)
    for name in sorted(found):
        about = _about(domxml.description(found[name]))
        row = {
            "checkpoint": name,
            "ours": about is not None,
            "chain": (about or {}).get("chain"),
            "disks": sorted(domxml.bitmaps(found[name])),
            "ledger": (about or {}).get("ledger"),
            "saved": saved.get(name),
        }
        if args["--json"]:
            print(json.dumps(row))
        else:
            where = row["saved"] or ("not saved in the ledger" if row["ours"] else "not of vnb")
            print(f"{name}  {','.join(row['disks'])}  {where}")


def _saved(args, uuid):
    """{checkpoint: file that holds its segment} of the ledger."""
    from vnb.ledger import Ledger

    ledger = Ledger.of(args["--state-dir"], uuid, args["--ledger"])
    return {segment.head["checkpoint"]: segment.name for segment in ledger.segments() if segment.head["checkpoint"]}


def _about(description):
    """What a checkpoint of ours says of itself, or None."""
    word, _, text = description.partition(" ")
    if word != "vnb":
        return None
    try:
        about = json.loads(text)
    except ValueError:
        return None
    return about if isinstance(about, dict) else None
