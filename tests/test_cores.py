"""The machine's cores: each run has its part of them, of as many as run now."""

import os
import subprocess
import sys
import time
from pathlib import Path

from finetune import cores, parallel
from helpers import ROOT

import pytest

SCRIPT = """
import sys
from pathlib import Path
from finetune import cores
cores.LOOK = float(sys.argv[2])
with cores.shared(Path(sys.argv[1])) as threads:
    print("here", flush=True)
    for _ in sys.stdin:
        print(threads(), flush=True)
"""


class Holder:
    """A process that shares the cores, until it is told to end or is killed."""

    def __init__(self, folder: Path, cores: int | None = 8, look: float = 0, cwd: Path | None = None):
        environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environ |= {"PYTHONPATH": str(ROOT / "src")} | ({"OMP_NUM_THREADS": str(cores)} if cores else {})
        command = [sys.executable, "-c", SCRIPT, str(folder), str(look)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=cwd, env=environ, **pipes)

    def wait_until_here(self) -> "Holder":
        assert self.process.stdout.readline() == "here\n"
        return self

    def threads(self) -> int:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> None:
        self.process.communicate()
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def hold(tmp_path):
    """A function that starts holders of a folder, which all end with the test."""
    holders = []

    def start(number: int = 1, folder: Path = tmp_path / "cores", **options) -> list[Holder]:
        started = [Holder(folder, **options) for _ in range(number)]
        holders.extend(started)
        return [each.wait_until_here() for each in started]

    yield start
    for each in holders:
        each.kill()


def locks(folder: Path) -> int:
    return len(list((folder / "cores").iterdir()))


def test_a_run_alone_has_all_cores(hold):
    (one,) = hold()
    assert one.threads() == 8
    assert one.threads() == 8


def test_without_omp_num_threads_the_cores_are_those_of_the_process(hold):
    (one,) = hold(cores=None)
    assert one.threads() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("folder", ["cores", ".dvc/tmp/cores", "../cores", "."])
def test_a_run_that_names_the_folder_from_where_it_stands_does_not_count_itself(folder, hold, tmp_path):
    (tmp_path / "stands/here").mkdir(parents=True)
    options = {"folder": folder, "cwd": tmp_path / "stands/here"}
    (one,) = hold(**options)
    assert one.threads() == 8
    (other,) = hold(**options)
    assert [one.threads(), other.threads()] == [4, 4]


def test_runs_side_by_side_have_equal_parts(hold):
    runs = hold(2)
    assert [each.threads() for each in runs] == [4, 4]
    runs += hold()
    assert [each.threads() for each in runs] == [2, 2, 2]  # what is left over stays free
    runs.pop(0).end()
    assert [each.threads() for each in runs] == [4, 4]
    runs.pop(0).end()
    assert runs[0].threads() == 8


def test_more_runs_than_cores_have_one_each(hold):
    runs = hold(3, cores=2)
    assert [each.threads() for each in runs] == [1, 1, 1]


def test_runs_in_other_folders_do_not_count(hold, tmp_path):
    hold(folder=tmp_path / "others")
    (one,) = hold()
    assert one.threads() == 8


def test_a_killed_run_has_no_part_from_then_on(hold, tmp_path):
    one, other = hold(2)
    assert one.threads() == 4
    other.kill()
    assert locks(tmp_path) == 2
    assert one.threads() == 8
    assert locks(tmp_path) == 1  # its own


def test_what_dead_runs_left_is_removed_and_nothing_else(hold, tmp_path):
    folder = tmp_path / "cores"
    folder.mkdir()
    for name in ("0.lock", "1.lock", "2.lock"):
        (folder / name).touch()
    (folder / "note.txt").write_text("text")
    (one,) = hold()
    assert one.threads() == 8
    assert locks(tmp_path) == 2
    assert (folder / "note.txt").exists()


def test_nothing_is_left_of_a_run_that_ended(hold, tmp_path):
    for each in hold(2):
        each.threads()
        each.end()
    assert locks(tmp_path) == 0


def test_runs_that_come_and_go_at_once_do_not_stumble(hold, tmp_path):
    for _ in range(2):
        runs = [Holder(tmp_path / "cores") for _ in range(5)]
        for each in runs:
            each.process.stdin.write("\n" * 20)
        for each in runs:
            printed, _ = each.process.communicate()
            parts = [int(line) for line in printed.splitlines()[1:]]
            assert each.process.returncode == 0
            assert len(parts) == 20
            assert set(parts) <= {8, 4, 2, 1}
    assert locks(tmp_path) == 0


def test_a_run_looks_at_who_else_is_there_now_and_then(hold):
    (one,) = hold(look=0.5)
    assert one.threads() == 8
    started = time.monotonic()
    hold()
    seen = [one.threads()]
    while seen[-1] == 8:
        time.sleep(0.02)
        seen.append(one.threads())
    assert seen[-1] == 4
    assert 0.4 < time.monotonic() - started < 5


def test_between_two_looks_the_folder_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(cores, "LOOK", 1000)
    with cores.shared(tmp_path) as threads:
        assert threads() == 8
        (tmp_path / "left.lock").touch()
        assert threads() == 8
        assert (tmp_path / "left.lock").exists()


def test_nothing_is_left_of_a_run_that_failed(tmp_path):
    folder = tmp_path / "made/by it"

    def fail() -> None:
        with cores.shared(folder):
            assert len(list(folder.iterdir())) == 1
            raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        fail()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("value", "expected"), [("1", 1), ("3", 3), (" 5 ", 5), ("0", 1), ("-2", 1)])
def test_omp_num_threads_says_how_many_cores_there_are(value, expected, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert parallel.cores() == expected


@pytest.mark.parametrize("value", [None, "", "all", "4,2"])
def test_otherwise_the_system_says_how_many_cores_there_are(value, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert parallel.cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert parallel.cores() == os.cpu_count()
