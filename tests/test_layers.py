"""Blocks of networks of every family, and what trains: the plan in tables of cases, and a small network after it."""

import re

from finetune import backbones, layers
from finetune.errors import UserError
from finetune.heads import head_layers
from finetune.layers import Block, Group

import pytest
import torch
import torchvision
from torch import nn


def blocks_of(name: str) -> tuple[nn.Module, list[Block]]:
    """Return a network without numbers, but for one that asks for them, and its blocks."""
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model = torchvision.models.get_model(name, weights=None, num_classes=2)
    return model, layers.blocks(model, head_layers(model))


# A network's structure ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("alexnet", 7, ["features.0", "features.3"], ["features.10", "classifier.1", "classifier.4"]),
        ("squeezenet1_1", 9, ["features.0", "features.3", "features.4"], ["features.11", "features.12"]),
        ("vgg11_bn", 10, ["features.0", "features.4"], ["features.25", "classifier.0", "classifier.3"]),
        ("resnet18", 9, ["conv1", "layer1.0", "layer1.1", "layer2.0"], ["layer4.0", "layer4.1"]),
        ("densenet121", 8, ["features.conv0", "features.denseblock1", "features.transition1"],
                           ["features.transition3", "features.denseblock4"]),
        ("mobilenet_v2", 19, ["features.0", "features.1"], ["features.17", "features.18"]),
        ("mobilenet_v3_large", 18, ["features.0", "features.1"], ["features.16", "classifier.0"]),
        ("efficientnet_b0", 18, ["features.0", "features.1.0", "features.2.0", "features.2.1"],
                                ["features.7.0", "features.8"]),
        ("convnext_tiny", 22, ["features.0", "features.1.0", "features.1.1", "features.1.2", "features.2.0"],
                              ["features.6.0", "features.7.0", "features.7.1", "features.7.2"]),
        ("vit_b_16", 13, ["conv_proj", "encoder.layers.encoder_layer_0"], ["encoder.layers.encoder_layer_11"]),
        ("swin_t", 16, ["features.0.0", "features.1.0", "features.1.1", "features.2"],
                       ["features.7.0", "features.7.1"]),
        ("regnet_y_400mf", 17, ["stem", "trunk_output.block1.block1-0", "trunk_output.block2.block2-0"],
                               ["trunk_output.block4.block4-4", "trunk_output.block4.block4-5"]),
        ("maxvit_t", 14, ["stem.0", "stem.1", "blocks.0.layers.0"], ["blocks.3.layers.1", "classifier.2"]),
    ],
)  # fmt: skip
def test_blocks_are_found_by_the_structure(name, count, first, last):
    names = [block.name for block in blocks_of(name)[1]]
    assert (len(names), names[: len(first)], names[-len(last) :]) == (count, first, last)


@pytest.mark.parametrize(
    ("name", "block", "expected"),
    [
        ("vgg11_bn", "features.4", ["features.4", "features.5"]),  # a norm goes with its convolution
        ("resnet18", "conv1", ["conv1", "bn1"]),
        ("densenet121", "features.conv0", ["features.conv0", "features.norm0"]),
        ("convnext_tiny", "features.2.0", ["features.2.0", "features.2.1"]),  # here the norm comes first
        ("vit_b_16", "conv_proj", ["conv_proj", "", "encoder"]),  # '' has the class token, encoder the positions
        ("swin_t", "features.0.0", ["features.0.0", "features.0.2"]),
    ],
)
def test_the_layers_of_a_block(name, block, expected):
    assert next(each.layers for each in blocks_of(name)[1] if each.name == block) == expected


@pytest.mark.parametrize(
    ("name", "norm"),
    [("densenet121", "features.norm5"), ("convnext_tiny", "classifier.0"), ("vit_b_16", "encoder.ln"),
     ("swin_t", "norm")],
)  # fmt: skip
def test_the_norm_in_front_of_the_head_goes_with_the_last_block(name, norm):
    assert blocks_of(name)[1][-1].layers[-1] == norm


# The plan -------------------------------------------------------------------------------------------------------------

BLOCKS = [Block("a", ["a"]), Block("b", ["b.0", "b.1"]), Block("c", ["c"]), Block("d.0", ["d.0.x", "d.0.y"])]
ALL = {"d.0": 0, "c": 0, "b": 0, "a": 0}


