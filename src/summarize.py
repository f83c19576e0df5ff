"""Mean and standard deviation over folds and seeds: a line for each group of experiments that are otherwise alike.

    dvc exp run --queue -S data.folds=5 -S 'data.fold=range(5)' -S lr=0.001,0.01 && dvc exp run --run-all
    python src/summarize.py                                       # val_acc and val_loss, the best val_acc first
    python src/summarize.py --metric eval.f1 --metric eval.auroc  # any column of `dvc exp show`
    python src/summarize.py -A --json                             # of all commits, not HEAD's alone; for a program

The standard deviation is that of a sample (n - 1): what to expect of one run more, not of the mean.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune import stage
from finetune.datasets import listing
from finetune.errors import UserError, nearest
from finetune.experiments import flat
from finetune.repeats import Repeat, seed_and_fold, shared_settings
from finetune.tables import aligned

METRICS = ["val_acc", "val_loss"]


@dataclass(frozen=True)
class Experiment:
    """A finished experiment, as `dvc exp show` has it."""

    name: str
    settings: dict[str, Any]  # {"data.fold": 0}
    metrics: dict[str, float]  # {"eval.acc": 0.9}
    finished: str  # date and time

    @property
    def repeat(self) -> Repeat:
        """Its seed and fold."""
        return seed_and_fold(self.settings)


@dataclass(frozen=True)
class Group:
    """Experiments that differ in fold and seed alone."""

    settings: dict[str, Any]  # in which groups differ
    folds: int  # 0: no cross-validation
    experiments: list[Experiment]  # by seed and fold, each of them once
    mean: dict[str, float]
    std: dict[str, float | None]  # None of a single experiment

    @property
    def name(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.settings.items()) or "all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--metric", action="append", dest="metrics", metavar="NAME", help="instead of val_acc, val_loss"
    )
    parser.add_argument("-A", "--all-commits", action="store_true", help="experiments of all commits, not HEAD's alone")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    metrics = list(dict.fromkeys(arguments.metrics or METRICS))

    finished, others = collect(exp_show(arguments.all_commits))
    experiments = [each for each in finished if all(metric in each.metrics for metric in metrics)]
    others["without " + " or ".join(metrics)] = [each.name for each in finished if each not in experiments]
    left_out = [f"{len(names)} {why} ({listing(names)})" for why, names in others.items() if names]
    if left_out:
        print(f"not in the numbers: {'; '.join(left_out)}", file=sys.stderr)
    if not experiments:
        raise UserError(nothing_found(finished, metrics))

    groups = summarize(experiments, metrics)
    if arguments.json:
        print(json.dumps([plain(group) for group in groups], indent=2, ensure_ascii=False))
    else:
        print(*table(groups), sep="\n")
    for group in groups:
        for incomplete in missing_folds(group):
            print(f"warning: {group.name}: {incomplete}", file=sys.stderr)


def exp_show(all_commits: bool) -> list[dict]:
    """Return what `dvc exp show --json` says. Raises UserError where dvc does."""
    if sys.stderr.isatty():
        print("reading the experiments, which takes some seconds", file=sys.stderr)
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json", *(["-A"] if all_commits else [])]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"`dvc exp show` failed: {result.stderr.strip().removeprefix('ERROR: ')}")
    return json.loads(result.stdout)


def collect(shown: Sequence[dict]) -> tuple[list[Experiment], dict[str, list[str]]]:
    """Return the finished experiments that `dvc exp show --json` lists, and by reason the names of all others."""
    finished, others = [], defaultdict(list)
    for entry in (entry for commit in shown for entry in commit["experiments"] or ()):
        tip = entry["revs"][0]
        state, data = (entry["executor"] or {}).get("state") or "success", tip["data"] or {}
        name = tip["name"] or entry["name"] or tip["rev"][:7]
        params, metrics = (_flat(data.get(kind) or {}) for kind in ("params", "metrics"))
        numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
        if state != "success":
            others[state].append(name)
        elif tip["error"] or not params:
            others["unreadable"].append(name)
        elif "continues" in metrics:  # what it is follows from another's settings, too
            others["on top of another"].append(name)
        else:
            finished.append(Experiment(name, params, numbers, data["timestamp"] or ""))
    return finished, dict(others)


def _flat(files: dict[str, dict]) -> dict[str, Any]:
    """Return the values in all files under dotted keys. Files that could not be read have none."""
    return {key: value for file in files.values() for key, value in flat(file.get("data") or {}).items()}


def nothing_found(finished: Sequence[Experiment], metrics: Sequence[str]) -> str:
    """Return what to tell of experiments of which none has all of the metrics."""
    if not finished:
        return (
            "there is no finished experiment. `dvc exp run` makes one; -A takes those of all commits, not HEAD's alone."
        )
    known = sorted({name for each in finished for name in each.metrics})
    unknown = [metric for metric in metrics if metric not in known]
    if not unknown:
        return f"no experiment has all of {', '.join(metrics)}: ask for one of them at a time."
    hint = nearest(unknown[0], known) or f" Known: {', '.join(known)}."
    return f"no experiment has the metric {unknown[0]}.{hint}"


def summarize(experiments: Sequence[Experiment], metrics: Sequence[str]) -> list[Group]:
    """Return the groups of experiments that differ in fold and seed alone, the highest mean of the first metric first.

    Of those of the same fold and seed in a group, the one that finished last counts.
    """
    members: dict[str, dict[tuple[int, int], Experiment]] = defaultdict(dict)
    for each in sorted(experiments, key=lambda experiment: experiment.finished):
        members[json.dumps(shared_settings(each.settings), sort_keys=True)][each.repeat] = each
    runs_of = [[run for _, run in sorted(runs.items())] for runs in members.values()]
    commons = [shared_settings(runs[0].settings) for runs in runs_of]
    names = dict.fromkeys(name for common in commons for name in common)
    differing = [name for name in names if any((name, commons[0].get(name)) not in each.items() for each in commons)]
    groups = []
    for runs, common in zip(runs_of, commons, strict=True):
        values = {metric: [run.metrics[metric] for run in runs] for metric in metrics}
        groups.append(
            Group(
                {name: common[name] for name in differing if name in common},
                common.get("data.folds", 0),
                runs,
                {metric: statistics.fmean(numbers) for metric, numbers in values.items()},
                {metric: statistics.stdev(numbers) if len(runs) > 1 else None for metric, numbers in values.items()},
            )
        )
    return sorted(groups, key=lambda group: -group.mean[metrics[0]])


def missing_folds(group: Group) -> list[str]:
    """Return a line for each seed of which some folds are not in the group."""
    folds_of = defaultdict(list)
    for seed, fold in (each.repeat for each in group.experiments):
        folds_of[seed].append(str(fold))
    return [
        f"seed {seed} has folds {', '.join(folds)} of {group.folds} (0 to {group.folds - 1})"
        for seed, folds in folds_of.items()
        if len(folds) < group.folds
    ]


def table(groups: Sequence[Group]) -> list[str]:
    """Return the lines of a table, a line a group under a header; its columns are the settings that differ first."""
    settings = list(dict.fromkeys(name for group in groups for name in group.settings))
    metrics = list(groups[0].mean)
    rows = [[*settings, "n", "folds", "seeds", *metrics]]
    for group in groups:
        seeds, folds = (len(set(each)) for each in zip(*(each.repeat for each in group.experiments), strict=True))
        rows.append(
            [
                *(str(group.settings.get(name, "-")) for name in settings),
                str(len(group.experiments)),
                f"{folds} of {group.folds}" if group.folds else "-",
                str(seeds),
                *(f"{group.mean[name]:.4f} ± {_four_digits(group.std[name])}" for name in metrics),
            ]
        )
    return aligned(rows)


def _four_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def plain(group: Group) -> dict:
    """Return a group's numbers for JSON."""
    return {
        "settings": group.settings,
        "n": len(group.experiments),
        "folds": group.folds,
        "experiments": [
            {"name": each.name, "seed": seed, "fold": fold if group.folds else None}
            | {"metrics": {metric: each.metrics[metric] for metric in group.mean}}
            for each in group.experiments
            for seed, fold in [each.repeat]
        ],
        "mean": group.mean,
        "std": group.std,
    }


if __name__ == "__main__":
    stage.run(main)
