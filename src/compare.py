"""Whether one of two experiments is better, or could be by chance: picture by picture, and over seeds and folds.

    python src/compare.py urban-yank agley-scut               # experiments, branches, tags, commits, or workspace
    python src/compare.py urban-yank agley-scut --pictures    # and the pictures on which they differ
    python src/compare.py urban-yank agley-scut --alone       # without the other seeds and folds of their settings
    python src/compare.py urban-yank workspace --split test --json

Experiments of the same commit that differ from the named ones in seed and data.fold alone are compared with them, seed
by seed, as far as both have the same. docs/compare.md says how to read it.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finetune import comparison, repeats, stage
from finetune.comparison import Comparison, Predictions, aligned_to
from finetune.datasets import listing
from finetune.errors import UserError
from finetune.experiments import PREDICTIONS, Experiment, Experiments
from finetune.repeats import OverRuns, Repeat, shared_settings
from finetune.tables import aligned

import numpy as np


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: settings, and what networks trained with them said of the same pictures."""

    experiment: Experiment  # the one that was named
    runs: dict[str, list[Experiment]]  # by the run's name, the experiments of its folds
    predictions: dict[str, Predictions]  # of each run

    @property
    def name(self) -> str:
        """That of the experiment that was named."""
        return self.experiment.name

    @property
    def settings(self) -> dict[str, Any]:
        """Those in which all that is compared agrees."""
        single = sum(len(members) for members in self.runs.values()) == 1
        return self.experiment.settings if single else repeats.shared_settings(self.experiment.settings)

    @property
    def accuracies(self) -> dict[str, float]:
        """The share of pictures that are right, of each run."""
        return {run: float(each.correct.mean()) for run, each in self.predictions.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs=2, metavar="EXPERIMENT", help="the first is the one to compare with")
    parser.add_argument("--alone", action="store_true", help="compare these two, not other seeds and folds of theirs")
    parser.add_argument("-A", "--all-commits", action="store_true", help="look for those on all commits, not on theirs")
    parser.add_argument("--split", default="val", help="of whose pictures (val)")
    parser.add_argument("--pictures", action="store_true", help="list the pictures on which they differ")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()

    experiments = Experiments.here()
    named = [experiments.find(name) for name in arguments.names]
    if named[0].revision == named[1].revision:
        raise UserError(f"{' and '.join(arguments.names)} are the same: name two experiments.")
    for each in named:
        experiments.file(each, PREDICTIONS)  # which it must have, even where only others of its settings are compared
    groups = [] if arguments.alone else with_repeats(experiments, named, arguments.all_commits, arguments.split)
    groups = groups or [{(0, 0): each} for each in named]  # then it doesn't matter which seeds they are
    first, second = sides(experiments, named, groups, arguments.split)
    pairs = [(first.predictions[run], second.predictions[run]) for run in first.predictions]
    compared = comparison.compare(*pairs[0]) if len(pairs) == 1 else repeats.compare_runs(pairs)
    said = verdict(first, second, compared)

    if arguments.json:
        told = plain(first, second, compared, arguments.split) | {"verdict": said}
        if arguments.pictures:
            told["pictures"] = differing_pictures(pairs)
        print(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        print(*table(first, second), "", *said, sep="\n")
        if arguments.pictures:
            print("", *picture_table(first.name, second.name, differing_pictures(pairs)), sep="\n")
    for side, group in zip((first, second), groups, strict=True):
        compared_with = {each.name for members in side.runs.values() for each in members}
        if apart := [each.name for each in group.values() if each.name not in compared_with]:
            print(f"not compared, as the other side lacks their seed or fold: {listing(apart)}", file=sys.stderr)


# What is compared ----------------------------------------------------------------------------------------------------


def with_repeats(
    experiments: Experiments, named: Sequence[Experiment], all_commits: bool, split: str
) -> list[dict[Repeat, Experiment]]:
    """Return for each of two experiments, by seed and fold, those that differ from it in these alone, itself included.

    [] where that is no more than they are, for lack of seeds and folds that both have, or as their settings are equal.
    Those whose predictions are not at hand are named on stderr and left out.
    """

    def is_readable(experiment: Experiment) -> bool:
        try:
            read(experiments, experiment, split)
        except UserError as error:
            print(f"not compared: {str(error).splitlines()[0]}", file=sys.stderr)
            return False
        return True

    known = [each for each in experiments.all() if PREDICTIONS in each.outs]
    groups = [
        repeats.repeats(of, [each for each in known if all_commits or each.baseline == of.baseline]) for of in named
    ]
    groups = [{at: each for at, each in group.items() if each in named or is_readable(each)} for group in groups]
    alike = {each.revision for each in groups[0].values()} & {each.revision for each in groups[1].values()}
    return [] if alike or len(groups[0].keys() & groups[1].keys()) < 2 else groups


def sides(
    experiments: Experiments, named: Sequence[Experiment], groups: Sequence[dict[Repeat, Experiment]], split: str
) -> list[Side]:
    """Return both sides, with the predictions of the runs that both have. Raises UserError where some are missing."""
    pooled = split == "val" and all(each.settings.get("data.folds") for each in named)
    runs = repeats.in_both(groups[0], groups[1], pooled)
    made = []
    for of, group in zip(named, groups, strict=True):
        members = {run: [group[each] for each in repeated] for run, repeated in runs.items()}
        predictions = {run: [read(experiments, each, split) for each in parts] for run, parts in members.items()}
        made.append(Side(of, members, {run: repeats.pool(parts) for run, parts in predictions.items()}))
    return made


def read(experiments: Experiments, experiment: Experiment, split: str) -> Predictions:
    """Return an experiment's predictions of a split. Raises UserError, with its name, where there are none."""
    file = experiments.file(experiment, PREDICTIONS)
    try:
        return comparison.read_predictions(file, split)
    except UserError as error:
        raise UserError(f"{experiment.name}: {error}") from None


def differing_pictures(pairs: Sequence[repeats.Pair]) -> list[dict[str, Any]]:
    """Return path, label and each run's predictions of the pictures on which one side is right more often.

    Those on which the second is come first.
    """
    reference = pairs[0][0]
    said = [np.stack([aligned_to(reference, pair[side]).predictions for pair in pairs]) for side in (0, 1)]
    gained = np.subtract(*((each == reference.labels).sum(axis=0) for each in reversed(said)))
    order = [index for index in np.argsort(-gained, kind="stable") if gained[index]]
    return [
        {"path": reference.keys[i], "label": str(reference.labels[i])}
        | {side: each[:, i].tolist() for side, each in zip(("first", "second"), said, strict=True)}
        for i in order
    ]


# What is said --------------------------------------------------------------------------------------------------------


def table(first: Side, second: Side) -> list[str]:
    """Return the lines of a table with a column a side: the settings that differ, and the accuracy of each run."""
    rows = [["", first.name, second.name]]
    rows += [[name, *map(str, values)] for name, values in differing_settings(first, second).items()]
    accuracies = [each.accuracies for each in (first, second)]
    if len(first.runs) == 1:
        right = [int(each.correct.sum()) for side in (first, second) for each in side.predictions.values()]
        ((n,),) = {tuple(len(each.keys) for each in side.predictions.values()) for side in (first, second)}
        shares = [value for each in accuracies for value in each.values()]
        rows.append(["accuracy", *(f"{share:.4f} ({k} of {n})" for share, k in zip(shares, right, strict=True))])
    else:
        rows += [[run, *(f"{each[run]:.4f}" for each in accuracies)] for run in first.runs]
        spread = [(statistics.fmean(each.values()), statistics.stdev(each.values())) for each in accuracies]
        rows.append(["mean", *(f"{mean:.4f} ± {std:.4f}" for mean, std in spread)])
    return aligned(rows)


def differing_settings(first: Side, second: Side) -> dict[str, list[Any]]:
    """Return the values of both sides for each setting in which they differ."""
    one, other, missing = first.settings, second.settings, object()
    names = [name for name in dict.fromkeys([*one, *other]) if name not in repeats.WITHOUT_EFFECT]
    differing = [name for name in names if one.get(name, missing) != other.get(name, missing)]
    return {name: [one.get(name, "-"), other.get(name, "-")] for name in differing}


def verdict(first: Side, second: Side, compared: Comparison | OverRuns) -> list[str]:
    """Return in sentences what the comparison says, and what it does not."""
    if isinstance(compared, OverRuns):
        said, end = repeats.sentence(first.name, second.name, compared), repeats.advice(compared)
    else:
        said = comparison.sentence(first.name, second.name, compared)
        if shared_settings(first.experiment.settings) == shared_settings(second.experiment.settings):
            end = "Their settings are the same, seed and fold apart: such a difference is what another seed makes."
        else:
            end = "That is of two trained networks, not yet of their settings: several seeds of both tell more."
    points = [100 * each for each in (compared.difference, compared.low, compared.high)]
    of_both = f"Accuracy of {second.name} minus that of {first.name}"
    lines = [said, "{}: {:+.1f} points, 95 % interval {:+.1f} to {:+.1f}.".format(of_both, *points)]
    if not compared.differs:
        lines.append(f"A difference below {100 * compared.detectable:.1f} points can't be told from chance here.")
    folds = len({each.settings.get("data.fold") for members in first.runs.values() for each in members})
    if folds > 1:
        lines.append(f"The networks of the {folds} folds share training pictures, so p is somewhat too small.")
    return [*lines, end] if end else lines


def picture_table(first: str, second: str, pictures: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of pictures: of one run what each side said, of several how often it was right."""
    rows = [["picture", "label", first, second]]
    for each in pictures:
        label, *answers = each["label"], each["first"], each["second"]
        one = len(answers[0]) == 1
        cells = [said[0] if one else f"{said.count(label)} of {len(said)} right" for said in answers]
        rows.append([each["path"], label, *cells])
    return aligned(rows)


def plain(first: Side, second: Side, compared: Comparison | OverRuns, split: str) -> dict[str, Any]:
    """Return what was compared, and what came of it, for JSON."""
    sides = {
        key: {
            "name": side.name,
            "revision": side.experiment.revision,
            "accuracy": statistics.fmean(side.accuracies.values()),
            "runs": {
                run: {"accuracy": side.accuracies[run], "experiments": [each.name for each in members]}
                for run, members in side.runs.items()
            },
        }
        for key, side in (("first", first), ("second", second))
    }
    numbers = {"differs": compared.differs, "detectable": compared.detectable}
    return {"split": split} | sides | {"settings": differing_settings(first, second)} | asdict(compared) | numbers


if __name__ == "__main__":
    stage.run(main)
