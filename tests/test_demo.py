"""How the demo follows DVC's queue; that it learns is in test_pipeline.py."""

import time

import demo

import pytest

DVC = """#!/bin/sh
case "$*" in
  "exp run --run-all")
    echo >> {folder}/runs
    [ $(wc -l < {folder}/runs) -lt {runs} ] || touch {folder}/done
    {run} ;;
  "queue status") [ -e {folder}/done ] && echo "Worker status: 0 active, 1 idle" || echo "1234567  name  Queued" ;;
  "queue stop --kill") touch {folder}/stopped ;;
esac
"""


@pytest.mark.parametrize(
    ("run", "runs", "is_stopped"),
    [
        ("exit 0", 1, False),
        ("exit 0", 3, False),  # the worker ends early, twice
        ("exec sleep 60", 1, True),  # it does not see that it is done
    ],
)
def test_the_queue_is_run_to_its_end_whatever_its_worker_does(run, runs, is_stopped, tmp_path, monkeypatch):
    (tmp_path / "dvc").write_text(DVC.format(run=run, runs=runs, folder=tmp_path))
    (tmp_path / "dvc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(demo, "PATIENCE", 0.2)
    start = time.monotonic()
    demo.run_queue()
    assert time.monotonic() - start < 20
    assert (tmp_path / "runs").read_text().count("\n") == runs
    assert (tmp_path / "stopped").exists() == is_stopped
