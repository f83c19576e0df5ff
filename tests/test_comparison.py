"""Whether one classifier is better than another: exact tests, intervals that cover, and words that don't overstate."""

from pathlib import Path

from finetune import comparison
from finetune.comparison import Predictions
from finetune.errors import UserError

import numpy as np
import pytest
from scipy import stats

HEADER = "split,path,label,prediction,p_ants,p_bees,loss\n"


def classifier(right: np.ndarray | list[int], prefix: str = "val") -> Predictions:
    """Return the predictions of a classifier that is right where `right` is, on pictures that are all ants."""
    names = tuple(f"{prefix}/{index}.jpg" for index in range(len(right)))
    return Predictions(names, np.full(len(right), "ants"), np.where(np.array(right, bool), "ants", "bees"))


def pair(both: int, only_first: int, only_second: int, neither: int) -> tuple[Predictions, Predictions]:
    counts = (both, only_first, only_second, neither)
    return classifier(np.repeat([1, 1, 0, 0], counts)), classifier(np.repeat([1, 0, 1, 0], counts))


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (6, 0), (4, 9), (9, 4), (7, 7), (30, 61), (900, 1100)])
def test_mcnemar_is_the_exact_binomial_test(first, second):
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1
    assert comparison.mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_a_comparison_counts_the_pictures_that_are_right_in_one_alone():
    found = comparison.compare(*pair(120, 4, 9, 20))
    assert (found.n, found.only_first, found.only_second, found.differs) == (153, 4, 9, False)
    assert found.difference == pytest.approx(5 / 153)
    assert found.low < 0 < found.difference < found.high
    back = comparison.compare(*reversed(pair(120, 4, 9, 20)))
    assert (back.difference, back.p) == (-found.difference, found.p)
    assert [back.low, back.high] == [-found.high, -found.low]


def test_pictures_are_paired_by_path_not_by_place():
    first, second = pair(3, 2, 1, 4)
    order = np.random.default_rng(0).permutation(len(second.keys))
    shuffled = Predictions(tuple(second.keys[i] for i in order), second.labels[order], second.predictions[order])
    assert comparison.compare(first, shuffled) == comparison.compare(first, second)


@pytest.mark.parametrize(
    ("rates", "n"),
    [((0.03, 0.06), 153), ((0.02, 0.08), 153), ((0.005, 0.0), 153), ((0.15, 0.15), 153), ((0.1, 0.2), 40)],
)
def test_the_interval_covers_the_true_difference(rates, n):
    trials = np.random.default_rng(1).multinomial(n, [*rates, 1 - sum(rates)], size=400)
    found = [comparison.of_counts(n, int(first), int(second)) for first, second, _ in trials]
    covered = np.mean([each.low <= rates[1] - rates[0] <= each.high for each in found])
    assert covered >= 0.93  # 0.95, less two standard errors of 400 trials
    if sum(rates) > 0.05:
        assert covered <= 0.985  # no longer than they need be


@pytest.mark.parametrize(
    "counts",
    [(1, 0, 1), (7, 7, 0), (20, 0, 3), (153, 0, 0), (153, 5, 10), (400, 90, 60), (2500, 3, 0), (9000, 700, 800)],
)
def test_the_interval_is_that_of_draws(counts):
    """Of a million, each quantile being between those a little below and above it."""
    n, first, second = counts
    kinds = np.array([first + 0.5, second + 0.5, n - first - second + 1])
    drawn = np.random.default_rng(0).multinomial(n, kinds / kinds.sum(), 10**6)
    gained = (drawn[:, 1] - drawn[:, 0]) / n
    found = comparison.of_counts(*counts)
    for bound, level in ((found.low, 0.025), (found.high, 0.975)):
        assert np.mean(gained < bound) < level + 0.001
        assert np.mean(gained <= bound) > level - 0.001


def test_a_bound_that_is_just_at_its_level_makes_the_wider_interval():
    found = comparison.of_counts(3, 0, 0)  # with 0.001 + 3 * 0.01 * 0.8 at and below -2
    assert (found.low, found.high) == (-2 / 3, 2 / 3)


def test_classifiers_that_agree_may_still_differ_elsewhere():
    found = comparison.compare(*pair(100, 0, 0, 53))
    assert (found.difference, found.p) == (0, 1)
    assert found.low < 0 < found.high


