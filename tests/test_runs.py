"""Runs that cannot be lost: whose run a folder is, that going on is exact, and that nothing breaks it."""

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
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_checkpoint import reseal

import atomic
import train as story
from checkpointing import checkpoint, saver, store
from checkpointing.checkpoint import MODEL, STATE
from checkpointing.provenance import compiled_at_last_start
from checkpointing.resume import is_finished
from checkpointing.run_folder import Run, find_run
from conf import identity
from conf.schema import ConfigError, Settings, compose, leaves
from data.prepare import prepare
from model import GPT
from scripts import verify_resume as verify
from scripts.verify_resume import compare, read_metrics
from training.device import Device
from training.estimate import Pace

ROOT = Path(__file__).parent.parent


def same(one: Path, other: Path) -> bool:
    """Whether two runs agree in weights, optimizer, scaler, counts and metrics."""
    print(found := compare(one, other))
    return not any(found.values())


def last_step(run: Path) -> int:
    return store.list_checkpoints(run / "checkpoints")[-1].step


# Identity


def test_every_setting_is_of_one_kind():
    settings = [*leaves(Settings), "auto_name"]
    assert {identity.kind(setting) for setting in settings} == set(identity.KINDS)
    for pattern in " ".join(identity.KINDS.values()).split():
        assert any(identity.fnmatchcase(setting, pattern) for setting in [*settings, "model.vocab_size"]), pattern
    assert [identity.kind(name) for name in ("seed", "optim.lr", "training.max_steps", "logger.wandb", "training.compile")] == [
        "identity", "identity", "extendable", "free", "machine"]
    with pytest.raises(KeyError):
        identity.kind("training.something_new")


def test_the_documented_table_is_the_one_in_the_code():
    """Each row of docs/runs.md starts with a kind and lists its settings."""
    lines = (ROOT / "docs/runs.md").read_text().splitlines()
    for kind, patterns in identity.KINDS.items():
        (row,) = [line for line in lines if line.startswith(f"| {kind} |")]
        assert row.split("|")[2].replace("`", "").replace(",", "").split() == patterns.split()


def test_a_free_or_extendable_change_goes_on_with_the_run(compose_tiny, tmp_path, capsys):
    story.train(compose_tiny("training.max_steps=2"))
    assert story.train(compose_tiny("training.max_steps=3", "training.eval_every=1", "logger.project=x", "training.keep_last=1")) == 0
    assert "from step 2" in capsys.readouterr().out and last_step(tmp_path / "runs/tiny") == 3


def test_another_run_under_the_same_name_is_refused_with_the_three_ways_on(compose_tiny, tmp_path):
    story.train(compose_tiny("training.max_steps=2"))
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file() and path.name != "lock"}
    with pytest.raises(ValueError) as refusal:
        story.train(compose_tiny("model.n_layer=3", "seed=5"))
    for words in ("seed was 1337, now 5", "model.n_layer was 2, now 3", "another name=", "restart=true", "restore the old values"):
        assert words in str(refusal.value)
    with pytest.raises(ValueError, match=r"data.val_fraction was 0.1, now 0.2"):
        story.train(compose_tiny("data.val_fraction=0.2"))
    with pytest.raises(ValueError, match=r"training.precision was fp32, now bf16"):
        story.train(compose_tiny("training.precision=bf16"))
    assert before == {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file() and path.name != "lock"}


def trained_on_two_texts(compose_tiny, tmp_path, book) -> tuple[list[str], Path]:
    """Two runs without a name by the same words, between which the text has changed: the words, and the first one's folder."""
    text = tmp_path / "mine.txt"
    text.write_text(book.read_text())
    unnamed = ["name=", f"data.path={text}", "training.max_steps=2"]
    story.train(compose_tiny(*unnamed))
    (first,) = (tmp_path / "runs").iterdir()
    text.write_text(book.read_text() + "\nOne more sentence.")
    story.train(compose_tiny(*unnamed))
    return unnamed, first


def test_without_a_name_another_run_gets_a_folder_named_by_what_differs(compose_tiny, tmp_path, book, capsys):
    unnamed, first = trained_on_two_texts(compose_tiny, tmp_path, book)
    assert "the text is not the one that was trained on" in capsys.readouterr().out
    (second,) = set((tmp_path / "runs").iterdir()) - {first}
    assert second.name.startswith(f"{first.name}-prepared=") and last_step(second) == 2
    story.train(compose_tiny(*unnamed, "training.max_steps=3"))  # and it is found again
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {first.name, second.name}
    assert (last_step(first), last_step(second)) == (2, 3)


def test_restart_without_a_name_is_of_the_run_that_is_meant(compose_tiny, tmp_path, book):
    unnamed, first = trained_on_two_texts(compose_tiny, tmp_path, book)
    story.train(compose_tiny(*unnamed, "restart=true", "training.max_steps=3"))
    (second,) = [path for path in (tmp_path / "runs").iterdir() if path.name.startswith(f"{first.name}-") and not path.name.endswith(".old")]
    assert last_step(first) == 2 and last_step(second) == 3 and last_step(second.with_name(f"{second.name}.old")) == 2


def test_restart_of_a_run_in_ruins_begins_anew(compose_tiny, tmp_path):
    story.train(compose_tiny("training.max_steps=2"))
    (tmp_path / "runs/tiny/checkpoints/step_00000002" / MODEL).write_bytes(b"")
    with pytest.raises(ValueError, match="restart=true"):
        story.train(compose_tiny("training.max_steps=2"))
    assert story.train(compose_tiny("training.max_steps=2", "restart=true")) == 0


def test_restart_moves_nothing_when_this_machine_lacks_what_is_asked_for(compose_tiny, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    story.train(compose_tiny("training.max_steps=2"))
    with pytest.raises(ValueError, match="device=cuda is not available"):
        story.train(compose_tiny("training.max_steps=2", "restart=true", "training.device=cuda"))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]


def test_a_run_does_not_lie_inside_another_nor_around_it(compose_tiny, tmp_path):
    story.train(compose_tiny("name=a/b", "training.max_steps=2"))
    story.train(compose_tiny("name=c", "training.max_steps=2"))
    with pytest.raises(ValueError, match=r"c/checkpoints/x is inside the run .*/c"):
        story.train(compose_tiny("name=c/checkpoints/x"))
    with pytest.raises(ValueError, match=r"/a contains runs, such as b: use another name="):
        story.train(compose_tiny("name=a"))
    assert [path.name for path in (tmp_path / "runs/a").iterdir()] == ["b"]
    with pytest.raises(ValueError, match="would leave runs_dir"):
        compose_tiny("name=.")


# A finished run


