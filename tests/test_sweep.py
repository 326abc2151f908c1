"""Searches: trials and Optuna, limits, several workers, and resuming after kills."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from conf.schema import compose
from report.history import PRUNED
from sweep import search as sweep_search
from sweep.search import Search, SweepSettings, print_best_trial, search
from sweep.space import read_space
from sweep.study import JOURNAL, hide_password

ROOT = Path(__file__).parent.parent
pytest.importorskip("optuna")
pytestmark = pytest.mark.slow  # each about a second, and they are many


class Process:
    """Stands for a child process; notes whether it was asked to end."""

    def terminate(self):
        self.asked = True


@pytest.fixture
def begin(book, tmp_path):
    """A worker on the study in `tmp_path`/study: `begin(trials=3)`."""
    def make(text="space:\n  optim.lr: {low: 1e-4, high: 1e-1, log: true}\n", *overrides, **settings):
        path = tmp_path / "space.yaml"
        path.write_text(f"{text}\nfixed:\n  model: nano\n  training: smoke\n  data: text\n  data.path: {book}\n")
        return Search(SweepSettings(sweep=str(path), **settings), read_space(str(path), overrides, tmp_path / "study"))
    return make


def take(search):
    """The worker's next job, started."""
    search.last_asked = float("-inf")
    if job := search.next_job():
        job.process = Process()
    return job


def go(search, job, *losses):
    """Report validation losses at steps 2, 4, ...; then end the job, which may have been stopped."""
    for number, loss in enumerate(losses, 1):
        job.new_rows = [{"step": 2 * number, "loss": 9.0}, {"step": 2 * number, "val_loss": loss}]
        job.best = min(job.best, loss)
        search.on_metrics(job)
    search.on_exit(job, 143 if job.stop_requested else 0)


def states(search):
    return [trial.state.name for trial in search.study.get_trials()]


def test_trials_report_losses_and_the_best_command_is_printed(begin, tmp_path, capsys):
    search = begin(trials=3)
    for loss in (3.0, 2.0, 2.5):
        go(search, job := take(search), 9.0, loss, loss + 0.1)
    assert take(search) is None and [trial.value for trial in search.study.trials] == [3.0, 2.0, 2.5]
    assert search.study.trials[1].intermediate_values == {2: 9.0, 4: 2.0, 6: 2.1}
    print_best_trial(search, resumable=False)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "3 trials: 3 finished." and said[1] == f"Best: {tmp_path}/study/trial_0001, val_loss 2.0000"
    words = shlex.split(said[2])
    assert words[:2] == ["python", "train.py"]
    assert compose("config", words[2:]).optim.lr == search.study.trials[1].params["optim.lr"]
    assert job.folder == tmp_path / "study/trial_0002" and f"optim.lr={search.study.trials[2].params['optim.lr']}" in job.command


@pytest.mark.parametrize(("pruner", "stopped"), [("median", True), ("none", False)])
def test_an_unpromising_trial_is_pruned(begin, pruner, stopped):
    search = begin(trials=9, pruner=pruner)
    for _ in range(5):
        go(search, take(search), 2.0, 1.0)
    go(search, job := take(search), 8.0)
    assert job.stop_requested == stopped and states(search)[5] == ("PRUNED" if stopped else "COMPLETE")
    assert (job.folder / PRUNED).exists() == stopped  # for its report
    go(search, job := take(search), 1.5)
    assert not job.stop_requested


def test_a_grid_trains_each_point_once(begin):
    """Also by several workers, after a failure, and where a point is invalid: three heads do not divide the width."""
    grid = "sampler: grid\nspace:\n  model.n_head: [3, 2]\n  seed: [1, 2, 3]\n"
    one = begin(grid)
    first, second = take(one), take(one)
    other = begin(grid)
    third = take(other)
    go(one, first, 2.0)
    one.on_exit(second, 1)
    assert take(one) is None and take(other) is None and take(begin(grid)) is None
    assert [job.overrides[-1] for job in (first, second, third)] == ["seed=1", "seed=2", "seed=3"]


def test_a_limit_of_a_grid_is_told(capsys):
    assert [sweep_search.grid_trials(limit, 6) for limit in (None, 20, 6)] == [6, 6, 6] and capsys.readouterr().out == ""
    assert sweep_search.grid_trials(4, 6) == 4 and "6 points, of which trials=4 trains the first" in capsys.readouterr().out


def test_hyperband_prunes_too(begin):
    search = begin(trials=40, pruner="hyperband")
    for number in range(20):
        go(search, take(search), *[1.0 + number] * 9)
    assert "PRUNED" in states(search)


def test_the_last_evaluation_prunes_nothing(begin):
    search = begin(trials=9)
    for _ in range(5):
        go(search, take(search), *[1.0] * 10)
    job = take(search)
    job.new_rows, job.best = [{"step": 20, "val_loss": 8.0}], 8.0  # the last step of training=smoke
    search.on_metrics(job)
    search.on_exit(job, 0)
    assert not job.stop_requested and states(search)[5] == "COMPLETE"


