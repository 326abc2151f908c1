"""From the command line to an exit code: the wrapper around every entry point.

It composes the settings, calls the main function, and reports errors: one clear sentence a problem and exit code 1.
HYDRA_FULL_ERROR=1 shows the stack trace instead. Entry points import this module first, and torch later.
"""

from __future__ import annotations

import sys

if sys.platform == "win32":
    # Before any other import of ours: file locks (fcntl) do not exist there.
    sys.exit("Error: nanohydra needs Linux or macOS; on Windows, run it in WSL: https://learn.microsoft.com/windows/wsl")

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from typing import Any, NoReturn

import yaml

from conf.schema import SCHEMAS, compose, groups, options
from conf.slots import stop_with_parent
from terminal import output, say
from training.interrupt import embedded

# A function or class, or where it is defined, as in "train:train": then it is imported when it is needed.
Place = str | Callable[..., Any]

FLAGS = """Flags:
  --help      this text
  --cfg job   print the composed configuration, run nothing
"""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # as torch says it of GPUs, and of CPUs
SMALLER = {  # what to ask for instead, by conf/NAME.yaml
    "config": "choose a smaller training.batch_size (training.tokens_per_step keeps a step as large as it was), or "
              "training.recompute=true; python -m scripts.plan says what a run takes",
    "sample": "ask for fewer completions at once: by num_samples=, or where prompts= are given, by batch_size=",
}
SWEEP_FLAG = """  -m          sweep: one run for each combination of values separated by commas; jobs=2 at a time,
              or on a cluster with hydra/launcher=slurm
"""


def launch(main: Place, root: Place, doc: str) -> NoReturn:
    """Exit with the code of `main(settings)`; the settings are what `compose(root, ...)` makes of the command line.

    `root` is "config" or "sample", or the dataclass of a script's own settings.
    """
    if isinstance(main, str):
        # In a notebook, `%run train.py` is to run the file as it is now.
        sys.modules.pop(main.partition(":")[0], None)
    open_streams()
    stop_with_parent()
    try:
        code = run_command(main, root, doc, sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read what we print has seen enough, as in `| head`
        with suppress(OSError):  # a notebook's stream is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (ValueError, OSError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        system = isinstance(error, OSError) and error.filename is not None  # as in a path that cannot be opened
        say(f"Error: {error.filename}: {error.strerror}." if system else f"Error: {error}", sys.stderr)
        code = 1
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
        if not known or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        say(f"Error: out of memory: {SMALLER.get(root, 'ask for less at once')}.", sys.stderr)
        code = 1
    except KeyboardInterrupt:
        sys.stdout.flush()
        if not embedded():
            os._exit(130)  # at once: threads and libraries would make the user wait
        code = 130
    sys.exit(code)


def open_streams() -> None:
    """Give the program standard streams that it can use: closed ones lead nowhere, and no character is an error.

    A closed descriptor is opened too: else the next file opened would get its number, and what libraries print
    with it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115 (open until the end)
        elif name != "stdin" and hasattr(stream, "reconfigure"):  # a notebook's stream has no such method
            stream.reconfigure(errors="backslashreplace")


def run_command(main: Place, root: Place, doc: str, words: list[str]) -> int:
    """Do what the command line's `words` ask for; return the exit code."""
    flags = [word for word in words if word.startswith("-")]
    overrides = [word for word in words if not word.startswith("-")]
    if "--help" in flags or "-h" in flags:
        say(help_text(root, doc))
        return 0
    if root not in SCHEMAS:
        root = imported(root)
    if flags == ["--cfg"] and "job" in overrides:
        overrides.remove("job")
        output(yaml.safe_dump(asdict(compose(root, overrides)), sort_keys=False, allow_unicode=True), end="")
        return 0
    if root == "config" and flags in (["-m"], ["--multirun"]):
        from conf.grid import run_grid

        return run_grid(overrides)
    if flags:
        raise ValueError(f"{' '.join(flags)}: no such flag; settings are written key=value, and --help lists both.")
    settings = compose(root, overrides)
    return imported(main)(settings)


def imported(place: Place) -> Any:
    """What `place` stands for."""
    if not isinstance(place, str):
        return place
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def help_text(root: Place, doc: str) -> str:
    """The entry point's docstring, the presets, the flags."""
    if root != "config":
        return f"{doc.strip()}\n\n{FLAGS}"
    presets = "\n".join(f"  {group}={'|'.join(options(group))}" for group in groups())
    return f"{doc.strip()}\n\nPresets, from conf/:\n{presets}\n\n{FLAGS}{SWEEP_FLAG}"
