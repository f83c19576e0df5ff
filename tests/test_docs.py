"""The documents: each link leads somewhere, and each command is one that there is, and that a test runs."""

import argparse
import functools
import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import documents
from documents import NAMES, ROOT, blocks, commands, text
from documents import block as take
from finetune import params, schema
from finetune.errors import UserError
from finetune.version import __version__
from helpers import clone, darken_bees, git, make_pictures, run_forked, typed, write_params

import pytest
import torch
import torchvision
from dvc.cli.parser import DvcParser, get_main_parser
from dvc.exceptions import DvcException
from dvc.utils.hydra import apply_overrides, get_hydra_sweeps
from ruamel.yaml import YAML
from torch import nn

KNOWN = {".", "dvc", "export", "find", "gh", "git", "gto", "make", "pytest", "python", "ray", "rm", "sed"}
ENVIRONMENTS = {"setup", "export", "ray", "timm"}  # targets that `make test` makes
ALL_BLOCKS = [block for name in NAMES for block in blocks(name)]
GROUPS = {"artifacts", "exp", "metrics", "params", "plots", "queue", "remote"}


# Links ----------------------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives a document's headings."""
    titles = re.findall(r"(?m)^#+ (.*)$", path.read_text())
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_each_link_leads_somewhere(name):
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text(name)):
        place, _, anchor = target.partition("#")
        path = (ROOT / name).parent / place if place else ROOT / name
        if not target.startswith("http") and (not path.exists() or (anchor and anchor not in anchors(path))):
            lost.append(target)
    assert lost == []


def test_each_page_is_in_the_readmes_list():
    index = text("README.md").partition("## More")[2]
    assert [name for name in NAMES if f"]({name})" not in index and name != "README.md"] == []


def test_each_setting_has_its_row():
    rows = re.findall(r"(?m)^\| (`.*?) \| ", text("docs/parameters.md"))
    named = [re.findall(r"`([\w.]+)`", row) for row in rows]
    keys = [key if key[0] != "." else row[0].partition(".")[0] + key for row in named for key in row]
    assert sorted(keys) == sorted(schema.keys(params.Params))


# Commands that there are ----------------------------------------------------------------------------------------------


class Parsed(Exception):
    """Arguments were taken: those of the parser that took them."""


class Refused(Exception):
    """A parser's error."""


def test_each_command_is_one_that_there_is(tmp_path, monkeypatch):
    """Their own parsers are asked; settings are checked as params.yaml's are."""
    taken, parse = [], argparse.ArgumentParser.parse_args

    def stop(self, *arguments, **options):
        raise Parsed(parse(self, *arguments, **options))

    def refuse(_self, message, *_):
        raise Refused(message)

    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)
    monkeypatch.setattr(DvcParser, "error", refuse)
    wrong = {}
    for name in NAMES:
        lines = [(True, line) for block in blocks(name) for line in block.lines]
        lines += [(False, line) for line in documents.inline(name) if "…" not in line.split()[1:2]]
        for in_block, line in lines:
            for words in commands(line):
                taken.append(words)
                try:
                    with monkeypatch.context() as patch:
                        patch.setattr(sys, "argv", words[1:])
                        if words[0] == "python":
                            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
                        check(words, tmp_path)
                except (Refused, UserError, DvcException) as error:
                    if in_block or "required" not in str(error):  # a sentence may name a command alone
                        wrong[f"{name}: {line}"] = str(error)
    assert len(taken) > 150
    assert wrong == {}, wrong


def check(words: list[str], folder: Path) -> None:
    """Raise Refused or UserError where a command is none that there is, or its settings are none of params.yaml's."""
    match words:
        case ["dvc", *arguments]:
            for path in points(getattr(dvc_parser().parse_args(arguments), "set_param", None) or [], folder):
                params.load(path)
        case ["python", script, *_] if script.endswith(".py"):
            if not (ROOT / script).is_file():
                raise Refused(f"there is no {script}")
            try:
                loaded(script)["main"]()
            except Parsed as error:
                params.load(ROOT / "params.yaml", getattr(error.args[0], "changes", []))
        case ["make", *targets]:
            known = re.findall(r"(?m)^\.PHONY: (.*)$", (ROOT / "Makefile").read_text())[0].split()
            if unknown := [target for target in targets if target not in known]:
                raise Refused(f"no target {unknown}")
        case [command, *_] if command not in KNOWN:
            raise Refused(f"{command} is none of the commands of documents")
    for word in words[1:]:
        if re.match(r"(sweeps|recipes)/", word) and not (ROOT / word).is_file():
            raise Refused(f"there is no {word}")


