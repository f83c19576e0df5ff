"""A stand-in for torch's compiler, which takes 1.2 s to import: optimizers and torchvision do, to have it not compile.

What they ask is answered here. Whoever asks for more gets the compiler itself.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

PACKAGE = "torch._dynamo"
MODULES = (PACKAGE, f"{PACKAGE}.utils")


class StandIn(ModuleType):
    """A module that has some functions of its own, and imports the one that it stands for once another is asked for."""

    def __getattr__(self, name: str) -> Any:
        # The import system asks all modules for such names; for the package's path, to import a part of it.
        if name.startswith("__") and (self.__name__, name) != (PACKAGE, "__path__"):
            raise AttributeError(name)
        leave()
        return getattr(import_module(self.__name__), name)


def take_place() -> None:
    """Have the compiler stood in for, unless it is there already."""
    if PACKAGE not in sys.modules:
        compiler, utils = (StandIn(name) for name in MODULES)
        vars(compiler).update(disable=_as_it_is, graph_break=_nothing)
        vars(utils).update(is_compile_supported=_is_compile_supported)
        sys.modules.update(zip(MODULES, (compiler, utils), strict=True))


def leave() -> None:
    """Have the next who imports the compiler get it."""
    for name in MODULES:
        if isinstance(sys.modules.get(name), StandIn):
            del sys.modules[name]


def _as_it_is(function: Callable, recursive: bool = True, **_: Any) -> Callable:
    """Return a function for which the compiler is turned off."""
    return function


def _nothing(*_: Any) -> None:
    """Have what is being compiled end here."""


def _is_compile_supported(device_type: str) -> bool:
    return False
