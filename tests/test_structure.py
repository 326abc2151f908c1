"""The house keeps its shape: imports go down only, and the three wings do not know each other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WINGS = ("model", "data", "training")


def imports(path: Path) -> set[str]:
    """The top-level packages that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_imports_no_other_wing_and_nothing_above_it(wing):
    above = {"conf", "train", "sample", "scripts"} | set(WINGS) - {wing}
    for path in files(wing):
        assert not imports(path) & above, path


def test_conf_imports_no_entry_point():
    for path in files("conf"):
        assert not imports(path) & {"train", "sample", "scripts"}, path


def test_reports_know_runs_and_no_entry_point():
    for path in files("report"):
        assert not imports(path) & {"model", "data", "train", "sample", "scripts", "torch"}, path


def test_the_model_knows_no_files_and_no_configuration_framework():
    for path in files("model"):
        assert not imports(path) & {"hydra", "omegaconf", "pathlib", "os", "json", "tiktoken", "numpy", "atomic"}, path


def test_only_conf_knows_hydra():
    for path in [*files(*WINGS, "report", "scripts"), ROOT / "train.py", ROOT / "sample.py"]:
        assert not imports(path) & {"hydra", "omegaconf"}, path


def test_a_dict_config_lives_in_the_schema_only():
    for path in [*files(*WINGS, "report", "scripts"), ROOT / "train.py", ROOT / "sample.py", ROOT / "conf" / "launch.py"]:
        assert "omegaconf" not in path.read_text().lower(), path


def test_no_pickle_and_no_torch_load():
    for path in [*files(*WINGS, "conf", "report", "scripts"), *ROOT.glob("*.py")]:
        assert "pickle" not in imports(path) and "torch.load(" not in path.read_text(), path


def test_progress_is_shown_by_one_module():
    for path in [*files(*WINGS, "conf", "report", "scripts"), *ROOT.glob("*.py")]:
        assert path.name == "progress.py" or "tqdm" not in imports(path), path


def test_every_test_that_the_documentation_names_exists():
    names = {name for path in (ROOT / "docs").glob("*.md") for name in re.findall(r"\btest_\w+", path.read_text())}
    defined = {name for path in files("tests") for name in re.findall(r"def (test_\w+)\(", path.read_text())}
    modules = {path.stem for path in files("tests")}
    assert names <= defined | modules, names - defined - modules
