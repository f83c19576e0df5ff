"""Stage `train`: fine-tune the backbone on the prepared pictures; one experiment, from settings to model.

    dvc exp run -S lr=0.025 -S momentum=0.5 -S num_epochs=2
    dvc exp run -S backbone.trainable=all        # full fine-tuning

Each epoch is logged to results/train/ (DVCLive) and saved to models/checkpoint.pt; the last one's weights become
models/model.safetensors.
"""

import functools
import time
from pathlib import Path

from finetune import augment, backbones, checkpoint, device, metrics, params, training
from finetune.datasets import check_num_classes, listing
from finetune.errors import run_stage
from finetune.images import ImageStore

import torch
from dvclive import Live
from tqdm import tqdm


def main() -> None:
    start = time.perf_counter()
    settings = params.load()
    store = ImageStore("data/prepared")
    check_num_classes(settings.num_classes, store.classes, store.manifest["source"])
    device.make_deterministic()
    device.keep_freed_memory()
    place = device.choose(settings.device)

    torch.manual_seed(settings.seed)  # of the layers without pretrained weights
    model = backbones.build(settings.model_name, settings.num_classes, settings.data.image_size)
    pretrained, about = backbones.read(Path("models/backbone.safetensors"))
    backbones.load_tensors(model, pretrained)
    choose_trainable(model, about["missing"], settings.backbone.trainable)
    model.to(place)

    normalize = functools.partial(augment.normalize, mean=about["mean"], std=about["std"])
    size = settings.data.image_size
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=settings.lr, momentum=settings.momentum, fused=True)

    history: list[dict] = []
    with Live("results/train", dvcyaml=None, save_dvc_exp=False) as live:
        for epoch in range(settings.num_epochs):
            torch.manual_seed(augment.dropout_seed(settings.seed, epoch))
            backbones.train_mode(model)
            batches = training.training_batches(
                store, settings.seed, epoch, settings.batch_size, size, settings.augment.min_scale
            )
            steps = len(training.slices(len(store.indices("train")), settings.batch_size))
            with tqdm(total=steps, desc=f"epoch {epoch + 1}/{settings.num_epochs}", disable=None) as bar:
                try:
                    loss, acc = training.train_epoch(model, optimizer, batches, normalize, bar)
                except FloatingPointError as error:
                    raise training.diverged(epoch, error.args[0], settings.lr, settings.momentum) from None
                except (torch.OutOfMemoryError, ValueError) as error:  # the latter from batch norm
                    raise training.batch_does_not_fit(error, settings.batch_size, size) from None

            logits = training.predict(model, training.plain_batches(store, "val", size), normalize)
            labels = store.labels[store.indices("val")]
            val_loss = float(metrics.cross_entropy(logits, labels).mean())
            if not val_loss < float("inf"):
                raise training.diverged(epoch, None, settings.lr, settings.momentum)

            row = {
                "step": epoch,
                "acc": acc,
                "loss": loss,
                "training_time": time.perf_counter() - start,  # seconds since the run began
                "val_acc": metrics.accuracy(logits, labels),
                "val_loss": val_loss,
                "lr": optimizer.param_groups[0]["lr"],
            }
            history.append(row)
            checkpoint.save(Path("models/checkpoint.pt"), model, optimizer, history)
            log(live, row, settings.num_epochs)

    about_model = {
        "model_name": about["model_name"],
        "classes": store.classes,
        "image_size": size,
        "resize": store.manifest["resize"],
        "mean": about["mean"],
        "std": about["std"],
    }
    backbones.write(Path("models/model.safetensors"), model.state_dict(), about_model)


def choose_trainable(model: torch.nn.Module, missing: list[str], trainable: str) -> None:
    """Freeze what does not train, and say what does."""
    head = backbones.head_name(model)
    chosen = backbones.trainable_layers(backbones.layers(model), head, missing, trainable)
    backbones.freeze(model, chosen)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    what = "all layers" if count == total else listing(chosen)
    print(f"training {count:,} of {total:,} parameters: {what}")


def log(live: Live, row: dict, num_epochs: int) -> None:
    """Log an epoch to DVCLive, and on the screen."""
    for name, value in row.items():
        if name != "step":
            live.log_metric(name, value)
    # A curve alone: as a metric, it would have `dvc exp show` rename the column of the parameter.
    del live.summary["lr"]
    live.next_step()
    tqdm.write(
        f"epoch {row['step'] + 1}/{num_epochs}: loss {row['loss']:.4f}  acc {row['acc']:.4f}  "
        f"val_loss {row['val_loss']:.4f}  val_acc {row['val_acc']:.4f}  {row['training_time']:.1f} s"
    )


if __name__ == "__main__":
    run_stage(main)
