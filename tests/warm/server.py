"""A process that has imported DVC, on standby for `dvc`: python tests/warm/server.py ADDRESS; see sitecustomize.py."""

import importlib
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "src"))
from finetune import standby, starters

from celery.app.control import Inspect

DVC = ("dvc.cli", "dvc.cli.parser", "dvc.repo.experiments.queue.celery", "dvc.repo.experiments.show", "dvc.stage.run")
ASKS_ITSELF = Inspect.__init__


def ask_patiently(inspect: Inspect, *arguments: object, **options: object) -> None:
    """Have a worker of the queue wait for its own answer: after a second without, it ends, its experiment lost."""
    if sys.argv[1:3] == ["exp", "queue-worker"]:
        options["timeout"] = 20.0
    ASKS_ITSELF(inspect, *arguments, **options)


starters.end_with_parent()
Inspect.__init__ = ask_patiently
listener = standby.listening(sys.argv[1])
for name in DVC:
    importlib.import_module(name)
print("ready", flush=True)
standby.serve(listener, seconds=3600)
