"""Experiments as git and DVC's cache have them, read without DVC: hundreds of them in a second.

What `dvc exp run` made is a commit under refs/exps/, with params.yaml, dvc.lock and the metrics in it. Its other files
are in DVC's cache, under the digest that dvc.lock says.
"""

import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from finetune.clones import git
from finetune.errors import UserError, nearest

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.resolver import VersionedResolver
from tqdm import tqdm

WORKSPACE = "workspace"
PARAMS, LOCK = "params.yaml", "dvc.lock"
METRICS = ("results/train/metrics.json", "results/evaluate/metrics.json")
PREDICTIONS = "results/evaluate/predictions.csv"


@dataclass(frozen=True)
class Experiment:
    """An experiment, a commit, or the workspace, with what it was made from and what came of it."""

    name: str
    revision: str  # of git, in full; "" of the workspace
    baseline: str  # the commit on which it was run; "" of the workspace
    created: str  # ISO 8601, with the zone; "" of the workspace
    settings: dict[str, Any]  # {"data.fold": 0}
    metrics: dict[str, Any]  # {"val_acc": 0.9, "eval.acc": 0.9, "continues": "…"}; {} where it has none
    stages: dict[str, dict[str, dict[str, str]]]  # {"train": {"deps": {path: digest}, "outs": {path: digest}}}
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of what its stages wrote, {path: size}

    @property
    def inputs(self) -> dict[str, str]:
        """The digests of all that its stages read and none of them wrote: code, pictures, weights."""
        outs = self.outs
        deps = {path: digest for stage in self.stages.values() for path, digest in stage["deps"].items()}
        return {path: digest for path, digest in deps.items() if path not in outs}

    @property
    def outs(self) -> dict[str, str]:
        """The digests of all that its stages wrote."""
        return {path: digest for stage in self.stages.values() for path, digest in stage["outs"].items()}


# In dvc.lock as DVC writes it: what stages read and wrote, of which experiments share most, and settings once more.
ENTRY = re.compile(r"^    - path: .*\n(?: {6}.*\n)+", re.MULTILINE)
SETTINGS = re.compile(r"^    params:\n(?: {6}.*\n)+", re.MULTILINE)


class _Resolver(VersionedResolver):
    """Without asking anew for each value which YAML this is: a third less time."""

    processing_version = (1, 2)


class Reference(NamedTuple):
    """What git has of an experiment or a commit."""

    name: str
    baseline: str
    revision: str
    created: str


