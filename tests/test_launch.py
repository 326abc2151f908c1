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
import yaml

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
def test_a_notebooks_stream_is_kept(monkeypatch, name):
    monkeypatch.setattr(sys, name, stream := NotebookStream())
    open_streams()
    assert getattr(sys, name) is stream


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("closed", [False, True])
def test_a_closed_stream_becomes_the_null_device(monkeypatch, name, closed):
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
def test_a_program_runs_with_closed_streams(tmp_path, closing):
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


def test_ctrl_c_in_a_thread_ends_only_the_thread(monkeypatch):
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


ENTRY_POINTS = ["train.py", "sample.py", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("scripts/[!_]*.py")
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
    assert len(ENTRY_POINTS) >= 10
    commands = [[path, flag] for path in ENTRY_POINTS for flag in ("--help", "-h")]
    for (path, flag), (code, said) in zip(commands, without_torch(*commands), strict=True):
        first_line = (ROOT / path).read_text().partition('"""')[2].partition("\n")[0]
        assert (code, said.partition("\n")[0]) == (0, first_line), (path, flag)


@pytest.mark.slow
def test_a_wrong_setting_is_refused_without_torch():
    commands = [["train.py", "model.n_layr=3"], ["train.py", "-m", "model.n_layr=3,4"], ["train.py", "optim.lr=-1"],
                ["sample.py", "promt=x"], ["scripts/sweep.py", "sweep=lr_width", "training.max_stps=3"],
                ["scripts/attention_map.py", "promt=x"], ["scripts/export_tokenizer.py", "rnu=x"], ["scripts/report.py", "rnus=x"],
                ["scripts/torture.py", "kills=-1"], ["scripts/verify_resume.py", "kills=-1"], ["scripts/prepare.py", "clean=x"],
                ["scripts/plan.py", "mfu=3"]]
    for command, (code, said) in zip(commands, without_torch(*commands), strict=True):
        assert code == 1 and said.startswith("Error: ") and command[-1].partition("=")[0] in said


@pytest.mark.parametrize("path", ["train.py", "scripts/plan.py"])
def test_windows_is_refused_in_one_sentence(path):
    program = (f"import sys, runpy; sys.platform = 'win32'; sys.modules['fcntl'] = None; "
               f"runpy.run_path({path!r}, run_name='__main__')")
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={"PYTHONPATH": str(ROOT)},
                         capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1 and "WSL" in ran.stderr


def command(*arguments, root="config"):
    multirun = "sweep.grid:run_grid" if root == "config" else ""
    return launcher.run_command(lambda settings: 99, root, "", list(arguments), multirun)


@pytest.mark.parametrize("words", [["--cfg", "job"], ["--cfg=job"], ["-c", "job"], ["--cfg", "job", "--resolve"]])
def test_every_form_of_cfg_job_prints_the_settings(words, capsys):
    assert command("seed=3", *words, "model=nano") == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert (settings["seed"], settings["model"]["n_layer"]) == (3, 2)


@pytest.mark.parametrize("words", [["-m", "--cfg", "job"], ["--multirun", "--cfg=job"]])
def test_cfg_job_of_a_sweep_prints_each_job(words, capsys):
    assert command("seed=3,4", *words, "model=nano") == 0
    said = capsys.readouterr().out
    assert [settings["seed"] for settings in yaml.safe_load_all(said)] == [3, 4] and "# seed=3\n" in said


@pytest.mark.parametrize(("words", "said"), [
    (["--cfg", "hydra"], "--cfg job"), (["--cfg=all"], "--cfg job"), (["--cfg"], "--cfg job"), (["-c", "hydra"], "--cfg job"),
    (["-m", "seed=1,2", "--cfg", "hydra"], "--cfg job"), (["-cd", "conf2"], "experiment=path/to/own.yaml"),
    (["--config-dir=conf2"], "experiment=path/to/own.yaml"), (["--config-dir", "conf2"], "experiment=path/to/own.yaml"),
    (["-cn", "x"], "experiment=path/to/own.yaml"), (["--config-name", "x"], "experiment=path/to/own.yaml"),
    (["--config-path=x"], "experiment=path/to/own.yaml"), (["--info"], "--cfg job"), (["--info", "defaults"], "--cfg job"),
    (["-i"], "--cfg job"), (["--hydra-help"], "--help"), (["--package", "model"], "--cfg job"), (["-p", "x"], "--cfg job"),
    (["--run"], "leave it out"), (["-sc", "install=bash"], "not supported"), (["--version"], "git describe"),
    (["--experimental-rerun=x"], "experiment=runs/NAME/config.yaml"),
    (["--learning_rate=1e-3"], "without dashes: optim.lr=1e-3"), (["--learning-rate", "1e-3"], "without dashes: optim.lr=..."),
    (["--compile=False"], "training.compile=False"), (["--batch_size=12"], "training.batch_size=12"),
    (["--device=cpu"], "training.device=cpu"), (["--seed=3"], "seed=3"), (["--max_iters=3"], "training.max_steps=3"),
    (["--num-train-epochs=3"], "training.max_steps=3: it counts steps"), (["--verbose"], "no such flag"), (["-x"], "no such flag"),
])
def test_an_unknown_flag_names_the_alternative(words, said):
    with pytest.raises(ValueError, match=r"^-") as caught:
        command(*words)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_removed_folder_is_named(monkeypatch, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ValueError, match="current folder was removed"):
        command()


def test_only_training_is_swept():
    with pytest.raises(ValueError, match=r"only train\.py runs sweeps"):
        command("-m", "seed=1,2", root="sample")


@pytest.mark.parametrize(("program", "size", "rank"), launcher.LAUNCHERS)
def test_only_torchrun_may_start_several_processes(monkeypatch, capsys, program, size, rank):
    monkeypatch.setenv(size, "4")
    monkeypatch.setenv(rank, "0")
    with pytest.raises(ValueError, match=rf"{program} started 4 processes.*torchrun --nproc-per-node=4"):
        command()
    # The others end without a message.
    monkeypatch.setenv(rank, "1")
    with pytest.raises(SystemExit) as caught:
        command()
    assert caught.value.code == 1 and capsys.readouterr().err == ""
    with monkeypatch.context() as in_a_shell:
        in_a_shell.setenv("SLURM_PTY_PORT", "12345")
        assert command() == 99
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "torchrun")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert command() == 99


