# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one runner of all commands: arguments in, outcome to stderr and exit status, as vnb(7) says."""

import importlib
import os
import signal
import sys

from vnb import __version__
from vnb.errors import Error, Interrupted, OutputClosed, UsageError

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def command(name, module):
    """Run the command called name, whose usage text and main(args) are in module. Does not return."""
    sys.exit(outcome(name, importlib.import_module(module), sys.argv[1:]))


def outcome(name, module, argv):
    """Run module.main and return the exit status; dies by a signal where that is the outcome."""
    from docopt import DocoptExit, docopt

    debug = "--debug" in argv[: argv.index("--") if "--" in argv else None]
    for signum in ENDING_SIGNALS:
        # A signal that is ignored stays so: nohup(1) and shells without job control rely on it.
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _interrupt)
    try:
        try:
            args = docopt(module.__doc__, argv, help=False, options_first=getattr(module, "OPTIONS_FIRST", False))
        except DocoptExit as exit_:
            reason = str(exit_).replace(str(DocoptExit.usage), "").strip()
            raise UsageError(None, reason or "wrong usage") from None
        if args.get("--help"):
            _print(module.__doc__.strip())
        elif args.get("--version"):
            _print(f"{name} {__version__}")
        else:
            status = module.main(args) or 0
            sys.stdout.flush()
            return status
        return 0
    except UsageError as error:
        print(f"{name}: {error}", DocoptExit.usage.strip(), sep="\n", file=sys.stderr)
        return 2
    except Error as error:
        return _fail(name, error, debug)
    except OutputClosed:
        _die(signal.SIGPIPE)
    except BrokenPipeError as error:
        # Only sys.stdout (text) gets here: vnb.stream makes OutputClosed of its own.
        if _is_stdout_closed():
            _die(signal.SIGPIPE)
        return _fail(name, Error(None, error.strerror), debug)
    except OSError as error:
        return _fail(name, Error(error.filename, error.strerror or str(error)), debug)
    except MemoryError:
        return _fail(name, Error(None, "out of memory"), debug)
    except Interrupted as interrupted:
        if interrupted.signum != signal.SIGINT:
            print(f"{name}: ended by {signal.Signals(interrupted.signum).name}", file=sys.stderr)
        _die(interrupted.signum)


def note(name, text):
    """One line for people on stderr, from a command that goes on."""
    from vnb.errors import one_line

    print(f"{name}: {one_line(text)}", file=sys.stderr, flush=True)


def _print(text):
    print(text)
    sys.stdout.flush()


def _fail(name, error, debug):
    if debug:
        import traceback

        traceback.print_exc()
    print(f"{name}: {error}", file=sys.stderr)
    return 1


def _interrupt(signum, _stack):
    # A second signal must not break the cleaning up that the first one started.
    for other in ENDING_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(signum)


def _is_stdout_closed():
    import select

    poll = select.poll()
    poll.register(1, select.POLLOUT)
    return any(events & select.POLLERR for _fd, events in poll.poll(0))


def _die(signum):
    """End by this signal, so that a shell sees what happened, with nothing more on stdout."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # what Python still has buffered for stdout goes nowhere
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    signal.pause()
