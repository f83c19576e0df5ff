"""The device that an experiment runs on: seeds, and the precision of its arithmetic."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune import device

import pytest
import torch
from torch import nn

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CPUINFO = Path("/proc/cpuinfo")


def drawn() -> list[torch.Tensor]:
    return [torch.rand(5), torch.randn(5), torch.randperm(5), torch.empty(5, dtype=torch.int64).random_()]


@pytest.mark.parametrize("number", [0, 1, 2**31, 2**63 - 1, 2**64 - 1])
def test_a_seed_is_torchs(number):
    device.seed(number)
    ours = drawn()
    torch.manual_seed(number)
    assert all(map(torch.equal, ours, drawn()))
    device.seed(number)
    assert all(map(torch.equal, ours, drawn()))
    assert torch.initial_seed() == number


def test_another_seed_draws_other_numbers():
    device.seed(1)
    one = torch.rand(5)
    device.seed(2)
    assert not torch.equal(one, torch.rand(5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_seed_is_that_of_cuda_too():
    found = []
    for seed in (device.seed, torch.manual_seed, device.seed):
        torch.rand(5, device="cuda")
        seed(3)
        found.append(torch.rand(5, device="cuda"))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_all_is_auto_for_one_process():
    assert device.choose("all") == device.choose("auto")


# Precision ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [CPU, CUDA])
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_precision_that_is_named_is_taken(name, place):
    assert device.precision(name, place) == name


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"),
    [(False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16"), (True, True, "bf16"), (None, None, "fp32")],
)
def test_auto_is_bf16_on_processors_that_compute_in_it(avx512, amx, expected, monkeypatch):
    for name, has in (("_is_avx512_bf16_supported", avx512), ("_is_amx_tile_supported", amx)):
        monkeypatch.delattr(torch.cpu, name, raising=False)  # as in other versions of torch
        if has is not None:
            monkeypatch.setattr(torch.cpu, name, lambda has=has: has, raising=False)
    assert device.precision("auto", CPU) == expected


@pytest.mark.skipif(not CPUINFO.exists(), reason="needs /proc")
def test_auto_knows_this_processor():
    has_bf16 = {"avx512_bf16", "amx_tile"} & set(CPUINFO.read_text().split())
    assert device.precision("auto", CPU) == ("bf16" if has_bf16 else "fp32")


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_is_bf16_on_cuda_devices_that_compute_in_it(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: capability)
    assert device.precision("auto", CUDA) == expected


def test_what_is_known_about_a_device_can_be_written_down(monkeypatch):
    assert device.about(CPU) == ["cpu", torch.backends.cpu.get_cpu_capability()]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: f"NVIDIA of {place}")
    assert device.about(CUDA) == ["cuda", "NVIDIA of cuda"]
    assert json.loads(json.dumps(device.about(CPU))) == device.about(CPU)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(288), nn.Linear(288, 2))


INPUTS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_in_fp32_a_network_is_itself():
    model = network()
    assert device.in_precision(model, "fp32") is model


def test_in_bf16_a_network_computes_nearly_the_same_with_the_same_tensors():
    model = network().eval()
    own = list(model.parameters())
    in_bf16 = device.in_precision(model, "bf16")
    result = in_bf16(INPUTS)
    assert result.dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    assert not torch.equal(result.float(), model(INPUTS))
    torch.testing.assert_close(result.float(), model(INPUTS), rtol=0.05, atol=0.02)
    assert all(one is other for one, other in zip(in_bf16.parameters(), own, strict=True))
    assert {tensor.dtype for tensor in [*own, model[3].running_mean]} == {torch.float32}


def test_in_bf16_a_network_trains_nearly_the_same():
    gradients = []
    for precision in ("fp32", "bf16"):
        model = network()
        device.in_precision(model, precision)(INPUTS).float().square().sum().backward()
        assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
        assert model[3].running_mean.dtype == torch.float32
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() < 0.2 * one.norm() + 1e-3


def test_a_network_in_bf16_sees_what_its_tensors_became():
    model = network().eval()
    in_bf16 = device.in_precision(model, "bf16")
    before = in_bf16(INPUTS)
    with torch.no_grad():
        model[4].weight.mul_(-1)
        model[4].bias.mul_(-1)
        assert torch.equal(in_bf16(INPUTS), -before)


def test_a_network_in_bf16_changes_its_mode_with_what_is_around_it():
    model = network()
    in_bf16 = device.in_precision(model, "bf16").eval()
    assert not model[3].training
    in_bf16.train()
    assert model[3].training


def test_networks_in_bf16_compute_alike_in_any_thread_and_leave_it_as_it_was():
    in_bf16 = device.in_precision(network().eval(), "bf16")

    def compute(_: int) -> tuple[torch.Tensor, bool]:
        with torch.no_grad():
            return in_bf16(INPUTS), torch.is_autocast_enabled("cpu")

    expected = compute(0)[0]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(compute, range(12)))
    assert all(torch.equal(each, expected) for each, _ in found)
    assert not any(enabled for _, enabled in found)


def test_a_network_in_bf16_takes_what_another_returned():
    first, second = (copy.deepcopy(part).eval() for part in (network()[:3], network()[3:]))
    with torch.no_grad():
        whole = device.in_precision(nn.Sequential(first, second), "bf16")(INPUTS)
        parts = device.in_precision(second, "bf16")(device.in_precision(first, "bf16")(INPUTS))
    assert torch.equal(whole, parts)
