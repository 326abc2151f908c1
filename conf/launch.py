"""From the command line to an exit code: the wrapper around every entry point.

It composes the settings, calls the main function, and prints errors that the user can fix as one
sentence, without a traceback, with exit code 1. HYDRA_FULL_ERROR=1 shows the traceback. Entry
points import this module first and torch later, so that --help and a wrong setting are fast.
"""

import sys

if sys.platform == "win32":
    # Before our other imports, which need file locks (fcntl).
    sys.exit("Error: nanohydra needs Linux or macOS; on Windows, run it in WSL: "
             "https://learn.microsoft.com/windows/wsl")

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from conf.help import help_text
from conf.hints import instead_of_hydras, unit_note
from conf.schema import SCHEMAS, as_yaml, compose
from conf.settings import leaves
from conf.unknown import likely_name, similar_name
from hardware import sleep_while_waiting, usable_cpus
from terminal import output, say
from training.interrupt import embedded
from training.parent import stop_with_parent

# A function or class, or its name as in "train:train", which is imported only when it is needed.
Target = str | Callable[..., Any]
# Other programs that start several processes, with their variables for the number of processes and
# for the number of this one: srun, Open MPI, MPICH.
LAUNCHERS = [("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
             ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
             ("mpirun", "PMI_SIZE", "PMI_RANK")]

# --cfg job always resolves ${...}, so --resolve changes nothing.
FLAG_NAMES = {"--help": "--help", "-h": "--help", "-m": "-m", "--multirun": "-m",
              "--resolve": "--resolve"}
# Parts of torch's messages, on a GPU and on a CPU.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
# How to need less memory, by conf/NAME.yaml.
SMALLER = {
    "config": "choose a smaller training.batch_size (training.tokens_per_step keeps a step as "
              "large as it was), or training.recompute=true; python -m scripts.plan estimates the "
              "memory of a run",
    "sample": "ask for fewer completions at once: by num_samples=, or where prompts= are given, by "
              "batch_size=",
}


def launch(main: Target, root: str | type, doc: str, multirun: Target = "") -> NoReturn:
    """Exit with the code of `main(settings)`.

    The settings are `compose(root, overrides)` with the overrides of the command line. `root` is
    "config" or "sample", or the dataclass of a script's own settings. `multirun(overrides, show)`
    runs a sweep for the flag -m, or only prints its settings.
    """
    # Prepare the process, before torch is imported.
    if isinstance(main, str):
        # In a notebook, `%run train.py` must run the file as it is now.
        sys.modules.pop(main.partition(":")[0], None)
    open_streams()
    stop_with_parent()
    # torch counts the cores of the machine, even in a container that may only use a few of them.
    if usable_cpus() < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cpus()))
    # Operations that Apple's GPUs lack run on the CPU. torch reads it when it is imported.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

    # Run the command, and turn errors into an exit code.
    code = 1
    try:
        code = run_command(main, root, doc, sys.argv[1:], multirun)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has closed it, as in `| head`. A notebook's stream is no file.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = user_message(error, root)
        if not message or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        # All processes of a node find a mistake in the settings, or that the node has too few GPUs.
        if os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, ValueError):
            say(f"Error: {message}", sys.stderr)
        if isinstance(error, ValueError):
            stop_restarts()
    except KeyboardInterrupt:
        sys.stdout.flush()
        if not embedded():
            # Skip the exit handlers of threads and libraries, which can take seconds.
            os._exit(130)
        code = 130
    sys.exit(code)


def stop_restarts() -> None:
    """End torchrun, which would otherwise start a command with a mistake again (--max-restarts).

    No exit code tells torchrun that. All nodes find a mistake, and each ends its own torchrun.
    """
    is_first_of_node = os.environ.get("LOCAL_RANK") == "0"
    if is_first_of_node and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        os.kill(os.getppid(), signal.SIGTERM)


def user_message(error: Exception, root: str | type) -> str:
    """The message for an error that the user can fix; empty for a bug, which needs a traceback."""
    # Without memory, torch raises RuntimeError; its other RuntimeErrors are bugs.
    out_of_memory = any(text in str(error) for text in OUT_OF_MEMORY)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and out_of_memory):
        return f"out of memory: {SMALLER.get(root, 'ask for less at once')}."
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return "the system allows no more threads: raise the limits of ulimit -u and ulimit -v."
    if isinstance(error, RuntimeError):
        return ""
    if isinstance(error, FileExistsError | NotADirectoryError) and error.filename is not None:
        return f"{error.filename}: a file is where a folder is needed: choose another place."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return str(error) or type(error).__name__


