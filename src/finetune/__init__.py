"""Fine-tune pretrained image classifiers: the library that the stage scripts are written in."""

import gc
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

from finetune import uncompiled

# Importing torch takes seconds, in which Ctrl-C would show a traceback of torch's. From then on, stage.run handles it.
_script = getattr(sys.modules["__main__"], "__file__", None)
_is_ours = _script and Path(_script).resolve().parent == Path(__file__).resolve().parent.parent
if _is_ours and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# For how long GNU OpenMP's threads spin while they wait. By default for so long that two full fine-tunings on the same
# two cores took 36 s, with this 17, and a single one the same 4.8; with none at all, 11 and 5.7.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if _is_ours:
    gc.disable()  # until stage.run: importing torch and torchvision takes 2.1 s instead of 2.9

# `dvc` found by its full path starts the stages with whatever `python3` is on PATH.
_needed = ("numpy", "PIL", "psutil", "pydantic", "ruamel", "torch", "dvclive")
_missing = [name for name in _needed if not find_spec(name)]
if _missing:
    sys.exit(
        f"error: {sys.executable} has no {', '.join(_missing)}: the environment is not on PATH.\n"
        "Run `. .venv/bin/activate` (after `make setup`), then the same command again."
    )

from finetune import standby  # noqa: E402

if _is_ours:
    standby.take_over()
uncompiled.take_place()