@pytest.mark.parametrize(("restarts", "local_rank", "ends"), [(3, 0, True), (0, 0, False), (3, 1, False)])
def test_a_mistake_ends_a_torchrun_with_restarts(monkeypatch, restarts, local_rank, ends):
    """On each of several nodes."""
    ended = []
    monkeypatch.setattr("os.kill", lambda process, number: ended.append(process))
    for name, value in {"RANK": 2, "LOCAL_RANK": local_rank, "TORCHELASTIC_MAX_RESTARTS": restarts}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "argv", ["train.py", "foo=1"])
    with pytest.raises(SystemExit, match="1"):
        launch(print, "config", "")
    assert ended == [os.getppid()] * ends


@pytest.mark.parametrize("rank, local_rank, printed", [(0, 0, True), (1, 1, False), (2, 0, True)])
def test_a_mistake_is_printed_once_on_each_node(monkeypatch, capsys, rank, local_rank, printed):
    """A node may have too few GPUs: its first process says so."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(sys, "argv", ["train.py", "foo=1"])
    with pytest.raises(SystemExit, match="1"):
        launch(print, "config", "")
    assert ("Error: foo" in capsys.readouterr().err) == printed


def test_torchrun_starts_neither_sweeps_nor_samples(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(ValueError, match=r"start a sweep with python train\.py -m"):
        command("-m", "seed=1,2")
    with pytest.raises(ValueError, match="torchrun trains one run"):
        launcher.run_command(print, "sample", "", [])


def test_scripts_are_listed():
    ran = subprocess.run([sys.executable, "-m", "scripts"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = {line.split()[0] for line in ran.stdout.splitlines()[1:]}
    assert listed == {Path(path).stem for path in ENTRY_POINTS if path.startswith("scripts/")}


@pytest.mark.parametrize("below", ["", "runs", "runs/deeper"])
def test_a_file_in_the_place_of_a_folder_is_explained(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file") as caught:
        (tmp_path / "file" / below).mkdir(parents=True)
    assert "a file is where a folder is needed" in launcher.user_message(caught.value, "config")


def test_a_limit_on_threads_is_explained():
    assert "ulimit -u" in launcher.user_message(RuntimeError("can't start new thread"), "config")
    assert not launcher.user_message(RuntimeError("a bug"), "config")
