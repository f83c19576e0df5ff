"""Going on: a run that is killed ends as one that was not, to the bit; and what makes a run another one."""

import functools
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Literal, get_args, get_origin

import helpers
from finetune import checkpoint, params, runs
from helpers import (
    ROOT,
    Forked,
    copying,
    differences,
    preparing,
    results,
    run_forked,
    write_params,
    write_weights,
)

import numpy as np
import pytest
import torch

SEED = 0  # of the moments at which processes are killed
KILLS = 6  # at least, of each configuration
TRAINING = " parameters:"  # is printed before a run's first step
TINY = helpers.TINY | {
    "backbone__weights": "mine.pth",
    "num_epochs": 4,
    "batch_size": 4,
    "lr": 0.01,
    "momentum": 0.9,
}
NOISE = {"train/ants": 20, "train/bees": 21, "val/ants": 5, "val/bees": 6}


def started(folder: Path, script: str) -> subprocess.Popen:
    """Start the script as DVC does."""
    command = [sys.executable, ROOT / f"src/{script}.py"]
    with open(folder / "printed.txt", "wb") as file:
        return subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)


def epochs(printed: str) -> list[int]:
    """Return the numbers of the epochs that a process has trained."""
    return [int(number) for number in re.findall(r"^epoch (\d+)/\d+: ", printed, re.MULTILINE)]


# What comes of a run --------------------------------------------------------------------------------------------------


def evaluated(folder: Path) -> dict[str, str | bytes]:
    """Evaluate the model; return all that came of the run."""
    run_forked(folder, "evaluate")
    return results(folder)


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return preparing(lambda: tmp_path_factory.mktemp("prepared"), NOISE, TINY)


@pytest.fixture
def folders(prepared, tmp_path):
    return copying(prepared, tmp_path, TINY)


# Killed at any moment -------------------------------------------------------------------------------------------------


class Killer:
    """Kills what trains, at random moments of a life of that many seconds, and counts what it hit.

    After `most` kills it lets live: on a busy machine a life may be too short for a step.
    """

    def __init__(self, seed: int, life: float, most: float = math.inf):
        self.draw, self.life, self.most = np.random.default_rng(seed), life, most
        self.hits = Counter()

    def train(self, folder: Path, start=Forked, born: str = "") -> None:
        """Train in the folder until a process ends by itself. Each must have gone on from where it should.

        A life begins when `born` is printed.
        """
        said = 0  # epochs that one of the processes has reported
        killed = True
        while killed:
            saved = newest_whole(folder) or (0, 0)
            assert saved >= (said - 1, 0), "more than the epoch that was being saved is lost"
            process, writing = start(folder, "train"), self.hits["killed"] % 3 == 2
            while process.poll() is None and born not in (folder / "printed.txt").read_text():
                time.sleep(0.01)
            moment = self.draw.uniform(0, self.life / 2 if writing else self.life)
            if self.hits["killed"] >= self.most:
                moment = math.inf
            killed = self._kill(process, folder, moment, writing)
            printed = (folder / "printed.txt").read_text()
            assert killed or process.wait() == 0, printed
            trained = epochs(printed)
            assert trained == list(range(saved[0] + 1, saved[0] + 1 + len(trained)))
            if trained or not killed:
                assert went_on(printed) == saved
            said = max([said, *trained])
            if killed:
                self.hits["killed"] += 1
                self.hits["training"] += TRAINING in printed and not (folder / "models/model.safetensors").exists()
                self.hits["writing"] += bool(temporaries(folder))
                self.hits["within an epoch"] += (newest_whole(folder) or (0, 0))[1] > 0

    def _kill(self, process: Forked | subprocess.Popen, folder: Path, moment: float, writing: bool) -> bool:
        """Kill the process after `moment` seconds, or when it writes a checkpoint after that; tell if it was alive."""
        end = time.monotonic() + moment
        while process.poll() is None:
            if time.monotonic() >= end and (not writing or temporaries(folder)):
                process.kill()
                return process.wait() == -signal.SIGKILL
            time.sleep(0.001)
        return False


def temporaries(folder: Path) -> list[Path]:
    return list(folder.glob(".dvc/tmp/checkpoints/*/*.pt.tmp"))


def newest_whole(folder: Path) -> tuple[int, int] | None:
    """Return the epochs and steps of the furthest checkpoint of the folder's only run that is whole, or None."""
    found = runs.stored_runs(folder / ".dvc/tmp/checkpoints")
    assert len(found) <= 1
    for each in reversed([each for run in found for each in run.checkpoints()]):
        try:
            checkpoint.load(each.path)
        except checkpoint.Damaged:
            continue
        return each.epochs, each.steps
    return None


