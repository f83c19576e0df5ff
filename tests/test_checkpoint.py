"""Checkpoints and their store, in parts: what one run takes over from another, and which files stay."""

from finetune import checkpoint, files, layers, optim, params, runs
from finetune.digests import digest
from finetune.errors import UserError
from helpers import ROOT

import pytest
import torch
from torch import nn

OPTIMIZERS = ["sgd", "adam", "adamw", "nadam", "radam", "rmsprop", "adagrad", "adadelta", "adamax"]
STEPS = 2  # an epoch
HEAD, MIDDLE, FIRST = (layers.Group(*each) for each in (("head", ["2"], 0), ("middle", ["1"], 1), ("first", ["0"], 2)))
PLANS = {
    "head": [HEAD, layers.Group("middle", ["1"]), layers.Group("first", ["0"])],
    "all": [HEAD, layers.Group("middle", ["1"], 0), layers.Group("first", ["0"], 0)],
    "thawing": [HEAD, MIDDLE, FIRST],
    "part": [HEAD, layers.Group("trunk", ["1"], 0), layers.Group("trunk", ["0"])],  # of one block
    "block": [HEAD, layers.Group("trunk", ["1", "0"], 0)],
}


def session(plan: str, momentum: float = 0.9, name: str = "sgd", seed: int = 0) -> checkpoint.Session:
    """Return the session of a network of three layers, of which those of the plan train."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False))
    changes = [f"optimizer.name={name}", "optimizer.weight_decay=0.01", "num_epochs=6", "schedule.name=cosine"]
    settings = params.load(ROOT / "params.yaml", changes)
    optimizer = optim.optimizer(model, PLANS[plan], settings.optimizer, 0.1, momentum)
    return checkpoint.Session(model, optimizer, optim.LearningRate(optimizer, settings.schedule, 6, STEPS))


def train(session: checkpoint.Session, plan: str, steps: int = STEPS) -> None:
    """Train the session on for so many steps of its epoch, whose last one ends it."""
    epoch = len(session.history)
    layers.thaw(session.model, PLANS[plan], epoch)
    done = int(session.sums.get("steps", 0))
    for step in range(done, done + steps):
        session.rates = session.rates if step else optim.rates(session.optimizer)
        session.optimizer.zero_grad()
        inputs = torch.arange(12.0).reshape(4, 3).sin() + epoch
        session.model(inputs)[:2].square().sum().backward()
        session.optimizer.step()
        session.schedule.after_step()
        session.sums = {"steps": step + 1}
    if done + steps == STEPS:
        session.schedule.after_epoch(1.0)
        session.sums = {}
        row = {"step": epoch, "val_acc": [0.5, 0.7, 0.7, 0.6][epoch % 4], "val_loss": [1.0, 0.8, 0.7, 0.1][epoch % 4]}
        session.history = [*session.history, row]
        session.keep_if_best()


def saved(session: checkpoint.Session) -> dict:
    return session.state() | {"run": "0" * 16}


def contents(session: checkpoint.Session) -> dict[str, str]:
    """Return the digests of all parts of a session's state but for the time it took."""
    return {name: digest(value) for name, value in session.state().items() if name != "seconds"}


def tensors(session: checkpoint.Session) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in session.model.state_dict().items()}


def memory(session: checkpoint.Session, layer: int) -> dict[str, torch.Tensor]:
    """Return what the optimizer remembers of a layer's weights."""
    return session.optimizer.state.get(session.model[layer].weight, {})


# Going on -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_session_that_goes_on_ends_as_one_that_never_stopped_whatever_has_thawed(name, tmp_path):
    whole = session("thawing", name=name)
    for stop in range(4 * STEPS):
        train(whole, "thawing", 1)
        checkpoint.save(tmp_path / f"{stop}.pt", saved(whole))
    for stop in range(4 * STEPS - 1):
        other = session("thawing", name=name)
        other.restore(checkpoint.load(tmp_path / f"{stop}.pt"))
        for _ in range(stop + 1, 4 * STEPS):
            train(other, "thawing", 1)
        assert contents(other) == contents(whole), stop
    assert len(whole.history) == 4


