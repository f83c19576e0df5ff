"""What an actor of Ray's does on its node: experiments, one at a time, in a clone of the revision, pushed when done.

Ray brings this file's contents to the nodes, which need not have the project. So all else that is the project's is
imported from the revision, when that is there.
"""

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.clones import Running

PACKAGES = ("torch", "torchvision", "numpy", "dvc")
WAIT = 1.0  # seconds that `look` waits for the end
PREPARING = ("backbone", "prepare")  # the stages whose results other nodes need, too
STAGES_FILES = (".dvc/config", ".dvc/config.local", "dvc.yaml", "dvc.lock", "params.yaml")  # what says what those are


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on, of this process's Python."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def differences(wanted: dict[str, str]) -> str:
    """Return how this node's versions differ from those wanted, 'has torch 2.12, not 2.15'; '' where they do not."""
    found = versions()
    return ", ".join(f"has {key} {found[key]}, not {value}" for key, value in wanted.items() if found[key] != value)


class Agent:
    """A clone on a node, and the experiment that it runs. Its methods take a second or so, but for `set_up`."""

    def __init__(self):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray blocks it, and what starts here inherits that
        self.running: Running | None = None
        self.prepared: list[str] = []

    def place(self) -> tuple[str, str]:
        """Return the node's id, and its name for people."""
        import ray

        return ray.get_runtime_context().get_node_id(), socket.gethostname()

    def set_up(
        self, url: str, commit: str, wanted: dict[str, str], variables: dict[str, str], identity: dict[str, str]
    ) -> str:
        """Clone the revision and see to all that experiments need; return what is wrong with the node, or ''.

        The clone, DVC's cache and the checkpoints lie in the node's temporary folder, and serve later sweeps, too.
        """
        if different := differences(wanted):
            return different
        for key, value in variables.items():
            if not Path(value).is_dir():
                return f"has no folder {value} ({key})"
        from filelock import FileLock, Timeout

        folder = Path(tempfile.gettempdir(), f"finetune-{os.getuid()}", sha256(url.encode()).hexdigest()[:8])
        folder.mkdir(parents=True, exist_ok=True)
        base = folder / commit
        with FileLock(folder / "lock"):
            if problem := _cloned(url, commit, base):
                return problem
            for name, who in identity.items():
                subprocess.run(["git", "config", name, who], cwd=base, check=True)
        os.environ.update(variables | {"FINETUNE_SCRATCH": str(folder / "scratch")})
        (folder / "scratch").mkdir(exist_ok=True)
        sys.path.insert(0, str(base / "src"))
        from finetune import sharing
        from finetune.clones import Clone, Repository

        if refusal := sharing.storage_problem(base):
            return refusal
        for number in count():  # the first that no other actor of this node has; the system frees a killed one's
            self._lock = FileLock(folder / f"slot-{number}.lock")
            try:
                self._lock.acquire(timeout=0)
                break
            except Timeout:
                continue
        self.clone = Clone(Repository(base), folder / f"slot-{number}", options=["--pull"])
        return ""

    def start(self, name: str, overrides: list[str]) -> None:
        """Begin an experiment. Where that fails, `look` says so."""
        self.running = None
        self.prepared = []
        self.running = self.clone.run(name, overrides, self.clone.folder.with_suffix(".log"))

    def look(self) -> tuple[list[str], int | None]:
        """Return the lines printed since the last time, and the status, None as long as it runs.

        What the stages before the training made is in the DVC remote before their lines are returned, and a finished
        experiment before its status is.
        """
        from finetune import sharing
        from finetune.errors import UserError

        if not self.running:
            return ["error: the node could not begin it"], 1
        end = time.monotonic() + WAIT
        while (status := self.running.status) is None and time.monotonic() < end:
            time.sleep(0.05)
        lines = list(self.running.lines())
        try:
            for line in lines:
                self.prepared += [stage for stage in PREPARING if line.startswith(f"Running stage '{stage}'")]
                if line.startswith("Running stage 'train'") and self.prepared:
                    self._push_prepared()
            if status == 0:
                sharing.push(self.clone.folder, self.clone.repository, self.running.name)
        except UserError as error:
            self.running.stop()
            return [*lines, f"error: {error}"], 1
        return lines, status

    def ask_to_stop(self) -> None:
        """Have the experiment save what it has and end."""
        if self.running:
            self.running.ask_to_stop()

    def stop(self) -> None:
        """Have the experiment save what it has, and wait until it has ended."""
        if self.running:
            self.running.stop()

    def _push_prepared(self) -> None:
        """Have the DVC remote have what the stages before the training made. Raises UserError.

        From a folder beside the clone: in there the experiment needs DVC's lock as soon as it has trained, and waits
        for it for no more than 3 seconds.
        """
        from finetune.clones import dvc, git
        from finetune.errors import UserError

        beside = self.clone.folder.with_suffix(".push")
        for is_last in (False, True):  # dvc.lock may be half-written, by the end of the training
            shutil.rmtree(beside, ignore_errors=True)
            for path in STAGES_FILES:
                (beside / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.clone.folder / path, beside / path)
            git(beside, "init", "-q")
            try:
                dvc(beside, "push", "--run-cache", *self.prepared)
                return
            except UserError:
                if is_last:
                    raise


def _cloned(url: str, commit: str, base: Path) -> str:
    """Clone the revision into `base` unless it is there; return what went wrong, or ''."""
    temporary = Path(f"{base}.new")
    commands: list[list[str | Path]] = [
        ["rm", "-rf", temporary],
        ["git", "clone", "-q", "--no-checkout", url, temporary],
        ["git", "-C", temporary, "checkout", "-q", "--detach", commit],
        [sys.executable, "-m", "dvc", "cache", "dir", "--local", base.parent / "cache"],
    ]
    for command in [] if base.exists() else commands:
        folder = temporary if temporary.exists() else None
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if result.returncode:
            return " ".join(["can't clone:", *result.stderr.strip().splitlines()[-1:]])
    if not base.exists():
        temporary.rename(base)
    return ""