def planned(trainable, missing=(), **options) -> list[Group]:
    return layers.plan(BLOCKS, ["head.fc"], list(missing), trainable, **options)


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ("head", {}),
        ("all", ALL),
        (1, {"d.0": 0}),
        (3, {"d.0": 0, "c": 0, "b": 0}),
        (4, ALL),
        ("c", {"c": 0}),
        (["b", "d"], {"d.0": 0, "b": 0}),  # whatever order they are named in
        (["d.0.y", "a"], {"d.0": 0, "a": 0}),
        ("head.fc", {}),  # trains anyway
        (["head", "c"], {"c": 0}),
    ],
)
def test_what_trains(trainable, expected):
    groups = planned(trainable)
    assert groups[0] == Group("head", ["head.fc"], thaws=0)
    assert {group.name: group.thaws for group in groups[1:] if group.thaws is not None} == expected
    names = [layer for group in groups for layer in group.layers]
    assert sorted(names) == ["a", "b.0", "b.1", "c", "d.0.x", "d.0.y", "head.fc"]  # each once, frozen ones too


def test_the_layers_of_a_block_that_are_not_named_stay_frozen():
    assert planned("b.1")[3:5] == [Group("b", ["b.1"], thaws=0), Group("b", ["b.0"])]


@pytest.mark.parametrize(
    ("trainable", "missing", "expected"),
    [
        ("head", ["c"], {}),
        ("all", ["c", "b.0"], {"d.0": ["d.0.x", "d.0.y"], "b": ["b.1"], "a": ["a"]}),
        (2, ["c", "d.0.x"], {"d.0": ["d.0.y"], "b": ["b.0", "b.1"]}),  # a block without weights counts for nothing
        ("b", ["b.0", "b.1"], {}),
        (7, ["a", "b.0", "b.1", "c", "d.0.x", "d.0.y"], {}),  # no weights at all: any number will do
    ],
)
def test_layers_without_weights_train_with_the_head_and_at_its_rate(trainable, missing, expected):
    head, *others = planned(trainable, missing, backbone_lr_scale=0.1)
    assert head == Group("head", [*missing, "head.fc"], thaws=0, lr_scale=1.0, without_weights=len(missing))
    assert {group.name: group.layers for group in others if group.thaws is not None} == expected


@pytest.mark.parametrize(
    ("trainable", "missing", "epoch", "every", "expected"),
    [
        ("all", [], 3, 0, {"d.0": 3, "c": 3, "b": 3, "a": 3}),
        ("all", [], 3, 2, {"d.0": 3, "c": 5, "b": 7, "a": 9}),
        ("all", [], 0, 1, {"d.0": 0, "c": 1, "b": 2, "a": 3}),
        (2, [], 1, 1, {"d.0": 1, "c": 2}),
        (["a", "c"], [], 1, 4, {"c": 1, "a": 5}),  # frozen blocks between them take no time
        ("all", ["c"], 1, 1, {"d.0": 1, "b": 2, "a": 3}),
    ],
)
def test_blocks_thaw_from_the_last_to_the_first(trainable, missing, epoch, every, expected):
    head, *others = planned(trainable, missing, unfreeze_epoch=epoch, unfreeze_every=every)
    assert head.thaws == 0
    assert [(group.name, group.thaws) for group in others if group.thaws is not None] == list(expected.items())


@pytest.mark.parametrize(
    ("trainable", "missing", "scale", "decay", "expected"),
    [
        ("all", [], 0.1, 1.0, {"head": 1, "d.0": 0.1, "c": 0.1, "b": 0.1, "a": 0.1}),
        ("all", [], 0.1, 0.5, {"head": 1, "d.0": 0.1, "c": 0.05, "b": 0.025, "a": 0.0125}),
        ("b", [], 1.0, 0.5, {"head": 1, "b": 0.25}),  # by its place, whether or not those behind it train
        (["d.0.y", "a"], [], 1.0, 0.5, {"head": 1, "d.0": 1, "a": 0.125}),
        ("all", ["c"], 1.0, 0.5, {"head": 1, "d.0": 1, "b": 0.5, "a": 0.25}),
    ],
)
def test_the_learning_rate_falls_from_the_head_to_the_first_block(trainable, missing, scale, decay, expected):
    groups = planned(trainable, missing, backbone_lr_scale=scale, layer_decay=decay)
    rates = {group.name: group.lr_scale for group in groups if group.thaws is not None}
    assert rates == pytest.approx(expected)
    assert list(rates) == list(expected)


@pytest.mark.parametrize(
    ("trainable", "missing", "options", "message"),
    [
        (5, [], {}, r"backbone.trainable = 5, but the network has 4 pretrained blocks: a, b, c, d.0\."),
        (4, ["c"], {}, r"backbone.trainable = 4, but the network has 3 pretrained blocks: a, b, d.0\."),
        ("b.2", [], {}, r"no layer 'b.2' \(nor is it head, all or a number\)\. Nearest: b.1, b.0"),
        (["a", "haed"], [], {}, r"no layer 'haed' .* Nearest: head"),
        ("zzz", [], {}, r"no layer 'zzz' .* It has head, a, b, c, d\.$"),
        ("al", [], {"unfreeze_epoch": 1}, "no layer 'al'"),
        ("head", [], {"unfreeze_epoch": 1}, r"nothing can thaw, .* backbone.trainable = head\. Set both to 0"),
        ("head.fc", [], {"unfreeze_every": 1}, r"nothing can thaw, .* backbone.trainable = head.fc\."),
        ("c", ["c"], {"unfreeze_epoch": 1}, "nothing can thaw"),
        ("all", [layer for block in BLOCKS for layer in block.layers], {"unfreeze_epoch": 2}, "nothing can thaw"),
    ],
)
def test_a_plan_that_can_not_be(trainable, missing, options, message):
    with pytest.raises(UserError, match=message):
        planned(trainable, missing, **options)


