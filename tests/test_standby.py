"""The process on standby, asked by a script that stands for a stage."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

from helpers import ROOT, wait_for

import psutil
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="there is a standby on Linux only"),
]

QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}

PROBE = """
import sys
was_there = "torch" in sys.modules
from finetune import stage
from finetune.errors import UserError
import json
import os
import time
import torch
CODE = "as it was"
def main():
    about = {"is_fork": was_there, "pid": os.getpid(), "argv": sys.argv, "cwd": os.getcwd(), "code": CODE}
    print(json.dumps(about | {"said": os.environ.get("FINETUNE_SAID")}))
    match sys.argv[1]:
        case "echo":
            print(sys.stdin.read(), file=sys.stderr)
        case "fail":
            raise UserError("mend this")
        case "crash":
            raise RuntimeError("not foreseen")
        case "wait":
            time.sleep(60)
if __name__ == "__main__":
    stage.run(main)
"""


class Project:
    """A folder with the project's code, whose stage is the probe."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(ROOT / "src", folder / "src")
        (folder / "src/probe.py").write_text(PROBE)
        self.environ = os.environ | {"DVC_STAGE": "probe", "DVC_ROOT": str(folder), "OF_THIS_TEST": uuid.uuid4().hex}
        self.environ.pop("STANDBY_SECONDS", None)

    def start(self, what: str, **variables: str) -> subprocess.Popen:
        """Start the probe, with pipes."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "src/probe.py", what]
        return subprocess.Popen(command, cwd=self.folder, env=self.environ | variables, **pipes)

    def run(self, what: str, given: str = "", status: int = 0, **variables: str) -> tuple[dict, str]:
        """Run it to its end; return what it said of itself, and to the standard error."""
        process = self.start(what, **variables)
        printed, errors = process.communicate(given, timeout=60)
        assert process.returncode == status, errors
        return json.loads(printed), errors

    def begun(self) -> tuple[subprocess.Popen, dict]:
        """Start one that waits; return it and what it said."""
        process = self.start("wait")
        about = json.loads(process.stdout.readline())
        assert about["is_fork"]
        return process, about

    def standby(self) -> list[psutil.Process]:
        """Return those on standby for it."""
        found = []
        for process in psutil.process_iter():
            try:
                its = process.environ().get("OF_THIS_TEST")
            except psutil.Error:
                continue
            if process.name() == "standby" and its == self.environ["OF_THIS_TEST"]:
                found.append(process)
        return found


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose first stage has left a process on standby."""
    made = Project(tmp_path_factory.mktemp("standby") / "project")
    assert not made.run("say")[0]["is_fork"]
    wait_for(lambda: made.run("say")[0]["is_fork"])
    yield made
    for process in made.standby():
        process.kill()


def test_a_fork_is_as_the_process_that_asked(project):
    about, errors = project.run("echo", given="given", FINETUNE_SAID="so")
    assert about["is_fork"]
    assert about["argv"] == ["src/probe.py", "echo"]
    assert about["cwd"] == str(project.folder)
    assert about["said"] == "so"
    assert errors.strip() == "given"
    assert project.run("fail", status=1)[1] == "error: mend this\n"
    assert project.run("crash", status=1)[1].splitlines()[-1] == "RuntimeError: not foreseen"
    with open("/dev/full", "w") as full:  # what can't be told is no success
        process = subprocess.Popen(
            [sys.executable, "src/probe.py", "fail"], cwd=project.folder, env=project.environ, stderr=full, **QUIET
        )
        assert process.wait(10) == 1
    assert len(project.standby()) == 1


def test_code_that_has_changed_since_is_the_new_one(project):
    script = project.folder / "src/probe.py"
    script.write_text(PROBE.replace("as it was", "as it is now"))
    about, _ = project.run("say")
    script.write_text(PROBE)
    assert about["is_fork"]
    assert about["code"] == "as it is now"


def test_one_started_otherwise_begins_as_usual(project, tmp_path):
    def begins_as_usual(**variables: str) -> bool:
        return not project.run("say", STANDBY_SECONDS="0.1", **variables)[0]["is_fork"]

    assert begins_as_usual(OMP_NUM_THREADS="2")
    packages = tmp_path / "site-packages"
    packages.mkdir()
    assert begins_as_usual(PYTHONPATH=str(packages))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    try:
        assert begins_as_usual()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    before = os.umask(0o077)
    try:
        assert begins_as_usual()
    finally:
        os.umask(before)
    assert not begins_as_usual()  # or all of this says nothing


