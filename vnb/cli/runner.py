# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one runner of all commands: arguments in, outcome to stderr and exit status, as vnb(7) says."""

from __future__ import annotations

import importlib
import os
import signal
import sys

from vnb import __version__
from vnb.base import log, signals
from vnb.base.errors import Error, Followed, Interrupted, Mistyped, OutputClosed, Saved, UsageError, lack, os_error
from vnb.cli import arguments

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


TYPE_CHECKING = False
if TYPE_CHECKING:
    pass


SAVED_BUT = 3  # exit status: saved, but something after it has failed


def command(name: str, module: str) -> None:
    """Run the command called name, whose usage text and main(args) are in module. Does not return."""
    _open_standard_descriptors()
    sys.exit(outcome(name, module, sys.argv[1:]))


def outcome(name: str, module: Any, argv: Sequence[str]) -> Any:
    """
    Run main() of a module and return the exit status; dies by a signal where that is the outcome.

    module (module or str): imported here where it is a name, since that takes long enough to be interrupted.
    """
    debug = "--debug" in argv[: argv.index("--") if "--" in argv else None]
    usage = args = None
    try:
        log.begin(name)
        for signum in signals.SIGNALS:
            # A signal that is ignored stays so: nohup(1) and shells without job control rely on it.
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, signals.handle)
        from docopt import DocoptExit

        if isinstance(module, str):
            module = importlib.import_module(module)
        usage = arguments.usage(_text(module, argv))
        try:
            args = _parse(usage, argv, module)
        except DocoptExit as exit_:
            raise UsageError(None, _misuse(usage, argv, module, str(exit_).partition("\n")[0])) from None
        if args.get("SUBCOMMAND"):
            known = ", ".join(module.SUBCOMMANDS)
            raise UsageError(None, f'unknown subcommand "{args["SUBCOMMAND"]}"; expected one of {known}')
        arguments.refuse_empty(args)
        log.choose(args)
        if args.get("--help"):
            show(usage, flush=True)
        elif args.get("--version"):
            from vnb.cli.versions import libraries

            show(f"{name} {__version__} ({libraries()})\n", flush=True)
        else:
            status = module.main(args) or 0
            show("", flush=True)
            return status
        return 0
    except UsageError as error:
        log.error(error, "" if usage is None or isinstance(error, Mistyped) else _synopsis(usage))
        return 2
    except Saved as error:
        return _fail(error, debug, SAVED_BUT)
    except Error as error:
        return _fail(error, debug, module=module, args=args)
    except OutputClosed:
        _die(signal.SIGPIPE)
    except BrokenPipeError as error:
        # Only sys.stdout (text) gets here: vnb.format.stream makes OutputClosed of its own.
        if _is_stdout_closed():
            _die(signal.SIGPIPE)
        return _fail(Error(None, error.strerror), debug)
    except OSError as error:
        return _fail(Error(error.filename, error.strerror or str(error)), debug, module=module, args=args)
    except (ImportError, MemoryError, RuntimeError) as error:
        lacking = lack(error)
        if lacking is None:
            raise
        return _fail(lacking, debug, module=module, args=args)
    except Interrupted as interrupted:
        if interrupted.signum != signal.SIGINT:
            log.error(f"ended by {signal.Signals(interrupted.signum).name}")
        _die(interrupted.signum)


def _text(module, argv):
    """The usage text that a command line is about: that of the subcommand in it, where the module has subcommands."""
    subcommands = getattr(module, "SUBCOMMANDS", {})
    words = argv[: argv.index("--")] if "--" in argv else argv
    return next((subcommands[word] for word in words if word in subcommands), module.__doc__)


def _synopsis(usage):
    from vnb.cli.usage import Usage

    return f"\nUsage:\n{Usage(usage).synopsis}"


def _parse(usage, argv, module):
    """The dict of docopt, or of docopt-ng, which has its name and hides it; DocoptExit where the line is wrong."""
    from docopt import docopt

    # help and version by their places: the one has another name there.
    return docopt(usage, argv, False, None, options_first=getattr(module, "OPTIONS_FIRST", False))


def _misuse(usage, argv, module, said):
    """Why docopt refuses this command line. It said so only where it is about one option."""
    from docopt import DocoptExit

    from vnb.cli import misuse
    from vnb.cli.usage import Usage

    text = Usage(usage)
    wrong = text.wrong_option(argv) or (said if said.startswith("-") else None)
    if wrong:
        return wrong

    def parse(words):
        try:
            return _parse(usage, words, module)
        except DocoptExit:
            return None

    return misuse.reason(text, argv, parse)


def show(text: str, flush: bool = False) -> None:
    """Write text to standard output. Raises Error, or BrokenPipeError where nobody reads it."""
    try:
        if text:  # nothing can be written to what cannot be written to
            sys.stdout.write(text)
        if flush:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise os_error("stdout", error) from None


def _fail(error, debug, status=1, module=None, args=None):
    if debug:
        import traceback

        sys.stderr.write(traceback.format_exc())
    try:
        sys.stdout.flush()  # what was printed before it failed comes first
    except OSError:
        _discard_stdout()
    say = log.error
    if isinstance(error, Followed):
        from vnb.cli.stdio import said_by_another  # it has the format with it, which is imported where it is handled

        say = log.detail if said_by_another(error) else log.error
    say(error)
    if args is not None and getattr(module, "writes_stream", lambda _: False)(args):
        from vnb.cli import output

        output.tell_of_failure()
    return status


def _is_stdout_closed():
    import select

    poll = select.poll()
    poll.register(1, select.POLLOUT)
    return any(events & select.POLLERR for _fd, events in poll.poll(0))


def _die(signum):
    """End by this signal, so that a shell sees what happened, with nothing more on stdout."""
    _discard_stdout()
    sys.unraisablehook = lambda _: None  # Python tells of a second one that comes just now
    signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signum])  # whoever started us may have left it blocked
    os.kill(os.getpid(), signum)
    signal.pause()


def _discard_stdout():
    """What Python still has buffered for stdout goes nowhere, now and at its exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _open_standard_descriptors():
    """
    Open what is closed of stdin, stdout and stderr, so that using it fails, or for stderr does nothing.

    Else the next file that is opened gets its number, and what is printed goes into a backup.
    """
    for fd, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDWR)):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    # A name in a stream may have letters that the terminal's encoding does not have.
    sys.stdout.reconfigure(errors="backslashreplace")
