"""What needs a CUDA device: training there, twice the same, and close to the CPU's."""

from helpers import make_pictures, run, write_params

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_cuda_trains_the_same_twice_and_close_to_the_cpu(tmp_path):
    results = []
    for device in ("cuda", "auto", "cpu"):
        folder = tmp_path / device
        make_pictures(folder / "pictures", {"train/a": 6, "train/b": 7, "val/a": 3, "val/b": 4}, size=36)
        write_params(
            folder,
            data__source="pictures",
            data__resize=36,
            data__image_size=32,
            model_name="squeezenet",
            backbone__weights="none",
            num_epochs=2,
            device=device,
        )
        for script in ("prepare.py", "backbone.py", "train.py", "evaluate.py"):
            result = run(script, folder)
            assert result.returncode == 0, result.stdout + result.stderr
        results.append(load_file(folder / "models/model.safetensors"))
    first, again, cpu = results
    assert all(torch.equal(first[name], again[name]) for name in first)
    # Dropout draws from each device's own generator, so the runs part at the head; the trunk stays near.
    for name in first:
        torch.testing.assert_close(first[name], cpu[name], rtol=0, atol=0.05)