def test_a_finished_run_samples_says_how_to_go_on_and_changes_nothing(compose_tiny, tmp_path, capsys):
    story.train(compose_tiny("training.max_steps=3", "training.sample_tokens=20"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"}
    capsys.readouterr()
    assert story.train(compose_tiny("training.max_steps=3", "training.sample_tokens=20")) == 0
    said = capsys.readouterr().out
    assert "is finished: 3 steps" in said and "training.max_steps=6" in said and "--- 3 of 3" in said
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.slow
def test_max_seconds_ends_a_run_and_can_be_raised(compose_tiny, tmp_path, capsys):
    limit = ["training.max_steps=1e6", "training.max_seconds=0.5", "training.eval_every=1e6"]
    assert story.train(compose_tiny(*limit)) == 0
    last = store.list_checkpoints(tmp_path / "runs/tiny/checkpoints")[-1]
    assert 0.5 <= last.state["seconds"] < 5 and last.state["val_loss"] is not None
    assert story.train(compose_tiny(*limit)) == 0
    assert "raise training.max_seconds" in capsys.readouterr().out
    assert story.train(compose_tiny(*limit, "training.max_seconds=0.6")) == 0
    assert last_step(tmp_path / "runs/tiny") > last.step


@pytest.mark.parametrize("schedule", ["optim.schedule=constant", "optim.schedule=wsd optim.decay_fraction=0.2"])
def test_a_run_extended_before_its_rate_fell_becomes_the_longer_run(compose_tiny, tmp_path, capsys, interrupt_at, schedule):
    """A constant rate at any time, wsd before its decay: bit by bit the run that was planned so from the start."""
    words = [*schedule.split(), "training.eval_every=100", "training.checkpoint_every=100"]
    story.train(compose_tiny(*words, "name=long", "training.max_steps=20"))
    if "wsd" in schedule:
        interrupt_at(7)
        assert story.train(compose_tiny(*words, "training.max_steps=10")) == 130
    else:
        story.train(compose_tiny(*words, "training.max_steps=10", "training.eval_every=100"))
    capsys.readouterr()
    story.train(compose_tiny(*words, "training.max_steps=20"))
    assert "it becomes that run" in capsys.readouterr().out
    found = compare(tmp_path / "runs/long", tmp_path / "runs/tiny")
    assert not any(difference for what, difference in found.items() if "wsd" in schedule or "metrics" not in what)


def test_a_run_that_was_extended_in_its_decay_never_becomes_another_run(compose_tiny, tmp_path, capsys, interrupt_at):
    words = ["optim.schedule=wsd", "optim.decay_fraction=0.5"]
    story.train(compose_tiny(*words, "training.max_steps=10"))
    interrupt_at(12)
    assert story.train(compose_tiny(*words, "training.max_steps=100")) == 130
    interrupt_at(14)
    capsys.readouterr()
    assert story.train(compose_tiny(*words, "training.max_steps=200")) == 130
    assert "would have had other rates" in capsys.readouterr().out


def test_a_finished_run_is_finished_on_any_machine(compose_tiny, tmp_path, monkeypatch, capsys):
    story.train(compose_tiny("training.max_steps=2"))
    monkeypatch.setattr(Device, "environment", pytest.fail)
    assert story.train(compose_tiny("training.max_steps=2")) == 0 and "is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_planned_for_ever_that_ends_by_time_goes_on(compose_tiny, tmp_path):
    for seconds in (0.2, 0.4):
        story.train(compose_tiny("training.max_steps=1e15", f"training.max_seconds={seconds}", "training.eval_every=1e15"))
    assert store.list_checkpoints(tmp_path / "runs/tiny/checkpoints")[-1].state["seconds"] >= 0.4


def test_what_a_kill_left_half_written_is_removed_at_the_next_start(compose_tiny, tmp_path):
    story.train(compose_tiny("training.max_steps=2"))
    run = tmp_path / "runs/tiny"
    (run / f"checkpoints/{atomic.PARTIAL}step_00000003-x").mkdir()
    (run / f"{atomic.PARTIAL}config.yaml-x").write_bytes(b"half")
    story.train(compose_tiny("training.max_steps=2"))
    assert not list(run.rglob(f"{atomic.PARTIAL}*"))


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_run_extended_later_goes_on_by_the_longer_runs_rates_and_says_so(compose_tiny, tmp_path, capsys, schedule):
    words = [f"optim.schedule={schedule}", "optim.decay_fraction=0.5"]
    story.train(compose_tiny(*words, "training.max_steps=10"))
    capsys.readouterr()
    story.train(compose_tiny(*words, "training.max_steps=20"))
    assert f"The {schedule} schedule for 10 steps becomes the one for 20 steps from here on" in capsys.readouterr().out
    config = compose_tiny(*words).optim
    rates = [row["lr_scale"] for row in read_metrics(tmp_path / "runs/tiny") if "loss" in row]
    assert rates == [story.lr_scale(step, config, 10 if step < 10 else 20) for step in range(20)]


# Exactness


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("extra", [
    pytest.param([], id="plain"), pytest.param(["training.tokens_per_step=256", "model.dropout=0.2"], id="accumulation+dropout"),
    pytest.param(["training.precision=bf16"], id="bf16", marks=pytest.mark.slow),
    pytest.param(["training.precision=fp16"], id="fp16", marks=pytest.mark.slow),
    pytest.param(["training.deterministic=true"], id="deterministic", marks=pytest.mark.slow)])
def test_an_interrupted_run_goes_on_exactly(compose_tiny, tmp_path, interrupt_at, optim, extra):
    words = [f"optim={optim}", *extra, "training.max_steps=14"]
    try:
        assert story.train(compose_tiny(*words, "name=straight")) == 0
        interrupt_at(6)
        assert story.train(compose_tiny(*words, "name=stopped")) == 130
        runs = tmp_path / "runs"
        assert last_step(runs / "stopped") == 6
        assert story.train(compose_tiny(*words, "name=stopped")) == 0
        assert same(runs / "straight", runs / "stopped")
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_signal_within_a_step_ends_it_after_the_micro_step_and_the_step_is_taken_anew(compose_tiny, tmp_path, monkeypatch):
    words = ["training.tokens_per_step=512", "model.dropout=0.1", "training.max_steps=8"]  # 4 micro-steps
    story.train(compose_tiny(*words, "name=straight"))
    calls = []

    def forward(model, idx, targets=None, cache=None, documents=None):
        calls.append(model.training and torch.is_grad_enabled())
        if sum(calls) == 4 * 3 + 2:  # the second micro-step of the fourth step
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(model, idx, targets, cache, documents)

    plain = GPT.forward
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "forward", forward)
        patch.setattr(story, "measure_pace", lambda *_: Pace(1.0, 1.0))
        assert story.train(compose_tiny(*words, "name=stopped")) == 143
    assert sum(calls) == 4 * 3 + 2 and last_step(tmp_path / "runs/stopped") == 3
    story.train(compose_tiny(*words, "name=stopped"))
    assert same(tmp_path / "runs/straight", tmp_path / "runs/stopped")


def last_environment(run):
    return store.list_checkpoints(run / "checkpoints")[-1].state["environment"]


def test_the_threads_the_run_began_with_are_used_again(compose_tiny, tmp_path):
    threads = torch.get_num_threads()
    story.train(compose_tiny("training.max_steps=2"))
    try:
        torch.set_num_threads(threads + 1)
        story.train(compose_tiny("training.max_steps=3"))
        assert last_environment(tmp_path / "runs/tiny")["threads"] == threads
        story.train(compose_tiny("training.max_steps=4", "allow_drift=true"))
        assert last_environment(tmp_path / "runs/tiny")["threads"] == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_a_resumed_run_can_change_its_threads_knowingly(compose_tiny, tmp_path, capsys, monkeypatch):
    used, accumulate = [], story.accumulate_gradients

    def spy(*arguments):
        used.append(torch.get_num_threads())
        return accumulate(*arguments)

    monkeypatch.setattr(story, "accumulate_gradients", spy)
    for number, threads, steps in ((1, 1, 2), (3, 3, 3), (0, 3, 4)):
        story.train(compose_tiny(f"training.max_steps={steps}", f"training.threads={number}"))
        assert used[-1] == last_environment(tmp_path / "runs/tiny")["threads"] == threads
        if steps == 3:
            assert "Resuming with 3 threads instead of 1: the result is not bit-identical" in capsys.readouterr().out


@pytest.mark.parametrize(("recorded", "choice"), [(True, "true"), (False, "false")])
def test_compile_auto_is_decided_once_also_without_a_checkpoint(compose_tiny, tmp_path, monkeypatch, recorded, choice):
    """As after a kill before the first checkpoint."""
    choices = []
    monkeypatch.setattr(story, "maybe_compile", lambda model, choice, *_: choices.append(choice) or model)
    folder = tmp_path / "runs/tiny"
    folder.mkdir(parents=True)
    (folder / "environment.jsonl").write_text(json.dumps({"step": 0, "compiled": recorded}) + "\n")
    story.train(compose_tiny("training.max_steps=1"))
    assert choices == [choice]


def test_a_start_records_what_compile_auto_decided(compose_tiny, tmp_path):
    story.train(compose_tiny("training.max_steps=1"))
    assert compiled_at_last_start(tmp_path / "runs/tiny") is False


@pytest.mark.parametrize("content", ["", "{", "[]", '{"compiled": "yes"}', "[" * 100_000])
def test_a_damaged_record_of_starts_decides_nothing(tmp_path, content):
    (tmp_path / "environment.jsonl").write_text(content)
    assert compiled_at_last_start(tmp_path) is None


@pytest.mark.parametrize("key, value", [("torch", "2.0.0"), ("processor", "another"), ("deterministic", True), ("compiled", True)])
@pytest.mark.slow
def test_another_environment_is_named_and_goes_on_only_when_allowed(compose_tiny, tmp_path, monkeypatch, key, value):
    environment = Device.environment
    with monkeypatch.context() as patch:
        patch.setattr(Device, "environment", lambda *words: replace(environment(*words), **{key: value}))
        story.train(compose_tiny("training.max_steps=2"))
    words = ["training.max_steps=3", "training.compile=false"]
    with pytest.raises(ValueError, match=rf"not be bit-identical on this machine: {key} was {value}, now .*allow_drift=true"):
        story.train(compose_tiny(*words))
    assert last_step(tmp_path / "runs/tiny") == 2
    assert story.train(compose_tiny(*words, "allow_drift=true")) == 0


def test_auto_is_what_it_was_when_the_run_began(compose_tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Device, "_best_precision", lambda device: "bf16")
    words = ["training.precision=auto", "training.device=auto"]
    story.train(compose_tiny(*words, "training.max_steps=2"))
    monkeypatch.setattr(Device, "_best_precision", lambda device: "fp32")
    story.train(compose_tiny(*words, "training.max_steps=3"))
    assert store.list_checkpoints(tmp_path / "runs/tiny/checkpoints")[-1].state["environment"]["precision"] == "bf16"
    said = capsys.readouterr().out
    assert "bf16 (native here)" in said and "bf16 (as when the run began)" in said and "as set" not in said


# What breaks


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129),
                                          (signal.SIGUSR1, 138), (signal.SIGUSR2, 140), (signal.SIGXCPU, 152)])
