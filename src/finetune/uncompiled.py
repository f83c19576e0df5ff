"""Stand-ins for torch's compiler, which takes 1.2 s to import, and for the shapes that it knows, which take 0.5 s.

Optimizers and torchvision import the former to have it not compile. torch itself imports the latter: what each
operation would return of tensors without values, which the compiler and torch.export ask. What the others ask is
answered here, and whoever asks for more gets the modules themselves.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

PACKAGE = "torch._dynamo"
SHAPES = "torch._meta_registrations"
MODULES = (PACKAGE, f"{PACKAGE}.utils", SHAPES)


class StandIn(ModuleType):
    """A module that has some functions of its own, and imports the one that it stands for once another is asked for."""

    def __getattr__(self, name: str) -> Any:
        # The import system asks all modules for such names; for the package's path, to import a part of it.
        if name.startswith("__") and (self.__name__, name) != (PACKAGE, "__path__"):
            raise AttributeError(name)
        leave()
        return getattr(import_module(self.__name__), name)


def take_place() -> None:
    """Have the modules stood in for, unless they are there already."""
    standing = {name: StandIn(name) for name in MODULES}
    vars(standing[PACKAGE]).update(disable=_as_it_is, graph_break=_nothing)
    vars(standing[f"{PACKAGE}.utils"]).update(is_compile_supported=_is_compile_supported)
    for name, module in standing.items():
        sys.modules.setdefault(name, module)


def leave() -> None:
    """Have the next who imports the compiler get it, and torch know its operations' shapes."""
    for name in MODULES:
        if isinstance(sys.modules.get(name), StandIn):
            del sys.modules[name]
    import_module(SHAPES)


def _as_it_is(function: Callable, recursive: bool = True, **_: Any) -> Callable:
    """Return a function for which the compiler is turned off."""
    return function


def _nothing(*_: Any) -> None:
    """Have what is being compiled end here."""


def _is_compile_supported(device_type: str) -> bool:
    return False
