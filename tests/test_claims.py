"""GPUs: jobs side by side have one each while there are enough. How many there are, and which, is made up here."""

import multiprocessing
import os
import time
from types import SimpleNamespace

from finetune import claims, device

import pytest
import torch

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A function that starts a process which claims a device, and returns it with the device's name."""
    started = []

    def claim_and_wait(name, folder, pipe):
        device._claimed.clear()  # what this test's own process claimed
        pipe.send(str(device.claim(name, folder)))
        pipe.recv()

    def start(gpus: int, name: str = "auto", first: int = 0, wait: bool = True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        named = [SimpleNamespace(uuid=f"gpu-{first + number}") for number in range(gpus)]
        monkeypatch.setattr(torch.cuda, "get_device_properties", named.__getitem__)
        here, there = FORK.Pipe()
        process = FORK.Process(target=claim_and_wait, args=(name, tmp_path / "gpus", there))
        process.start()
        started.append(process)
        return process, here.recv() if wait else here

    yield start
    for process in started:
        process.kill()
        process.join()


def test_jobs_have_a_gpu_each_and_share_them_evenly_when_there_are_more(job):
    names = [job(gpus=3)[1] for _ in range(8)]
    assert names[:3] == ["cuda:0", "cuda:1", "cuda:2"]
    assert sorted(names[3:6]) == ["cuda:0", "cuda:1", "cuda:2"]
    assert len(set(names[6:])) == 2


def test_a_killed_jobs_gpu_is_free_at_once(job):
    jobs = [job(gpus=2) for _ in range(2)]
    jobs[1][0].kill()
    jobs[1][0].join()
    assert job(gpus=2)[1] == "cuda:1"
    for each, _ in jobs[:1]:
        each.kill()
        each.join()
    assert job(gpus=2)[1] == "cuda:0"


def test_one_that_was_asked_for_is_taken_and_counts(job):
    assert [job(gpus=3, name="cuda:1")[1] for _ in range(2)] == ["cuda:1", "cuda:1"]
    assert [job(gpus=3, name=name)[1] for name in ("auto", "cuda", "auto")] == ["cuda:0", "cuda:2", "cuda:0"]


def test_a_gpu_is_known_by_what_it_is_not_by_its_number(job):
    """CUDA_VISIBLE_DEVICES numbers them anew."""
    assert job(gpus=1, first=1)[1] == "cuda:0"  # the second of two
    assert [job(gpus=2)[1] for _ in range(3)] == ["cuda:0", "cuda:0", "cuda:1"]


def test_jobs_that_come_at_once_do_not_choose_the_same(job, monkeypatch):
    counted = claims.others

    def count_slowly(*arguments):
        time.sleep(0.05)
        return counted(*arguments)

    monkeypatch.setattr(claims, "others", count_slowly)
    jobs = [job(gpus=4, wait=False) for _ in range(4)]
    assert {pipe.recv() for _, pipe in jobs} == {f"cuda:{number}" for number in range(4)}


def test_without_a_gpu_nothing_is_claimed(job, tmp_path):
    assert [job(gpus=0)[1], job(gpus=2, name="cpu")[1]] == ["cpu", "cpu"]
    assert not (tmp_path / "gpus").exists()


def test_a_folder_that_takes_no_locks_is_no_reason_to_stop(job, tmp_path):
    (tmp_path / "gpus").write_text("not a folder")
    assert [job(gpus=2)[1] for _ in range(2)] == ["cuda:0", "cuda:0"]


def test_locks_that_nobody_holds_are_removed(tmp_path):
    lock = claims.hold(tmp_path)
    (tmp_path / "left.lock").touch()
    assert claims.others(tmp_path) == 1
    assert claims.others(tmp_path, lock) == 0
    assert [path.name for path in tmp_path.iterdir()] == [os.path.basename(lock.lock_file)]
    claims.let_go(lock)
    assert list(tmp_path.iterdir()) == []
