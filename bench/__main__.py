"""python -m bench: list the benchmarks. python -m bench NAME: run one of them."""

from __future__ import annotations

import ast
import signal
import sys
from pathlib import Path
from typing import Any

from conf.launch import imported, launch
from terminal import say

BENCHMARKS = ("ablation", "attention", "decode", "evaluation", "gpu", "prepare", "pretrained",
              "profile", "result", "serve", "speed", "start", "workers")


def docstring(name: str) -> str:
    """The docstring of a benchmark, read without importing it: that would import torch."""
    source = Path(__file__).with_name(f"{name}.py").read_text()
    return ast.get_docstring(ast.parse(source))


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in BENCHMARKS:
        del sys.argv[1]
        run: Any = f"bench.{name}:main"
        settings: Any = f"bench.{name}:{name.capitalize()}Settings"
        if "--help" in sys.argv or "-h" in sys.argv:
            # The help is made from the fields of the class.
            run, settings = imported(run), imported(settings)
        launch(run, settings, docstring(name))
    if name not in ("--help", "-h"):
        sys.exit(f"Error: {name} is not a benchmark: choose one of {', '.join(BENCHMARKS)}.")
    # End at once if the reader of our output has closed it, as in `| head`.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    say("python -m bench NAME runs a benchmark; python -m bench NAME --help shows its settings:")
    for name in BENCHMARKS:
        first_line = docstring(name).partition("\n")[0]
        say(f"  {name:<10} {first_line}")


if __name__ == "__main__":
    main()
