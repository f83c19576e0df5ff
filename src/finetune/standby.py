"""A process on standby that has imported torch, so that the next stages need not. Linux only.

The first stage that has, leaves a copy of itself behind, which waits. The next one asks it for a fork, which does its
work: with the standard streams, the folder, the environment and the arguments of who asked. That one passes signals on,
and ends as the fork does.

Whatever a process has from where it was started must be as it was for the one on standby (`surroundings`): packages,
environment, limits, namespaces; else the stage begins as usual. The project's own modules are imported anew. It waits
for STANDBY_SECONDS, 60 by default, and ends; with 0 there is none. A SIGTERM ends it after its last fork.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn

from finetune import starters, surroundings
from finetune.uncompiled import StandIn

SECONDS = 60.0
LONGEST = 86400.0
STAGES = ("backbone", "prepare", "train", "evaluate")
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGTSTP", "SIGCONT")
PASSED_ON = [number for number in signal.valid_signals() if getattr(number, "name", "") in SIGNALS]
BEGUN = b"begun"
SMALL, LARGE = 16, 2**21  # bytes of a status, of a request
BACKLOG = 64
ANSWER = 5  # seconds in which a fork begins
REQUEST = 1  # seconds in which a request comes

_address = ""  # where the one on standby listens; '' where there is to be none


def take_over() -> None:
    """Have a fork of the process on standby be this stage, and end as it does; return where there is none."""
    global _address
    is_stage = "DVC_STAGE" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ  # and no process of several
    if sys.platform == "linux" and is_stage and not starters.ASKED_BY and _seconds():
        with contextlib.suppress(OSError):  # a /proc that does not say
            _address = f"finetune-{surroundings.digest((__file__, str(starters.__file__)))}"
            ask(_address, sys.argv)


def leave_behind() -> None:
    """Leave a copy of this process behind, on standby, if there is to be one and this has what stages import."""
    torch = sys.modules.get("torch")
    if not _address or not torch or torch.cuda.is_initialized() or threading.active_count() > 1:
        return
    try:
        between = os.fork()
    except OSError:  # no room for another
        return
    if between:
        os.waitpid(between, 0)
        return
    try:
        os.setsid()
        if not os.fork():
            _stand_by()
    finally:
        os._exit(0)


def _seconds() -> float:
    """Return for how long to wait. Exits with an error where that is no number."""
    said = os.environ.get("STANDBY_SECONDS") or SECONDS
    try:
        return min(max(0.0, float(said)), LONGEST)
    except ValueError:
        sys.exit(f"error: STANDBY_SECONDS={said}: give a number of seconds; 0 for no process on standby.")


# Who asks -------------------------------------------------------------------------------------------------------------


def ask(address: str, words: list[str]) -> None:
    """Have a fork of the process at an address run a script, `words`, and end as it does; return where none begins."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        try:
            connection.settimeout(ANSWER)
            connection.connect(f"\0{address}")
            if _other(connection)[1] != os.getuid():
                return
            ignored = [number for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
            about = {"words": words, "environ": dict(os.environ), "ignored": ignored}
            about["for"] = [os.getpid(), *starters.STARTED_BY]
            request = json.dumps(about).encode()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(request) + 4096)
            here = os.open(".", os.O_RDONLY)
            try:
                socket.send_fds(connection, [request], [0, 1, 2, here])
            finally:
                os.close(here)
            try:
                answer = connection.recv(SMALL)
            except TimeoutError:
                connection.shutdown(socket.SHUT_RD)  # so that none begins any more
                answer = connection.recv(SMALL)
            if answer == BEGUN:
                connection.settimeout(None)
                _end_as_it_does(connection, set(PASSED_ON) - set(ignored))
        except OSError:  # there is none, or it has just ended
            return


def _end_as_it_does(connection: socket.socket, numbers: Iterable[int]) -> NoReturn:
    """Pass signals on to the fork, and end as it does."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):  # the fork has ended
            connection.send(bytes([number]))
        if number == signal.SIGTSTP:
            os.kill(os.getpid(), signal.SIGSTOP)

    status = -signal.SIGKILL  # whatever comes now, this process does not do what its fork does
    try:
        for number in numbers:
            signal.signal(number, pass_on)
        with contextlib.suppress(OSError):
            for descriptor in (0, 1, 2):
                os.close(descriptor)
            try:
                said = connection.recv(SMALL)
            except ConnectionResetError:  # by a signal that was not read any more; what was said is there
                said = connection.recv(SMALL)
            status = int(said or status)
        if status < 0:
            if status != -signal.SIGKILL:
                signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
    finally:
        os._exit(status if status >= 0 else 1)


# Who is on standby ----------------------------------------------------------------------------------------------------


def listening(address: str) -> socket.socket:
    """Return a socket that has an address: a name that Linux keeps for it, in no file. Raises OSError: it is taken."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"\0{address}")
    return listener


def _stand_by() -> None:
    """Import what the stages do, and fork for each that asks, until none has for a while."""
    try:
        listener = listening(_address)
    except OSError:  # there is one
        return
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_DFL)
    for stage in STAGES:
        with contextlib.suppress(Exception, SystemExit):  # that is for the stage itself to say
            importlib.import_module(stage)
    sys.path.pop(0)
    serve(listener, _seconds())


