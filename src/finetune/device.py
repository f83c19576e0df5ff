"""The device that an experiment runs on."""

import ctypes
import os
import warnings
from contextlib import suppress
from pathlib import Path

from finetune import claims
from finetune.errors import UserError

import torch
from filelock import FileLock
from torch import Tensor, nn

# Pictures that a frozen network takes at once, and how many such lots at a time. On the CPU each has one thread, so
# that the number of threads changes no bit of a result. SqueezeNet on 2 cores: 4.0 ms a picture in lots of 16, as in
# larger ones; 4.4 in lots of 4.
LOT = {"cpu": 16, "cuda": 64}
WORKERS = {"cpu": 64, "cuda": 4}

_claimed: list[FileLock] = []  # for as long as the process lives


def choose(name: str) -> torch.device:
    """Return the device of that name; `auto` is CUDA where there is one, else the CPU. Raises UserError.

    So is `all`, which means several for the training alone: each of its processes sees one.
    """
    if name in ("auto", "all"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            found = f"{count} CUDA device{'s'[: count != 1]}" if count else "no CUDA device"
            raise UserError(f"device = {name!r}, but torch finds {found} here. Set it to auto or cpu.")
    return device


def claim(name: str, folder: Path) -> torch.device:
    """Return the device of that name, as `choose` does; of several GPUs that it may be, the one claimed by fewest.

    This process claims it then, by a lock in the folder, until it ends. So jobs side by side have a GPU each while
    there are enough of them, and share them evenly beyond.
    """
    device = choose(name)
    if device.type != "cuda":
        return device
    numbers = range(torch.cuda.device_count()) if device.index is None else [device.index]
    claimed = {number: folder / str(torch.cuda.get_device_properties(number).uuid) for number in numbers}
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "choosing"):  # one at a time, or two would choose the same
            number = min(numbers, key=lambda each: claims.others(claimed[each]))
            _claimed.append(claims.hold(claimed[number]))
            return torch.device("cuda", number)
    return torch.device("cuda", numbers[0])  # what others claim can't be known


def make_deterministic() -> None:
    """Have torch take the same arithmetic each time, so that two runs of one seed are equal to the bit.

    On the CPU always; on CUDA but for the few operations that have no such form, as the gradient of adaptive pooling.
    https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
    torch.backends.cudnn.benchmark = False
    # torch.use_deterministic_algorithms(True, warn_only=True), which would import torch's compiler, in a second.
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # doubles the time of small operations, for debugging


def keep_freed_memory() -> None:
    """Have the C library keep the memory that is freed, where it is glibc's.

    It gives large blocks back to the system, so that each step's gradients and activations would be new pages, zeroed
    one by one: a step of AlexNet on the CPU took 1.6 times as long. And threads would each have memory of their own,
    with less room: SqueezeNet in two threads took 1.25 times as long.
    https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    trim_threshold, mmap_threshold, most_arenas = -1, -3, -8
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt and mallopt(mmap_threshold, 2**30):  # 0 where that is more than it takes
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(most_arenas, 1)


def seed(number: int) -> None:
    """Seed torch's generators, which its own function takes 1 ms for: it notes a traceback for each absent device."""
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def precision(name: str, place: torch.device) -> str:
    """Return what a setting means on a device, fp32 or bf16; `auto` is bf16 where the hardware computes in it."""
    if name != "auto":
        return name
    if place.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(place) >= (8, 0) else "fp32"
    known = [getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("avx512_bf16", "amx_tile")]
    return "bf16" if any(is_supported() for is_supported in known) else "fp32"


def about(place: torch.device) -> list[str]:
    """Return what a device's results may depend on: its type and name, or what instructions the processor has."""
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return [place.type, name]


class InBfloat16(nn.Module):
    """A network that computes in bfloat16 where that is enough, as torch's autocast sees it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16):
            return self.network(inputs)


def in_precision(network: nn.Module, name: str) -> nn.Module:
    """Return the network as it computes in fp32 or bf16. It is the same network: its tensors stay float32."""
    return InBfloat16(network) if name == "bf16" else network
