"""Kill experiments at random moments, for as long as you like, and see that each ends as one that was not killed.

    python tests/soak.py --kills 100              # about 12 s a kill on two cores
    python tests/soak.py --kills 20 --seed 7      # at other moments

Runs `dvc exp run` in a scratch clone of the project, on drawn pictures. At a random moment, in whatever stage or
between them, DVC and all that it started is killed (SIGKILL), or the next time DVC alone; then comes the same command
again, until it ends by itself. The results must be to the bit those of the same experiment in another clone, where
nothing is killed. Then comes the next experiment. Exit status 1 where a result differs, or where the same command does
not do.
"""

import argparse
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from helpers import as_user, clone, differences, git, results

import psutil

RECIPE = "drawn: [ants, bees]\ntrain: 40\nval: 10\nsize: 40\nseed: 0\n"
SETTINGS = {
    "num_epochs": 8,
    "batch_size": 4,
    "lr": 0.01,
    "momentum": 0.9,
    "device": "cpu",
    "backbone__weights": "none",
    "data__source": "data/tiny.yaml",
    "data__image_size": 32,
    "data__resize": 40,
}
VARIANTS = [
    ("model_name=squeezenet", "schedule.name=step", "schedule.step_epochs=2", "checkpoint_minutes=0.002"),
    ("model_name=mobilenet_v3_small", "schedule.name=plateau", "schedule.patience=0", "checkpoint_minutes=5.0"),
    ("model_name=shufflenet_v2_x0_5", "schedule.name=cosine", "checkpoint_minutes=0.005"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill experiments at random, and see that they end as others do.")
    parser.add_argument("--kills", type=int, default=100, help="to survive (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, help="for the clones, to be kept (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        sys.exit(soak((arguments.folder or Path(folder)).resolve(), arguments.kills, random.Random(arguments.seed)))


def soak(folder: Path, number: int, draw: random.Random) -> int:
    """Run experiments until that many kills are done; return the exit status."""
    calm, rough = (clone(folder / name, RECIPE, **SETTINGS) for name in ("calm", "rough"))
    kills, problems = [], []
    try:
        for trial in itertools.count():
            if len(kills) >= number or len(problems) >= 3:
                break
            problems += experiment(trial, calm, rough, draw, kills)
    except KeyboardInterrupt:
        print("\nstopped")
    summary(kills, problems)
    left = left_behind(rough)
    print("left behind by DVC and git: " + (", ".join(left) or "nothing"))
    return bool(problems)


def experiment(trial: int, calm: Path, rough: Path, draw: random.Random, kills: list[dict]) -> list[str]:
    """Run an experiment in both clones, killing it in one; return what went wrong."""
    settings = [f"seed={trial}", f"data.max_skipped={0.1 + trial / 1000:g}", *VARIANTS[trial % len(VARIANTS)]]
    command = ["dvc", "exp", "run", *itertools.chain(*(("-S", each) for each in settings))]
    print(f"\nexperiment {trial}: {' '.join(command)}", flush=True)
    began = time.time()
    attempt = Attempt(calm, command)
    if attempt.wait():
        return [f"exit status {attempt.process.returncode} though nothing was killed: {attempt.printed()}"]
    life = time.time() - began
    print(f"  {life:5.1f} s: ended, as nothing was killed", flush=True)
    problems = until_it_ends(rough, command, life, draw, kills)
    if problems:
        return problems
    different = differences(results(rough), results(calm))
    print("  results: " + (f"DIFFERENT: {', '.join(different)}" if different else "the same to the bit"), flush=True)
    return [f"experiment {trial} differs in {', '.join(different)}"] * bool(different)


class Attempt:
    """A command at work in a process group of its own."""

    def __init__(self, folder: Path, command: list[str]):
        self.folder, self.log = folder, tempfile.TemporaryFile("w+")  # noqa: SIM115
        streams = {"stdin": subprocess.DEVNULL, "stdout": self.log, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, cwd=folder, env=as_user(folder), start_new_session=True, **streams)

    def wait(self, seconds: float | None = None) -> int | None:
        """Return the exit status, or None where the command is still at work after that many seconds."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        except KeyboardInterrupt:
            self.kill(group=True)
            raise

    def kill(self, group: bool) -> dict:
        """Kill DVC, alone or with all that it started; return what was hit, and the seconds of work that it cost."""
        stage, began = self._stage()
        saved = [path.stat().st_mtime for path in self.folder.glob(".dvc/tmp/checkpoints/*/*.pt")]
        now = time.time()
        (os.killpg if group else os.kill)(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return {"stage": stage, "group": group, "lost": now - max([began, *(saved if stage == "train" else [])])}

    def _stage(self) -> tuple[str, float]:
        """Return the stage at work and when it began; "dvc" and now where there is none."""
        with suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    found = re.search(r"^\S*python3? src/(\w+)\.py$", " ".join(process.cmdline()))
                    if found:
                        return found[1], process.create_time()
        return "dvc", time.time()

    def printed(self) -> str:
        self.log.seek(0)
        return self.log.read().strip()


def until_it_ends(folder: Path, command: list[str], life: float, draw: random.Random, kills: list[dict]) -> list[str]:
    """Run the command and kill it, until it ends by itself; return what went wrong. Adds what was hit to `kills`."""
    problems, refused = [], 0
    while True:
        moment, group = draw.uniform(0, life / 2), len(kills) % 2 == 0
        attempt = Attempt(folder, command)
        status = attempt.wait(moment)
        if status is None:
            kill = attempt.kill(group)
            kills.append(kill)
            print(f"  {moment:5.1f} s: killed {'all' if group else 'dvc alone'} in {kill['stage']}", flush=True)
        elif status == 0:
            print("  ended by itself", flush=True)
            return problems
        else:
            error = "\n".join(line for line in attempt.printed().splitlines() if "rror" in line) or attempt.printed()
            print(f"  exit status {status}: {error}", flush=True)
            left = half_done(folder, error)
            if left:
                for path in left:
                    path.unlink()
                kills[-1]["mended"] = ", ".join(str(path.relative_to(folder)) for path in left)
                print(f"  removed {kills[-1]['mended']}", flush=True)
                continue
            problems.append(f"exit status {status}: {error}")
            refused += 1
            if refused == 3:
                return problems
            time.sleep(5)


def half_done(folder: Path, error: str) -> list[Path]:
    """Return the files that DVC or git left half done, where `error` speaks of them, and a user has to remove."""
    found = re.search(r"Unable to read RWLock-file '(.+?)'", error)  # DVC does not write this one at once
    if found:
        return [folder / found[1]]
    return sorted((folder / ".git").rglob("*.lock")) if re.search(r"index is locked|\.lock'$", error) else []


def summary(kills: list[dict], problems: list[str]) -> None:
    """Print how many kills there were, in which stage, and what they cost."""
    print(f"\n{'KILLED IN':10} {'KILLS':>5} {'OF ALL':>6} {'OF DVC':>6}   LOST (mean, max)")
    stages = Counter(kill["stage"] for kill in kills)
    for stage in [*stages, *["in all"] * bool(kills)]:
        rows = [kill for kill in kills if stage in (kill["stage"], "in all")]
        groups, lost = sum(kill["group"] for kill in rows), [kill["lost"] for kill in rows]
        cost = f"{mean(lost):6.1f} s {max(lost):6.1f} s" if stage != "dvc" else ""
        print(f"{stage:10} {len(rows):5} {groups:6} {len(rows) - groups:6}   {cost}")
    mended = Counter(kill["mended"] for kill in kills if "mended" in kill)
    print(f"{len(kills)} kills, {len(problems)} problems", *problems, sep="\n  ")
    for what, number in mended.items():
        print(f"{number} of them survived only after {what} was removed")


def left_behind(folder: Path) -> list[str]:
    """Return what a process that was killed has left in the clone, and none after it has taken away."""
    head = [] if (folder / ".git/HEAD").read_text().startswith("ref: ") else ["a detached HEAD"]
    locks = (folder / ".git").rglob("*.lock")
    temporary = [path for path in folder.rglob("*.tmp") if ".git" not in path.parts]
    refs = git(folder, "for-each-ref", "--format=%(refname)", "refs/exps/exec", "refs/exps/stash", "refs/stash").split()
    return [str(path.relative_to(folder)) for path in [*locks, *temporary]] + refs + head


if __name__ == "__main__":
    main()
