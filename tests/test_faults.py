"""Full disks, short memory, kills and closed streams lose no run; the proofs that ship find a difference."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_checkpoint import snapshot
from test_runs import ROOT, last_step, same
from test_structure import product

import atomic
import train as program
from checkpointing import saver
from checkpointing.snapshot import Snapshot, save_checkpoint
from checkpointing.spec import MODEL, OPTIMIZER, STATE
from conf.schema import compose
from scripts import verify_resume
from training import step


@pytest.fixture
def run(tmp_path):
    return tmp_path / "runs/tiny"


# Full disks


class FullDisk:
    """Replaces `os` in atomic.py: the disk is full once `folder` exists, until `times` writes have failed."""

    def __init__(self, folder: Path, times: float = math.inf) -> None:
        self.folder, self.left = folder, times

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, handle, content):
        if self.left > 0 and self.folder.exists():
            self.left -= 1
            if len(content) > 1 and self.left % 2:
                return os.write(handle, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(handle, content)


EVERY_2 = ["training.max_steps=10", "training.checkpoint_every=2"]


@pytest.mark.parametrize("first, times", [
    ("lock", 4), ("checkpoints/step_00000008", 9),
    pytest.param("lock", 9, marks=pytest.mark.slow), pytest.param("checkpoints/step_00000002", 5, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_for_a_while_loses_nothing(compose_tiny, run, monkeypatch, first, times):
    program.train(compose_tiny(*EVERY_2, "name=straight"))
    run.mkdir()
    (run / "config.yaml").touch()
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "os", disk := FullDisk(run / first, times))
        try:
            assert program.train(compose_tiny(*EVERY_2)) == 0
        except OSError as error:  # before the first step, or when only saving is left to do
            assert "No space left" in str(error) or "8 of 10 steps are saved" in str(error)
            disk.left = 0
            assert program.train(compose_tiny(*EVERY_2)) == 0
    assert disk.left < times and same(run.with_name("straight"), run)


def test_a_disk_that_stays_full_keeps_the_old_checkpoints(compose_tiny, run, monkeypatch, capsys):
    program.train(compose_tiny(*EVERY_2, "name=straight"))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "os", FullDisk(run / "checkpoints/step_00000004"))
        with pytest.raises(OSError, match=r"Only 4 of 10 steps are saved in .*free some disk space, or make it writable"):
            program.train(compose_tiny(*EVERY_2))
    assert "could not be written" in capsys.readouterr().out
    assert last_step(run) == 4
    assert program.train(compose_tiny(*EVERY_2)) == 0
    assert same(run.with_name("straight"), run)


def test_a_full_disk_stops_the_run_if_asked(compose_tiny, run, monkeypatch):
    words = ["training.max_steps=2000", "training.checkpoint_every=2", "training.on_save_error=stop", "training.eval_every=1e6"]
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "os", FullDisk(run / "checkpoints/step_00000004"))
        with pytest.raises(OSError, match=r"step_000000\d\d could not be written \(.*\). It needs 1.2 MB of free disk space"):
            program.train(compose_tiny(*words))
    assert last_step(run) == 4
    assert program.train(compose_tiny(*words, "training.max_steps=6")) == 0


def test_checkpoints_without_permissions_are_refused(compose_tiny, run, monkeypatch):
    program.train(compose_tiny(*EVERY_2, "training.max_steps=2"))
    monkeypatch.setattr(os, "access", lambda path, mode: path != run / "checkpoints")
    with pytest.raises(OSError, match="checkpoints is not writable: change its permissions"):
        program.train(compose_tiny(*EVERY_2))


def test_a_disk_too_small_for_two_checkpoints_is_refused(compose_tiny, run, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"1 KB free, two checkpoints need \d"):
        program.train(compose_tiny("model.n_embd=128"))
    assert not any(run.parent.iterdir())


def test_short_memory_saves_without_a_copy(compose_tiny, run, monkeypatch):
    program.train(compose_tiny("name=with_copy", "training.max_steps=4"))
    monkeypatch.setattr(saver, "available_memory", lambda: 0.0)
    monkeypatch.setattr(Snapshot, "copy", pytest.fail)
    program.train(compose_tiny("training.max_steps=4"))
    assert same(run.with_name("with_copy"), run)


def test_short_texts_are_refused_before_a_run_exists(compose_tiny, tmp_path):
    text = tmp_path / "short.txt"
    for length, problem in ((200, "validation split has 20 tokens, one context needs 33"),
                            (20, "training split has 18 tokens, one context needs 33")):
        text.write_text("x" * length)
        with pytest.raises(ValueError, match=problem):
            program.train(compose_tiny(f"data.path={text}"))
    assert not (tmp_path / "runs").exists()


def test_every_write_goes_through_atomic():
    """No other module opens a file to write, renames, or has a library write one."""
    writing = re.compile(r"""write_text|write_bytes\(|\.save\(|savefig|save_file|os\.replace|os\.rename|\.dump\(|copyfile|copytree"""
                         r"""|open\(.*["'][wax]b?\+?["']""")
    allowed = ("atomic.write_bytes(", "saver.save(", "figure.savefig(picture", "figure.savefig(content",
               "np.save(work / BATCHES",  # in the temporary folder of a benchmark
               'open(os.devnull, "w")', 'open(log, "ab") as output')  # the output of a process, on a cluster's node that need not know this code
    harmful = ("atomic.py", "locks.py", "torture.py")
    for path in product():
        if path.name in harmful:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for call in allowed:
                line = line.replace(call, "")
            assert not writing.search(line), f"{path}:{number}: {line}"


# Whole programs


@pytest.fixture
def command(book, tmp_path):
    """The command of a long run in the folder `tiny`."""
    return [sys.executable, "train.py", "model=nano", "data=text", f"data.path={book}", "data.tokenizer=char",
            "training=smoke", "name=tiny", "training.compile=false", "training.max_steps=1e5", "training.sample_tokens=0",
            "training.eval_every=1e5", f"runs_dir={tmp_path}"]


@pytest.mark.slow
def test_a_run_with_closed_streams_trains(command, tmp_path):
    """The output of libraries does not end up in a file of the run."""
    done = subprocess.run(["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *command, "training.max_steps=2"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and last_step(tmp_path / "tiny") == 2, done.stderr
    assert all(json.loads(line) for line in (tmp_path / "tiny/metrics.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_two_starts_at_once_and_two_signals(command, tmp_path, capsys):
    """The second start names the first; a second Ctrl-C ends the first at once, and the run resumes."""
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("tiny/checkpoints/step_*")):
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.01)
    with pytest.raises(ValueError, match=f"is being trained by process {first.pid} on"):
        program.train(compose("config", command[2:]))
    first.send_signal(signal.SIGINT)
    first.send_signal(signal.SIGINT)
    _, complaints = first.communicate(timeout=60)
    assert first.returncode == 130 and "Traceback" not in complaints
    reached = last_step(tmp_path / "tiny")
    assert program.train(compose("config", [*command[2:], f"training.max_steps={reached + 10}"])) == 0
    assert f"from step {reached}" in capsys.readouterr().out


@pytest.mark.parametrize("name, difference", [
    (None, None), (MODEL, "2 differences, such as b"), (OPTIMIZER, "1 difference, such as w.exp_avg"), (STATE, "None and 1.5"), ("metrics", "2.0"), ("rows", "1 row and 2")])
def test_compare_finds_each_difference(tmp_path, name, difference):
    for number, run in enumerate((tmp_path / "one", tmp_path / "other")):
        state, rows = snapshot(2), [{"step": 1, "loss": 3.0, "step_ms": number}]
        if number and name in (MODEL, OPTIMIZER):
            tensors = state.model if name == MODEL else state.optimizer
            changed = {key: tensor + 1 for key, tensor in tensors.items() if key != "w.step"}
            state = replace(state, **{name.removesuffix(".safetensors"): tensors | changed})
        if number and name == STATE:
            state = snapshot(2, 1.5)
        if number and name == "metrics":
            rows[0]["loss"] = 2.0
        if number and name == "rows":
            rows *= 2
        (run / "checkpoints").mkdir(parents=True)
        save_checkpoint(run / "checkpoints", state)
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = [text for text in verify_resume.compare(tmp_path / "one", tmp_path / "other").values() if text]
    assert len(found) == (name is not None) and all(difference in text for text in found)


@pytest.mark.slow
def test_verify_resume_succeeds_and_finds_a_difference(book, monkeypatch, capsys):
    """The difference: dropout that is not a function of the step."""
    words = ["model=nano", "data=text", f"data.path={book}", "data.tokenizer=char", "training.batch_size=4",
             "training.max_steps=12", "training.checkpoint_every=3", "training.eval_tokens=512", "training.threads=1"]
    finish = verify_resume.finish

    def finish_here(overrides, run):
        program.train(compose("config", [*overrides, f"runs_dir={run.parent}", f"name={run.name}"]))

    # The training without a stop needs no process of its own.
    monkeypatch.setattr(verify_resume, "finish", lambda overrides, run: (
        finish_here if run.name == "straight" else finish)(overrides, run))
    assert verify_resume.verify(verify_resume.VerifySettings(kills=2, train=tuple(words))) == 0
    printed = capsys.readouterr().out
    assert "The runs are bit-identical" in printed and printed.count(" identical") == 8
    monkeypatch.setattr(step, "seed_dropout", lambda *place: torch.seed())
    monkeypatch.setattr(verify_resume, "finish", finish_here)
    assert verify_resume.verify(verify_resume.VerifySettings(kills=0, train=(*words, "model.dropout=0.2"))) == 1


@pytest.mark.slow
def test_a_short_torture_loses_nothing():
    """Without whole programs, which the test of verify_resume kills."""
    code = ("import sys; from scripts import torture; torture.full_disks = torture.kills = lambda *_: []; "
            "sys.exit(torture.torture(torture.TortureSettings(every=200)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Nothing was lost." in done.stdout, done.stdout + done.stderr[-2000:]
    for words in ("killed before", "killed within", "disk full once", "disk full for good", "damaged: manifest.json"):
        assert words in done.stdout
