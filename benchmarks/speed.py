"""How fast an experiment is, beside the loop that most fine-tuning scripts have (baseline.py), on the same pictures.

    make benchmark                                   # all of it: about an hour on 2 cores
    python benchmarks/speed.py overhead sweep        # some of it: epochs, pictures, overhead, sweep, jobs
    DATA_ARCHIVE=… WEIGHTS_DIR=… make benchmark      # on real pictures and weights

The ways take turns, each in a process of its own: the baseline with 4 and with 2 workers, ours cold (a bank without
features) and warm (with those of an earlier run of the same seed, as in a sweep over lr, momentum or the head). What is
printed are medians and ratios to the baseline with 4 workers; speed.json has every number, speed.png a plot.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRON = dict(os.environ)  # the baseline's, before ours sets how OpenMP's threads wait
sys.path.insert(0, str(ROOT / "src"))

from finetune import experiment, parallel, sources, training

import projects
import torch
from ruamel.yaml import YAML
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from tqdm import tqdm

CASES = {  # the model, what trains by the baseline's name and by ours, and the epochs of a run of ours
    "SqueezeNet, head": ("squeezenet1_1", "head", "head", 5),
    "AlexNet, last layer": ("alexnet", "head", "head", 5),
    "AlexNet, classifier": ("alexnet", "classifier", "[classifier]", 5),
    "ResNet-18, head": ("resnet18", "head", "head", 5),
    "SqueezeNet, all": ("squeezenet1_1", "all", "all", 2),
    "AlexNet, all": ("alexnet", "all", "all", 2),
    "ResNet-18, all": ("resnet18", "all", "all", 2),
}
WAYS = ("4 workers", "2 workers", "cold", "warm")
TIMES = (1, 4, 16)  # as many pictures
JOBS = 4  # experiments for one worker of the queue, and as many for two
PARTS = ("epochs", "pictures", "overhead", "sweep", "jobs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3, help="of the ways of the epochs (default 3)")
    parser.add_argument("--sweep", type=int, default=64, help="experiments of the sweep (default 64)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/speed.json")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)  # ours, as a process of its own
    arguments = parser.parse_args()
    if arguments.run:
        run_epochs(int(arguments.run[0]), arguments.run[1:])
        return
    found = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        place = Workspace(Path(folder))
        for part in arguments.parts or PARTS:
            about = {"machine": machine(), "data": place.about}
            print(f"\n{about}", flush=True)
            match part:
                case "epochs":
                    found[part] = about | {"cases": {name: epochs(place, name, arguments.rounds) for name in CASES}}
                    print_epochs(found[part])
                case "pictures":
                    found[part] = about | {"seconds": pictures(place)}
                case "overhead":
                    found[part] = about | {"seconds": overhead(place)}
                case "sweep":
                    found[part] = about | {"seconds": sweep(place, arguments.sweep)}
                case "jobs":
                    found[part] = about | {"seconds": jobs(place)}
            arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    plot(found, arguments.output.with_suffix(".png"))
    print(f"\n{arguments.output}, {arguments.output.with_suffix('.png')}")


# The parts ------------------------------------------------------------------------------------------------------------


def epochs(place: "Workspace", name: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return what an epoch takes in each way: seconds of training and validation, and the peak of memory."""
    model, baseline, ours, count = CASES[name]
    changes = place.changes(model, ours)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        runs["4 workers"].append(place.baseline(model, baseline, workers=4))
        runs["2 workers"].append(place.baseline(model, baseline, workers=2))
        place.empty_bank()
        runs["cold"].append(place.ours(count, changes))
        runs["warm"].append(place.ours(count, changes))
    print(f"{name}: measured", file=sys.stderr, flush=True)
    found = {way: {key: statistics.median(run[key] for run in runs[way]) for key in runs[way][0]} for way in WAYS}
    passes = 3 if ours == "all" else 1  # of a training picture: the gradients take two more
    return found | {"network": {"flop": flop(model) * (passes * place.count("train") + place.count("val"))}}


