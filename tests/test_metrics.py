"""The numbers, on cases worked out by hand and beside torch's and scikit-learn's."""

from finetune import metrics

import numpy as np
import pytest
import sklearn.metrics
import torch

LOGITS = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.5]], dtype=np.float32)
LABELS = np.array([0, 1, 1, 1])


def test_cross_entropy_and_probabilities_are_torchs():
    logits, labels = torch.from_numpy(LOGITS), torch.from_numpy(LABELS)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none").numpy()
    np.testing.assert_allclose(metrics.cross_entropy(LOGITS, LABELS), expected, rtol=1e-12)
    np.testing.assert_allclose(np.exp(metrics.log_softmax(LOGITS)), logits.double().softmax(1).numpy())
    assert np.isfinite(metrics.cross_entropy(np.array([[1e4, -1e4]]), np.array([1]))).all()


def test_summary_by_hand():
    summary = metrics.summary(LOGITS, LABELS)
    assert list(summary) == ["acc", "balanced_acc", "loss", "f1", "auroc", "ece"]
    assert summary["acc"] == 0.75
    assert summary["balanced_acc"] == pytest.approx((1 + 2 / 3) / 2)  # ants: 1 of 1; bees: 2 of 3
    assert summary["f1"] == pytest.approx((2 / 3 + 0.8) / 2)  # ants: 1 hit, 1 false; bees: 2 hits, 1 missed
    assert summary["auroc"] == pytest.approx(2 / 3)  # of three pairs (bee, ant), the ant scores higher in one


def test_a_mean_prediction_is_of_probabilities():
    assert metrics.mean_prediction([LOGITS]) is LOGITS
    logits = [LOGITS, np.zeros_like(LOGITS), LOGITS[::-1]]
    mean = metrics.mean_prediction(logits)
    probabilities = [np.exp(each) / np.exp(each).sum(1, keepdims=True) for each in logits]
    np.testing.assert_allclose(np.exp(mean), np.mean(probabilities, axis=0), rtol=1e-6)
    np.testing.assert_allclose(np.exp(mean).sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(
        metrics.cross_entropy(mean, LABELS), -np.log(np.mean(probabilities, axis=0))[range(4), LABELS], rtol=1e-6
    )


def test_a_mean_of_predictions_that_are_very_sure_has_a_finite_loss():
    sure = np.array([[200.0, -200.0]])
    assert metrics.mean_prediction([sure, -sure]) == pytest.approx(np.log(0.5))
    assert np.isfinite(metrics.cross_entropy(metrics.mean_prediction([2 * sure, 3 * sure]), np.array([1]))).all()


def test_more_than_two_classes():
    logits = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]] * 5
    summary = metrics.summary(logits, np.array([0, 1, 2, 1]))
    assert summary["acc"] == 0.75
    assert 0.5 < summary["auroc"] < 1
    roc, precision_recall = metrics.curves(logits, np.array([0, 1, 2, 1]))
    assert (roc[0]["fpr"], roc[-1]["tpr"]) == (0, 1)
    assert precision_recall[-1]["recall"] == 1


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_summary_and_curves_are_scikit_learns(classes, seed):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(200, classes)).round(1)  # rounded: some scores are the same
    labels = random.integers(classes, size=200)
    logits[range(200), labels] += seed / 2  # from guesses to what is mostly right
    probabilities, guesses = np.exp(metrics.log_softmax(logits)), logits.argmax(1)
    scores = probabilities[:, 1] if classes == 2 else probabilities
    summary = metrics.summary(logits, labels)
    assert summary["acc"] == pytest.approx(sklearn.metrics.accuracy_score(labels, guesses), abs=1e-12)
    assert summary["balanced_acc"] == pytest.approx(sklearn.metrics.balanced_accuracy_score(labels, guesses))
    assert summary["f1"] == pytest.approx(sklearn.metrics.f1_score(labels, guesses, average="macro"))
    assert summary["auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores, multi_class="ovr"))

    one_hot = np.eye(classes)[labels]
    truth, score = (labels, scores) if classes == 2 else (one_hot.ravel(), probabilities.ravel())
    fpr, tpr, _ = sklearn.metrics.roc_curve(truth, score)
    precision, recall, _ = sklearn.metrics.precision_recall_curve(truth, score, drop_intermediate=True)
    roc, precision_recall = metrics.curves(logits, labels)
    np.testing.assert_allclose([[row["fpr"], row["tpr"]] for row in roc], np.stack([fpr, tpr], 1), rtol=1e-12)
    np.testing.assert_allclose(
        [[row["recall"], row["precision"]] for row in precision_recall],
        np.stack([recall, precision], 1)[::-1],
        rtol=1e-12,
    )


def test_classes_without_a_label_have_no_part_in_the_means():
    logits = np.array([[3.0, 0, 1], [0, 3, 1], [0, 3, 1]])
    summary = metrics.summary(logits, np.array([0, 1, 0]))
    assert summary["balanced_acc"] == 0.75
    assert summary["f1"] == pytest.approx(2 / 3)
    assert summary["auroc"] == 0.75
    assert np.isnan(metrics.summary(logits, np.array([0, 0, 0]))["auroc"])


@pytest.mark.parametrize(
    ("confidences", "correct", "expected"),
    [
        ([0.9, 0.9], [True, False], 0.4),  # 90 % sure, right half of the time
        ([0.8, 0.6], [True, True], (0.2 + 0.4) / 2),  # two bins
        ([1.0], [True], 0.0),
    ],
)
def test_expected_calibration_error(confidences, correct, expected):
    probabilities = np.array([[c, 1 - c] for c in confidences])
    logits = np.log(np.maximum(probabilities, 1e-12))
    labels = np.array([0 if c else 1 for c in correct])
    assert metrics.expected_calibration_error(logits, labels) == pytest.approx(expected, abs=1e-9)


def test_curves_of_a_perfect_classifier():
    roc, precision_recall = metrics.curves(np.array([[5.0, 0], [0, 5.0]]), np.array([0, 1]))
    assert {"fpr": 0.0, "tpr": 1.0} in roc
    assert {"recall": 1.0, "precision": 1.0} in precision_recall
