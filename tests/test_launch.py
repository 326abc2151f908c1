"""The wrapper around every entry point: standard streams, notebooks, threads, systems, and what needs no torch."""

from __future__ import annotations

import builtins
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from conf import launch as launcher
from conf.launch import launch, open_streams

ROOT = Path(__file__).parent.parent
NAMES = ("stdin", "stdout", "stderr")


class NotebookStream(io.StringIO):
    """As ipykernel's: it prints, has no `reconfigure`, and is no file."""

    def __getattribute__(self, name):
        if name == "reconfigure":
            raise AttributeError(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_notebooks_stream_is_left_as_it_is(monkeypatch, name):
    monkeypatch.setattr(sys, name, stream := NotebookStream())
    open_streams()
    assert getattr(sys, name) is stream


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("closed", [False, True])
def test_a_missing_stream_leads_nowhere(monkeypatch, name, closed):
    gone = io.StringIO() if closed else None
    if closed:
        gone.close()
    monkeypatch.setattr(sys, name, gone)
    open_streams()
    opened = getattr(sys, name)
    assert opened.read() == "" if name == "stdin" else opened.write("lost") == 4


PROGRAM = """
import os, sys
from conf.launch import launch
def main(settings):
    print("printed")
    sys.stdin.read()
    numbers = sorted(os.open(os.devnull, os.O_RDONLY) for _ in range(3))
    assert numbers[0] > 2, numbers
    open(sys.argv[0] + ".done", "w").close()
    return 0
sys.argv = [sys.argv[1]]
launch(main, "sample", "")
"""


@pytest.mark.slow
@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_no_program(tmp_path, closing):
    """Files opened later do not get the numbers of the closed descriptors either."""
    command = f'exec "$0" -c "$1" "$2" {closing}'
    done = subprocess.run(["sh", "-c", command, sys.executable, PROGRAM, tmp_path / "program"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and (tmp_path / "program.done").exists(), done.stderr


def interrupted(settings):
    raise KeyboardInterrupt


@pytest.mark.parametrize("notebook", [True, False])
def test_ctrl_c_ends_a_program_but_not_a_notebook(monkeypatch, notebook):
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    if notebook:
        monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)

    def ended(code):
        raise RuntimeError(f"the process ended with {code}")

    monkeypatch.setattr(launcher.os, "_exit", ended)
    with pytest.raises(SystemExit if notebook else RuntimeError, match="130"):
        launch(interrupted, "sample", "")


def test_a_thread_can_launch_and_its_ctrl_c_ends_only_it(monkeypatch):
    def run():
        try:
            launch(interrupted, "sample", "")
        except SystemExit as error:
            codes.append(error.code)

    codes: list[object] = []
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    monkeypatch.setattr(os, "_exit", pytest.fail)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [130]


ENTRY_POINTS = ["train.py", "sample.py", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("scripts/*.py")
                                                if "launch(" in path.read_text())]

# Runs command lines one after the other in a process that cannot import torch; prints what each said, as JSON.
WITHOUT_TORCH = """
import contextlib, io, json, runpy, sys
sys.modules["torch"] = None
for command in json.loads(sys.argv[1]):
    sys.argv, said, code = command, io.TextIOWrapper(io.BytesIO()), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as exit:
            code = exit.code
    said.seek(0)
    print(json.dumps([code, said.read()]))
"""


def without_torch(*commands: list[str]) -> list[tuple[int, str]]:
    ran = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)], cwd=ROOT,
                         env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    return [tuple(json.loads(line)) for line in ran.stdout.splitlines()]


def test_help_of_every_entry_point_needs_no_torch():
    assert len(ENTRY_POINTS) > 10
    commands = [[path, flag] for path in ENTRY_POINTS for flag in ("--help", "-h")]
    for (path, flag), (code, said) in zip(commands, without_torch(*commands), strict=True):
        first_line = (ROOT / path).read_text().partition('"""')[2].partition("\n")[0]
        assert (code, said.partition("\n")[0]) == (0, first_line), (path, flag)


def test_a_wrong_setting_is_refused_without_torch():
    commands = [["train.py", "model.n_layr=3"], ["train.py", "-m", "model.n_layr=3,4"], ["train.py", "optim.lr=-1"],
                ["sample.py", "promt=x"], ["scripts/sweep.py", "sweep=lr_width", "training.max_stps=3"]]
    for command, (code, said) in zip(commands, without_torch(*commands), strict=True):
        assert code == 1 and said.startswith("Error: ") and command[-1].partition("=")[0] in said


@pytest.mark.parametrize("path", ["train.py", "scripts/plan.py"])
def test_windows_is_one_sentence(path):
    program = (f"import sys, runpy; sys.platform = 'win32'; sys.modules['fcntl'] = None; "
               f"runpy.run_path({path!r}, run_name='__main__')")
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={"PYTHONPATH": str(ROOT)},
                         capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1 and "WSL" in ran.stderr
