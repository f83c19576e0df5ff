"""One experiment on several devices: a process for each, of which every one computes a part of each batch.

The stage starts the processes through torchrun's API, and waits for them. Each has the whole model. It computes the
logits of its part of a batch, gets those of the others, and so has the loss of the whole batch; and
DistributedDataParallel has all gradients be those of that loss. So the result is that of one device, within rounding.
The first process is the only one that writes.

With `CPU_PROCESSES=2` in the environment, `device: all` means two processes on the CPU, to try it without GPUs.
"""

import logging
import math
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from finetune import dropout, stage
from finetune.errors import UserError

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)  # for the others to take part; an epoch's features, or a large file, may take a while
FOR_THE_RUN = timedelta(days=20)  # for another process to train this very run; torch counts milliseconds in 32 bits
GRACE = 2.0  # seconds in which torchrun notices that a process has ended, and ends the others
POLL = 0.1


# Processes ------------------------------------------------------------------------------------------------------------


def is_member() -> bool:
    """Tell whether this process is one of several that train together, as torchrun says to those that it starts."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    """Tell whether this process writes: the first of several, or a single one."""
    return not is_member() or os.environ["RANK"] == "0"


def size() -> int:
    """Return how many processes train together, this one among them; 1 until they have begun."""
    return distributed.get_world_size() if is_member() and distributed.is_initialized() else 1


def processes(device: str) -> int:
    """Return how many processes the setting `device` asks this one to start; 1 stands for itself alone."""
    if device != "all" or is_member():
        return 1
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    count = int(os.environ.get("CPU_PROCESSES", gpus))
    if count < 2:
        print(f"device: all, and torch finds {gpus or 'no'} CUDA device{'s'[: gpus != 1]} here: as with auto")
    return max(1, count)


def launch(script: Path, count: int) -> None:
    """Run a script in that many processes, a device each, until all have ended well. Raises UserError, SystemExit.

    A signal that comes is passed on to them; if one of them fails, the others are ended.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def stop(number: int, _frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second one ends this process, whose loss the others notice
        raise SignalException("", sigval=signal.Signals(number))

    on_cpu = "CPU_PROCESSES" in os.environ
    if on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    handled = [each.name for each in stage.END if signal.getsignal(each) != signal.SIG_IGN]
    logging.disable(logging.ERROR)  # what it says about signals and ends, this project says itself
    print(f"device: all: training in {count} processes, each on a {'part of the CPU' if on_cpu else 'GPU of its own'}")
    with tempfile.TemporaryDirectory(prefix="train-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=POLL,
            signals_to_handle=",".join(handled),
            virtual_local_rank=not on_cpu,
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects={rank: Std.ALL for rank in range(1, count)}),
        )
        try:
            if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
                signal.signal(signal.SIGINT, stop)
            elastic_launch(config, sys.executable)(str(script))
        except SignalException as error:
            sys.exit(128 + error.sigval)
        except ChildFailedError as error:
            rank, failure = next(iter(error.failures.items()))  # the others were ended for it
            if failure.exitcode < 0:
                raise UserError(
                    f"process {rank + 1} of {count} was ended by {signal.Signals(-failure.exitcode).name}, and the "
                    "others with it.\nThe same command goes on from the last checkpoint."
                ) from None
            for file in Path(folder).glob(f"**/{rank}/stderr.log"):
                sys.stderr.write(file.read_text())
            sys.exit(failure.exitcode)


@contextmanager
def ended_together() -> Iterator[None]:
    """Have the error be told that came first, in the process in which it did, where several train together."""
    try:
        yield
    except Exception as error:
        mine = isinstance(error, stage.Interrupted) or (is_first() and isinstance(error, UserError | OSError))
        if is_member() and not mine:
            import psutil

            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(GRACE)
            if len(psutil.Process(os.getppid()).children()) < int(os.environ["WORLD_SIZE"]):
                os._exit(1)  # another process has ended, and so the first exchange with it failed
        raise


def begin() -> None:
    """Meet the other processes, if there are any: the first is there once it holds the run."""
    if not is_member():
        return
    store, rank, count = next(distributed.rendezvous("env://", timeout=FOR_THE_RUN))
    if rank == 0:
        store.set("held", "")
    while not store.check(["held"]):
        time.sleep(POLL)
    store.set_timeout(TIMEOUT)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)


# What they tell each other --------------------------------------------------------------------------------------------


