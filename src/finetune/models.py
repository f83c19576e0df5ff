"""Which model a script takes that people run by hand: the workspace's, an experiment's, or that of a file."""

import argparse
from pathlib import Path

from finetune.classifier import MODEL
from finetune.experiments import Experiments


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that say which model; `description` is the script's docstring."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = result.add_mutually_exclusive_group()
    which.add_argument(
        "--experiment", metavar="NAME", help="an experiment's model, or that of a branch, tag or commit of git"
    )
    which.add_argument(
        "--model", metavar="FILE", type=Path, default=MODEL, help="a file that the stage train wrote (%(default)s)"
    )
    return result


def path(arguments: argparse.Namespace) -> Path:
    """Return the file that the options of `parser` ask for. Raises UserError where no such experiment's is here."""
    if not arguments.experiment:
        return arguments.model
    experiments = Experiments.here()
    return experiments.file(experiments.find(arguments.experiment), MODEL.as_posix())