@pytest.mark.parametrize(("first", "second", "expected"), [(4, 9, 9), (0, 0, 6), (0, 6, 6), (10, 10, 10), (6, 5, 9)])
def test_the_least_difference_that_is_not_chance(first, second, expected):
    found = comparison.of_counts(153, first, second)
    assert found.detectable == pytest.approx(expected / 153)
    differing = max(first + second, 6)
    splits = [(k, differing - k) for k in range(differing // 2 + 1)]
    assert expected == min(b - a for a, b in splits if stats.binomtest(a, differing).pvalue <= 0.05)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (
            (153, 4, 9),
            "B is right on 9 pictures where A is wrong, and wrong on 4 where A is right: "
            "with 153 pictures this could be chance (p = 0.27).",
        ),
        (
            (153, 12, 1),
            "B is right on 1 picture where A is wrong, and wrong on 12 where A is right: "
            "with 153 pictures, A is better (p = 0.0034).",
        ),
        (
            (1000, 0, 30),
            "B is right on 30 pictures where A is wrong, and wrong on 0 where A is right: "
            "with 1000 pictures, B is better (p < 0.0001).",
        ),
        (
            (8, 2, 2),
            "B is right on 2 pictures where A is wrong, and wrong on 2 where A is right: "
            "with 8 pictures this could be chance (p = 1).",
        ),
        ((8, 0, 0), "A and B are right on the same pictures, and wrong on the same: all 8."),
    ],
)
def test_what_it_says_in_words(counts, said):
    assert comparison.sentence("A", "B", comparison.of_counts(*counts)) == said


@pytest.mark.parametrize(
    ("p", "said"),
    [
        (1, "p = 1"),
        (0.996, "p = 1"),
        (0.3, "p = 0.3"),
        (0.125, "p = 0.12"),
        (0.00012, "p = 0.00012"),
        (9e-5, "p < 0.0001"),
    ],
)
def test_p_has_two_digits(p, said):
    assert comparison.p_value(p) == said


def test_other_pictures_are_an_error_that_counts_them():
    first = classifier([1, 0, 1, 1])
    with pytest.raises(UserError, match="not evaluated on the same pictures: 3 of 4 and 3 are in both"):
        comparison.compare(first, classifier([1, 0, 1]))
    with pytest.raises(UserError, match="none of 4 and 4 are in both"):
        comparison.compare(first, classifier([1, 0, 1, 1], "fold"))
    relabelled = Predictions(first.keys, np.array(["bees", "ants", "ants", "ants"]), first.predictions)
    with pytest.raises(UserError, match="1 of their 4 pictures have another label"):
        comparison.compare(first, relabelled)


def test_predictions_are_those_of_one_split(tmp_path: Path):
    file = tmp_path / "predictions.csv"
    rows = ['val,"val/a, b.jpg",ants,bees,0.4,0.6,0.9', "val,val/c.jpg,bees,bees,0,1,0", "test,t.jpg,ants,ants,1,0,0"]
    file.write_text(HEADER + "\n".join(rows) + "\n")
    found = comparison.read_predictions(file)
    assert found.keys == ("val/a, b.jpg", "val/c.jpg")
    assert found.correct.tolist() == [False, True]
    assert comparison.read_predictions(file, "test").keys == ("t.jpg",)
    with pytest.raises(UserError, match="no predictions of train, only of: test, val"):
        comparison.read_predictions(file, "train")


def test_who_is_told_apart_from_the_best():
    best = classifier([1] * 150 + [0] * 3)
    worse = [classifier([1] * (150 - lost) + [0] * (3 + lost)) for lost in (0, 4, 5, 6, 40)]
    assert comparison.told_apart(best, worse[2:3]) == [True]  # one-sided: 1/32
    assert comparison.told_apart(best, worse) == [False, False, False, False, True]  # of five: 0.01, and 1/64 is more
    elsewhere = classifier([1] * 153, "fold")
    assert comparison.told_apart(best, [elsewhere, worse[2]]) == [None, True]
    assert comparison.told_apart(best, []) == []


def test_the_truly_best_is_seldom_told_apart_from_the_one_that_seems_best():
    rng, lost = np.random.default_rng(0), 0
    for _ in range(200):
        found = [classifier(each) for each in rng.random((12, 153)) < 0.85]  # equals: any of them is the best
        seeming = max(range(12), key=lambda index: found[index].correct.sum())
        others = [index for index in range(12) if index != seeming]
        told = dict(zip(others, comparison.told_apart(found[seeming], [found[i] for i in others]), strict=True))
        lost += bool(told.get(0))
    assert lost <= 0.05 * 200