def test_a_state_is_a_copy_that_training_on_leaves_as_it_is():
    one = session("all")
    train(one, "all")
    state = one.state()
    before = digest(state)
    train(one, "all")
    assert digest(state) == before


def test_frozen_layers_that_no_parent_trained_are_not_in_a_checkpoint():
    assert set(session("head").state()["model"]) == {
        "2.weight", "2.bias", "3.running_mean", "3.running_var", "3.num_batches_tracked"
    }  # fmt: skip


# The best epoch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "best"),
    [
        ([(0.5, 1.0)], 0),
        ([(0.5, 1.0), (0.6, 2.0)], 1),  # val_acc comes first
        ([(0.6, 2.0), (0.5, 1.0)], 0),
        ([(0.6, 2.0), (0.6, 1.0)], 1),  # then val_loss
        ([(0.6, 1.0), (0.6, 2.0)], 0),
        ([(0.6, 1.0), (0.6, 1.0)], 0),  # the first of equals
        ([(0.5, 1.0), (0.6, 1.0), (0.6, 0.9), (0.6, 0.9), (0.1, 0.1)], 2),
    ],
)
def test_the_best_epoch_is_kept(epochs, best):
    one, seen = session("all"), []
    for epoch, (val_acc, val_loss) in enumerate(epochs):
        with torch.no_grad():
            one.model[0].weight.fill_(epoch)
        seen.append(tensors(one))
        one.history = [*one.history, {"step": epoch, "val_acc": val_acc, "val_loss": val_loss}]
        one.keep_if_best()
    assert one.best["row"]["step"] == best
    one.take_best()
    assert all(torch.equal(tensor, seen[best][name]) for name, tensor in one.model.state_dict().items())


def test_the_best_epoch_is_remembered_by_one_that_goes_on(tmp_path):
    one = session("thawing")
    train(one, "thawing")
    train(one, "thawing")
    best = tensors(one)
    checkpoint.save(tmp_path / "one.pt", saved(one))
    other = session("thawing", seed=1)
    other.model.load_state_dict(tensors(session("thawing")))  # as the backbone's file has it
    other.restore(checkpoint.load(tmp_path / "one.pt"))
    for _ in range(2):
        train(other, "thawing")  # of the same val_acc, but a lower val_loss; then a lower val_acc
    assert other.best["row"]["step"] == 2
    third = session("thawing")
    third.restore(checkpoint.load(tmp_path / "one.pt"))
    train(third, "thawing", 1)
    third.take_best()
    assert all(torch.equal(tensor, best[name]) for name, tensor in third.model.state_dict().items())


# On top of another run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("before", "after"), [(0.9, 0.9), (0.0, 0.9), (0.9, 0.0)])
def test_head_first_and_then_everything(before, after, name):
    parent = session("head", before, name)
    train(parent, "head")
    child = session("all", after, name)
    child.inherit("mine", saved(parent))
    assert torch.equal(child.model[2].weight, parent.model[2].weight)
    assert child.lineage == [{"run": "0" * 16, "name": "mine", "epochs": 1}]
    start = tensors(child)
    train(child, "all")
    assert not any(torch.equal(tensors(child)[f"{layer}.weight"], start[f"{layer}.weight"]) for layer in range(3))
    assert len(child.history) == 2


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("before", "after"), [("part", "block"), ("block", "part"), ("all", "head"), ("part", "all")])
def test_layers_that_the_parent_trained_are_remembered_and_others_begin_fresh(before, after, name):
    parent = session(before, name=name)
    train(parent, before)
    child = session(after, name=name)
    child.inherit("mine", saved(parent))
    trained = {layer for group in PLANS[before] if group.thaws is not None for layer in map(int, group.layers)}
    trains = {layer for group in PLANS[after] if group.thaws is not None for layer in map(int, group.layers)}
    for layer in trained & trains:
        assert digest(dict(memory(child, layer))) == digest(dict(memory(parent, layer)))
    fresh = session(after, name=name)
    fresh.model.load_state_dict(child.model.state_dict())
    fresh.history = child.history
    train(child, after, 1)
    train(fresh, after, 1)
    for layer in range(3):
        same = torch.equal(child.model[layer].weight, fresh.model[layer].weight)
        assert same == (layer not in trained & trains), layer  # momentum moves what has any


