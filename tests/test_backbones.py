"""Networks by name, partial weights, and what trains; every torchvision classifier is built once."""

import hashlib

from finetune import backbones
from finetune.errors import UserError

import pytest
import torch
import torchvision
from safetensors.torch import save_file

MODELS = torchvision.models.list_models(module=torchvision.models)
SIZES = {"alexnet": 63, "inception_v3": 75, "maxvit_t": 224, "vit_h_14": 28, "efficientnet_v2_l": 33}  # px; others: 32


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_torchvision_classifier_builds_with_its_head_replaced(name):
    size = SIZES.get(name, 32)
    with torch.device(
        "cpu" if name.startswith("regnet") else "meta"
    ):  # shapes alone, but for one that asks for numbers
        model = backbones.build(name, 3, size)
        head = backbones.head_name(model)
        backbones.freeze(model, [head])
        backbones.train_mode(model)
        logits = model(torch.rand(2, 3, size, size))
    assert logits.shape == (2, 3)
    logits.sum().backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None]
    assert trained == [n for n, _ in model.named_parameters() if n.startswith(f"{head}.")] != []


def test_squeezenet_means_squeezenet1_1():
    assert backbones.canonical_name("squeezenet") == "squeezenet1_1"


@pytest.mark.parametrize(("name", "near"), [("resnet81", "resnet18"), ("squeeznet", "squeezenet"), ("zzz", "alexnet")])
def test_an_unknown_model_names_the_nearest(name, near):
    with pytest.raises(UserError, match=near):
        backbones.canonical_name(name)


def test_pictures_too_small_for_the_network_are_an_error():
    with pytest.raises(UserError, match=r"alexnet can't take pictures of data.image_size = 32 px"):
        backbones.build("alexnet", 2, 32)


@pytest.mark.parametrize(
    ("names", "missing", "trainable", "expected"),
    [
        (["a", "b", "head"], [], "head", ["head"]),
        (["a", "b", "head"], ["b"], "head", ["b", "head"]),  # a random layer is never frozen
        (["a", "b", "head"], ["a", "b"], "head", ["a", "b", "head"]),
        (["a", "b", "head"], ["b"], "all", ["a", "b", "head"]),
    ],
)
def test_what_trains(names, missing, trainable, expected):
    assert backbones.trainable_layers(names, "head", missing, trainable) == expected


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


def test_frozen_batch_norm_keeps_its_statistics():
    model = backbones.build("resnet18", 2, 32)
    backbones.freeze(model, ["fc", "layer4.1.bn2"])
    backbones.train_mode(model)
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    model(torch.rand(4, 3, 32, 32))
    changed = {name for name, tensor in model.named_buffers() if not torch.equal(tensor, before[name])}
    assert {name.rpartition(".")[0] for name in changed} == {"layer4.1.bn2"}


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
