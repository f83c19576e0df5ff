"""A team at work on drawn pictures: clones, a git remote and a DVC remote in a temporary folder: `make team-demo`.

Ana trains and pushes. Ben gets her experiment, trains it anew to the same bits, and goes on from it. Both push at once.
Cleo has no access to the files, and is told so. Prints each command before what it prints; ends with status 1 where
something is not as promised. Needs no network; plays with what HEAD has.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).parent.parent
SETTINGS = """-S data.source=data/sample.yaml -S data.resize=72 -S data.image_size=64 \\
    -S model_name=squeezenet -S backbone.weights=none -S backbone.trainable=all \\
    -S num_epochs=6 -S batch_size=16 -S lr=0.002 -S momentum=0.9"""
HIDDEN = "src|data|models|weights|backbone|Created|State|Executor|eval|training|augment|batch|momentum|num_|^loss|^acc"
SHOW = f"dvc exp show --no-pager --only-changed --drop '{HIDDEN}'"
BITS = ["models/model.safetensors", "results/evaluate/predictions.csv", "results/train/plots/metrics/val_loss.tsv"]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="team-") as folder:
        play(Path(folder))


def play(folder: Path) -> None:
    """Play the day through in an empty folder."""
    ana, ben, cleo = (folder / name for name in ("ana", "ben", "cleo"))

    say("The set-up, once: a git repository, and a folder for the files that are too large for git")
    sh(PROJECT, f"git init -q --bare -b main {folder}/team.git")
    sh(PROJECT, f"git push -q {folder}/team.git HEAD:refs/heads/main")
    sh(folder, "git clone -q team.git ana")
    sh(ana, f"dvc remote add -d storage {folder}/storage")
    sh(ana, "git commit -q -m 'Add the DVC remote' .dvc/config")
    sh(ana, "git push -q origin main")

    say("Ana runs an experiment, and pushes it: its settings and numbers to git, its files to the storage")
    sh(ana, f"dvc exp run --name first {SETTINGS}")
    sh(ana, "dvc exp push origin first")

    say("Ben gets it")
    sh(folder, "git clone -q team.git ben")
    sh(ben, "dvc exp list origin")
    sh(ben, "dvc exp pull origin first")
    sh(ben, SHOW)
    sh(ben, "dvc exp apply first")
    sh(ben, "dvc repro")
    promise(metrics(ben) == metrics(ana) and equal(ana, ben), "Ben's workspace has Ana's numbers, files and model")

    say("Ben does not take her word for it, and trains the same anew, from nothing but code and settings")
    checkpoints = ben / ".dvc/tmp/checkpoints"
    promise(not any(checkpoints.glob("*/*.pt")), "Ben has no checkpoint that the training could go on from")
    sh(ben, "dvc repro --force")
    promise(any(checkpoints.glob("*/*.pt")), "Ben has trained")
    promise(equal(ana, ben), f"to the bit as Ana's: {', '.join(BITS)}")
    ours, hers = ({**metrics(each), "training_time": None} for each in (ben, ana))
    promise(ours == hers, "and so are all metrics but the time it took")

    say("Ben goes on from her model, more slowly; Ana tries another learning rate")
    sh(ben, "dvc exp run --name on-top -S resume=first -S lr=0.0005 -S num_epochs=3")
    promise(metrics(ben).get("continues") == "first", "Ben's experiment says that it continues Ana's")
    sh(ana, "dvc exp run --name faster -S lr=0.004")

    say("Both push at once, and get each other's")
    together({ben: "dvc exp push origin on-top", ana: "dvc exp push origin faster"})
    sh(ana, "dvc exp pull origin on-top")
    sh(ben, "dvc exp pull origin faster")
    sh(ana, SHOW)
    sh(ana, "dvc exp apply on-top")
    promise(metrics(ana) == metrics(ben) and equal(ana, ben), "Ana has Ben's numbers, files and model")

    say("Ana publishes Ben's model: a branch, which would be a pull request, and a version of it")
    sh(ana, "dvc exp branch on-top better")
    sh(ana, "gto register image-classifier better --version v1.0.0")
    sh(ana, "git push -q origin better image-classifier@v1.0.0")
    sh(folder, "dvc artifacts get team.git image-classifier --rev v1.0.0 -o served.safetensors")
    served = (folder / "served.safetensors").read_bytes()
    promise(served == (ben / "models/model.safetensors").read_bytes(), "what is served is Ben's model")

    say("Cleo may read the git repository, but not the storage: numbers, yes, files, no")
    sh(folder, "git clone -q team.git cleo")
    sh(cleo, f"dvc remote modify --local storage url {folder}/no-access")
    sh(cleo, "dvc exp pull origin first")
    sh(cleo, "dvc exp apply first", fails=True)
    promise(not (cleo / "models/model.safetensors").exists(), "Cleo has no model, and an error that says so")
    print("\nAll as promised. docs/teams.md says how to set this up for your team.")


def say(what: str) -> None:
    print(f"\n# {what}", flush=True)


def promise(kept: bool, what: str) -> None:
    """Print what is true, or end the process where it is not."""
    if not kept:
        sys.exit(f"error: not as promised: {what}")
    print(f"✓ {what}", flush=True)


def sh(folder: Path, command: str, fails: bool = False) -> None:
    """Run a command line in a folder after printing it; end the process unless it fails or not as expected."""
    print(f"\n{folder.name}$ {command}", flush=True)
    check(subprocess.run(command, shell=True, cwd=folder, env=variables(folder)).returncode, fails)


def together(commands: dict[Path, str]) -> None:
    """Run a command line in each folder, all at once; print them, and what they print one after the other."""
    started = []
    for folder, command in commands.items():
        print(f"\n{folder.name}$ {command} &", end="", flush=True)
        pipe, where = subprocess.PIPE, variables(folder)
        started.append(
            subprocess.Popen(
                command, shell=True, cwd=folder, env=where, stdout=pipe, stderr=subprocess.STDOUT, text=True
            )
        )
    print()
    for process in started:
        print(process.communicate()[0], end="", flush=True)
        check(process.returncode)


def check(status: int, fails: bool = False) -> None:
    if bool(status) != fails:
        sys.exit(f"error: the last command ended with status {status}")


def variables(folder: Path) -> dict[str, str]:
    """Return the environment of the one whose clone the folder is: a git identity, and a store of checkpoints in it."""
    identity = {f"GIT_{role}_NAME": folder.name.capitalize() for role in ("AUTHOR", "COMMITTER")}
    identity |= {f"GIT_{role}_EMAIL": f"{folder.name}@example.org" for role in ("AUTHOR", "COMMITTER")}
    return {name: value for name, value in os.environ.items() if name != "CHECKPOINTS_DIR"} | identity


def metrics(folder: Path) -> dict:
    """Return all metrics that a workspace has."""
    read = [json.loads((folder / f"results/{stage}/metrics.json").read_text()) for stage in ("train", "evaluate")]
    return read[0] | read[1]


def equal(one: Path, other: Path) -> bool:
    """Tell whether model, predictions and curve of two workspaces are equal to the bit."""
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in BITS)


if __name__ == "__main__":
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "120")  # else DVC cuts its table to 80
    main()
