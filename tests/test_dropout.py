"""Dropout with cheap masks: it does what torch's does."""

import math

from finetune import device, dropout
from finetune.dropout import Dropout

import pytest
import torch
import torchvision
from torch import Tensor, nn

MANY = 400_000


def dropped(p: float, inputs: Tensor, seed: int = 0) -> Tensor:
    """Return the inputs after dropout in training."""
    device.seed(seed)
    return Dropout(p)(inputs)


def is_dropped(p: float, count: int, seed: int = 0) -> Tensor:
    return dropped(p, torch.ones(count), seed) == 0


@pytest.mark.parametrize("p", [0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999])
def test_so_many_numbers_are_dropped_and_the_mean_holds(p):
    result = dropped(p, torch.ones(MANY))
    deviation = math.sqrt(p * (1 - p) / MANY)
    assert float((result == 0).double().mean()) == pytest.approx(p, abs=4 * deviation + 2**-17)
    assert float(result.double().mean()) == pytest.approx(1, abs=(4 * deviation + 2**-17) / (1 - p))
    assert result.unique().numel() == 2
    assert float(result.max()) == pytest.approx(1 / (1 - p), rel=2**-17 / (1 - p) + 1e-6)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_each_number_is_dropped_whatever_happens_to_those_beside_it(p):
    mask = is_dropped(p, MANY)
    for step in range(1, 9):
        both = (mask[step:] & mask[:-step]).double().mean()
        assert float(both) == pytest.approx(p * p, abs=5 * p / math.sqrt(MANY))
    for place in range(4):  # of the numbers drawn as one
        share = mask[place::4].double().mean()
        assert float(share) == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) * 4 / MANY))


def test_what_is_kept_is_multiplied_and_no_more():
    inputs = torch.randn(1001)
    result = dropped(0.25, inputs)
    kept = result != 0
    assert 600 < kept.sum() < 900
    torch.testing.assert_close(result[kept], inputs[kept] / 0.75)


def test_masks_follow_from_the_seed():
    masks = [is_dropped(0.5, 1000, seed) for seed in (1, 2, 1)]
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])
    device.seed(1)
    layer = Dropout(0.5)
    first, second = (layer(torch.ones(1000)) == 0 for _ in range(2))
    assert torch.equal(first, masks[0])
    assert not torch.equal(first, second)


def test_masks_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    masks = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        masks.append(is_dropped(0.5, MANY))
    torch.set_num_threads(before)
    assert torch.equal(*masks)


SHAPES = [(1,), (2,), (3,), (5,), (7, 1), (4, 8), (3, 5, 7), (2, 3, 5, 7), (1, 3, 1, 1), (0, 3), ()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_number_of_numbers_of_any_type_comes_out_as_it_came_in(shape, dtype):
    seen = set()
    for seed in range(20):
        result = dropped(0.5, torch.ones(shape, dtype=dtype), seed)
        assert result.shape == shape
        assert result.dtype == dtype
        seen |= set(result.flatten().tolist())
    assert seen == ({0.0, 2.0} if 0 not in shape else set())


def test_bfloat16_keeps_its_mean():
    result = dropped(0.1, torch.ones(MANY, dtype=torch.bfloat16))
    assert float(result.double().mean()) == pytest.approx(1, abs=0.005)


def layouts() -> dict[str, Tensor]:
    images = torch.randn(2, 3, 5, 7)
    return {
        "contiguous": images,
        "channels last": images.contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(15, 17).t(),
        "every other": torch.randn(16, 18)[::2, ::2],
        "the same again": torch.randn(4, 1).expand(4, 50),
    }


@pytest.mark.parametrize("name", layouts())
def test_numbers_may_lie_in_memory_in_any_way_and_come_out_as_from_torch(name):
    inputs = layouts()[name]
    result = dropped(0.5, inputs)
    assert result.stride() == nn.functional.dropout(inputs).stride()
    kept = result != 0
    assert 0.2 < kept.double().mean() < 0.8
    torch.testing.assert_close(result[kept], 2 * inputs[kept])


def test_channels_last_stays_channels_last_with_the_masks_in_that_order():
    result = dropped(0.5, layouts()["channels last"])
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result.permute(0, 2, 3, 1) == 0, dropped(0.5, torch.ones(2, 5, 7, 3)) == 0)


@pytest.mark.parametrize("name", layouts())
def test_the_gradient_is_the_mask(name):
    inputs = layouts()[name].detach().requires_grad_()
    result = dropped(0.5, inputs)
    result.sum().backward()
    assert torch.equal(inputs.grad, torch.where(result != 0, 2.0, 0.0))


def test_the_input_is_not_changed():
    inputs = torch.ones(100)
    dropped(0.5, inputs)
    assert torch.equal(inputs, torch.ones(100))


@pytest.mark.parametrize("layer", [Dropout(0.0), Dropout(0.5).eval()])
def test_without_dropping_nothing_changes_and_nothing_is_drawn(layer):
    inputs = torch.randn(100)
    state = torch.get_rng_state()
    assert torch.equal(layer(inputs), inputs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [1.0, 1 - 2**-20, 1 - 2**-17])
def test_with_all_dropped_nothing_is_left(p):
    assert torch.equal(dropped(p, torch.ones(1000)), torch.zeros(1000))


# In a network ---------------------------------------------------------------------------------------------------------


def kinds(model: nn.Module) -> dict[str, tuple]:
    return {name: (type(module), getattr(module, "p", None)) for name, module in model.named_modules()}


def test_a_network_has_it_wherever_it_had_torchs():
    with torch.device("meta"):
        model = torchvision.models.alexnet(dropout=0.3)
    before, tensors = kinds(model), {name: id(tensor) for name, tensor in model.named_parameters()}
    names = list(model.state_dict())
    dropout.replace(model)
    expected = {name: (Dropout if kind is nn.Dropout else kind, p) for name, (kind, p) in before.items()}
    assert list(kinds(model).items()) == list(expected.items())  # in the same order, too
    assert [kind for kind, _ in kinds(model).values()].count(Dropout) == 2
    assert list(model.state_dict()) == names
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == tensors


def test_other_kinds_stay():
    class Own(nn.Dropout):
        pass

    others = [nn.Dropout2d(0.5), nn.Dropout1d(0.5), nn.AlphaDropout(0.5), Own(0.5), Dropout(0.2)]
    model = nn.Sequential(*others)
    dropout.replace(model)
    assert list(model) == others


def test_it_is_replaced_at_any_depth_and_in_the_mode_it_was_in():
    model = nn.Sequential(nn.Dropout(0.1), nn.ModuleDict({"a": nn.ModuleList([nn.Sequential(nn.Dropout(0.2))])}))
    model[1].eval()
    dropout.replace(model)
    outer, inner = model[0], model[1]["a"][0][0]
    assert [(type(each), each.p, each.training) for each in (outer, inner)] == [
        (Dropout, 0.1, True),
        (Dropout, 0.2, False),
    ]


def test_a_network_in_evaluation_gives_what_it_gave():
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1(num_classes=2).eval()
    inputs = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(inputs)
        dropout.replace(model)
        assert torch.equal(model.eval()(inputs), before)
        model.train()
        device.seed(1)
        first = model(inputs)
        device.seed(1)
        assert torch.equal(model(inputs), first)
        assert not torch.equal(first, before)
