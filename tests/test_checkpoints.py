"""src/checkpoints.py: what the store holds, and taking runs out of it."""

import json
import os
import time

from finetune.runs import Run
from helpers import run

import pytest

NAMES = ("a1b2c3d4e5f60718", "a1ffc3d4e5f60718", "0123456789abcdef")


@pytest.fixture
def folder(tmp_path):
    """A folder whose store has a finished run, an unfinished one, and one without checkpoints."""
    files = (["00002-0000000.finished.pt"], ["00003-0000000.pt", "00003-0000012.pt"], [])
    store = tmp_path / ".dvc/tmp/checkpoints"
    for age, (name, checkpoints) in enumerate(zip(NAMES, files, strict=True)):
        (store / name).mkdir(parents=True)
        about = {"run": name, "model_name": "alexnet", "experiment": f"exp-{age}", "parent": "mine" if age else None}
        (store / name / "about.json").write_text(json.dumps(about))
        for file in checkpoints:
            (store / name / file).write_bytes(b"x" * 1_500_000)
        for file in (store / name).iterdir():
            os.utime(file, (time.time() - 3600 * (3 - age),) * 2)
    return tmp_path


def lines(folder) -> list[str]:
    result = run("checkpoints.py", folder)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_the_list_says_what_each_run_is(folder):
    header, *rows, total = lines(folder)
    assert header.split() == ["RUN", "MODEL", "EPOCHS", "STATE", "SIZE", "AGE", "EXPERIMENT", "ON", "TOP", "OF"]
    assert [" ".join(row.split()) for row in rows] == [
        "a1b2c3d4e5f60718 alexnet 2 finished 1.5 MB 3 h exp-0 -",
        "a1ffc3d4e5f60718 alexnet 3 + 12 steps unfinished 3.0 MB 2 h exp-1 mine",
        "0123456789abcdef alexnet 0 unfinished 0.0 MB 1 h exp-2 mine",
    ]
    assert total.startswith("3 runs, 0.00 GB in")


def test_runs_are_removed_by_the_first_digits_of_their_name(folder):
    for start, words in (("a1", "2 runs begin with a1. Give more digits."), ("77", "no run begins with 77.")):
        result = run("checkpoints.py", folder, "remove", start)
        assert (result.returncode, result.stderr.strip()) == (1, f"error: {words}")
    assert run("checkpoints.py", folder, "remove", "a1b", "01").stdout == "removed 2 runs\n"
    assert len(lines(folder)) == 3
    assert run("checkpoints.py", folder, "remove", "--all").stdout == "removed 1 runs\n"
    assert len(lines(folder)) == 2


def test_a_run_in_use_is_kept_and_named(folder):
    with Run(folder / ".dvc/tmp/checkpoints", NAMES[1]).held({}):
        assert "in use" in lines(folder)[2]
        result = run("checkpoints.py", folder, "remove", "--all")
        assert (result.returncode, result.stdout) == (1, "removed 2 runs\n")
        assert f"in use, and kept: {NAMES[1]}" in result.stderr
    assert run("checkpoints.py", folder, "remove", "--all").returncode == 0


def test_a_shared_folder_is_named_by_a_variable_and_must_be_there(folder):
    moved = (folder / ".dvc/tmp/checkpoints").rename(folder / "shared")
    assert run("checkpoints.py", folder, CHECKPOINTS_DIR=str(moved)).stdout.count("alexnet") == 3
    result = run("checkpoints.py", folder, CHECKPOINTS_DIR="/not/mounted")
    assert result.returncode == 1
    assert "CHECKPOINTS_DIR=/not/mounted does not exist" in result.stderr