def went_on(printed: str) -> tuple[int, int]:
    """Return the epochs and steps after which a process says that it went on."""
    if "this run is finished, nothing to train: " in printed:
        return TINY["num_epochs"], 0
    found = re.search(r"^going on after (\d+) epochs and (\d+) steps: ", printed, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else (0, 0)


BATCH_NORM = {
    "model_name": "shufflenet_v2_x0_5",
    "batch_size": 8,
    "backbone__weights": "none",
    "backbone__trainable": "all",
}


EVERYTHING = {  # that keeps something from step to step, or draws something
    "keep": "best",
    "data__balance": "sampler",
    "backbone__trainable": 3,
    "backbone__unfreeze_epoch": 1,
    "backbone__unfreeze_every": 1,
    "backbone__batch_norm": "train",
    "head__kind": "concat_pool",
    "head__hidden": 16,
    "optimizer__name": "adamw",
    "optimizer__weight_decay": 0.1,
    "optimizer__l1": 0.0001,
    "optimizer__backbone_lr_scale": 0.1,
    "optimizer__layer_decay": 0.5,
    "optimizer__grad_clip": 1.0,
    "schedule__name": "sgdr",
    "schedule__warmup_epochs": 1.5,
    "schedule__cycle_epochs": 1,
    "augment__rotation": 10.0,
    "augment__color_jitter": 0.3,
    "augment__rand_augment_ops": 1,
    "augment__mixup": 0.4,
    "early_stopping__patience": 3,
    "checkpoint_minutes": 0.003,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"schedule__name": "step", "schedule__step_epochs": 2, "checkpoint_minutes": 0.0}, {"within an epoch"}),
        ({"schedule__name": "plateau", "schedule__patience": 0}, set()),
        (BATCH_NORM | {"schedule__name": "cosine", "checkpoint_minutes": 0.003}, {"within an epoch"}),
        (EVERYTHING, {"within an epoch"}),
        ],
    ids=["frozen, dropout, step, each batch saved", "frozen, dropout, plateau", "batch norm, cosine, within epochs",
         "everything, within epochs"],
)  # fmt: skip
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(settings, kinds, folders):
    reference = folders(**settings)
    began = time.monotonic()
    run_forked(reference)
    killer = Killer(SEED, time.monotonic() - began)
    expected = evaluated(reference)
    assert len({row["lr"]["head"] for row in checkpoint.load(reference / "models/checkpoint.pt")["history"]}) > 1
    print(f"killing at moments drawn with seed {SEED}, of a life of {killer.life:.2f} s")
    while killer.hits["killed"] < KILLS or not all(killer.hits[kind] for kind in kinds | {"training", "writing"}):
        assert killer.hits["killed"] < 10 * KILLS, killer.hits
        folder = folders(**settings)
        killer.train(folder)
        assert differences(evaluated(folder), expected) == []
    print(dict(killer.hits))


@pytest.mark.slow
def test_the_script_itself_killed_ends_as_one_that_was_not(folders):
    settings = {"checkpoint_minutes": 0.0}
    reference = folders(**settings)
    run_forked(reference)
    expected = evaluated(reference)
    killer = Killer(SEED, life=1.0, most=5)
    print(f"killing at moments drawn with seed {SEED}")
    while killer.hits["training"] < 2:
        assert killer.hits["killed"] < killer.most, killer.hits
        folder = folders(**settings)
        killer.train(folder, started, born=TRAINING)
        assert differences(evaluated(folder), expected) == []
    print(dict(killer.hits))


# Longer, shorter, again -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "sgdr"])
def test_more_epochs_go_on_from_fewer_and_end_as_if_asked_at_once(folders, schedule):
    settings = {"schedule__name": schedule, "schedule__cycle_epochs": 1}
    folder, at_once = folders(num_epochs=2, **settings), folders(num_epochs=4, **settings)
    assert epochs(run_forked(folder)) == [1, 2]
    write_params(folder, **TINY | settings | {"num_epochs": 4})
    printed = run_forked(folder)
    assert (went_on(printed), epochs(printed)) == ((2, 0), [3, 4])
    run_forked(at_once)
    assert differences(evaluated(folder), evaluated(at_once)) == []


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_fewer_epochs_end_as_if_more_had_never_been_asked(folders, killed):
    folder, alone = folders(num_epochs=4, checkpoint_minutes=0.0), folders(num_epochs=2)
    process = Forked(folder, "train")
    while process.poll() is None:
        if killed and "epoch 3/4: " in (folder / "printed.txt").read_text():
            process.kill()
        time.sleep(0.002)
    assert process.wait() == (-signal.SIGKILL if killed else 0)

    write_params(folder, **TINY | {"num_epochs": 2})
    assert set(epochs(run_forked(folder))) <= {1, 2}
    run_forked(alone)
    assert differences(evaluated(folder), evaluated(alone)) == []

    write_params(folder, **TINY | {"num_epochs": 4})
    assert epochs(run_forked(folder)) in ([], [4], [3, 4])


