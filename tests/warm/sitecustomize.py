"""What a Python of the tests does first: have the process be a fork of tests/warm/server.py, if it is one of DVC's.

With this folder on PYTHONPATH and WARM_SERVER in the environment, `dvc …`, `python -m dvc …` and the stages that DVC
starts do what they always do, but for importing DVC and torch, which takes seconds. This process stays, waits for the
fork, passes signals on to it, and ends as it does.
"""

import os
import sys


def _wanted() -> list[str]:
    """Return what this process was started with, from the script's name on, if it is one that is to be a fork."""
    words = sys.orig_argv[1:]
    if words[:2] == ["-m", "dvc"]:
        return ["dvc", *words[2:]]
    name = os.path.basename(words[0]) if words else ""
    if name == "dvc":
        return ["dvc", *words[1:]]
    stages = ("backbone.py", "prepare.py", "train.py", "evaluate.py")
    return words if name in stages and "DVC_ROOT" in os.environ else []


def _be_a_fork(words: list[str], address: str) -> None:
    import contextlib
    import ctypes
    import json
    import signal
    import socket

    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(address)
    except OSError:  # the tests' process, and the server with it, has gone
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ignored = [number for number in numbers if signal.getsignal(number) == signal.SIG_IGN]
    about = json.dumps({"words": words, "environ": dict(os.environ), "ignored": ignored}).encode()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(about) + 4096)
    here = os.open(".", os.O_RDONLY)
    socket.send_fds(connection, [about], [0, 1, 2, here])
    status = -signal.SIGKILL
    try:  # whatever comes, this process does not do by itself what its fork does

        def pass_on(number: int, _frame: object) -> None:
            with contextlib.suppress(OSError):  # the fork has ended
                connection.send(bytes([number]))

        for number in set(numbers) - set(ignored):
            signal.signal(number, pass_on)
        if words[0] != "dvc":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # with the parent, as a stage does by looking for it
        for descriptor in (0, 1, 2, here):
            os.close(descriptor)
        try:
            said = connection.recv(16)
        except ConnectionResetError:  # a signal that the server has not read; what it said is there
            said = connection.recv(16)
        status = int(said or status)
        if status < 0:
            if status != -signal.SIGKILL:
                signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
    finally:
        os._exit(status if status >= 0 else 1)


if (address := os.environ.get("WARM_SERVER")) and (words := _wanted()):
    _be_a_fork(words, address)