def test_two_workers_share_one_budget_and_one_study(begin):
    one, other = begin(trials=5), begin(trials=5)
    jobs = [take(worker) for worker in (one, other, one, other, one)]
    assert take(one) is None and take(other) is None
    assert sorted(job.name for job in jobs) == [f"trial_{number:04d}" for number in range(5)]
    for worker, job in zip((one, other, one, other, one), jobs, strict=True):
        go(worker, job, 1.0)
    assert states(one) == states(other) == ["COMPLETE"] * 5 and len({trial.params["optim.lr"] for trial in one.study.trials}) == 5


def test_a_trial_of_a_dead_worker_is_resumed(begin):
    one, other = begin(trials=2), begin(trials=2)
    first, second = take(one), take(other)
    assert take(other) is None
    first.new_rows = [{"step": 2, "val_loss": 2.0}]
    one.on_metrics(first)
    one.worker_lock.release()  # as the end of its process does
    again = take(other)
    assert again.name == first.name and again.command == first.command
    with warnings.catch_warnings(record=True) as caught:
        go(other, again, 2.0, 1.0)  # resumed from a checkpoint, it repeats a metric
    assert not caught and other.study.trials[0].intermediate_values == {2: 2.0, 4: 1.0}
    go(other, second, 1.0)
    assert take(other) is None and states(other) == ["COMPLETE"] * 2


def test_only_a_nonfinite_loss_fails_a_trial_for_good(begin):
    """Others were killed or hit a full disk, which has nothing to do with their settings: they are resumed."""
    one = begin(trials=3)
    killed, failed, full = take(one), take(one), take(one)
    for job in (killed, failed):  # the first skipped what was not finite
        (job.folder / "nonfinite").mkdir(parents=True)
    one.on_exit(killed, -signal.SIGKILL)
    for job, said in ((failed, "the loss is nan"), (full, "No space left on device")):
        job.log.parent.mkdir(exist_ok=True)
        job.log.write_text(f"Error: {said}\n")
        one.on_exit(job, 1)
    assert states(one) == ["RUNNING", "FAIL", "RUNNING"] and one.study.trials[1].user_attrs["reason"] == "the loss is nan"
    assert take(one) is None  # this worker would only fail again
    one.release()
    other = begin(trials=3)
    assert [take(other).name, take(other).name] == [killed.name, full.name] and take(other) is None


def test_a_trial_without_a_loss_has_failed(begin):
    search = begin(trials=1)
    search.on_exit(take(search), 0)
    assert states(search) == ["FAIL"] and "val_loss" in search.study.trials[0].user_attrs["reason"]


def test_hours_end_a_search_and_leave_its_trials(begin):
    search = begin(trials=None, hours=1)
    job = take(search)
    search.on_metrics(job)
    assert not job.stop_requested
    search.deadline = time.monotonic() - 1
    search.on_metrics(job)
    assert job.stop_requested and take(search) is None
    search.on_exit(job, 143)
    assert states(search) == ["RUNNING"]


def test_a_worker_without_unfinished_trials_leaves_no_file(begin, tmp_path):
    search = begin(trials=1)
    go(search, take(search), 1.0)
    search.release()
    assert not list((tmp_path / "study" / "workers").iterdir())


def test_an_incomplete_line_of_the_journal_is_removed(begin, tmp_path):
    one = begin(trials=2)
    go(one, take(one), 1.0)
    with open(tmp_path / "study" / JOURNAL, "a") as file:
        file.write('{"op_code":5,"worker_id":"x')
    other = begin(trials=2)
    go(other, take(other), 2.0)
    assert [trial.value for trial in begin(trials=2).study.trials] == [1.0, 2.0]


def test_a_damaged_line_of_the_journal_is_named(begin, tmp_path):
    begin().release()
    journal = tmp_path / "study" / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    said = r"study.log cannot be reached or used .*{}/\S*study.log is damaged: restore a copy, or use another name= \(the runs stay as they are\)\.$"
    journal.write_bytes(lines[0] + lines[1][:-9] + b"\n" + b"".join(lines[2:]))
    with pytest.raises(ValueError, match=said.format("Line 2 of ")):
        begin()
    # Valid JSON, which Optuna cannot read.
    journal.write_bytes(b"".join(lines).replace(b"user_attr", b"user_atur"))
    with pytest.raises(ValueError, match=said.format(r"\. ")):
        begin()
    journal.unlink()
    os.mkfifo(journal)
    with pytest.raises(ValueError, match=r"study.log is not a regular file"):
        begin()


def test_a_resumed_search_repeats_no_suggestion(begin):
    one = begin(trials=8)
    for _ in range(4):
        go(one, take(one), 1.0)
    one.release()
    other = begin(trials=8)
    for _ in range(4):
        go(other, take(other), 1.0)
    assert len({trial.params["optim.lr"] for trial in other.study.trials}) == 8


def test_points_that_violate_constraints_are_not_counted(begin, monkeypatch):
    monkeypatch.setattr(sweep_search, "MAX_REJECTED", 3)
    search = begin("space: {seed: {low: 1, high: 200}, optim.lr: [0.1]}\nconstraints: [seed == 7]", trials=2)
    for _ in range(2):
        go(search, take(search), 1.0)
    assert [trial.params["seed"] for trial in search.trained()] == [7, 7] and take(search) is None


