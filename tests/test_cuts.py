"""Where networks are cut, in tables of cases, and that the two parts do what the whole does."""

import functools

from finetune import backbones, cuts, heads, layers, params

import pytest
import torch
import torchvision
from torch import nn

CONCAT_POOL = params.Head(kind="concat_pool", hidden=8, dropout=0.5)


class Traced(nn.Module):
    """A network of a few layers, whose way is its subclass's."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(n, 4, 3, padding=1) for n in (3, 4, 4))
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)

    def logits(self, features):
        return self.head(features.mean((2, 3)))


class SkipOverFrozen(Traced):
    def forward(self, x):
        early = self.first(x)
        return self.logits(self.third(self.second(early)) + early)


class SkipFromPicture(Traced):
    def forward(self, x):
        return self.logits(self.third(self.second(self.first(x)))) + x.mean((2, 3))[:, :2]


class ChangedInPlace(Traced):
    def forward(self, x):
        early = self.first(x)
        return self.logits(self.third(self.second(self.act(early))) + early)


class Stacked(Traced):
    """Two maps of the same pictures in one tensor, whose rows are the maps."""

    def forward(self, x):
        early = self.first(x)
        both = torch.stack([self.second(early), early])
        return self.logits(self.third(both[0]) + both[1])


class InThirds(Traced):
    """The features of the same pictures in three parts, as an attention's queries, keys and values."""

    def __init__(self):
        super().__init__()
        self.first, self.third, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, x):
        features = self.first(x).mean((2, 3))
        parts = features.reshape(-1, 3, 2).permute(1, 0, 2)
        return self.head(self.third(parts[0] * parts[1]) + self.third(parts[2]))


class Functional(Traced):
    def forward(self, x):
        features = nn.functional.dropout(self.first(x), 0.5, self.training)
        return self.logits(self.third(self.second(features)))


class LooksAtNumbers(Traced):
    """It can't be traced."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        features = self.norm(self.first(x))
        return self.logits(features if features.sum() > 0 else self.third(features))


def vit() -> nn.Module:
    sizes = {"num_layers": 3, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16}
    return torchvision.models.VisionTransformer(image_size=32, patch_size=8, num_classes=2, **sizes)


OWN = [SkipOverFrozen, SkipFromPicture, ChangedInPlace, Stacked, InThirds, Functional, LooksAtNumbers, vit]
CONCAT = "with concat pooling"


@functools.cache
def followed(name: str) -> tuple[nn.Module, cuts.Network | None, int]:
    """Return a network with random weights, what was found of its way, and the size of its pictures."""
    torch.manual_seed(0)
    size = 64 if name.startswith("alexnet") else 32
    head = CONCAT_POOL if CONCAT in name else backbones.LINEAR
    name = name.removesuffix(f" {CONCAT}")
    own = {each.__name__: each for each in OWN}
    model = own[name]() if name in own else backbones.build(name, 2, size, head)
    for norm in model.modules():  # as after some training
        if isinstance(norm, cuts.BATCH_NORMS):
            norm.running_mean.uniform_(-0.1, 0.1)
            norm.running_var.uniform_(0.5, 2)
    return model, cuts.follow(model, size), size


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    yield
    followed.cache_clear()


def begun(name: str, trainable: str | int | list[str] = "head", batch_norm: str = "frozen") -> nn.Module:
    """Return the network as an epoch begins, in which that trains."""
    model = followed(name)[0]
    head = heads.head_layers(model)
    layers.thaw(model, layers.plan(layers.blocks(model, head), head, [], trainable), epoch=0)
    layers.train_mode(model, batch_norm)
    return model


def place(cut: cuts.Cut | None, size: int) -> tuple[tuple[int, ...], str] | None:
    """Return the shape of a picture's features, and the first layer of the rest."""
    if cut is None:
        return None
    with torch.no_grad():
        features = cut.trunk(torch.rand(1, 3, size, size))
    return tuple(features.shape[1:]), next(node.target for node in cut.rest.graph.nodes if node.op == "call_module")


