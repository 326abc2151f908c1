"""What a run was computed by: versions, machine, the state of the code. One line for each start of its training."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from contextlib import closing, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import atomic

STARTS = "environment.jsonl"  # in the run's folder
PACKAGES = ("torch", "numpy", "hydra-core", "tiktoken", "rustbpe", "safetensors", "wandb")
MOST_BYTES = 2**24
CODE = Path(__file__).parent.parent


def record_start(folder: Path, step: int, computing: dict[str, Any]) -> None:
    """Write down what training goes on with from `step`: `computing` says on which device, and how."""
    here = {"step": step, "time": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv,
            "host": platform.node(), "system": platform.platform(), "python": platform.python_version()}
    with closing(atomic.LineFile(folder / STARTS)) as starts:
        starts.add(json.dumps(here | computing | versions() | git_state()))


def compiled_at_last_start(folder: Path) -> bool | None:
    """Whether the run's last start compiled the model; None if there was none."""
    try:
        lines = atomic.read_regular(folder / STARTS, MOST_BYTES).splitlines()
        compiled = atomic.parse_json(lines[-1])["compiled"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return compiled if isinstance(compiled, bool) else None


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    there = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            there[name] = metadata.version(name)
    return there


def git_state() -> dict[str, str | int]:
    """The commit of the code and how many of its files differ from it; nothing where there is no git."""
    try:
        commit = git("rev-parse", "HEAD").strip()
        return {"git_commit": commit, "git_changed_files": len(git("status", "--porcelain").splitlines())}
    except (OSError, subprocess.SubprocessError):
        return {}


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=CODE, capture_output=True, text=True, check=True, timeout=5).stdout
