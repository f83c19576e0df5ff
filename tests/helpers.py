"""What several tests need: small pictures, settings, and a script run as a user runs it."""

import atexit
import functools
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from finetune import backbones, checkpoint, stage, starters
from finetune.digests import digest

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from ruamel.yaml import YAML

T = TypeVar("T")

ROOT = Path(__file__).parent.parent
RECIPE = "drawn: [ants, bees]\ntrain: 6\nval: 4\nsize: 40\nseed: 0\n"


TINY = {  # of a run of a second, on what make_pictures makes in a folder `pictures`
    "data__source": "pictures",
    "data__resize": 36,
    "data__image_size": 32,
    "model_name": "squeezenet",
    "device": "cpu",
}


def make_pictures(folder: Path, numbers: dict[str, int], size: int = 24) -> None:
    """Write pictures of noise, no two alike: {"train/ants": 3} is folder/train/ants/0.png, 1.png and 2.png."""
    for name, number in numbers.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            rng = np.random.default_rng([*name.encode(), index])
            pixels = rng.integers(0, 256, (size, size + 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def darken_bees(folder: Path, factor: int) -> None:
    """Make all bees so many times as dark, so that there is something to learn."""
    for file in folder.glob("*/bees/*.png"):
        Image.fromarray(np.asarray(Image.open(file)) // factor).save(file)


def write_params(folder: Path, **overrides) -> None:
    """Write folder/params.yaml: the project's own, with other values, as in data__source="pictures"."""
    (folder / "params.yaml").write_bytes(changed_params(ROOT / "params.yaml", overrides))


def changed_params(file: Path, overrides: dict) -> bytes:
    """Return what is in a params.yaml, with other values."""
    yaml, changed = YAML(), io.BytesIO()
    settings = yaml.load(file)
    for name, value in overrides.items():
        *group, key = name.split("__")
        (settings[group[0]] if group else settings)[key] = value
    yaml.dump(settings, changed)
    return changed.getvalue()


def run(script: str, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run src/<script> in a folder, with an empty cache in it unless told otherwise; return what came of it."""
    environ = {name: value for name, value in os.environ.items() if name not in ("DATA_ARCHIVE", "WEIGHTS_DIR")}
    environ |= {"XDG_CACHE_HOME": str(folder / "cache")} | variables
    command = [sys.executable, str(ROOT / "src" / script), *arguments]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)


# A script as a fork --------------------------------------------------------------------------------------------------

FORKS = multiprocessing.get_context("forkserver")  # of a process that has imported torch, and started no thread of it
FORKS.set_forkserver_preload(["train", "helpers"])
NOT_FORKED = ("DATA_ARCHIVE", "WEIGHTS_DIR", "CHECKPOINTS_DIR", "DVC_ROOT", "DVC_EXP_NAME")  # of the environment


class Forked:
    """A script that starts at once, as a fork; what it prints goes to printed.txt. Used as a Popen is.

    With `RANK` and so on among the variables, it is one of several processes that train together.
    """

    def __init__(self, folder: Path, script: str, *arguments: str, **variables: str):
        (folder / "printed.txt").write_text("")  # by now, as the fork may be killed before it opens it
        self._process = FORKS.Process(target=_run_script, args=(folder, script, arguments, variables), daemon=True)
        with pytest.MonkeyPatch.context() as patch:  # the server takes them from the first process that starts it
            patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]))
            self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode


def _run_script(folder: Path, script: str, arguments: tuple[str, ...], variables: dict[str, str]) -> None:
    for name in NOT_FORKED:
        os.environ.pop(name, None)
    os.environ.update(variables)
    with open(folder / "printed.txt", "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    starters.STARTED_BY = starters.starters()  # the server
    sys.argv = [f"src/{script}.py", *arguments]
    stage.run(importlib.import_module(script).main)


def run_forked(folder: Path, script: str = "train", *arguments: str, status: int = 0, **variables: str) -> str:
    """Run a script to its end, which must have that status; return what it printed."""
    ended = Forked(folder, script, *arguments, **variables).wait()
    printed = (folder / "printed.txt").read_text()
    assert ended == status, printed
    return printed


# Folders in which a stage can run -------------------------------------------------------------------------------------


def write_weights(folder: Path, model: str, seed: int) -> None:
    """Write folder/weights/mine.pth, random weights of a network of torchvision's with five classes."""
    torch.manual_seed(seed)
    (folder / "weights").mkdir(exist_ok=True)
    network = torchvision.models.get_model(backbones.canonical_name(model), num_classes=5)
    torch.save(network.state_dict(), folder / "weights/mine.pth")


def preparing(make_folder: Callable[[], Path], pictures: dict[str, int], defaults: dict) -> Callable[..., Path]:
    """Return a function that returns a folder after the stages prepare and backbone, for the settings given.

    There is one for each network and its weights.
    """
    folders = {}

    def prepare(**settings) -> Path:
        settings = defaults | settings
        key = settings["model_name"], settings["backbone__weights"]
        if key not in folders:
            folder = folders[key] = make_folder()
            make_pictures(folder / "pictures", pictures, size=36)
            write_weights(folder, settings["model_name"], seed=0)
            write_params(folder, **settings)
            run_forked(folder, "prepare")
            run_forked(folder, "backbone")
        return folders[key]

    return prepare


def copying(prepare: Callable[..., Path], parent: Path, defaults: dict) -> Callable[..., Path]:
    """Return a function that returns a new folder each time, before the stage train, for the settings given."""

    def copy(**settings) -> Path:
        folder = shutil.copytree(prepare(**settings), parent / str(len(list(parent.iterdir()))))
        write_params(folder, **defaults | settings)
        return folder

    return copy


# A repository, and a user in it ---------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def clone(folder: Path, recipe: str = RECIPE, **settings) -> Path:
    """Return a repository with the project's files as they are now, data/tiny.yaml, and `settings` in params.yaml."""
    for name in git(ROOT, "ls-files", "-co", "--exclude-standard", "-z").split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "data/tiny.yaml").write_text(recipe)
    write_params(folder, **settings)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "project")
    return folder


def make_repository(folder: Path, **settings) -> Path:
    """Return a repository of DVC's with one commit and `settings` in params.yaml, for `write_experiment`."""
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".dvc/config").write_text("")
    (folder / ".gitignore").write_text("/.dvc/\n/results/\n")
    write_params(folder, **settings)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "project")
    return folder


