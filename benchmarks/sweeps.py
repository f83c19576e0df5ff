"""How long many experiments take: through DVC's queue, and as a sweep of src/sweep.py.

    python benchmarks/sweeps.py queue                 # 1, 10 and 100 small ones, some of which fail, two at a time
    python benchmarks/sweeps.py trials                # what a trial costs beside its stages: DVC, src/sweep.py, Ray
    DATA_ARCHIVE=… WEIGHTS_DIR=… python benchmarks/sweeps.py walkthrough    # sweeps/walkthrough.yaml, cold and warm

In a copy of the project, which is removed at the end.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import projects
from ruamel.yaml import YAML

SMALL = {"data.source": "data/small.yaml", "data.resize": 36, "data.image_size": 32, "backbone.weights": "none"}
SMALL |= {"model_name": "squeezenet", "num_epochs": 2}
RECIPE = "drawn: [ants, bees]\ntrain: 6\nval: 4\nsize: 40\nseed: 0\n"
NUMBERS = (1, 10, 100)
TRIALS = 10
FAILS = 1e30  # a learning rate that ends in NaN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("queue", "trials", "walkthrough"))
    part = parser.parse_args().part
    with tempfile.TemporaryDirectory() as temporary:
        {"queue": queue, "trials": trials, "walkthrough": walkthrough}[part](Project(Path(temporary)))


def queue(project: "Project") -> None:
    """Print how the time grows with the number of experiments; of the hundred, every tenth fails."""
    project.settle(SMALL)
    project.run("dvc", "exp", "run")  # prepares the pictures
    print(f"{'experiments':>11}{'failing':>9}{'to queue':>10}{'to run':>10}{'each':>8}{'exp show':>10}{'status':>8}")
    for number in NUMBERS:
        rates = [FAILS + index if index % 10 == 9 else 1e-4 + 1e-6 * (number + index) for index in range(number)]
        queued = project.seconds("dvc", "exp", "run", "--queue", "-S", f"lr={','.join(map(repr, rates))}")
        start = time.perf_counter()
        project.run_queue(2)
        took = time.perf_counter() - start
        failed = project.run("dvc", "queue", "status").count("Failed")
        shown, status = project.seconds("dvc", "exp", "show", "--no-pager"), project.seconds("dvc", "queue", "status")
        print(
            f"{number:11}{failed:9}{queued:9.1f}s{took:9.1f}s{took / number:7.1f}s{shown:9.1f}s{status:7.1f}s",
            flush=True,
        )
        project.run("dvc", "queue", "remove", "--success", "--failed")


def trials(project: "Project") -> None:
    """Print what an experiment takes alone, in the queue, as a trial, and as one of Ray's, one at a time."""
    project.settle(SMALL)
    project.run("dvc", "exp", "run")
    stages = 0.0
    for script in ("train", "evaluate"):  # the former without what it computes: the run is in the store
        begun_as_by_dvc = ("env", "-u", "PS1", f"DVC_STAGE={script}")  # so that they are forks, too
        stages += project.seconds(*begun_as_by_dvc, "python3", f"src/{script}.py")
    rates = [1e-4 + 1e-6 * index for index in range(3 * TRIALS)]
    alone = project.seconds("dvc", "exp", "run", "-S", "lr=0.00005")
    start = time.perf_counter()
    project.run("dvc", "exp", "run", "--queue", "-S", f"lr={','.join(map(repr, rates[:TRIALS]))}")
    project.run_queue(1)
    in_queue = (time.perf_counter() - start) / TRIALS
    project.run("git", "restore", "params.yaml", "dvc.lock")
    as_trial = {}
    for option, wanted in (("", rates[TRIALS : 2 * TRIALS]), (" --ray local -j 1", rates[2 * TRIALS :])):
        name = f"rates{len(as_trial)}"
        project.sweep(name, {"lr": wanted})
        command = f"src/sweep.py sweeps/{name}.yaml{option}"
        as_trial[f"src/sweep.py{option}"] = project.seconds(sys.executable, *command.split()) / TRIALS
    print(f"the stages train and evaluate by themselves {stages:.1f} s; an experiment of these:")
    for what, took in {"dvc exp run": alone, "dvc queue start -j 1": in_queue, **as_trial}.items():
        print(f"{took:8.1f} s, of which {took - stages:.1f} s beside the stages  {what}")


def walkthrough(project: "Project") -> None:
    """Print how many trials an hour the walkthrough has, with nothing computed, and with all features there."""
    project.settle({})
    for way in ("cold", "warm"):
        took = project.seconds(sys.executable, "src/sweep.py", "sweeps/walkthrough.yaml", "-j", "2")
        number = len(project.run("git", "for-each-ref", "refs/exps").split("walkthrough-")) - 1
        print(f"{way}: {number} trials in {took:.0f} s, {3600 * number / took:.0f} an hour, two at a time", flush=True)
        project.run("dvc", "exp", "remove", "-A")
        for folder in ("sweeps", "checkpoints"):
            shutil.rmtree(project.folder / ".dvc/tmp" / folder)


class Project:
    """A copy of the project, in a repository of its own with its remotes."""

    def __init__(self, folder: Path):
        self.folder = projects.shared(folder)
        self.environ = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def settle(self, settings: dict) -> None:
        """Commit these settings, and push them."""
        (self.folder / "data/small.yaml").write_text(RECIPE)
        yaml = YAML()
        contents = yaml.load(self.folder / "params.yaml")
        for key, value in settings.items():
            *groups, name = key.split(".")
            (contents[groups[0]] if groups else contents)[name] = value
        yaml.dump(contents, self.folder / "params.yaml")
        projects.commit(self.folder)
        self.run("git", "push", "-q")

    def sweep(self, name: str, search: dict) -> None:
        """Write a grid's file."""
        content = {"metric": "val_loss", "direction": "minimize", "method": "grid", "search": search}
        (self.folder / f"sweeps/{name}.yaml").write_text(json.dumps(content))

    def run(self, *command: str) -> str:
        """Return what a command prints."""
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL, "text": True}
        file = self.folder.parent / "printed"  # no pipe: the queue's worker would hold it to its end
        with open(file, "w+") as printed:
            subprocess.run(command, cwd=self.folder, env=self.environ, check=True, **quiet | {"stdout": printed})
            printed.seek(0)
            return printed.read()

    def run_queue(self, jobs: int) -> None:
        """Run what is queued, so many at a time."""
        start = ("dvc", "queue", "start", "-j", str(jobs))
        self.run(*start)
        while re.search(r"\b(Queued|Running)\b", status := self.run("dvc", "queue", "status")):
            if "Worker status: 0 active, 0 idle" in status:  # on a busy machine DVC's workers end early
                self.run(*start)
            time.sleep(1)

    def seconds(self, *command: str) -> float:
        """Return how long a command takes."""
        start = time.perf_counter()
        self.run(*command)
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