ALL_NETWORKS = [
    # network, what trains, batch norm; where it is cut in training, and for evaluation
    ("alexnet", "head", "frozen", ((9216,), "classifier.0"), ((4096,), "classifier.6")),  # the first is a dropout
    ("alexnet", 2, "frozen", ((9216,), "classifier.0"), ((9216,), "classifier.1")),
    ("alexnet", 3, "frozen", ((256, 3, 3), "features.10"), ((256, 3, 3), "features.10")),
    ("alexnet", "all", "frozen", None, None),
    (f"alexnet {CONCAT}", "head", "frozen", ((512,), "concat_pool.0"), ((512,), "concat_pool.0")),
    ("squeezenet", "head", "frozen", ((512, 1, 1), "classifier.0"), ((512, 1, 1), "classifier.1")),
    ("squeezenet", 2, "frozen", ((384, 1, 1), "features.11"), ((384, 1, 1), "features.11")),
    ("squeezenet", ["features.6"], "frozen", ((128, 3, 3), "features.6"), ((128, 3, 3), "features.6")),
    ("squeezenet", 2, "train", ((384, 1, 1), "features.11"), ((384, 1, 1), "features.11")),  # it has no batch norm
    ("resnet18", "head", "frozen", ((512,), "fc"), ((512,), "fc")),
    ("resnet18", 1, "frozen", ((512, 1, 1), "layer4.1"), ((512, 1, 1), "layer4.1")),
    ("resnet18", "layer4.1.bn2", "frozen", ((512, 1, 1), "layer4.1"), ((512, 1, 1), "layer4.1")),
    ("resnet18", "conv1", "frozen", None, None),
    ("resnet18", "head", "train", ((64, 16, 16), "bn1"), ((64, 16, 16), "bn1")),
    (f"resnet18 {CONCAT}", "head", "frozen", ((1024,), "concat_pool.0"), ((1024,), "concat_pool.0")),
    ("efficientnet_b0", "head", "frozen", ((24, 8, 8), "features.2.1"), ((1280,), "classifier.1")),  # stochastic depth
    ("efficientnet_b0", 1, "frozen", ((24, 8, 8), "features.2.1"), ((320, 1, 1), "features.8")),
    ("mobilenet_v3_small", "head", "frozen", ((1024,), "classifier.2"), ((1024,), "classifier.3")),
    ("vit", "head", "frozen", ((8,), "heads.head"), ((8,), "heads.head")),
    ("vit", 1, "frozen", ((17, 8), "encoder.layers.encoder_layer_2"), ((17, 8), "encoder.layers.encoder_layer_2")),
    ("vit", "encoder", "frozen", ((17, 8), "encoder.dropout"), ((17, 8), "encoder.dropout")),  # with its own tensor
    ("vit", "all", "frozen", None, None),
    ("SkipOverFrozen", "third", "frozen", ((4, 32, 32), "second"), ((4, 32, 32), "second")),  # one value, not two
    ("SkipFromPicture", "third", "frozen", None, None),
    ("ChangedInPlace", "third", "frozen", ((4, 32, 32), "act"), ((4, 32, 32), "act")),
    ("Stacked", "third", "frozen", ((4, 32, 32), "second"), ((4, 32, 32), "second")),  # two rows are no two pictures
    ("InThirds", "third", "frozen", ((3, 2), "third"), ((3, 2), "third")),
    ("Functional", "third", "frozen", ((4, 32, 32), "second"), ((4, 32, 32), "third")),
]


@pytest.mark.parametrize(("name", "trainable", "batch_norm", "in_training", "for_evaluation"), ALL_NETWORKS)
def test_a_network_is_cut_before_its_first_part_that_trains_or_is_random(
    name, trainable, batch_norm, in_training, for_evaluation
):
    begun(name, trainable, batch_norm)
    _, network, size = followed(name)
    assert place(network.cut(training=True), size) == in_training
    assert place(network.cut(training=False), size) == for_evaluation


CUT_NETWORKS = [case[:3] for case in ALL_NETWORKS if case[3]]


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize(("name", "trainable", "batch_norm"), CUT_NETWORKS)
def test_one_part_after_the_other_gives_what_the_network_gives(name, trainable, batch_norm, is_training):
    model = begun(name, trainable, batch_norm)
    _, network, size = followed(name)
    cut = network.cut(is_training)
    if not is_training:
        model.eval()
    pictures = torch.rand(4, 3, size, size)
    logits = []
    for function in (model, lambda x: cut.rest(cut.trunk(x))):
        torch.manual_seed(1)
        logits.append(function(pictures))
    assert logits[0].shape == (4, 2)
    assert torch.equal(*logits)


