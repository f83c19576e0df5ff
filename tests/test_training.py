"""The parts of the epoch loop: batches, and what a batch holds."""

from types import SimpleNamespace

from finetune import augment, checkpoint, training

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


def test_loss_and_accuracy_are_means_over_pictures_not_batches():
    model = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.zeros_(model.weight)  # logits 0 0: loss log 2, prediction class 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = [(torch.ones(3, 2), np.array([0, 0, 0])), (torch.ones(1, 2), np.array([1]))]
    bar = SimpleNamespace(update=lambda: False, disable=True, set_postfix=lambda *a, **k: None)
    loss, acc = training.train_epoch(model, optimizer, batches, lambda x: x, bar)
    assert loss == pytest.approx(np.log(2))
    assert acc == 0.75


def test_a_loss_that_is_no_number_tells_its_step():
    model = torch.nn.Linear(1, 2)
    batches = [(torch.full((1, 1), value), np.array([0])) for value in (1.0, 2.0, float("nan"), 3.0)]
    bar = SimpleNamespace(update=lambda: False, disable=True, set_postfix=lambda *a, **k: None)
    with pytest.raises(FloatingPointError) as error:
        training.train_epoch(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, lambda x: x, bar)
    assert error.value.args == (2,)


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
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = tmp_path / "models" / "checkpoint.pt"
    checkpoint.save(path, model, optimizer, [{"step": 0, "loss": 1.0}])
    before = path.read_bytes()
    state = checkpoint.load(path)
    assert (state["format"], state["epoch"], state["history"]) == (1, 0, [{"step": 0, "loss": 1.0}])
    assert torch.equal(state["model"]["weight"], model.weight)
    assert torch.equal(state["optimizer"]["state"][0]["momentum_buffer"], torch.ones(2, 2))

    def full(*_):
        raise RuntimeError("unexpected pos")  # what torch says where the disk is full

    monkeypatch.setattr("os.fsync", full)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, model, optimizer, [{"step": 1, "loss": 0.5}])
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
