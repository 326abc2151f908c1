"""A run resumes with its tokens, restart=true starts over once, and a finished run is completed after a kill."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import startup
import train as program
from checkpointing import store
from checkpointing.resume import is_finished
from conf.schema import ConfigError, compose
from data import prepare as preparation
from data.prepare import prepare
from data.tokenizer import ByteTokenizer
from scripts.verify_resume import compare


def last_step(run: Path) -> int:
    return store.list_checkpoints(run / "checkpoints")[-1].step


@pytest.fixture
def text(book, tmp_path):
    """A text of the test's own, which it may change."""
    path = tmp_path / "mine.txt"
    path.write_text(book.read_text() + "\nUntouched.")
    return path


@pytest.fixture
def stopped(compose_tiny, text, interrupt_at, fresh_data):
    """Train until step 2 of 4 with these overrides and return a way to compose the same settings again."""
    def train(*words, name="tiny"):
        def settings(*more):
            return compose_tiny(f"data.path={text}", "training.max_steps=4", f"name={name}", *words, *more)

        interrupt_at(2)
        assert program.train(settings()) == 130
        return settings
    return train


# The text has changed


def change(text: Path, how: str, monkeypatch) -> None:
    if how == "changed":
        text.write_text(text.read_text() + "\nOne more sentence.")
    elif how == "unreadable":
        text.write_bytes(b"\xff\xfe\xff" * 1000)
    else:  # as by a new version of nanohydra, or of Python
        monkeypatch.setattr(preparation, "FORMAT", preparation.FORMAT + 1)


@pytest.mark.slow
@pytest.mark.parametrize("how, name", [("changed", "tiny"), ("changed", ""), ("unreadable", "tiny"), ("prepared in another way", "")])
def test_a_run_of_a_changed_text_resumes_with_its_tokens(stopped, text, tmp_path, capsys, monkeypatch, how, name):
    """One line says so; the result is the run whose text never changed."""
    settings = stopped(name=name)
    program.train(settings("name=straight"))
    change(text, how, monkeypatch)
    capsys.readouterr()
    assert program.train(settings()) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "tokens it was trained on" in line]
    assert "another name=" in line and "restart=true" in line
    runs = tmp_path / "runs"
    (run,) = [run for run in runs.iterdir() if run.name != "straight"]
    assert not any(compare(runs / "straight", run).values())


def test_tokens_that_were_deleted_are_prepared_again(stopped, fresh_data, tmp_path):
    settings = stopped()
    shutil.rmtree(fresh_data)
    assert program.train(settings()) == 0 and last_step(tmp_path / "runs/tiny") == 4


def test_a_changed_text_without_the_old_tokens_is_refused(stopped, text, fresh_data, tmp_path):
    """By a sentence about the text, and not by fingerprints."""
    settings = stopped()
    shutil.rmtree(fresh_data)
    text.write_text(text.read_text() + "\nOne more sentence.")
    with pytest.raises(ValueError, match=r"the training text has changed.*restore the old text") as refusal:
        program.train(settings())
    assert "prepared was" not in str(refusal.value) and "restart=true" in str(refusal.value)
    assert last_step(tmp_path / "runs/tiny") == 2


@pytest.mark.parametrize("words", [["data.path={other}"], ["seed=3"], ["data.val_fraction=0.2"], ["data.tokenizer=byte"]])
def test_different_settings_are_refused_although_tokens_exist(stopped, text, tmp_path, words):
    settings = stopped()
    (tmp_path / "other.txt").write_text(text.read_text() * 2)
    text.write_text(text.read_text() + "\nOne more sentence.")
    with pytest.raises(ValueError, match="was trained with different settings"):
        program.train(settings(*(word.format(other=tmp_path / "other.txt") for word in words)))


@pytest.mark.parametrize("setting", ["path", "val_path", "tokenizer"])
def test_a_deleted_file_is_not_needed_to_resume(text, tmp_path, capsys, monkeypatch, setting):
    monkeypatch.chdir(tmp_path)
    deleted = tmp_path / "deleted.json" if setting == "tokenizer" else tmp_path / "deleted.txt"
    deleted.write_text(json.dumps(ByteTokenizer().to_json()) if setting == "tokenizer" else text.read_text()[::-1])
    paths = {"path": text, "tokenizer": "byte", setting: deleted}

    def settings(*more):
        words = [f"data.{key}={value}" for key, value in paths.items()]
        return compose("config", ["name=tiny", "training=smoke", "model=nano", "data=text", "training.sample_tokens=0", "logger.report=false", *words, *more])

    program.train(settings("training.max_steps=1"))
    deleted.unlink()
    assert program.train(settings("training.max_steps=2")) == 0
    assert f"{deleted} " in capsys.readouterr().out
    with pytest.raises(ConfigError, match=rf"^data\.{setting}={deleted} "):
        settings("name=other")
    # The folder of a sweep has no checkpoints of its own.
    (tmp_path / "runs/sweep").mkdir()
    settings("name=sweep")