@pytest.mark.parametrize(("name", "trainable", "batch_norm"), CUT_NETWORKS)
def test_the_trunk_gives_twice_the_same_and_changes_nothing_and_the_rest_has_all_that_trains(
    name, trainable, batch_norm
):
    model = begun(name, trainable, batch_norm)
    _, network, size = followed(name)
    cut = network.cut(training=True)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    pictures, random = torch.rand(4, 3, size, size), torch.get_rng_state()
    assert torch.equal(cut.trunk(pictures), cut.trunk(pictures))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(parameter.requires_grad for parameter in cut.trunk.parameters())
    assert {key for key, parameter in cut.rest.named_parameters() if parameter.requires_grad} == trained
    # The same tensors, not copies: what the optimizer changes, the rest computes with.
    own = dict(model.named_parameters())
    assert all(own[key] is parameter for key, parameter in cut.rest.named_parameters())


@pytest.mark.parametrize(
    ("norm", "mode", "first"),
    [
        (nn.BatchNorm2d(4), "frozen", "3"),
        (nn.BatchNorm2d(4), "train", "1"),
        (nn.BatchNorm2d(4, affine=False), "frozen", "3"),
        (nn.BatchNorm2d(4, affine=False), "train", "1"),
        (nn.BatchNorm2d(4, track_running_stats=False), "frozen", "1"),  # it has the batch's own statistics only
        (nn.GroupNorm(2, 4), "train", "3"),
        (nn.Sequential(nn.Identity(), nn.BatchNorm2d(4)), "train", "1.1"),
    ],
)
def test_batch_norm_that_is_not_frozen_is_behind_the_cut(norm, mode, first):
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, pool, nn.Linear(4, 2))
    network = cuts.follow(model, 16)
    model.requires_grad_(False)[3].requires_grad_(True)
    layers.train_mode(model, mode)
    for is_training in (True, False):
        assert place(network.cut(is_training), 16)[1] == first


def test_the_cut_moves_with_what_thaws():
    _, network, size = followed("squeezenet")
    firsts = []
    for trainable in ("head", 1, 2, 9, "head"):
        begun("squeezenet", trainable)
        found = place(network.cut(training=True), size)
        firsts.append(found and found[1])
    assert firsts == ["classifier.0", "features.12", "features.11", None, "classifier.0"]


# A network's way ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "LooksAtNumbers", "Functional"])
@pytest.mark.parametrize("is_training", [True, False])
def test_to_be_followed_changes_nothing(name, is_training):
    model = followed(name)[0].train(is_training)
    list(model.children())[1].train(not is_training)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modes, attributes = {key: each.training for key, each in model.named_modules()}, set(vars(model))
    random = torch.get_rng_state()
    network = cuts.follow(model, 32)
    assert (network is None) == (name == "LooksAtNumbers")
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert set(vars(model)) == attributes
    assert {key: each.training for key, each in model.named_modules()} == modes


def test_a_network_that_takes_no_such_pictures_or_numbers_can_not_be_followed():
    assert cuts.follow(LooksAtNumbers(), 32) is None
    assert cuts.follow(vit(), 48) is None


# What a trunk is ------------------------------------------------------------------------------------------------------


def test_the_digest_follows_every_tensor_of_the_trunk_and_none_of_the_rest():
    blocks = [nn.Sequential(nn.Conv2d(n, 4, 3), nn.BatchNorm2d(4), nn.ReLU()) for n in (3, 4, 4)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    network = cuts.follow(model, 16)
    model[:2].requires_grad_(False)
    layers.train_mode(model)
    digest, follows = network.cut(training=True).digest, set()
    for key, tensor in model.state_dict().items():
        before = tensor.clone()
        tensor.view(-1)[-1] += 1
        if network.cut(training=True).digest != digest:
            follows.add(key)
        tensor.copy_(before)
    norm = [f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    assert follows == {f"{block}.{name}" for block in (0, 1) for name in ("0.weight", "0.bias", *norm)}
    assert network.cut(training=True).digest == digest


def test_the_digest_follows_what_the_trunk_does():
    digests = set()
    for stride in (1, 2):
        for act in (nn.ReLU(), nn.SiLU()):
            for pool in (nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)):
                torch.manual_seed(0)
                trunk = (nn.Conv2d(3, 4, 3, stride), act, pool)
                model = nn.Sequential(*trunk, nn.Flatten(), nn.Linear(4, 2))
                network = cuts.follow(model, 16)
                model.requires_grad_(False)[4].requires_grad_(True)
                digests.add(network.cut(training=True).digest)
    assert len(digests) == 8


def test_trunks_of_other_lengths_have_other_digests():
    digests = set()
    for trainable in ("head", 1, 2, 3):
        begun("squeezenet", trainable)
        digests.add(followed("squeezenet")[1].cut(training=True).digest)
    assert len(digests) == 4
