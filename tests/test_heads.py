"""Concat pooling on networks of every family: what it takes off, and that the trunk in front stays as it was."""

import copy

from finetune import backbones, heads, layers
from finetune.errors import UserError
from finetune.heads import ConcatPool
from finetune.params import Head

import pytest
import torch
import torchvision
from torch import nn

HEAD = Head(kind="concat_pool", hidden=8, dropout=0.5)


def pictures(size: int, number: int = 2) -> torch.Tensor:
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(0))


def with_head(name: str, size: int = 64, head: Head = HEAD) -> nn.Module:
    """Return the network with 3 classes, in training mode."""
    torch.manual_seed(0)
    return backbones.build(name, 3, size, head).train()


def features_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return what comes into the network's concat pooling."""
    seen = []
    hook = model.concat_pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    hook.remove()
    return seen[0]


def test_concat_pool_follows_fastais_head():
    torch.manual_seed(0)
    head, features = ConcatPool(5, num_classes=3, hidden=4, dropout=0.5).eval(), torch.rand(2, 5, 3, 3)
    norm, _, hidden, _, norm_2, _, last = head
    with torch.no_grad():
        for layer in (norm, norm_2):
            layer.running_mean.uniform_()
            layer.running_var.uniform_()
            layer.weight.uniform_()
    x = torch.cat([features.flatten(2).mean(2), features.flatten(2).max(2).values], dim=1)

    def normalized(x: torch.Tensor, by: nn.BatchNorm1d) -> torch.Tensor:
        return (x - by.running_mean) / (by.running_var + by.eps).sqrt() * by.weight + by.bias

    x = (normalized(x, norm) @ hidden.weight.T + hidden.bias).clamp(min=0)
    x = normalized(x, norm_2) @ last.weight.T + last.bias
    torch.testing.assert_close(head(features), x)
    assert (head[1].p, head[5].p) == (0.25, 0.5)


def test_concat_pool_without_a_hidden_layer():
    head = ConcatPool(5, num_classes=3, hidden=0, dropout=0.4)
    assert [type(layer) for layer in head] == [nn.BatchNorm1d, nn.Dropout, nn.Linear]
    assert (head[0].num_features, head[1].p, head[2].in_features) == (10, 0.4, 10)
    assert head(torch.rand(2, 5, 1, 1)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "channels", "gone", "front"),
    [
        ("alexnet", 256, ["classifier.1", "classifier.4", "classifier.6"], "features"),
        ("squeezenet1_1", 512, ["classifier.1"], "features"),
        ("resnet18", 512, ["fc"], "layer4"),
        ("densenet121", 1024, ["classifier"], None),  # a ReLU follows its features, which is a function
        ("mobilenet_v2", 1280, ["classifier.1"], "features"),
        ("mobilenet_v3_small", 576, ["classifier.0", "classifier.3"], "features"),
        ("efficientnet_b0", 1280, ["classifier.1"], "features"),
        pytest.param("vgg11_bn", 512, ["classifier.0", "classifier.3", "classifier.6"], "features",
                     marks=pytest.mark.slow),
        pytest.param("convnext_tiny", 768, ["classifier.0", "classifier.2"], "features", marks=pytest.mark.slow),
        pytest.param("swin_t", 768, ["head"], "permute", marks=pytest.mark.slow),
        ("shufflenet_v2_x0_5", 1024, ["fc"], "conv5"),
        ("googlenet", 1024, ["fc"], "inception5b"),
    ],
)  # fmt: skip
def test_concat_pool_takes_the_head_off_and_leaves_the_trunk_as_it_was(name, channels, gone, front):
    model = with_head(name)
    torch.manual_seed(0)
    original = backbones.build(name, 3, 64)
    assert [layer for layer in layers.layers(original) if layer not in layers.layers(model)] == gone
    assert model.concat_pool[0].num_features == 2 * channels
    assert heads.head_layers(model) == [f"concat_pool.{index}" for index in (0, 2, 4, 6)]
    trunk = {key: each for key, each in model.state_dict().items() if not key.startswith("concat_pool.")}
    before = original.state_dict()
    assert list(trunk) == [key for key in before if layers.layer_of(key) not in gone]
    assert all(torch.equal(each, before[key]) for key, each in trunk.items())

    seen = []
    if front:
        original.get_submodule(front).register_forward_hook(lambda *parts: seen.append(parts[2]))
    with torch.no_grad():
        for size in (64, 224):
            assert model.eval()(pictures(size)).shape == (2, 3)
        large = pictures(288, 1)  # at 224 px, the pooling of AlexNet and VGG would do nothing
        original.eval()(large)
        features = features_of(model, large)
        expected = seen[0] if front else original.features(large).relu()
    assert torch.equal(features, expected)
    placed = [layer for block in layers.blocks(model, heads.head_layers(model)) for layer in block.layers]
    assert placed == [layer for layer in layers.layers(original) if layer not in gone]


