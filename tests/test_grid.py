"""Grids: the values of a command line, jobs and their runner, and sweeps after kills."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_atomic import special

import locks
import train as main
from checkpointing import store
from checkpointing.resume import is_finished
from conf.yaml_files import ConfigError
from sweep import cluster, grid, jobs, summary
from sweep.cluster import ClusterRunner, Queue, check_size, node_task
from sweep.jobs import Job
from sweep.runner import LocalRunner, run_jobs
from sweep.summary import Progress
from sweep.values import values_of

ROOT = Path(__file__).parent.parent


# Values of a command line.


@pytest.mark.parametrize(("override", "expected"), [
    ("optim.lr=1e-3,3e-3", ["0.001", "0.003"]), ("seed=range(1,4)", ["1", "2", "3"]),
    ("model=nano,gpt2", ["nano", "gpt2"]), ("model=glob(gpt2-*)", ["gpt2-large", "gpt2-medium", "gpt2-xl"]),
    ("training.max_seconds=null,5", ["null", "5"]), ("logger.tags=choice(a,b)", ["a", "b"]),
    ("data.path='a, b','c d'", ["a, b", "c d"]), ("data.path=a b,c", ["a b", "c"]), ("data.path='a,b'", ["a,b"]),
    ("data.path=one's", ["one's"]), ("data.path=''", [""]), (r"name='it\'s',1e3", ["it's", "1e3"]),
    (r"data.path=a\,b", ["a,b"]), ("data.path={a,b}.txt,c", ["{a,b}.txt", "c"]), ("data.path=[a,b]", ["[a,b]"]),
    ("data.path=a[1,b", ["a[1", "b"]), ("data.path=x=y.txt,ä.txt", ["x=y.txt", "ä.txt"]),
    ("data.path=${oc.env:X,1},b", ["${oc.env:X,1}", "b"]), ("seed=${oc.env:X,1}", ["${oc.env:X,1}"]),
    ("training.device='cpu'", ["'cpu'"]),
])
def test_values_of_an_override(override, expected):
    assert values_of(override) == [f"{override.partition('=')[0]}={value}" for value in expected]


@pytest.mark.parametrize("override", [
    "optim.lr=interval(0,1)", "data.path=interval(0,1)", "data.path=glob(*)", "seed=range(3,3)", "seed=range(1,4,-1)"])
def test_values_that_cannot_be_listed_are_refused(override):
    with pytest.raises(ValueError, match="no values that can be listed") as caught:
        values_of(override)
    assert override in str(caught.value)


# From a command line to jobs.


@pytest.mark.parametrize(("overrides", "message"), [
    ([], "no values to sweep"), (["jobs=2", "name=x"], "no values to sweep"), (["seed=1,2", "jobs=0"], "jobs=0 must be"),
    (["seed=1,2", "gpus_per_job=2"], "processes_per_job=N"), (["seed=1,2", "processes_per_job=0"], "processes_per_job=0 must be"),
    (["data=text", "data.path=x=y.txt,z.txt"], "x=y.txt does not exist"), (["sed=1,2"], "did you mean seed"),
    (["seed=1,2", "name=../up"], "is outside runs_dir"), (["seed=1,2", "runs_dir=a,b"], "runs_dir=a,b names several folders"), (["seed=-1,-2"], "seed=-1 must be"),
])
def test_an_invalid_sweep_is_refused_and_writes_nothing(overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        grid.run_grid(overrides)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("overrides", [["seed=range(1,1000000000)"], ["seed=range(1,200)", "optim.lr=range(1,200)"],
                                       ["optim.lr=range(0,1,1e-9)"], ["seed=range(1,3,0)"]])
def test_a_sweep_of_too_many_jobs_is_refused_at_once(overrides):
    with pytest.raises(ConfigError, match="more than 10,000 jobs"):
        grid.plan_grid(overrides)


def test_jobs_are_named_by_the_swept_settings():
    combinations = [["optim.lr=1e-3", "model=nano", f"model.n_layer={n}", "name=x"] for n in ("2", "0x")]
    composed, failures = grid.compose_all(combinations, ["optim.lr", "model", "model.n_layer"])
    assert list(composed) == ["lr=0.001,model=nano,n_layer=2"]
    assert failures == ["lr=1e-3,model=nano,n_layer=0x: model.n_layer=0x is not a whole number."]
    values = {"training.max_seconds": None, "model.bias": True}
    assert grid.job_name(list(values), values) == "max_seconds=null,bias=true"


def test_equal_jobs_are_merged_and_different_ones_share_no_name(tmp_path):
    combinations = [[f"optim.lr={lr}", "name=x"] for lr in ("1e-3", "0.001")]
    assert list(grid.compose_all(combinations, ["optim.lr"])[0]) == ["lr=0.001"]
    for name in ("a b", "a_b"):
        (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match="have the same name"):
        grid.compose_all([["data=text", f"data.path={tmp_path / name}", "name=x"] for name in ("a b", "a_b")], ["data.path"])


def test_the_folder_of_a_sweep_does_not_depend_on_the_values():
    one, both = grid.plan_grid(["optim.lr=1e-3"]), grid.plan_grid(["optim.lr=1e-3,3e-3"])
    assert list(one.composed) == ["lr=0.001"] and list(both.composed) == ["lr=0.001", "lr=0.003"]
    assert one.folder == both.folder == Path("runs/pydocs-by-lr")
    assert grid.automatic_name({"data.path=a,b": ["data.path=a", "data.path=b"], "data=text": ["data=text"]},
                               ["data.path"]) == "sweep-by-path"  # data=text is invalid without a path


def test_a_sweep_keeps_its_folder_when_its_text_is_gone(tmp_path):
    book = tmp_path / "book.txt"
    words = [f"runs_dir={tmp_path}", "data=text", f"data.path={book}", "seed=1,2"]
    book.touch()
    folder = grid.plan_grid(words).folder
    folder.mkdir()
    book.unlink()
    assert grid.plan_grid(words).folder == folder
    with pytest.raises(ConfigError, match=r"book\.txt does not exist"):
        grid.plan_grid([*words, "optim.lr=0.5"])


def test_a_sweep_of_one_job_is_named_by_its_identity():
    plan = grid.plan_grid(["runs_dir=elsewhere", "training=smoke", "seed=1", "logger.report=false"])
    assert plan.swept == ["seed"] and list(plan.composed) == ["seed=1"]


def test_losses_of_other_data_are_compared_in_bits_per_byte():
    assert summary.comparison_metric(["optim.lr", "model.n_layer"]) == "val_loss"
    for swept in (["optim.lr", "data.vocab_size"], ["data"], ["experiment"]):
        assert summary.comparison_metric(swept) == "bits_per_byte"


# Jobs, and the runner that starts and stops them.


class ScriptJob(Job):
    """A job that runs a shell script instead of a training."""

    script = "true"
    command = property(lambda self: ["sh", "-c", self.script])


@pytest.fixture
def job(tmp_path):
    def make(name="a", script="true"):
        made = ScriptJob(name, tmp_path, [], max_steps=4)
        made.script = script
        return made
    return make


def run(*ran, count=2):
    progress = Progress(len(ran), 0, [])
    return run_jobs(grid.Grid(list(ran)), LocalRunner(count), progress), progress


def test_a_failed_job_stops_no_other_and_names_its_last_error(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("progress.PLAIN_SECONDS", 0)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/silent.txt").write_text("Error: of an earlier attempt\n")
    code, progress = run(job("bad", "echo Error: too wide; echo more; exit 1"), job("killed", "kill -9 $$"),
                         job("silent", "exit 3"), job("good", "echo fine"), job("last", "echo on stderr >&2; exit 1"))
    assert code == 0 and progress.counts["done"] == 1
    assert f"bad: too wide Log: {tmp_path}/logs/bad.txt" in progress.failures
    assert {line.partition(" Log:")[0] for line in progress.failures} == {
        "bad: too wide", "killed: killed by SIGKILL; run the same command again to resume it",
        "silent: exit code 3", "last: on stderr"}
    assert summary.report_failures(progress.failures) == 1 and summary.report_failures([]) == 0
    printed = capsys.readouterr()
    assert "good: done" in printed.out and "silent: failed" in printed.out
    assert "0 running, 1 done, 0 stopped, 4 failed" in printed.err


def test_the_time_left_is_unknown_while_a_job_starts(job, monkeypatch, capsys):
    monkeypatch.setattr("progress.PLAIN_SECONDS", 0)
    progress, ran = Progress(3, 1, []), job()
    ran.max_steps = 100
    for ran.step in (1, 9, 10):
        progress.bar.start_t, progress.bar.mininterval = progress.bar.start_t - 50, 0
        progress.show([ran])
    lines = capsys.readouterr().err.splitlines()[-3:]
    assert [line.rpartition(", ")[2] for line in lines] == ["? left", "? left", "47:30 left"]


@pytest.mark.parametrize(("printed", "reason"), [
    ("Error: too wide", "too wide"), ("Interrupted: 4 of 9 steps are saved", "Interrupted: 4 of 9 steps are saved"),
    ("failed (exitcode: -9) local_rank: 0", "one of its 2 processes ended without a message")])
def test_a_failure_under_torchrun_is_the_runs_own_sentence(job, printed, reason):
    ran = job("a", f"echo '{printed}'; echo =====; exit 1")
    ran.processes = 2
    _, progress = run(ran)
    assert progress.failures[0].startswith(f"a: {reason}")


def test_the_best_job_is_named_with_the_next_commands(job, tmp_path, capsys):
    ran = [job(name) for name in ("a", "b b", "none")]
    ran[0].best, ran[1].best = 2.0, 1.5
    summary.print_best(ran)
    assert capsys.readouterr().out.splitlines() == [
        f"Best: {tmp_path}/b b, val_loss 1.5000", f"  python sample.py 'run={tmp_path}/b b'",
        f"  python -m scripts.report runs={tmp_path}"]
    summary.print_best(ran[2:])
    summary.print_best([])
    assert capsys.readouterr().out == ""


def test_the_command_of_a_job_groups_it_in_wandb(tmp_path):
    command = Job("seed=1", tmp_path / "sweep", ["seed=1", "logger.group=mine"], 4).command
    assert command[2:] == ["logger.group=sweep", "logger.tags=sweep", "seed=1", "logger.group=mine",
                           f"runs_dir={tmp_path}", "name=sweep/seed=1"]


@pytest.mark.slow
def test_no_more_jobs_run_at_a_time_than_asked_for(job, tmp_path):
    script = f"touch {tmp_path}/on-$$; ls {tmp_path} | grep -c on- >> {tmp_path}/counts; sleep 0.3; rm {tmp_path}/on-$$"
    run(*(job(str(number), script) for number in range(4)))
    assert max(map(int, (tmp_path / "counts").read_text().split())) == 2


def test_jobs_share_threads_and_gpus(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    shares = [LocalRunner(4).environment(slot) for slot in range(4)]
    assert [share["OMP_NUM_THREADS"] for share in shares] == ["2"] * 4
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["4", "7", "4", "7"]
    assert LocalRunner(1).environment(0)["CUDA_VISIBLE_DEVICES"] == "4,7"
    assert LocalRunner(16).environment(0)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    shares = [LocalRunner(2, processes=2).environment(slot) for slot in range(2)]
    assert [(share["OMP_NUM_THREADS"], share["CUDA_VISIBLE_DEVICES"]) for share in shares] == [("2", "4,7"), ("2", "5,4")]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert LocalRunner(2).environment(1)["CUDA_VISIBLE_DEVICES"] == "1"


def wait_for(*conditions):
    until = time.monotonic() + 120
    while not all(condition() for condition in conditions):
        assert time.monotonic() < until
        time.sleep(0.02)


ENDLESS = "touch {0}/on-$NAME; while true; do sleep 0.05; done"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stops_all_jobs_and_starts_no_other(job, tmp_path, number):
    ran = [job(name, f"trap 'exit 143' TERM; NAME={name}; {ENDLESS.format(tmp_path)}") for name in "abc"]

    def interrupt():
        wait_for((tmp_path / "on-a").exists, (tmp_path / "on-b").exists)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    code, progress = run(*ran)
    assert code == 128 + number and not progress.failures and not (tmp_path / "on-c").exists()
    assert [one.process.poll() for one in ran[:2]] == [143, 143]


@pytest.mark.parametrize(("step", "state"), [(0, "stopped"), (2, "failed")])
def test_a_stopped_job_of_torchrun_saved_all_or_failed(job, tmp_path, capsys, step, state):
    """Its exit code is 1 in both cases. It stops when its standard input ends, without a signal."""
    metrics = as_lines({"step": step, "loss": 3}).strip()
    ran = job("a", f"trap '' TERM; mkdir -p {tmp_path}/a; echo '{metrics}' > {tmp_path}/a/metrics.jsonl; touch {tmp_path}/on-a; read x; exit 1")
    ran.processes = 2

    def interrupt():
        wait_for((tmp_path / "on-a").exists)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    code, progress = run(ran)
    assert code == 130 and f"a: {state} after" in capsys.readouterr().out and bool(progress.failures) == (state == "failed")


@pytest.mark.slow
def test_a_second_interruption_kills_the_jobs(job, tmp_path):
    stubborn = job("a", f"trap '' TERM; NAME=a; {ENDLESS.format(tmp_path)}")

    def interrupt_twice():
        wait_for((tmp_path / "on-a").exists)
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: stubborn.stop_requested)  # two signals at once may count as one
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_twice).start()
    with pytest.raises(KeyboardInterrupt):
        run(stubborn)
    assert stubborn.process.poll() == -signal.SIGKILL


def test_a_job_waits_for_the_process_that_locks_its_folder(job, tmp_path):
    """The child of a sweep that was killed may still be saving."""
    (tmp_path / "a").mkdir()
    lock = locks.Lock(tmp_path / "a" / "lock", "another")
    threading.Timer(0.3, lambda: ((tmp_path / "free").touch(), lock.release())).start()
    _, progress = run(job("a", f"test -e {tmp_path}/free"))
    assert progress.counts["done"] == 1


def test_a_sweep_is_locked_and_not_inside_a_run(tmp_path):
    with jobs.locked(tmp_path / "sweep"), pytest.raises(ValueError, match="is being swept by process"), \
         jobs.locked(tmp_path / "sweep"):
        pass
    for name in ("lock", "config.yaml"):
        (tmp_path / name).touch()
    for folder in (tmp_path, tmp_path / "inner" / "sweep"):
        with pytest.raises(ValueError, match=f"{tmp_path} holds a run"), jobs.locked(folder):
            pass


# Metrics of running jobs.


@pytest.fixture
def metrics(tmp_path):
    (tmp_path / "a").mkdir()
    return tmp_path / "a/metrics.jsonl"


def as_lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_metrics_are_read_as_they_are_written(job, metrics):
    one = job()
    one.update()
    assert one.new_rows == [] and math.isinf(one.best)
    metrics.write_text(as_lines({"step": 1, "loss": 3}, {"step": 2, "val_loss": 2.5}, {"step": 3, "val_loss": None}))
    one.update()
    assert (one.step, one.best, len(one.new_rows)) == (3, 2.5, 3)
    with open(metrics, "a") as file:
        file.write('{"step": 4, "val_')
        file.flush()
        one.update()
        assert one.new_rows == []
        file.write('loss": 1}\n')
    one.update()
    assert one.new_rows == [{"step": 4, "val_loss": 1}] and one.best == 1
    metrics.write_text(as_lines({"step": 2, "val_loss": 2.5}))  # cut back to a checkpoint
    one.update()
    assert one.new_rows == [{"step": 2, "val_loss": 2.5}]


def test_invalid_metrics_are_skipped(job, metrics):
    lines = ["[" * 100_000, "3", "{}", '{"step": "x"}', '{"step": null, "val_loss": 1}', "\x00", '{"step": 5, "val_loss": "low"}']
    metrics.write_text("\n".join(lines) + "\n")
    one = job()
    one.update()
    assert one.new_rows == [{"step": 5, "val_loss": "low"}] and math.isinf(one.best)


@pytest.mark.parametrize("kind", ["FIFO", "link"])
def test_metrics_that_are_no_regular_file_are_skipped(job, metrics, kind):
    special(metrics, kind)
    one = job()
    one.update()
    assert one.new_rows == []


# Whole sweeps, whose jobs are trainings.


@pytest.mark.slow
def test_a_run_is_finished_under_equal_settings_only(compose_tiny, tmp_path):
    folder = tmp_path / "runs" / "tiny"
    assert not is_finished(compose_tiny("training.max_steps=2"), folder)
    main.train(compose_tiny("training.max_steps=2", "training.sample_tokens=0"))
    assert is_finished(compose_tiny("training.max_steps=2", "logger.group=other"), folder)
    assert not is_finished(compose_tiny("training.max_steps=3"), folder)
    assert not is_finished(compose_tiny("training.max_steps=2", "restart=true", "seed=2"), folder)
    with pytest.raises(ValueError, match="settings: seed was 1337"):
        is_finished(compose_tiny("training.max_steps=2", "seed=2"), folder)


def tiny_sweep(book, folder, *overrides):
    return ["model=nano", "data=text", f"data.path={book}", "data.tokenizer=char", "training=smoke", "training.sample_tokens=0",
            "training.eval_tokens=512", "training.compile=false", "logger.report=false", f"runs_dir={folder}", "name=sweep",
            *overrides]


def start(book, folder, *overrides):
    command = [sys.executable, "train.py", "-m", *tiny_sweep(book, folder, *overrides)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children(folder):
    """The running trainings of the sweep in `folder`."""
    found = subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True).stdout.splitlines()
    return [line for line in found if "train.py logger.group" in line and f"runs_dir={folder}" in line]


def steps(folder, name):
    saved = store.list_checkpoints(folder / "sweep" / name / "checkpoints")
    return saved[-1].step if saved else 0


@pytest.fixture(scope="module")
def finished(book, tmp_path_factory):
    """A sweep of two jobs and its output. A block_size of 1e5 exceeds the validation split, which only a job notices."""
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert grid.run_grid(tiny_sweep(book, folder, "training.max_steps=2", "model.block_size=16,1e5", "optim.lr=1e-3,-1", "jobs=2")) == 1
    return folder, printed.getvalue()


@pytest.mark.slow
def test_a_sweep_runs_each_job_and_lists_failures(finished):
    folder, printed = finished
    assert "1 of 4 jobs finished" in printed and "3 failed" in printed
    assert f"Best: {folder}/sweep/block_size=16,lr=0.001, val_loss " in printed
    assert printed.count("lr=-1: optim.lr=-1.0 must be more than 0") == 2
    assert "block_size=100000,lr=0.001: The " in printed
    assert f"Log: {folder}/sweep/logs/block_size=100000,lr=0.001.txt" in printed
    assert steps(folder, "block_size=16,lr=0.001") == 2
    assert not (ROOT / "outputs").exists() and not (ROOT / "multirun").exists()


@pytest.mark.slow
def test_the_same_command_runs_only_new_jobs(finished, book, capsys):
    folder, _ = finished
    overrides = tiny_sweep(book, folder, "training.max_steps=2", "model.block_size=16", "optim.lr=1e-3,2e-3")
    started = (folder / "sweep/logs/block_size=16,lr=0.001.txt").read_text()
    overrides.remove("model.block_size=16")
    overrides.append("model.block_size=16,16")  # still names the job by it
    assert grid.run_grid(overrides) == 0
    assert "Sweep: " in capsys.readouterr().out
    assert (folder / "sweep/logs/block_size=16,lr=0.001.txt").read_text() == started
    with pytest.raises(ValueError, match="settings: seed was 1337"):
        grid.run_grid([*overrides, "seed=2"])


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_orphans_and_resumes(book, tmp_path):
    endless = ["training.max_steps=1e5", "training.eval_every=1e5", "jobs=2"]
    names = ("lr=0.001", "lr=0.002")
    program = start(book, tmp_path, *endless, "optim.lr=1e-3,2e-3")
    wait_for(*(lambda name=name: steps(tmp_path, name) for name in names))
    program.kill()
    program.communicate()
    wait_for(lambda: not children(tmp_path))
    reached = [steps(tmp_path, name) for name in names]

    # One of the jobs is enough to see it resumed. It keeps its name because the setting is still swept.
    program = start(book, tmp_path, *endless, "optim.lr=1e-3,1e-3")
    wait_for(lambda: steps(tmp_path, names[0]) > reached[0])
    program.send_signal(signal.SIGINT)
    printed, _ = program.communicate(timeout=120)
    assert program.returncode == 130 and "0 of 1 job finished" in printed and not children(tmp_path)
    assert f"from step {reached[0]}" in (tmp_path / "sweep" / "logs" / f"{names[0]}.txt").read_text()


@pytest.mark.slow
def test_a_sweep_of_jobs_with_two_processes_each(book, tmp_path):
    words = ["training.tokens_per_step=256", "training.max_steps=4", "optim.lr=1e-3,2e-3", "jobs=2", "processes_per_job=2"]
    program = start(book, tmp_path, *words)
    printed, _ = program.communicate(timeout=120)
    assert program.returncode == 0 and "2 of 2 jobs finished" in printed, printed
    for name in ("lr=0.001", "lr=0.002"):
        assert steps(tmp_path, name) == 4
        assert (tmp_path / "sweep/logs" / f"{name}.txt").read_text().count("Trained 4 steps") == 1


# Clusters.


@pytest.mark.slow
def test_a_cluster_runs_the_jobs_and_lists_failures(book, tmp_path, capsys):
    """With Submitit's local executor, which stands for a cluster."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    overrides = tiny_sweep(book, tmp_path, "training.max_steps=2", "model.block_size=16,1e5", "hydra/launcher=submitit_local")
    assert grid.run_grid(overrides) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 jobs finished" in printed and "block_size=100000: The " in printed
    assert steps(tmp_path, "block_size=16") == 2


