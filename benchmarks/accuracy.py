"""What a setting does to accuracy: the last epoch's val_acc over seeds, in one process, without DVC.

    python benchmarks/accuracy.py precision fp32 bf16 -S model_name=squeezenet
    python benchmarks/accuracy.py augment.views 0 16 4 1 -S model_name=squeezenet -S num_epochs=40

Needs data/prepared (`dvc repro prepare`). The seconds are those of training and validation.
"""

import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "src"))

from finetune import experiment, parallel, params, training

import torch
from tqdm import tqdm


def main() -> None:
    parser = params.parser(__doc__)
    parser.add_argument("key", help="the setting")
    parser.add_argument("values", nargs="+", help="its values")
    parser.add_argument("--seeds", type=int, default=5, help="default 5")
    arguments = parser.parse_args()
    for value in arguments.values:
        changes = [*arguments.changes, f"{arguments.key}={value}"]
        runs = [run([*changes, f"seed={seed}"]) for seed in range(arguments.seeds)]
        accuracies, losses, seconds = zip(*runs, strict=True)
        print(
            f"{arguments.key}={value}: val_acc {statistics.mean(accuracies):.4f} ± {statistics.stdev(accuracies):.4f}  "
            f"val_loss {statistics.mean(losses):.4f}  {statistics.median(seconds):.1f} s  "
            f"({', '.join(f'{each:.4f}' for each in accuracies)})",
            flush=True,
        )


def run(changes: list[str]) -> tuple[float, float, float]:
    """Train; return val_acc and val_loss of the last epoch, and the seconds of all."""
    this = experiment.by_hand(changes)
    optimizer, schedule = this.optimizer()
    start = time.perf_counter()
    for epoch in range(this.settings.num_epochs):
        this.begin_epoch(epoch)
        torch.set_num_threads(parallel.cores() if this.is_heavy else 1)
        with tqdm(disable=True) as bar:
            sums = training.Sums(this.device, epoch, {})
            this.train_epoch(optimizer, schedule, this.training_batches(epoch), sums, bar)
        loss, accuracy = this.validate(this.val_batches())
        schedule.after_epoch(loss)
    return accuracy, loss, time.perf_counter() - start


if __name__ == "__main__":
    main()
