"""One digest for whatever is saved, so that a damaged file is never taken for a whole one."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest(value: Any) -> str:
    """Return the sha256, in hexadecimal, of tensors and plain values in any nesting of mappings and lists.

    Of tensors the type, shape and values count; of mappings not the order. So it is the same wherever they were read.
    """
    result = hashlib.sha256()
    _add(result, value)
    return result.hexdigest()


def _add(result, value: Any) -> None:
    if isinstance(value, Tensor):
        result.update(f"tensor {value.dtype} {tuple(value.shape)}\n".encode())
        result.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        result.update(f"mapping {len(value)}\n".encode())
        for key in sorted(value, key=repr):
            _add(result, key)
            _add(result, value[key])
    elif isinstance(value, list | tuple):
        result.update(f"list {len(value)}\n".encode())
        for each in value:
            _add(result, each)
    else:
        result.update(f"{type(value).__name__} {value!r}\n".encode())
