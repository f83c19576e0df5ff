"""What the store of checkpoints holds, and taking runs out of it.

    python src/checkpoints.py                     # a line a run, the one saved last at the end
    python src/checkpoints.py remove 3f2a91c0     # a run, by the first digits of its name
    python src/checkpoints.py remove --all        # all that no process is training

Nothing that an experiment has is lost by it: models/checkpoint.pt and the model are in DVC's cache. But a run that is
removed here is trained from zero when it is asked for again.
"""

import argparse
from collections.abc import Collection

from finetune import runs, stage
from finetune.errors import UserError, nearest
from finetune.tables import aligned


def main() -> None:
    parser = argparse.ArgumentParser(description="List the runs in the store of checkpoints, or remove some.")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="a line a run (the default)")
    remove = commands.add_parser("remove", help="take runs out of the store")
    what = remove.add_mutually_exclusive_group(required=True)
    what.add_argument("runs", nargs="*", default=[], metavar="RUN", help="the first digits of a run's name")
    what.add_argument("--all", action="store_true", help="all runs that are not in use")
    arguments = parser.parse_args()

    store = runs.store_folder()
    stored = runs.stored_runs(store)
    if arguments.command == "remove":
        chosen = stored if arguments.all else dict.fromkeys(_named(each, stored) for each in arguments.runs)
        _remove(chosen)
    else:
        _print_table(stored)
        print(f"{len(stored)} runs, {sum(run.bytes for run in stored) / 1e9:.2f} GB in {store}")


def _named(start: str, stored: list[runs.Run]) -> runs.Run:
    found = [run for run in stored if run.name.startswith(start)]
    if len(found) != 1:
        many = f"{len(found)} runs begin with {start}" if found else f"no run begins with {start}"
        raise UserError(f"{many}.{nearest(start, [run.name for run in stored]) if not found else ' Give more digits.'}")
    return found[0]


def _remove(chosen: Collection[runs.Run]) -> None:
    kept = [run.name for run in chosen if not run.remove()]
    print(f"removed {len(chosen) - len(kept)} runs")
    if kept:
        raise UserError(f"in use, and kept: {', '.join(kept)}")


def _print_table(stored: list[runs.Run]) -> None:
    rows = [("RUN", "MODEL", "EPOCHS", "STATE", "SIZE", "AGE", "EXPERIMENT", "ON TOP OF")]
    for run in stored:
        checkpoints = run.checkpoints()
        last = checkpoints[-1] if checkpoints else None
        state = "in use" if run.in_use() else "finished" if run.is_finished else "unfinished"
        epochs = f"{last.epochs}" + f" + {last.steps} steps" * bool(last.steps) if last else "0"
        about = run.about
        model, experiment, parent = (about.get(key) or "-" for key in ("model_name", "experiment", "parent"))
        size, age = f"{run.bytes / 1e6:,.1f} MB", _in_words(runs.age(run.saved))
        rows.append((run.name, model, epochs, state, size, age, experiment, parent))
    print(*aligned(rows), sep="\n")


def _in_words(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    stage.run(main)
