"""Numbers computed from logits [n, classes] and labels [n].

Those that scikit-learn has are as it defines them: importing it would take a second of every experiment.
"""

from collections.abc import Sequence

import numpy as np

BINS = 15  # of confidence, for the calibration


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log probabilities of the classes, [n, classes] float64."""
    with np.errstate(invalid="ignore"):  # of logits that are none, which the caller sees
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return each picture's loss in nats, [n]."""
    return -log_softmax(logits)[np.arange(len(labels)), labels]


def mean_prediction(logits: Sequence[np.ndarray]) -> np.ndarray:
    """Return logits [n, classes] whose probabilities are the mean of those of several predictions; of one, itself."""
    if len(logits) == 1:
        return logits[0]
    return np.logaddexp.reduce([log_softmax(each) for each in logits]) - np.log(len(logits))


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of pictures whose label has the largest logit."""
    return float((logits.argmax(axis=1) == labels).mean())


def confidence(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability of each picture's prediction, [n], and which of BINS of equal width it is in, [n]."""
    largest = np.exp(log_softmax(logits).max(axis=1))
    return largest, np.minimum((largest * BINS).astype(int), BINS - 1)


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean gap between confidence and accuracy, in BINS of equal width weighted by their pictures.

    Guo et al. 2017, arXiv:1706.04599.
    """
    largest, bin_of = confidence(logits)
    correct = logits.argmax(axis=1) == labels
    gaps = np.bincount(bin_of, weights=largest - correct, minlength=BINS)
    return float(np.abs(gaps).sum() / len(labels))


def summary(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return acc, balanced_acc (mean over classes), loss (mean, nats), f1 (macro), auroc and ece.

    f1 is of the classes that are among the labels or the predictions; auroc, one-vs-rest, of those that some of the
    labels have and some have not, and nan where there is none.
    """
    probabilities, guesses = np.exp(log_softmax(logits)), logits.argmax(axis=1)
    classes = range(logits.shape[1])
    actual, guessed = (np.bincount(each, minlength=len(classes)) for each in (labels, guesses))
    hits = np.bincount(labels[guesses == labels], minlength=len(classes))
    there, seen = actual > 0, actual + guessed > 0
    one_vs_rest = classes[1:] if len(classes) == 2 else classes
    areas = [auroc(probabilities[:, each], labels == each) for each in one_vs_rest if 0 < actual[each] < len(labels)]
    return {
        "acc": accuracy(logits, labels),
        "balanced_acc": float((hits[there] / actual[there]).mean()),
        "loss": float(cross_entropy(logits, labels).mean()),
        "f1": float((2 * hits[seen] / (actual + guessed)[seen]).mean()),
        "auroc": float(np.mean(areas)) if areas else float("nan"),
        "ece": expected_calibration_error(logits, labels),
    }


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the area under the ROC curve of scores [n] for what is positive, [n] bool; some are and some are not."""
    true, false = _counts(scores, positive)
    return float(np.trapezoid(true, false) / (true[-1] * false[-1]))


def curves(logits: np.ndarray, labels: np.ndarray) -> tuple[list[dict], list[dict]]:
    """Return the rows (fpr, tpr) of the ROC curve and (recall, precision) of the precision-recall curve.

    Of the second class where there are two, else of all classes one-vs-rest together (micro-average). Without the
    points on the way of a straight line.
    """
    probabilities = np.exp(log_softmax(logits))
    classes = probabilities.shape[1]
    one_hot = np.eye(classes, dtype=int)[labels]
    truth, score = (one_hot[:, 1], probabilities[:, 1]) if classes == 2 else (one_hot.ravel(), probabilities.ravel())
    true, false = _counts(score, truth == 1)
    corner = np.ones(len(true), bool)  # the first threshold's point and the last one's are among them
    corner[2:-1] = ((np.diff(true, 2) != 0) | (np.diff(false, 2) != 0))[1:]
    roc = _rows(fpr=false[corner] / false[-1], tpr=true[corner] / true[-1])
    # Between two thresholds with as many hits as their neighbours the curve falls straight down.
    corner[2:-1] = (np.diff(true)[1:-1] != 0) | (np.diff(true)[2:] != 0)
    true, false = true[corner], false[corner]
    precision = np.concatenate([[1.0], true[1:] / (true[1:] + false[1:])])  # of nothing at all: 1
    return roc, _rows(recall=true / true[-1], precision=precision)


def _counts(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how many that are positive, and how many that are not, score at least each threshold, falling from inf."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # of those with the same score
    true = np.concatenate([[0], np.cumsum(positive[order])[last]])
    return true, np.concatenate([[0], 1 + last]) - true


def _rows(**columns: np.ndarray) -> list[dict]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)]
