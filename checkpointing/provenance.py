"""Records how a run was computed: versions, machine, git commit; one line per start of training."""

import functools
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

STARTS = "environment.jsonl"  # in the run folder
PACKAGES = ("torch", "numpy", "hydra-core", "tiktoken", "rustbpe", "safetensors", "wandb",
            "transformers")
MAX_BYTES = 2**24
CODE = Path(__file__).parent.parent


def record_start(folder: Path, step: int, environment: dict[str, Any]) -> None:
    """Append a line for a start of training from `step` in this device `environment`."""
    start = {"step": step, "time": datetime.now(UTC).isoformat(timespec="seconds"),
             "command": sys.argv, "host": platform.node(), "system": platform.platform(),
             "python": platform.python_version()}
    with closing(atomic.LineFile(folder / STARTS)) as lines:
        lines.add(json.dumps(start | environment | versions() | git_state()))


def compiled_at_last_start(folder: Path) -> bool | None:
    """Whether the last start of the run compiled the model; None if there was none."""
    try:
        lines = atomic.read_regular(folder / STARTS, MAX_BYTES).splitlines()
        compiled = atomic.parse_json(lines[-1])["compiled"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return compiled if isinstance(compiled, bool) else None


@functools.cache
def versions() -> dict[str, str]:
    """The versions of the installed packages."""
    found = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_state() -> dict[str, str | int]:
    """The commit of the code and the number of changed files; empty without git."""
    try:
        commit = git("rev-parse", "HEAD").strip()
        changed = git("status", "--porcelain").splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git_commit": commit, "git_changed_files": len(changed)}


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=CODE, capture_output=True, text=True,
                          check=True, timeout=5)
    return done.stdout
