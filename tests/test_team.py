"""A team: clones that share experiments through git and a DVC remote, a folder or a real S3 server."""

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

from documents import block
from finetune import checkpoint, datasets
from helpers import ROOT, as_user, clone, differences, dvc, git, make_pictures, results, typed

import pytest
from ruamel.yaml import YAML
from test_lineage import metrics, trained
from test_pipeline import TINY, experiments

pytestmark = pytest.mark.slow

CLOSED = "http://127.0.0.1:9/mine.zip"  # where nobody listens


@dataclass(frozen=True)
class Team:
    """A git repository and a DVC remote, with what Ana pushed there: the experiment `first`, and the branch `kept`."""

    git: Path
    storage: Path
    archive: Path  # of the pictures, which not everybody has
    ana: Path
    first: dict  # results of the experiment


@pytest.fixture(scope="module")
def team(tmp_path_factory) -> Team:
    folder = tmp_path_factory.mktemp("team")
    make_pictures(folder / "pictures", {"train/ants": 3, "train/bees": 3, "val/ants": 2, "val/bees": 2}, size=40)
    archive = Path(shutil.make_archive(str(folder / "pictures"), "zip", folder / "pictures"))
    digest = datasets.read(folder / "pictures", "pictures").digest
    recipe = f"url: {CLOSED}\nbytes: {archive.stat().st_size}\nsha256: {'a' * 64}\ndigest: {digest}\n"

    ana = clone(folder / "ana", recipe, **TINY)
    git(ana, "init", "-q", "--bare", "-b", "main", str(folder / "git"))
    git(ana, "remote", "add", "origin", str(folder / "git"))
    dvc(ana, "remote", "add", "-d", "storage", str(folder / "storage"))
    make_pictures(ana / "data/flowers", {"daisy": 3, "rose": 3})
    dvc(ana, "add", "data/flowers")
    git(ana, "add", "-A")
    git(ana, "commit", "-qm", "storage and flowers")
    git(ana, "push", "-q", "origin", "main")

    dvc(ana, "exp", "run", "--name", "first", "-S", "lr=0.01", "-S", "momentum=0.9", DATA_ARCHIVE=str(archive))
    assert "Pushed experiment first" in dvc(ana, "exp", "push", "origin", "first")
    dvc(ana, "exp", "branch", "first", "kept")
    git(ana, "push", "-q", "origin", "kept")
    return Team(folder / "git", folder / "storage", archive, ana, results(ana))


def join(team: Team, folder: Path, branch: str = "main") -> Path:
    """Return a teammate's new clone."""
    git(folder.parent, "clone", "-q", "-b", branch, str(team.git), folder.name)
    return folder


def row(folder: Path, name: str) -> dict[str, str]:
    """Return an experiment's values in the table, but for what is a clone's own."""
    (found,) = (each for each in experiments(folder) if each["Experiment"] == name)
    return {key: value for key, value in found.items() if value and key not in ("typ", "State", "Executor")}