def test_signals_save_and_exit_with_their_code(compose_tiny, tmp_path, interrupt_at, number, code):
    before = signal.signal(number, signal.default_int_handler)  # these tests may run under nohup
    try:
        interrupt_at(3, number)
        assert story.train(compose_tiny()) == code
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert last_step(tmp_path / "runs/tiny") == 3


def test_under_nohup_a_closed_terminal_ends_nothing(compose_tiny, tmp_path, interrupt_at):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt_at(3, signal.SIGHUP)
        assert story.train(compose_tiny()) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread_trains_and_saves(compose_tiny, tmp_path):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(story.train(compose_tiny("training.max_steps=2"))))
    thread.start()
    thread.join()
    assert codes == [0] and last_step(tmp_path / "runs/tiny") == 2


@pytest.mark.slow
@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_run_with_closed_streams_trains(book, tmp_path, closing):
    """Nothing that a library prints ends up in a file of the run."""
    words = [*program(book, tmp_path), "training.max_steps=2"]
    done = subprocess.run(["sh", "-c", f'exec "$0" "$@" {closing}', *words], cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and last_step(tmp_path / "tiny") == 2, done.stderr
    assert all(json.loads(line) for line in (tmp_path / "tiny/metrics.jsonl").read_text().splitlines())


def test_a_damaged_checkpoint_is_named_once_and_the_one_before_it_gives_the_same_run(compose_tiny, tmp_path, capsys):
    words = ["training.max_steps=15", "training.checkpoint_every=5"]
    story.train(compose_tiny(*words, "name=straight"))
    shutil.copytree(tmp_path / "runs/straight", tmp_path / "runs/tiny")
    broken = tmp_path / "runs/tiny/checkpoints/step_00000015" / MODEL
    broken.write_bytes(broken.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    assert story.train(compose_tiny(*words)) == 0
    said = capsys.readouterr().out
    assert said.count("Warning") == 1 and f"{broken} does not match its checksum" in said and "using step_00000010" in said
    assert same(tmp_path / "runs/straight", tmp_path / "runs/tiny")
    assert (tmp_path / "runs/tiny/checkpoints/damaged-step_00000015").is_dir()


def test_sampling_from_a_damaged_run_warns_and_uses_another(compose_tiny, tmp_path, capsys):
    story.train(compose_tiny("training.max_steps=15", "training.checkpoint_every=5"))
    run = tmp_path / "runs/tiny"
    (run / "checkpoints/step_00000015" / MODEL).write_bytes(b"")
    capsys.readouterr()
    story.open_checkpoint(run, "last", Device("cpu", "fp32"))
    assert "using step_00000010" in capsys.readouterr().err
    assert (run / "checkpoints/step_00000015").is_dir()  # whoever only reads moves nothing


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    return tmp_path_factory.mktemp("copies")


@pytest.fixture
def two_steps(compose_tiny, tmp_path, copies):
    """A run of two steps with these settings, in the place where they put it: trained once, then copied."""
    def of(*words: str) -> Path:
        kept = copies / "-".join(["run", *words])
        if not kept.exists():
            story.train(compose_tiny("training.max_steps=2", *words, f"runs_dir={kept}"))
        shutil.copytree(kept / "tiny", tmp_path / "runs/tiny")
        return tmp_path / "runs/tiny"
    return of


def resealed(run: Path, **changes: object) -> None:
    """Change the state of a run's last checkpoint as someone would who means harm."""
    folder = store.list_checkpoints(run / "checkpoints")[-1].folder
    state = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps(state | changes))
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["files"][STATE] = {"bytes": (folder / STATE).stat().st_size,
                                "sha256": checkpoint.hashlib.sha256((folder / STATE).read_bytes()).hexdigest()}
    del manifest["sha256"]
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest | {"sha256": checkpoint.checksum(manifest)}))


