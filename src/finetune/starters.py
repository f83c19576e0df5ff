"""Who waits for what this process does, and whose end is to be its own."""

import ctypes
import os
import signal
import sys
from contextlib import suppress

import psutil

VARIABLE = "STANDBY_ASKED_BY"  # with which a fork of finetune.standby begins: itself, who asked for it, and STARTED_BY


def process() -> psutil.Process:
    """Return this process, or that for which it stands."""
    return psutil.Process(ASKED_BY)


def starters() -> list[int]:
    """Return the process that started this one; and where that is the shell of a command, the one that waits for it.

    DVC runs a stage's command in $SHELL. bash and zsh become what they start; dash, a usual /bin/sh, stays in between,
    and outlives DVC.
    """
    found = []
    with suppress(psutil.Error):  # it has just ended
        found.append(process().ppid())
        words = psutil.Process(found[0]).cmdline()
        if "-c" in words[:-1] and sys.argv[0] in words[-1]:
            found.append(psutil.Process(found[0]).ppid())
    return found


def are_gone() -> bool:
    """Tell whether one that has started this process has ended since."""
    return not STARTED_BY or starters() != STARTED_BY


def end_with_parent() -> None:
    """Have Linux send this process a SIGTERM when its parent ends."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


_own, *_asked = map(int, os.environ.pop(VARIABLE, "0").split())
ASKED_BY = _asked[0] if _own == os.getpid() else None
STARTED_BY = _asked[1:] if ASKED_BY else starters()  # as it began: they may end while torch is being imported
