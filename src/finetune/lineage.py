"""The run that another trains on top of: `resume: last`, or the name of an experiment or revision."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from finetune import checkpoint
from finetune.datasets import listing
from finetune.errors import UserError, nearest

from ruamel.yaml import YAML

CHECKPOINT = Path("models/checkpoint.pt")


def find(resume: str, base: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return the parent's name and its checkpoint, or None where `resume` names none.

    `last` is the checkpoint in dvc.lock, the one of the last run that DVC has recorded in the workspace, or had when
    the experiment was queued. Raises UserError where there is none, or where it differs in `base`: model_name, classes
    or the digest of the pretrained weights.
    """
    if resume in ("auto", "never"):
        return None
    if resume == "last":
        if not _has_checkpoint(Path("dvc.lock")):
            raise UserError("resume = last, but dvc.lock has no checkpoint yet: run once with resume=auto.")
        state = _get(".", [], resume)
        name = state["experiment"] or state["run"]
    else:
        root = os.environ.get("DVC_ROOT", ".")
        _check_revision(root, resume)
        state, name = _get(root, ["--rev", resume], resume), resume
    if any(state[key] != base[key] for key in base):
        theirs, ours = _described(state), _described(base)
        raise UserError(
            f"resume = {resume}: that checkpoint is of {theirs}, and these settings are of {ours}.\n"
            "Set model_name, data and backbone.weights as they were, or resume=auto to begin anew."
        )
    return name, state


def _described(base: dict[str, Any]) -> str:
    return f"{base['model_name']} ({listing(base['classes'])}; weights {base['weights'][:8]})"


def _get(repository: str, revision: list[str], resume: str) -> dict[str, Any]:
    """Return the checkpoint that DVC's cache or remote has of a repository's revision."""
    Path(".dvc/tmp").mkdir(parents=True, exist_ok=True)
    # In a folder that is new: `dvc get` links its file to the cache, and would write through a link that it finds.
    with tempfile.TemporaryDirectory(dir=".dvc/tmp") as folder:
        target = Path(folder) / CHECKPOINT.name
        command = [sys.executable, "-m", "dvc", "get", repository, str(CHECKPOINT), "-o", str(target), *revision]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")] or ["no reason given"]
            ways = "`dvc pull models/checkpoint.pt`" if resume == "last" else (
                f"`dvc exp pull <git remote> {resume}`, or for a branch `dvc fetch --all-branches`"
            )  # fmt: skip
            raise UserError(
                f"resume = {resume}: can't get its checkpoint ({errors[-1].removeprefix('ERROR: ')}).\n"
                f"Where it is not in DVC's cache: {ways}."
            )
        try:
            return checkpoint.load(target)
        except checkpoint.Damaged as error:
            raise UserError(
                f"resume = {resume}: {CHECKPOINT} of it {error}.\n"
                "Get it again from a DVC remote, name another one, or set resume=auto."
            ) from None


def _check_revision(root: str, name: str) -> None:
    """Raise UserError where the repository has neither an experiment nor a revision of that name."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True)

    refs = git("for-each-ref", "--format=%(refname)", "refs/exps", "refs/heads", "refs/tags").stdout.split()
    names = {ref.rpartition("/")[2] for ref in refs} - {"stash", "failed", "EXEC_HEAD", "EXEC_BASELINE"}
    if name not in names and git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").returncode:
        raise UserError(
            f"params.yaml: resume = {name!r} is neither auto, never, last, nor an experiment or revision."
            f"{nearest(name, [*names, 'auto', 'never', 'last'])}"
        )


def _has_checkpoint(lock: Path) -> bool:
    contents = YAML(typ="safe").load(lock) if lock.exists() else None
    stages = (contents or {}).get("stages", {}).values()
    return any(out["path"] == CHECKPOINT.as_posix() for stage in stages for out in stage.get("outs", []))
