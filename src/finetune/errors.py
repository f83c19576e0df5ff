"""What a user can mend, told in a line or two and without a traceback."""

import difflib
import errno
import re
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ' Nearest: a, b.' with the known names most like `name`, or '' where none is like it."""
    matches = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f" Nearest: {', '.join(matches)}." if matches else ""


def disk_is_full(error: Exception) -> bool:
    """Tell whether the error is that of a full disk, or of a used-up quota."""
    said = re.search(r"\(os error (\d+)\)", str(error))  # safetensors' own error
    number = error.errno if isinstance(error, OSError) else said and int(said[1])
    return number in (errno.ENOSPC, errno.EDQUOT)


def explained(error: OSError) -> UserError | None:
    """Return what to tell of an error of the file system that the user can mend, or None."""
    where = f" ({error.filename})" if error.filename else ""
    if disk_is_full(error):
        return UserError(f"the disk is full{where}.\nFree some space (`dvc gc -w` is one way), then run again.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"{error.strerror}{where}.\nMake it readable and writable for this user, then run again.")
    return None