def test_two_work_together(team, tmp_path):
    ben = join(team, tmp_path / "ben")
    assert "first" in dvc(ben, "exp", "list", "origin")
    dvc(ben, "exp", "pull", "origin", "first")
    assert row(ben, "first") == row(team.ana, "first")
    dvc(ben, "exp", "apply", "first")
    assert differences(results(ben), team.first) == []
    assert len(checkpoint.load(ben / "models/checkpoint.pt")["history"]) == 2
    assert "Data and pipelines are up to date" in dvc(ben, "repro")

    # On top of it, without the archive: the prepared pictures came along.
    printed = dvc(ben, "exp", "run", "--name", "second", "-S", "resume=last", "-S", "lr=0.001")
    assert trained(printed) == ["3", "4"]
    assert (metrics(ben)["step"], metrics(ben)["continues"]) == (3, "first")

    # Ana has gone on, too, and both push at once. A third one gets both, whole.
    dvc(team.ana, "exp", "run", "--name", "flipped", "-S", "evaluate.tta=flip")
    ours = {"second": ben, "flipped": team.ana}
    with ThreadPoolExecutor() as pool:
        printed = list(pool.map(lambda name: dvc(ours[name], "exp", "push", "origin", name), ours))
    assert [f"Pushed experiment {name}" in each for name, each in zip(ours, printed, strict=True)] == [True, True]
    cleo = join(team, tmp_path / "cleo")
    dvc(cleo, "exp", "pull", "origin", *ours)
    for name, folder in ours.items():
        dvc(cleo, "exp", "apply", name)
        assert differences(results(cleo), results(folder)) == []
        assert row(cleo, name) == row(folder, name)

    # A name that is taken: the one who comes second is told so, and the first one's experiment stays.
    before = git(team.git, "for-each-ref", "refs/exps")
    dvc(cleo, "exp", "save", "--name", "first")
    assert "Local experiment first has diverged" in dvc(cleo, "exp", "push", "origin", "first")
    assert git(team.git, "for-each-ref", "refs/exps") == before

    # Of two branches that conflict, the one that is to win; and an experiment out of the remote again.
    dvc(ben, "exp", "branch", "second", "slower-learning")
    git(ben, "checkout", "-qf", "-b", "ours", "origin/kept")
    merge, *lines = block("docs/teams.md", "git merge").lines
    assert "Merge conflict in params.yaml" in typed(ben, merge, status=1)
    printed = [typed(ben, line) for line in lines]
    assert "Data and pipelines are up to date" in printed[-1]
    dvc(cleo, "exp", "remove", "-g", "origin", "second")
    assert "/second" not in git(team.git, "for-each-ref", "refs/exps")


def test_a_teammate_trains_on_top_of_an_experiment_that_was_pushed(team, tmp_path):
    ben = join(team, tmp_path / "ben")
    pictures = {"DATA_ARCHIVE": str(team.archive)}
    printed = dvc(ben, "exp", "run", "-S", "resume=first", status=255, **pictures)
    assert "neither auto, never, last, nor an experiment or revision" in printed
    dvc(ben, "exp", "pull", "origin", "first")
    assert trained(dvc(ben, "exp", "run", "-S", "resume=first", "-S", "lr=0.02")) == ["3", "4"]
    assert (metrics(ben)["step"], metrics(ben)["continues"]) == (3, "first")
    assert trained(dvc(ben, "exp", "run", "-S", "resume=origin/kept", "-S", "lr=0.03")) == ["3", "4"]


def test_without_the_storage_the_numbers_are_trained_anew_to_the_bit(team, tmp_path):
    ben = join(team, tmp_path / "ben")
    dvc(ben, "remote", "modify", "--local", "storage", "url", str(tmp_path / "nowhere"))
    printed = dvc(ben, "exp", "pull", "origin", "first")
    assert "Some of the cache files do not exist neither locally nor on remote" in printed
    printed = dvc(ben, "exp", "apply", "first", status=255)
    assert "Checkout failed for following targets" in printed
    assert "models/model.safetensors" in printed

    printed = dvc(ben, "repro", "--force", DATA_ARCHIVE=str(team.archive))  # with the settings of `first`
    assert trained(printed) == ["1", "2"]
    assert differences(results(ben), team.first) == []


def test_without_the_pictures_the_error_says_how_to_get_them(team, tmp_path):
    ben = join(team, tmp_path / "ben")
    printed = dvc(ben, "exp", "run", status=255)
    assert f"error: can't fetch {CLOSED}: " in printed
    assert "Set DATA_ARCHIVE=<path or URL of the archive>" in printed
    assert "Traceback" not in printed
    printed = dvc(ben, "exp", "run", status=255, DATA_ARCHIVE="/nowhere/mine.zip")
    assert "error: DATA_ARCHIVE=/nowhere/mine.zip does not exist." in printed

    flowers = ["exp", "run", "-S", "data.source=data/flowers"]
    assert "missing data 'source': data/flowers" in dvc(ben, *flowers, status=255)