@pytest.mark.slow
def test_with_cosine_a_longer_run_is_another_run(folders):
    folder = folders(num_epochs=1, schedule__name="cosine")
    run_forked(folder)
    write_params(folder, **TINY | {"num_epochs": 2, "schedule__name": "cosine"})
    assert epochs(run_forked(folder)) == [1, 2]


@pytest.mark.slow
def test_a_finished_run_asked_again_trains_nothing_wherever_it_is_asked(folders, tmp_path):
    (tmp_path / "store").mkdir()
    place = {"CHECKPOINTS_DIR": str(tmp_path / "store")}
    first, second, anew = (folders(num_epochs=2) for _ in range(3))
    assert epochs(run_forked(first, **place)) == [1, 2]
    expected = evaluated(first)
    for folder in (first, second):
        printed = run_forked(folder, **place)
        assert "this run is finished, nothing to train: " in printed
        assert epochs(printed) == []
        assert differences(evaluated(folder), expected) == []
    assert not (second / ".dvc/tmp/checkpoints").exists()

    # Settings that the result does not follow from.
    others = {"checkpoint_minutes": 1.0, "schedule__patience": 9}
    others["device"] = "cpu" if torch.cuda.is_available() else "auto"
    write_params(second, **TINY | {"num_epochs": 2} | others)
    assert epochs(run_forked(second, **place)) == []

    write_params(anew, **TINY | {"num_epochs": 2, "resume": "never"})
    assert epochs(run_forked(anew, **place)) == [1, 2]
    assert differences(evaluated(anew), expected) == []


@pytest.mark.slow
def test_other_pictures_weights_or_settings_make_another_run(folders):
    folder = folders(num_epochs=1)
    assert epochs(run_forked(folder)) == [1]
    write_params(folder, **TINY | {"num_epochs": 1, "lr": 0.02})
    assert epochs(run_forked(folder)) == [1]
    write_params(folder, **TINY | {"num_epochs": 1})
    assert epochs(run_forked(folder)) == []

    shutil.copy(folder / "pictures/train/bees/0.png", folder / "pictures/train/ants/0.png")
    run_forked(folder, "prepare")
    assert epochs(run_forked(folder)) == [1]

    write_weights(folder, "squeezenet", seed=1)
    run_forked(folder, "backbone")
    assert epochs(run_forked(folder)) == [1]
    assert len(runs.stored_runs(folder / ".dvc/tmp/checkpoints")) == 4


# What a run's identity is made of -------------------------------------------------------------------------------------


def another(key: str, value):
    """Return another valid value of a setting."""
    kind = functools.reduce(lambda section, name: section.model_fields[name].annotation, key.split("."), params.Params)
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    if isinstance(value, str):
        return "cpu" if key == "device" else "other"
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value / 2 or 0.25


def run_id(settings: dict[str, object] | None = None, **other) -> str:
    """Return the id of a run with the project's settings but those given, as in {"data.image_size": 32}."""
    chosen = params.load(ROOT / "params.yaml").model_dump()
    for key, value in (WITH_ALL_GROUPS | (settings or {})).items():
        *group, name = key.split(".")
        (chosen[group[0]] if group else chosen)[name] = value
    known = {
        "store_files": {"pixels.bin": {"sha256": "a", "bytes": 1}},
        "classes": ["ants", "bees"],
        "backbone": {"model_name": "alexnet", "digest": "b"},
        "arithmetic": ["cpu", "fp32"],
        "parent": None,
    }
    return runs.run_id(runs.identity(params.Params.model_validate(chosen), **known | other))


def flat(settings: dict, prefix: str = "") -> dict[str, object]:
    """Return {"data.image_size": 224} for {"data": {"image_size": 224}}."""
    found = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


