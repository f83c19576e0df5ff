"""Find a learning rate: train with a rate that rises at each step, and see where the loss falls fastest.

    python src/find_lr.py                                           # today's settings
    python src/find_lr.py -S model_name=squeezenet -S head.kind=concat_pool
    python src/find_lr.py -S backbone.trainable=all --group backbone           # the head's rate stays lr
    python src/find_lr.py -S backbone.trainable=all -S backbone.unfreeze_epoch=2 --epoch 2     # after the thawing

Writes results/find_lr.png and results/find_lr.json, and prints the command with the rate that it suggests. The model is
a copy: no checkpoint, experiment or setting changes. Needs data/prepared (`dvc repro prepare`).

Leslie Smith 2015, arXiv:1506.01186; the smoothing and where it stops as in fastai.
"""

import contextlib
import itertools
import json
import math
import shlex
from collections.abc import Generator
from pathlib import Path

from finetune import experiment, layers, lr_range, params, stage, training
from finetune.errors import UserError
from finetune.files import replaced

import torch
from tqdm import tqdm

OUTPUT = Path("results/find_lr")


def main() -> None:
    parser = params.parser(__doc__)
    parser.add_argument("--group", default="all", help="whose rate rises: all (default), head, backbone, or a block")
    parser.add_argument("--epoch", type=int, default=0, help="train so many epochs first, as the run would (default 0)")
    parser.add_argument("--steps", type=int, default=100, help="of the rising rate (default 100)")
    parser.add_argument("--low", type=float, default=1e-6, help="rate of the first step (default 1e-6)")
    parser.add_argument("--high", type=float, default=10.0, help="rate of the last step (default 10)")
    arguments = parser.parse_args()
    if not (0 < arguments.low < arguments.high < math.inf and arguments.steps >= 20):
        raise UserError("--low must be above 0 and below --high, and --steps 20 or more.")
    if not 0 <= arguments.epoch < params.load(changes=arguments.changes).num_epochs:
        raise UserError(f"--epoch is {arguments.epoch}: it must be 0 or more, and below num_epochs.")
    this = experiment.by_hand(arguments.changes)
    settings = this.settings
    chosen = lr_range.chosen_groups(this.groups, arguments.group, arguments.epoch)
    shares = {group.name: group.lr_scale / chosen[0].lr_scale for group in chosen}
    rates = lr_range.rising(arguments.low, arguments.high, arguments.steps)
    with training.errors_explained(settings):
        optimizer = train_first(this, arguments.epoch)
        this.begin_epoch(arguments.epoch)
        with (
            contextlib.closing(batches_from(this, arguments.epoch)) as batches,
            tqdm(total=len(rates), desc="find_lr", disable=None) as bar,
        ):
            part, inputs_of = this.part(is_training=True)
            losses = lr_range.losses(part, optimizer, rates, shares, batches, inputs_of, this.objective, bar)
    found = lr_range.suggestion(rates[: len(losses)], losses)
    write(found, arguments.group, chosen[0].name)
    print(f"steepest descent at {found.steepest:.2g}, safer {found.safer:.2g}: {OUTPUT}.png, {OUTPUT}.json")
    others = arguments.group != "all" and any(group.thaws is not None and group not in chosen for group in this.groups)
    print(command(arguments.changes, suggested(settings, found.steepest, chosen[0], others)))


def batches_from(this: experiment.Experiment, epoch: int) -> Generator[training.Batch]:
    """Yield the batches of that epoch, and of all that follow."""
    for number in itertools.count(epoch):
        yield from this.training_batches(number)


def train_first(this: experiment.Experiment, epochs: int) -> torch.optim.Optimizer:
    """Train as the run does in its first epochs; return the optimizer, with the rates of the settings again."""
    optimizer, schedule = this.optimizer()
    for epoch in range(epochs):
        this.begin_epoch(epoch)
        sums = training.Sums(this.device, epoch, {})
        with tqdm(total=this.steps, desc=f"epoch {epoch + 1}/{epochs}, before", disable=None) as bar:
            this.train_epoch(optimizer, schedule, this.training_batches(epoch), sums, bar)
        schedule.after_epoch(this.validate(this.val_batches())[0])
    this.set_full_rates(optimizer)
    return optimizer


def write(found: lr_range.Suggestion, group: str, first: str) -> None:
    """Write the numbers and the plot; `first` is the block whose rate it is, the nearest to the head."""
    numbers = {
        "group": group,
        "steepest": found.steepest,
        "safer": found.safer,
        "lr": found.rates,
        "loss": found.losses,
        "smoothed": found.smoothed,
    }
    with replaced(OUTPUT.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(numbers, indent=2) + "\n")
    with replaced(OUTPUT.with_suffix(".png")) as temporary:
        lr_range.plot(found, "learning rate" if group == "all" else f"learning rate of {first}", temporary)


def suggested(settings: params.Params, rate: float, first: layers.Group, others: bool) -> dict[str, float]:
    """Return the settings that give the group `first` that rate; `others`, which were not chosen, keep theirs."""
    change = rate / (settings.lr * first.lr_scale)
    if first.name != "head":
        return {"optimizer.backbone_lr_scale": settings.optimizer.backbone_lr_scale * change}
    kept = {"optimizer.backbone_lr_scale": settings.optimizer.backbone_lr_scale / change} if others else {}
    return {"lr": rate} | kept


def command(changes: list[str], suggested: dict[str, float]) -> str:
    """Return the command of an experiment with these changes, as `-S` has them, and what was suggested."""
    kept = [change for change in changes if change.partition("=")[0] not in suggested]
    options = [*kept, *(f"{key}={value:.2g}" for key, value in suggested.items())]
    return shlex.join(["dvc", "exp", "run", *(word for option in options for word in ("-S", option))])


if __name__ == "__main__":
    stage.run(main)
