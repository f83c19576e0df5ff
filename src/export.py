"""Write a fine-tuned model as a file that other programs can use without this project.

    python src/export.py --onnx model.onnx                   # for ONNX Runtime; needs `make export` once
    python src/export.py --pt2 model.pt2                     # for torch: torch.export.load
    python src/export.py --onnx best.onnx --experiment agley-scut

The file takes pictures as uint8 [n, 3, image_size, image_size], normalises them, and gives probabilities [n, classes].
Its metadata `about` is JSON: the classes' names, and `resize` and `image_size` (px), as a picture is to be resized to a
shorter side of `resize` and cropped to its middle first. What was written is run, and compared with the model.
"""

import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from finetune import classifier, models, stage
from finetune.errors import UserError
from finetune.files import replaced

import torch
from torch import Tensor, nn

PICTURES, PROBABILITIES = "pictures", "probabilities"  # the names of input and output
MOST = 1e-4  # by which probabilities may differ
COUNT = 8  # pictures that are compared


class Exported(nn.Module):
    """Probabilities [n, classes] of uint8 pictures [n, 3, image_size, image_size]."""

    def __init__(self, model: classifier.Classifier):
        super().__init__()
        self.network = model.model
        self.normalize = model.normalize

    def forward(self, pictures: Tensor) -> Tensor:
        return self.network(self.normalize(pictures)).softmax(dim=1)


def main() -> None:
    parser = models.parser(__doc__)
    parser.add_argument("--onnx", metavar="FILE.onnx", type=Path, help="write an ONNX model")
    parser.add_argument("--pt2", metavar="FILE.pt2", type=Path, help="write an archive of torch.export")
    arguments = parser.parse_args()
    wanted = [(path, export) for path, export in ((arguments.onnx, as_onnx), (arguments.pt2, as_pt2)) if path]
    if not wanted:
        parser.error("say what to write: --onnx FILE.onnx, --pt2 FILE.pt2, or both")
    if arguments.onnx and not (find_spec("onnxruntime") and find_spec("onnxscript")):
        raise UserError("--onnx needs two packages: `make export`, or pip install -r requirements-export.txt")

    source = models.path(arguments)
    model = classifier.load(source, "cpu", "fp32")
    about = {key: model.about[key] for key in ("model_name", "classes", "resize", "image_size", "digest")}
    print(f"exporting {source}: up to half a minute", file=sys.stderr)
    network = Exported(model).to(memory_format=torch.contiguous_format).eval()
    examples = pictures(about["image_size"])
    with torch.no_grad():
        expected = network(examples)
    program = exported(network, examples)
    for path, export in wanted:
        with replaced(path) as temporary:
            difference = compared(export(program, json.dumps(about), temporary), examples, expected)
            if not difference <= MOST:
                raise UserError(f"{path} was not written: its probabilities are {difference:.1e} off the model's.")
        print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB, of {source}; probabilities within {difference:.1e}")


def pictures(image_size: int) -> Tensor:
    """Return pictures of noise, [n, 3, size, size] uint8, from dark to light and from faint to strong."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(COUNT, 3, image_size, image_size, generator=generator)
    low, high = torch.rand(2, COUNT, 3, 1, 1, generator=generator).mul(256).sort(dim=0).values
    return (low + noise * (high - low)).to(torch.uint8)


def exported(network: nn.Module, examples: Tensor) -> torch.export.ExportedProgram:
    """Return the network as torch.export sees it, for any number of pictures. Raises UserError where it can't."""
    shapes = {PICTURES: {0: torch.export.Dim("n", min=1)}}
    with told("torch.export"):
        return torch.export.export(network, (examples[:2],), dynamic_shapes=shapes)


@contextmanager
def told(exporter: str) -> Iterator[None]:
    """Raise UserError for whatever an exporter stumbles over: not every network's forward pass is made for it."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(f"{exporter} can't take this network ({type(error).__name__}: {reason}).") from None


def as_pt2(program: torch.export.ExportedProgram, about: str, path: Path) -> Callable[[Tensor], Tensor]:
    """Write an archive of torch.export; return it as a function, read from there."""
    buffer = io.BytesIO()  # as a path it would have to end in .pt2
    torch.export.save(program, buffer, extra_files={"about": about})
    path.write_bytes(buffer.getvalue())
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def as_onnx(program: torch.export.ExportedProgram, about: str, path: Path) -> Callable[[Tensor], Tensor]:
    """Write an ONNX model; return it as a function, as ONNX Runtime runs it."""
    import onnxruntime

    with told("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecations
        onnx = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=[PICTURES], output_names=[PROBABILITIES]
        )
    assert onnx is not None  # as it is where no file is named
    onnx.model.metadata_props["about"] = about
    onnx.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pictures: torch.from_numpy(session.run([PROBABILITIES], {PICTURES: pictures.numpy()})[0])


def compared(function: Callable[[Tensor], Tensor], examples: Tensor, expected: Tensor) -> float:
    """Return by how much a function's probabilities differ at most, of pictures one by one and all at once."""
    with torch.no_grad():
        found = torch.cat([function(examples), function(examples[:1])])
    return float((found - torch.cat([expected, expected[:1]])).abs().max())


if __name__ == "__main__":
    stage.run(main)