def predicted(right: Sequence[bool], pictures: str = "val", split: str = "val") -> list[dict]:
    """Return the rows of predictions.csv for pictures/0.jpg and so on, by turns an ant and a bee, right where said."""
    rows = []
    for index, is_right in enumerate(right):
        label, other = ("ants", "bees")[:: 1 - 2 * (index % 2)]
        answer = label if is_right else other
        p_ants = 0.9 if answer == "ants" else 0.1
        row = {"split": split, "path": f"{pictures}/{index}.jpg", "label": label, "prediction": answer}
        rows.append(row | {"p_ants": p_ants, "p_bees": 1 - p_ants, "loss": 0.105 if is_right else 2.303})
    return rows


def write_experiment(
    folder: Path,
    name: str,
    settings: dict | None = None,
    metrics: dict[str, float | str] | None = None,
    predictions: Sequence[dict] = (),
    epochs: Sequence[dict[str, float]] = (),
    created: float | None = None,
) -> None:
    """Write an experiment of HEAD as `dvc exp run` leaves it, without running anything: a ref, and files in the cache.

    settings {"data__fold": 1} are in place of those of the workspace; of metrics, {"val_acc": 0.9, "eval.acc": 0.9},
    those with a dot are evaluate's; epochs are rows {"loss": 0.3, "val_loss": 0.4}; `created` is in seconds, or now.
    """
    train, evaluate = {}, {}
    for key, value in (metrics or {}).items():
        group, _, rest = key.rpartition(".")
        (evaluate.setdefault(group, {}) if group else train)[rest] = value
    outs = {"train": {}, "evaluate": {}}
    if predictions:
        lines = [",".join(map(str, row)) for row in (predictions[0], *(row.values() for row in predictions))]
        outs["evaluate"]["results/evaluate/predictions.csv"] = _cached(folder, "\n".join(lines) + "\n")
    if epochs:
        curves = {key: [f"step\t{key}", *(f"{i}\t{row[key]}" for i, row in enumerate(epochs))] for key in epochs[0]}
        files = {f"metrics/{key}.tsv": _cached(folder, "\n".join(rows) + "\n") for key, rows in curves.items()}
        listed = json.dumps([{"md5": md5, "relpath": path} for path, md5 in files.items()])
        outs["train"]["results/train/plots"] = _cached(folder, listed, ".dir")
    stages = {
        stage: {"outs": [{"path": path, "md5": md5} for path, md5 in each.items()]} for stage, each in outs.items()
    }
    files = {
        "params.yaml": changed_params(folder / "params.yaml", settings or {}),
        "dvc.lock": json.dumps({"schema": "2.0", "stages": stages}).encode(),
        "results/train/metrics.json": json.dumps(train).encode(),
        "results/evaluate/metrics.json": json.dumps(evaluate).encode(),
    }
    head = git(folder, "rev-parse", "HEAD").strip()
    stream = f"commit refs/exps/{head[:2]}/{head[2:]}/{name}\n".encode()
    stream += (
        f"committer tester <tester@example.org> {int(created or time.time())} +0000\ndata 0\n\nfrom {head}\n".encode()
    )
    for path, content in files.items():
        stream += f"M 100644 inline {path}\ndata {len(content)}\n".encode() + content + b"\n"
    subprocess.run(["git", "fast-import", "--quiet", "--force"], cwd=folder, input=stream, check=True)