def test_everything_first_and_then_the_head_keeps_what_the_parent_made_of_the_trunk():
    parent = session("all")
    train(parent, "all")
    child = session("head")
    child.inherit("mine", saved(parent))
    train(child, "head")
    state = saved(child)
    assert torch.equal(state["model"]["0.weight"], parent.model[0].weight)
    grandchild = session("head")
    grandchild.inherit("mine too", state)
    assert torch.equal(grandchild.model[0].weight, parent.model[0].weight)
    assert [each["name"] for each in grandchild.lineage] == ["mine", "mine too"]


def test_on_top_of_a_run_that_kept_an_earlier_epoch_a_run_begins_with_that_one_and_without_memories():
    parent = session("all")
    train(parent, "all")
    parent.history = [{"step": 0, "val_acc": 0.9, "val_loss": 1.0}]
    parent.keep_if_best()
    kept = tensors(parent)
    child = session("all")
    child.inherit("mine", saved(parent))
    assert child.optimizer.state  # the best one is the last one
    train(parent, "all")
    parent.history = [*parent.history, {"step": 1, "val_acc": 0.8, "val_loss": 1.0}]
    parent.keep_if_best()
    child = session("all")
    child.inherit("mine", saved(parent))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in child.model.state_dict().items())
    assert not any(torch.equal(kept[name], tensor) for name, tensor in parent.model.state_dict().items())
    assert not child.optimizer.state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizers_memory_is_taken_over_and_its_settings_are_not(name):
    parent, child = session("all", name=name), session("all", 0.5, name=name)
    train(parent, "all")
    before = [{key: value for key, value in group.items() if key != "params"} for group in child.optimizer.param_groups]
    child.inherit("mine", saved(parent))
    after = [{key: value for key, value in group.items() if key != "params"} for group in child.optimizer.param_groups]
    assert before == after
    for own, theirs in zip(child.model.parameters(), parent.model.parameters(), strict=True):
        assert child.optimizer.state[own].keys() == parent.optimizer.state[theirs].keys() != set()
        assert digest(dict(child.optimizer.state[own])) == digest(dict(parent.optimizer.state[theirs]))


@pytest.mark.parametrize(("one", "other"), [("sgd", "adam"), ("adam", "adamw"), ("rmsprop", "sgd")])
def test_another_optimizer_begins_without_memories(one, other):
    parent, child, fresh = session("all", name=one), session("all", name=other), session("all", name=other)
    train(parent, "all")
    child.inherit("mine", saved(parent))
    assert digest(child.optimizer.state_dict()) == digest(fresh.optimizer.state_dict())
    fresh.model.load_state_dict(parent.model.state_dict())
    train(fresh, "all")
    child.history = []  # so that its pictures are the same
    train(child, "all")
    assert digest(tensors(child)) == digest(tensors(fresh))


def test_a_child_keeps_its_own_best_epoch():
    parent, child = session("all"), session("all")
    for _ in range(2):
        train(parent, "all")
    child.inherit("mine", saved(parent))
    assert child.best == {}
    train(child, "all")
    assert child.best["row"]["step"] == 2


def test_a_parents_tensor_of_another_shape_is_refused_by_name():
    state = saved(session("all"))
    state["model"]["0.weight"] = torch.zeros(5, 3)
    with pytest.raises(UserError, match=r"the checkpoint's 0.weight is \(5, 3\)"):
        session("all").inherit("mine", state)


def test_a_damaged_checkpoint_that_is_further_does_not_stand_in_for_those_that_follow(tmp_path):
    run = runs.Run(tmp_path, "0" * 16)
    run.folder.mkdir()
    now = session("all")
    train(now, "all")
    checkpoint.save(run.path(1, 0), saved(now))
    for name in ("00003-0000000.finished.pt", "00002-0000001.pt", "00002-0000002.pt"):
        (run.folder / name).write_bytes(b"half")
    state, path = checkpoint.newest(run, 3)
    assert (path, len(state["history"])) == (run.path(1, 0), 1)

    with checkpoint.Writer(run, 3, {"run": run.name}, limit=float("inf")) as writer:
        for _ in range(2):
            train(now, "all")
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
