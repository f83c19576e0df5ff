"""A page of the experiments, to look at, sort and compare: one HTML file that opens in any browser, without a network.

    python src/report.py                            # results/report.html: the experiments of the current commit
    python src/report.py -A -o all.html             # of all commits
    python src/report.py agley-scut urban-yank      # these alone; branches and commits, too
    python src/report.py --sweep squeezenet         # those of a sweep

What is queued, running or has failed in DVC's queue is listed, too.
"""

import argparse
import dataclasses
import re
import subprocess
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from finetune import reports, stage
from finetune.clones import dvc, git
from finetune.comparison import read_predictions
from finetune.errors import UserError, nearest
from finetune.experiments import PREDICTIONS, Experiment, Experiments
from finetune.files import replaced
from finetune.reports import Record

from tqdm import tqdm

T = TypeVar("T")

OUTPUT = Path("results/report.html")
CURVES, PICTURES = "results/train/plots", "results/evaluate/pictures"
NOT_CODE = re.compile(r"params\.yaml|dvc\.lock|results/.*|\.dvc/tmp/.*")  # what an experiment's commit changes anyway
TIME = r"\d\d:\d\d.*?|\w+\.? \d\d, \d{4}"  # 04:01 PM, and of another day Nov 21, 2026
QUEUE_LINE = re.compile(rf"([0-9a-f]{{7,}})\s+(?:(\S+)\s+)??(?:{TIME})\s+(Queued|Running|Failed)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="experiment", help="these alone; default: all of the current commit"
    )
    parser.add_argument("-A", "--all-commits", action="store_true", help="experiments of all commits, not HEAD's alone")
    parser.add_argument("--sweep", metavar="NAME", help="those of a sweep: NAME-000, NAME-001 …")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, help=f"default: {OUTPUT}")
    arguments = parser.parse_args()
    if arguments.names and (arguments.all_commits or arguments.sweep):
        parser.error("name experiments, or take those of commits or of a sweep (-A, --sweep), not both")

    store = Experiments.here()
    root = store.root
    head = git(root, "rev-parse", "HEAD").strip()
    chosen = sorted(choose(store, arguments, head), key=Record.rank)
    changed = changed_files(root, [each.experiment for each in chosen])
    records = [
        read(store, dataclasses.replace(each, changed=changed[index]))
        for index, each in enumerate(tqdm(chosen, "curves", unit=" experiments", delay=2, disable=None))
    ]
    commits = {each.experiment.baseline for each in chosen} - {""}
    baselines = {each: store.find(each).settings for each in commits if known(root, each)}

    about = {
        "project": root.name,
        "scope": scope(arguments, head),
        "made": datetime.now().astimezone().isoformat(timespec="minutes"),
    }
    page = reports.page(about | reports.contents(records, baselines, head))
    with replaced(arguments.output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{arguments.output}: {len(records)} experiments, {arguments.output.stat().st_size / 1e6:.1f} MB")


def scope(arguments: argparse.Namespace, head: str) -> str:
    """Return in words which experiments were asked for."""
    if arguments.names:
        return f"{len(arguments.names)} experiments by name"
    which = f"of the sweep {arguments.sweep}, " if arguments.sweep else ""
    return which + ("of all commits" if arguments.all_commits else f"of commit {head[:7]}")


def choose(store: Experiments, arguments: argparse.Namespace, head: str) -> list[Record]:
    """Return the experiments that were asked for. Raises UserError where there are none."""
    there = [*map(Record, store.all()), *queue(store)]
    if arguments.names:
        here = {each.experiment.name: each for each in reversed(there) if each.experiment.baseline == head}
        return [here.get(name) or Record(store.find(name)) for name in dict.fromkeys(arguments.names)]
    chosen = [each for each in there if arguments.all_commits or each.experiment.baseline in (head, "")]
    if arguments.sweep:
        sweep = re.compile(rf"{re.escape(arguments.sweep)}-\d{{3,}}(-\d+)?")
        of_sweep = [each for each in chosen if sweep.fullmatch(each.experiment.name)]
        if not of_sweep:
            trials = (re.fullmatch(r"(.+?)-\d{3,}(-\d+)?", each.experiment.name) for each in chosen)
            hint = nearest(arguments.sweep, {match[1] for match in trials if match})
            hint = hint or ("" if arguments.all_commits else " -A takes those of all commits.")
            raise UserError(f"no experiment is of a sweep named {arguments.sweep}.{hint}")
        chosen = of_sweep
    if not chosen and there:
        raise UserError(f"no experiment was run on this commit; -A takes those of all commits ({len(there)}).")
    if not chosen:
        raise UserError("there is no experiment yet: `dvc exp run` makes one.")
    return chosen


def queue(store: Experiments) -> list[Record]:
    """Return what is queued, running or has failed in DVC's queue."""
    if not (store.root / ".dvc/tmp/exps/celery").exists():  # or starting dvc takes two seconds
        return []
    lines = (QUEUE_LINE.fullmatch(line.strip()) for line in dvc(store.root, "queue", "status").splitlines())
    found = [match.groups() for match in lines if match]
    return [Record(queued(store, task, name or task), state.lower()) for task, name, state in found]


def queued(store: Experiments, task: str, name: str) -> Experiment:
    """Return the experiment of a task of the queue: a stash, on top of the commit on which it is to run."""
    try:
        stash = store.find(task)
        baseline = git(store.root, "rev-parse", f"{task}^1").strip()
    except UserError:  # git has thrown it away
        return Experiment(name, "", "", "", {}, {}, {})
    return dataclasses.replace(stash, name=name, baseline=baseline, metrics={}, stages={}, sizes={})


def read(store: Experiments, record: Record) -> Record:
    """Return the record with its curves, predictions and pictures, as far as DVC's cache has them."""
    if record.state != "finished":
        return record
    experiment, missing = record.experiment, []

    def attempt(path: str, reading: Callable[[], T], default: T) -> T:
        try:
            return reading() if path in experiment.outs else default
        except UserError as error:
            missing.append(str(error))
        except (ValueError, OSError) as error:
            missing.append(f"{path} of {experiment.name} can't be read: {error}")
        return default

    return dataclasses.replace(
        record,
        epochs=attempt(CURVES, lambda: reports.epochs(_ending(".tsv", store.files(experiment, CURVES))), {}),
        predictions=attempt(PREDICTIONS, lambda: read_predictions(store.file(experiment, PREDICTIONS)), None),
        pictures=attempt(PICTURES, lambda: _ending(".png", store.files(experiment, PICTURES)), {}),
        missing=missing,
    )


def _ending(suffix: str, files: dict[str, Path]) -> dict[str, Path]:
    return {Path(name).stem: file for name, file in files.items() if name.endswith(suffix)}


def changed_files(root: Path, experiments: Sequence[Experiment]) -> list[list[str]]:
    """Return for each experiment the project's files that are not as in its baseline, settings and results apart."""
    asked = [f"{commit}^{{tree}}" for each in experiments for commit in (each.baseline, each.revision)]
    told = git(root, "cat-file", "--batch-check", stdin="".join(f"{each}\n" for each in asked)).splitlines()
    trees = [line.split()[0] if line.split()[1:2] == ["tree"] else "" for line in told]
    pairs = [f"{one} {other}" for one, other in zip(trees[::2], trees[1::2], strict=True)]
    wanted = [pair for pair in dict.fromkeys(pairs) if len(pair.split()) == 2]
    files: dict[str, list[str]] = {pair: [] for pair in wanted}
    current: list[str] = []
    command = ["-c", "core.quotePath=false", "diff-tree", "-r", "--name-only", "--diff-filter=d", "--stdin"]
    for line in git(root, *command, stdin="".join(f"{pair}\n" for pair in wanted)).splitlines():
        if line in files:
            current = files[line]
        elif not NOT_CODE.fullmatch(line):
            current.append(line)
    return [files.get(pair, []) for pair in pairs]


def known(root: Path, commit: str) -> bool:
    """Tell whether git has a commit."""
    return not subprocess.run(["git", "cat-file", "-e", commit], cwd=root, capture_output=True).returncode


if __name__ == "__main__":
    stage.run(main)