SETTINGS = flat(params.load(ROOT / "params.yaml").model_dump())
WITH_ALL_GROUPS = {"backbone.trainable": "all", "data.folds": 5}  # so that other settings have something to say
USUAL = {"momentum", "augment.min_scale"}
CYCLE = {"schedule.cycle_epochs", "schedule.low"}
USED = [  # settings of which some have a say only where another one says so; and which these are
    ({}, USUAL),
    ({"schedule.name": "step"}, USUAL | {"schedule.gamma", "schedule.step_epochs"}),
    ({"schedule.name": "plateau"}, USUAL | {"schedule.gamma", "schedule.patience"}),
    ({"schedule.name": "cosine"}, USUAL | {"num_epochs"}),
    ({"schedule.name": "sgdr"}, USUAL | {"schedule.cycle_epochs", "schedule.cycle_mult"}),
    ({"schedule.name": "triangular"}, USUAL | CYCLE),
    ({"schedule.name": "triangular2"}, USUAL | CYCLE),
    ({"schedule.name": "exp_range"}, USUAL | CYCLE | {"schedule.gamma"}),
    ({"schedule.name": "one_cycle"}, USUAL | {"schedule.low", "schedule.pct_start", "num_epochs"}),
    ({"optimizer.name": "rmsprop"}, USUAL),
    ({"optimizer.name": "adamw"}, USUAL - {"momentum"}),
    ({"augment.crop": "center"}, USUAL - {"augment.min_scale"}),
    ({"augment.rand_augment_ops": 2}, USUAL | {"augment.rand_augment_magnitude"}),
    ({"head.kind": "concat_pool"}, USUAL | {"head.hidden", "head.dropout"}),
    ({"early_stopping.patience": 2}, USUAL | {"early_stopping.min_delta"}),
]
CONDITIONAL = set().union(*(keys for _, keys in USED))
ASIDE = runs.ASIDE | {f"{group}.{name}" for group, names in runs.ASIDE_IN_GROUPS.items() for name in names}
ASIDE |= {"evaluate.tta", "evaluate.gallery"}


@pytest.fixture
def _same_code(monkeypatch):
    """Have the code's digests, which take their time, be left out."""
    monkeypatch.setattr(runs, "code_digests", dict)


@pytest.mark.usefixtures("_same_code")
@pytest.mark.parametrize("key", sorted(SETTINGS.keys() - CONDITIONAL))
def test_a_setting_makes_another_run_unless_the_result_does_not_follow_from_it(key):
    value = (SETTINGS | WITH_ALL_GROUPS)[key]
    assert (run_id({key: another(key, value)}) == run_id()) == (key in ASIDE)


@pytest.mark.usefixtures("_same_code")
@pytest.mark.parametrize(("settings", "used"), USED, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_setting_of_one_kind_makes_another_run_where_that_kind_is_chosen(settings, used):
    changed = {key for key in CONDITIONAL if run_id(settings | {key: another(key, SETTINGS[key])}) != run_id(settings)}
    assert changed == used


def test_what_is_aside_are_settings():
    assert SETTINGS.keys() >= (ASIDE - {"evaluate"}) | CONDITIONAL


@pytest.mark.parametrize(
    "other",
    [
        {"store_files": {"pixels.bin": {"sha256": "c", "bytes": 1}}},
        {"classes": ["ants", "wasps"]},
        {"backbone": {"model_name": "alexnet", "digest": "c"}},
        {"backbone": {"model_name": "vgg11", "digest": "b"}},
        {"arithmetic": ["cuda", "fp32"]},
        {"arithmetic": ["cpu", "bf16"]},
        {"parent": {"run": "d", "epochs": 2}},
    ],
)
def test_other_data_weights_devices_and_parents_make_another_run(other):
    assert run_id(**other) != run_id()


def test_the_parents_epochs_count():
    assert run_id(parent={"run": "d", "epochs": 2}) != run_id(parent={"run": "d", "epochs": 3})


def test_another_version_of_torch_makes_another_run(monkeypatch):
    before = run_id()
    monkeypatch.setattr(runs, "version", lambda name: "99")
    assert run_id() != before


CODE = '''
def scale(x):  # by a lot
    """Return x, scaled."""
    return x * 3
'''


@pytest.mark.parametrize(
    ("source", "same"),
    [
        (CODE.replace("  # by a lot", ""), True),
        (CODE.replace("    return x * 3", "\n\n    # it is\n    return (\n        x * 3\n    )"), True),
        (CODE.replace("3", "4"), False),
        (CODE.replace("x * 3", "3 * x"), False),
        (CODE.replace("scale", "shrink"), False),
    ],
)
def test_comments_and_layout_of_the_code_do_not_count(source, same):
    assert (runs.code_digest(source) == runs.code_digest(CODE)) is same


def test_the_code_that_trains_counts(monkeypatch):
    assert run_id() == run_id()
    digests = runs.code_digests()
    assert {"finetune/runs.py", "finetune/checkpoint.py", "finetune/params.py"} <= digests.keys()
    before = run_id()
    monkeypatch.setattr(runs, "code_digests", lambda: digests | {"finetune/checkpoint.py": "changed"})
    assert run_id() != before
