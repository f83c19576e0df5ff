"""The parts of the epoch loop: batches, and what a batch holds."""

import itertools
from types import SimpleNamespace

from finetune import augment, checkpoint, optim, params, training
from finetune.digests import digest
from finetune.layers import Group
from helpers import ROOT

import numpy as np
import pytest
import torch

SIZE = 32


@pytest.fixture
def store():
    """Eleven pictures of several sizes, as an ImageStore has them."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (40, 40 + i, 3), dtype=np.uint8) for i in range(11)]

    class Store:
        heights, widths = np.full(11, 40), np.arange(40, 51)
        labels = np.arange(11)
        __getitem__ = staticmethod(pictures.__getitem__)

        def indices(self, split):
            return {"train": np.arange(11), "val": np.arange(3)}[split]

    return Store()


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(8, 4, [4, 4]), (10, 4, [4, 4, 2]), (9, 4, [4, 5]), (3, 8, [3]), (1, 8, [1]), (3, 1, [1, 1, 1])],
)
def test_batches_cover_all_pictures_and_none_is_of_one(count, batch_size, sizes):
    slices = training.slices(count, batch_size)
    assert [s.stop - s.start for s in slices] == sizes
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(count))


def load(*changes: str) -> params.Params:
    small = [f"data.image_size={SIZE}", "data.resize=40", "seed=1", "batch_size=2"]
    return params.load(ROOT / "params.yaml", [*small, *changes])


def by_label(batches) -> dict[int, torch.Tensor]:
    return {int(label): picture for batch in batches for picture, label in zip(batch.inputs, batch.labels, strict=True)}


def test_a_picture_looks_the_same_whatever_the_batch_size(store):
    small = by_label(training.training_batches(store, load(), epoch=2))
    large = by_label(training.training_batches(store, load("batch_size=8"), epoch=2))
    assert small.keys() == large.keys() == set(range(11))
    assert all(torch.equal(small[label], large[label]) for label in small)


def test_each_picture_is_augmented_by_the_row_of_its_own_index(store):
    settings = load("batch_size=4", "augment.flip=0.3")
    draws = augment.epoch_draws(1, 2, 11, settings.augment)
    boxes = augment.random_resized_crops(draws["crop"], store.heights, store.widths, 0.25)
    for label, picture in by_label(training.training_batches(store, settings, epoch=2)).items():
        expected = augment.crop_resize([store[label]], boxes[label : label + 1], SIZE)[0]
        assert torch.equal(picture, expected.flip(-1) if draws["flip"][label] < 0.3 else expected)


def test_epochs_and_seeds_differ_in_order_and_augmentation(store):
    def epoch(seed, epoch):
        (batch,) = training.training_batches(store, load("batch_size=11", f"seed={seed}"), epoch)
        assert batch.mixup is None
        return batch.inputs, batch.labels.tolist()

    (first, order), (other_epoch, order_epoch), (other_seed, order_seed) = epoch(0, 0), epoch(0, 1), epoch(1, 0)
    assert order != order_epoch != order_seed != order
    assert not torch.equal(first, other_epoch)
    assert not torch.equal(first, other_seed)


@pytest.mark.parametrize("changes", [(), ("augment.mixup=0.4", "data.balance=sampler")])
def test_batches_from_the_middle_are_those_of_the_whole_epoch(store, changes):
    def epoch(first):
        batches = training.training_batches(store, load(*changes), epoch=2, first=first)
        return [(batch, torch.rand(1)) for batch in batches]  # the number as a dropout would draw it

    whole, rest = epoch(0), epoch(3)
    assert len(rest) == len(whole) - 3
    for (one, number), (other, other_number) in zip(whole[3:], rest, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert np.array_equal(one.labels, other.labels)
        assert np.array_equal(one.mixup, other.mixup)
        assert number == other_number


# The sampler ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[5, 5], [20, 1], [1, 20], [7, 3, 1], [9, 40, 2, 13], [1], [3], [2, 0, 5]])
def test_a_balanced_epoch_has_all_classes_and_all_pictures_of_one_equally_often(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.default_rng(0).permutation(labels)
    for epoch in range(3):
        order = training.epoch_order(1, epoch, labels, balanced=True)
        assert len(order) == len(labels)
        per_class = np.bincount(labels[order], minlength=len(counts))[np.array(counts) > 0]
        assert np.ptp(per_class) <= 1
        visits = np.bincount(order, minlength=len(labels))
        assert all(np.ptp(visits[labels == label]) <= 1 for label in set(labels.tolist()))


def test_a_balanced_epoch_follows_from_seed_and_epoch():
    labels = np.repeat([0, 1, 2], [30, 5, 1])

    def order(seed, epoch):
        return training.epoch_order(seed, epoch, labels, balanced=True).tolist()

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    # Of a class that is not shown whole, others come in the next epoch; and the remainder is not always one class's.
    assert len({frozenset(each for each in order(0, epoch) if each < 30) for epoch in range(5)}) == 5
    uneven = np.repeat([0, 1, 2], [2, 3, 5])
    counts = [np.bincount(uneven[training.epoch_order(0, epoch, uneven, balanced=True)]) for epoch in range(9)]
    assert {int(count.argmax()) for count in counts} == {0, 1, 2}


def test_a_plain_epoch_has_each_picture_once():
    order = training.epoch_order(1, 2, np.array([0, 0, 0, 1]), balanced=False)
    assert np.array_equal(order, augment.epoch_order(1, 2, 4))
    assert sorted(order.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("order", "rows"),
    [
        ([0], [0]),
        ([2, 0, 1], [2, 0, 1]),
        ([3, 3, 3, 3], [3, 4, 5, 6]),
        ([1, 0, 1, 1, 0, 2], [1, 0, 6, 7, 8, 2]),
    ],
)
def test_a_picture_takes_its_own_draws_and_where_it_comes_again_others(order, rows):
    assert training.rows_of_draws(np.array(order)).tolist() == rows


def test_a_picture_that_comes_again_looks_different_and_the_first_time_as_without_the_sampler(store):
    store.labels = np.array([0] + [1] * 10)  # the first comes about five times
    batches = training.training_batches(store, load("batch_size=11", "data.balance=sampler"), epoch=2)
    order = training.epoch_order(1, 2, store.labels, balanced=True)
    (pictures, labels, _), looks = next(batches), {}
    assert np.array_equal(labels, store.labels[order])
    for index, picture in zip(order.tolist(), pictures, strict=True):
        looks.setdefault(index, []).append(picture)
    assert len(looks[0]) in (5, 6)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(looks[0], 2))
    store.labels = np.arange(11)
    plain = by_label(training.training_batches(store, load(), epoch=2))
    assert all(torch.equal(first, plain[index]) for index, (first, *_) in looks.items())


# The objective --------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0], [0.0, 1.0, 0.0], [1.0, 2.0, 3.0]])
LABELS = np.array([0, 1, 2, 2])
COUNTS = np.repeat([0, 1, 2], [6, 3, 1])  # the labels of the training pictures


def loss(targets: torch.Tensor, *changes: str) -> float:
    objective = training.objective(load("num_classes=3", *changes), COUNTS, torch.device("cpu"))
    return float(objective.loss(LOGITS, targets))


def test_the_loss_is_torchs_with_label_smoothing_or_without():
    labels = torch.from_numpy(LABELS)
    assert loss(labels) == float(torch.nn.functional.cross_entropy(LOGITS, labels))
    smooth = torch.nn.functional.cross_entropy(LOGITS, labels, label_smoothing=0.1)
    assert loss(labels, "optimizer.label_smoothing=0.1") == float(smooth)
    soft = 0.9 * torch.nn.functional.one_hot(labels, 3) + 0.1 / 3
    assert float(smooth) == pytest.approx(float(-(soft * LOGITS.log_softmax(1)).sum(1).mean()), rel=1e-6)


def test_rare_classes_weigh_more_also_in_soft_targets():
    weights = torch.tensor([10 / (3 * 6), 10 / (3 * 3), 10 / (3 * 1)])
    each = -LOGITS.log_softmax(1)
    own = weights[LABELS]
    by_hand = (own * each[range(4), LABELS]).sum() / own.sum()
    assert loss(torch.from_numpy(LABELS), "data.balance=loss") == pytest.approx(float(by_hand), rel=1e-6)
    assert loss(torch.from_numpy(LABELS), "data.balance=sampler") == loss(torch.from_numpy(LABELS))
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0], [0.2, 0.2, 0.6]])
    by_hand = (soft * weights * each).sum(1).mean()
    assert loss(soft, "data.balance=loss") == pytest.approx(float(by_hand), rel=1e-6)


def test_a_class_without_training_pictures_has_a_weight_that_is_a_number():
    objective = training.objective(load("num_classes=3", "data.balance=loss"), COUNTS[COUNTS < 2], torch.device("cpu"))
    assert objective.class_weights.isfinite().all()


def test_mixup_mixes_the_targets_as_the_pictures():
    pictures = torch.rand(4, 3, 2, 2)
    model, normalize = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)), lambda x: x
    shares = np.array([0.9, 0.5, 0.0, 1.0])
    objective = training.Objective(3)
    mixed = training.Batch(pictures, LABELS, shares)
    model.requires_grad_(False)
    _, labels, loss = training.forward(model, mixed, normalize, objective)
    inputs, targets = augment.mixup(pictures, torch.eye(3)[LABELS], shares)
    assert float(loss) == pytest.approx(float(-(targets * model(inputs).log_softmax(1)).sum(1).mean()), rel=1e-5)
    assert labels.tolist() == LABELS.tolist()
    alone = training.Batch(pictures, LABELS, np.ones(4))
    plain = training.Batch(pictures, LABELS)
    losses = [float(training.forward(model, each, normalize, objective)[2]) for each in (alone, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# What evaluation sees -------------------------------------------------------------------------------------------------


def test_plain_batches_are_cropped_to_the_middle_in_the_stores_order(store):
    batches = list(training.plain_batches(store, "val", SIZE, batch_size=2))
    assert [batch.labels.tolist() for batch in batches] == [[0, 1], [2]]
    boxes = augment.center_crops(store.heights, store.widths, SIZE)
    expected = augment.crop_resize([store[i] for i in range(3)], boxes[:3], SIZE)
    assert torch.equal(torch.cat([batch.inputs for batch in batches]), expected)


# Passes ---------------------------------------------------------------------------------------------------------------

BAR = SimpleNamespace(update=lambda: False, set_postfix=lambda *a, **k: None)


def train_epoch(model, batches, sums, lr=0.1):
    """Train on pictures [n, 2] with a schedule that counts its steps; return that number."""
    steps = []
    schedule = SimpleNamespace(after_step=lambda: steps.append(model.weight.detach().clone()))
    optimizer = optim.optimizer(model, [Group("head", [""], 0)], load().optimizer, lr, 0.0)
    training.train_epoch(model, optimizer, schedule, batches, lambda x: x, training.Objective(2), sums, BAR)
    return len(steps)


def test_loss_and_accuracy_are_means_over_pictures_not_batches():
    model = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.zeros_(model.weight)  # logits 0 0: loss log 2, prediction class 0
    batches = [
        training.Batch(torch.ones(3, 2), np.array([0, 0, 0])),
        training.Batch(torch.ones(1, 2), np.array([1])),
    ]
    sums = training.Sums(torch.device("cpu"), 0, {})
    assert train_epoch(model, batches, sums, lr=1e-30) == 2
    assert sums.means() == {"loss": pytest.approx(np.log(2)), "acc": 0.75}


def test_a_loss_that_is_no_number_tells_its_step_also_after_going_on():
    batches = [training.Batch(torch.full((1, 1), x), np.array([0])) for x in (1.0, 2.0, float("nan"), 3.0)]
    for begun in (0, 5):
        sums = training.Sums(torch.device("cpu"), 4, {"steps": begun})
        with pytest.raises(FloatingPointError) as error:
            train_epoch(torch.nn.Linear(1, 2), batches, sums)
        assert str(error.value) == f"the loss in epoch 5, step {begun + 3}"


def test_a_step_clips_its_gradient():
    moved = []
    for clip in (0.0, 0.01):
        model = torch.nn.Linear(2, 2)
        torch.nn.init.zeros_(model.weight)
        optimizer = optim.optimizer(model, [Group("head", [""], 0)], load().optimizer, 1.0, 0.0)
        before = torch.cat([each.detach().flatten() for each in model.parameters()])
        batch = training.Batch(torch.ones(1, 2), np.array([0]))
        training.step(model, optimizer, batch, lambda x: x, training.Objective(2, grad_clip=clip))
        after = torch.cat([each.detach().flatten() for each in model.parameters()])
        moved.append(float((after - before).norm()))
    assert moved[0] > 0.1
    assert moved[1] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "stopped"),
    [
        ([], 1, 0.0, False),
        ([3.0], 1, 0.0, False),
        ([3.0, 3.0], 1, 0.0, True),  # not lower
        ([3.0, 2.9], 1, 0.0, False),
        ([3.0, 2.9], 1, 0.2, True),  # lower, but not by enough
        ([3.0, 2.9, 2.7], 2, 0.2, False),  # by 0.3 in all
        ([3.0, 2.9, 2.85], 2, 0.2, True),
        ([3.0, 4.0, 3.5, 2.0], 3, 0.0, False),
        ([3.0, 4.0, 3.5, 3.0], 3, 0.0, True),
        ([3.0, 4.0, 3.5], 3, 0.0, False),
        ([3.0, 1.0, 2.0, 0.5, 2.0, 2.0], 2, 0.0, True),
        ([1.0, 2.0, 3.0, 4.0], 0, 0.0, False),  # never
    ],
)
def test_stopped_early(losses, patience, min_delta, stopped):
    settings = params.EarlyStopping(patience=patience, min_delta=min_delta)
    assert training.stopped_early([{"val_loss": loss} for loss in losses], settings) == stopped


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "smaller batch_size (now 64)"),
        (ValueError("Expected more than 1 value per channel when training"), "batch_size (now 64) to 2 or more"),
        (ValueError("something else"), "something else"),
    ],
)
def test_a_batch_that_does_not_fit_says_what_to_set(error, words):
    assert words in str(training.batch_does_not_fit(error, 64, 224))


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "models" / "checkpoint.pt"
    state = {"model": {"weight": torch.rand(2, 2)}, "history": [{"step": 0, "loss": 1.0}]}
    checkpoint.save(path, state)
    before = path.read_bytes()
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["model"]["weight"], state["model"]["weight"])
    assert loaded["history"] == state["history"]

    def full(*_):
        raise RuntimeError("unexpected pos")  # what torch says where the disk is full

    monkeypatch.setattr("os.fsync", full)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, {"model": {}, "history": []})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_digest_tells_any_two_values_apart_and_no_two_orders():
    weights = torch.arange(4.0)
    values = [weights, weights.reshape(2, 2), weights.double(), weights + 1, [1, [2]], [[1], 2], [1, 2], 1, 1.0, "1",
              None, {"a": weights}, {"b": weights}, {"a": 1, "b": 2}, {"a": 2, "b": 1}]  # fmt: skip
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(torch.rand(3, 2).t()) != digest(torch.zeros(0))
