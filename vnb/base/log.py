# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What a command says on standard error, or in the journal: the one place that such lines go through.

    vnb-cat: /backup/vm1: No such file or directory                                     text
    vnb-cat: [3f2a91c0] /backup/vm1: No such file or directory                          text, verbose: with the run
    {"time": ..., "command": "vnb-cat", "priority": "error", "run": ..., "message": ...}                        json

One process is one command, so what was chosen for it is chosen once: begin(), choose(). Options say more than the
environment, which a pipeline needs to be given only once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping

from vnb.base import terminal
from vnb.base.errors import UsageError, one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


FORMATS = ("text", "json", "journald")
LEVELS = ("quiet", "normal", "verbose")
ERROR, WARNING, NOTICE, INFO = 3, 4, 5, 6  # as syslog(3) has them
NAMES = {ERROR: "error", WARNING: "warning", NOTICE: "notice", INFO: "info"}
FILE = "VNB_LOG_FILE"  # the variable with the path of a file that lines are written to as well
_MOST = {"quiet": WARNING, "normal": NOTICE, "verbose": INFO}
LONGEST_RUN = 255  # it goes into heads
JOURNAL_SOCKET = "/run/systemd/journal/socket"


class _Chosen:
    """What was chosen. line (object with hidden(), or None): what this process shows in the terminal's last line."""

    command = "vnb"
    format = "text"
    level = "normal"
    run: str | None = None
    line: Any = None


def begin(command: str) -> None:
    """Say all under the name of a command, as the environment wants it. Raises UsageError."""
    _Chosen.command = command
    _Chosen.run = os.environ.get("VNB_RUN") or None
    if _Chosen.run and (len(_Chosen.run) > LONGEST_RUN or not _Chosen.run.isprintable()):
        raise UsageError("VNB_RUN", f"is not a name of at most {LONGEST_RUN} printable characters")
    _set_level(os.environ.get("VNB_LOG_LEVEL") or "normal", "VNB_LOG_LEVEL")
    _set_format(os.environ.get("VNB_LOG_FORMAT") or "text", "VNB_LOG_FORMAT")
    if os.environ.get(FILE):
        try:
            os.close(_open_file())
        except OSError as failure:
            raise UsageError(FILE, f"{os.environ[FILE]}: {failure.strerror}") from None


def choose(args: Mapping[str, Any]) -> None:
    """The same by options: --verbose, --quiet, --log-format. Raises UsageError."""
    if args.get("--verbose") and args.get("--quiet"):
        raise UsageError("--quiet", "contradicts --verbose")
    if args.get("--verbose") or args.get("--quiet"):
        _set_level("verbose" if args.get("--verbose") else "quiet", None)
    if args.get("--log-format"):
        _set_format(args["--log-format"], "--log-format")


def environment() -> dict[str, str | None]:
    """What was chosen, as the variables by which commands that are started choose the same, and the run."""
    return {"VNB_LOG_LEVEL": _Chosen.level, "VNB_LOG_FORMAT": _Chosen.format, "VNB_RUN": _Chosen.run}


def name_run() -> None:
    """This process is the first of a run: name it, also for those that it starts."""
    if not os.environ.get("VNB_RUN"):
        import secrets

        os.environ["VNB_RUN"] = secrets.token_hex(4)
    _Chosen.run = os.environ["VNB_RUN"]


def take_run(head: Mapping[str, Any]) -> None:
    """A segment with this head begins: all that follows is of its run, where the environment names no other one."""
    if not os.environ.get("VNB_RUN"):
        _Chosen.run = head.get("run")
    detail(f'{head["domain"]}: {head["point"]}: level {head["level"]}')


def run() -> str | None:
    """The name of the run, or None as long as it is not known."""
    return _Chosen.run


def command() -> str:
    """The name of this command."""
    return _Chosen.command


def is_verbose() -> bool:
    return _Chosen.level == "verbose"


def is_quiet() -> bool:
    return _Chosen.level == "quiet"