def test_a_networks_own_tensors_have_no_name_to_suggest():
    with pytest.raises(UserError, match=r"It has head, conv\.$"):
        layers.plan([Block("conv", ["conv", ""])], ["head"], [], "zzz")


SIZES = {"head.fc": 10, "a": 1000, "b.0": 100, "b.1": 23, "c": 2, "d.0.x": 3, "d.0.y": 4}


@pytest.mark.parametrize(
    ("trainable", "missing", "options", "expected"),
    [
        ("head", [], {}, ["layers   parameters          lr",
                          "head             10  trains  0.02",
                          "d.0 … a       1,132  frozen"]),
        ("c", ["a"], {"unfreeze_epoch": 2, "backbone_lr_scale": 0.1},
                         ["layers                          parameters                lr",
                          "head and 1 layer without weights       1,010  trains        0.02",
                          "d.0                                        7  frozen",
                          "c                                          2  from epoch 3  0.002",
                          "b                                        123  frozen"]),
        ("all", ["b.0", "d.0.y"], {"unfreeze_every": 1, "layer_decay": 0.5},
                         ["layers                             parameters                lr",
                          "head and 2 layers without weights         114  trains        0.02",
                          "d.0                                         3  trains        0.02",
                          "c                                           2  from epoch 2  0.01",
                          "b                                          23  from epoch 3  0.005",
                          "a                                       1,000  from epoch 4  0.0025"]),
        ("all", [], {}, ["layers   parameters          lr",
                         "head             10  trains  0.02",
                         "d.0 … a       1,132  trains  0.02"]),  # the head is apart, whatever the others do
        ("all", [], {"unfreeze_epoch": 3, "unfreeze_every": 1},
                        ["layers  parameters                                          lr",
                         "head            10  trains                                  0.02",
                         "d.0              7  from epoch 4                            0.02",
                         "c … a        1,125  frozen: 4 epochs are too few to thaw"]),
    ],
)  # fmt: skip
def test_the_table_of_what_trains(trainable, missing, options, expected):
    def words(line: str) -> str:
        return re.sub("  +", " | ", line)

    lines = layers.table(planned(trainable, missing, **options), SIZES, lr=0.02, num_epochs=4)
    assert [words(line) for line in lines] == [words(line) for line in expected]
    ends = {re.match(r".*?\S  +[\d,]+(?=  )|.*parameters", line).end() for line in lines}
    assert len(ends) == 1  # the numbers stand one below the other
    assert max(map(len, lines)) < 120


# The model follows it -------------------------------------------------------------------------------------------------


def test_a_network_thaws_epoch_by_epoch():
    model, found = blocks_of("resnet18")
    groups = layers.plan(found, head_layers(model), ["layer1.0.conv1"], 3, unfreeze_epoch=1, unfreeze_every=2)
    trains = []
    for epoch in range(6):
        layers.thaw(model, groups, epoch)
        trains.append({layers.layer_of(name) for name, each in model.named_parameters() if each.requires_grad})
    last = [set(block.layers) for block in found[:-4:-1]]
    head = {"fc", "layer1.0.conv1"}
    assert trains[0] == head
    assert trains[1] == trains[2] == head | last[0]
    assert trains[3] == trains[4] == head | last[0] | last[1]
    assert trains[5] == head | last[0] | last[1] | last[2]
    layers.thaw(model, groups, 0)
    assert not any(each.requires_grad for each in model.layer4.parameters())


@pytest.mark.parametrize(("batch_norm", "moved"), [("frozen", {"layer4.1.bn1", "layer4.1.bn2"}), ("train", None)])
def test_frozen_batch_norm_keeps_its_statistics_unless_told_otherwise(batch_norm, moved):
    model = backbones.build("resnet18", 2, 32)
    head = head_layers(model)
    layers.thaw(model, layers.plan(layers.blocks(model, head), head, [], 1), epoch=0)
    layers.train_mode(model, batch_norm)
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    model(torch.rand(4, 3, 32, 32))
    changed = {layers.layer_of(name) for name, each in model.named_buffers() if not torch.equal(each, before[name])}
    assert changed == (moved or {name for name, each in model.named_modules() if isinstance(each, nn.BatchNorm2d)})
    assert model.training  # dropout and all else are as ever
