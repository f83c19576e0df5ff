"""What a process has from where it was started: a fork of another can stand for it only if that one has the same."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

# What may differ between two stages, as no import looks at it.
VARIABLES = {"PWD", "OLDPWD", "SHLVL", "_", "TERM", "COLUMNS", "LINES", "STANDBY_SECONDS"}
VARIABLES |= {"CHECKPOINTS_DIR", "DATA_ARCHIVE", "WEIGHTS_DIR"}
PREFIXES = ("DVC_", "FINETUNE_")
# What may not, of what Linux says of a process.
FACTS = ("Umask", "Uid", "Gid", "Groups", "CapEff", "NoNewPrivs", "Seccomp", "SigBlk", "Cpus_allowed", "Mems_allowed")
FILES = ("limits", "cgroup", "oom_score_adj")
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")


def digest(modules: Iterable[str]) -> str:
    """Return the digest of this process's surroundings, the packages that it finds, and these files of modules."""
    environ = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    all_of_it = [
        [sys.executable, sys.orig_argv[1 : -len(sys.argv)]],
        {name: value for name, value in environ.items() if not name.startswith(PREFIXES)},
        facts(os.getpid()),
        [[str(folder), folder.stat().st_mtime_ns] for folder in installed()],
        [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in (__file__, *modules)],
    ]
    return hashlib.sha256(json.dumps(all_of_it, sort_keys=True).encode()).hexdigest()


def facts(pid: int) -> list:
    """Return what Linux says of a process that must be alike. Raises OSError where that is not for us to see."""
    about = Path("/proc", str(pid))
    root = (about / "root").stat()
    return [
        [line for line in (about / "status").read_text().splitlines() if line.startswith(FACTS)],
        [(about / name).read_text() for name in FILES],
        [os.readlink(about / "ns" / name) for name in NAMESPACES if (about / "ns" / name).is_symlink()],
        [os.getpriority(os.PRIO_PROCESS, pid), os.sched_getscheduler(pid), root.st_dev, root.st_ino],
    ]


def installed() -> list[Path]:
    """Return the folders of Python's own modules and of installed packages."""
    names = (Path(os.__file__).parent.name, "lib-dynload", "site-packages", "dist-packages")
    return [folder for folder in map(Path, sys.path) if folder.name in names and folder.is_dir()]
