# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-checkpoint - begin and end a backup job and its checkpoint

Usage:
  vnb-checkpoint SUBCOMMAND [ARGUMENT]...
  vnb-checkpoint --help | --version

Subcommands:
  begin     begin a backup job and write its stream
  run       begin a job, run a pipeline, and commit if it succeeds
  commit    end a job and keep its checkpoint
  abort     end a job and delete its checkpoint
  list      list the checkpoints of a domain
  size      print how many bytes the next backup has to read
  cleanup   put right what a crash has left
  redefine  make libvirt know checkpoints again that the images still hold
  delete    delete the checkpoints of a chain

vnb-checkpoint SUBCOMMAND --help prints the options of a subcommand.
"""

from __future__ import annotations

import os
import re
import shlex
import sys

from vnb.base import log
from vnb.base.errors import Error, Mistyped, Saved, UsageError
from vnb.cli import arguments, output
from vnb.cli.checkpoint_usage import SUBCOMMANDS
from vnb.cli.usage import Usage
from vnb.format import rules, writing
from vnb.job import domain_files, proof
from vnb.job.pipeline import CommandFailed, Pipeline, leaves_by_stdout, readers_of_stdout
from vnb.job.state import JobDirectory
from vnb.job.statedir import default_directory
from vnb.nbd.endpoint import parse_listen
from vnb.store.backupset import is_missing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


LEVELS = ("full", "copy", "inc", "diff", "auto")
NEEDS_CATALOG = "needs --set DIR, or for what is no directory of this host --destination NAME, as s3://bucket/vm1"
MAX_SIZE = 1 << 60
NOTHING_TO_DO = 4  # exit status


def writes_stream(args: dict[str, Any]) -> bool:
    """Whether standard output gets a stream."""
    return bool(args.get("begin"))


def main(args: dict[str, Any]) -> Any:
    subcommand = next(name for name in SUBCOMMANDS if args.get(name))
    if args.get("COMMAND", ())[:1] == [""]:
        raise UsageError("COMMAND", "is empty")  # sh would run it, and it would have done nothing
    args["--state-dir"] = os.path.abspath(args["--state-dir"] or default_directory())
    if args.get("--set"):
        args["--set"] = os.path.abspath(args["--set"])
    check_destination(args)
    if subcommand in ("begin", "run"):
        log.name_run()
    if subcommand == "begin":
        return _begin(_options(args))
    if subcommand == "run":
        return _run(_options(args), args["COMMAND"])
    if subcommand in ("commit", "abort"):
        return _finish(args, subcommand)
    from vnb.cli import checkpoint_admin, checkpoint_cleanup, known_catalogs

    if subcommand == "size":
        args["--level"] = args["--level"] or "auto"
        if not args["--base"]:
            with known_catalogs.open_domain(args) as domain:
                known_catalogs.wanted(args, domain)
        return checkpoint_admin.size(_options({**_defaults("run"), **args}), args["--json"], log.note, log.warn)
    if subcommand == "cleanup":
        return checkpoint_cleanup.cleanup(args, log.note)
    return getattr(checkpoint_admin, subcommand)(args, log.note)


def _defaults(subcommand: str) -> dict[str, Any]:
    """The options of a subcommand (dict, as docopt has it) when none of them is given."""
    return {
        option.name: [] if option.name == "--image" else option.default if option.value else False
        for option in Usage(SUBCOMMANDS[subcommand]).options
    }


def _options(args: dict[str, Any]) -> dict[str, Any]:
    """What the keeper needs, checked; see vnb.job.job.begin and vnb.job.starter.start."""
    level, base = args["--level"], args["--base"]
    if level not in LEVELS:
        found = "is needed:" if level is None else f'"{level}" is not'
        raise UsageError("--level", f"{found} one of {', '.join(LEVELS)}")
    check_chain(args)
    if base in ("last", "full") and level != "diff":
        raise UsageError("--base", f'"{base}" is for level diff')
    if base and level in ("full", "copy"):
        raise UsageError("--base", f"level {level} starts from nothing")
    if args["--no-freeze"] and (args["--freeze"] or args["--require-freeze"]):
        raise UsageError("--no-freeze", "contradicts --freeze and --require-freeze")
    for option in ("--start-paused", "--pause", "--connect", "--nbd-listen"):
        if args["--image"] and args[option]:
            raise UsageError(option, "has no meaning with --image")
    if args["--nbd-listen"]:
        parse_listen(args["--nbd-listen"])
    for option, other in (("--tls", "--nbd-listen"), ("--tls-certificates", "--tls")):
        if args[option] and not args[other]:
            raise UsageError(option, f"is for {other}")
    if args["--nbd-listen"] and args["--socket"]:
        raise UsageError("--socket", "contradicts --nbd-listen")
    if args["--must-exist"] and not args["--set"]:
        raise UsageError("--must-exist", "is for --set")
    if args["--set"] and is_missing(args["--set"]):
        if args["--must-exist"]:
            raise Error(args["--set"], "is not there, and --must-exist is given: is its file system mounted?")
        if args.get("begin") or args.get("run"):
            log.note(f"{args['--set']}: is not there yet: a new backup set will be made")
    checked: dict[str, Any] = {
        "domain": args["DOMAIN"],
        "images": _images(args),
        "uri": args["--connect"],
        "user": args["--user"],
        "password_file": args["--password-file"] and os.path.abspath(args["--password-file"]),
        "level": level,
        "set": args["--set"],
        "destination": args["--destination"],
        "base": base,
        "chain": args["--chain"],
        "include": args["--include"],
        "exclude": args["--exclude"],
        "raw": args["--raw"],
        "allow_plaintext": args["--allow-plaintext"],
        "sparse": not args["--no-sparse-detection"],
        "start_paused": args["--start-paused"],
        "pause": args["--pause"],
        "freeze": None if args["--no-freeze"] else args["--freeze"].split(",") if args["--freeze"] else [],
        "require_freeze": args["--require-freeze"],
        "strict": args["--strict"],
        "no_proof": args.get("--no-proof", False),  # begin has none: commit may
        "threshold": arguments.size(args, "--threshold", 0, MAX_SIZE) if args["--threshold"] else None,
        "scratch_dir": args["--scratch-dir"],
        "socket": args["--socket"],
        "listen": args["--nbd-listen"],
        "tls": args["--tls"],
        "certificates": args["--tls-certificates"] and os.path.abspath(args["--tls-certificates"]),
        "ssh": ssh_options(args),
        "reserve": arguments.size(args, "--scratch-reserve", 0, MAX_SIZE),
        "deadline": arguments.seconds(args, "--deadline"),
        "idle": arguments.seconds(args, "--idle"),
        "state": args["--state-dir"],
    }
    if level != "copy" and not args["--set"] and not args["--destination"] and base in (None, "last", "full"):
        raise UsageError("--level", f"{level} {NEEDS_CATALOG}")
    return checked


def ssh_options(args: dict[str, Any]) -> dict[str, Any]:
    """What vnb.base.ssh.Host.of_uri() takes beside the URI."""
    if args["--ssh-port"]:
        arguments.integer(args, "--ssh-port", 1, 65535)
    return {"user": args["--ssh-user"], "port": args["--ssh-port"], "key": args["--ssh-key"]}


def check_destination(args: dict[str, Any]) -> None:
    name = args.get("--destination")
    if name and args["--set"]:
        raise UsageError("--destination", "contradicts --set")
    if name and not name.isprintable():
        raise UsageError("--destination", "has characters that cannot be printed")


def check_chain(args: dict[str, Any]) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", args["--chain"]):
        raise UsageError("--chain", f'"{args["--chain"]}" has other characters than letters, digits, - and _')


def _images(args: dict[str, Any]) -> dict[str, str] | None:
    """{name: path} of --image, or None."""
    found = {}
    for operand in args["--image"]:
        name, _, path = operand.partition("=")
        if not path or not rules.is_safe_name(name):
            raise UsageError("--image", f'"{operand}" is not NAME=FILE')
        if name in found:
            raise UsageError("--image", f"{name} is given twice")
        found[name] = os.path.abspath(path)
    return found or None


def _begin(options: dict[str, Any]) -> int:
    from vnb.job.starter import start

    if os.isatty(1):
        raise Error("stdout", "is a terminal, and begin writes a stream for others to read: type > FILE behind it, or "
                    "| vnb-extents | vnb-read | vnb-pack -o DIR")
    out = output.stdout()
    keeper = start(options, log.note, log.warn)
    if "below" in keeper.begun:
        return _below(keeper, NOTHING_TO_DO)
    try:
        _write(out, keeper, options)
        keeper.hand_over()
    except BaseException:
        keeper.leave()
        raise
    return 0


def _run(options: dict[str, Any], command: list[str]) -> int:
    from vnb.job.starter import start

    _refuse_forgotten_quotes(options, command)
    keeper = start(options, log.note, log.warn)
    if "below" in keeper.begun:
        return _below(keeper, 0)
    head = keeper.begun["head"]
    point = head["point"]
    try:
        with Pipeline(command, _environment(options, head), keeper, head["domain"]) as pipeline:
            _write(_Feed(pipeline), keeper, options)
            pipeline.wait()
        keeper.finish("commit", proof=not options["no_proof"])
    except Error as error:
        keeper.leave()
        if keeper.saved and not isinstance(error, Saved):
            raise Saved(error.what, f"{error.reason}, but {point} is saved", error.where) from None
        if isinstance(error, CommandFailed):
            raise Error(error.what, f"{error.reason}: nothing is committed") from None
        raise
    except BaseException:
        keeper.leave()
        raise
    if options["strict"] and keeper.warnings:
        raise Saved(head["domain"], f"{point} is saved, but with --strict {keeper.warnings} warnings are a failure")
    return 0


def _below(keeper: Any, status: int) -> int:
    log.note(keeper.begun["below"])
    keeper.leave()
    return status


def _refuse_forgotten_quotes(options: dict[str, Any], command: list[str]) -> None:
    """Raise Mistyped where the stream of a command would go to our standard output, and on from there."""
    if options["no_proof"] or not leaves_by_stdout(command):
        return
    if os.isatty(1):
        raise Mistyped("COMMAND", "writes its stream to a terminal: | vnb-pack -o DIR stores it")
    if proof.pipe_of_stdout() is None:
        return
    typed = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else ["run", "..."]
    stages = [command[0] if len(command) == 1 else shlex.join(command), *readers_of_stdout()]
    line = f"vnb-checkpoint {shlex.join(typed)} -- {shlex.quote(' | '.join(stages))}"
    raise Mistyped("COMMAND", f"is only the first part of the pipeline: all of it has to be in quotes: {line}")


def _environment(options: dict[str, Any], head: Any) -> dict[str, str]:
    """All variables of the command of run."""
    environment = {**os.environ, **log.environment(), "VNB_SET": options["set"] or "", proof.STDOUT: ""}
    environment[proof.FILE] = JobDirectory(options["state"], head["uuid"]).taken(head["id"])
    if not options["no_proof"]:
        environment[proof.STDOUT] = proof.pipe_of_stdout() or ""
    # Started by its full path, as by cron, it has its siblings where PATH does not lead.
    for path in (os.path.abspath(sys.argv[0]), os.path.realpath(sys.argv[0])):
        directory = os.path.dirname(path)
        if os.access(os.path.join(directory, "vnb-extents"), os.X_OK):
            environment["PATH"] = f"{environment.get('PATH') or os.defpath}:{directory}"
            break
    empty = ("VNB_SET", proof.STDOUT)
    return {name: value for name, value in environment.items() if value is not None and (value or name not in empty)}


class _Feed(writing.Writer):
    """The stream to the command of run. Raises Error where that, or the keeper, ends before it has taken all."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline.stdin, "COMMAND")
        self._pipeline = pipeline

    def wait(self) -> None:
        self._pipeline.wait_to_write()

    def _writev(self, parts: list[memoryview]) -> None:
        try:
            super()._writev(parts)
        except Error as error:
            if error.what != self.name:
                raise  # not of the pipe: the keeper has ended the job
            # Whatever it did then, it did not store all of the stream.
            raise self._pipeline.failure(f"the command did not read its input ({error.reason})") from None