def test_pictures_so_small_that_one_pixel_of_the_feature_map_is_left():
    model = with_head("resnet18", 32)
    assert model.concat_pool[0].num_features == 2 * 512
    assert features_of(model, pictures(32)).shape == (2, 512, 1, 1)


def test_dropout_works_in_training_alone():
    model, images = with_head("squeezenet1_1"), pictures(64)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("name", ["efficientnet_b0", "googlenet"])
def test_the_trunk_follows_training_and_evaluation_as_ever(name):
    """Its stochastic depth and batch norm do what the untouched network's do."""
    model, images = with_head(name), pictures(64)
    torch.manual_seed(0)
    original = backbones.build(name, 3, 64).train()
    seen = []
    module = original.features if name == "efficientnet_b0" else original.inception5b
    module.register_forward_hook(lambda *parts: seen.append(parts[2]))
    results = []
    for training in (True, False):
        torch.manual_seed(1)
        original.train(training)(images)
        torch.manual_seed(1)
        results.append(features_of(model.train(training), images))
        assert torch.equal(results[-1], seen[-1])
    assert not torch.equal(*results)
    moved = {key: each for key, each in model.named_buffers() if not key.startswith("concat_pool")}
    assert all(torch.equal(each, original.get_buffer(key)) for key, each in moved.items())
    drops = [each for each in model.modules() if isinstance(each, torchvision.ops.StochasticDepth)]
    assert len(drops) == (16 if name == "efficientnet_b0" else 0)
    assert not any("training" in node.kwargs for node in model.graph.nodes)


def test_gradients_flow_into_what_trains_alone():
    model = with_head("resnet18")
    head = heads.head_layers(model)
    layers.thaw(model, layers.plan(layers.blocks(model, head), head, [], 1), epoch=0)
    layers.train_mode(model)
    model(pictures(64)).sum().backward()
    touched = {layers.layer_of(name) for name, each in model.named_parameters() if each.grad is not None}
    assert touched == {*head, "layer4.1.conv1", "layer4.1.bn1", "layer4.1.conv2", "layer4.1.bn2"}


def test_copies_go_their_own_ways():
    model, images = with_head("squeezenet1_1").eval(), pictures(64)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        before = model(images)
        assert torch.equal(copied(images), before)
        copied.concat_pool[6].bias += 1
        copied.get_submodule("features.0").weight.zero_()
        assert torch.equal(model(images), before)
    assert copied.state_dict().keys() == model.state_dict().keys()


def test_a_network_without_a_feature_map_is_refused():
    with pytest.raises(UserError, match=r"concat_pool, but vit_b_32 has no feature map .* set head.kind to linear"):
        backbones.build("vit_b_32", 3, 64, HEAD)


def test_a_network_that_can_not_be_followed_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            x = self.conv(x)
            return self.fc((x if x.sum() > 0 else -x).mean((2, 3)))

    with pytest.raises(UserError, match=r"odd's can't be followed \(TraceError\): set head.kind to linear"):
        heads.with_concat_pool(Odd(), "odd", 2, hidden=8, dropout=0.5, image_size=32)


def test_features_with_their_channels_last_are_refused_rather_than_pooled_over_a_side():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.conv(x).permute(0, 2, 3, 1).mean((1, 2)))

    with pytest.raises(UserError, match="has no feature map"):
        heads.with_concat_pool(Root(), "root", 2, hidden=8, dropout=0.5, image_size=32)