@pytest.mark.parametrize(("overrides", "message"), [
    (["hydra/launcher=basic"], "use slurm"), (["hydra/launcher=joblib"], "jobs=2"), (["hydra/launcher=nope"], "nope"),
    (["hydra/launcher=slurm", "hydra.launcher.partitoin=a"], "partitoin"), (["hydra/launcher=slurm"], "slurm cluster"),
])
def test_an_unusable_launcher_is_refused(overrides, message, tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # where no srun is
    with pytest.raises(ValueError, match=message) as caught:
        grid.run_grid(["seed=1,2", *overrides])
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{"nodes": 2}, {"tasks_per_node": 4}, {"gpus_per_node": 4}])
def test_a_cluster_job_is_one_task_with_a_gpu_a_process(settings):
    check_size({"nodes": 1, "tasks_per_node": 1, "gpus_per_node": 2}, processes=2)
    with pytest.raises(ValueError, match=f"hydra.launcher.{next(iter(settings))}=.*processes_per_job="):
        check_size(settings, processes=2)


def test_the_slurm_preset_extends_the_launchers_own():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from conf.composition import launcher_settings

    settings = launcher_settings(["hydra/launcher=slurm", "hydra.launcher.partition=gpu"])
    assert settings["_target_"].endswith("SlurmLauncher") and settings["partition"] == "gpu" and settings["timeout_min"] == 240


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands that stand for SLURM's. Its queue is a file, and sbatch adds a job that waits."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    folder = tmp_path / "bin"
    folder.mkdir()
    commands = {
        "srun": "", "sbatch": f'cp "$1" {folder}/job; echo "7 PENDING PartitionConfig" >> {folder}/queue; echo Submitted batch job 7',
        "squeue": f"cat {folder}/queue", "scancel": f"echo 7 CANCELLED None > {folder}/queue"}
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(Queue, "poll_seconds", 0.0)
    monkeypatch.setattr(cluster, "RESULT_SECONDS", 0.0)
    return folder


