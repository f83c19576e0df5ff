"""The comparison of two experiments, as a user asks for it, in repositories whose experiments are written, not run."""

import json
import re
from pathlib import Path

from finetune.experiments import PREDICTIONS, Experiments
from helpers import changed_params, git, make_repository, predicted, run_forked, write_experiment

import pytest


def right(wrong: list[int], n: int = 20) -> list[bool]:
    """Return of n pictures that all but the given ones are right."""
    return [index not in wrong for index in range(n)]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A repository with two experiments of one seed, and two groups of three seeds."""
    folder = make_repository(tmp_path_factory.mktemp("compare") / "project")
    write_experiment(folder, "alex-one", {"lr": 0.5}, {"eval.acc": 0.8}, predicted(right([0, 1, 2, 3])))
    both = [*predicted(right([3])), *predicted(right([0]), "test", "test")]
    write_experiment(folder, "squeeze-one", {"lr": 0.5, "model_name": "squeezenet"}, {"eval.acc": 0.95}, both)
    for seed in range(3):
        write_experiment(folder, f"low-{seed}", {"seed": seed}, {}, predicted(right([seed, 10, 11, 12, 13, 14])))
        write_experiment(folder, f"high-{seed}", {"seed": seed, "lr": 0.7}, {}, predicted(right([19 - seed])))
    write_experiment(folder, "high-3", {"seed": 3, "lr": 0.7}, {}, predicted(right([])))
    write_experiment(folder, "unfinished", {"seed": 4})
    return folder


def compare(project: Path, *arguments: str, status: int = 0) -> list[str]:
    return run_forked(project, "compare", *arguments, status=status).splitlines()


def test_two_experiments_are_compared_picture_by_picture(project):
    lines = compare(project, "alex-one", "squeeze-one")
    assert [re.split(r"\s{2,}", line.strip()) for line in lines[:3]] == [
        ["alex-one", "squeeze-one"],
        ["model_name", "alexnet", "squeezenet"],
        ["accuracy", "0.8000 (16 of 20)", "0.9500 (19 of 20)"],
    ]
    assert lines[4] == (
        "squeeze-one is right on 3 pictures where alex-one is wrong, and wrong on 0 where alex-one is right: "
        "with 20 pictures this could be chance (p = 0.25)."
    )
    assert re.fullmatch(
        r"Accuracy of squeeze-one minus that of alex-one: \+15.0 points, 95 % interval [-+]\d+.0 to \+\d+.0.", lines[5]
    )
    assert lines[6] == "A difference below 30.0 points can't be told from chance here."  # six of 20
    assert lines[7].startswith("That is of two trained networks, not yet of their settings")
    assert len(lines) == 8


def test_the_pictures_on_which_they_differ(project):
    lines = compare(project, "alex-one", "low-0", "--alone", "--pictures")
    start = next(index for index, line in enumerate(lines) if line.startswith("picture"))
    assert [line.split() for line in lines[start:]] == [
        ["picture", "label", "alex-one", "low-0"],
        *(
            [f"val/{index}.jpg", *(["bees", "ants", "bees"] if index % 2 else ["ants", "bees", "ants"])]
            for index in (1, 2, 3)
        ),
        *(
            [f"val/{index}.jpg", *(["bees", "bees", "ants"] if index % 2 else ["ants", "ants", "bees"])]
            for index in range(10, 15)
        ),
    ]


def test_the_seeds_that_both_have_are_compared_seed_by_seed(project):
    lines = compare(project, "low-1", "high-0", "--pictures")
    assert [re.split(r"\s{2,}", line.strip()) for line in lines[:6]] == [
        ["low-1", "high-0"],
        ["lr", "0.001", "0.7"],
        ["seed 0", "0.7000", "0.9500"],
        ["seed 1", "0.7000", "0.9500"],
        ["seed 2", "0.7000", "0.9500"],
        ["mean", "0.7000 ± 0.0000", "0.9500 ± 0.0000"],
    ]
    assert lines[7].startswith(
        "high-0 is ahead of low-1 in 3 of 3 runs, and behind in 0: over 20 pictures and 3 runs each, "
    )
    assert lines[8].startswith("Accuracy of high-0 minus that of low-1: +25.0 points, 95 % interval ")
    assert "not compared, as the other side lacks their seed or fold: high-3" in lines
    pictures = [re.split(r"\s{2,}", line) for line in lines if line.startswith("val/")]
    assert pictures[0] == ["val/10.jpg", "ants", "0 of 3 right", "3 of 3 right"]
    assert pictures[-1] == ["val/19.jpg", "bees", "3 of 3 right", "2 of 3 right"]
    assert len(pictures) == 5 + 3 + 3


def test_json_has_it_all(project):
    told = json.loads("\n".join(compare(project, "low-0", "high-1", "--json")).partition("\nnot compared")[0])
    assert (told["split"], told["n"], told["settings"]) == ("val", 20, {"lr": [0.001, 0.7]})
    assert told["difference"] == pytest.approx(0.25)
    assert told["first"]["runs"]["seed 2"] == {"accuracy": 0.7, "experiments": ["low-2"]}
    assert "pictures" not in told
    told = json.loads("\n".join(compare(project, "alex-one", "squeeze-one", "--json", "--pictures")))
    assert (told["only_first"], told["only_second"], told["p"], told["differs"]) == (0, 3, 0.25, False)
    assert told["verdict"][0].endswith("this could be chance (p = 0.25).")
    assert told["pictures"][0] == {"path": "val/0.jpg", "label": "ants", "first": ["bees"], "second": ["ants"]}
    assert told["second"]["revision"] == git(project, "rev-parse", told["second"]["revision"]).strip()


def test_folds_pool_their_pictures(tmp_path):
    project = make_repository(tmp_path / "project", data__folds=3)
    for fold in range(3):
        for name, model, wrong in (("a", "alexnet", range(5)), ("s", "squeezenet", [])):
            said = [*predicted(right(wrong), f"fold-{fold}"), *predicted(right(wrong, 9), "test", "test")]
            write_experiment(project, f"{name}-{fold}", {"model_name": model, "data__fold": fold}, {}, said)
    lines = compare(project, "a-0", "s-1")
    assert [line.split()[0] for line in lines[:3]] == ["a-0", "model_name", "accuracy"]
    assert lines[2].split() == ["accuracy", "0.7500", "(45", "of", "60)", "1.0000", "(60", "of", "60)"]
    assert lines[4].startswith(
        "s-1 is right on 15 pictures where a-0 is wrong, and wrong on 0 where a-0 is right: with 60"
    )
    assert "The networks of the 3 folds share training pictures, so p is somewhat too small." in lines
    assert "error: they were not evaluated on the same pictures: none of 20 and 20 are in both." in compare(
        project, "a-0", "s-1", "--alone", status=1
    )
    on_test = compare(project, "a-0", "s-1", "--split", "test")  # whose pictures are the same in all folds
    assert [line.split()[:4] for line in on_test[2:5]] == [["seed", "0,", "fold", str(fold)] for fold in range(3)]


def test_the_same_settings_tell_what_a_seed_makes(project):
    lines = compare(project, "low-0", "low-1")
    assert lines[1].split() == ["seed", "0", "1"]
    assert lines[-1].startswith("Their settings are the same, seed and fold apart")
    (project / "sweeps").mkdir()
    assert compare(project / "sweeps", "low-0", "low-1") == lines


def test_another_commits_experiments_are_repeats_only_if_asked_for(tmp_path):
    project = make_repository(tmp_path / "project")
    for name, settings in (("a-0", {}), ("b-0", {"lr": 0.7})):
        write_experiment(project, name, settings, {}, predicted(right([])))
    git(project, "commit", "-q", "--allow-empty", "-m", "more")
    for name, settings in (("a-1", {"seed": 1}), ("b-1", {"seed": 1, "lr": 0.7})):
        write_experiment(project, name, settings, {}, predicted(right([])))
    assert not [line for line in compare(project, "a-0", "b-0") if line.startswith("seed 1")]
    lines = compare(project, "a-0", "b-0", "-A")
    assert [line.split()[1] for line in lines if line.startswith("seed")] == ["0", "1"]
    assert lines[-1].startswith("Two runs hardly tell")


def test_the_workspace_can_be_one_of_them(project, tmp_path):
    folder = tmp_path / "project"
    git(project, "worktree", "add", "-q", str(folder))
    (folder / ".dvc").symlink_to(project / ".dvc")
    assert "the workspace has no results/evaluate/predictions.csv" in compare(folder, "workspace", "low-0", status=1)[0]
    (folder / "params.yaml").write_bytes(changed_params(folder / "params.yaml", {"lr": 0.3}))
    (folder / "results/evaluate").mkdir(parents=True)
    rows = predicted(right([]))
    text = "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)])
    (folder / "results/evaluate/predictions.csv").write_text(text + "\n")
    lines = compare(folder, "low-0", "workspace")
    assert lines[1].split() == ["lr", "0.001", "0.3"]
    assert lines[4].startswith("workspace is right on 6 pictures where low-0 is wrong, and wrong on 0")
    assert "workspace is better (p = 0.031)." in lines[4]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["alex-one", "squeez-one"], "error: 'squeez-one' is neither an experiment nor a revision"),
        (["alex-one", "squeez-one"], "Nearest: squeeze-one"),
        (["alex-one", "alex-one"], "error: alex-one and alex-one are the same: name two experiments."),
        (["unfinished", "high-0"], "error: unfinished has no results/evaluate/predictions.csv: its stages did not"),
        (
            ["squeeze-one", "alex-one", "--split", "test"],
            "error: alex-one: there are no predictions of test, only of: val",
        ),
    ],
)
def test_what_can_be_mended_is_said(project, arguments, said):
    assert said in compare(project, *arguments, status=1)[0]


def test_a_repeat_whose_predictions_are_elsewhere_is_named_and_left_out(tmp_path):
    project = make_repository(tmp_path / "project")
    for seed in range(4):
        write_experiment(project, f"low-{seed}", {"seed": seed}, {}, predicted(right([seed, 9])))
        write_experiment(project, f"high-{seed}", {"seed": seed, "lr": 0.7}, {}, predicted(right([19 - seed])))
    experiments = Experiments(project)
    experiments.file(experiments.find("low-2"), PREDICTIONS).unlink()
    lines = compare(project, "low-0", "high-0")
    assert any(line.startswith(f"not compared: {PREDICTIONS} of low-2 is not in DVC's cache") for line in lines)
    assert [line.split()[:2] for line in lines if line.startswith("seed ")] == [["seed", each] for each in "013"]


def test_a_branch_with_a_slash_is_no_experiments_name(tmp_path):
    project = make_repository(tmp_path / "project")
    git(project, "branch", "feature/one")
    found = Experiments(project).find("feature/one")
    assert (found.name, found.baseline) == ("feature/one", "")


def test_predictions_that_are_elsewhere_are_an_error(tmp_path):
    project = make_repository(tmp_path / "project")
    write_experiment(project, "here", {}, {}, predicted([True] * 3))
    write_experiment(project, "elsewhere", {"lr": 0.7}, {}, predicted([True, True, False]))
    (lost,) = [each for each in (project / ".dvc/cache").rglob("*") if each.is_file() and "2.303" in each.read_text()]
    lost.unlink()
    said = compare(project, "here", "elsewhere", status=1)
    assert said[0] == "error: results/evaluate/predictions.csv of elsewhere is not in DVC's cache."
    assert "dvc exp pull origin elsewhere" in said[1]
