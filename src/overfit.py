"""Overfit one batch: a check of data, network and optimizer, which together should be able to learn it by heart.

    python src/overfit.py
    python src/overfit.py -S model_name=squeezenet -S backbone.trainable=all -S lr=0.01

Where they can't, it is a bug or a setting, not the pictures: a wrong label or normalisation, a dead head, a rate far
off, too much regularisation. Changes nothing in the workspace. Needs data/prepared (`dvc repro prepare`).
https://karpathy.github.io/2019/04/25/recipe/
"""

from finetune import experiment, inference, metrics, params, stage, training
from finetune.errors import UserError

STEPS = 100


def main() -> None:
    this = experiment.by_hand(params.parser(__doc__).parse_args().changes)
    settings = this.settings
    optimizer, _ = this.optimizer()
    this.set_full_rates(optimizer)
    batch = next(training.training_batches(this.store, settings, epoch=0))
    count, acc = len(batch.labels), 0.0
    with training.errors_explained(settings):
        for step in range(STEPS + 1):
            if step % 10 == 0:
                logits = inference.predict(this.model, [batch], this.normalize)
                acc = metrics.accuracy(logits, batch.labels)
                print(f"step {step:3}: loss {metrics.cross_entropy(logits, batch.labels).mean():.4f}  acc {acc:.4f}")
                this.begin_epoch(settings.num_epochs)  # all that ever trains
            training.step(this.model, optimizer, batch, this.normalize, this.objective)
    if acc < 1:
        raise UserError(
            f"{STEPS} steps on one batch of {count} pictures, and acc is {acc:.2f}: it is not learnt by heart.\n"
            f"Try another lr (now {settings.lr:g}), look at `python src/preview.py`, and lower what regularises: "
            "dropout, weight_decay, mixup."
        )
    print(f"one batch of {count} pictures is learnt by heart: data, network and optimizer work together")


if __name__ == "__main__":
    stage.run(main)