def test_a_remote_that_refuses_is_an_error(team, tmp_path):
    ben = join(team, tmp_path / "ben", "kept")
    (tmp_path / "file").touch()
    dvc(ben, "remote", "modify", "--local", "storage", "url", str(tmp_path / "file/storage"))
    assert f"Not a directory: '{tmp_path}/file/storage/" in dvc(ben, "pull", status=255)
    git(ben, "remote", "set-url", "origin", str(tmp_path / "nowhere"))
    assert "'origin' is not a valid Git remote or URL" in dvc(ben, "exp", "list", "origin", status=255)


def test_the_registry_hands_out_the_model(team, tmp_path):
    ben = join(team, tmp_path / "ben", "kept")
    for line in block("docs/teams.md", "gto register").lines:
        printed = typed(ben, line.replace("main", "kept"))  # there is no pull request that was merged
    assert "v1.0.0" in printed
    for line in block("docs/teams.md", "dvc artifacts get").lines:
        typed(tmp_path, line.replace("https://github.com/team/project", str(team.git)))
        served = tmp_path / "model.safetensors"
        assert served.read_bytes() == team.first["weights"]
        served.unlink()
    assert "image-classifier@v1.0.0" in git(team.git, "tag")


def test_the_workflow_comments_the_table_of_a_pull_request(team, tmp_path):
    ben = join(team, tmp_path / "ben", "kept")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gh").write_text('#!/bin/sh\necho "$@" && cp "$5" ../comment.md\n')
    (tmp_path / "bin/gh").chmod(0o755)
    variables = as_user(ben) | {"BASE": "origin/main", "NUMBER": "7", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
    variables["PATH"] = f"{tmp_path / 'bin'}:{variables['PATH']}"
    (job,) = YAML(typ="safe").load(ROOT / ".github/workflows/experiment.yml")["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step and "make setup" not in step["run"]]
    for command in commands:
        printed = subprocess.run(["bash", "-e", "-c", command], cwd=ben, env=variables, check=True, capture_output=True)
    assert printed.stdout.decode().split()[:3] == ["pr", "comment", "7"]
    table = (tmp_path / "comment.md").read_text()
    assert f"| val_acc | - | {json.dumps(metrics(team.ana)['val_acc'])} | - |" in " ".join(table.split())
    assert "| lr | 0.001 | 0.01 |" in " ".join(table.split())
    assert (tmp_path / "summary").read_text() == table


# S3 -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def s3() -> str:
    """Return the URL of an S3 server with the bucket `team`."""
    reason = "requirements-s3.txt is not installed"
    pytest.importorskip("dvc_s3", reason=reason)
    server = pytest.importorskip("moto.server", reason=reason).ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    build_opener(ProxyHandler({})).open(Request(f"{url}/team", method="PUT")).close()
    yield url
    server.stop()


def test_an_s3_server_as_the_remote(team, tmp_path, s3):
    keys = {"AWS_ACCESS_KEY_ID": "ana", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    keys["NO_PROXY"] = keys["no_proxy"] = "127.0.0.1"
    ana = join(team, tmp_path / "ana")
    dvc(ana, "exp", "pull", "origin", "first")
    for folder in (ana, join(team, tmp_path / "ben")):
        dvc(folder, "remote", "add", "-d", "cloud", "s3://team/dvc")
        dvc(folder, "remote", "modify", "cloud", "endpointurl", s3)
    dvc(ana, "exp", "push", "origin", "first", **keys)

    ben = tmp_path / "ben"
    dvc(ben, "exp", "pull", "origin", "first", **keys)
    dvc(ben, "exp", "apply", "first")
    assert differences(results(ben), team.first) == []
