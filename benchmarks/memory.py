"""What memory preparing, training and evaluating take: of many drawn pictures, and of a few.

    python benchmarks/memory.py                 # 100,000 pictures of 64 px: ten minutes on 2 cores, 3 GB of disk
    python benchmarks/memory.py --pictures 1000

Of each stage's process, the peak of its own memory (anonymous pages: what the system can't drop), sampled ten times a
second, with many pictures and with 40. The difference is what the pictures take; the rest is the frameworks' own.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "src"))

from finetune import sources

import torch
from ruamel.yaml import YAML
from torchvision import models

SETTINGS = {"model_name": "squeezenet1_1", "num_epochs": 2}
DATA = {"source": "pictures", "image_size": 64, "resize": 64}
FEW = 40
DRAWN = 1000  # of which the others are copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100_000, help="a fifth of them validate (default 100,000)")
    number = parser.parse_args().pictures
    with tempfile.TemporaryDirectory() as folder:
        few, many = (measure(Path(folder) / str(count), count) for count in (FEW, number))
    print(f"peak of memory, MB:{'':10}{FEW:>10,}{number:>10,}  pictures")
    for stage in few:
        print(f"{stage:28}{few[stage]:10.0f}{many[stage]:10.0f}  {many[stage] - few[stage]:+.0f}", flush=True)


def measure(folder: Path, number: int) -> dict[str, float]:
    """Return the peak of each stage's memory, in MB, with so many pictures."""
    (folder / "weights").mkdir(parents=True)
    drawn, copies = min(number, DRAWN), max(1, number // DRAWN)
    recipe = sources.DrawnRecipe(drawn=["ants", "bees"], train=drawn * 2 // 5, val=drawn // 10, size=64, seed=0)
    sources.draw(recipe, folder / "pictures")
    for file in list((folder / "pictures").glob("*/*/*")):
        for copy in range(1, copies):
            os.link(file, file.with_stem(f"{file.stem}-{copy}"))
    torch.save(models.get_model(SETTINGS["model_name"]).state_dict(), folder / "weights/random.pth")
    yaml = YAML()
    settings = yaml.load(ROOT / "params.yaml")
    settings |= SETTINGS
    settings["data"] |= DATA
    settings["backbone"]["weights"] = "random.pth"
    yaml.dump(settings, folder / "params.yaml")
    return {stage: peak(folder, stage) for stage in ("backbone", "prepare", "train", "evaluate")}


def peak(folder: Path, stage: str) -> float:
    """Run a stage in the folder; return the peak of its process's own memory, in MB."""
    highest, start = 0, time.perf_counter()
    with subprocess.Popen(
        [sys.executable, str(ROOT / f"src/{stage}.py")], cwd=folder, stdout=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            kilobytes = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
            highest = max([highest, *kilobytes])
            time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{stage} failed")
    print(f"{folder.name} pictures: {stage} took {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return highest / 1024


if __name__ == "__main__":
    main()
