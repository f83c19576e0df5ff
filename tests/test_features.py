"""Training on the features of frozen layers: the weights of the plain loop, wherever the features come from."""

import copy
import dataclasses
import functools
from pathlib import Path

from finetune import (
    augment,
    backbones,
    cuts,
    device,
    experiment,
    features,
    heads,
    inference,
    layers,
    parallel,
    params,
    runs,
    training,
)
from finetune.bank import Bank
from helpers import ROOT

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from tqdm import tqdm

SMALL = ["model_name=squeezenet", "data.image_size=32", "data.resize=40", "device=cpu", "batch_size=4", "lr=0.01"]
ABOUT = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CONCAT_POOL = ("head.kind=concat_pool", "head.hidden=16")
CENTER = ("augment.crop=center", "augment.flip=0")
SAMPLER = "data.balance=sampler"


class Store:
    """Pictures of noise, as an ImageStore has them; it notes which are looked at."""

    def __init__(self, train: int = 11, val: int = 5, size: int = 40):
        count = train + val
        self.heights, self.widths = np.full(count, size), size + np.arange(count) % 5
        self.labels = (np.arange(count) % 3 == 0).astype(np.int64)
        self.classes = ["one", "other"]
        self.manifest = {"files": {"shard": {"sha256": "0"}}, "source": "pictures", "mean": [0.4] * 3, "std": [0.3] * 3}
        self.looked_at: list[int] = []
        self._train = train

    def __getitem__(self, index: int) -> np.ndarray:
        self.looked_at.append(int(index))
        rng = np.random.default_rng(index)
        coarse = rng.integers(0, 200, (5, 5, 3)).repeat(20, axis=0).repeat(20, axis=1)
        picture = (coarse + rng.integers(0, 56, coarse.shape)).astype(np.uint8)
        return picture[: self.heights[index], : self.widths[index]]

    def indices(self, split: str) -> np.ndarray:
        return np.arange(len(self.labels))[slice(self._train) if split == "train" else slice(self._train, None)]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    for name in ("make_deterministic", "keep_freed_memory"):  # they are of the whole process
        monkeypatch.setattr(device, name, lambda: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Return a function that begins an experiment; those of the same `bank` share one."""

    def begin(*changes: str, bank: str = "bank", store: Store | None = None) -> experiment.Experiment:
        monkeypatch.setenv("DVC_ROOT", str(tmp_path / bank))
        settings = load(*changes)
        return experiment.build(settings, store or Store(), pretrained(settings.model_name), {"missing": [], **ABOUT})

    return begin


@functools.cache
def load(*changes: str) -> params.Params:
    return params.load(ROOT / "params.yaml", [*SMALL, *changes])


@functools.cache
def pretrained(name: str) -> dict[str, torch.Tensor]:
    """Return tensors of a network but for its head, with batch norm as after some training; none of AlexNet's many."""
    if name == "alexnet":
        return {}
    torch.manual_seed(5)
    model = backbones.build(name, 2, 64).train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # all that it has seen
    with torch.no_grad():
        model(torch.randn(16, 3, 64, 64))
    head = heads.head_layers(model)
    return {key: tensor for key, tensor in model.state_dict().items() if layers.layer_of(key) not in head}


def plain(this: experiment.Experiment) -> experiment.Experiment:
    """Return a copy of the experiment as it is where its network can't be followed."""
    return dataclasses.replace(this, model=copy.deepcopy(this.model), network=None, _cuts={}, _trained=[])


def anew(this: experiment.Experiment, *changes: str) -> experiment.Experiment:
    """Return an experiment that begins with the same network, and with settings that are of no part of it."""
    return dataclasses.replace(this, settings=load(*changes), store=Store(), _cuts={}, _trained=[])


def train(this: experiment.Experiment, epochs: int = 2, before=lambda epoch: None) -> dict[str, torch.Tensor]:
    """Train for some epochs; return the model's tensors, and the validation's losses. Call `before` each epoch."""
    optimizer, schedule = this.optimizer()
    losses = []
    for epoch in range(epochs):
        before(epoch)
        this.begin_epoch(epoch)
        sums = training.Sums(this.device, epoch, {})
        this.train_epoch(optimizer, schedule, this.training_batches(epoch), sums, tqdm(disable=True))
        losses.append(this.validate(this.val_batches())[0])
    return this.model.state_dict() | {"losses": torch.tensor(losses, dtype=torch.float64)}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> list[str]:
    """Return the names of the tensors that differ, by more than `tolerance` of one and of their largest number."""
    assert one.keys() == other.keys()
    unequal = [key for key in one if not torch.equal(one[key], other[key])]
    sizes = {key: max(1.0, float(other[key].abs().max())) for key in unequal}
    return [key for key in unequal if not float((one[key] - other[key]).abs().max()) <= tolerance * sizes[key]]


def drawn(batches) -> list[tuple]:
    """Return all of some batches, and a number as a dropout would draw it behind each."""
    return [(batch.inputs.clone(), batch.labels.tolist(), float(torch.rand(1))) for batch in batches]


def equal(one: list[tuple], other: list[tuple]) -> bool:
    """Tell whether two lists of batches are equal to the bit."""
    return len(one) == len(other) and all(
        torch.equal(mine[0], its[0]) and mine[0].dtype == its[0].dtype and mine[1:] == its[1:]
        for mine, its in zip(one, other, strict=True)
    )


def kept(this: experiment.Experiment) -> list:
    """Return the files in the bank."""
    return sorted(this.bank.folder.glob("*"))


# As the plain loop ----------------------------------------------------------------------------------------------------


def both_ways(begin, changes: tuple[str, ...], epochs: int = 2, **store: int) -> list[dict[str, torch.Tensor]]:
    """Return what comes of training on features, and on pictures; both of which move the weights."""
    results, one = [], begin(*changes, store=Store(**store))
    for this in (one, plain(one)):
        head = this.model.get_submodule(this.groups[0].layers[-1]).weight
        before = head.detach().clone()
        results.append(train(this, epochs))
        assert float((head.detach() - before).abs().max()) > 5e-4
    return results


RESIDUAL = "model_name=shufflenet_v2_x0_5"  # with batch norm


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("optimizer.name=adam", "optimizer.weight_decay=0.1", "schedule.name=one_cycle"),
        ("backbone.trainable=2",),
        ("backbone.trainable=all",),
        ("backbone.trainable=3", "backbone.unfreeze_epoch=1"),
        (RESIDUAL,),
        (RESIDUAL, "backbone.trainable=4", "backbone.unfreeze_epoch=1"),
        (RESIDUAL, "backbone.trainable=1", "backbone.batch_norm=train"),
        ("model_name=efficientnet_b0", "num_epochs=1"),  # dropout and stochastic depth
        CONCAT_POOL,
        (*CONCAT_POOL, RESIDUAL, "backbone.trainable=1", "backbone.unfreeze_epoch=1"),
        ("augment.mixup=0.5",),
        ("augment.views=1", "backbone.trainable=2", "backbone.unfreeze_every=1"),
        (SAMPLER,),
        (SAMPLER, "augment.views=1"),
        CENTER,
        (*CENTER, SAMPLER),
        (*CENTER, SAMPLER, "augment.views=1"),
        ("augment.crop=random", "augment.rotation=20", "augment.color_jitter=0.3", "augment.rand_augment_ops=1"),
        ("augment.normalize=data", "data.balance=loss", "optimizer.label_smoothing=0.1"),
    ],
)
def test_training_on_features_gives_the_weights_of_the_plain_loop(begin, changes):
    """To the bit, as a batch is of as many pictures as the frozen layers take at once."""
    epochs = 1 if "num_epochs=1" in changes else 3
    assert differing(*both_ways(begin, ("batch_size=16", *changes), epochs, train=32)) == []


