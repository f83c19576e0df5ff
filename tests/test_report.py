"""The report: what it says of experiments, the command line, and the page in a browser, where there is one."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from finetune import comparison, repeats, reports
from finetune.comparison import Predictions
from finetune.experiments import PREDICTIONS, Experiment, Experiments
from finetune.reports import Record
from helpers import ROOT, as_user, dvc, git, make_repository, predicted, run_forked, write_experiment
from report import QUEUE_LINE

import numpy as np
import pytest
from PIL import Image
from scipy import stats

HEAD = "a" * 40
BASELINE = {"lr": 0.001, "momentum": 0.9, "resume": "auto", "backbone.trainable": "head"}
ODD = """</script><img src=x onerror=alert(1)>&amp;'"🐝"""  # no name of git's, and yet


def experiment(name: str = "a", metrics: dict | None = None, baseline: str = HEAD, **settings) -> Experiment:
    settings = BASELINE | {key.replace("__", "."): value for key, value in settings.items()}
    return Experiment(
        name, name.encode().hex().ljust(40, "0")[:40], baseline, "2030-01-01", settings, metrics or {}, {}
    )


def predictions(right: str, folder: str = "val") -> Predictions:
    """Return predictions that are right where there is a 1."""
    labels = np.array(["ants"] * len(right))
    answers = np.array(["ants" if each == "1" else "bees" for each in right])
    return Predictions(tuple(f"{folder}/{index}" for index in range(len(right))), labels, answers)


@pytest.mark.parametrize(
    ("settings", "differing", "common"),
    [
        ([], [], {}),
        ([{"a": 1}], [], {"a": 1}),
        ([{"a": 1, "b": [1]}, {"a": 2, "b": [1]}], ["a"], {"b": [1]}),
        ([{"a": 1}, {"a": 1, "b": None}], ["b"], {"a": 1}),
    ],
)
def test_settings_that_differ_are_columns(settings, differing, common):
    assert reports.split(settings) == (differing, common)


def test_the_best_is_first_and_what_has_no_results_last():
    ranks = {
        "lower loss": {"eval.acc": 0.9, "eval.loss": 0.3},
        "higher loss": {"eval.acc": 0.9, "eval.loss": 0.4, "val_acc": 1.0},
        "not evaluated": {"val_acc": 0.8},
        "worse": {"eval.acc": 0.7},
        "nothing": {},
        "not a number": {"eval.acc": float("nan")},
    }
    records = [Record(experiment(name, metrics)) for name, metrics in ranks.items()]
    shown = reports.contents(records[::-1], {}, HEAD)["experiments"]
    assert [each["name"] for each in shown][:4] == list(ranks)[:4]
    assert "metrics" in shown[3]
    assert all(set(each.get("metrics", [None])) == {None} for each in shown[4:])


