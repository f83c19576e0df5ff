"""Numbers computed from logits [n, classes] and labels [n]; scikit-learn's where it has them."""

from collections.abc import Sequence

import numpy as np


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


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Return the mean gap between confidence and accuracy, in `bins` of equal width weighted by their pictures.

    Guo et al. 2017, arXiv:1706.04599.
    """
    confidence = np.exp(log_softmax(logits).max(axis=1))
    correct = logits.argmax(axis=1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(bin_of, weights=confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def summary(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return acc, balanced_acc (mean over classes), loss (mean, nats), f1 (macro), auroc and ece.

    auroc is macro one-vs-rest for more than two classes.
    """
    from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

    probabilities = np.exp(log_softmax(logits))
    scores = probabilities[:, 1] if logits.shape[1] == 2 else probabilities
    return {
        "acc": accuracy(logits, labels),
        "balanced_acc": float(balanced_accuracy_score(labels, logits.argmax(axis=1))),
        "loss": float(cross_entropy(logits, labels).mean()),
        "f1": float(f1_score(labels, logits.argmax(axis=1), average="macro")),
        "auroc": float(roc_auc_score(labels, scores, multi_class="ovr")),
        "ece": expected_calibration_error(logits, labels),
    }


def curves(logits: np.ndarray, labels: np.ndarray) -> tuple[list[dict], list[dict]]:
    """Return the rows (fpr, tpr) of the ROC curve and (recall, precision) of the precision-recall curve.

    Of the second class where there are two, else of all classes one-vs-rest together (micro-average).
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    probabilities = np.exp(log_softmax(logits))
    classes = probabilities.shape[1]
    one_hot = np.eye(classes, dtype=int)[labels]
    truth, score = (one_hot[:, 1], probabilities[:, 1]) if classes == 2 else (one_hot.ravel(), probabilities.ravel())
    fpr, tpr, _ = roc_curve(truth, score)
    precision, recall, _ = precision_recall_curve(truth, score, drop_intermediate=True)
    return _rows(fpr=fpr, tpr=tpr), _rows(recall=recall[::-1], precision=precision[::-1])


def _rows(**columns: np.ndarray) -> list[dict]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)]