def _write(out: writing.Writer, keeper: Any, options: dict[str, Any]) -> None:
    """
    The stream: head, disks, files. A file that cannot be read is a warning, not the end of the backup.

    But one that the head describes is: a later increment would take it from here.
    """
    host = _host_of(options)
    segment = out.segment(keeper.begun["head"], keeper.begun["disks"])
    for file in keeper.begun["files"]:
        if "same" in file:
            segment.same({"role": file["role"], "path": file["path"], "mode": file["same"]})
            continue
        if "text" in file:
            parts = [file["text"].encode()]
            mode = 0o600
        else:
            try:
                mode, parts = domain_files.read(file["path"], host)
            except Error as error:
                if "sha256" in file:
                    raise
                keeper.warned(f"{error}: {file['role']} is not in the backup")
                continue
            if "sha256" in file and not domain_files.is_content(parts, file["sha256"]):
                raise Error(file["path"], f"the {file['role']} was replaced while the backup began: try again")
        size, offset = sum(map(len, parts)), 0
        for part in parts:
            fields: Any = {"role": file["role"], "path": file["path"], "mode": mode, "size": size, "offset": offset}
            segment.file(fields, part)
            offset += len(part)
    segment.end()


def _host_of(options: dict[str, Any]) -> Any:
    """The host of the domain, None where it is this one."""
    if options["images"]:
        return None
    from vnb.base.ssh import Host
    from vnb.virt.connection import default_uri

    return Host.of_uri(options["uri"] or default_uri(), **options["ssh"])


def _finish(args: dict[str, Any], what: str) -> None:
    from vnb.cli.checkpoint_cleanup import tell_of_job
    from vnb.cli.known_catalogs import open_domain
    from vnb.job.starter import ask

    images = _images(args)
    if images:
        from vnb.job.source_images import Images

        uuid = Images(images).uuid
    else:
        with open_domain(args) as domain:
            uuid = domain.uuid
    directory = JobDirectory(args["--state-dir"], uuid)
    answer = ask(directory, what, log.note, set_=args.get("--set"), proof=not args.get("--no-proof"))
    if answer is None and what == "commit":
        raise Error(
            args["DOMAIN"] or "--image", "there is no backup job of ours to commit: it has ended, or was begun with "
            "another state directory"
        )
    if answer is None and not images:
        with open_domain(args) as domain:
            tell_of_job(domain, log.note)
    if what == "commit" and answer is not None and answer.get("strict"):
        count = answer["strict"]
        raise Saved(args["DOMAIN"], f"the restore point is saved, but with --strict {count} warnings are a failure")