def _cached(folder: Path, text: str, suffix: str = "") -> str:
    """Write a text into DVC's cache; return its digest there."""
    md5 = hashlib.md5(text.encode()).hexdigest() + suffix
    place = folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)
    return md5


def as_user(folder: Path) -> dict[str, str]:
    """Return the environment of a user who stands in a folder, with the tests' Python and dvc on PATH."""
    environ = {name: value for name, value in os.environ.items() if name not in ("DATA_ARCHIVE", "WEIGHTS_DIR")}
    environ |= {f"GIT_{role}_{key}": f"tester@{key}" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    return environ | {"PATH": f"{Path(sys.executable).parent}:{environ['PATH']}", "PWD": str(folder), "COLUMNS": "400"}


COLD = {"WARM_SERVER": "", "STANDBY_SECONDS": "0"}  # variables with which neither DVC nor a stage is a fork


@functools.cache
def warm() -> dict[str, str]:
    """Return variables with which DVC is a fork of a process that has imported it, as stages are."""
    if sys.platform != "linux":
        return {}
    address = f"finetune-tests-{os.getpid()}"
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests/warm/server.py", address], stdout=subprocess.PIPE, process_group=0
    )
    atexit.register(server.terminate)
    assert server.stdout.readline() == b"ready\n"
    return {"WARM_SERVER": address, "PYTHONPATH": str(ROOT / "tests/warm")}


def dvc(folder: Path, *arguments: str, status: int = 0, **variables: str) -> str:
    """Run dvc as a user with the environment on PATH does; return what it printed."""
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    result = subprocess.run(
        ["dvc", *arguments], cwd=folder, env=as_user(folder) | warm() | variables, timeout=300, **outputs
    )
    assert result.returncode == status, result.stdout
    return result.stdout


def typed(folder: Path, line: str, status: int = 0, **variables: str) -> str:
    """Type a line as a user who stands in a folder does; return what it printed."""
    with tempfile.TemporaryFile("w+") as file:  # a pipe would be held open by what `dvc queue start` starts
        outputs = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        environ = as_user(folder) | warm() | variables
        result = subprocess.run(["bash", "-ec", line], cwd=folder, env=environ, timeout=900, **outputs)
        file.seek(0)
        printed = file.read()
    assert result.returncode == status, f"{line}\n{printed}"
    return printed


def have_environment(project: Path) -> None:
    """Have a project's `make setup` find the environment made: that of the tests, which is on PATH anyway."""
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/bin/activate").touch()
    (project / ".venv/installed").touch()


def wait_for(found: Callable[[], T], every: float = 0.05) -> T:
    """Return what is found, once it is something; looked for so often, in seconds."""
    end = time.monotonic() + 200
    while not (result := found()):
        assert time.monotonic() < end
        time.sleep(every)
    return result


def start_queue(folder: Path, jobs: int = 1) -> None:
    """Start a worker of the queue, and leave it alone: a pipe it would hold open to its end."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = ["dvc", "queue", "start", "-j", str(jobs)]
    subprocess.run(command, cwd=folder, env=as_user(folder) | warm(), check=True, **quiet)


def wait_for_queue(folder: Path) -> str:
    """Return the queue's status once nothing is queued or running.

    Its workers have ended by then, for one that is about to may take what is queued next, and lose it; or they stay.
    """
    looks_when_done = 0
    for _ in range(120):
        status = dvc(folder, "queue", "status")
        is_done = not re.search(r"\b(Queued|Running)\b", status)
        have_ended = "Worker status: 0 active, 0 idle" in status
        if is_done and (have_ended or looks_when_done == 6):
            return status
        looks_when_done += is_done
        if have_ended:  # on a busy machine DVC's worker ends early
            start_queue(folder)
        time.sleep(3)  # each look takes a second of a core
    raise AssertionError(status)


def results(folder: Path) -> dict[str, str | bytes]:
    """Return all that came of a run but the time it took, in terms of bits."""
    state = checkpoint.load(folder / "models/checkpoint.pt")
    curves = {file.stem: file.read_bytes() for file in (folder / "results/train/plots/metrics").glob("*.tsv")}
    metrics = json.loads((folder / "results/train/metrics.json").read_text())
    rows = [{name: value for name, value in row.items() if name != "training_time"} for row in state["history"]]
    assert {"lr", "acc", "val_loss", "training_time"} <= curves.keys()
    del curves["training_time"], metrics["training_time"]
    return {
        "weights": (folder / "models/model.safetensors").read_bytes(),
        "predictions": (folder / "results/evaluate/predictions.csv").read_bytes(),
        "history": digest(rows),
        "metrics": digest(metrics),
        **{f"checkpoint's {name}": digest(state[name]) for name in ("model", "optimizer", "schedule")},
        **{f"curve of {name}": content for name, content in curves.items()},
    }


def differences(one: dict, other: dict) -> list[str]:
    """Return the names of the results that are not equal to the bit."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
