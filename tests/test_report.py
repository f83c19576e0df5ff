"""The report: what it says of experiments, the command line, and the page in a browser, where there is one."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from finetune import comparison, reports
from finetune.comparison import Predictions
from finetune.experiments import Experiment, Experiments
from finetune.reports import Record
from helpers import ROOT, as_user, dvc, git, make_repository, predicted, write_experiment
from report import QUEUE_LINE

import numpy as np
import pytest
from PIL import Image

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
    assert found[2]["says"].startswith("worse is right on 0 pictures where best is wrong, and wrong on 16 where")
    assert "not evaluated on the same pictures" in found[3]["says"]
    assert "says" not in found[4]
    assert found[0]["of"] == found[1]["of"] != found[3]["of"]


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
        assert page.locator("#compared .says").inner_text() == said

    page.locator("tbody .open").nth(2).press("Enter")
    dialog = page.locator("#details")
    assert dialog.locator("h2").inner_text().startswith(ordered[2].experiment.name)
    settings = ordered[2].experiment.settings
    command = f"dvc exp run -S lr={settings['lr']} -S +head.kind={settings['head.kind']}"
    assert dialog.locator("pre").inner_text() == command
    assert dialog.locator("img").evaluate("img => img.decode().then(() => img.naturalWidth)") == 40
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


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