def pictures(place: "Workspace") -> dict[str, dict[str, float]]:
    """Return the seconds of an epoch with more and more pictures; of SqueezeNet with a frozen trunk."""
    model, baseline, ours, count = CASES["SqueezeNet, head"]
    changes = [*place.changes(model, ours), "feature_bank_gb=20"]
    found = {}
    print(f"SqueezeNet, head, with more pictures\n{'pictures':>10}{'4 workers':>12}{'cold':>17}{'warm':>17}")
    for times in TIMES:
        place.repeat(times)
        place.empty_bank()
        runs = {"4 workers": place.baseline(model, baseline, workers=4)}
        runs |= {way: place.ours(count, changes) for way in ("cold", "warm")}
        found[str(place.count())] = seconds = {way: total(run) for way, run in runs.items()}
        ours_shown = [f"{seconds[way]:8.2f} s {seconds['4 workers'] / seconds[way]:5.1f}x" for way in ("cold", "warm")]
        print(f"{place.count():10}{seconds['4 workers']:10.2f} s", *ours_shown, flush=True)
    place.repeat(1)
    return found


def overhead(place: "Workspace") -> dict[str, list[tuple[float, str]]]:
    """Return what the seconds of `dvc exp run` go to, in the first experiment and with another learning rate."""
    found = {}
    for name, lr in (("the first", 0.02), ("another lr", 0.021), ("another lr again", 0.022)):
        command = ["dvc", "exp", "run", "-S", "model_name=squeezenet", "-S", f"lr={lr}"]
        start, lines = time.perf_counter(), []
        with place.started([*command, "-S", place.source]) as process:
            lines += [(time.perf_counter() - start, line.rstrip()) for line in process.stdout]
        lines.append((time.perf_counter() - start, "the prompt"))
        found[name] = list(phases(lines))
        print(f"\n{' '.join(command)}: {name}")
        print(*(f"{seconds:8.2f} s  {what}" for seconds, what in found[name]), sep="\n")
        print(f"{lines[-1][0]:8.2f} s  in all", flush=True)
    return found


def phases(lines: list[tuple[float, str]]) -> Iterator[tuple[float, str]]:
    """Yield the seconds between the lines that begin something, and what they went to."""
    last, what = 0.0, "dvc, before the first stage"
    for moment, line in lines:
        if stage := re.match(r"Running stage '(\w+)'", line):
            following = "train: Python, imports, set-up" if stage[1] == "train" else stage[1]
        elif re.match(r"training [\d,]+ of", line):
            following = "train: the epochs"
        elif re.match(r"epoch (\d+)/\1:", line):
            following = "train: the model's file, the last checkpoint; dvc, hashing them"
        elif line.startswith("Updating lock file"):
            following = "dvc, after a stage"
        elif line == "the prompt":
            following = ""
        else:
            continue
        yield moment - last, what
        last, what = moment, following


def sweep(place: "Workspace", number: int) -> dict[str, float]:
    """Return the seconds until so many experiments of a sweep over lr are done, and those of the baseline's script."""
    model, baseline, _, count = CASES["SqueezeNet, head"]
    start = time.perf_counter()
    place.baseline(model, baseline, workers=4, epochs=count)
    found = {"baseline": time.perf_counter() - start}
    options = ["-S", "model_name=squeezenet", "-S", place.source]
    place.dvc("exp", "run", *options)  # prepares the pictures, and fills the bank
    before, start = place.experiments(), time.perf_counter()
    rates = ",".join(f"{1e-4 + 1e-6 * i:.6f}" for i in range(number))
    place.dvc("exp", "run", "--queue", *options, "-S", f"lr={rates}")
    found["queue"] = time.perf_counter() - start
    print(f"a sweep of {number} over lr, dvc queue start -j 1, beside the baseline's script as often")
    print(f"{found['queue']:8.1f} s to queue them")
    start = time.perf_counter()
    place.dvc("queue", "start", "-j", "1")
    for wanted in sorted({count for count in (1, 4, 16, 64) if count < number} | {number}):
        place.wait_for(before + wanted)
        found[str(wanted)] = seconds = time.perf_counter() - start + found["queue"] * wanted / number
        others = found["baseline"] * wanted
        print(f"{seconds:8.1f} s for {wanted:2}, {others:.1f} s of the baseline: {others / seconds:.1f}x", flush=True)
    return found