def from_first(value: T) -> T:
    """Return what the first process gave."""
    values = [value]
    if size() > 1:
        distributed.broadcast_object_list(values)
    return values[0]


def largest(*values: int) -> list[int]:
    """Return the largest that any process gave, of each value."""
    if size() == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.int64)
    distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
    return numbers.tolist()


def joined(values: list[T]) -> list[T]:
    """Return the values of all processes, the first one's first."""
    lists = [values] * size()
    if size() > 1:
        distributed.all_gather_object(lists, values)
    return [value for each in lists for value in each]


# Batches --------------------------------------------------------------------------------------------------------------


def rows(part: slice) -> slice:
    """Return those of a part that are this process's: all on one device, none of few on many."""
    count, rank = size(), distributed.get_rank() if size() > 1 else 0
    length = part.stop - part.start
    return slice(part.start + length * rank // count, part.start + length * (rank + 1) // count)


def share(part: slice) -> slice:
    """Return the rows of a batch that this process has to prepare: its own, or one that shows it their shape."""
    own = rows(part)
    return own if own.start < own.stop else slice(part.start, part.start + 1)


def logits(model: nn.Module, inputs: Tensor, count: int) -> Tensor:
    """Return the logits of a batch, [count, classes]; `inputs` are those of this process's share of it."""
    if size() == 1:
        return model(inputs)
    own = rows(slice(0, count))
    with _WholeBatch(own, count):
        result = model(inputs[: own.stop - own.start])
    whole = result.new_zeros(count, *result.shape[1:], dtype=torch.float32)
    whole[own] = result.float()
    return _Sum.apply(whole).to(result.dtype)


def parallel(module: nn.Module) -> nn.Module:
    """Return the module as it trains in this and the other processes; the same on one device."""
    return nn.parallel.DistributedDataParallel(module) if size() > 1 else module


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes. Its gradient is that of the sum of their losses.

    They all have the same loss, and DistributedDataParallel takes the mean of their gradients.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _Sum.backward(ctx, values)

    @staticmethod
    def backward(ctx: Any, values: Tensor) -> Tensor:
        result = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(result)
        return result


class _WholeBatch(TorchFunctionMode):
    """Has a network that is given some rows of a batch do with them what it would if it were given them all.

    Batch norm takes the statistics of the whole batch. Dropout, and what else draws a number for each row, as
    stochastic depth does, draws for the whole batch.
    """

    def __init__(self, own: slice, count: int):
        super().__init__()
        self._own, self._count = own, count

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is functional.batch_norm and kwargs["training"]:
            return self._batch_norm(*args, **kwargs)
        if function is dropout.drop or (function is functional.dropout and kwargs["training"]):
            return self._dropout(function, *args, **kwargs)
        if function is Tensor.bernoulli_:
            whole, own = self._rows(len(args[0]))
            drawn = function(args[0].new_empty(whole, *args[0].shape[1:]), *args[1:], **kwargs)
            return args[0].copy_(drawn[own])
        return function(*args, **kwargs)

    def _rows(self, length: int) -> tuple[int, slice]:
        """Return how many rows the whole batch makes where this process's make so many, and which of them these are."""
        size = self._own.stop - self._own.start
        each = length // size if size else 1  # more than one where a picture is cut up, as into windows
        return self._count * each, slice(self._own.start * each, self._own.stop * each)

    def _dropout(self, function: Any, input: Tensor, p: float, **kwargs: Any) -> Tensor:
        whole, own = self._rows(len(input))
        is_channels_last = input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if is_channels_last else torch.contiguous_format
        ones = torch.ones(whole, *input.shape[1:], dtype=input.dtype, device=input.device).to(memory_format=order)
        return input * function(ones, p, **kwargs)[own]

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Return what functional.batch_norm does in training."""
        axes = [axis for axis in range(input.ndim) if axis != 1]
        shape = [1, -1] + [1] * (input.ndim - 2)
        count = self._rows(len(input))[0] * math.prod(input.shape[2:])
        if count == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        values = input.float()
        mean = _Sum.apply(values.sum(axes)) / count
        centred = values - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes)) / count
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean, momentum)
                running_var.lerp_(variance * (count / (count - 1)), momentum)
        result = centred * (variance + eps).rsqrt().view(shape)
        if weight is not None and bias is not None:
            result = result * weight.view(shape) + bias.view(shape)
        return result.to(input.dtype)
