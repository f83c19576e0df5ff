"""Models as files for other programs, through the script; and what docs/predict.md says of them."""

import ast
import json
import re
import subprocess
import sys
from importlib.util import find_spec

import export
from finetune import backbones, classifier, decoding, metrics
from finetune.errors import UserError
from helpers import ROOT, run_forked

import numpy as np
import pytest
import torch
from PIL import Image

SIZE = 32
CLASSES = ["ants", "bees", "wasps"]
ABOUT = {
    "model_name": "squeezenet1_1",
    "head": {"kind": "concat_pool", "hidden": 8, "dropout": 0.5},
    "classes": CLASSES,
    "image_size": SIZE,
    "resize": 36,
    "precision": "bf16",  # and nevertheless exported in fp32
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.4],
}
needs_onnx = pytest.mark.skipif(
    not (find_spec("onnxruntime") and find_spec("onnxscript")), reason="requirements-export.txt is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model of random weights, which gives each picture other probabilities."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    network = backbones.build("squeezenet", 3, SIZE, classifier.Head(**ABOUT["head"]))
    network.train()
    with torch.no_grad():
        for _ in range(50):  # batch norm takes on the features' mean and standard deviation
            network(torch.rand(8, 3, SIZE, SIZE) * torch.rand(8, 3, 1, 1))
    backbones.write(folder / classifier.MODEL, network.state_dict(), ABOUT)
    return folder


@pytest.fixture(scope="module")
def exported(folder):
    """The folder after the export, and what that printed."""
    return folder, run_forked(folder, "export", "--onnx", "model.onnx", "--pt2", "model.pt2")


@pytest.fixture
def pictures():
    rng = np.random.default_rng(1)
    return rng.integers(0, rng.integers(20, 256, (5, 1, 1, 3)), (5, 40, 36, 3), dtype=np.uint8)


def expected(folder, pictures) -> np.ndarray:
    """Return the probabilities that prediction gives pictures of the store's size, in fp32."""
    model = classifier.load(folder / classifier.MODEL, "cpu", "fp32")
    return np.exp(metrics.log_softmax(np.concatenate(list(model.logits(pictures)))))


def middle(pictures: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pictures[:, 4 : 4 + SIZE, 2 : 2 + SIZE].transpose(0, 3, 1, 2))


@needs_onnx
@pytest.mark.slow
def test_the_exports_give_the_probabilities_of_prediction_for_any_number_of_pictures(exported, pictures):
    import onnxruntime

    folder, printed = exported
    assert [float(each) < 1e-5 for each in re.findall(r"probabilities within (\S+)\n", printed)] == [True, True]
    assert len(printed.splitlines()) == 3  # nothing of torch's own
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    files = {"about": ""}
    program = torch.export.load(folder / "model.pt2", extra_files=files).module()
    wanted = expected(folder, pictures)
    assert np.ptp(wanted, axis=0).max() > 0.1
    for count in (1, 2, 5):
        (of_onnx,) = session.run(["probabilities"], {"pictures": middle(pictures[:count])})
        of_torch = program(torch.from_numpy(middle(pictures[:count]))).detach().numpy()
        for found in (of_onnx, of_torch):
            assert found == pytest.approx(wanted[:count], abs=1e-5)
    _, about = backbones.read(folder / classifier.MODEL)
    said = {name: about[name] for name in ("model_name", "classes", "resize", "image_size", "digest")}
    assert json.loads(session.get_modelmeta().custom_metadata_map["about"]) == json.loads(files["about"]) == said


@needs_onnx
@pytest.mark.slow
def test_the_documents_code_works_without_the_project(exported):
    folder, _ = exported
    pixels = np.random.default_rng(2).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).resize((140, 180)).save(folder / "photo.jpg", "PNG", exif=exif)  # without JPEG's reduction
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/predict.md").read_text(), re.DOTALL)
    ran = subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=folder, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    of_onnx, of_torch = map(ast.literal_eval, ran.stdout.splitlines())
    (wanted,) = expected(folder, [decoding.decode((folder / "photo.jpg").read_bytes(), ABOUT["resize"])])
    for found in (of_onnx, of_torch):
        assert list(found) == CLASSES
        assert list(found.values()) == pytest.approx(wanted, abs=2e-5)


def test_an_export_that_gives_other_probabilities_is_not_written(folder, tmp_path, monkeypatch):
    def wrong(program, about, path):
        path.write_text("written")
        return lambda pictures: torch.full((len(pictures), 3), 1 / 3)

    (tmp_path / "model.pt2").write_text("of before")
    monkeypatch.setattr(export, "exported", lambda network, examples: None)
    monkeypatch.setattr(export, "as_pt2", wrong)
    model = str(folder / classifier.MODEL)
    monkeypatch.setattr(sys, "argv", ["export.py", "--model", model, "--pt2", str(tmp_path / "model.pt2")])
    with pytest.raises(UserError, match=r"was not written: its probabilities are .* off the model's"):
        export.main()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("model.pt2", "of before")]


def test_what_can_not_be_followed_is_told_in_a_line():
    class Odd(torch.nn.Module):
        def forward(self, pictures):
            return pictures if bool(pictures.sum() > 3) else -pictures

    with pytest.raises(UserError, match=r"^torch.export can't take this network \(.*\).$"):
        export.exported(Odd(), torch.ones(2, 3, 4, 4))


def test_the_packages_that_onnx_needs_are_named(folder, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["export.py", "--onnx", "model.onnx"])
    with pytest.raises(UserError, match=r"pip install -r requirements-export.txt"):
        export.main()
    assert (ROOT / "requirements-export.txt").is_file()


@pytest.mark.slow
def test_what_to_write_has_to_be_said_and_a_model_to_be_there(folder, tmp_path):
    assert "say what to write" in run_forked(folder, "export", status=2)
    printed = run_forked(tmp_path, "export", "--pt2", "model.pt2", status=1)
    assert printed == "error: models/model.safetensors is missing: `dvc repro` trains a model and puts it there.\n"