def test_a_setting_that_is_newer_than_the_run_had_its_default(compose_tiny, tmp_path):
    story.train(compose_tiny("training.max_steps=2"))
    run = tmp_path / "runs/tiny"
    settings = store.list_checkpoints(run / "checkpoints")[-1].state["settings"]
    del settings["data"]["mix"], settings["data"]["respect_documents"]
    resealed(run, settings=settings)
    story.train(compose_tiny("training.max_steps=3"))
    assert last_step(run) == 3
    resealed(run, settings=settings)
    with pytest.raises(ValueError, match=r"data.errors was strict, now replace"):
        story.train(compose_tiny("training.max_steps=3", "data.errors=replace"))


@pytest.mark.slow
@pytest.mark.parametrize("model", [{"n_layer": 10**6}, {"n_embd": 10**9}, {"block_size": 10**12}, {"vocab_size": 0}, {"n_layer": "x"},
                                   {"n_layer": 1e308}, {"n_layer": 5}, {"more": 1}, {"dropout": -1}, {"vocab_size": 99}, {"position": "x"},
                                   {"block_size": None}, {"n_layer": [1]}, {"n_embd": 2**16, "n_layer": 1024}], ids=str)
def test_a_hostile_shape_is_one_sentence_and_takes_no_memory(compose_tiny, two_steps, model):
    run = two_steps()
    resealed(run, model=store.list_checkpoints(run / "checkpoints")[-1].state["model"] | model)
    with pytest.raises(ValueError, match="step_00000002") as refusal:
        story.open_checkpoint(run, "last", Device("cpu", "fp32"))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 1000


