import os
import subprocess
import sys

from helpers import ROOT

import pytest

STAGE = """
import sys
sys.path.insert(0, {source!r})
import time
from finetune import stage
def main():
    print("works")
    time.sleep(60)
stage.run(main)
"""


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])  # the one may stay in between, the other does not
def test_a_stage_ends_with_what_started_it_by_a_shell(tmp_path, shell):
    script = tmp_path / "stage.py"
    script.write_text(STAGE.format(source=str(ROOT / "src")))
    command = [shell, "-c", f"{sys.executable} {script}"]
    as_dvc = f"import subprocess; subprocess.run({command})"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, "-c", as_dvc], env=os.environ | {"DVC_ROOT": str(tmp_path)}, **pipes)
    assert process.stdout.readline() == "works\n"
    process.kill()
    said = process.communicate(timeout=20)[0]  # once the last that writes to it has ended
    assert said.startswith("stopped.")
