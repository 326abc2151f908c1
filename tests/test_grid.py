"""Grids: what the values of a command line become, jobs in slots, and what is left of a sweep after kills."""

from __future__ import annotations

import json
import math
import os
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
import train as story
from checkpointing import store
from checkpointing.resume import is_finished
from conf.schema import ConfigError
from sweep import grid, jobs
from sweep.jobs import Job, LocalRunner, Progress, run_jobs

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("override", "values"), [
    ("optim.lr=1e-3,3e-3", ["0.001", "0.003"]), ("seed=range(1,4)", ["1", "2", "3"]), ("model=nano,gpt2", ["nano", "gpt2"]),
    ("data.path='a, b','c d'", ["a, b", "c d"]), ("data.path=a b,c", ["a b", "c"]), ("training.max_seconds=null,5", ["null", "5"]),
    ("data.path=one's", ["one's"]), ("data.path='a,b'", ["a,b"]), ("data.path=x=y.txt,z.txt", ["x=y.txt", "z.txt"]), ("data.path=ä.txt,ö.txt", ["ä.txt", "ö.txt"]),
    (r"data.path=a\,b", ["a,b"]), ("data.path={a,b}.txt,c", ["{a,b}.txt", "c"]), ("data.path=[a,b]", ["[a,b]"]), (r"name='it\'s',1e3", ["it's", "1e3"]),
    ("data.path=${oc.env:X,1},b", ["${oc.env:X,1}", "b"]), ("data.path=a[1,b", ["a[1", "b"]), ("data.path=''", [""]), ("logger.tags=choice(a,b)", ["a", "b"]),
    ("training.device='cpu'", ["'cpu'"]), ("seed=${oc.env:X,1}", ["${oc.env:X,1}"]), ("model=glob(gpt2-*)", ["gpt2-large", "gpt2-medium", "gpt2-xl"]),
])
def test_the_values_that_an_override_stands_for(override, values):
    assert grid.values_of(override) == [f"{override.partition('=')[0]}={value}" for value in values]


@pytest.mark.parametrize("override", ["optim.lr=interval(0,1)", "seed=range(3,3)", "data.path=glob(*)", "data.path=interval(0,1)", "seed=range(1,4,-1)", "seed=range(1,1,0)"])
def test_values_that_cannot_be_listed_are_one_sentence(override):
    with pytest.raises(ValueError, match="no values that can be listed") as caught:
        grid.values_of(override)
    assert override in str(caught.value)


