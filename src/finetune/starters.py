"""Who waits for what this process does, and whose end is to be its own."""

import sys
from contextlib import suppress

import psutil


def starters() -> list[int]:
    """Return the process that started this one; and where that is the shell of a command, the one that waits for it.

    DVC runs a stage's command in $SHELL. bash and zsh become what they start; dash, a usual /bin/sh, stays in between,
    and outlives DVC.
    """
    found = []
    with suppress(psutil.Error):  # it has just ended
        found.append(psutil.Process().ppid())
        words = psutil.Process(found[0]).cmdline()
        if "-c" in words[:-1] and sys.argv[0] in words[-1]:
            found.append(psutil.Process(found[0]).ppid())
    return found
