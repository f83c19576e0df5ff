"""Experiments that differ in seed and fold alone; and whether settings are better, over other seeds and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.comparison import LEVEL, Predictions, aligned_to, p_value, pictures
from finetune.experiments import Experiment

import numpy as np

REPEATED = ("data.fold", "seed")  # in these the runs of a group differ
WITHOUT_EFFECT = (
    "device",
    "resume",
    "checkpoint_minutes",
    "checkpoint_store_gb",
    "feature_bank_gb",
    "evaluate.gallery",
)
FEW = 3  # seeds, with fewer of which chance has too many ways to look like a difference

Repeat = tuple[int, int]  # seed and fold
Pair = tuple[Predictions, Predictions]


def shared_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in which the experiments of a group agree."""
    return {key: value for key, value in settings.items() if key not in (*REPEATED, *WITHOUT_EFFECT)}


def seed_and_fold(settings: Mapping[str, Any]) -> Repeat:
    return settings.get("seed", 0), settings.get("data.fold", 0)


def group(experiment: Experiment) -> tuple[dict[str, Any], dict[str, str]] | None:
    """Return what is the same in experiments that differ in seed and fold alone: settings, and digests of code and
    files. None of one that trained on top of another, which stands alone."""
    return None if "continues" in experiment.metrics else (shared_settings(experiment.settings), experiment.inputs)


def repeats(of: Experiment, experiments: Sequence[Experiment]) -> dict[Repeat, Experiment]:
    """Return by seed and fold the experiment itself and those of its group among others, the oldest first; of equals
    the newest."""
    shared = group(of)
    alike = [each for each in experiments if shared and group(each) == shared]
    return dict(sorted({seed_and_fold(each.settings): each for each in [*alike, of]}.items()))


def in_both(first: Mapping[Repeat, Any], second: Mapping[Repeat, Any], pooled: bool) -> dict[str, list[Repeat]]:
    """Return by its name, such as `seed 0`, what makes up each run that both have; {} where they have none in common.

    A run says each picture's class once. So it is a seed and a fold; or, where the folds are to be pooled because each
    validates other pictures, a seed with all folds that the seed with the most of them has.
    """
    shared = sorted(first.keys() & second.keys())
    if not pooled:
        several = len({fold for _, fold in shared}) > 1
        return {f"seed {seed}" + f", fold {fold}" * several: [(seed, fold)] for seed, fold in shared}
    folds_of: dict[int, set[int]] = {}
    for seed, fold in shared:
        folds_of.setdefault(seed, set()).add(fold)
    most = max(folds_of.values(), key=len, default=set())
    return {
        f"seed {seed}": [(seed, fold) for fold in sorted(most)] for seed, folds in folds_of.items() if folds >= most
    }


def pool(parts: Sequence[Predictions]) -> Predictions:
    """Return the predictions of several folds as one."""
    return Predictions(
        tuple(key for each in parts for key in each.keys),
        np.concatenate([each.labels for each in parts]),
        np.concatenate([each.predictions for each in parts]),
    )


@dataclass(frozen=True)
class OverRuns:
    """How two groups of experiments compare, run by run."""

    n: int  # pictures
    differences: tuple[float, ...]  # of each run: the second's accuracy minus the first's
    difference: float  # their mean
    low: float  # of its 95 % interval
    high: float
    p: float  # two-sided
    share_of_runs: float  # of the variance of the mean: what other seeds would change, the rest being other pictures

    @property
    def differs(self) -> bool:
        """Whether the difference is more than what chance makes of equals in one case of twenty."""
        return self.p <= LEVEL

    @property
    def detectable(self) -> float:
        """The least difference that would not pass for chance, were pictures and runs to differ as much as here."""
        return self.high - self.difference


def compare_runs(pairs: Sequence[Pair]) -> OverRuns:
    """Return how the second of each pair, one a run and two at least, compares with the first on the same pictures.

    Both pictures and runs are a sample: what is asked is whether other pictures and other seeds would agree. So the
    variance of the mean difference is the sum of that over pictures (each one's mean over the runs) and that over
    runs (each one's mean over the pictures), and Student's t has as many degrees of freedom as Satterthwaite gives that
    sum: min F' of Clark 1973, doi:10.1016/S0022-5371(73)80014-3, which asked the same of subjects and words. It errs on
    the safe side, for the sum has what is random in both in it twice; a test over the pictures alone takes the luck of
    seeds for a difference (Bouthillier et al. 2021, arXiv:2103.03098). With two runs there is one degree, as the
    formula would call equals different in up to 11 cases of 100. As in `comparison.of_counts`, there are two more
    pictures, one right in each alone.

    Raises UserError where the pictures or their labels aren't the same in all.
    """
    from scipy.special import stdtr, stdtrit  # late: it takes half a second

    reference = pairs[0][0]
    gained = np.stack(
        [np.subtract(*(aligned_to(reference, each).correct.astype(float) for each in reversed(pair))) for pair in pairs]
    )
    runs, n = gained.shape
    mean = float(gained.mean())
    of_pictures = np.append(gained.mean(axis=0), [-1, 1]).var() / n
    of_runs = gained.mean(axis=1).var(ddof=1) / runs
    variance = of_pictures + of_runs
    freedom = variance**2 / (of_pictures**2 / (n + 1) + of_runs**2 / (runs - 1)) if runs >= FEW else 1.0
    reach = float(stdtrit(freedom, 1 - LEVEL / 2) * variance**0.5)
    return OverRuns(
        n,
        tuple(gained.mean(axis=1).tolist()),
        mean,
        mean - reach,
        mean + reach,
        float(2 * stdtr(freedom, -abs(mean) / variance**0.5)),
        float(of_runs / variance),
    )


def sentence(first: str, second: str, compared: OverRuns) -> str:
    """Return in words what a comparison run by run says of two groups with these names."""
    ahead = sum(each > 0 for each in compared.differences)
    behind = sum(each < 0 for each in compared.differences)
    where = f"over {pictures(compared.n)} and {len(compared.differences)} runs each"
    counts = f"{second} is ahead of {first} in {ahead} of {len(compared.differences)} runs, and behind in {behind}"
    if compared.differs:
        better = second if compared.difference > 0 else first
        return f"{counts}: {where}, {better} is better ({p_value(compared.p)})."
    return f"{counts}: {where}, this could be chance ({p_value(compared.p)})."


def advice(compared: OverRuns) -> str:
    """Return in words what would make a comparison run by run surer; "" where it is sure."""
    runs, share = len(compared.differences), compared.share_of_runs
    if runs < FEW:
        return "Two runs hardly tell what another seed makes: five of each are a good number."
    if compared.differs:
        return ""
    if share > 0.5:
        return f"{share:.0%} of the uncertainty is that of seeds: more seeds of both would make it smaller."
    return f"{1 - share:.0%} of the uncertainty is that of pictures: more pictures, or data.folds, make it smaller."