class Experiments:
    """The experiments of the repository whose top folder this is."""

    def __init__(self, root: Path):
        self.root = root
        if not (root / ".dvc").is_dir():
            raise UserError(f"{root.resolve()} is no project of DVC's. Go to the project's folder.")
        self._parser = YAML(typ="safe")
        self._parser.Resolver = _Resolver
        self._entries: dict[str, dict[str, Any]] = {}  # of locks, parsed, by their text

    @classmethod
    def here(cls) -> "Experiments":
        """Return those of the repository in which the user stands, in whichever of its folders.

        Raises UserError where there is none.
        """
        return cls(Path(git(Path(), "rev-parse", "--show-toplevel").strip()))

    def all(self) -> list[Experiment]:
        """Return the finished experiments of all commits, the oldest first."""
        return self._read(self._known())

    def find(self, name: str) -> Experiment:
        """Return the experiment, branch, tag or commit of that name, or `workspace`; of experiments with the same name
        that of HEAD, else the newest. Raises UserError where there is none."""
        if name == WORKSPACE:
            return self._workspace()
        known = self._known()
        if found := [each for each in known if each.name == name]:
            head = git(self.root, "rev-parse", "HEAD").strip()
            return self._read([*found, *(each for each in found if each.baseline == head)][-1:])[0]
        try:
            revision, created = git(self.root, "log", "-1", "--format=%H %cI", f"{name}^{{commit}}", "--").split()
        except (UserError, ValueError):  # the latter: nothing is said of a range without commits
            names = [each.name for each in known]
            hint = "" if names else " There is no experiment yet: `dvc exp run` makes one."
            raise UserError(
                f"{name!r} is neither an experiment nor a revision of this repository.{nearest(name, names) or hint}"
            ) from None
        return self._read([Reference(name, "", revision, created)])[0]

    def file(self, experiment: Experiment, path: str) -> Path:
        """Return where a file is that a stage of the experiment wrote, or one in a folder that it wrote.

        Raises UserError where DVC's cache does not have it, or the experiment never wrote it.
        """
        if not experiment.revision:
            if not (self.root / path).exists():
                raise UserError(f"the workspace has no {path}: `dvc repro` makes it.")
            return self.root / path
        digest = self._digest(experiment, path)
        place = self._in_cache(digest)
        if not place.exists():
            raise self._missing(experiment, path)
        return place

    def files(self, experiment: Experiment, folder: str) -> dict[str, Path]:
        """Return where each file is of a folder that a stage of the experiment wrote, by its path in that folder.

        Raises UserError as `file` does.
        """
        place = self.file(experiment, folder)
        if not experiment.revision:
            return {each.relative_to(place).as_posix(): each for each in sorted(place.rglob("*")) if each.is_file()}
        found = {each["relpath"]: self._in_cache(each["md5"]) for each in json.loads(place.read_bytes())}
        if lost := [name for name, each in found.items() if not each.exists()]:
            raise self._missing(experiment, f"{folder}/{lost[0]}")
        return found

    @cached_property
    def cache(self) -> Path:
        """DVC's cache, as its configuration says."""
        from dvc.config import Config

        folder = Config(str(self.root / ".dvc")).get("cache", {}).get("dir", "cache")
        return Path(self.root / ".dvc", folder)

    def _in_cache(self, digest: str) -> Path:
        return self.cache / "files/md5" / digest[:2] / digest[2:]

    def _digest(self, experiment: Experiment, path: str) -> str:
        """Return the digest of a file, or of one in a folder, that a stage wrote."""
        for out, digest in experiment.outs.items():
            if path == out:
                return digest
            if path.startswith(f"{out}/") and digest.endswith(".dir"):
                listing = self._in_cache(digest)
                if not listing.exists():
                    raise self._missing(experiment, out)
                inside = {f"{out}/{each['relpath']}": each["md5"] for each in json.loads(listing.read_bytes())}
                if path in inside:
                    return inside[path]
        raise UserError(f"{experiment.name} has no {path}: its stages did not write it.")

    def _missing(self, experiment: Experiment, path: str) -> UserError:
        return UserError(
            f"{path} of {experiment.name} is not in DVC's cache.\n"
            f"`dvc exp pull origin {experiment.name}` fetches it, or for a branch `dvc fetch --all-branches`."
        )

    def _known(self) -> list[Reference]:
        """Return what git has of experiments, the oldest first."""
        listed = git(
            self.root,
            "for-each-ref",
            "--sort=creatordate",
            "--format=%(refname) %(objectname) %(creatordate:iso-strict)",
            "refs/exps/",
        )
        found = ((ref.split("/"), about) for ref, *about in map(str.split, listed.splitlines()))
        return [Reference(ref[4], ref[2] + ref[3], *about) for ref, about in found if len(ref) == 5]  # others are DVC's

    def _read(self, references: Sequence[Reference]) -> list[Experiment]:
        paths = (PARAMS, LOCK, *METRICS)
        texts = self._texts([f"{each.revision}:{path}" for each in references for path in paths])
        return [
            self._experiment(each, [next(texts) for _ in paths])
            for each in tqdm(references, "read", unit=" experiments", delay=2, disable=None)
        ]

    def _workspace(self) -> Experiment:
        places = [self.root / path for path in (PARAMS, LOCK, *METRICS)]
        texts = [place.read_text(encoding="utf-8") if place.exists() else None for place in places]
        return self._experiment(Reference(WORKSPACE, "", "", ""), texts)

    def _experiment(self, reference: Reference, texts: Sequence[str | None]) -> Experiment:
        settings, stages_of = self._yaml(texts[0], reference.name), self._lock(texts[1], reference.name)
        metrics = [self._json(text, reference.name) for text in texts[2:]]
        stages = {
            stage: {kind: {each["path"]: each.get("md5", "") for each in found} for kind, found in about.items()}
            for stage, about in stages_of.items()
        }
        outs = (each for about in stages_of.values() for each in about["outs"])
        return Experiment(
            *(reference.name, reference.revision, reference.baseline, reference.created),
            flat(settings),
            {k: v for each in metrics for k, v in flat(each).items()},
            stages,
            {each["path"]: each["size"] for each in outs if "size" in each},
        )

    def _lock(self, text: str | None, name: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """Return what dvc.lock says of each stage's deps and outs. What experiments share is parsed once."""
        short = ENTRY.sub(
            lambda match: f"    - {json.dumps(match[0], ensure_ascii=False)}\n", SETTINGS.sub("", text or "")
        )

        def parsed(entry: str | dict[str, Any]) -> dict[str, Any]:
            if isinstance(entry, dict):
                return entry
            if entry not in self._entries:
                self._entries[entry] = self._yaml(entry, name)[0]
            return self._entries[entry]

        stages = self._yaml(short, name).get("stages", {})
        return {
            stage: {kind: [parsed(each) for each in about.get(kind, [])] for kind in ("deps", "outs")}
            for stage, about in stages.items()
        }

    def _yaml(self, text: str | None, name: str) -> Any:
        try:
            return self._parser.load(text or "") or {}
        except YAMLError as error:
            raise UserError(f"{name}: {PARAMS} or {LOCK} of it is not YAML ({str(error).splitlines()[0]}).") from None

    def _json(self, text: str | None, name: str) -> dict[str, Any]:
        try:
            return json.loads(text or "{}")
        except ValueError as error:
            raise UserError(f"{name}: metrics.json of it is not JSON ({error}).") from None

    def _texts(self, names: Sequence[str]) -> Iterator[str | None]:
        """Yield the text of each file, named as `revision:path`, or None where there is none."""
        command = ["git", "cat-file", "--batch"]
        asked = "".join(f"{name}\n" for name in names).encode()
        answer = subprocess.run(command, cwd=self.root, input=asked, capture_output=True, check=True).stdout
        start = 0
        for _ in names:
            end = answer.index(b"\n", start)
            header = answer[start:end].split()
            if header[-1] in (b"missing", b"ambiguous"):
                start = end + 1
                yield None
            else:
                size = int(header[-1])
                yield answer[end + 1 : end + 1 + size].decode()
                start = end + 1 + size + 1


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested dictionaries under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