def test_packages_that_were_installed_since_are_seen(project, tmp_path):
    packages = tmp_path / "site-packages"
    packages.mkdir()
    variables = {"PYTHONPATH": str(packages), "STANDBY_SECONDS": "5"}
    wait_for(lambda: project.run("say", **variables)[0]["is_fork"])
    (packages / "new-1.0.dist-info").mkdir()
    assert not project.run("say", **variables)[0]["is_fork"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_the_forks(project, number, status):
    process, _ = project.begun()
    process.send_signal(number)
    errors = process.communicate(timeout=10)[1]
    assert process.returncode == status
    assert errors.startswith("stopped.")


def test_a_stopped_one_stops_and_goes_on(project):
    process, about = project.begun()
    fork = psutil.Process(about["pid"])
    process.send_signal(signal.SIGTSTP)
    wait_for(lambda: fork.status() == psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: fork.status() == psutil.STATUS_SLEEPING)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 143


def test_whoever_is_killed_no_fork_goes_on(project):
    process, about = project.begun()
    fork = psutil.Process(about["pid"])
    process.kill()
    process.communicate()
    fork.wait(10)

    process, about = project.begun()
    psutil.Process(about["pid"]).kill()
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGKILL

    shell = ["/bin/sh", "-c", f"{sys.executable} src/probe.py wait"]  # which may stay in between
    starting = f"import subprocess; subprocess.run({shell})"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    starter = subprocess.Popen([sys.executable, "-c", starting], cwd=project.folder, env=project.environ, **pipes)
    about = json.loads(starter.stdout.readline())
    assert about["is_fork"]
    starter.kill()
    assert starter.communicate(timeout=10)[0].startswith("stopped.")

    process, about = project.begun()
    fork = psutil.Process(about["pid"])
    fork.parent().kill()
    assert process.wait(10) == -signal.SIGKILL
    assert not fork.is_running() or fork.status() == psutil.STATUS_ZOMBIE  # it has ended before
    assert process.stderr.read().startswith("stopped.")
    wait_for(lambda: project.run("say")[0]["is_fork"])  # the next one has left another


def test_one_that_is_killed_as_its_fork_begins_is_alone_in_that(project):
    process, about = project.begun()
    standby = psutil.Process(about["pid"]).parent()
    for seconds in (0.02, 0.04, 0.06, 0.08, 0.1):  # one of them before it has read that the fork begins, perhaps
        killed = project.start("wait")
        time.sleep(seconds)
        killed.kill()
        killed.communicate(timeout=10)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as mute:  # one that never says what it wants
        mute.connect(address_of(standby))
        assert project.run("say")[0]["is_fork"]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as hasty:
            hasty.connect(address_of(standby))
            request = json.dumps(
                {"words": ["src/probe.py", "wait"], "environ": {}, "ignored": [], "for": [os.getpid()]}
            )
            with open(os.devnull, "r+") as nothing:
                here = os.open(project.folder, os.O_RDONLY)
                socket.send_fds(hasty, [request.encode()], [*[nothing.fileno()] * 3, here])
                os.close(here)
            wait_for(lambda: len(standby.children()) == 2)
    wait_for(lambda: len(standby.children()) == 1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=10)[1].startswith("stopped.")


def test_a_sigterm_ends_it_after_its_last_fork(project):
    process, about = project.begun()
    standby = psutil.Process(about["pid"]).parent()
    standby.terminate()
    wait_for(lambda: not project.run("say")[0]["is_fork"])
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    standby.wait(10)


def address_of(standby: psutil.Process) -> str:
    """Return where one on standby listens."""
    found = (each.laddr for each in standby.net_connections("unix"))
    return next(address.replace("@", "\0") for address in found if "finetune" in str(address))


def test_it_waits_for_as_long_as_it_is_told(tmp_path):
    project = Project(tmp_path / "project")
    project.run("say", STANDBY_SECONDS="0")
    assert project.standby() == []
    project.run("say", STANDBY_SECONDS="3")
    wait_for(project.standby)
    wait_for(lambda: not project.standby())
    process = project.start("say", STANDBY_SECONDS="soon")
    errors = process.communicate()[1]
    assert process.returncode == 1
    assert errors == "error: STANDBY_SECONDS=soon: give a number of seconds; 0 for no process on standby.\n"
