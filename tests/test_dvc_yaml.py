"""`dvc.yaml` beside the code: each stage's deps are the files that its script imports, its params those it reads."""

import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
DVC_YAML = YAML(typ="safe").load(ROOT / "dvc.yaml")
STAGES = DVC_YAML["stages"]
HOW_TO_SAVE = {"checkpoint_minutes", "checkpoint_store_gb", "feature_bank_gb"}  # change nothing that a stage writes


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


def all_settings() -> set[str]:
    """Return every key of params.yaml, as "group.key" those in a group."""
    keys = set()
    for key, value in YAML(typ="safe").load(ROOT / "params.yaml").items():
        keys |= {f"{key}.{inner}" for inner in value} if isinstance(value, dict) else {key}
    return keys


def params_of(stage: str) -> set[str]:
    """Return the settings that a stage depends on, those of whole groups one by one."""
    listed = set(STAGES[stage]["params"])
    found = {key for key in all_settings() if key in listed or key.partition(".")[0] in listed}
    assert listed <= found | {key.partition(".")[0] for key in found}, "unknown settings"
    return found


def settings_read(script: Path) -> set[str]:
    """Return the keys of params.yaml that a script names as `settings.…`."""
    names = {ast.unparse(node) for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Attribute)}
    return {name.removeprefix("settings.") for name in names} & all_settings()


@pytest.mark.parametrize("stage", ["prepare", "backbone"])
def test_params_are_the_settings_that_the_script_reads(stage):
    # Settings that are read for an early error alone, and change nothing that the stage writes.
    checked = {"prepare": {"num_classes"}, "backbone": {"device"}}[stage]
    assert params_of(stage) == settings_read(ROOT / f"src/{stage}.py") - checked


def test_train_depends_on_every_setting_that_is_not_another_stages_alone():
    others = params_of("prepare") | params_of("backbone") | {key for key in all_settings() if "evaluate." in key}
    assert params_of("train") == all_settings() - (others - {"model_name"}) - HOW_TO_SAVE


def test_what_stages_write_is_listed_for_dvcs_own_tools():
    metrics = [next(iter(metric)) for stage in STAGES.values() for metric in stage.get("metrics", [])]
    assert DVC_YAML["metrics"] == metrics
    assert DVC_YAML["params"] == ["params.yaml"]
    outs = [out for stage in STAGES.values() for out in stage["outs"]]
    assert all(artifact["path"] in outs for artifact in DVC_YAML["artifacts"].values())