def test_points_with_invalid_settings_are_rejected(begin, monkeypatch):
    monkeypatch.setattr(sweep_search, "MAX_REJECTED", 3)
    search = begin("space: {model.n_embd: [32, 33]}", trials=5)
    for _ in range(5):
        go(search, job := take(search), 1.0)
        assert "model.n_embd=32" in job.command
    with pytest.raises(ValueError, match="not divisible by n_head"):
        begin("space: {model.n_embd: [33, 35]}")


def test_another_space_under_the_same_name_is_refused(begin):
    begin().release()
    with pytest.raises(ValueError, match=r"is the search of another space: space of optim.lr.high was 0.1, now 0.5"):
        begin("space:\n  optim.lr: {low: 1e-4, high: 0.5, log: true}")
    with pytest.raises(ValueError, match=r"training.max_steps was null, now 9"):
        begin("space:\n  optim.lr: {low: 1e-4, high: 1e-1, log: true}", "training.max_steps=9")
    begin("space:\n  optim.lr: {low: 1e-4, high: 1e-1, log: true}", "logger.project=other")


def test_a_search_inside_a_run_is_refused(begin, tmp_path):
    begin().release()
    for name in ("lock", "config.yaml"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"{tmp_path} holds a run"):
        search(SweepSettings(sweep=str(tmp_path / "space.yaml"), runs_dir=str(tmp_path / "inner")))
    assert not (tmp_path / "inner").exists()


def test_a_journal_on_a_full_disk_is_one_sentence(begin, tmp_path, monkeypatch):
    begin().release()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_):
        raise full

    monkeypatch.setattr(sweep_search, "run_jobs", fail)
    with pytest.raises(ValueError, match=r"storage=study.log cannot be .*No space left.*Run the same command again"):
        search(SweepSettings(sweep=str(tmp_path / "space.yaml"), runs_dir=str(tmp_path / "other")))
    full.filename = "logs/trial_0000.txt"
    with pytest.raises(OSError, match="logs/trial_0000"):  # names the file itself
        search(SweepSettings(sweep=str(tmp_path / "space.yaml"), runs_dir=str(tmp_path / "other")))


def test_a_database_is_a_storage_too(begin, tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    go(one := begin(trials=2, storage=url), take(one), 1.0)
    assert take(begin(trials=2, storage=url)).name == "trial_0001" and not (tmp_path / "study" / JOURNAL).exists()


@pytest.mark.parametrize("storage", ["sqlite:////no/such/folder/study.db", "nonsense", "nodatabase://me:secret@host/x"])
def test_an_unusable_storage_is_one_sentence(begin, storage):
    with pytest.raises(ValueError, match="cannot be reached or used") as caught:
        begin(storage=storage)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert hide_password("mysql://me:secret@host/x") == "mysql://...@host/x"


@pytest.mark.parametrize("url", ["mysql://me:secret@host/x", "mysql://me:a/secret@host/x", "mysql://me:a@secret@host/x", "mysql://me:a secret@host/x",
                                 "postgresql://host/x?user=me&password=secret"])
def test_a_password_is_never_shown(url):
    assert "secret" not in hide_password(f"Cannot connect to {url}: no route") and "host/x" in hide_password(url)


def test_without_optuna_the_message_says_what_to_install(begin, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match="pip install optuna"):
        begin()


@pytest.mark.parametrize(("settings", "words"), [({}, "sweep= is empty"), ({"trials": 0}, "trials=0"), ({"jobs": 0}, "jobs=0"), ({"hours": -1.0}, "hours=-1"),
                                                 ({"trials": None}, "set no limit"), ({"name": "../x"}, "is outside runs_dir")])
def test_bad_settings_are_named(settings, words):
    assert any(words in problem for problem in SweepSettings(**settings).problems())


def test_a_study_survives_the_kill_of_one_of_two_workers(book, tmp_path):
    (tmp_path / "space.yaml").write_text("space:\n  optim.lr: {low: 1e-4, high: 1e-1, log: true}\n")
    words = ["-m", "scripts.sweep", f"sweep={tmp_path}/space.yaml", f"runs_dir={tmp_path}", "name=study", "trials=3", "pruner=none", "model=nano",
             "data=text", f"data.path={book}", "data.tokenizer=char", "training=smoke", "training.max_steps=60", "training.sample_tokens=0"]

    def worker():
        return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    doomed, other = worker(), worker()
    until = time.monotonic() + 120
    while len(list((tmp_path / "study").glob("trial_*/metrics.jsonl"))) < 2:
        assert time.monotonic() < until and other.poll() is None
        time.sleep(0.05)
    doomed.kill()
    doomed.communicate()
    said, complaints = other.communicate(timeout=300)
    assert other.returncode == 0 and "3 trials: 3 finished." in said and "python train.py" in said, said + complaints
    assert len(list((tmp_path / "study").glob("trial_*/checkpoints"))) == 3
    again = worker()
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and "3 trials before" in said and "3 trials: 3 finished." in said