def submitted(folder):
    """A runner with a job in SLURM's queue."""
    runner = ClusterRunner(["hydra/launcher=slurm"], folder / "sweep")
    job = Job("a", folder / "sweep", [], 1)
    runner.start([job])
    return runner, job


def test_a_job_that_waits_in_slurm_is_not_submitted_again(slurm, capsys):
    _, job = submitted(slurm)
    assert job.process.poll() is None and "PartitionConfig" in capsys.readouterr().out
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in (slurm / "job").read_text()
    # A second command, after the first was killed.
    _, again = submitted(slurm)
    assert again.process.poll() is None and (slurm / "queue").read_text().count("PENDING") == 1
    # Neither a job that SLURM has forgotten nor one that is ending is waited for.
    for queue in ("", "7 COMPLETING None\n"):
        (slurm / "queue").write_text(queue)
        submitted(slurm)
        assert (slurm / "queue").read_text().count("PENDING") == 1


def test_a_job_that_slurm_cancels_ends_without_accounting(slurm):
    _, job = submitted(slurm)
    (slurm / "queue").write_text("7 TIMEOUT TimeLimit\n")
    job.process.job.paths.stderr.write_text("srun: error\nslurmstepd: CANCELLED\n")
    assert job.process.poll() == 1
    assert "its state is TIMEOUT. slurmstepd: CANCELLED" in job.log.read_text()
    runner, job = submitted(slurm)
    runner.__exit__(None)
    assert job.process.poll() == 143


