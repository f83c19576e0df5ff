"""What a sweep on a cluster costs: its driver's time, with nodes that only pretend, and the bytes that real ones move.

python benchmarks/nodes.py driver                               # seconds of the driver's for each trial
python benchmarks/nodes.py calls                                # seconds of the driver's for each look at a node
DATA_ARCHIVE=… WEIGHTS_DIR=… python benchmarks/nodes.py bytes   # of trials of SqueezeNet and AlexNet, on this machine
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
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "src"))

from finetune import search, sharing
from finetune.clones import Repository
from finetune.slots import Job, Slot
from finetune.trials import METRICS, Driver

import optuna
import projects

SLOTS = 1000
TRIALS = (250, 1000)
CALLS = 5000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("driver", "calls", "bytes"))
    part = parser.parse_args().part
    with tempfile.TemporaryDirectory() as temporary:
        {"driver": driver, "calls": calls, "bytes": traffic}[part](Path(temporary))


# The driver -----------------------------------------------------------------------------------------------------------


def driver(folder: Path) -> None:
    """Print how long the driver takes for a trial that takes its node no time at all, of sweeps that grow."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    project = projects.shared(folder)
    os.chdir(project)
    repository = Repository(project)
    print(f"{'trials':>6}{'seconds each':>14}{'of which git fetch':>20}")
    for number in TRIALS:
        name = f"sim{number}"
        rates = [round(1e-4 + 1e-6 * index, 7) for index in range(number)]
        publish(repository, folder / "git", name, rates)
        file = folder / f"{name}.json"
        settings = {"metric": "val_loss", "direction": "minimize", "method": "grid", "search": {"lr": rates}}
        file.write_text(json.dumps(settings))
        sweep = search.load(file)
        (folder / name).mkdir()
        slots = [Pretending(repository) for _ in range(SLOTS)]
        with open(os.devnull, "w") as null:
            printed, sys.stdout, error, sys.stderr = sys.stdout, null, sys.stderr, null
            start = time.perf_counter()
            Driver(name, sweep, repository, folder / name, slots).run()
            took = time.perf_counter() - start
            sys.stdout, sys.stderr = printed, error
        fetching = sum(slot.seconds for slot in slots)
        print(f"{number:6}{took / number:13.3f}s{fetching / number:19.3f}s", flush=True)


class Pretending(Slot):
    """A slot on a node of its own, whose experiments are on the git remote before they begin."""

    is_ready = True

    def __init__(self, repository: Repository):
        self.repository, self.place, self.seconds = repository, str(id(self)), 0.0

    def run(self, name: str, overrides: Sequence[str], log: Path) -> "Finished":
        return Finished(self, name, log)

    def hand_back(self, name: str) -> None:
        start = time.perf_counter()
        sharing.fetch(self.repository, name)
        self.seconds += time.perf_counter() - start

    def close(self) -> None:
        pass


class Finished(Job):
    """An experiment that is done at once."""

    status = 0

    def __init__(self, slot: Slot, name: str, log: Path):
        self.slot, self.name, self.log = slot, name, log

    def lines(self):
        yield "Running stage 'train':"

    def ask_to_stop(self) -> None:
        pass

    def stop(self) -> None:
        pass


def publish(repository: Repository, remote: Path, name: str, rates: list[float]) -> None:
    """Put an experiment for each learning rate on the git remote."""
    params = (repository.root / "params.yaml").read_text()
    stream = []
    for index, rate in enumerate(rates):
        files = {"params.yaml": re.sub(r"(?m)^lr: \S+", f"lr: {rate}", params)}
        files[METRICS[0]] = json.dumps({"val_loss": rate, "val_acc": 0.5, "step": 1})
        stream.append(f"commit {repository.reference(f'{name}-{index:03}')}\ncommitter b <b> 1 +0000\ndata 0\n")
        stream.append(f"from {repository.commit}\n")
        for path, text in files.items():
            stream.append(f"M 100644 inline {path}\ndata {len(text.encode())}\n{text}\n")
    subprocess.run(["git", "fast-import", "--quiet"], cwd=remote, input="".join(stream).encode(), check=True)


# Looks at nodes -------------------------------------------------------------------------------------------------------


def calls(_: Path) -> None:
    """Print how long the driver takes to ask an actor and to see its answer, with as many under way as nodes."""
    import ray

    @ray.remote(max_concurrency=SLOTS)
    class Actor:
        async def look(self) -> tuple[list[str], int | None]:
            return ["epoch 1/2: loss 0.1, acc 0.9, val_loss 0.1, val_acc 0.9, 1.2 s"], None

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    actor = Actor.remote()
    ray.get(actor.look.remote())
    start, began = time.perf_counter(), time.process_time()
    under_way, asked = [], 0
    while asked < CALLS or under_way:
        under_way = [each for each in under_way if not each.done()]
        wanted = min(SLOTS - len(under_way), CALLS - asked)
        under_way += [actor.look.remote().future() for _ in range(wanted)]
        asked += wanted
        time.sleep(0.01)
    took, busy = time.perf_counter() - start, time.process_time() - began
    print(
        f"{1000 * busy / CALLS:.2f} ms of the driver's processor for each of {CALLS} looks, {CALLS / took:.0f} a second"
    )
    ray.shutdown()


# Bytes ----------------------------------------------------------------------------------------------------------------


def traffic(folder: Path) -> None:
    """Print by how much trials make the remotes grow, and what a new node takes from them."""
    project = projects.shared(folder)
    temporary = folder / "tmp"
    temporary.mkdir()
    environ = os.environ | {"TMPDIR": str(temporary), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for model in ("squeezenet", "alexnet"):
        for number, rate in enumerate((0.001, 0.002)):
            name = f"{model}{number}"
            settings = {"metric": "val_loss", "direction": "minimize", "method": "grid", "search": {"lr": [rate]}}
            (folder / f"{name}.json").write_text(json.dumps(settings | {"set": {"model_name": model, "num_epochs": 1}}))
            before = {part: size(folder / part) for part in ("git", "storage")}
            shutil.rmtree(temporary)  # another node
            temporary.mkdir()
            start = time.perf_counter()
            command = [sys.executable, "src/sweep.py", str(folder / f"{name}.json"), "--ray", "local", "-j", "1"]
            subprocess.run(command, cwd=project, env=environ, check=True, stdout=subprocess.DEVNULL)
            grown = {part: size(folder / part) - before[part] for part in before}
            cloned = sum(size(each) for each in temporary.glob("finetune-*/*/*/.git"))
            print(
                f"{model}, {'first' if number == 0 else 'later'} trial, on a new node: "
                f"{time.perf_counter() - start:.0f} s; clone {cloned / 2**20:.1f} MB; "
                f"pushed {grown['storage'] / 2**20:.1f} MB of files and {grown['git'] / 2**10:.0f} KB of git",
                flush=True,
            )


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