@pytest.mark.parametrize(
    "changes",
    [
        ("batch_size=1",),
        ("batch_size=5",),  # and one of six, as eleven pictures would leave one alone
        ("batch_size=8", "backbone.trainable=2", "backbone.unfreeze_epoch=1"),
        (RESIDUAL, "batch_size=5"),
        (RESIDUAL, "batch_size=8", "backbone.trainable=1", "augment.views=2"),
        ("batch_size=40",),
    ],
)
def test_with_any_batch_size_the_weights_are_the_plain_loops_but_for_rounding(begin, changes):
    found, expected = both_ways(begin, changes)
    assert differing(found, expected, tolerance=1e-5) == []


def test_training_alexnet_on_features_gives_the_weights_of_the_plain_loop(begin):
    changes = ("model_name=alexnet", "data.image_size=64", "data.resize=72", "batch_size=8", "lr=0.1")
    assert differing(*both_ways(begin, changes, epochs=1, size=72), tolerance=1e-5) == []


@pytest.mark.parametrize("changes", [(), CONCAT_POOL, (RESIDUAL, "backbone.trainable=2")])
def test_the_validation_of_a_model_is_the_plain_ones_to_the_bit(begin, changes):
    this = begin(*changes)
    for val in (5, 16, 20):
        one, results = dataclasses.replace(this, store=Store(val=val)), []
        for each in (one, plain(one), one):  # the last with features at hand
            each.begin_epoch(0)
            each.bank.limit = 0.0
            results.append(each.validate(each.val_batches()))
        assert results[0] == results[1] == results[2]