def test_a_controller_that_does_not_answer_ends_no_job(slurm):
    runner, job = submitted(slurm)
    assert job.process.poll() is None
    (slurm / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert job.process.poll() is None
    # Nor a job that was submitted after its last answer.
    (slurm / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 8\n")
    later = Job("b", slurm / "sweep", [], 1)
    runner.start([later])
    assert later.process.poll() is None


def test_jobs_that_slurm_does_not_accept_are_one_sentence(slurm):
    (slurm / "sbatch").write_text("#!/bin/sh\necho sbatch: error: Invalid partition name >&2\nexit 1\n")
    with pytest.raises(ValueError, match="did not accept the jobs: sbatch: error: Invalid partition name"):
        submitted(slurm)


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="SLURM runs on Linux")
def test_a_job_saves_before_slurm_runs_it_again(tmp_path):
    """Submitit calls `checkpoint` in a signal handler, while the job is waited for."""
    submitit = pytest.importorskip("submitit")
    program = "import os, signal, time; os.kill(os.getpid(), signal.SIGUSR2); os.read(0, 1); time.sleep(0.1); print('saved')"
    task, log, requeued = node_task(2), tmp_path / "log", []

    def at_time_limit(number, frame):
        requeued.append((task.checkpoint([], ""), log.read_text()))
        raise submitit.core.utils.UncompletedJobError

    def warn():
        # A busy machine starts the process late.
        while not hasattr(task, "process"):
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, at_time_limit)
    threading.Thread(target=warn).start()
    assert task([sys.executable, "-c", program], str(log)) == 0
    signal.signal(signal.SIGUSR1, before)
    assert requeued[0][1] == "saved\n" and requeued[0][0].function is task


def test_a_job_that_slurm_runs_again_has_not_failed(slurm):
    """After scontrol requeue or a preemption the training has saved and ended, for now."""
    _, job = submitted(slurm)
    job.process.job.paths.result_pickle.write_bytes(pickle.dumps(("success", 143)))
    for state, code in (("PENDING BeginTime", None), ("RUNNING None", None), ("COMPLETED None", 143)):
        (slurm / "queue").write_text(f"7 {state}\n")
        assert job.process.poll() == code
