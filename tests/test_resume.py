"""Which run a command resumes, with which tokens; what restart=true does, and what a finished run makes up for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import train as story
from checkpointing import store
from checkpointing.resume import is_finished
from data import prepare as preparation
from data.prepare import prepare
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
    """Train until step 3 of 6 with these overrides and return a way to compose the same settings again."""
    def train(*words, name="tiny"):
        def settings(*more):
            return compose_tiny(f"data.path={text}", "training.max_steps=6", f"name={name}", *words, *more)

        interrupt_at(3)
        assert story.train(settings()) == 130
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


@pytest.mark.parametrize("how", ["changed", "unreadable", "prepared in another way"])
@pytest.mark.parametrize("name", ["tiny", ""])
def test_a_run_resumes_with_its_tokens_when_the_text_is_gone(stopped, compose_tiny, text, tmp_path, capsys,
                                                             monkeypatch, how, name):
    """And says so in one line; the result is the run whose text never changed."""
    settings = stopped(name=name)
    story.train(settings("name=straight"))
    change(text, how, monkeypatch)
    capsys.readouterr()
    assert story.train(settings()) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "tokens it was trained on" in line]
    assert "another name=" in line and "restart=true" in line
    runs = tmp_path / "runs"
    (run,) = [run for run in runs.iterdir() if run.name != "straight"]
    assert not any(compare(runs / "straight", run).values())


def test_an_unchanged_text_says_nothing(stopped, capsys):
    settings = stopped()
    assert story.train(settings()) == 0 and "trained on (" not in capsys.readouterr().out


def test_tokens_that_were_deleted_are_prepared_again(stopped, fresh_data, tmp_path):
    settings = stopped()
    shutil.rmtree(fresh_data)
    assert story.train(settings()) == 0 and last_step(tmp_path / "runs/tiny") == 6


def test_without_its_tokens_a_run_of_a_changed_text_is_refused(stopped, text, fresh_data, tmp_path):
    """By a sentence about the text, and not by fingerprints."""
    settings = stopped()
    shutil.rmtree(fresh_data)
    text.write_text(text.read_text() + "\nOne more sentence.")
    with pytest.raises(ValueError, match=r"the text is not the one that was trained on.*restore the old text") as refusal:
        story.train(settings())
    assert "prepared was" not in str(refusal.value) and "restart=true" in str(refusal.value)
    assert last_step(tmp_path / "runs/tiny") == 3


@pytest.mark.parametrize("words", [["data.path={other}"], ["seed=3"], ["data.val_fraction=0.2"], ["data.tokenizer=byte"]])
def test_other_settings_are_refused_although_the_tokens_exist(stopped, text, tmp_path, words):
    settings = stopped()
    (tmp_path / "other.txt").write_text(text.read_text() * 2)
    text.write_text(text.read_text() + "\nOne more sentence.")
    with pytest.raises(ValueError, match="was trained with different settings"):
        story.train(settings(*(word.format(other=tmp_path / "other.txt") for word in words)))


def test_a_text_that_was_moved_unchanged_resumes(stopped, text, tmp_path):
    settings = stopped()
    text.rename(tmp_path / "moved.txt")
    assert story.train(settings(f"data.path={tmp_path / 'moved.txt'}")) == 0


def test_a_finished_run_of_a_changed_text_is_finished(stopped, text, tmp_path):
    """For a sweep as well, which then does not start the job again."""
    settings = stopped()
    run = tmp_path / "runs/tiny"
    text.write_text(text.read_text() + "\nOne more sentence.")
    assert not is_finished(settings(), run)
    assert story.train(settings()) == 0
    assert is_finished(settings(), run) and not is_finished(settings("training.max_steps=7"), run)
    with pytest.raises(ValueError, match="seed was"):
        is_finished(settings("seed=2"), run)


def test_a_new_text_without_a_name_is_found_again(stopped, text, tmp_path):
    """The unfinished run of the old text comes first, until the new one has a folder."""
    settings = stopped(name="")
    (first,) = (tmp_path / "runs").iterdir()
    story.train(settings())
    text.write_text(text.read_text() + "\nOne more sentence.")
    story.train(settings())
    (second,) = set((tmp_path / "runs").iterdir()) - {first}
    story.train(settings("training.max_steps=8"))
    assert (last_step(first), last_step(second)) == (6, 8)
    assert prepare(settings().data).is_dir()


# restart=true


def test_restart_moves_a_finished_run_aside_each_time(compose_tiny, tmp_path, capsys):
    runs = tmp_path / "runs"
    story.train(compose_tiny("training.max_steps=2"))
    content = (runs / "tiny/metrics.jsonl").read_text()
    for aside in ("tiny.old", "tiny.old-2"):
        story.train(compose_tiny("training.max_steps=3", "seed=3", "restart=true"))
        assert f"{runs / 'tiny'} was renamed to {runs / aside}" in capsys.readouterr().out
        assert last_step(runs / "tiny") == 3
    assert (runs / "tiny.old/metrics.jsonl").read_text() == content and last_step(runs / "tiny.old-2") == 3


def test_restart_acts_once_for_a_run_that_is_requeued(stopped, tmp_path, capsys, interrupt_at):
    """The same command resumes what it began, as the message of the interruption says, until it is finished."""
    settings = stopped()
    interrupt_at(2)
    assert story.train(settings("restart=true")) == 130
    said = capsys.readouterr().out
    assert "was renamed" in said and "the same command" in said
    interrupt_at(4)
    assert story.train(settings("restart=true")) == 130
    said = capsys.readouterr().out
    assert "from step 2" in said and "was started over by restart=true" in said and "was renamed" not in said
    assert story.train(settings("restart=true")) == 0
    assert [run.name for run in sorted((tmp_path / "runs").iterdir())] == ["tiny", "tiny.old"]
    story.train(settings("name=straight"))
    assert not any(compare(tmp_path / "runs/straight", tmp_path / "runs/tiny").values())


@pytest.mark.parametrize("words", [["seed=9"], ["training.max_steps=12"]], ids=["other settings", "a longer run"])
def test_restart_starts_over_what_it_did_not_begin(stopped, tmp_path, words):
    settings = stopped()
    assert story.train(settings("restart=true")) == 0
    story.train(settings("restart=true", *words))
    assert (tmp_path / "runs/tiny.old-2").is_dir()


def test_restart_after_a_resume_without_it_starts_over(stopped, tmp_path, interrupt_at):
    """The run was resumed in between, so that this restart is a new one."""
    settings = stopped()
    for words in (["restart=true"], []):
        interrupt_at(4 + len(words) - 2)
        story.train(settings(*words))
    interrupt_at(5)
    story.train(settings("restart=true"))
    assert (tmp_path / "runs/tiny.old-2").is_dir()


def test_restart_of_a_run_that_saved_nothing_moves_nothing(compose_tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(story, "measure_pace", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt))
        story.train(compose_tiny("training.max_steps=2", "restart=true"))
    assert story.train(compose_tiny("training.max_steps=2", "restart=true")) == 0
    assert [run.name for run in (tmp_path / "runs").iterdir()] == ["tiny"]


def test_restart_of_nothing_is_a_start(compose_tiny, tmp_path):
    story.train(compose_tiny("training.max_steps=2", "restart=true"))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]


# What a kill after the last save left undone


@pytest.mark.parametrize("left", ["no report", "an old report", "all"])
def test_a_finished_run_makes_up_for_report_and_pruning(compose_tiny, tmp_path, monkeypatch, capsys, left):
    words = ["training.max_steps=8", "training.checkpoint_every=2", "training.keep_last=1", "logger.report=true"]
    run = tmp_path / "runs/tiny"
    with monkeypatch.context() as patch:
        patch.setattr(store, "prune", lambda *words: None)  # killed before
        story.train(compose_tiny(*words))
    assert len(store.list_checkpoints(run / "checkpoints")) == 4
    written = (run / "report.html").stat().st_mtime_ns
    if left == "no report":
        (run / "report.html").unlink()
    elif left == "an old report":
        later = written + 10**9
        story.atomic.os.utime(run / "metrics.jsonl", ns=(later, later))
    capsys.readouterr()
    assert story.train(compose_tiny(*words)) == 0
    said = capsys.readouterr().out
    assert len(store.list_checkpoints(run / "checkpoints")) <= 2 and "is finished" in said
    assert ("Report: " in said) == (left != "all") and (run / "report.html").exists()
    if left == "no report":
        (run / "report.html").unlink()
        assert story.train(compose_tiny(*words, "logger.report=false")) == 0 and not (run / "report.html").exists()
