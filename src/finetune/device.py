"""The device that an experiment runs on."""

import ctypes
import os
import warnings

from finetune.errors import UserError

import torch


def choose(name: str) -> torch.device:
    """Return the device of that name; `auto` is CUDA where there is one, else the CPU. Raises UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            found = f"{count} CUDA device{'s'[: count != 1]}" if count else "no CUDA device"
            raise UserError(f"params.yaml: device = {name!r}, but torch finds {found} here. Set device to auto or cpu.")
    return device


def make_deterministic() -> None:
    """Have torch take the same arithmetic each time, so that two runs of one seed are equal to the bit.

    On the CPU always; on CUDA but for the few operations that have no such form, as the gradient of adaptive pooling.
    https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # doubles the time of small operations, for debugging


def keep_freed_memory() -> None:
    """Have the C library keep the memory that is freed, where it is glibc's.

    It gives large blocks back to the system, so that each step's gradients and activations would be new pages, zeroed
    one by one: a step of AlexNet on the CPU took 1.6 times as long. https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    trim_threshold, mmap_threshold = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt and mallopt(mmap_threshold, 2**30):  # 0 where that is more than it takes
        mallopt(trim_threshold, 2**31 - 1)