def jobs(place: "Workspace") -> dict[str, dict[str, float]]:
    """Return the seconds that the queue takes for some experiments of new seeds with one worker, and with two."""
    found: dict[str, dict[str, float]] = {}
    print(f"dvc queue start -j N, {JOBS} experiments of SqueezeNet, each with a seed of its own")
    for trainable, epochs in (("head", 5), ("all", 1)):
        settings = ["model_name=squeezenet", f"backbone.trainable={trainable}", f"num_epochs={epochs}", "lr=0.0001"]
        options = [word for change in (*settings, place.source) for word in ("-S", change)]
        found[trainable] = {}
        for workers in (1, 2):
            seeds = ",".join(str(100 * workers + i) for i in range(JOBS))
            before = place.experiments()
            place.dvc("exp", "run", "--queue", *options, "-S", f"seed={seeds}")
            start = time.perf_counter()
            place.dvc("queue", "start", "-j", str(workers))
            place.wait_for(before + JOBS)
            found[trainable][str(workers)] = seconds = time.perf_counter() - start
            print(f"{seconds:8.1f} s  -j {workers}, {' '.join(settings)}", flush=True)
    return found


# A workspace ----------------------------------------------------------------------------------------------------------


class Workspace:
    """A copy of the project, with pictures and weights of its own."""

    def __init__(self, folder: Path):
        self.folder, self.pictures, self._once = folder / "project", folder / "pictures", folder / "once"
        self.source = f"data.source={self.pictures}"
        projects.copied(self.folder)
        binaries = Path(sys.executable).parent
        self.environ = ENVIRON | {"PATH": f"{binaries}{os.pathsep}{ENVIRON['PATH']}"}
        self.about = f"{self._write_pictures()}, {self._write_weights()}"
        self.repeat(1)

    def _write_pictures(self) -> str:
        if archive := os.environ.get("DATA_ARCHIVE"):
            shutil.unpack_archive(archive, self._once)
            return f"pictures of {Path(archive).name}"
        sources.draw(sources.DrawnRecipe(drawn=["ants", "bees"], train=122, val=76, size=500, seed=0), self._once)
        return "drawn pictures"

    def _write_weights(self) -> str:
        """Write a file for each model: random weights, but for the layers that a file in WEIGHTS_DIR has."""
        known, found = Path(os.environ.get("WEIGHTS_DIR", "none")), []
        for name in dict.fromkeys(model for model, *_ in CASES.values()):
            torch.manual_seed(0)
            state = models.get_model(name).state_dict()
            for file in known.glob(f"{name}*.pth"):
                state |= torch.load(file, weights_only=True)
                found.append(file.name)
            torch.save(state, self.folder / f"weights/{name}.pth")
        self.environ["WEIGHTS_DIR"] = str(self.folder / "weights")
        return f"weights of {', '.join(found)}, else random" if found else "random weights"

    def repeat(self, times: int) -> None:
        """Have every picture so often, and prepare them."""
        shutil.rmtree(self.pictures, ignore_errors=True)
        top = next(path.parent for path in sorted(self._once.rglob("train")))
        for file in (path for split in ("train", "val") for path in (top / split).rglob("*") if path.is_file()):
            for copy in range(times):
                link = self.pictures / file.relative_to(top).with_stem(f"{file.stem}-{copy}")
                link.parent.mkdir(parents=True, exist_ok=True)
                os.link(file, link)
        before = (self.folder / "params.yaml").read_text()
        yaml = YAML()
        settings = yaml.load(before)
        settings["data"]["source"] = str(self.pictures)
        yaml.dump(settings, self.folder / "params.yaml")
        self._run([sys.executable, "src/prepare.py"])

    def count(self, split: str = "*") -> int:
        """Return the number of pictures."""
        return sum(1 for _ in self.pictures.glob(f"{split}/*/*"))

    def changes(self, model: str, trainable: str) -> list[str]:
        """Return the settings of a case."""
        return ["lr=0.0001", f"model_name={model}", f"backbone.weights={model}.pth", f"backbone.trainable={trainable}"]

    def empty_bank(self) -> None:
        """Remove all features."""
        shutil.rmtree(self.folder / ".dvc/tmp/features", ignore_errors=True)

    def baseline(self, model: str, trainable: str, workers: int, epochs: int = 1) -> dict[str, float]:
        """Return the means of the baseline's epochs."""
        options = {"trainable": trainable, "workers": workers, "epochs": epochs, "weights": f"weights/{model}.pth"}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return self._measured(["baseline.py", str(self.pictures), model, "--lr", "0.0001", *words])

    def ours(self, epochs: int, changes: list[str]) -> dict[str, float]:
        """Return the means of our epochs, of which the first computes validation's features for all."""
        return self._measured(["speed.py", "--run", str(epochs), *changes])

    def _measured(self, command: list[str]) -> dict[str, float]:
        script, *arguments = command
        with self.started([sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / script), *arguments]) as process:
            *epochs, last = map(json.loads, process.stdout)
        return {name: statistics.mean(each[f"{name}_seconds"] for each in epochs) for name in ("train", "val")} | last

    def started(self, command: list[str]) -> subprocess.Popen:
        """Return the process of a command, started here."""
        return subprocess.Popen(command, cwd=self.folder, env=self.environ, stdout=subprocess.PIPE, text=True)

    def dvc(self, *arguments: str) -> None:
        """Run a command of DVC."""
        self._run(["dvc", *arguments])

    def _run(self, command: list[str]) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(command, cwd=self.folder, env=self.environ, check=True, **quiet)

    def wait_for(self, count: int) -> None:
        """Return once there are so many experiments."""
        while self.experiments() < count:
            time.sleep(0.2)

    def experiments(self) -> int:
        """Return how many there are."""
        names = subprocess.check_output(["git", "for-each-ref", "--format=%(refname)"], cwd=self.folder, text=True)
        return len(re.findall(r"(?m)^refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/", names))


