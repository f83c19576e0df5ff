"""A process that has imported DVC and torch, and forks for each that asks: see sitecustomize.py beside it.

python tests/warm/server.py ADDRESS      # until its standard input is closed
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("backbone", "prepare", "train", "evaluate")
DVC = ("dvc.cli", "dvc.cli.parser", "dvc.repo.experiments.queue.celery", "dvc.repo.experiments.show", "dvc.stage.run")


def preload() -> None:
    """Import what the stages and DVC do, and forget the modules of the stages, for a fork's are those of its folder."""
    sys.path.insert(0, str(ROOT / "src"))
    for name in (*STAGES, *DVC):
        importlib.import_module(name)
    sys.path.pop(0)
    from finetune.uncompiled import StandIn

    for name, module in list(sys.modules.items()):
        if isinstance(module, StandIn) or Path(getattr(module, "__file__", None) or "/").is_relative_to(ROOT / "src"):
            del sys.modules[name]
    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()


def serve(address: str) -> None:
    """Fork for all who ask, until the standard input is closed; then have what still runs end."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(64)
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    forks: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as ready:
        for each in (0, listener, woken):
            ready.register(each, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj == 0:
                    for pid in forks:
                        os.killpg(pid, signal.SIGTERM)
                    return
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    about, descriptors, *_ = socket.recv_fds(connection, 2**20, 4)
                    if not descriptors:  # killed before it asked
                        connection.close()
                        continue
                    if not (pid := os.fork()):
                        os.setpgid(0, 0)
                        for other in (listener, connection, *forks.values()):
                            other.close()
                        ready.close()
                        signal.set_wakeup_fd(-1)
                        become(json.loads(about), descriptors)
                    with contextlib.suppress(OSError):  # done already
                        os.setpgid(pid, pid)
                    for each in descriptors:
                        os.close(each)
                    forks[pid] = connection
                    ready.register(connection, selectors.EVENT_READ, pid)
                elif key.fileobj == woken:
                    with contextlib.suppress(BlockingIOError):
                        while os.read(woken, 4096):
                            pass
                    reap(forks, ready)
                elif key.data in forks:
                    number = key.fileobj.recv(16)
                    if not number:  # who asked was killed
                        os.kill(key.data, signal.SIGKILL)
                        ready.unregister(key.fileobj)
                    elif number[0] == signal.SIGINT:  # Ctrl-C and DVC interrupt what it has started, too
                        os.killpg(key.data, signal.SIGINT)
                    else:
                        os.kill(key.data, number[0])


def reap(forks: dict[int, socket.socket], ready: selectors.BaseSelector) -> None:
    """Tell those who asked how their forks have ended."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            connection = forks.pop(ended[0])
            with contextlib.suppress(KeyError):
                ready.unregister(connection)
            with contextlib.suppress(OSError):
                connection.send(str(os.waitstatus_to_exitcode(ended[1])).encode())
            connection.close()


def become(about: dict, descriptors: list[int]) -> None:
    """Be the process that asked, and end."""
    *standard, here = descriptors
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.fchdir(here)
    os.close(here)
    os.environ.clear()
    os.environ.update(about["environ"])
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD:
        signal.signal(number, signal.SIG_IGN if number in about["ignored"] else signal.SIG_DFL)
    if signal.SIGINT not in about["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = about["words"]
    status = 0
    try:
        if sys.argv[0] == "dvc":
            from celery.app.control import Inspect
            from dvc.cli import main

            if sys.argv[1:3] == ["exp", "queue-worker"]:
                # It asks itself what it does, and ends, its experiment lost, where a second passes without an answer.
                destination, _, *others = Inspect.__init__.__defaults__
                Inspect.__init__.__defaults__ = (destination, 20.0, *others)
            status = main()
        else:
            script = Path(sys.argv[0]).absolute()
            sys.path.insert(0, str(script.resolve().parent))
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    finally:
        for file in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                file.flush()
        os._exit(status or 0)


if __name__ == "__main__":
    preload()
    serve(sys.argv[1])
    shutil.rmtree(Path(sys.argv[1]).parent)