def test_another_runs_tokenizer_is_refused_with_both_numbers(compose_tiny, tmp_path):
    """By its size, too: where a checkpoint does not tell what its tokenizer's fingerprint was."""
    story.train(compose_tiny("training.max_steps=2"))
    folder = tmp_path / "runs/tiny/checkpoints/step_00000002"
    (folder / checkpoint.TOKENIZER).write_text('{"kind": "byte"}')
    reseal(folder)
    with pytest.raises(ValueError, match=r"\(fingerprint \w{12}\) is not the tokenizer that .*\(fingerprint \w{12}\)"):
        story.open_checkpoint(tmp_path / "runs/tiny", "last", Device("cpu", "fp32"))
    state = json.loads((folder / checkpoint.STATE).read_text())
    del state["settings"]["data"]["tokenizer_fingerprint"]
    (folder / checkpoint.STATE).write_text(json.dumps(state))
    reseal(folder)
    with pytest.raises(ValueError, match=r"its tokenizer has 257 tokens, its model 28"):
        story.open_checkpoint(tmp_path / "runs/tiny", "last", Device("cpu", "fp32"))


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, {"threads": 10**9}, {"threads": "x"}, {"device": "../x"}, {"precision": 3}, {"more": 1}, {"torch": {}}], ids=str)
def test_a_hostile_environment_is_one_sentence(compose_tiny, two_steps, environment):
    run = two_steps()
    resealed(run, environment=environment and store.list_checkpoints(run / "checkpoints")[-1].state["environment"] | environment)
    with pytest.raises(ValueError) as refusal:
        story.train(compose_tiny("training.max_steps=3"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("changes", [{"scaler": {"scale": 1.0}}, {"scaler": {"_growth_tracker": []}}, {"settings": {}}, {"settings": {"model": 3}},
                                     {"settings": {"x": [1, 2]}}, {"settings": {"\x1b[31m": "\ud800"}}], ids=ascii)
def test_a_hostile_state_is_one_sentence(compose_tiny, two_steps, changes):
    resealed(two_steps(), **changes)
    with pytest.raises(ValueError) as refusal:
        story.train(compose_tiny("training.max_steps=3"))
    assert "\n" not in str(refusal.value) and str(refusal.value).isprintable()


RANGES = {key: bounds for key, (_, *bounds) in checkpoint.STATE_FIELDS.items() if bounds}
LIMITS = [(key, value) for key, limits in RANGES.items() for value in limits if key != "step"]
NEAR_LIMITS = [(key, value) for key in RANGES for value in (2**63 - 1, 2**62, 2**41, 1e308, 5e-324, -1, 2.5)]


@pytest.mark.parametrize("key, value", [*LIMITS, *(pytest.param(*one, marks=pytest.mark.slow) for one in NEAR_LIMITS)])
def test_a_state_with_any_number_resumes_or_is_refused(compose_tiny, two_steps, key, value):
    """Without a traceback, and by one sentence."""
    resealed(two_steps(), **{key: value})
    try:
        assert story.train(compose_tiny("training.max_steps=3", "training.max_seconds=1e9")) == 0
    except ValueError as error:
        assert "\n" not in str(error) and "step_00000002" in str(error)


@pytest.mark.parametrize("changes", [{"_growth_tracker": 2**63}, {"_growth_tracker": 1.5}, {"growth_interval": 1.5}, {"growth_interval": 0},
                                     {"scale": 0.0}, {"scale": 1e300}, {"scale": "x"}, {"more": 1}, {"backoff_factor": 3.0}], ids=str)
def test_a_hostile_loss_scaler_is_one_sentence(compose_tiny, two_steps, changes):
    words = ["training.precision=fp16"]
    run = two_steps(*words)
    resealed(run, scaler=store.list_checkpoints(run / "checkpoints")[-1].state["scaler"] | changes)
    with pytest.raises(ValueError, match="is not the state of this loss scaler"):
        story.train(compose_tiny(*words, "training.max_steps=3"))


def test_a_model_that_diverged_does_not_end_a_run_by_its_sample(compose_tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(story, "evaluate", lambda model, *words: (model.wte.weight.data.fill_(math.nan), 1.0)[1])
    with pytest.raises(ValueError, match="had a loss of nan"):
        story.train(compose_tiny("training.max_steps=4", "training.eval_every=1", "training.sample_tokens=8"))
    assert "output is NaN or infinite" in capsys.readouterr().out


class Disk:
    """Stands in for `os` inside atomic.py: the disk is full once `folder` is there, until it has refused `times` writes."""

    def __init__(self, folder: Path, times: float = math.inf) -> None:
        self.folder, self.left = folder, times

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, handle, content):
        if self.left > 0 and self.folder.exists():
            self.left -= 1
            if len(content) > 1 and self.left % 2:
                return os.write(handle, content[: len(content) // 2])  # as much as there is room for
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(handle, content)


@pytest.mark.parametrize("first, times", [("lock", 4), ("lock", 9), ("checkpoints/step_00000004", 5), ("checkpoints/step_00000016", 9)])
@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_loses_nothing(compose_tiny, tmp_path, monkeypatch, capsys, first, times):
    words = ["training.max_steps=20", "training.checkpoint_every=4"]
    story.train(compose_tiny(*words, "name=straight"))
    (tmp_path / "runs/tiny").mkdir()
    (tmp_path / "runs/tiny/config.yaml").touch()
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "os", disk := Disk(tmp_path / "runs/tiny" / first, times))
        try:
            assert story.train(compose_tiny(*words)) == 0
        except OSError as error:  # before the first step, or when nothing is left to do but to save
            assert "No space left" in str(error) or "16 of 20 steps are saved" in str(error)
            disk.left = 0
            assert story.train(compose_tiny(*words)) == 0
    assert disk.left < times and same(tmp_path / "runs/straight", tmp_path / "runs/tiny")


@pytest.mark.parametrize("reached", [4, 8])
@pytest.mark.slow
def test_a_disk_that_stays_full_ends_in_one_sentence_and_keeps_the_old_checkpoints(compose_tiny, tmp_path, monkeypatch, capsys, reached):
    words = ["training.max_steps=20", "training.checkpoint_every=4"]
    story.train(compose_tiny(*words, "name=straight"))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "os", Disk(tmp_path / f"runs/tiny/checkpoints/{checkpoint.step_name(reached)}"))
        with pytest.raises(OSError, match=rf"Only {reached} of 20 steps are saved in .*free some disk"):
            story.train(compose_tiny(*words))
    assert "could not be written" in capsys.readouterr().out
    assert last_step(tmp_path / "runs/tiny") == reached
    assert story.train(compose_tiny(*words)) == 0
    assert same(tmp_path / "runs/straight", tmp_path / "runs/tiny")


def test_a_full_disk_stops_the_run_at_once_where_that_is_asked_for(compose_tiny, tmp_path, monkeypatch):
    words = ["training.max_steps=2000", "training.checkpoint_every=4", "training.on_save_error=stop", "training.eval_every=1e6"]
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "os", Disk(tmp_path / "runs/tiny/checkpoints/step_00000008"))
        with pytest.raises(OSError, match=r"step_000000\d\d could not be written \(.*\). It needs 1.2 MB of free disk"):
            story.train(compose_tiny(*words))
    assert last_step(tmp_path / "runs/tiny") == 8
    assert story.train(compose_tiny(*words, "training.max_steps=10")) == 0


def test_a_disk_too_small_for_two_checkpoints_is_said_before_step_0(compose_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"1 KB free, two checkpoints need \d"):
        story.train(compose_tiny("model.n_embd=128"))
    assert not any((tmp_path / "runs").iterdir())


def test_texts_too_short_are_refused_with_both_numbers_before_a_run_exists(compose_tiny, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("x" * 200)
    with pytest.raises(ValueError, match=r"validation split has 20 tokens, one context needs 33"):
        story.train(compose_tiny(f"data.path={text}"))
    text.write_text("x" * 20)
    with pytest.raises(ValueError, match=r"training split has 18 tokens, one context needs 33"):
        story.train(compose_tiny(f"data.path={text}"))
    assert not (tmp_path / "runs").exists()


def test_where_memory_is_short_saving_is_not_put_beside_training(compose_tiny, tmp_path, monkeypatch):
    story.train(compose_tiny("name=beside"))
    monkeypatch.setattr(saver, "available_memory", lambda: 0.0)
    monkeypatch.setattr(checkpoint.Snapshot, "copy", pytest.fail)
    story.train(compose_tiny("name=at_once"))
    assert same(tmp_path / "runs/beside", tmp_path / "runs/at_once")


def test_a_second_process_is_told_who_holds_the_run(compose_tiny, tmp_path):
    with Run(tmp_path / "runs/tiny"):
        with pytest.raises(ValueError, match=rf"runs/tiny is being trained by process {os.getpid()} on .*: wait for it, stop it"):
            story.train(compose_tiny())
        with pytest.raises(ValueError, match="is being trained by"):
            story.train(compose_tiny("restart=true"))
    assert not (tmp_path / "runs/tiny").exists()  # it got no content
    assert story.train(compose_tiny("training.max_steps=2")) == 0


def test_runs_are_found_by_name_path_and_age(tmp_path):
    for name in ("old", "sweep/lr=0.1"):
        (tmp_path / name / "checkpoints/step_00000001").mkdir(parents=True)
    os.utime(tmp_path / "old" / "checkpoints", (1, 1))
    assert find_run(tmp_path, "old") == tmp_path / "old"
    assert find_run(tmp_path, "sweep/lr=0.1") == tmp_path / "sweep/lr=0.1"
    assert find_run(tmp_path / "elsewhere", str(tmp_path / "old")) == tmp_path / "old"
    assert find_run(tmp_path, "") == tmp_path / "sweep/lr=0.1"
    with pytest.raises(ValueError, match=r"run=new does not exist. There are: old, sweep/lr=0.1"):
        find_run(tmp_path, "new")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/lock").touch()
    (tmp_path / "new/config.yaml").touch()
    with pytest.raises(ValueError, match=r"run=new has no checkpoint yet: .* the first is saved after training.checkpoint_every steps, or when you stop the run"):
        find_run(tmp_path, "new")


def test_every_write_goes_through_the_one_helper():
    """No other module opens a file to write, renames, or has a library write one; sampling prompts and such only read."""
    writing = re.compile(r"""write_text|write_bytes\(|\.save\(|savefig|save_file|os\.replace|os\.rename|\.dump\(|copyfile|copytree"""
                         r"""|open\(.*["'][wax]b?\+?["']""")
    allowed = ("atomic.write_bytes(", "checkpoint.save(", "saver.save(", "figure.savefig(picture",
               'open(log, "ab") as output')  # a process's output, on a cluster's node that need not know this code
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[cdmt]*/*.py"), *ROOT.glob("scripts/*.py")]:
        if path.name in ("atomic.py", "locks.py", "torture.py") or path.parent.name == "tests":  # torture.py does harm
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line
            for call in allowed:
                code = code.replace(call, "")
            assert not writing.search(code), f"{path}:{number}: {line}"


# Losses that are not finite


@pytest.fixture
def plant(monkeypatch):
    """Make the loss of certain batches NaN, or only its gradient: they are known by their tokens."""
    def planted(settings, batches, how="loss"):
        prepared = prepare(settings.data)
        loader = story.Loader(story.open_parts(prepared, "train"), settings.model.block_size, settings.training.batch_size,
                              settings.training.micro_steps(settings.model.block_size), settings.seed)
        bad = [loader.batch(batch)[0] for batch in batches]

        def forward(model, idx, targets=None, cache=None, documents=None):
            loss = plain(model, idx, targets, cache, documents)
            if model.training and targets is not None and any(torch.equal(idx, one) for one in bad):
                return loss * math.nan if how == "loss" else loss + (loss * 0.0).sqrt()  # whose gradient is 0 * inf
            return loss

        monkeypatch.setattr(GPT, "forward", forward)

    plain = GPT.forward
    return planted


def reports(run: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((run / "nonfinite").iterdir())]


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_nan_stops_the_run_and_leaves_a_report(compose_tiny, tmp_path, plant, how):
    words = ["training.max_steps=20", "training.checkpoint_every=4", "training.eval_every=100"]
    plant(compose_tiny(), [10], how)
    with pytest.raises(ValueError, match=r"Step 11 had a loss of .*nonfinite/01-step_00000010.json.* Saved so far: 8 steps. Try a lower"):
        story.train(compose_tiny(*words))
    run = tmp_path / "runs/tiny"
    (found,) = reports(run)
    losses = [row["loss"] for row in read_metrics(run)]
    assert found["step"] == 10 and found["action"] == "stop" and found["last_losses"] == losses and len(losses) == 10
    assert found["loss"] == "nan" if how == "loss" else math.isfinite(found["loss"])
    assert found["batch"]["index"] == 10 and len(found["batch"]["sequences_start_at"]) == 4
    assert found["gradient_norms"].keys() == {"wte", "wpe", "h.0", "h.1", "ln_f"} and set(found["gradient_norms"].values()) == {"nan"}
    assert last_step(run) == 8


def test_a_skipped_batch_changes_nothing_and_the_step_counts(compose_tiny, tmp_path, plant, capsys):
    words = ["training.max_steps=20", "training.on_nonfinite=skip"]
    plant(compose_tiny(), [7, 9])
    assert story.train(compose_tiny(*words)) == 0
    run = tmp_path / "runs/tiny"
    rows = [row for row in read_metrics(run) if "lr_scale" in row]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["step"] for row in rows if row.get("skipped")] == [8, 10] and all("loss" in row for row in rows if not row.get("skipped"))
    assert [one["step"] for one in reports(run)] == [7, 9]
    last = store.list_checkpoints(run / "checkpoints")[-1]
    assert last.state["nonfinite"] == 2 and last.state["batches_skipped"] == 0
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint_weights(last).values())


def checkpoint_weights(found):
    from safetensors.torch import load_file

    return load_file(found.folder / MODEL)


def test_a_skipped_first_batch_leaves_the_weights_as_they_were(compose_tiny, tmp_path, plant):
    plant(compose_tiny(), [0])
    story.train(compose_tiny("training.max_steps=1", "training.on_nonfinite=skip"))
    torch.manual_seed(compose_tiny().seed)
    weights = checkpoint_weights(store.list_checkpoints(tmp_path / "runs/tiny/checkpoints")[-1])
    fresh = GPT(replace(compose_tiny().model, vocab_size=weights["wte.weight"].size(0))).state_dict()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in weights.items())


def test_a_rollback_goes_back_and_steps_over_the_batches_since(compose_tiny, tmp_path, plant, monkeypatch):
    """Steps 0-7 are kept (the checkpoint of 8), batches 8, 9 and 10 are stepped over: step 8 reads batch 11."""
    words = ["training.max_steps=20", "training.checkpoint_every=4", "training.eval_every=100", "training.on_nonfinite=rollback"]
    plant(compose_tiny(), [10])
    read = []
    batch = story.Loader.batch
    monkeypatch.setattr(story.Loader, "batch", lambda loader, step, *place: read.append(step) or batch(loader, step, *place))
    assert story.train(compose_tiny(*words)) == 0
    assert read[1:] == [*range(11), *range(11, 23)]  # after those that only tell the time
    run = tmp_path / "runs/tiny"
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == list(range(1, 21))
    last = store.list_checkpoints(run / "checkpoints")[-1]
    assert (last.step, last.state["batches_skipped"], last.state["nonfinite"]) == (20, 3, 1)


def test_a_rollback_takes_the_checkpoints_after_it_back_too(compose_tiny, tmp_path, plant, interrupt_at):
    """Stopped at step 9, before the NaN and again after it: the second checkpoint of that step is another one."""
    words = ["training.max_steps=20", "training.checkpoint_every=4", "training.on_nonfinite=rollback"]
    plant(compose_tiny(), [10])
    skipped = []
    for time in (1, 2):
        interrupt_at(9, time=time)
        assert story.train(compose_tiny(*words)) == 130
        last = store.list_checkpoints(tmp_path / "runs/tiny/checkpoints")[-1]
        skipped.append((last.step, last.state["batches_skipped"]))
    assert skipped == [(9, 0), (9, 3)]


def test_a_rollback_before_the_first_checkpoint_goes_back_to_the_start(compose_tiny, tmp_path, plant):
    plant(compose_tiny(), [2])
    assert story.train(compose_tiny("training.max_steps=8", "training.on_nonfinite=rollback")) == 0
    assert store.list_checkpoints(tmp_path / "runs/tiny/checkpoints")[-1].state["batches_skipped"] == 3


@pytest.mark.parametrize("action", ["skip", "rollback"])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stop", [pytest.param(5, marks=pytest.mark.slow), 9, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (10, 13))])
def test_answers_to_nan_are_deterministic_wherever_the_run_is_stopped(compose_tiny, tmp_path, plant, interrupt_at, action, precision, stop):
    words = [f"training.on_nonfinite={action}", f"training.precision={precision}", "training.max_steps=20", "training.checkpoint_every=4",
             "model.dropout=0.1", "optim=muon"]
    plant(compose_tiny(), [10, 17])
    story.train(compose_tiny(*words, "name=straight"))
    interrupt_at(stop)
    while story.train(compose_tiny(*words, "name=stopped")) == 130:
        interrupt_at(99)
    assert same(tmp_path / "runs/straight", tmp_path / "runs/stopped")
    assert reports(tmp_path / "runs/straight") == reports(tmp_path / "runs/stopped")


def test_a_report_that_a_full_disk_refuses_does_not_end_a_run_that_skips(compose_tiny, tmp_path, plant, monkeypatch, capsys):
    plant(compose_tiny(), [7])

    write = atomic.write_bytes

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(story.nonfinite.atomic, "write_bytes", lambda path, content: full() if "nonfinite" in str(path) else write(path, content))
    assert story.train(compose_tiny("training.on_nonfinite=skip")) == 0
    assert "no report of it could be written (No space left on device)" in capsys.readouterr().out


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_answers_to_nan_are_bounded(compose_tiny, tmp_path, plant, action):
    plant(compose_tiny(), [5, 6, 8, 9, 11, 14])
    with pytest.raises(ValueError, match=r"It is number 3 in this run, and training.nonfinite_limit=2"):
        story.train(compose_tiny(f"training.on_nonfinite={action}", "training.nonfinite_limit=2", "training.checkpoint_every=4"))
    assert [one["action"] for one in reports(tmp_path / "runs/tiny")] == [action, action, "stop"]


# The whole program


def program(book, tmp_path) -> list[str]:
    """The command of a run `tiny` that takes long."""
    return [sys.executable, "train.py", "model=nano", "data=text", f"data.path={book}", "data.tokenizer=char",
            "training=smoke", "name=tiny", "training.max_steps=1e5", "training.sample_tokens=0",
            "training.eval_every=1e5", f"runs_dir={tmp_path}"]


@pytest.mark.slow
def test_two_starts_at_once_and_two_signals(book, tmp_path):
    """The second start names the first; the first one's second Ctrl-C ends it at once, and the run goes on undamaged."""
    words = program(book, tmp_path)
    first = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("tiny/checkpoints/step_*")):
        assert first.poll() is None, first.stderr.read()
    second = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 1 and f"is being trained by process {first.pid} on" in second.stderr and "Traceback" not in second.stderr
    first.send_signal(signal.SIGINT)
    first.send_signal(signal.SIGINT)
    _, complaints = first.communicate(timeout=60)
    assert first.returncode == 130 and "Traceback" not in complaints
    reached = last_step(tmp_path / "tiny")
    third = subprocess.run([*words, f"training.max_steps={reached + 10}"], cwd=ROOT, capture_output=True, text=True)
    assert third.returncode == 0 and f"from step {reached}" in third.stdout


def test_settings_of_a_checkpoint_are_the_runs(compose_tiny, tmp_path):
    settings = compose_tiny("training.max_steps=2")
    story.train(settings)
    state = store.list_checkpoints(tmp_path / "runs/tiny/checkpoints")[-1].state
    assert state["settings"]["optim"] == asdict(settings)["optim"] and state["settings"]["data"]["prepared"]


@pytest.mark.slow
def test_the_proof_that_ships_holds_and_shows_a_difference(book, monkeypatch):
    """`scripts.verify_resume` as users run it; and with dropout that is not the step's, which it must notice."""
    words = [sys.executable, "-m", "scripts.verify_resume", "model=nano", "data=text", f"data.path={book}", "data.tokenizer=char",
             "training.batch_size=4", "training.max_steps=20", "training.checkpoint_every=4", "kills=3"]
    honest = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert honest.returncode == 0 and "bit by bit" in honest.stdout and honest.stdout.count("the same") == 8
    forgetful = "import train; from training import step; step.seed_dropout = lambda *place: train.torch.seed(); train.launch(train.train, 'config', '')"
    plain = subprocess.Popen
    monkeypatch.setattr(verify.subprocess, "Popen", lambda command, **options: plain([command[0], "-c", forgetful, *command[2:]], **options))
    assert verify.verify(verify.VerifySettings(kills=1, train=(*words[3:-1], "model.dropout=0.2"))) == 1


@pytest.mark.slow
def test_a_short_campaign_loses_nothing():
    done = subprocess.run([sys.executable, "-m", "scripts.torture", "kills=4", "every=75"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Nothing was lost." in done.stdout, done.stdout + done.stderr[-2000:]
    for words in ("killed before", "killed within", "disk full once", "disk full for good", "damaged: manifest.json", "kill -9"):
        assert words in done.stdout


# Early stopping, and runs without evaluations


@pytest.fixture
def losses(monkeypatch):
    """Give the evaluations of a training these losses, by the step at which they are made."""
    def given(by_step):
        def note_step(now, *arguments):
            steps.append(now + 1)
            return lr_scale(now, *arguments)

        steps, lr_scale = [], story.lr_scale
        monkeypatch.setattr(story, "lr_scale", note_step)
        monkeypatch.setattr(story, "evaluate", lambda *arguments: by_step[steps[-1]])
    return given


EVERY_2 = ["training.eval_every=2", "training.checkpoint_every=5", "training.max_steps=20"]
LOSSES = dict(zip(range(2, 21, 2), [3.0, 2.0, 2.5, 2.0, math.nan, 2.1, 1.5, 1.6, 1.7, 1.8], strict=True))


def test_a_run_stops_after_evaluations_without_a_lower_loss(compose_tiny, tmp_path, losses, capsys):
    losses(LOSSES)
    assert story.train(compose_tiny(*EVERY_2, "training.patience=3")) == 0
    said = capsys.readouterr().out
    assert "Stopped early: the validation loss was lowest, 2.0000, 3 evaluations ago" in said
    saved = store.list_checkpoints(tmp_path / "runs/tiny/checkpoints")
    assert saved[-1].step == 10 and min(saved, key=store.by_val_loss).step == 4
    assert '"stopped_early": true' in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()[-1]


def test_a_run_that_stopped_early_is_finished_until_patience_is_raised(compose_tiny, tmp_path, losses, capsys):
    losses(LOSSES)
    story.train(compose_tiny(*EVERY_2, "training.patience=3"))
    assert is_finished(compose_tiny(*EVERY_2, "training.patience=3"), tmp_path / "runs/tiny")
    story.train(compose_tiny(*EVERY_2, "training.patience=3"))
    assert "It stopped early. To train further, raise training.patience, as in training.patience=6" in capsys.readouterr().out
    assert last_step(tmp_path / "runs/tiny") == 10
    story.train(compose_tiny(*EVERY_2, "training.patience=5"))
    assert last_step(tmp_path / "runs/tiny") == 20  # 14 is a new lowest loss, and 20 the end


@pytest.mark.parametrize("stop", [3, 4, 5, 9, 10])
def test_an_interrupted_run_stops_early_at_the_same_step(compose_tiny, tmp_path, losses, interrupt_at, stop):
    losses(LOSSES)
    words = [*EVERY_2, "training.patience=3"]
    story.train(compose_tiny(*words, "name=straight"))
    interrupt_at(stop - 1)
    assert story.train(compose_tiny(*words)) == 130
    assert story.train(compose_tiny(*words)) == 0
    assert last_step(tmp_path / "runs/tiny") == last_step(tmp_path / "runs/straight") == 10
    assert same(tmp_path / "runs/tiny", tmp_path / "runs/straight")


def test_a_killed_run_stops_early_at_the_same_step(compose_tiny, tmp_path, losses, monkeypatch):
    """It resumes from step 5, after which two evaluations were made that no checkpoint knows of."""
    losses(LOSSES)
    words = [*EVERY_2, "training.patience=3"]
    story.train(compose_tiny(*words, "name=straight"))
    lr_scale = story.lr_scale

    def killed_at_9(now, *arguments):
        if now == 9:
            raise RuntimeError("killed")
        return lr_scale(now, *arguments)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(story, "lr_scale", killed_at_9)
        story.train(compose_tiny(*words))
    assert last_step(tmp_path / "runs/tiny") == 5
    assert story.train(compose_tiny(*words)) == 0
    assert same(tmp_path / "runs/tiny", tmp_path / "runs/straight")


def test_the_evaluation_at_the_end_of_a_run_does_not_use_up_patience(compose_tiny, tmp_path, losses):
    """Else a run that is extended would stop earlier than one that was planned as long."""
    losses(LOSSES | {5: 9.0})
    story.train(compose_tiny(*EVERY_2, "training.patience=3", "training.max_steps=5"))
    story.train(compose_tiny(*EVERY_2, "training.patience=3"))
    assert last_step(tmp_path / "runs/tiny") == 10


def test_a_checkpoint_from_before_patience_is_resumed(compose_tiny, tmp_path):
    story.train(compose_tiny("training.max_steps=2"))
    for one in store.list_checkpoints(tmp_path / "runs/tiny/checkpoints"):
        state = json.loads((one.folder / checkpoint.STATE).read_text())
        for key in checkpoint.NEW_FIELDS:
            del state[key]
        (one.folder / checkpoint.STATE).write_text(json.dumps(state))
        reseal(one.folder)
    assert story.train(compose_tiny("training.max_steps=3", "training.patience=2")) == 0


def test_without_evaluations_only_the_last_step_is_evaluated_and_saved(compose_tiny, tmp_path):
    story.train(compose_tiny("training.eval_every=0", "training.checkpoint_every=0", "training.max_steps=7"))
    rows = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row] == [7]
    assert [one.step for one in store.list_checkpoints(tmp_path / "runs/tiny/checkpoints")] == [7]


def test_without_checkpoints_an_interrupted_run_is_saved(compose_tiny, tmp_path, interrupt_at):
    interrupt_at(4)
    assert story.train(compose_tiny("training.checkpoint_every=0", "training.max_steps=7")) == 130
    assert last_step(tmp_path / "runs/tiny") == 4


@pytest.mark.parametrize(("words", "problem"), [
    (["training.patience=-1"], "patience=-1 must be at least 0"), (["training.eval_every=-1"], "eval_every=-1 must be at least 0"),
    (["training.patience=2", "training.eval_every=0"], "eval_every=0 asks for none"), (["training.eval_tokens=0"], "at least 1")])
def test_evaluations_that_make_no_sense_are_refused(compose_tiny, words, problem):
    with pytest.raises(ConfigError, match=problem):
        compose_tiny(*words)


# Other micro-batches


def test_a_run_resumes_with_another_micro_batch_and_says_what_that_means(compose_tiny, tmp_path, capsys):
    """The same sequences a step: what is learned differs by rounding alone."""
    first, more = ["training.max_steps=3", "optim.schedule=constant"], ["training.max_steps=6", "optim.schedule=constant"]
    for name in ("straight", "other"):
        story.train(compose_tiny(*first, f"name={name}"))
    story.train(compose_tiny(*more, "name=straight"))
    settings = compose_tiny()
    batch_size, tokens = settings.training.batch_size, settings.training.batch_size * settings.model.block_size
    capsys.readouterr()
    story.train(compose_tiny(*more, "name=other", f"training.batch_size={batch_size // 2}", f"training.tokens_per_step={tokens}"))
    said = capsys.readouterr().out
    assert f"Micro-batches of {batch_size // 2} sequences instead of {batch_size}: " in said and "not bit-identical" in said
    straight, other = ([row["loss"] for row in read_metrics(tmp_path / "runs" / name) if "loss" in row] for name in ("straight", "other"))
    assert other[:3] == straight[:3] and other[3:] == pytest.approx(straight[3:], abs=1e-4)


def test_another_number_of_tokens_per_step_is_another_run(compose_tiny):
    story.train(compose_tiny("training.max_steps=1"))
    with pytest.raises(ValueError, match=r"training.batch_size was"):
        story.train(compose_tiny("training.max_steps=2", "training.batch_size=2"))


def test_a_name_is_not_made_from_micro_batches_alone(book):
    words = [f"data.path={book}", "data=text"]
    settings = compose("config", words)
    tokens = settings.training.batch_size * settings.model.block_size
    other = compose("config", [*words, "training.batch_size=8", f"training.tokens_per_step={tokens}"])
    assert other.auto_name == settings.auto_name
