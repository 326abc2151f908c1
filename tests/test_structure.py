"""The structure of design.md: imports go down only, and the three wings do not import each other."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENTRY_POINTS = {"train", "trainer", "startup", "sample", "eval", "serve"}
ABOVE_CONF = {"checkpointing", "generation", "evaluation", "serving", "exporting", "sweep", "report", "scripts", "bench"} | ENTRY_POINTS
# Each room, and the rooms that it must not import.
FORBIDDEN = {
    "model": {"data", "training", "conf"} | ABOVE_CONF,
    "data": {"model", "training", "conf"} | ABOVE_CONF,
    "training": {"model", "data", "conf"} | ABOVE_CONF,
    "conf": ABOVE_CONF,
    "checkpointing": ABOVE_CONF - {"checkpointing"},
    "generation": {"evaluation", "serving", "exporting", "sweep", "report", "scripts", "bench"} | ENTRY_POINTS,
    "evaluation": {"serving", "exporting", "sweep", "report", "scripts", "bench"} | ENTRY_POINTS,
    "serving": {"evaluation", "exporting", "sweep", "scripts", "bench"} | ENTRY_POINTS,
    "exporting": {"generation", "evaluation", "serving", "sweep", "report", "scripts", "bench"} | ENTRY_POINTS,
    "sweep": {"generation", "evaluation", "serving", "scripts", "bench"} | ENTRY_POINTS,
    "report": {"model", "data", "torch", "generation", "serving", "sweep", "scripts", "bench"} | ENTRY_POINTS,
    "scripts": {"bench", "serving", "sample", "eval", "serve"},
    "bench": {"sample", "eval"},
}


@functools.cache
def parsed(path: Path) -> tuple[set[str], list[ast.Call]]:
    """The packages that a file imports, and its calls of torch.load."""
    found, calls = set(), []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "load" and ast.unparse(node.func).endswith("torch.load"):
            calls.append(node)
    return found, calls


def imports(path: Path) -> set[str]:
    """The top-level packages that a file imports anywhere, also inside functions."""
    return parsed(path)[0]


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def product() -> list[Path]:
    return [*files(*FORBIDDEN), *ROOT.glob("*.py")]


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_go_down_only(room):
    for path in files(room):
        assert not imports(path) & FORBIDDEN[room], path


def test_reports_use_only_the_statistics_of_evaluation():
    """They know only numbers, so that a report does not wait for torch."""
    for path in files("report"):
        assert set(re.findall(r"^ *(?:from|import) (evaluation\S*)", path.read_text(), re.MULTILINE)) <= {"evaluation.comparison"}, path
    numbers = {"__future__", "collections", "dataclasses", "itertools", "math", "numpy", "optional", "scipy", "terminal", "typing"}
    assert imports(ROOT / "evaluation" / "comparison.py") <= numbers


def test_train_imports_no_other_entry_point():
    for path in (ROOT / "train.py", ROOT / "startup.py", ROOT / "trainer.py"):
        assert not imports(path) & {"sample", "eval", "serve", "serving", "scripts", "bench"}, path


def test_model_knows_no_files_and_no_hydra():
    unknown = {"hydra", "omegaconf", "pathlib", "os", "json", "tiktoken", "numpy", "atomic"}
    for path in files("model"):
        assert not imports(path) & unknown, path


def test_only_conf_and_sweep_import_hydra():
    for path in product():
        if path.parent.name not in ("conf", "sweep"):
            assert not imports(path) & {"hydra", "omegaconf"}, path


def test_no_pickle_and_torch_load_of_tensors_only():
    """In the one file that reads what other programs wrote."""
    for path in product():
        assert "pickle" not in imports(path), path
        _, calls = parsed(path)
        for call in calls:
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert given.get("weights_only") == "True", path
        allowed = path.parts[-2:] == ("checkpointing", "weight_files.py")
        assert path.read_text().count("torch.load") == len(calls) == int(allowed), path


def test_only_progress_imports_tqdm():
    for path in product():
        assert path.name == "progress.py" or "tqdm" not in imports(path), path


def test_every_test_named_in_the_docs_exists():
    names = set()
    for path in (ROOT / "docs").glob("*.md"):
        names |= set(re.findall(r"\btest_\w+", path.read_text()))
    defined = {path.stem for path in files("tests")}
    for path in files("tests"):
        defined |= set(re.findall(r"def (test_\w+)\(", path.read_text()))
    assert names <= defined, names - defined


def test_the_list_of_files_is_complete():
    rooms = re.findall(r"^(\w+)/ .*\n((?:  \S.*\n)+)", (ROOT / "docs" / "files.md").read_text(), re.MULTILINE)
    listed = {(room, name) for room, lines in rooms for name in re.findall(r"^  (\w+\.py) ", lines, re.MULTILINE)}
    assert listed == {(path.parent.name, path.name) for path in files(*dict(rooms)) if path.name != "__init__.py"}
