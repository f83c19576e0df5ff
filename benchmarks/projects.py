"""Copies of the project, in repositories of their own, in which benchmarks run experiments."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def copied(folder: Path) -> Path:
    """Return a repository in the folder, with the project's files as they are now in its one commit."""
    files = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for name in files.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for command in ("init -q -b main", "config user.name benchmark", "config user.email benchmark@example.org"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)
    return commit(folder)


def shared(folder: Path) -> Path:
    """Return such a repository, folder/project, with a git remote and a DVC remote beside it."""
    project = copied(folder / "project")
    for command in (
        ["git", "init", "-q", "--bare", str(folder / "git")],
        ["git", "remote", "add", "origin", str(folder / "git")],
        [sys.executable, "-m", "dvc", "remote", "add", "-q", "-d", "storage", str(folder / "storage")],
    ):
        subprocess.run(command, cwd=project, check=True)
    commit(project)
    subprocess.run(["git", "push", "-q", "-u", "origin", "main"], cwd=project, check=True)
    return project


def commit(folder: Path) -> Path:
    """Commit what there is; return the folder."""
    for command in ("add -A", "commit -qm project"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)
    return folder
