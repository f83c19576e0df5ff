"""What a Python of the tests does first: have `dvc …` be a fork of tests/warm/server.py, which has imported DVC.

That is with this folder on PYTHONPATH and WARM_SERVER in the environment; see finetune.standby.
"""

import os
import sys


def _as_script(words: list[str]) -> list[str]:
    """Return the words of a command of DVC as a script and its arguments; none for another command."""
    if words[:2] == ["-m", "dvc"]:
        return [os.path.join(os.path.dirname(sys.executable), "dvc"), *words[2:]]
    return words if words and os.path.basename(words[0]) == "dvc" else []


if (address := os.environ.get("WARM_SERVER")) and (words := _as_script(sys.orig_argv[1:])):
    sys.path.append(os.path.join(os.path.dirname(__file__), "../../src"))
    from finetune import standby

    standby.ask(address, words)
    sys.path.pop()