def test_a_network_that_can_not_be_followed_trains_on_pictures(begin, monkeypatch):
    trace = layers.Tracer.trace
    monkeypatch.setattr(layers.Tracer, "trace", lambda self, model: 1 / 0)
    this = begin()
    assert this.network is None
    result = train(this)
    assert kept(this) == []
    monkeypatch.setattr(layers.Tracer, "trace", trace)
    assert differing(result, train(begin(bank="other")), tolerance=1e-6) == []


# Wherever the features come from --------------------------------------------------------------------------------------

SEVERAL = [
    (*CONCAT_POOL, SAMPLER, "augment.views=2"),
    (RESIDUAL, "backbone.trainable=1", "backbone.unfreeze_epoch=1"),
    ("precision=bf16",),
]


def damage(this: experiment.Experiment) -> int:
    """Damage all that is in the bank, each file in another way; return how many there were."""
    for index, path in enumerate(kept(this)):
        content = bytearray(path.read_bytes())
        match index % 5:
            case 0:
                content[len(content) // 4] ^= 1  # a row
            case 1:
                content[-40] ^= 1  # the index
            case 2:
                content[:100] = bytes(100)
            case 3:
                del content[len(content) // 2 :]
            case 4:
                content = b""
        path.write_bytes(content)
    return len(kept(this))


@pytest.mark.parametrize("changes", SEVERAL)
def test_a_cold_a_warm_a_damaged_and_no_bank_give_the_same_bits(begin, changes):
    cold = begin(*changes)
    expected = train(cold)
    count = len(kept(cold))
    assert count >= 3
    assert {path.suffix for path in kept(cold)} == {".features"}

    assert differing(train(begin(*changes)), expected) == []

    none = begin(*changes, "feature_bank_gb=0", bank="none")
    assert differing(train(none), expected) == []
    assert kept(none) == []

    small = begin(*changes, "feature_bank_gb=5e-5", bank="small")
    assert differing(train(small), expected) == []
    assert 0 < sum(path.stat().st_size for path in kept(small)) <= 5e4

    damaged, numbers = begin(*changes), []
    assert differing(train(damaged, before=lambda epoch: numbers.append(damage(damaged))), expected) == []
    assert min(numbers) >= count - 2

    gone = begin(*changes)
    assert differing(train(gone, before=lambda epoch: [path.unlink() for path in kept(gone)]), expected) == []


@pytest.mark.parametrize("changes", SEVERAL)
def test_a_bank_that_another_batch_size_filled_gives_the_same_bits(begin, changes):
    expected = train(begin(*changes, "batch_size=5", bank="own"))
    train(begin(*changes, "batch_size=2"))
    warm = begin(*changes, "batch_size=5")
    assert differing(train(warm), expected) == []
    assert warm.store.looked_at == []


@pytest.mark.parametrize(
    "changes",
    [
        CENTER,
        (*CONCAT_POOL, "batch_size=5", SAMPLER),
        ("augment.views=1",),
        (RESIDUAL, "backbone.trainable=1", "backbone.unfreeze_epoch=1", "data.image_size=40"),
    ],
)
def test_a_warm_run_looks_at_no_picture(begin, changes):
    first = begin(*changes)
    expected = train(first)
    assert set(first.store.looked_at) >= set(first.store.indices("val"))
    warm = begin(*changes)
    assert differing(train(warm), expected) == []
    assert warm.store.looked_at == []


def test_features_of_more_numbers_than_their_pictures_are_not_kept(begin):
    large = (RESIDUAL, "backbone.batch_norm=train")  # 24 × 16 × 16, and a picture has 3 × 32 × 32
    small = ("backbone.trainable=features.6",)  # 128 × 3 × 3
    for changes, count in ((large, 0), (small, 2)):
        this = begin(*changes)
        assert computed(this) == {"train", "val"}
        assert this.part(is_training=True)[0] is not this.model
        assert len(kept(this)) == count


# From the middle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [(), CENTER, (SAMPLER, "augment.views=2"), (*CONCAT_POOL, "batch_size=5")])
def test_batches_from_the_middle_are_those_of_the_whole_epoch(begin, changes):
    store = Store(train=37)
    this = begin(*changes, store=store)
    this.begin_epoch(1)
    assert this.part(is_training=True)[0] is not this.model
    from_pictures = [drawn(this.training_batches(1, first)) for first in (0, 1, 6, this.steps - 1)]  # none is kept yet
    from_the_bank = [drawn(this.training_batches(1, first)) for first in (0, 1, 6, this.steps - 1)]
    whole = from_pictures[0]
    assert len(whole) == this.steps
    for found in (from_pictures, from_the_bank):
        for first, batches in zip((0, 1, 6, this.steps - 1), found, strict=True):
            assert equal(batches, whole[first:])
    assert len({number for _, _, number in whole}) == this.steps


def test_an_epoch_begun_in_the_middle_looks_only_at_the_pictures_to_come_and_keeps_nothing(begin):
    store = Store(train=37)
    this = begin(store=store)
    this.begin_epoch(0)
    for _ in this.training_batches(0, first=7):
        pass
    assert sorted(store.looked_at) == sorted(training.visits(this.settings, store, 0).indices[28:].tolist())
    assert kept(this) == []


def test_after_an_epochs_last_step_there_is_no_batch_left(begin):
    """As of a run that was stopped while it validated."""
    one = begin()
    for this in (one, plain(one)):
        this.begin_epoch(0)
        assert list(this.training_batches(0, first=this.steps)) == []


def test_an_epoch_that_is_given_up_leaves_nothing_behind(begin, monkeypatch):
    monkeypatch.setattr(parallel, "cores", lambda: 1)  # two lots at a time
    this = begin(store=Store(train=60, val=60))
    this.begin_epoch(0)
    for batches in (this.training_batches(0), this.val_batches()):
        next(batches)
        batches.close()
    assert kept(this) == []
    assert len(set(this.store.looked_at)) < 120
    assert sum(len(batch.labels) for batch in this.val_batches()) == 60
    assert len(kept(this)) == 1


# What features follow from --------------------------------------------------------------------------------------------


def computed(this: experiment.Experiment, epoch: int = 0) -> set[str]:
    """Return the splits whose features are computed, not read, in an epoch."""
    this.begin_epoch(epoch)
    found = set()
    for split, batches in {"train": lambda: this.training_batches(epoch), "val": this.val_batches}.items():
        this.store.looked_at.clear()
        for _ in batches():
            pass
        found |= {split} if this.store.looked_at else set()
    return found


def test_the_same_settings_find_all(begin):
    assert computed(begin()) == {"train", "val"}
    assert computed(begin()) == set()


@pytest.mark.parametrize(
    ("base", "others"),
    [
        (
            (),
            [
                *("seed=1", SAMPLER, "augment.crop=random", "augment.crop=center", "augment.min_scale=0.5"),
                *("augment.flip=0.4", "augment.flip=0", "augment.rotation=10", "augment.color_jitter=0.1"),
                *("augment.rand_augment_ops=1", "augment.mixup=0.5"),
            ],
        ),
        (
            ("augment.rotation=10", "augment.color_jitter=0.1", "augment.rand_augment_ops=1"),
            [
                *("augment.rotation=20", "augment.color_jitter=0.2", "augment.rand_augment_ops=2"),
                "augment.rand_augment_magnitude=10",
            ],
        ),
        (CENTER, ["augment.flip=0.5", "augment.crop=random"]),
    ],
)
def test_how_training_pictures_look_has_their_features_computed_anew(begin, base, others):
    this = begin(*base)
    computed(this)
    assert {change: computed(anew(this, *base, change)) for change in others} == {key: {"train"} for key in others}
    assert computed(anew(this, *base)) == set()


def test_each_epoch_and_each_view_has_its_own_features(begin):
    this = begin()
    assert [computed(this, epoch) for epoch in (0, 1, 0, 1)] == [{"train", "val"}, {"train"}, set(), set()]
    this = begin("augment.views=3", bank="other")
    assert [len(computed(this, epoch)) for epoch in range(7)] == [2, 1, 1, 0, 0, 0, 0]
    this = begin(*CENTER, bank="third")
    assert [len(computed(this, epoch)) for epoch in range(3)] == [2, 0, 0]
    this = begin(*CENTER, SAMPLER, bank="fourth")  # leaves some pictures out, and takes some twice
    assert [len(computed(this, epoch)) for epoch in (0, 1, 0, 1)] == [2, 1, 0, 0]


def test_as_many_pictures_of_another_split_have_features_of_their_own(begin):
    this = begin(*CENTER, "backbone.trainable=1", store=Store(train=8, val=8))
    assert computed(this) == {"train", "val"}
    assert len(kept(this)) == 2
    assert computed(this) == set()


def test_another_network_or_size_has_all_features_computed_anew(begin):
    computed(begin())
    others = ["data.image_size=36", "augment.normalize=data", "precision=bf16", RESIDUAL]
    others += ["backbone.trainable=1", "backbone.trainable=2"]
    assert {change: computed(begin(change)) for change in others} == {key: {"train", "val"} for key in others}


def _other_tensor(this, monkeypatch):
    bias = this.model.features[12].expand3x3.bias
    monkeypatch.setattr(bias, "data", bias.data + 1e-6)


def _other_pictures(this, monkeypatch):
    this.store.manifest = this.store.manifest | {"files": {"shard": {"sha256": "1"}}}


def _other_mean(this, monkeypatch):
    this.backbone = this.backbone | {"mean": [0.485, 0.456, 0.407]}


def _other_std(this, monkeypatch):
    this.backbone = this.backbone | {"std": [0.229, 0.225, 0.225]}


def _other_lot(this, monkeypatch):
    monkeypatch.setitem(device.LOT, "cpu", 8)


def _other_device(this, monkeypatch):
    monkeypatch.setattr(device, "about", lambda place: [place.type, "another"])


def _other_versions(this, monkeypatch):
    versions = runs.versions("squeezenet")
    monkeypatch.setattr(runs, "versions", lambda name: versions | {"torch": "1.0"})


def _code_of(module):
    def other_code(this, monkeypatch):
        digest, changed = runs.code_digest, Path(module.__file__).read_text()
        monkeypatch.setattr(runs, "code_digest", lambda source: digest(source) + "!" * (source == changed))

    return other_code


def test_whatever_else_features_follow_from_has_all_computed_anew(begin, monkeypatch):
    one = begin()
    computed(one)
    others = [_other_tensor, _other_pictures, _other_mean, _other_std, _other_lot, _other_device, _other_versions]
    others += [_code_of(module) for module in (augment, cuts, inference)]
    for change in others:
        this = anew(one)
        with monkeypatch.context() as patch:
            change(this, patch)
            assert computed(this) == {"train", "val"}, change
    assert computed(anew(one)) == set()


@pytest.mark.parametrize(
    ("base", "others"),
    [
        (
            (),
            [
                ("lr=0.5", "momentum=0.5", "num_epochs=9", "batch_size=3", "keep=best", "early_stopping.patience=3"),
                ("optimizer.name=adam", "optimizer.l1=0.1", "optimizer.label_smoothing=0.2", "schedule.name=cosine"),
                ("head.hidden=9", "head.dropout=0.1", "evaluate.tta=flip", "data.balance=loss", "feature_bank_gb=1"),
                ("backbone.batch_norm=train", "augment.views=1", "augment.rand_augment_magnitude=1"),  # it has no norm
                ("backbone.trainable=all", "backbone.unfreeze_epoch=1"),  # nothing has thawed in the first epoch
            ],
        ),
        (("augment.crop=random",), [("augment.min_scale=0.1",)]),
        (CENTER, [("seed=3", "augment.min_scale=0.1")]),
        (CONCAT_POOL, [("head.hidden=9", "head.dropout=0.1"), ("head.hidden=0",)]),
    ],
)
def test_what_has_no_say_changes_nothing(begin, base, others):
    computed(begin(*base))
    assert {changes: computed(begin(*base, *changes)) for changes in others} == {key: set() for key in others}


# Views ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [lambda this: this, plain])
@pytest.mark.parametrize("changes", [(), (SAMPLER,), ("augment.crop=random", "augment.rotation=9")])
def test_views_come_again_in_another_order_and_without_them_all_looks_are_new(begin, changes, way):
    def epochs(*more: str) -> list[list[bytes]]:
        this = way(begin(*changes, *more))
        found = []
        for epoch in range(5):
            this.begin_epoch(epoch)
            batches = [(batch.inputs, batch.labels) for batch in this.training_batches(epoch)]
            looks = [look.contiguous().numpy().tobytes() for inputs, _ in batches for look in inputs]
            labels = np.concatenate([labels for _, labels in batches])
            found.append([look + bytes([label]) for look, label in zip(looks, labels.tolist(), strict=True)])
        return found

    first, second, *later = epochs("augment.views=2")
    assert not set(first) & set(second)
    for epoch, looks in enumerate(later):
        again = (first, second)[epoch % 2]
        assert sorted(looks) == sorted(again)
        assert looks != again
    assert later[0] != later[2]

    all_looks = [look for looks in epochs() for look in looks]
    assert len(set(all_looks)) == len(all_looks) == 55


@pytest.mark.parametrize("changes", [(), (SAMPLER,)])
def test_with_two_views_each_picture_goes_through_the_frozen_layers_twice(begin, changes):
    this = begin(*changes, "augment.views=2", "num_epochs=6")
    train(this, 6)
    own, val = this.store.indices("train"), this.store.indices("val")
    visited = [training.visits(this.settings, this.store, epoch).indices.tolist() for epoch in range(2)]
    assert sorted(this.store.looked_at) == sorted([*val, *visited[0], *visited[1]])
    assert changes or sorted(visited[0]) == sorted(visited[1]) == own.tolist()


# A picture's own ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "precision"),
    [
        ("squeezenet", 32, "fp32"),
        ("squeezenet", 64, "fp32"),
        ("squeezenet", 32, "bf16"),
        ("resnet18", 32, "fp32"),
        ("alexnet", 64, "fp32"),
    ],
)
def test_features_are_the_same_bits_whatever_is_beside_a_picture(begin, name, size, precision):
    more = CONCAT_POOL if name == "alexnet" else ()  # without its large layers
    this = begin(f"model_name={name}", f"data.image_size={size}", "data.resize=72", *more)
    this.begin_epoch(0)
    trunk = device.in_precision(this.network.cut(training=True).trunk, precision)
    frozen = inference.Inference(trunk, this.normalize, this.device)
    store = Store(16, 0, 72)
    pictures = training.cropped([store[i] for i in range(16)], size)
    whole = frozen(pictures)
    assert whole.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    for chosen in ([3], [15, 0], [2, 2, 2], list(range(15, -1, -1)), list(range(9))):
        assert torch.equal(frozen(pictures[chosen]), whole[chosen])
    assert len({row.float().numpy().tobytes() for row in whole}) == 16


def test_features_are_the_same_bits_whatever_the_number_of_threads(begin, monkeypatch):
    found, threads_of_lots = [], []
    for index, (threads, workers) in enumerate([(1, 1), (2, 1), (1, 3), (2, 2)]):
        torch.set_num_threads(threads)
        monkeypatch.setattr(parallel, "cores", lambda workers=workers: workers)
        this = begin(bank=f"bank{index}", store=Store(train=35, val=20))
        this.model.get_submodule(this.groups[-1].layers[0]).register_forward_pre_hook(
            lambda *_: threads_of_lots.append(torch.get_num_threads())
        )
        this.begin_epoch(0)
        found.append(drawn(this.training_batches(0)))
        found[-1] += [(batch.inputs, batch.labels.tolist(), 0.0) for batch in this.val_batches()]
        assert torch.get_num_threads() == threads  # of this thread: they are as many as before
    assert len(found[0]) == 9 + 2
    assert all(equal(each, found[0]) for each in found)
    assert threads_of_lots == [1] * 4 * (3 + 2)


# The validation -------------------------------------------------------------------------------------------------------


def test_the_validation_pictures_are_looked_at_once_and_again_when_layers_thaw(begin):
    changes = ("backbone.trainable=2", "backbone.unfreeze_epoch=2", "num_epochs=5", "feature_bank_gb=0")
    this = begin(*changes)
    val, looks = set(this.store.indices("val").tolist()), []

    def count(epoch: int) -> None:
        looks.append(len([index for index in this.store.looked_at if index in val]))

    train(this, 5, before=count)
    count(5)
    assert looks == [0, 5, 5, 10, 10, 10]  # by the epoch that begins


class InPlace(nn.Module):
    """What its frozen layer gives is changed in place by the first step behind the cut."""

    def __init__(self):
        super().__init__()
        self.first, self.trained, self.head = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        early = self.first(x)
        return self.head((self.trained(early.mul_(-2)) + early).mean((2, 3)))


def with_own(this: experiment.Experiment, model: nn.Module, trained: list[str], frozen: list[str]):
    """Return the experiment with another network."""
    groups = [layers.Group("head", trained, thaws=0), layers.Group("first", frozen)]
    network = cuts.follow(model, this.settings.data.image_size)
    return dataclasses.replace(this, model=model, groups=groups, network=network)


def test_what_the_rest_does_in_place_spoils_no_feature(begin):
    results = []
    for way in (lambda this: this, lambda this: this, plain):  # with a cold bank, a warm one, and without
        torch.manual_seed(0)
        changes = ("batch_size=16", "lr=0.1")
        this = with_own(begin(*changes, store=Store(train=16, val=32)), InPlace(), ["trained", "head"], ["first"])
        this.begin_epoch(0)
        behind = [str(node.target) for node in this.network.cut(training=False).rest.graph.nodes]
        assert behind[:3] == ["features", "mul_", "trained"]
        results.append(train(way(this), 3))
    assert differing(results[0], results[1]) == []
    assert differing(results[0], results[2], tolerance=1e-6) == []


def test_what_is_at_hand_is_no_more_than_the_features(tmp_path):
    """A vision transformer's are one of a picture's many tokens."""
    settings = load()
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16, "num_classes": 2}
    model = torchvision.models.VisionTransformer(image_size=32, patch_size=4, **sizes)
    network = cuts.follow(model, 32)
    model.requires_grad_(False).heads.requires_grad_(True)
    found = features.Features(Store(val=20), settings, ABOUT, torch.device("cpu"), Bank(tmp_path, 0.0))
    for batches in (found.validation_batches(network.cut(False)), found.training_batches(network.cut(True), 0)):
        for batch in batches:
            assert batch.inputs.shape[1:] == (8,)
            assert batch.inputs.untyped_storage().nbytes() <= 2 * 16 * 8 * 4


