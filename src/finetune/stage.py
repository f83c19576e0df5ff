"""How a stage's script begins and ends: errors in a line or two, signals, and what starts it being killed."""

import gc
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from finetune import standby, starters
from finetune.errors import UserError, explained

POLL = 0.5  # seconds
END = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]  # the latter: a closed terminal


class Interrupted(Exception):
    """The user or the system asked the process to stop, and it has: the message says how to go on."""


def run(main: Callable[[], None]) -> None:
    """Run `main`, and end the process: with status 1 and a short message where the user can mend what went wrong.

    After a signal, with 128 and its number. What was written is whole, so the same command goes on from there.
    """
    gc.enable()  # the imports are done
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a queue's log is to grow while the stage works
    _handle(signal.SIGINT, signal.default_int_handler)
    for number in END:
        _handle(number, _interrupt)
    try:
        standby.leave_behind()
        if "DVC_ROOT" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:  # started by DVC, or finetune.distributed
            threading.Thread(target=_stop_with_parent, daemon=True).start()
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        known = explained(error)
        if known is None:
            raise
        sys.exit(f"error: {known}")
    except (KeyboardInterrupt, Interrupted) as error:
        number, *said = error.args or (signal.SIGINT,)
        print(*said or ["stopped. Nothing is half-written: the same command starts this stage again."], file=sys.stderr)
        sys.exit(128 + number)
    sys.stdout.flush()
    os._exit(0)  # all files are closed; taking torch's modules apart would take another second


@contextmanager
def deferred_signals() -> Iterator[Callable[[], signal.Signals | None]]:
    """Have SIGINT, SIGTERM and SIGHUP wait: yield a function that returns the one that came, or None.

    So that the caller can stop where it likes. A second Ctrl-C ends the process at once; a second SIGTERM does not, for
    a cluster sends one to all processes of a job, and then comes ours, for DVC has gone.
    """
    came: list[signal.Signals] = []

    def note(number: int, _frame: FrameType | None) -> None:
        came.append(signal.Signals(number))
        if len(came) == 1:
            _handle(signal.SIGINT, signal.SIG_DFL)
            with suppress(OSError):  # the terminal is gone
                os.write(2, f"\n{came[0].name}: finishing the batch and saving; Ctrl-C stops at once\n".encode())

    before = {number: _handle(number, note) for number in (signal.SIGINT, *END)}
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(number: int, handler: Callable | int) -> Callable | int | None:
    """Set a signal's handler, unless the process was started with the signal ignored; return the one before."""
    before = signal.getsignal(number)
    if before != signal.SIG_IGN:
        signal.signal(number, handler)
    return before


def _interrupt(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough
    raise KeyboardInterrupt(number)


def _stop_with_parent() -> None:
    """Stop this process when what started it is gone, or it would go on writing beside the next run."""
    while not starters.are_gone():
        time.sleep(POLL)
    os.kill(os.getpid(), signal.SIGTERM)
