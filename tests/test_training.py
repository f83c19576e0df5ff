"""The parts of the epoch loop: batches, and what a batch holds."""

from types import SimpleNamespace

from finetune import augment, checkpoint, training
from finetune.digests import digest

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


def by_label(batches) -> dict[int, torch.Tensor]:
    return {
        int(label): picture for pictures, labels in batches for picture, label in zip(pictures, labels, strict=True)
    }


def test_a_picture_looks_the_same_whatever_the_batch_size(store):
    small = by_label(training.training_batches(store, seed=1, epoch=2, batch_size=2, image_size=SIZE, min_scale=0.25))
    large = by_label(training.training_batches(store, seed=1, epoch=2, batch_size=8, image_size=SIZE, min_scale=0.25))
    assert small.keys() == large.keys() == set(range(11))
    assert all(torch.equal(small[label], large[label]) for label in small)


def test_each_picture_is_augmented_by_the_row_of_its_own_index(store):
    draws = augment.epoch_draws(1, 2, 11)
    boxes = augment.random_resized_crops(draws[:, :-1], store.heights, store.widths, 0.25)
    batches = training.training_batches(store, seed=1, epoch=2, batch_size=4, image_size=SIZE, min_scale=0.25)
    for label, picture in by_label(batches).items():
        expected = augment.crop_resize([store[label]], boxes[label : label + 1], SIZE)[0]
        assert torch.equal(picture, expected.flip(-1) if draws[label, -1] < 0.5 else expected)


def test_epochs_and_seeds_differ_in_order_and_augmentation(store):
    def epoch(seed, epoch):
        pictures, labels = next(
            training.training_batches(store, seed, epoch, batch_size=11, image_size=SIZE, min_scale=0.25)
        )
        return pictures, labels.tolist()

    (first, order), (other_epoch, order_epoch), (other_seed, order_seed) = epoch(0, 0), epoch(0, 1), epoch(1, 0)
    assert order != order_epoch != order_seed != order
    assert not torch.equal(first, other_epoch)
    assert not torch.equal(first, other_seed)


BAR = SimpleNamespace(update=lambda: False, set_postfix=lambda *a, **k: None)


def test_loss_and_accuracy_are_means_over_pictures_not_batches():
    model = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.zeros_(model.weight)  # logits 0 0: loss log 2, prediction class 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = [(torch.ones(3, 2), np.array([0, 0, 0])), (torch.ones(1, 2), np.array([1]))]
    sums = training.Sums(torch.device("cpu"), 0, {})
    training.train_epoch(model, optimizer, batches, lambda x: x, sums, BAR)
    assert sums.means() == {"loss": pytest.approx(np.log(2)), "acc": 0.75}


def test_a_loss_that_is_no_number_tells_its_step_also_after_going_on():
    batches = [(torch.full((1, 1), value), np.array([0])) for value in (1.0, 2.0, float("nan"), 3.0)]
    for begun in (0, 5):
        model = torch.nn.Linear(1, 2)
        sums = training.Sums(torch.device("cpu"), 4, {"steps": begun})
        with pytest.raises(FloatingPointError) as error:
            training.train_epoch(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, lambda x: x, sums, BAR)
        assert str(error.value) == f"the loss in epoch 5, step {begun + 3}"


def test_batches_from_the_middle_are_those_of_the_whole_epoch(store):
    def epoch(first):
        batches = training.training_batches(
            store, seed=1, epoch=2, batch_size=2, image_size=SIZE, min_scale=0.25, first=first
        )
        return [(pictures, torch.rand(1)) for pictures, _ in batches]  # the number as a dropout would draw it

    whole, rest = epoch(0), epoch(3)
    assert len(rest) == len(whole) - 3
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(whole[3:], rest, strict=True))


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