@functools.cache
def loaded(script: str) -> dict:
    """Return what a script defines; as where it is started, it may import what is beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / Path(script).parent)
        return runpy.run_path(str(ROOT / script), run_name="loaded")


@functools.cache
def dvc_parser() -> argparse.ArgumentParser:
    return get_main_parser()


def points(changes: list[str], folder: Path) -> Iterator[Path]:
    """Yield folder/params.yaml with each point of a grid that `-S` asks for, written by DVC itself."""
    if not changes:
        return
    settings = (folder / "params.yaml").read_text() if (folder / "params.yaml").exists() else text("params.yaml")
    try:
        for sweep in get_hydra_sweeps({"params.yaml": changes}):
            (folder / "params.yaml").write_text(settings)
            apply_overrides(folder / "params.yaml", sweep["params.yaml"])
            yield folder / "params.yaml"
    finally:
        (folder / "params.yaml").write_text(settings)


# Commands that a test runs --------------------------------------------------------------------------------------------


def test_each_block_names_the_test_that_runs_it_or_why_none_does():
    """It does run it where it has each of its commands with all options, or takes the block from the document."""
    wrong = {}
    for block in (each for each in ALL_BLOCKS if each.run_by):
        if lost := [file for file in block.run_by if not (ROOT / file).is_file()]:
            wrong[str(block)] = f"there is no {lost}"
            continue
        code = "\n".join((ROOT / file).read_text() for file in block.run_by)
        code += "\n".join(
            line for taken in re.findall(r'block\("(.*?)", "(.*?)"\)', code) for line in take(*taken).lines
        )
        code = re.sub(r'", f?"', " ", code)  # words side by side, as in a shell
        for words in (words for line in block.lines for words in commands(line)):
            if not all(re.search(rf"(?<![\w-]){re.escape(each)}(?![\w-])", code) for each in essence(words)):
                wrong[str(block)] = f"{block.run_by} have no {' '.join(words)}"
    assert wrong == {}, wrong


def essence(words: list[str]) -> list[str]:
    """Return of a command of this project's what a test that runs it has: its name, and that of each option."""
    options = [word for word in words if word.startswith("-")]
    match words:
        case ["dvc", *rest]:
            return [" ".join(rest[: 2 if rest[0] in GROUPS else 1]), *options]
        case ["python", script, *_]:
            return [Path(script).stem, *options]
        case ["make", *targets]:
            return [f"make {target}" for target in targets if target not in ENVIRONMENTS]
        case ["export", variable]:
            return [variable.partition("=")[0]]
        case ["gto", name, *_]:
            return [f"gto {name}", *options]
    return []


# The rest of them is run here: without DVC, as each of its experiments costs eight seconds ---------------------------


SETTINGS = {"data__source": "pictures", "data__resize": 36, "data__image_size": 32, "data__limit": 0, "device": "cpu",
            "model_name": "mobilenet_v3_small", "num_epochs": 3, "lr": 0.01, "momentum": 0.9}  # fmt: skip
MODELS = ("mobilenet_v3_small", "squeezenet1_1", "resnet18")  # that the commands name, and that of the settings


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder after the stages prepare and backbone, and weights for all that the documents train."""
    folder = tmp_path_factory.mktemp("prepared")
    make_pictures(folder / "pictures", {"train/ants": 8, "train/bees": 8, "val/ants": 6, "val/bees": 6}, size=36)
    darken_bees(folder / "pictures", 4)
    (folder / "weights").mkdir()
    for name in MODELS:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name)
        for layer in (each for each in model.modules() if isinstance(each, nn.BatchNorm2d)):
            layer.momentum = None  # the mean over all that it has seen
        model.train()(torch.randn(32, 3, 32, 32))  # or hardly a picture would be told from another
        torch.save(model.state_dict(), folder / f"weights/{name}.pth")
    shutil.copy(folder / "weights/mobilenet_v3_small.pth", folder / "weights/mine.pth")
    write_params(folder, **SETTINGS)
    for stage in ("prepare", "backbone"):
        run_forked(folder, stage, WEIGHTS_DIR="weights")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("block", [each for each in ALL_BLOCKS if not (each.run_by or each.why_not)], ids=str)
def test_a_block_does_what_it_says(block, prepared, tmp_path):
    """Each experiment for itself, as the documents say: its stages, with params.yaml as DVC writes it."""
    folder = shutil.copytree(prepared, tmp_path / "folder")
    for words in (words for line in block.lines for words in commands(line)):
        match words:
            case ["python", script, *arguments]:
                run_forked(folder, Path(script).stem, *arguments, WEIGHTS_DIR="weights")
            case ["dvc", "exp", "run", *arguments]:
                changes = [each for each in arguments if "=" in each]
                for _ in points(changes, folder):
                    for stage in stages(changes):
                        printed = run_forked(folder, stage, WEIGHTS_DIR="weights")
                    assert printed
            case _:
                assert words == ["git", "restore", "params.yaml"]  # after each experiment, here


def stages(changes: list[str]) -> list[str]:
    """Return the stages that run with such settings in a folder that is prepared for others."""
    keys = {each.partition("=")[0] for each in changes}
    asked = {"prepare": {"data.limit"}, "backbone": {"model_name", "backbone.weights"}, "train": keys}
    return [stage for stage, own in (asked | {"evaluate": {"evaluate.tta"}}).items() if own & keys]


def test_what_dvc_and_git_leave_behind_when_killed_is_taken_away(tmp_path):
    project = clone(tmp_path / "project")
    git(project, "checkout", "-q", "--detach")
    (project / ".dvc/tmp/exps").mkdir(parents=True)
    left = [project / name for name in (".git/index.lock", ".git/HEAD.lock", ".dvc/tmp/rwlock", ".dvc/tmp/exps/rwlock")]
    for file in left:
        file.write_text("{")
    for line in take("docs/resuming.md", "find .git").lines:
        typed(project, line)
    assert git(project, "status", "--short", "--branch") == "## main\n"
    assert [file for file in left if file.exists()] == []


# The version ----------------------------------------------------------------------------------------------------------


def test_the_version_is_the_same_everywhere():
    citation = YAML(typ="safe").load(ROOT / "CITATION.cff")
    version, date = re.search(r"(?m)^## (\S+), (\S+)$", text("CHANGELOG.md")).groups()
    assert version == __version__ == citation["version"]
    assert date == str(citation["date-released"])
    assert text("README.md").startswith(f"# {citation['title']}\n")