COMMANDS = {  # experiment, files that its commit changed → the lines
    "the baseline": (experiment(), [], ["dvc exp run"]),
    "what differs": (
        experiment(lr=0.1, backbone__trainable=["layer3", "layer4"]),
        [],
        ["dvc exp run -S lr=0.1 -S 'backbone.trainable=[layer3,layer4]'"],
    ),
    "new": (experiment(mixup=0.2), [], ["dvc exp run -S +mixup=0.2"]),
    "another commit": (
        experiment(baseline="b" * 40, momentum=0),
        [],
        [f"git checkout {'b' * 10}", "dvc exp run -S momentum=0"],
    ),
    "changed code": (
        experiment("a"),
        ["src/my train.py"],
        ["git checkout 6100000000 -- 'src/my train.py'", "dvc exp run"],
    ),
    "on top of another": (
        experiment(metrics={"continues": "fishy-bish"}, resume="last"),
        [],
        ["dvc exp run -S resume=fishy-bish"],
    ),
    "on top of a run without a name": (
        experiment(metrics={"continues": "0123456789abcdef"}, resume="last"),
        [],
        ["dvc exp run -S resume=last"],
    ),
    "a branch": (experiment(baseline=""), [], ["git checkout 6100000000", "dvc repro"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_that_runs_it_again(name):
    case, changed, lines = COMMANDS[name]
    baseline = BASELINE if case.baseline else None
    assert reports.reproduction(Record(case, changed=changed), baseline, HEAD) == lines


def test_what_cannot_be_told_from_the_best_is_marked():
    best = Record(experiment("best", {"eval.acc": 0.9}), predictions=predictions("1" * 36 + "0" * 4))
    others = {
        "equal": (0.85, predictions("0" * 2 + "1" * 34 + "0" * 4)),
        "worse": (0.5, predictions("0" * 16 + "1" * 20 + "0" * 4)),
        "of other pictures": (0.4, predictions("1" * 16 + "0" * 24, "other")),
        "unknown": (0.3, None),
    }
    records = [best, *(Record(experiment(name, {"eval.acc": acc}), predictions=p) for name, (acc, p) in others.items())]
    found = reports.contents(records, {}, HEAD)["experiments"]
    assert [each.get("equal") for each in found] == [None, True, False, None, None]
    assert found[0]["of"] == found[1]["of"] != found[3]["of"]


def test_the_page_is_told_what_repeats_what():
    def evaluated(name: str, metrics: dict | None = None, code: str = "ab", **settings) -> Experiment:
        stages = {"evaluate": {"deps": {"src/evaluate.py": code}, "outs": {PREDICTIONS: "cd"}}}
        return dataclasses.replace(experiment(name, metrics, **settings), stages=stages)

    records = [
        Record(evaluated("a", seed=1, data__fold=2, data__folds=3)),
        Record(evaluated("its repeat", seed=2, device="cuda", data__folds=3)),
        Record(evaluated("of other code", code="cd", data__folds=3)),
        Record(evaluated("longer", {"continues": "a"}, data__folds=3)),
        Record(evaluated("other settings")),
        Record(dataclasses.replace(evaluated("of another commit"), baseline="b" * 40)),
        Record(dataclasses.replace(evaluated("a branch"), baseline="")),
        Record(experiment("not evaluated")),
        Record(evaluated("failed"), "failed"),
    ]
    found = reports.grouped(records)
    assert [each["alike"] for each in found] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert [each.get("group") for each in found] == [0, 0, 1, None, 2, 3, None, None, None]
    assert [each.get("repeat") for each in found[:5]] == [(1, 2), (2, 0), (0, 0), None, (0, 0)]
    assert [each.get("folds") for each in found[:5]] == [True, True, True, None, None]


def test_the_curves_of_different_lengths_have_a_row_an_epoch(tmp_path):
    (tmp_path / "acc.tsv").write_text("step\tacc\n0\t0.5\n1\t0.75\n")
    (tmp_path / "loss.tsv").write_text("step\tloss\n1\t0.25\n")
    files = {name: tmp_path / f"{name}.tsv" for name in ("acc", "loss")}
    assert reports.epochs(files) == {"step": [0, 1], "acc": [0.5, 0.75], "loss": [None, 0.25]}


def test_pictures_are_embedded_of_the_best_as_far_as_there_is_room(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (500, 2000, 3), np.uint8)).save(tmp_path / "noise.png")
    (tmp_path / "broken.png").write_text("not a picture")
    files = {"noise": tmp_path / "noise.png", "broken": tmp_path / "broken.png"}
    (first,) = reports.Pictures(2, 10**6).embedded(files)
    assert first["name"] == "noise"
    assert first["src"].startswith("data:image/webp;base64,")
    of_two = reports.Pictures(2, 10**7)
    assert [len(of_two.embedded(files)) for _ in range(3)] == [1, 1, 0]
    within = reports.Pictures(9, len(first["src"]) + 1)
    assert [len(within.embedded(files)) for _ in range(2)] == [1, 0]
    assert within.room == 1
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    too_small = reports.Pictures(9, 1000)
    assert too_small.embedded(files) == too_small.embedded({"small": tmp_path / "small.png"}) == []
    (small,) = reports.Pictures(9, 1000).embedded({"small": tmp_path / "small.png"})
    assert small["src"].startswith("data:image/png;base64,")


# The command line ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with experiments of two commits, and one in DVC's queue."""
    folder = make_repository(tmp_path_factory.mktemp("report") / "project")
    write_experiment(folder, "older", metrics={"val_acc": 0.5})
    (folder / "note").write_text("")
    git(folder, "add", "note")
    git(folder, "commit", "-qm", "another")
    rows = predicted([True] * 9 + [False])
    epochs = [{"val_acc": 0.7, "lr": 0.1}, {"val_acc": 0.9, "lr": 0.1}]
    write_experiment(folder, "good", {"lr": 0.1}, {"val_acc": 0.9, "eval.acc": 0.9}, rows, epochs)
    write_experiment(
        folder, "mine-000", {"lr": 0.2}, {"val_acc": 0.8, "eval.acc": 0.8}, predicted([True] * 8 + [False] * 2)
    )
    write_experiment(folder, "mine-001-2", {"lr": 0.3}, {"val_acc": 0.7, "eval.acc": 0.7})
    return folder


def report(folder: Path, *arguments: str, status: int = 0) -> str:
    """Run the script; return what it printed."""
    command = [sys.executable, str(ROOT / "src/report.py"), *arguments]
    result = subprocess.run(command, cwd=folder, env=as_user(folder), capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    return result.stdout + result.stderr


def shown_in(file: Path) -> dict:
    """Return what a page holds."""
    text = file.read_text(encoding="utf-8")
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


def test_experiments_are_chosen(repository, tmp_path):
    def names(*arguments: str) -> list[str]:
        report(repository, *arguments, "-o", str(tmp_path / "a.html"))
        return [each["name"] for each in shown_in(tmp_path / "a.html")["experiments"]]

    assert names() == ["good", "mine-000", "mine-001-2"]
    assert names("-A") == ["good", "mine-000", "mine-001-2", "older"]
    assert names("mine-001-2", "older") == ["mine-001-2", "older"]
    assert names("--sweep", "mine") == ["mine-000", "mine-001-2"]
    assert "Nearest: mine" in report(repository, "--sweep", "mined", status=1)
    assert "Nearest: good" in report(repository, "goood", status=1)


def test_the_page_is_written_where_git_ignores_it(repository):
    assert report(repository).startswith("results/report.html: 3 experiments, 0.")
    shown = shown_in(repository / "results/report.html")
    (good, *_) = shown["experiments"]
    assert shown["params"] == ["lr"]
    assert good["epochs"] == {"step": [0, 1], "val_acc": [0.7, 0.9], "lr": [0.1, 0.1]}
    assert good["command"] == ["dvc exp run -S lr=0.1"]
    assert "/results/report.html" in (ROOT / ".gitignore").read_text().split()


def test_what_the_cache_lacks_is_said_and_the_rest_is_shown(repository, tmp_path):
    folder = shutil.copytree(repository, tmp_path / "copy")
    good = Experiments(folder).find("good")
    Experiments(folder).file(good, "results/evaluate/predictions.csv").unlink()
    next(iter(Experiments(folder).files(good, "results/train/plots").values())).write_text("nothing\n\n")
    report(folder)
    shown = shown_in(folder / "results/report.html")["experiments"][0]
    assert shown["name"] == "good"
    assert "epochs" not in shown
    curves, missing = shown["missing"]
    assert curves.startswith("results/train/plots of good can't be read")
    assert "`dvc exp pull origin good` fetches it" in missing


def test_nothing_to_report_says_why(tmp_path):
    folder = make_repository(tmp_path / "project")
    assert "there is no experiment yet" in report(folder, status=1)
    write_experiment(folder, "older")
    git(folder, "commit", "-qm", "another", "--allow-empty")
    assert "-A takes those of all commits (1)" in report(folder, status=1)
    assert not (folder / "results/report.html").exists()


def test_what_differs_in_code_is_named(repository, tmp_path):
    folder = shutil.copytree(repository, tmp_path / "copy")
    (folder / "note").write_text("changed")
    git(folder, "commit", "-qam", "as an experiment's commit has it")
    head = git(folder, "rev-parse", "HEAD~").strip()
    git(folder, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/changed", "HEAD")
    git(folder, "reset", "-q", "--hard", head)
    report(folder)
    changed = {each["name"]: each.get("changed") for each in shown_in(folder / "results/report.html")["experiments"]}
    assert changed == {"good": None, "mine-000": None, "mine-001-2": None, "changed": ["note"]}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("abc1234  later   04:01 PM      Queued", ("abc1234", "later", "Queued")),
        ("abc1234  later   Nov 21, 2025  Failed", ("abc1234", "later", "Failed")),
        ("abc1234          Nov 21, 2025  Queued", ("abc1234", None, "Queued")),
        ("abc1234          11:01 AM      Running", ("abc1234", None, "Running")),
    ],
)
def test_a_line_of_the_queues_status_is_read(line, expected):
    assert QUEUE_LINE.fullmatch(line).groups() == expected


@pytest.mark.slow
def test_queued_experiments_are_listed_with_their_settings(repository, tmp_path):
    folder = shutil.copytree(repository, tmp_path / "copy")
    (folder / "dvc.yaml").write_text("stages: {nothing: {cmd: 'true', params: [lr]}}")
    git(folder, "add", "-f", "dvc.yaml")
    git(folder, "commit", "-qm", "a pipeline")
    dvc(folder, "exp", "run", "--queue", "-n", "later", "-S", "lr=0.5")
    report(folder)
    (later,) = shown_in(folder / "results/report.html")["experiments"]
    assert (later["name"], later["state"]) == ("later", "queued")
    assert later["command"] == ["dvc exp run -S lr=0.5"]
    assert "metrics" not in later
    assert "-A takes" not in report(folder, "later")


# In a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=found)
        except playwright.Error:
            if found:
                raise
            pytest.skip(f"no browser: none of {', '.join(names)} is on PATH, nor Playwright's own")
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """A function that opens a page, and fails the test where the page complains or asks for anything."""
    complaints = []

    def open_page(shown: dict, **options):
        file = tmp_path / "report.html"
        file.write_text(
            reports.page({"project": ODD, "scope": "", "made": "2030-01-01T00:00"} | shown), encoding="utf-8"
        )
        page = browser.new_page(**{"viewport": {"width": 1440, "height": 900}} | options)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(file.as_uri())
        return page

    yield open_page
    assert complaints == []


def made_up(count: int, epochs: int = 20, pictures: int = 153, files: dict[str, Path] | None = None) -> list[Record]:
    """Return records of experiments that nobody ran, worse from one to the next on average."""
    rng = np.random.default_rng(0)
    keys, labels = tuple(f"val/{index}.jpg" for index in range(pictures)), np.array(["ants"] * pictures)
    records = []
    for number in range(count):
        right = rng.random(pictures) > 0.05 + 0.4 * number / count
        settings = {"lr": float(f"{10 ** rng.uniform(-4, -1):.3g}"), "head.kind": ("linear", "concat_pool")[number % 2]}
        metrics = {
            "eval.acc": right.mean(),
            "eval.loss": 1 - right.mean(),
            "val_loss": rng.random(),
            "training_time": 3.0,
        }
        curves = {
            name: list(rng.random(epochs)) for name in ("loss", "acc", "val_loss", "val_acc", "lr", "training_time")
        }
        one = experiment(f"made-{number:03}", {name: float(value) for name, value in metrics.items()}, **settings)
        answers = np.where(right, "ants", "bees")
        records.append(
            Record(
                one, "finished", {"step": [*range(epochs)]} | curves, Predictions(keys, labels, answers), files or {}
            )
        )
    return records


def test_the_page_sorts_filters_and_shows_epochs(opened):
    records = [*made_up(12), Record(experiment(ODD, lr=0.5), "queued"), Record(experiment("bad", lr=0.25), "failed")]
    page = opened(reports.contents(records, {HEAD: BASELINE}, HEAD))
    names = lambda: page.locator("tbody th .open").all_inner_texts()  # noqa: E731
    values = lambda column: [float(each.metrics[column]) for each in map(by_name.get, names()[:12])]  # noqa: E731
    by_name = {each.experiment.name: each.experiment for each in records}
    assert values("eval.acc") == sorted(values("eval.acc"), reverse=True)
    assert set(names()[12:]) == {ODD, "bad"}  # text, and never markup
    assert page.locator(".badge.queued").count() == page.locator(".badge.failed").count() == 1
    assert page.locator(".badge.best").count() == 1

    header = page.locator("thead th[data-name=val_loss]")
    header.locator("button").focus()
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    assert values("val_loss") == sorted(values("val_loss"))
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert values("val_loss") == sorted(values("val_loss"), reverse=True)

    page.fill("#filter", "linear eval.acc>0.8")
    expected = {
        e.name for e in by_name.values() if e.settings.get("head.kind") == "linear" and e.metrics["eval.acc"] > 0.8
    }
    assert set(names()) == expected
    assert 0 < len(expected) < 12
    page.fill("#filter", "")

    twist = page.locator(".twist").first
    twist.focus()
    page.keyboard.press("Enter")
    assert twist.get_attribute("aria-expanded") == "true"
    assert page.locator("tr.epochs tbody tr").count() == 20
    page.keyboard.press("Enter")
    assert page.locator("tr.epochs").count() == 0


DRAWN = """canvas => {
    const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    return new Set(new Uint32Array(data.buffer)).size;
}"""  # how many colours there are


def test_the_plots_are_drawn_and_follow_the_filter(opened):
    page = opened(reports.contents(made_up(12), {HEAD: BASELINE}, HEAD))
    plots = {name: page.locator(f"#{name} .chart canvas") for name in ("curves", "parallel", "scatter")}
    for plot in plots.values():
        assert plot.evaluate(DRAWN) > 20
    before = {name: plot.evaluate("canvas => canvas.toDataURL()") for name, plot in plots.items()}
    page.fill("#filter", "concat_pool")
    assert all(plot.evaluate("canvas => canvas.toDataURL()") != before[name] for name, plot in plots.items())
    assert "of 6 experiments" in plots["scatter"].get_attribute("aria-label")


def test_details_and_comparisons_say_what_python_says(opened, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "roc.png")
    records = made_up(6, files={"roc": tmp_path / "roc.png"})
    page = opened(reports.contents(records, {HEAD: BASELINE}, HEAD), color_scheme="dark")
    ordered = sorted(records, key=Record.rank)
    for first, second in ((0, 1), (1, 5), (5, 0), (2, 3)):
        page.select_option("select[aria-label='first experiment']", str(first))
        page.select_option("select[aria-label='second experiment']", str(second))
        pair = [ordered[index] for index in (first, second)]
        said = comparison.sentence(
            *(each.experiment.name for each in pair), comparison.compare(*(each.predictions for each in pair))
        )
        assert page.locator("#compared .says").inner_text().split("\n")[0] == said

    page.locator("tbody .open").nth(2).press("Enter")
    dialog = page.locator("#details")
    assert dialog.locator("h2").inner_text().startswith(ordered[2].experiment.name)
    settings = ordered[2].experiment.settings
    command = f"dvc exp run -S lr={settings['lr']} -S +head.kind={settings['head.kind']}"
    assert dialog.locator("pre").inner_text() == command
    assert dialog.locator("img").evaluate("img => img.decode().then(() => img.naturalWidth)") == 40
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


@pytest.fixture(scope="module")
def repeated(tmp_path_factory) -> Path:
    """A repository with groups of experiments: of seeds, of folds, and of both."""
    folder = make_repository(tmp_path_factory.mktemp("repeated") / "project")
    rng, created = np.random.default_rng(1), iter(range(10**9, 2 * 10**9))

    def write(
        name: str, better: float, pictures: int = 153, fold: int = 0, seed: int = 0, continues: str = "", **settings
    ) -> None:
        hardness = np.random.default_rng(fold).normal(1, 1, pictures)
        right = hardness + better + rng.normal(0, 0.3) + rng.normal(0, 1, pictures) > 0
        settings |= {"seed": seed, "data__fold": fold}
        rows = predicted([bool(each) for each in right], f"fold-{fold}")
        metrics = {"eval.acc": float(right.mean())} | ({"continues": continues} if continues else {})
        write_experiment(folder, name, settings, metrics, rows, created=next(created))

    for seed in (0, 1, 2, 3, 4):
        write(f"low-{seed}", 0, seed=seed)
    write("high-2-older", -3, seed=2, lr=0.7)
    for seed in (4, 3, 2, 1, 0, 7):
        write(f"high-{seed}", 1.2, seed=seed, lr=0.7)
    for seed in (0, 1):
        write(f"few-{seed}", 0.2, seed=seed, lr=0.8)
        write(f"longer-{seed}", 0.2, seed=seed, continues="low-0", lr=0.9)
    for fold in range(3):
        write(f"alex-{fold}", 0, 50 + fold, fold, data__folds=3)
        write(f"squeeze-{fold}", 0.5, 50 + fold, fold, data__folds=3, model_name="squeezenet")
        for seed in (1, 2, 3):
            if (seed, fold) != (2, 1):
                write(f"alex-{fold}-{seed}", 0, 50 + fold, fold, seed, data__folds=3)
            write(f"dense-{fold}-{seed}", 0.2, 50 + fold, fold, seed, data__folds=3, model_name="densenet121")
    return folder


@pytest.fixture(scope="module")
def of_repeated(repeated) -> dict:
    report(repeated)
    return shown_in(repeated / "results/report.html")


def said_by_script(folder: Path, *arguments: str) -> str:
    printed = run_forked(folder, "compare", *arguments, "--json")
    return "\n".join(json.loads(printed[printed.index("{") : printed.rindex("}") + 1])["verdict"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "same_pictures", "over"),
    [
        ("low-1", "high-0", True, "Over 5 seeds of each"),
        ("high-3", "low-2", True, "Over 5 seeds of each"),
        ("low-1", "high-2-older", True, "Over 5 seeds of each"),  # in place of high-2, which is newer
        ("low-1", "few-0", True, "Over 2 seeds of each"),
        ("high-0", "high-1", True, ""),
        ("low-1", "longer-1", True, ""),  # which are on top of another
        ("alex-0", "squeeze-0", True, "Over 3 folds of each"),
        ("alex-1", "squeeze-2", False, "Over 3 folds of each"),
        ("alex-1-1", "dense-1-2", True, "Over 2 seeds and 3 folds of each"),  # seed 2 lacks a fold of alex
        ("squeeze-0", "dense-0-1", True, ""),  # no seed in common
        ("low-0", "squeeze-1", False, ""),
    ],
)
def test_two_experiments_are_compared_as_the_script_does(
    opened, repeated, of_repeated, first, second, same_pictures, over
):
    page = opened(of_repeated)
    page.select_option("select[aria-label='first experiment']", label=first)
    page.select_option("select[aria-label='second experiment']", label=second)
    says = page.locator("#compared .says").all_inner_texts()
    assert len(says) == 1 + bool(over)
    if same_pictures:
        assert says[0] == said_by_script(repeated, first, second, "--alone")
    else:
        assert says[0] == "They were not evaluated on the same pictures."
    if over:
        assert says[1] == said_by_script(repeated, first, second)
        assert page.locator(".verdicts > div > p:first-child").all_inner_texts() == [
            "The two trained networks alone",
            over,
        ]
    elif same_pictures:
        assert says[0] == said_by_script(repeated, first, second)


@pytest.mark.slow
def test_the_repeats_that_are_left_out_are_named(opened, of_repeated):
    page = opened(of_repeated)
    page.select_option("select[aria-label='first experiment']", label="low-0")
    page.select_option("select[aria-label='second experiment']", label="high-0")
    said = "Not compared, as the other side lacks their seed or fold: high-7."
    assert page.locator("#compared .verdicts").get_by_text(said, exact=True).count() == 1


# The page's statistics, which are Python's once more ------------------------------------------------------------------


def test_students_t_is_that_of_scipy(opened):
    page = opened(reports.contents(made_up(2), {}, HEAD))
    cases = [(t, df) for t in (0, 1e-6, 0.3, 1, 2.2, 5, 40) for df in (1, 1.4, 2, 3.7, 10, 153.2, 5000, 1e5)]
    found = page.evaluate("cases => cases.map(([t, freedom]) => student(t, freedom))", cases)
    assert found == pytest.approx([2 * stats.t.sf(t, df) for t, df in cases], rel=1e-8, abs=1e-300)
    levels = [(level, df) for level in (0.5, 0.05, 0.001) for df in (1, 1.4, 2, 3.7, 10, 153.2, 5000, 1e5)]
    found = page.evaluate("levels => levels.map(([level, freedom]) => studentBeyond(level, freedom))", levels)
    assert found == pytest.approx([stats.t.isf(level / 2, df) for level, df in levels], rel=1e-8)


def test_comparisons_of_two_are_those_of_python(opened):
    page = opened(reports.contents(made_up(2), {}, HEAD))
    rng = np.random.default_rng(0)
    counts = [
        (1, 0, 1),
        (3, 0, 0),
        (8, 8, 0),
        (16, 0, 4),
        (153, 0, 0),
        (153, 5, 10),
        (2500, 3, 0),
        (50_000, 2900, 3100),
    ]
    counts += [(n, *map(int, rng.integers(0, n // 3 + 1, 2))) for n in (3, 20, 153, 153, 153, 700) for _ in range(5)]
    found = page.evaluate("counts => counts.map((each) => ofCounts(...each))", counts)
    for each, shown in zip(counts, found, strict=True):
        expected = comparison.of_counts(*each)
        names = ("n", "difference", "low", "high", "detectable")
        assert [shown[name] for name in names] == [getattr(expected, name) for name in names], each
        assert shown["p"] == pytest.approx(expected.p, rel=1e-9)
        assert page.evaluate("pValue", shown["p"]) == comparison.p_value(expected.p)


@pytest.mark.parametrize(("runs", "pictures", "spread"), [(2, 153, 0.5), (3, 20, 0), (5, 153, 0.5), (20, 1000, 0.1)])
def test_comparisons_over_runs_are_those_of_python(opened, runs, pictures, spread):
    page = opened(reports.contents(made_up(2), {}, HEAD))
    rng = np.random.default_rng(runs)
    first, second = (rng.random((runs, pictures)) < 0.8 + rng.normal(0, spread, (runs, 1)) for _ in range(2))
    pairs = [
        tuple(predictions("".join("01"[int(each)] for each in side)) for side in run)
        for run in zip(first, second, strict=True)
    ]
    expected = dataclasses.asdict(repeats.compare_runs(pairs))
    gained = (second.astype(int) - first).tolist()
    found = page.evaluate("compareRuns", gained)
    assert found["differences"] == pytest.approx(expected["differences"])
    for name in ("n", "difference", "low", "high", "p"):
        assert found[name] == pytest.approx(expected[name], rel=1e-8)
    assert found["shareOfRuns"] == pytest.approx(expected["share_of_runs"])


def test_numbers_are_rounded_as_by_python(opened):
    page = opened(reports.contents(made_up(2), {}, HEAD))
    numbers = [0, 6.25, -6.25, 6.75, 1.15, 0.05, -0.04, 12.5, 13.5, 100 / 3, -1.25, 62.5]
    found = page.evaluate("numbers => numbers.map((each) => [decimals(each, 1), decimals(each, 0)])", numbers)
    assert found == [[f"{each:.1f}", f"{each:.0f}"] for each in numbers]
    shares = [1, 0.996, 0.125, 0.0625, 0.3, 0.10, 0.0034, 0.00012, 9e-5, 0.99999]
    assert page.evaluate("shares => shares.map(pValue)", shares) == [comparison.p_value(each) for each in shares]


def test_the_page_fits_a_phone(opened):
    page = opened(reports.contents(made_up(12), {HEAD: BASELINE}, HEAD), viewport={"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.locator("tbody .open").first.click()
    assert page.locator("#details").evaluate("dialog => dialog.scrollWidth") <= 390


def test_five_hundred_experiments_stay_small(opened, tmp_path):
    """Prints the seconds that it took."""
    noise = np.random.default_rng(0).integers(0, 255, (400, 600, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    start = time.perf_counter()
    shown = reports.contents(
        made_up(500, files={name: tmp_path / "noise.png" for name in "abcd"}), {HEAD: BASELINE}, HEAD
    )
    page = opened(shown)
    assert page.locator("#leaderboard > table > tbody > tr").count() == 500
    print(f"500 experiments: {time.perf_counter() - start:.1f} s")
    assert (tmp_path / "report.html").stat().st_size < 20e6
    assert 0 < sum("pictures" in each for each in shown["experiments"]) <= 20
    assert shown["experiments"][-1]["leftOut"]