@pytest.mark.parametrize(("overrides", "words"), [
    ([], "no values to sweep"), (["data=text", "data.path=x=y.txt,z.txt"], "x=y.txt does not exist"), (["jobs=2", "name=x"], "no values to sweep"), (["seed=1,2", "jobs=0"], "jobs=0 must be"),
    (["sed=1,2"], "did you mean seed"), (["seed=1,2", "name=../up"], "is outside runs_dir"), (["seed=-1,-2"], "seed=-1 must be"),
])
def test_a_sweep_that_cannot_be_is_refused_before_anything_is_written(overrides, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        grid.run_grid(overrides)
    assert not list(tmp_path.iterdir())


def test_jobs_are_named_by_what_is_swept():
    composed, failures = grid.compose_all([["optim.lr=1e-3", "model=nano", f"model.n_layer={n}", "name=x"] for n in ("2", "0x")],
                                          ["optim.lr", "model", "model.n_layer"])
    assert list(composed) == ["lr=0.001,model=nano,n_layer=2"]
    assert failures == ["lr=1e-3,model=nano,n_layer=0x: model.n_layer=0x is not a whole number."]
    assert grid.job_name(["training.max_seconds", "model.bias"], {"training.max_seconds": None, "model.bias": True}) == "max_seconds=null,bias=true"


def test_equal_jobs_are_one_and_different_ones_share_no_name(tmp_path):
    words = [[f"optim.lr={lr}", "name=x"] for lr in ("1e-3", "0.001")]
    assert list(grid.compose_all(words, ["optim.lr"])[0]) == ["lr=0.001"]
    for name in ("a b", "a_b"):
        (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match="have the same name"):
        grid.compose_all([["data=text", f"data.path={tmp_path / name}", "name=x"] for name in ("a b", "a_b")], ["data.path"])


@pytest.mark.slow
def test_other_values_of_the_same_settings_are_the_same_sweep():
    def name(*words):
        choices = {word: grid.values_of(word) for word in words}
        return grid.automatic_name(choices, {word.partition("=")[0]: word for word in words if choices[word] != [word]})

    assert name("optim.lr=1,2", "seed=3") == name("optim.lr=2,3", "seed=3") == "pydocs-seed=3-by-lr"
    assert name("data.path=a,b", "data=text") == "sweep-by-path"  # which is nothing without a path


def job(tmp_path, name, script="true", max_steps=4):
    """A job that runs a shell script in place of a training."""
    made = Job(name, tmp_path, [], max_steps)
    made.__class__ = type("Scripted", (Job,), {"command": property(lambda self: ["sh", "-c", script])})
    return made


def metrics(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(jobs, count=2):
    source = grid.Grid(list(jobs), [])
    return run_jobs(source, LocalRunner(count), Progress(len(jobs), 0, 0)), source


def test_a_failing_job_stops_no_other_and_its_reason_is_its_last_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("progress.PLAIN_SECONDS", 0)
    code, source = run([job(tmp_path, "bad", "echo Error: too wide; echo more; exit 1"), job(tmp_path, "killed", "kill -9 $$"),
                        job(tmp_path, "mute", "exit 3"), job(tmp_path, "good", "echo fine"), job(tmp_path, "last", "echo what is it >&2; exit 1")])
    assert code == 0 and source.done == 1
    assert f"bad: too wide Log: {tmp_path}/logs/bad.txt" in source.failures
    assert {line.partition(" Log:")[0] for line in source.failures} == {
        "bad: too wide", "killed: killed by SIGKILL; run the same command again to resume it", "mute: exit code 3", "last: what is it"}
    assert jobs.report_failures(source.failures) == 1 and jobs.report_failures([]) == 0
    said = capsys.readouterr()
    assert "good: done" in said.out and "mute: failed" in said.out and "0 running, 1 done, 0 stopped, 4 failed" in said.err


def test_an_error_of_an_earlier_attempt_is_not_the_reason_of_this_one(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/a.txt").write_text("Error: old\n")
    assert run([job(tmp_path, "a", "exit 2")])[1].failures[0].startswith("a: exit code 2")


def test_the_best_job_is_named_with_what_shows_more(tmp_path, capsys):
    ran = [job(tmp_path, name) for name in ("a", "b b", "none")]
    for one, best in zip(ran, (2.0, 1.5, math.inf), strict=True):
        one.best = best
    jobs.print_best(ran)
    assert capsys.readouterr().out.splitlines() == [
        f"Best: {tmp_path}/b b, val_loss 1.5000", f"  python sample.py 'run={tmp_path}/b b'",
        f"  python -m scripts.report runs={tmp_path}"]
    jobs.print_best(ran[2:])
    jobs.print_best([])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("words", [["seed=range(1,1000000000)"], ["seed=range(1,200)", "optim.lr=range(1,200)"],
                                   ["optim.lr=range(0,1,1e-9)"], ["seed=range(1,3,0)"]])
def test_a_sweep_of_countless_jobs_is_refused_at_once(words):
    with pytest.raises(ConfigError, match="more than 10,000 jobs"):
        grid.plan_grid(words)


def test_one_value_is_a_sweep_of_one_job():
    plan = grid.plan_grid(["optim.lr=1e-3"])
    assert list(plan.composed) == ["lr=0.001"] and plan.folder == Path("runs/pydocs-by-lr")
    both = grid.plan_grid(["optim.lr=1e-3,3e-3"])
    assert list(both.composed) == ["lr=0.001", "lr=0.003"] and both.folder == plan.folder


def test_a_sweep_of_one_job_is_named_by_what_makes_its_run():
    plan = grid.plan_grid(["runs_dir=elsewhere", "training=smoke", "seed=1", "logger.report=false"])
    assert plan.swept == ["seed"] and list(plan.composed) == ["seed=1"]


@pytest.mark.slow
def test_so_many_jobs_run_at_a_time(tmp_path):
    script = f"touch {tmp_path}/on-$$; ls {tmp_path} | grep -c on- >> {tmp_path}/counts; sleep 0.3; rm {tmp_path}/on-$$"
    run([job(tmp_path, str(number), script) for number in range(4)])
    assert max(map(int, (tmp_path / "counts").read_text().split())) == 2


def test_slots_share_threads_and_gpus_out(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    shares = [LocalRunner(4).environment(slot) for slot in range(4)]
    assert [share["OMP_NUM_THREADS"] for share in shares] == ["2"] * 4
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["4", "7", "4", "7"]
    assert LocalRunner(1).environment(0)["CUDA_VISIBLE_DEVICES"] == "4,7"  # one alone sees what there is
    assert LocalRunner(16).environment(0)["OMP_NUM_THREADS"] == "1"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert LocalRunner(2).environment(1)["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stops_all_jobs_and_starts_no_other(tmp_path, number, capsys):
    jobs = [job(tmp_path, name, f"trap 'exit 143' TERM; touch {tmp_path}/on-{name}; while true; do sleep 0.05; done") for name in "abc"]
    threading.Thread(target=lambda: (wait_for((tmp_path / "on-a").exists, (tmp_path / "on-b").exists), os.kill(os.getpid(), number))).start()
    code, source = run(jobs)
    assert code == 128 + number and not source.failures and not (tmp_path / "on-c").exists()
    assert [one.process.poll() for one in jobs[:2]] == [143, 143]


@pytest.mark.slow
def test_a_second_interruption_does_not_wait(tmp_path):
    stubborn = job(tmp_path, "a", f"trap '' TERM; touch {tmp_path}/on-a; while true; do sleep 0.05; done")

    def twice():
        wait_for((tmp_path / "on-a").exists)
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: stubborn.stop_requested)  # two signals at once may count as one
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=twice).start()
    with pytest.raises(KeyboardInterrupt):
        run([stubborn])
    assert stubborn.process.poll() == -signal.SIGKILL


@pytest.mark.slow
def test_a_folder_that_another_process_trains_in_is_waited_for(tmp_path):
    """As that of a sweep that was killed, whose child still saves."""
    (tmp_path / "a").mkdir()
    lock = locks.Lock(tmp_path / "a" / "lock", "another")
    threading.Timer(0.5, lambda: ((tmp_path / "free").touch(), lock.release())).start()
    _, source = run([job(tmp_path, "a", f"test -e {tmp_path}/free")])
    assert source.done == 1


def test_a_sweep_is_run_once_at_a_time_and_not_in_a_runs_folder(tmp_path):
    with jobs.locked(tmp_path / "sweep"), pytest.raises(ValueError, match="is being swept by process"), jobs.locked(tmp_path / "sweep"):
        pass
    for name in ("lock", "config.yaml"):
        (tmp_path / name).touch()
    for folder in (tmp_path, tmp_path / "inner" / "sweep"):  # a job in it would lie inside the run, and be refused
        with pytest.raises(ValueError, match=f"{tmp_path} holds a run"), jobs.locked(folder):
            pass


def test_metrics_are_read_as_they_come(tmp_path):
    one = job(tmp_path, "a")
    one.update()
    assert one.new_rows == [] and math.isinf(one.best)
    metrics(tmp_path / "a", {"step": 1, "loss": 3}, {"step": 2, "val_loss": 2.5}, {"step": 3, "val_loss": None})
    one.update()
    assert (one.step, one.best, len(one.new_rows)) == (3, 2.5, 3)
    with open(tmp_path / "a/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "val_')
    one.update()
    assert one.new_rows == []
    with open(tmp_path / "a/metrics.jsonl", "a") as file:
        file.write('loss": 1}\n')
    one.update()
    assert one.new_rows == [{"step": 4, "val_loss": 1}] and one.best == 1
    metrics(tmp_path / "a", {"step": 2, "val_loss": 2.5})  # a checkpoint was gone back to
    one.update()
    assert one.new_rows == [{"step": 2, "val_loss": 2.5}]


@pytest.mark.parametrize("line", ["[" * 100_000, "3", "{}", '{"step": "x"}', '{"step": null, "val_loss": 1}', "\x00"])
def test_metrics_that_no_training_writes_are_passed_over(tmp_path, line):
    one = job(tmp_path, "a")
    (tmp_path / "a").mkdir(parents=True)
    (tmp_path / "a/metrics.jsonl").write_text(line + '\n{"step": 5, "val_loss": "low"}\n')
    one.update()
    assert (one.step, len(one.new_rows)) == (5, 1) and math.isinf(one.best)


@pytest.mark.parametrize("kind", ["FIFO", "link"])
def test_metrics_that_are_no_plain_file_are_not_waited_for(tmp_path, kind):
    one = job(tmp_path, "a")
    (tmp_path / "a").mkdir(parents=True)
    special(tmp_path / "a/metrics.jsonl", kind)
    one.update()
    assert one.new_rows == []


def test_losses_of_other_tokens_are_compared_by_the_byte():
    assert jobs.comparison_metric(["optim.lr", "model.n_layer"]) == "val_loss"
    assert jobs.comparison_metric(["optim.lr", "data.vocab_size"]) == jobs.comparison_metric(["data"]) == "bits_per_byte"


@pytest.mark.slow
def test_a_run_is_finished_under_equal_settings_only(compose_tiny, tmp_path):
    folder = tmp_path / "runs" / "tiny"
    assert not is_finished(compose_tiny("training.max_steps=2"), folder)
    story.train(compose_tiny("training.max_steps=2", "training.sample_tokens=0"))
    assert is_finished(compose_tiny("training.max_steps=2", "logger.group=other"), folder)
    assert not is_finished(compose_tiny("training.max_steps=3"), folder)
    assert not is_finished(compose_tiny("training.max_steps=2", "restart=true", "seed=2"), folder)
    with pytest.raises(ValueError, match="different settings: seed was 1337, now 2"):
        is_finished(compose_tiny("training.max_steps=2", "seed=2"), folder)


def wait_for(*conditions):
    until = time.monotonic() + 120
    while not all(condition() for condition in conditions):
        assert time.monotonic() < until
        time.sleep(0.02)


def sweep(book, tmp_path, *words):
    return subprocess.Popen(
        [sys.executable, "train.py", "-m", "model=nano", "data=text", f"data.path={book}", "data.tokenizer=char", "training=smoke",
         "training.sample_tokens=0", "training.eval_tokens=512", "training.compile=false", f"runs_dir={tmp_path}", "name=sweep", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children(tmp_path):
    """The trainings below `tmp_path` that run."""
    found = subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True).stdout.splitlines()
    return [line for line in found if "train.py logger.group" in line and f"runs_dir={tmp_path}" in line]


def steps(tmp_path, name):
    saved = store.list_checkpoints(tmp_path / "sweep" / name / "checkpoints")
    return saved[-1].step if saved else 0


@pytest.mark.slow
def test_a_sweep_runs_each_job_lists_the_failures_and_skips_what_is_finished(book, tmp_path):
    """The context of 1e5 is longer than the validation split, which only shows once the text is read."""
    words = ["training.max_steps=2", "model.block_size=16,1e5", "optim.lr=1e-3,-1", "jobs=2"]
    program = sweep(book, tmp_path, *words)
    said, complaints = program.communicate(timeout=300)
    assert program.returncode == 1 and "Traceback" not in complaints
    assert "1 of 4 jobs finished" in said and "3 failed" in said
    assert f"Best: {tmp_path}/sweep/block_size=16,lr=0.001, val_loss " in said
    assert said.count("lr=-1: optim.lr=-1.0 must be more than 0") == 2
    assert "block_size=100000,lr=0.001: The " in said and f"Log: {tmp_path}/sweep/logs/block_size=100000,lr=0.001.txt" in said
    assert steps(tmp_path, "block_size=16,lr=0.001") == 2
    assert not (ROOT / "outputs").exists() and not (ROOT / "multirun").exists()

    program = sweep(book, tmp_path, "training.max_steps=2", "model.block_size=16", "optim.lr=1e-3,2e-3")
    said, _ = program.communicate(timeout=300)
    assert program.returncode == 0, said
    program = sweep(book, tmp_path, "training.max_steps=2", "model.block_size=16,32", "optim.lr=1e-3")
    said, complaints = program.communicate(timeout=300)
    assert program.returncode == 0 and "2 jobs" in said

    program = sweep(book, tmp_path, "training.max_steps=2", "model.block_size=16,32", "optim.lr=1e-3", "seed=2")
    said, complaints = program.communicate(timeout=300)
    assert program.returncode == 1 and "seed was 1337, now 2" in complaints and "Sweep:" not in said


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_orphan_and_goes_on(book, tmp_path):
    endless = ["training.max_steps=1e5", "training.eval_every=1e5", "optim.lr=1e-3,2e-3", "jobs=2"]
    names = ("lr=0.001", "lr=0.002")
    program = sweep(book, tmp_path, *endless)
    wait_for(*(lambda name=name: steps(tmp_path, name) for name in names))
    program.kill()
    program.communicate()
    wait_for(lambda: not children(tmp_path))
    reached = [steps(tmp_path, name) for name in names]

    program = sweep(book, tmp_path, *endless)
    wait_for(*(lambda name=name, at=at: steps(tmp_path, name) > at for name, at in zip(names, reached, strict=True)))
    program.send_signal(signal.SIGINT)
    said, _ = program.communicate(timeout=120)
    assert program.returncode == 130 and "0 of 2 jobs finished" in said and not children(tmp_path)
    for name, at in zip(names, reached, strict=True):
        assert f"from step {at}" in (tmp_path / "sweep" / "logs" / f"{name}.txt").read_text()


@pytest.mark.slow
def test_a_cluster_runs_the_jobs_and_loses_no_failure(book, tmp_path):
    """With Submitit's local executor, which stands for a cluster."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    program = sweep(book, tmp_path, "training.max_steps=2", "model.block_size=16,1e5,32", "hydra/launcher=submitit_local")
    said, complaints = program.communicate(timeout=300)
    assert program.returncode == 1 and "2 of 3 jobs finished" in said and "block_size=100000: The " in said, complaints
    assert steps(tmp_path, "block_size=16") == steps(tmp_path, "block_size=32") == 2


@pytest.mark.slow
def test_a_launcher_that_is_none_or_misses_its_settings_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # where no srun is
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    for words, said in ((["hydra/launcher=basic"], "choose slurm"), (["hydra/launcher=joblib"], "jobs=2"), (["hydra/launcher=nope"], "nope"),
                        (["hydra/launcher=slurm", "hydra.launcher.partitoin=a"], "partitoin"), (["hydra/launcher=slurm"], "slurm cluster")):
        with pytest.raises(ValueError, match=said) as caught:
            grid.run_grid(["seed=1,2", *words])
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_preset_of_a_cluster_is_the_launchers_with_a_few_settings():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from conf.schema import launcher_settings

    settings = launcher_settings(["hydra/launcher=slurm", "hydra.launcher.partition=gpu"])
    assert settings["_target_"].endswith("SlurmLauncher") and settings["partition"] == "gpu" and settings["timeout_min"] == 240
