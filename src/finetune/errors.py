"""What a user can mend, told in a line or two and without a traceback."""

import difflib
import errno
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ' Nearest: a, b.' with the known names most like `name`, or '' where none is like it."""
    matches = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f" Nearest: {', '.join(matches)}." if matches else ""


def disk_is_full(error: Exception) -> bool:
    """Tell whether the error is that of a full disk, or of a used-up quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def run_stage(main: Callable[[], None]) -> None:
    """Run `main`; end the process with status 1 and a short message where the user can mend what went wrong."""
    sys.stdout.reconfigure(line_buffering=True)  # a queue's log is to grow while the stage works
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if not disk_is_full(error):
            raise
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(f"error: the disk is full{where}.\nFree some space (`dvc gc --workspace` is one way), then run again.")
    except KeyboardInterrupt:
        sys.exit("interrupted")
