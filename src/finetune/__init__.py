"""Fine-tune pretrained image classifiers: the library that the stage scripts are written in."""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

PARENT = os.getppid()  # of when the process began: it may be killed while torch is being imported

# Importing torch takes seconds, in which Ctrl-C would show a traceback of torch's. From then on, stage.run handles it.
_script = getattr(sys.modules["__main__"], "__file__", None)
_is_ours = _script and Path(_script).resolve().parent == Path(__file__).resolve().parent.parent
if _is_ours and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Else torch's threads spin while they wait: on cores that several runs share, that takes ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# `dvc` found by its full path starts the stages with whatever `python3` is on PATH.
_missing = [name for name in ("numpy", "PIL", "pydantic", "ruamel", "torch", "dvclive") if not find_spec(name)]
if _missing:
    sys.exit(
        f"error: {sys.executable} has no {', '.join(_missing)}: the environment is not on PATH.\n"
        "Run `. .venv/bin/activate` (after `make setup`), then the same command again."
    )