# Precision ------------------------------------------------------------------------------------------------------------


def test_in_bfloat16_features_are_of_half_the_size_and_fp32_does_not_follow_from_them(begin):
    expected = train(begin(bank="own"))
    half = begin("precision=bf16")
    found = train(half)
    assert len(differing(found, expected, tolerance=1e-4)) > 0
    assert differing(found, expected, tolerance=0.1) == []
    assert all(tensor.dtype != torch.bfloat16 for tensor in half.model.state_dict().values())
    sizes = sum(path.stat().st_size for path in kept(half))
    this = begin()
    assert differing(train(this), expected) == []  # with a bank that holds the others' features
    assert sum(path.stat().st_size for path in kept(this)) > 2 * sizes
    dtypes = []
    for each in (this, half):
        each.begin_epoch(0)
        dtypes.append({batch.inputs.dtype for batch in (*each.training_batches(0), *each.val_batches())})
    assert dtypes == [{torch.float32}, {torch.bfloat16}]


def test_in_bfloat16_features_give_the_weights_of_the_plain_loop_where_a_batch_is_a_lot(begin):
    changes = ("precision=bf16", "batch_size=16")
    assert differing(*both_ways(begin, changes, train=32)) == []


# How much a step is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "heavy"),
    [
        ((), False),
        (CONCAT_POOL, False),
        ((*CONCAT_POOL, "head.hidden=1000"), True),
        (("backbone.trainable=1",), True),
        (("model_name=resnet18",), False),
        (("augment.mixup=0.5",), True),  # the pictures go through all of the network
    ],
)
def test_a_step_is_heavy_where_it_is_more_than_a_small_head(begin, changes, heavy):
    this = begin(*changes)
    this.begin_epoch(0)
    assert this.is_heavy == heavy
