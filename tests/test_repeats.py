"""Experiments that differ in seed and fold alone, and comparing two groups of them run by run."""

from finetune import comparison, repeats
from finetune.comparison import Predictions
from finetune.errors import UserError
from finetune.experiments import Experiment

import numpy as np
import pytest
from scipy import stats


def experiment(name: str, metrics: dict | None = None, code: str = "ab", **settings) -> Experiment:
    """Return an experiment; data__fold=1 is its setting data.fold, and `code` the digest of its script."""
    stages = {"train": {"deps": {"src/train.py": code, "data/prepared": name}, "outs": {"data/prepared": name}}}
    settings = {key.replace("__", "."): value for key, value in settings.items()}
    return Experiment(
        name, name, "commit", "", {"lr": 0.1, "seed": 0, "data.fold": 0} | settings, metrics or {}, stages
    )


def runs_of(right: np.ndarray) -> list[Predictions]:
    """Return the predictions of each run, [runs, pictures] bool, on pictures that are all ants."""
    names, labels = tuple(map(str, range(right.shape[1]))), np.full(right.shape[1], "ants")
    return [Predictions(names, labels, np.where(each, "ants", "bees")) for each in right]


def compared(first: np.ndarray, second: np.ndarray) -> repeats.OverRuns:
    return repeats.compare_runs(list(zip(runs_of(first), runs_of(second), strict=True)))


def test_the_repeats_of_an_experiment_differ_from_it_in_seed_and_fold_alone():
    named = experiment("named")
    others = [
        experiment("old", seed=1),
        experiment("new", seed=1, device="cuda"),
        experiment("fold", data__fold=2),
        experiment("its double"),
        experiment("other", lr=0.2, seed=2),
        experiment("of other code", code="cd", seed=4),
        experiment("longer", {"continues": "named"}, seed=3),
    ]
    found = repeats.repeats(named, others)
    assert {key: each.name for key, each in found.items()} == {(0, 0): "named", (0, 2): "fold", (1, 0): "new"}
    longer = others[-1]
    assert repeats.repeats(longer, others) == {(3, 0): longer}


@pytest.mark.parametrize(
    ("first", "second", "pooled", "expected"),
    [
        ([(0, 0), (1, 0)], [(1, 0), (2, 0)], False, {"seed 1": [(1, 0)]}),
        ([(0, 0)], [(1, 0)], False, {}),
        ([(0, 0)], [(1, 0)], True, {}),
        (
            [(0, 0), (0, 1)],
            [(0, 0), (0, 1)],
            False,
            {"seed 0, fold 0": [(0, 0)], "seed 0, fold 1": [(0, 1)]},
        ),
        ([(0, 0), (0, 1)], [(0, 0), (0, 1), (0, 2)], True, {"seed 0": [(0, 0), (0, 1)]}),
        (
            [(0, 0), (0, 1), (1, 1), (2, 0), (2, 1)],
            [(0, 0), (0, 1), (1, 1), (2, 0), (2, 1)],
            True,
            {"seed 0": [(0, 0), (0, 1)], "seed 2": [(2, 0), (2, 1)]},
        ),
    ],
)
def test_runs_are_those_that_both_sides_have_whole(first, second, pooled, expected):
    assert repeats.in_both(dict.fromkeys(first), dict.fromkeys(second), pooled) == expected


def test_the_folds_of_a_run_are_one_set_of_pictures():
    (one,), (other,) = (runs_of(np.array([each])) for each in ([True, False], [True]))
    pooled = repeats.pool([one, other])
    assert (pooled.keys, pooled.correct.tolist()) == (("0", "1", "0"), [True, False, True])


def test_many_runs_alike_leave_the_uncertainty_of_the_pictures():
    rng = np.random.default_rng(0)
    first, second = rng.random(500) < 0.8, rng.random(500) < 0.8
    found = compared(np.tile(first, (4, 1)), np.tile(second, (4, 1)))
    gained = second.astype(float) - first
    assert found.differences == pytest.approx([gained.mean()] * 4)
    assert found.share_of_runs == pytest.approx(0, abs=1e-12)
    assert found.p == pytest.approx(stats.ttest_1samp(gained, 0).pvalue, abs=0.01)
    assert found.high - found.low == pytest.approx(2 * 1.96 * gained.std() / 500**0.5, rel=0.02)


