"""How the demo follows DVC's queue; that it learns is in test_pipeline.py."""

import time

import demo

import pytest

DVC = """#!/bin/sh
case "$*" in
  "exp run --run-all") {run} ;;
  "queue status") echo "Worker status: 0 active, 1 idle" ;;
  "queue stop --kill") touch {folder}/stopped ;;
esac
"""


@pytest.mark.parametrize(("run", "is_stopped"), [("exit 0", False), ("exec sleep 60", True)])
def test_a_worker_that_does_not_see_that_it_is_done_is_told(run, is_stopped, tmp_path, monkeypatch):
    (tmp_path / "dvc").write_text(DVC.format(run=run, folder=tmp_path))
    (tmp_path / "dvc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(demo, "PATIENCE", 0.2)
    start = time.monotonic()
    demo.run_queue()
    assert time.monotonic() - start < 10
    assert (tmp_path / "stopped").exists() == is_stopped
