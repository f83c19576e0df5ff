"""What stands in for torch's compiler: nothing here imports it, and whoever asks for more has it."""

import subprocess
import sys

from helpers import ROOT

import pytest

BEGIN = """
import sys
sys.path.insert(0, "src")
from finetune import backbones, optim
import torch
"""
EACH_OPTIMIZER = """
model = torch.nn.Linear(3, 2)
for name in optim.OPTIMIZERS.keys() - {"lbfgs", "optimizer", "sparseadam"}:  # those that need another kind of step
    of_torch = optim.OPTIMIZERS[name]
    optimizer = of_torch([each for each in model.parameters() if name != "muon" or each.ndim == 2], lr=0.1)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10, cycle_momentum=False)
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.clone()
    optimizer.step()
    rates.step()
    optimizer.zero_grad()
    assert not torch.equal(model.weight, before), name
assert not {"torch._dynamo.guards", "sympy"} & set(sys.modules)
"""
WANTS = [
    "import torch._dynamo.config as config; assert config.recompile_limit",
    "from torch._dynamo.utils import counters",
    "assert torch.compile(torch.square, backend='eager')(torch.tensor(3.0)) == 9",
]


def run(code: str) -> None:
    """Run python code in a process of its own, which has to end well."""
    subprocess.run([sys.executable, "-c", BEGIN + code], cwd=ROOT, check=True)


def test_no_optimizer_and_no_schedule_imports_the_compiler():
    run(EACH_OPTIMIZER)


@pytest.mark.parametrize("want", WANTS)
def test_who_wants_the_compiler_has_it(want):
    run(f"assert 'torch._dynamo.guards' not in sys.modules\n{want}\nassert 'torch._dynamo.guards' in sys.modules")
