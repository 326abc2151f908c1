"""From the command line to an exit code: the wrapper around every entry point.

It composes the settings, calls the main function, and reports errors: one clear sentence a problem,
and exit code 1. HYDRA_FULL_ERROR=1 shows the stack trace instead. Entry points import this module
first, and torch later.
"""

from __future__ import annotations

import sys

if sys.platform == "win32":
    # Before any other import of ours: file locks (fcntl) do not exist there.
    sys.exit("Error: nanohydra needs Linux or macOS; on Windows, run it in WSL: "
             "https://learn.microsoft.com/windows/wsl")

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from conf.hints import instead_of_hydras, unit_note
from conf.schema import SCHEMAS, as_yaml, compose, groups, leaves, likely_name, options
from hardware import sleep_while_waiting, usable_cpus
from sweep.jobs import stop_with_parent
from terminal import output, say
from training.interrupt import embedded

# A function or class, or where it is defined, as in "train:train": then it is imported when it is
# needed.
Place = str | Callable[..., Any]

FLAG_NAMES = {"--help": "--help", "-h": "--help", "-m": "-m", "--multirun": "-m"}
LAUNCHERS = (  # the variables that hold a process's number and how many there are
    ("torchrun", "LOCAL_RANK", "WORLD_SIZE"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
FLAGS = """Flags:
  --help      this text
  --cfg job   print the composed configuration, run nothing
"""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # as torch says it of GPUs, and of CPUs
SMALLER = {  # what to ask for instead, by conf/NAME.yaml
    "config": "choose a smaller training.batch_size (training.tokens_per_step keeps a step as "
              "large as it was), or training.recompute=true; python -m scripts.plan says what a run "
              "takes",
    "sample": "ask for fewer completions at once: by num_samples=, or where prompts= are given, by "
              "batch_size=",
}
SWEEP_FLAG = """  -m          sweep: one run for each combination of values separated by commas; jobs=2 at
              a time, or on a cluster with hydra/launcher=slurm; --cfg job prints their settings
"""


def launch(main: Place, root: Place, doc: str) -> NoReturn:
    """Exit with the code of `main(settings)`.

    The settings are what `compose(root, ...)` makes of the command line. `root` is "config" or
    "sample", or the dataclass of a script's own settings.
    """
    if isinstance(main, str):
        # In a notebook, `%run train.py` is to run the file as it is now.
        sys.modules.pop(main.partition(":")[0], None)
    open_streams()
    stop_with_parent()
    # torch counts the cores of the machine, also in a container that may use a few of them.
    if usable_cpus() < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cpus()))
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
    flags, overrides = split_flags(words, leaves(SCHEMAS[root]) if root in SCHEMAS else {})
    if "--help" in flags:
        say(help_text(root, doc))
        return 0
    if "-m" in flags and root != "config":
        raise ValueError("-m: only train.py runs sweeps.")
    if root not in SCHEMAS:
        root = imported(root)
    if "-m" in flags:
        from sweep.grid import run_grid, show_grid

        return show_grid(overrides) if "--cfg" in flags else run_grid(overrides)
    if "--cfg" in flags:
        output(as_yaml(compose(root, overrides)), end="")
        return 0
    if root == "config":
        refuse_several_processes(os.environ)
    settings = compose(root, overrides)
    sleep_while_waiting()
    return imported(main)(settings)


def split_flags(words: list[str], known: dict[str, Any]) -> tuple[set[str], list[str]]:
    """The flags among a command line's `words`, by one name each, and the overrides.

    `known` are the settings that can be meant where someone writes them as flags. Raises ValueError
    for other flags.
    """
    flags: set[str] = set()
    overrides: list[str] = []
    problems: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in ("--cfg", "-c"):
            what = value if equals else next(rest, "")
            if what != "job":
                problems.append(f"--cfg {what}: --cfg job prints all settings; Hydra's own are "
                                f"not used.")
            flags.add("--cfg")
        elif word in FLAG_NAMES:
            flags.add(FLAG_NAMES[word])
        elif word.startswith("-") and word != "--resolve":  # which --cfg job always does
            problems.append(no_such_flag(word, known))
        elif word != "--resolve":
            overrides.append(word)
    if problems and "--help" not in flags:
        raise ValueError(" ".join(problems))
    return flags, overrides


def no_such_flag(word: str, known: dict[str, Any]) -> str:
    """The sentence about a flag that does not exist: Hydra's, or a setting written as a flag."""
    flag, _, value = word.partition("=")
    if advice := instead_of_hydras(flag):
        return f"{flag}: no such flag here; {advice}."
    name = flag.lstrip("-").replace("-", "_")
    meant = name if name in known else likely_name(name, known)
    if meant:
        setting = f"{meant}={value or '...'}"
        return f"{word}: settings are written without dashes: {setting}{unit_note(name)}."
    return f"{word}: no such flag; settings are written key=value, and --help lists both."


def refuse_several_processes(environment: Mapping[str, str]) -> None:
    """Raise ValueError in each of several processes that a launcher started for one training.

    They would be several trainings of one run. Only the first process says so.
    """
    for launcher, rank, size in LAUNCHERS:
        if rank in environment and environment.get(size, "1") not in ("", "1"):
            if environment[rank] != "0":
                sys.exit(1)
            raise ValueError(f"{launcher} started {environment[size]} processes, and one training "
                             f"uses one process (and one GPU): run python train.py without "
                             f"{launcher}. Several runs at a time are a sweep: -m with "
                             f"jobs={environment[size]}.")


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
