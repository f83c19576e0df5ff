"""Checkpoints and their store, in parts: what one run takes over from another, and which files stay."""

from finetune import checkpoint, files, optim, runs
from finetune.errors import UserError

import pytest
import torch


def session(trainable: str, momentum: float = 0.9) -> checkpoint.Session:
    """Return the session of a network of two layers, of which the second or both train."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    model[0].requires_grad_(trainable == "all")
    optimizer = optim.optimizer(model, lr=0.1, momentum=momentum)
    return checkpoint.Session(model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1))


def train(session: checkpoint.Session, steps: int = 2) -> None:
    for _ in range(steps):
        session.optimizer.zero_grad()
        session.model(torch.ones(1, 3)).square().sum().backward()
        session.optimizer.step()
    session.history = [*session.history, {"step": len(session.history)}]


def saved(session: checkpoint.Session) -> dict:
    return session.state() | {"run": "0" * 16}


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.9), (0.0, 0.9), (0.9, 0.0)])
def test_head_first_and_then_everything(before, after):
    parent = session("head", before)
    train(parent)
    child = session("all", after)
    child.inherit("mine", saved(parent))
    assert torch.equal(child.model[1].weight, parent.model[1].weight)
    assert child.lineage == [{"run": "0" * 16, "name": "mine", "epochs": 1}]
    start = child.model[0].weight.clone()
    train(child)
    assert not torch.equal(child.model[0].weight, start)
    assert len(child.history) == 2


def test_everything_first_and_then_the_head_keeps_what_the_parent_made_of_the_trunk():
    parent = session("all")
    train(parent)
    child = session("head")
    child.inherit("mine", saved(parent))
    train(child)
    state = saved(child)
    assert torch.equal(state["model"]["0.weight"], parent.model[0].weight)
    grandchild = session("head")
    grandchild.inherit("mine too", state)
    assert torch.equal(grandchild.model[0].weight, parent.model[0].weight)
    assert [each["name"] for each in grandchild.lineage] == ["mine", "mine too"]


def test_the_optimizers_memory_is_taken_over_and_its_settings_are_not():
    parent, child = session("all"), session("all")
    train(parent)
    child.optimizer.param_groups[0]["lr"] = 0.01
    child.inherit("mine", saved(parent))
    assert child.optimizer.param_groups[0]["lr"] == 0.01
    for own, theirs in zip(child.model.parameters(), parent.model.parameters(), strict=True):
        momentum = child.optimizer.state[own]["momentum_buffer"]
        assert torch.equal(momentum, parent.optimizer.state[theirs]["momentum_buffer"])


def test_a_parents_tensor_of_another_shape_is_refused_by_name():
    state = saved(session("all"))
    state["model"]["0.weight"] = torch.zeros(5, 3)
    with pytest.raises(UserError, match=r"the checkpoint's 0.weight is \(5, 3\)"):
        session("all").inherit("mine", state)


def test_a_damaged_checkpoint_that_is_further_does_not_stand_in_for_those_that_follow(tmp_path):
    run = runs.Run(tmp_path, "0" * 16)
    run.folder.mkdir()
    now = session("all")
    train(now)
    checkpoint.save(run.path(1, 0), saved(now))
    for name in ("00003-0000000.finished.pt", "00002-0000001.pt", "00002-0000002.pt"):
        (run.folder / name).write_bytes(b"half")
    state, path = checkpoint.newest(run, 3)
    assert (path, len(state["history"])) == (run.path(1, 0), 1)

    with checkpoint.Writer(run, 3, {"run": run.name}, limit=float("inf")) as writer:
        for _ in range(2):
            train(now)
            writer.save(now)
            writer.wait()
    assert len(checkpoint.load(run.finish(3))["history"]) == 3


def test_what_a_killed_process_left_is_not_written_through(tmp_path):
    (tmp_path / "stored").write_text("of another run")
    (tmp_path / "checkpoint.pt.tmp").hardlink_to(tmp_path / "stored")
    (tmp_path / "new").write_text("new")
    checkpoint.put(tmp_path / "new", tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").read_text() == "new"
    (tmp_path / "other.tmp").hardlink_to(tmp_path / "stored")
    with files.replaced(tmp_path / "other") as temporary:
        temporary.write_text("newer")
    assert (tmp_path / "stored").read_text() == "of another run"


def test_a_run_begun_anew_goes_on_if_it_is_killed_and_begins_anew_once_it_is_finished(tmp_path):
    run = runs.Run(tmp_path, "0" * 16)

    def begun_anew() -> list[str]:
        with run.held({}):
            run.begin_anew()
            return [each.path.name for each in run.checkpoints()]

    with run.held({}):
        run.path(2, 0).write_bytes(b"")
        run.finish(2)
    assert begun_anew() == []
    run.path(1, 0).write_bytes(b"")  # ... and killed
    assert begun_anew() == ["00001-0000000.pt"]
    run.finish(1)
    assert begun_anew() == []


def test_a_run_that_is_taken_further_is_not_finished_and_one_may_be_removed_twice(tmp_path):
    run = runs.Run(tmp_path, "0" * 16)
    with run.held({}):
        assert not run.is_finished
        run.path(5, 0).write_bytes(b"")
        run.finish(5)
        assert run.is_finished
        run.path(7, 0).write_bytes(b"")
        assert not run.is_finished
    assert run.remove()
    assert run.remove()
    assert not run.folder.exists()