def test_a_text_that_was_moved_resumes(stopped, text, tmp_path):
    settings = stopped()
    text.rename(tmp_path / "moved.txt")
    assert program.train(settings(f"data.path={tmp_path / 'moved.txt'}")) == 0


def test_a_finished_run_of_a_changed_text_stays_finished(stopped, text, tmp_path):
    """For a sweep as well, which then does not start the job again."""
    settings = stopped()
    run = tmp_path / "runs/tiny"
    text.write_text(text.read_text() + "\nOne more sentence.")
    assert not is_finished(settings(), run)
    assert program.train(settings()) == 0
    assert is_finished(settings(), run) and not is_finished(settings("training.max_steps=5"), run)
    with pytest.raises(ValueError, match="seed was"):
        is_finished(settings("seed=2"), run)


def test_a_new_text_without_a_name_is_found_again(stopped, text, tmp_path):
    """The unfinished run of the old text comes first, until the new one has a folder."""
    settings = stopped(name="")
    (first,) = (tmp_path / "runs").iterdir()
    program.train(settings())
    text.write_text(text.read_text() + "\nOne more sentence.")
    program.train(settings())
    (second,) = set((tmp_path / "runs").iterdir()) - {first}
    program.train(settings("training.max_steps=6"))
    assert (last_step(first), last_step(second)) == (4, 6)
    assert prepare(settings().data).is_dir()


# restart=true


def test_restart_renames_a_finished_run_each_time(compose_tiny, tmp_path, capsys):
    runs = tmp_path / "runs"
    program.train(compose_tiny("training.max_steps=2"))
    content = (runs / "tiny/metrics.jsonl").read_text()
    for aside in ("tiny.old", "tiny.old-2"):
        program.train(compose_tiny("training.max_steps=3", "seed=3", "restart=true"))
        assert f"{runs / 'tiny'} was renamed to {runs / aside}" in capsys.readouterr().out
        assert last_step(runs / "tiny") == 3
    assert (runs / "tiny.old/metrics.jsonl").read_text() == content and last_step(runs / "tiny.old-2") == 3


def test_restart_acts_once_for_a_requeued_run(stopped, tmp_path, capsys, interrupt_at):
    """The same command resumes the run that it started, until it is finished."""
    settings = stopped()
    interrupt_at(2)
    assert program.train(settings("restart=true")) == 130
    printed = capsys.readouterr().out
    assert "was renamed" in printed and "the same command" in printed
    interrupt_at(3)
    assert program.train(settings("restart=true")) == 130
    printed = capsys.readouterr().out
    assert "from step 2" in printed and "was started over by restart=true" in printed and "was renamed" not in printed
    assert program.train(settings("restart=true")) == 0
    assert [run.name for run in sorted((tmp_path / "runs").iterdir())] == ["tiny", "tiny.old"]
    program.train(settings("name=straight"))
    assert not any(compare(tmp_path / "runs/straight", tmp_path / "runs/tiny").values())


@pytest.mark.parametrize("words", [["seed=9"], ["training.max_steps=6"]], ids=["other settings", "a longer run"])
def test_restart_starts_over_runs_that_it_did_not_start(stopped, tmp_path, words):
    settings = stopped()
    assert program.train(settings("restart=true")) == 0
    program.train(settings("restart=true", *words))
    assert (tmp_path / "runs/tiny.old-2").is_dir()


def test_restart_after_a_resume_without_it_starts_over(stopped, tmp_path, interrupt_at):
    settings = stopped()
    for step, words in ((2, ["restart=true"]), (3, []), (3, ["restart=true"])):
        interrupt_at(step)
        program.train(settings(*words))
    assert (tmp_path / "runs/tiny.old-2").is_dir()


def test_restart_of_a_run_without_checkpoints_renames_nothing(compose_tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(startup, "measure_pace", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt))
        program.train(compose_tiny("training.max_steps=2", "restart=true"))
    assert program.train(compose_tiny("training.max_steps=2", "restart=true")) == 0
    assert [run.name for run in (tmp_path / "runs").iterdir()] == ["tiny"]


# A kill after the last save


def test_a_finished_run_is_pruned_and_gets_its_report(compose_tiny, tmp_path, monkeypatch, capsys):
    words = ["training.max_steps=4", "training.checkpoint_every=1", "training.keep_last=1", "logger.report=true"]
    run = tmp_path / "runs/tiny"
    report = run / "report.html"
    with monkeypatch.context() as patch:
        patch.setattr(store, "prune", lambda *words: None)  # killed before
        program.train(compose_tiny(*words))
    assert len(store.list_checkpoints(run / "checkpoints")) == 4

    def again(*more):
        capsys.readouterr()
        assert program.train(compose_tiny(*words, *more)) == 0
        printed = capsys.readouterr().out
        assert "is finished" in printed
        return "Report: " in printed

    assert not again()  # it is there
    assert len(store.list_checkpoints(run / "checkpoints")) <= 2
    later = report.stat().st_mtime_ns + 10**9
    os.utime(run / "metrics.jsonl", ns=(later, later))
    assert again()
    report.unlink()
    assert not again("logger.report=false") and not report.exists()
    assert again() and report.exists()