def open_streams() -> None:
    """Replace closed standard streams by the null device, and escape text that cannot be encoded.

    A closed descriptor is opened too. Otherwise the next file that is opened would get its number,
    and receive the output of libraries.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            # Stays open until the process ends.
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            # The streams of a notebook have no `reconfigure`.
            stream.reconfigure(errors="backslashreplace")


def run_command(main: Target, root: str | type, doc: str, arguments: list[str],
                multirun: Target = "") -> int:
    """Run the command that the command line's `arguments` describe; return the exit code."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ValueError("The current folder was removed: change to another one.") from None
    known = leaves(SCHEMAS[root]) if root in SCHEMAS else {}
    flags, overrides = split_flags(arguments, known)

    # Help and sweeps need no settings of a run.
    if "--help" in flags:
        say(help_text(root, doc))
        return 0

    # Several processes train one run; a sweep starts processes of its own.
    in_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ["WORLD_SIZE"] != "1"
    if in_torchrun and (root != "config" or "-m" in flags):
        raise ValueError("torchrun trains one run with several processes: start a sweep with "
                         "python train.py -m, and other commands with python, too.")
    if "-m" in flags:
        if not multirun:
            raise ValueError("-m: only train.py runs sweeps.")
        return imported(multirun)(overrides, show="--cfg" in flags)

    # Compose the settings, and print them or run the main function with them.
    if root not in SCHEMAS:
        root = imported(root)
    if "--cfg" in flags:
        output(as_yaml(compose(root, overrides)), end="")
        return 0
    if root == "config":
        check_launcher()
    settings = compose(root, overrides)
    sleep_while_waiting()
    return imported(main)(settings)


def split_flags(arguments: list[str], known: dict[str, Any]) -> tuple[set[str], list[str]]:
    """The flags among a command line's `arguments`, each by one name, and the overrides.

    `known` are the settings that may be meant by an unknown flag. Raises ValueError for unknown
    flags.
    """
    flags: set[str] = set()
    overrides: list[str] = []
    problems: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        # --cfg job and --cfg=job are the same.
        name, equals, value = argument.partition("=")
        if name in ("--cfg", "-c"):
            if not equals:
                value = next(rest, "")
            if value != "job":
                problems.append(f"--cfg {value}: use --cfg job, which prints all settings; "
                                f"the settings of Hydra itself are not used.")
            flags.add("--cfg")
        # A flag that has one name here, an unknown one, or an override.
        elif argument in FLAG_NAMES:
            flags.add(FLAG_NAMES[argument])
        elif argument.startswith("-"):
            problems.append(unknown_flag(argument, known))
        else:
            overrides.append(argument)
    if problems and "--help" not in flags:
        raise ValueError(" ".join(problems))
    return flags, overrides


def unknown_flag(argument: str, known: dict[str, Any]) -> str:
    """The message for a flag that does not exist: one of Hydra's, or a setting with dashes."""
    flag, _, value = argument.partition("=")
    advice = instead_of_hydras(flag)
    if advice:
        return f"{flag}: no such flag here; {advice}."
    name = flag.lstrip("-").replace("-", "_")
    meant = name if name in known else likely_name(name, known) or similar_name(name, known, 0.7)
    if meant:
        setting = f"{meant}={value or '...'}"
        return f"{argument}: settings are written without dashes: {setting}{unit_note(name)}."
    return f"{argument}: no such flag; settings are written key=value, and --help lists both."


def check_launcher() -> None:
    """Raise ValueError if anything but torchrun started several processes for one training."""
    # In a shell that `srun --pty` has opened, there is one process, whatever the number of tasks.
    if "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PTY_PORT" in os.environ:
        return
    for launcher, size, rank in LAUNCHERS:
        processes = os.environ.get(size) or "1"
        if processes == "1":
            continue
        # One process says so.
        if os.environ.get(rank) != "0":
            sys.exit(1)
        raise ValueError(
            f"{launcher} started {processes} processes, which would each train the same run: use "
            f"torchrun --nproc-per-node={processes} train.py (docs/distributed.md has it for "
            f"several nodes and SLURM). Several runs at a time are a sweep: -m with "
            f"jobs={processes}.")


def imported(target: Target) -> Any:
    """The function or class that `target` is or names."""
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
