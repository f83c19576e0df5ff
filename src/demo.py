"""Fine-tune two networks on drawn pictures through DVC's queue, and compare them: `make demo`.

Needs no network. Leaves the workspace as it is; the experiments stay (`dvc exp remove NAME` takes one away).
"""

import json
import os
import re
import subprocess
import sys

MODELS: dict[str, dict[str, object]] = {
    "alexnet": {"lr": 0.002, "batch_size": 16, "head.kind": "concat_pool", "head.hidden": 64},  # or 54 M weights train
    "squeezenet": {"lr": 0.002, "batch_size": 16},
}
SETTINGS: dict[str, object] = {  # small enough for a minute without a GPU, from random weights
    "data.source": "data/sample.yaml",
    "data.resize": 72,
    "data.image_size": 64,
    "backbone.weights": "none",
    "backbone.trainable": "all",
    "num_classes": 2,
    "num_epochs": 12,
    "momentum": 0.9,
    "seed": 0,
    "device": "auto",
    "augment.min_scale": 0.25,
}
HIDDEN = "src|data|models|backbone|Created|State|Executor|eval|time|step|augment|num_|seed|device|^loss|^acc"
PATIENCE = 15  # seconds
NEXT = """
What next:
  . .venv/bin/activate                                    # dvc and python of this project
  dvc exp run                                             # AlexNet on ants and bees: fetches 47 MB and the weights
  dvc exp run -S model_name=squeezenet -S lr=0.025        # change anything
  dvc exp run --queue -S lr=0.0001,0.001,0.01             # a sweep ...
  dvc queue start -j 2                                    # ... run in the background
  dvc exp show --only-changed --drop 'src|data|models|weights|Created'
"""


def main() -> None:
    if re.search(r"\bQueued\b", dvc("queue", "status", capture=True)):
        sys.exit(
            "error: the queue holds experiments, and the demo would run them too.\n"
            "Run them first (dvc queue start), or take them out (dvc queue remove --queued)."
        )
    names = [enqueue(model) for model in MODELS]
    run_queue()
    accuracies = val_accuracies()
    dvc("exp", "show", "--no-pager", "--only-changed", "--drop", HIDDEN, "--sort-by", "val_acc", "--sort-order", "desc")
    missing = [name for name in names if name not in accuracies]
    if missing:
        sys.exit(f"error: {', '.join(missing)} failed: `dvc queue logs {missing[0]}` says why.")
    for model, name in zip(MODELS, names, strict=True):
        print(f"{model} ({name}): val_acc {accuracies[name]:.3f}")
    print(NEXT)


def run_queue() -> None:
    """Run what is queued, and show what it prints.

    On a busy machine DVC's worker may end early, as an answer comes late, or miss that it is done, as it reads a
    message that is being written. So it is started again, or told.
    """
    while re.search(r"\bQueued\b", dvc("queue", "status", capture=True)):
        follow_queue()


def follow_queue() -> None:
    """Start a worker of the queue, and show what it prints until it ends or has nothing left to do."""
    is_idle = False
    with subprocess.Popen(["dvc", "exp", "run", "--run-all"]) as following:
        while True:
            try:
                following.wait(PATIENCE)
                return
            except subprocess.TimeoutExpired:
                status = dvc("queue", "status", capture=True)
                was_idle, is_idle = is_idle, not re.search(r"\b(Queued|Running)\b", status)
            if was_idle and is_idle:
                dvc("queue", "stop", "--kill", capture=True)
                following.terminate()
                return


def enqueue(model: str) -> str:
    """Queue an experiment; return the name that DVC gave it."""
    settings: dict[str, object] = {"model_name": model, **SETTINGS, **MODELS[model]}
    overrides = [f"-S{key}={value}" for key, value in settings.items()]
    said = dvc("exp", "run", "--queue", *overrides, capture=True)
    print(said, end="", flush=True)
    return re.findall(r"Queued experiment '([^']+)'", said)[0]


def val_accuracies() -> dict[str, float]:
    """Return the validation accuracy of each finished experiment on top of HEAD, by name."""
    found = {}
    for commit in json.loads(dvc("exp", "show", "--json", capture=True)):
        for experiment in commit["experiments"] or []:
            data = experiment["revs"][0]["data"] or {}
            for file in (data.get("metrics") or {}).values():
                if "val_acc" in file.get("data", {}):
                    found[experiment["name"]] = file["data"]["val_acc"]
    return found


def dvc(*arguments: str, capture: bool = False) -> str:
    """Run a dvc command; return what it printed where that is captured. Ends the process where it fails."""
    result = subprocess.run(["dvc", *arguments], text=True, stdout=subprocess.PIPE if capture else None)
    if result.returncode:
        sys.exit(result.returncode)
    return result.stdout or ""


if __name__ == "__main__":
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "120")  # else DVC cuts its table to 80
    main()