def run_epochs(epochs: int, changes: list[str]) -> None:
    """Train as the stage does; print the seconds of each epoch, and at the end the peak of memory."""
    this = experiment.by_hand(changes)
    optimizer, schedule = this.optimizer()
    for epoch in range(epochs):
        this.begin_epoch(epoch)
        torch.set_num_threads(parallel.cores() if this.is_heavy else 1)
        start = time.perf_counter()
        sums = training.Sums(this.device, epoch, {})
        with tqdm(disable=True) as bar:
            this.train_epoch(optimizer, schedule, this.training_batches(epoch), sums, bar)
        between = time.perf_counter()
        this.validate(this.val_batches())
        print(json.dumps({"train_seconds": between - start, "val_seconds": time.perf_counter() - between}), flush=True)
    print(json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


# The machine ----------------------------------------------------------------------------------------------------------


def machine() -> dict:
    """Return what the machine is, and how many GFLOP/s a large convolution has on it."""
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if place.type == "cuda" else processor()
    limits = {}
    for kind in (torch.float32, torch.bfloat16):
        layer = nn.Conv2d(256, 256, 3, padding=1).to(place, kind, memory_format=torch.channels_last)
        inputs = torch.randn(16, 256, 56, 56).to(place, kind, memory_format=torch.channels_last)
        seconds = []
        with torch.no_grad():
            for _ in range(8):
                start = time.perf_counter()
                layer(inputs).sum().item()
                seconds.append(time.perf_counter() - start)
        limits[str(kind).removeprefix("torch.")] = round(2 * 256 * 256 * 9 * 16 * 56 * 56 / min(seconds) / 1e9)
    return {"device": name, "cores": parallel.cores(), "torch": torch.__version__, "gflops": limits}


def processor() -> str:
    """Return the processor's name."""
    about = Path("/proc/cpuinfo")
    known = re.search(r"model name\s*: (.*)", about.read_text()) if about.exists() else None
    return known[1] if known else platform.processor()


def flop(model: str) -> int:
    """Return the floating-point operations of a picture's way through the network."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        models.get_model(model).eval()(torch.zeros(1, 3, 224, 224))
    return counter.get_total_flops()


# What is shown --------------------------------------------------------------------------------------------------------


def total(run: dict[str, float]) -> float:
    """Return the seconds of an epoch, with its validation."""
    return run["train"] + run["val"]


def print_epochs(found: dict) -> None:
    """Print the table of the epochs."""
    limit = found["machine"]["gflops"]["float32"]
    print("an epoch: seconds of training + validation, how many times as fast as with 4 workers; peak of memory;")
    print(f"and which share of this machine's {limit} GFLOP/s (fp32) ours, cold, makes of the network's operations")
    print(f"{'':20}{WAYS[0]:>14}" + "".join(f"{way:>22}" for way in WAYS[1:]) + f"{'MB':>14}{'':3}share")
    for name, ways in found["cases"].items():
        seconds = {way: total(ways[way]) for way in WAYS}
        parts = {way: f"{ways[way]['train']:.2f} + {ways[way]['val']:.2f}" for way in WAYS}
        columns = "".join(f"{parts[way]:>15}{seconds['4 workers'] / seconds[way]:6.1f}x" for way in WAYS[1:])
        peaks = f"{ways['4 workers']['peak_mb']:.0f}, {ways['cold']['peak_mb']:.0f}"
        share = ways["network"]["flop"] / seconds["cold"] / (limit * 1e9)
        print(f"{name:20}{parts[WAYS[0]]:>14}{columns}{peaks:>14}{share:8.0%}")


def plot(found: dict, path: Path) -> None:
    """Draw how many times as fast the epochs are, and what grows with pictures and experiments."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), dpi=110, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    cases = found.get("epochs", {}).get("cases", {})
    for offset, way in ((-0.2, "cold"), (0.2, "warm")):
        ratios = [total(ways["4 workers"]) / total(ways[way]) for ways in cases.values()]
        bars = left.barh([place + offset for place in range(len(ratios))], ratios, 0.4, label=way)
        left.bar_label(bars, [f"{ratio:.1f}" for ratio in ratios], padding=2, fontsize=8)
    left.set_yticks(range(len(cases)), list(cases))
    left.invert_yaxis()
    left.axvline(1, color="0.5", linewidth=1)
    left.set(xscale="log", xlabel="times as fast as the baseline", title="an epoch")
    rows = found.get("pictures", {}).get("seconds", {})
    numbers = [int(count) for count in rows]
    for way in ("4 workers", "cold", "warm"):
        middle.loglog(numbers, [row[way] for row in rows.values()], marker="o", label=way)
    middle.set_xticks(numbers, [f"{number:,}" for number in numbers])
    middle.minorticks_off()
    middle.set(xlabel="pictures", ylabel="seconds an epoch", title="SqueezeNet, head")
    runs = found.get("sweep", {}).get("seconds", {})
    counts = [int(key) for key in runs if key.isdigit()]
    right.loglog(counts, [runs["baseline"] * count for count in counts], marker="o", label="the baseline's script")
    right.loglog(counts, [runs[str(count)] for count in counts], marker="o", label="dvc queue start -j 1")
    right.set(xlabel="experiments", ylabel="seconds", title="a sweep over lr")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, format="png", metadata={"Software": None})


if __name__ == "__main__":
    main()