def serve(listener: socket.socket, seconds: float) -> None:
    """Fork for each that asks, and tell it how the fork ended, until none runs and none has asked for so long."""
    if not _forget():
        return
    _name(b"standby")
    os.chdir("/")
    listener.listen(BACKLOG)
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    forks: dict[int, socket.socket] = {}  # and who asked for each
    with selectors.DefaultSelector() as ready:
        for each in (listener, woken):
            ready.register(each, selectors.EVENT_READ)
        while events := ready.select(None if forks else seconds):
            for key, _ in events:
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    if pid := _fork(connection, [listener, ready, *forks.values()]):
                        forks[pid] = connection
                        ready.register(connection, selectors.EVENT_READ, pid)
                    else:
                        connection.close()
                elif key.fileobj == woken:
                    if signal.SIGTERM in os.read(woken, 4096) and seconds:
                        ready.unregister(listener)
                        listener.close()
                        seconds = 0
                    _tell(forks, ready)
                elif key.data in forks:
                    _pass_on(key.data, forks[key.data], ready)


def _forget() -> bool:
    """Forget all modules but the installed ones, for a fork's are those of its own folder; tell whether that can be."""
    installed = surroundings.installed()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(module, StandIn) or (file and not any(Path(file).is_relative_to(each) for each in installed)):
            if str(file).endswith(".so"):  # which a process can't import twice
                return False
            del sys.modules[name]
    gc.collect()
    gc.freeze()
    return True


def _fork(connection: socket.socket, others: list) -> int:
    """Fork for who asks; return the fork's process, 0 where there is none."""
    descriptors: list[int] = []
    own = os.getpid()
    try:
        pid, user, _ = _other(connection)
        if not pid or user != os.getuid() or surroundings.facts(pid) != surroundings.facts(own):
            return 0
        connection.settimeout(REQUEST)
        request, descriptors, *_ = socket.recv_fds(connection, LARGE, 4)
        connection.settimeout(None)
        if not descriptors:  # who asked has gone
            return 0
        if not (pid := os.fork()):
            try:
                for other in others:
                    other.close()
                _become(json.loads(request), descriptors, connection, own)
            finally:
                os._exit(1)
        with contextlib.suppress(OSError):  # it has done so, and ended
            os.setpgid(pid, pid)
        return pid
    except OSError:
        return 0
    finally:
        for each in descriptors:
            os.close(each)


def _pass_on(pid: int, connection: socket.socket, ready: selectors.BaseSelector) -> None:
    """Pass a signal on to a fork, and to what it has started, as a terminal does."""
    try:
        said = connection.recv(SMALL)
    except ConnectionResetError:  # killed before it had read that its fork begins
        said = b""
    if not said:  # who asked was killed
        ready.unregister(connection)
    number = signal.Signals(said[0]) if said else signal.SIGKILL
    if number == signal.SIGTSTP:
        number = signal.SIGSTOP  # the other one the system ignores where there is no terminal
    alone = number in (signal.SIGTERM, signal.SIGHUP)
    with contextlib.suppress(ProcessLookupError):
        (os.kill if alone else os.killpg)(pid, number)


def _tell(forks: dict[int, socket.socket], ready: selectors.BaseSelector) -> None:
    """Tell those who asked how their forks have ended."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            connection = forks.pop(ended[0])
            with contextlib.suppress(KeyError):
                ready.unregister(connection)
            with contextlib.suppress(OSError):
                connection.send(str(os.waitstatus_to_exitcode(ended[1])).encode())
            connection.close()


def _become(about: dict, descriptors: list[int], connection: socket.socket, standby: int) -> NoReturn:
    """Be the stage of who asked, and end. The connection stays open till then: who asked is not to end before."""
    status = 1
    try:
        os.setpgid(0, 0)
        starters.end_with_parent()
        if os.getppid() != standby:
            os._exit(1)
        connection.send(BEGUN)
        signal.set_wakeup_fd(-1)
        for each in (*PASSED_ON, signal.SIGCHLD):
            signal.signal(each, signal.SIG_IGN if each in about["ignored"] else signal.SIG_DFL)
        if signal.SIGINT not in about["ignored"]:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        *standard, here = descriptors
        for number, descriptor in enumerate(standard):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.fchdir(here)
        os.close(here)
        os.environ.clear()
        os.environ.update(about["environ"] | {starters.VARIABLE: " ".join(map(str, [os.getpid(), *about["for"]]))})
        sys.argv = about["words"]
        script = Path(sys.argv[0]).absolute()
        sys.path.insert(0, str(script.resolve().parent))
        importlib.invalidate_caches()
        _name(b"python3")
        main = sys.modules["__main__"] = ModuleType("__main__")
        main.__file__ = str(script)
        exec(compile(script.read_bytes(), script, "exec", dont_inherit=True), vars(main))
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            with contextlib.suppress(Exception):  # a full disk, say
                print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            for file in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    file.flush()
        finally:
            os._exit(status)


def _other(connection: socket.socket) -> tuple[int, int, int]:
    """Return the process at the other end, 0 where it is out of sight; its user and group."""
    form = "3i"
    return struct.unpack(form, connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(form)))


def _name(name: bytes) -> None:
    """Have `ps -e` and `top` call this process so."""
    set_name = 15
    ctypes.CDLL(None).prctl(set_name, name)
