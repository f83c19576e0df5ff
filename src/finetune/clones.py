"""Experiments by `dvc exp run`, several side by side, in clones of the repository that hand them back to it.

A clone has the workspace's uncommitted changes, DVC's cache, and the checkpoints and features of the repository. So the
workspace is left alone, which `dvc exp run --temp` and `--queue` change for a moment, and an experiment that is stopped
goes on wherever the same settings are run again.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from configparser import ConfigParser
from pathlib import Path

from finetune import runs
from finetune.errors import UserError
from finetune.files import resolve_user_path
from finetune.slots import Job, Slot
from finetune.starters import end_with_parent

PATHS = ("DATA_ARCHIVE", "WEIGHTS_DIR")  # variables that may name files by where the user typed the command
PATIENCE = 60  # seconds that a stopped experiment has to save what it has


def git(folder: Path, *arguments: str, stdin: str | None = None) -> str:
    """Return what git prints in a folder. Raises UserError where it fails."""
    result = subprocess.run(["git", *arguments], cwd=folder, input=stdin, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"`git {shlex.join(arguments)}` failed: {result.stderr.strip()}")
    return result.stdout


def dvc(folder: Path, *arguments: str) -> str:
    """Return what dvc prints in a folder. Raises UserError where it fails."""
    result = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"`dvc {shlex.join(arguments)}` failed: {result.stderr.strip().removeprefix('ERROR: ')}")
    return result.stdout


def identity(folder: Path) -> dict[str, str]:
    """Return who commits in a repository, as far as git's configuration says so."""
    keys = ("user.name", "user.email")
    said = [subprocess.run(["git", "config", key], cwd=folder, capture_output=True, text=True).stdout for key in keys]
    return {key: value.strip() for key, value in zip(keys, said, strict=True) if value}


class Repository:
    """The repository whose top folder this is, as it is now: its commit and its uncommitted changes."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self.commit = git(self.root, "rev-parse", "HEAD").strip()
        self.changes = git(self.root, "diff", "--binary", "HEAD")
        self.cache = Path(self.root, dvc(self.root, "cache", "dir").strip())

    def find(self, name: str) -> str | None:
        """Return the revision of the experiment of that name on top of the commit, or None."""
        reference = self.reference(name)
        return git(self.root, "for-each-ref", "--format=%(objectname)", reference).strip() or None

    def read(self, revision: str, path: str) -> str | None:
        """Return a file's text in a revision; None where it has no such file."""
        try:
            return git(self.root, "show", f"{revision}:{path}")
        except UserError:
            return None

    def reference(self, name: str) -> str:
        """Return where DVC keeps the experiment of that name on top of the commit."""
        return f"refs/exps/{self.commit[:2]}/{self.commit[2:]}/{name}"


class Clone(Slot):
    """A clone of the repository in a folder of its own, which is made anew.

    Its experiments run with `options` of `dvc exp run`.
    """

    place = "this machine"
    is_ready = True

    def __init__(self, repository: Repository, folder: Path, options: Sequence[str] = ()):
        self.repository, self.folder, self.options = repository, folder, options
        if folder.exists():  # of a sweep that was killed: what ran in there may not have ended yet
            folder.rename(folder.with_name(f"{folder.name}-left-{time.time_ns()}"))
        folder.parent.mkdir(parents=True, exist_ok=True)
        git(folder.parent, "clone", "-q", "--shared", "--no-checkout", str(repository.root), folder.name)
        git(folder, "checkout", "-q", "--detach", repository.commit)
        for key, value in identity(repository.root).items():
            git(folder, "config", key, value)
        config = ConfigParser(interpolation=None)
        config.read(repository.root / ".dvc/config.local")
        if not config.has_section("cache"):
            config.add_section("cache")
        config.set("cache", "dir", str(repository.cache))
        with open(folder / ".dvc/config.local", "w", encoding="utf-8") as file:
            config.write(file)
        self._restore()
        dvc(folder, "checkout", "--quiet", "--allow-missing")  # what others than our stages need, as a dataset

    def run(self, name: str, overrides: Sequence[str], log: Path) -> "Running":
        """Begin an experiment of that name with `-S overrides`."""
        self._restore()
        return Running(self, name, overrides, log)

    def hand_back(self, name: str) -> None:
        """Have the repository have the experiment."""
        reference = self.repository.reference(name)
        git(self.folder, "push", "-q", str(self.repository.root), f"{reference}:{reference}")

    def close(self) -> None:
        """Remove the folder, and those before it that were left."""
        for folder in (self.folder, *self.folder.parent.glob(f"{self.folder.name}-left-*")):
            shutil.rmtree(folder, ignore_errors=True)

    def _restore(self) -> None:
        """Have the tracked files as they are in the repository."""
        git(self.folder, "reset", "-q", "--hard")
        if self.repository.changes:
            git(self.folder, "apply", "--whitespace=nowarn", "-", stdin=self.repository.changes)


class Running(Job):
    """An experiment that a clone runs."""

    def __init__(self, clone: Clone, name: str, overrides: Sequence[str], log: Path):
        self.slot, self.name, self.log = clone, name, log
        root = clone.repository.root
        runs.store_folder().mkdir(parents=True, exist_ok=True)
        paths = {key: resolve_user_path(os.environ[key], key) for key in PATHS if os.environ.get(key)}
        paths |= {"CHECKPOINTS_DIR": runs.store_folder(), "FINETUNE_SCRATCH": runs.scratch()}
        environ = os.environ | {key: str(root / path) for key, path in paths.items()}
        environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        options = [part for each in overrides for part in ("-S", each)]
        command = [sys.executable, "-m", "dvc", "exp", "run", *clone.options, "--name", name, *options]
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                command,
                cwd=clone.folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is this process's, which then stops them
                preexec_fn=end_with_parent,  # then the stage that it runs stops by itself
            )
        self._read = 0
        self._is_asked = False

    def lines(self) -> Iterator[str]:
        """Yield the whole lines that were printed since the last time."""
        with open(self.log, "rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                yield line.decode(errors="replace").rstrip()

    @property
    def status(self) -> int | None:
        """The exit status; None as long as it runs."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """Have it save what it has and end, as Ctrl-C does: once, as a second Ctrl-C ends it at once."""
        if not self._is_asked:
            self._is_asked = True
            self._signal(signal.SIGINT)

    def stop(self) -> None:
        """Have it save what it has, and wait until it has ended."""
        self.ask_to_stop()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)