def error(failure: object, more: str = "") -> None:
    """What failed (Error, or a line). more: lines for people alone."""
    _tell(ERROR, str(failure), more)


def warn(text: object) -> None:
    """What goes on, but not as it should."""
    _tell(WARNING, one_line(text))


def note(text: object) -> None:
    """What a user should know of a command that goes on."""
    _tell(NOTICE, one_line(text))


def detail(text: object) -> None:
    """What --verbose asks for."""
    _tell(INFO, one_line(text))


def record(**fields: object) -> None:
    """A JSON line for programs on standard error, with time, command and run; values as JSON has them."""
    import json

    _write(json.dumps({"time": _now(), "command": _Chosen.command, "run": _Chosen.run, **fields}))


def _set_level(level: str, what: str | None) -> None:
    if level not in LEVELS:
        raise UsageError(what, f'"{level}" is not one of {", ".join(LEVELS)}')
    _Chosen.level = level


def _set_format(format_: str, what: str | None) -> None:
    if format_ not in FORMATS:
        raise UsageError(what, f'"{format_}" is not one of {", ".join(FORMATS)}')
    _Chosen.format = format_
    missing = _missing_for_journal() if format_ == "journald" else None
    if missing is not None:
        _Chosen.format = "text"  # that is no reason to do nothing
        warn(f"{what}: journald: {missing}: logging to standard error instead")


def _missing_for_journal() -> str | None:
    """Why nothing can be sent to the journal, or None."""
    try:
        from systemd import journal  # noqa: F401
    except ImportError:
        return "systemd's Python module is not installed (package python3-systemd)"
    if not os.path.exists(JOURNAL_SOCKET):
        # The library would succeed, and all that is said would be lost.
        return f"there is no journal ({JOURNAL_SOCKET})"
    return None


def _tell(priority: int, text: str, more: str = "") -> None:
    if os.environ.get(FILE) and priority <= max(NOTICE, _MOST[_Chosen.level]):
        _to_file(text)
    if priority > _MOST[_Chosen.level]:
        return
    if _Chosen.format == "json":
        record(priority=NAMES[priority], message=text)
    elif _Chosen.format == "journald":
        _send(priority, text)
    else:
        run = f"[{one_line(_Chosen.run)}] " if _Chosen.run and is_verbose() else ""
        _write(f"{_Chosen.command}: {run}{text}{more}")


def _to_file(text: str) -> None:
    """Write a line to the end of the log file; opened for each, as a keeper lives on and must not hold it open."""
    run = f"[{one_line(_Chosen.run)}] " if _Chosen.run else ""
    with contextlib.suppress(OSError):  # it is said on standard error, too
        fd = _open_file()
        try:
            os.write(fd, f"{_now()} {_Chosen.command}: {run}{one_line(text)}\n".encode(errors="backslashreplace"))
        finally:
            os.close(fd)


def _open_file() -> int:
    return os.open(os.environ[FILE], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY, 0o600)


def _now() -> str:
    import datetime

    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _send(priority: int, text: str) -> None:
    from systemd import journal

    fields = {"VNB_RUN": _Chosen.run} if _Chosen.run else {}
    try:
        journal.send(text, PRIORITY=priority, SYSLOG_IDENTIFIER=_Chosen.command, **fields)
    except OSError as failure:
        _write(f"{_Chosen.command}: {text} (not in the journal: {failure.strerror})")


def _write(text: str) -> None:
    hidden = terminal.hidden() if _Chosen.line is None else _Chosen.line.hidden()
    # Nobody is left to be told when this fails, and what came before is told by the exit status.
    with contextlib.suppress(OSError), hidden as erase:
        # In one write(2): standard error is shared, and what others say must not come between a line and its end.
        sys.stderr.write(f"{erase}{text}\n")
        sys.stderr.flush()


def show_line(line: Any) -> None:
    """Have a line (object with hidden(), or None) make room for all that is said from now on."""
    _Chosen.line = line