def test_many_pictures_leave_the_uncertainty_of_the_seeds():
    shares = [0.80, 0.85, 0.90, 0.82, 0.88]
    second = np.stack([np.arange(100_000) % 100 < 100 * share for share in shares])
    found = compared(np.tile(np.arange(100_000) % 100 < 82, (5, 1)), second)
    assert found.share_of_runs > 0.98
    assert found.p == pytest.approx(stats.ttest_1samp([share - 0.82 for share in shares], 0).pvalue, abs=0.005)
    assert "of seeds" in repeats.advice(found)


@pytest.mark.parametrize(
    ("runs", "pictures", "spread"), [(2, 153, 0.5), (3, 153, 0.5), (5, 153, 0.5), (5, 153, 0.3), (10, 153, 0.0)]
)
def test_equals_are_seldom_told_apart(runs, pictures, spread):
    rng, found, of_one_seed = np.random.default_rng(0), [], []
    for _ in range(300):
        hardness = rng.normal(2.2, 1.5, pictures)
        groups = []
        for _ in range(2):  # of networks that differ by their seed, and agree on some pictures more than on others
            of_settings, of_seeds = rng.normal(0, 0.5, pictures), rng.normal(0, spread, (runs, 1))
            groups.append(hardness + of_settings + of_seeds + rng.normal(0, 0.7, (runs, pictures)) > 0)
        found.append(compared(*groups).differs)
        of_one_seed.append(comparison.compare(*(runs_of(each)[0] for each in groups)).differs)
    assert np.mean(found) <= 0.075  # 0.05, and two standard errors of 300 trials
    if spread:
        assert np.mean(of_one_seed) > 0.15  # which is why there is another test for several


def test_a_true_difference_is_found_and_inside_the_interval():
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        hardness = rng.normal(0, 1, 300)
        first, second = (hardness + gain + rng.normal(0, 1, (5, 300)) > -0.5 for gain in (0, 0.5))
        found.append(compared(first, second))
    # Of the sum of two normal numbers of variance 1 each: that it is above -0.5, and above -1.
    truth = stats.norm.cdf(1 / 2**0.5) - stats.norm.cdf(0.5 / 2**0.5)
    assert np.mean([each.differs for each in found]) > 0.9
    assert np.mean([each.low <= truth <= each.high for each in found]) >= 0.95


def test_runs_that_agree_in_all_are_no_division_by_zero():
    found = compared(np.ones((3, 50), bool), np.ones((3, 50), bool))
    assert (found.difference, found.p, found.differs) == (0, 1, False)
    assert found.low < 0 < found.high
    worse = compared(np.ones((3, 50), bool), np.zeros((3, 50), bool))
    assert (worse.difference, worse.differs) == (-1, True)


def test_runs_of_other_pictures_are_an_error():
    one, other = runs_of(np.ones((2, 4), bool))
    fewer = runs_of(np.ones((1, 3), bool))[0]
    with pytest.raises(UserError, match="3 of 4 and 3 are in both"):
        repeats.compare_runs([(one, other), (one, fewer)])


@pytest.mark.parametrize(
    ("p", "gains", "said", "advice"),
    [
        (
            0.03,
            (0.1, 0.2, 0.1),
            "A in 3 of 3 runs, and behind in 0: over 153 pictures and 3 runs each, B is better",
            "",
        ),
        (0.03, (-0.1, -0.2, 0.0), "A in 0 of 3 runs, and behind in 2: over 153 pictures and 3 runs each, A is", ""),
        (
            0.3,
            (0.1, -0.1, 0.1),
            "behind in 1: over 153 pictures and 3 runs each, this could be chance (p = 0.3).",
            "60%",
        ),
        (0.03, (0.1, 0.1), "in 2 of 2 runs", "Two runs hardly tell"),
    ],
)
def test_what_it_says_in_words(p, gains, said, advice):
    found = repeats.OverRuns(153, gains, float(np.mean(gains)), -0.1, 0.1, p, 0.4)
    assert said in repeats.sentence("A", "B", found)
    assert repeats.advice(found).startswith(advice)
    assert bool(repeats.advice(found)) == bool(advice)
