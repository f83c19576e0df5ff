"""`dvc.yaml` beside the code: each stage's deps are the files that its script imports, its params those it reads."""

import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
DVC_YAML = YAML(typ="safe").load(ROOT / "dvc.yaml")
STAGES = DVC_YAML["stages"]
HOW_TO_SAVE = {"checkpoint_minutes", "checkpoint_store_gb"}  # change nothing that a stage writes


def imported_files(script: Path) -> set[str]:
    """Return the project's files that a script imports, directly or not, itself among them."""
    found, open_ends = set(), [script]
    while open_ends:
        path = open_ends.pop()
        name = path.relative_to(ROOT).as_posix()
        if name in found:
            continue
        found.add(name)
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for module in modules:
                parts = module.split(".")
                for end in range(1, len(parts) + 1):
                    base = ROOT / "src" / Path(*parts[:end])
                    open_ends += [p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()]
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_files_that_the_script_imports(stage):
    command = STAGES[stage]["cmd"].split()
    assert command == ["python3", f"src/{stage}.py"]
    code = {dep for dep in STAGES[stage]["deps"] if dep.startswith("src/")}
    assert code == imported_files(ROOT / command[1])


def settings_read(script: Path) -> set[str]:
    """Return the keys of params.yaml that a script names as `settings.…`."""
    keys = set()
    for node in ast.walk(ast.parse(script.read_text())):
        key = ast.unparse(node).removeprefix("settings.") if isinstance(node, ast.Attribute) else ""
        if key and ast.unparse(node) != key:
            keys.add(key)
    return {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}


@pytest.mark.parametrize("stage", ["prepare", "backbone", "train"])
def test_params_are_the_settings_that_the_script_reads(stage):
    # Settings that are read for an early error alone, and change nothing that the stage writes.
    checked = {"prepare": {"num_classes"}, "backbone": {"data.image_size", "device"}, "train": HOW_TO_SAVE}[stage]
    assert set(STAGES[stage]["params"]) == settings_read(ROOT / f"src/{stage}.py") - checked


def test_every_setting_reaches_a_stage():
    settings = set()
    for key, value in YAML(typ="safe").load(ROOT / "params.yaml").items():
        settings |= {f"{key}.{inner}" for inner in value} if isinstance(value, dict) else {key}
    used = {key for stage in ("prepare", "backbone", "train") for key in STAGES[stage]["params"]}
    reached = {key for key in settings if key in used or key.partition(".")[0] in used}
    assert settings - reached == HOW_TO_SAVE
    assert used <= settings | {key.partition(".")[0] for key in settings}


def test_what_stages_write_is_listed_for_dvcs_own_tools():
    metrics = [next(iter(metric)) for stage in STAGES.values() for metric in stage.get("metrics", [])]
    assert DVC_YAML["metrics"] == metrics
    assert DVC_YAML["params"] == ["params.yaml"]
    outs = [out for stage in STAGES.values() for out in stage["outs"]]
    assert all(artifact["path"] in outs for artifact in DVC_YAML["artifacts"].values())
