"""Whether of two classifiers one is better, or happened to be on these pictures: paired tests of their predictions.

What they say is of other pictures of the same kind, for two trained networks as they are. Whether the settings are
better, which another seed would show, is a question to several experiments: finetune.repeats.
"""

import csv
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError

import numpy as np

LEVEL = 0.05  # what happens by chance at most this often isn't taken for chance


@dataclass(frozen=True)
class Predictions:
    """What an experiment said about each picture of a split."""

    keys: tuple[str, ...]  # paths of the pictures, [n]
    labels: np.ndarray  # names of the classes, [n]
    predictions: np.ndarray  # likewise, [n]

    @property
    def correct(self) -> np.ndarray:
        """Whether each prediction is right, [n] bool."""
        return self.labels == self.predictions


@dataclass(frozen=True)
class Comparison:
    """How often two classifiers were right on the same pictures."""

    n: int  # pictures
    only_first: int  # on which the first is right and the second wrong
    only_second: int
    difference: float  # the second's accuracy minus the first's
    low: float  # of the difference's 95 % interval
    high: float
    p: float  # of McNemar's exact test, two-sided

    @property
    def differs(self) -> bool:
        """Whether the difference is more than what chance makes of equals in one case of twenty."""
        return self.p <= LEVEL

    @property
    def detectable(self) -> float:
        """The least difference of accuracies that would not pass for chance, where the two differ on as many pictures
        as here. It may be more than 1."""
        differing = max(self.only_first + self.only_second, 6)  # five in a row still happen by chance
        excess = range(differing % 2, differing + 1, 2)

        def is_seen(more: int) -> bool:
            return mcnemar((differing - more) // 2, (differing + more) // 2) <= LEVEL

        least = excess[bisect_left(excess, True, key=is_seen)]
        return least / self.n


def read_predictions(file: Path, split: str = "val") -> Predictions:
    """Return what predictions.csv of the stage `evaluate` says of a split. Raises UserError where it has none of it."""
    with open(file, newline="", encoding="utf-8") as lines:
        header, *rows = csv.reader(lines)
    split_at, *columns = (header.index(name) for name in ("split", "path", "label", "prediction"))
    found = [[row[column] for column in columns] for row in rows if row[split_at] == split]
    if not found:
        others = ", ".join(sorted({row[split_at] for row in rows})) or "none at all"
        raise UserError(f"there are no predictions of {split}, only of: {others}.")
    paths, labels, predictions = zip(*found, strict=True)
    return Predictions(paths, np.array(labels), np.array(predictions))


def compare(first: Predictions, second: Predictions) -> Comparison:
    """Return how the second compares with the first, picture by picture.

    Raises UserError where they are not of the same pictures with the same labels.
    """
    return of_counts(len(first.keys), *_only_in_one(first, second))


def _only_in_one(first: Predictions, second: Predictions) -> tuple[int, int]:
    """Return on how many pictures the first alone is right, and the second alone."""
    right, also_right = first.correct, aligned_to(first, second).correct
    return int((right & ~also_right).sum()), int((also_right & ~right).sum())


def aligned_to(first: Predictions, second: Predictions) -> Predictions:
    """Return the second with its pictures in the order of the first's.

    Raises UserError where they are not of the same pictures with the same labels.
    """
    if first.keys != second.keys:
        place = {key: index for index, key in enumerate(second.keys)}
        common = sum(key in place for key in first.keys)
        if not common == len(first.keys) == len(second.keys):
            shared = f"{common or 'none'} of {len(first.keys)} and {len(second.keys)} are in both"
            raise UserError(
                f"they were not evaluated on the same pictures: {shared}.\n"
                "Compare experiments that agree in data.source, data.folds, data.fold, data.split_seed and data.limit."
            )
        order = [place[key] for key in first.keys]
        second = Predictions(first.keys, second.labels[order], second.predictions[order])
    if differing := int((first.labels != second.labels).sum()):
        raise UserError(
            f"{differing} of their {len(first.keys)} pictures have another label in the one than in the other.\n"
            "Run the older one again, on the labels of today."
        )
    return second


def of_counts(n: int, only_first: int, only_second: int) -> Comparison:
    """Return the comparison of n pictures, of which so many are right in the one alone and in the other alone.

    The interval is that of a bootstrap over the pictures: of all its draws, with the probability of each. A draw is
    what it amounts to: how many pictures are of each kind. Each kind begins with half a picture (and those right or
    wrong in both with one), or two classifiers that differ on few pictures would have too short an interval, and those
    that differ on none an empty one. (Agresti and Min 2005 add the same to an interval without a bootstrap,
    doi:10.1002/sim.1781.)
    """
    first, second, neither = np.array([only_first + 0.5, only_second + 0.5, n - only_first - only_second + 1]) / (n + 2)
    variance = n * (first + second - (second - first) ** 2)
    half = math.ceil(8 * variance**0.5) + 16  # what is further from the mean is not worth a digit
    start = round(n * (second - first)) - half
    waves = np.exp(2j * np.pi * np.arange(2 * half) / (2 * half))
    of_one = first / waves + neither + second * waves  # the characteristic function of one picture's difference
    chances = np.fft.fft(of_one**n * waves**-start).real / (2 * half)  # of the differences from start on
    levels = [LEVEL / 2 - 1e-9, 1 - LEVEL / 2 + 1e-9]  # of a bound that is just at its level, the wider interval
    low, high = (start + np.searchsorted(chances.cumsum(), levels)) / n
    difference = (only_second - only_first) / n
    p = mcnemar(only_first, only_second)
    return Comparison(n, only_first, only_second, difference, float(low), float(high), p)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the probability of so uneven a split, or a more uneven one, were either as likely: two-sided, exact.

    McNemar 1947, doi:10.1007/BF02295996.
    """
    return min(1.0, 2 * _at_most(min(only_first, only_second), only_first + only_second))


def told_apart(best: Predictions, others: Sequence[Predictions]) -> list[bool | None]:
    """Return of each of the others whether it is shown to be worse than the best of all; None of one that was not
    evaluated on the best's pictures.

    `best` is the one with the highest accuracy, found by looking, so it is good by luck, too, and the more experiments
    there are, the more of it: comparisons one by one would tell equals from it. What holds here is: **the experiment
    that is truly the best is, in 95 of 100 cases, `best` or among those that are not told apart.** For it is taken for
    worse where one of the m others seems to beat it. Each does with a probability of at most 0.05 / m, as that is the
    level of each one-sided test here, so any of them does with at most 0.05, whichever it is that then is called best.
    (The argument is that of Gupta 1965, doi:10.1080/00401706.1965.10490251. Holm's steps, which allow more to the later
    tests, need a best that was chosen without looking.)
    """
    counts: list[tuple[int, int] | None] = []
    for each in others:
        try:
            counts.append(_only_in_one(best, each))
        except UserError:
            counts.append(None)
    level = LEVEL / max(1, sum(each is not None for each in counts))
    return [each and _at_most(each[1], sum(each)) <= level for each in counts]


def _at_most(successes: int, trials: int) -> float:
    """Return the probability of at most so many heads among the tosses of a fair coin; exact, in integers."""
    ways, total = 1, 0
    for each in range(successes + 1):
        total += ways
        ways = ways * (trials - each) // (each + 1)
    return total / 2**trials


def sentence(first: str, second: str, comparison: Comparison) -> str:
    """Return in words what a comparison says of two classifiers with these names."""
    won, lost = comparison.only_second, comparison.only_first
    if not won + lost:
        return f"{first} and {second} are right on the same pictures, and wrong on the same: all {comparison.n}."
    counts = f"{second} is right on {pictures(won)} where {first} is wrong, and wrong on {lost} where {first} is right"
    if comparison.differs:
        better = second if won > lost else first
        return f"{counts}: with {pictures(comparison.n)}, {better} is better ({p_value(comparison.p)})."
    return f"{counts}: with {pictures(comparison.n)} this could be chance ({p_value(comparison.p)})."


def pictures(number: int) -> str:
    """Return '1 picture' or '9 pictures'."""
    return "1 picture" if number == 1 else f"{number} pictures"


def p_value(p: float) -> str:
    """Return 'p = 0.27', with two digits that count, or 'p < 0.0001'."""
    if p < 1e-4:
        return "p < 0.0001"
    return f"p = {p:.2g}"
