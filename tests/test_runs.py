"""A command resumes its own run and no other, finished runs can be extended, and resuming is exact."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_checkpoint import reseal

import atomic
import startup
import train as program
import trainer
from checkpointing import checkpoint, store
from checkpointing.provenance import compiled_at_last_start
from checkpointing.run_folder import Run
from checkpointing.spec import MODEL, STATE
from conf import identity
from conf.schema import ConfigError, Settings, compose, leaves
from generation.engine import open_checkpoint
from model import GPT
from scripts.verify_resume import compare, read_metrics
from training.device import Device
from training.estimate import Pace

ROOT = Path(__file__).parent.parent


def same(one: Path, other: Path) -> bool:
    """Whether two runs agree in weights, optimizer state, scaler, counters and metrics."""
    print(found := compare(one, other))
    return not any(found.values())


def last(run: Path) -> checkpoint.Checkpoint:
    return store.list_checkpoints(run / "checkpoints")[-1]


def last_step(run: Path) -> int:
    return last(run).step


def files(folder: Path) -> dict[Path, bytes]:
    """The content of all files except locks."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.fixture
def run(tmp_path):
    """The folder of the run that compose_tiny names."""
    return tmp_path / "runs/tiny"


# Identity


def test_every_setting_is_of_one_kind():
    settings = [*leaves(Settings), "world_size", "auto_name", "model_given", "init_source", "init_fingerprint"]
    assert {identity.kind(setting) for setting in settings} == set(identity.KINDS)
    for pattern in " ".join(identity.KINDS.values()).split():
        assert any(identity.fnmatchcase(setting, pattern) for setting in [*settings, "model.vocab_size"]), pattern
    kinds = {"seed": "identity", "optim.lr": "identity", "training.max_steps": "extendable", "logger.wandb": "free", "training.compile": "machine"}
    assert {name: identity.kind(name) for name in kinds} == kinds
    with pytest.raises(KeyError):
        identity.kind("training.something_new")


def test_the_documented_kinds_are_those_of_the_code():
    """Each row of the table in docs/runs.md starts with a kind and lists its settings."""
    lines = (ROOT / "docs/runs.md").read_text().splitlines()
    for kind, patterns in identity.KINDS.items():
        (row,) = [line for line in lines if line.startswith(f"| {kind} |")]
        assert row.split("|")[2].replace("`", "").replace(",", "").split() == patterns.split()


def test_free_and_extendable_settings_may_change(compose_tiny, run, capsys):
    program.train(compose_tiny("training.max_steps=2"))
    assert program.train(compose_tiny("training.max_steps=3", "training.eval_every=1", "logger.project=x", "training.keep_last=1")) == 0
    assert "from step 2" in capsys.readouterr().out and last_step(run) == 3


def test_a_different_run_with_the_same_name_is_refused(compose_tiny, run):
    program.train(compose_tiny("training.max_steps=2"))
    before = files(run.parent)
    for words, problems in [
        (["model.n_layer=3", "seed=5"], ["seed was 1337, now 5", "model.n_layer was 2, now 3", "restore the old values"]),
        (["optim.lr=1e-2"], ["tiny was trained with different settings: optim.lr was 0.003, now 0.01. Use another name=, restore "
                             "the old value, or pass restart=true to start over (the old run is kept as ", "/runs/tiny.old)."]),
        (["training.precision=bf16"], ["training.precision was fp32, now bf16"]),
        (["training.batch_size=2"], ["training.batch_size was 4, now 2"]),
        (["data.separator=x", "data.deduplicate=false"], ["data.separator was empty, now x", "data.deduplicate was true, now false"]),
    ]:
        with pytest.raises(ValueError) as refusal:
            program.train(compose_tiny(*words))
        assert all(problem in str(refusal.value) for problem in problems)
    assert before == files(run.parent)


@pytest.fixture
def two_texts(compose_tiny, tmp_path, book):
    """Two runs without a name, the text changed in between: the overrides, and the first run's folder."""
    text = tmp_path / "mine.txt"
    text.write_text(book.read_text())
    unnamed = ["name=", f"data.path={text}", "training.max_steps=2"]
    program.train(compose_tiny(*unnamed))
    (first,) = (tmp_path / "runs").iterdir()
    text.write_text(book.read_text() + "\nOne more sentence.")
    program.train(compose_tiny(*unnamed))
    return unnamed, first


def test_an_unnamed_different_run_is_named_by_differences(compose_tiny, tmp_path, capsys, two_texts):
    unnamed, first = two_texts
    assert "the training text has changed" in capsys.readouterr().out
    (second,) = set((tmp_path / "runs").iterdir()) - {first}
    assert second.name.startswith(f"{first.name}-prepared=") and last_step(second) == 2
    program.train(compose_tiny(*unnamed, "training.max_steps=3"))  # the same folder
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {first.name, second.name}
    assert (last_step(first), last_step(second)) == (2, 3)
    program.train(compose_tiny(*unnamed, "training.max_steps=2", "restart=true"))
    assert (last_step(first), last_step(second), last_step(second.with_name(f"{second.name}.old"))) == (2, 2, 3)


def test_restart_works_if_all_checkpoints_are_damaged(compose_tiny, run):
    program.train(compose_tiny("training.max_steps=2"))
    (run / "checkpoints/step_00000002" / MODEL).write_bytes(b"")
    with pytest.raises(ValueError, match="restart=true"):
        program.train(compose_tiny("training.max_steps=2"))
    assert program.train(compose_tiny("training.max_steps=2", "restart=true")) == 0


def test_restart_renames_nothing_if_the_device_is_missing(compose_tiny, run):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    program.train(compose_tiny("training.max_steps=2"))
    with pytest.raises(ValueError, match="device=cuda is not available"):
        program.train(compose_tiny("training.max_steps=2", "restart=true", "training.device=cuda"))
    assert list(run.parent.iterdir()) == [run]


def test_runs_are_not_nested(compose_tiny, tmp_path):
    for name in ("a/b", "c"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "lock").touch()
        (tmp_path / "runs" / name / "config.yaml").touch()
    with pytest.raises(ValueError, match=r"c/checkpoints/x is inside the run .*/c"):
        program.train(compose_tiny("name=c/checkpoints/x"))
    with pytest.raises(ValueError, match=r"/a contains runs, such as b: use another name="):
        program.train(compose_tiny("name=a"))
    assert [path.name for path in (tmp_path / "runs/a").iterdir()] == ["b"]


@pytest.mark.parametrize("name", ["a\x1b[31mb", "a\nb", "a\x7f"], ids=ascii)
def test_a_name_with_control_characters_is_refused(name):
    with pytest.raises(ConfigError) as refusal:
        compose("config", [f"name={name}"])
    assert f"name={ascii(name)[1:-1]} contains control characters" in str(refusal.value)
    assert name not in str(refusal.value)


def test_a_locked_run_names_its_process(compose_tiny, run):
    with Run(run):
        with pytest.raises(ValueError, match=rf"runs/tiny is being trained by process {os.getpid()} on .*: wait for it, stop it"):
            program.train(compose_tiny())
        with pytest.raises(ValueError, match="is being trained by"):
            program.train(compose_tiny("restart=true"))
    assert not run.exists()  # it was empty


def test_settings_that_were_added_later_had_their_default(compose_tiny, run):
    program.train(compose_tiny("training.max_steps=2"))
    folder = last(run).folder
    state = json.loads((folder / STATE).read_text())
    del state["settings"]["data"]["mix"], state["settings"]["data"]["respect_documents"]
    (folder / STATE).write_text(json.dumps(state))
    reseal(folder)
    with pytest.raises(ValueError, match=r"data.errors was strict, now replace"):
        program.train(compose_tiny("training.max_steps=3", "data.errors=replace"))
    assert program.train(compose_tiny("training.max_steps=3", "training.patience=2")) == 0


def test_a_checkpoint_has_the_settings_of_its_run(compose_tiny, run):
    settings = compose_tiny("training.max_steps=2")
    program.train(settings)
    saved = last(run).state["settings"]
    assert saved["optim"] == asdict(settings)["optim"] and saved["data"]["prepared"]


# A finished run


def test_a_finished_run_samples_and_changes_nothing(compose_tiny, tmp_path, monkeypatch, capsys):
    words = ["training.max_steps=3", "training.sample_tokens=20"]
    program.train(compose_tiny(*words))
    before = files(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(Device, "environment", pytest.fail)  # on any machine
    assert program.train(compose_tiny(*words)) == 0
    printed = capsys.readouterr().out
    assert "is finished: 3 steps" in printed and "training.max_steps=6" in printed and "--- 3 of 3" in printed
    assert before == files(tmp_path)


@pytest.mark.slow
def test_max_seconds_ends_a_run_and_can_be_raised(compose_tiny, run, capsys):
    limit = ["training.compile=false", "training.max_steps=1e15", "training.max_seconds=0.4", "training.eval_every=1e6"]
    assert program.train(compose_tiny(*limit)) == 0
    saved = last(run)
    assert 0.4 <= saved.state["seconds"] < 5 and saved.state["val_loss"] is not None
    assert program.train(compose_tiny(*limit)) == 0
    assert "raise training.max_seconds" in capsys.readouterr().out
    assert program.train(compose_tiny(*limit, "training.max_seconds=0.5")) == 0
    assert last_step(run) > saved.step


@pytest.mark.parametrize("schedule", ["optim.schedule=constant", "optim.schedule=wsd optim.decay_fraction=0.2"])
def test_a_run_extended_before_its_decay_is_the_longer_run(compose_tiny, run, capsys, interrupt_at, schedule):
    """A constant rate at any time, wsd before its decay: bit-identical to a run that was planned so."""
    words = [*schedule.split(), "training.eval_every=100", "training.checkpoint_every=100"]
    program.train(compose_tiny(*words, "name=long", "training.max_steps=10"))
    if "wsd" in schedule:
        interrupt_at(3)
        assert program.train(compose_tiny(*words, "training.max_steps=5")) == 130
    else:
        program.train(compose_tiny(*words, "training.max_steps=5"))
    capsys.readouterr()
    program.train(compose_tiny(*words, "training.max_steps=10"))
    assert "it becomes that run" in capsys.readouterr().out
    found = compare(run.with_name("long"), run)
    assert not any(difference for part, difference in found.items() if "wsd" in schedule or "metrics" not in part)


def test_a_run_extended_in_its_decay_stays_a_different_run(compose_tiny, capsys, interrupt_at):
    words = ["optim.schedule=wsd", "optim.decay_fraction=0.5"]
    program.train(compose_tiny(*words, "training.max_steps=4"))
    for step, max_steps in ((5, 100), (6, 200)):
        interrupt_at(step)
        capsys.readouterr()
        assert program.train(compose_tiny(*words, f"training.max_steps={max_steps}")) == 130
    assert "would have had other rates" in capsys.readouterr().out


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_run_extended_later_has_the_longer_runs_rates(compose_tiny, run, capsys, schedule):
    words = [f"optim.schedule={schedule}", "optim.decay_fraction=0.5"]
    program.train(compose_tiny(*words, "training.max_steps=4"))
    capsys.readouterr()
    program.train(compose_tiny(*words, "training.max_steps=8"))
    assert f"The {schedule} schedule for 4 steps becomes the one for 8 steps from here on" in capsys.readouterr().out
    config = compose_tiny(*words).optim
    rates = [row["lr_scale"] for row in read_metrics(run) if "loss" in row]
    assert rates == [trainer.lr_scale(step, config, 4 if step < 4 else 8) for step in range(8)]


def test_partial_files_of_a_kill_are_removed_at_the_next_start(compose_tiny, run):
    program.train(compose_tiny("training.max_steps=2"))
    (run / f"checkpoints/{atomic.PARTIAL}step_00000003-x").mkdir()
    (run / f"{atomic.PARTIAL}config.yaml-x").write_bytes(b"half")
    program.train(compose_tiny("training.max_steps=2"))
    assert not list(run.rglob(f"{atomic.PARTIAL}*"))


# Exact resume


@pytest.mark.parametrize("words", [
    pytest.param(["optim=adamw"], id="adamw"),
    pytest.param(["optim=muon", "training.tokens_per_step=256", "model.dropout=0.2"], id="muon, accumulation, dropout"),
    *(pytest.param([f"optim={optim}", extra], id=f"{optim}, {extra}", marks=pytest.mark.slow) for optim in ("adamw", "muon")
      for extra in ("model.dropout=0.2", "training.precision=bf16", "training.precision=fp16", "training.deterministic=true"))])
def test_an_interrupted_run_resumes_bit_identically(compose_tiny, run, interrupt_at, words):
    words = [*words, "training.max_steps=7"]
    assert program.train(compose_tiny(*words, "name=straight")) == 0
    interrupt_at(3)
    assert program.train(compose_tiny(*words)) == 130
    assert last_step(run) == 3
    assert program.train(compose_tiny(*words)) == 0
    assert same(run.with_name("straight"), run)


def test_a_signal_ends_a_step_at_the_next_micro_step(compose_tiny, run, monkeypatch):
    """The step is trained again after the resume."""
    words = ["training.tokens_per_step=512", "model.dropout=0.1", "training.max_steps=4"]  # 4 micro-steps
    program.train(compose_tiny(*words, "name=straight"))
    calls = []

    def forward(model, idx, targets=None, cache=None, document_ids=None):
        calls.append(model.training and torch.is_grad_enabled())
        if sum(calls) == 4 * 2 + 2:  # the second micro-step of the third step
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, idx, targets, cache, document_ids)

    original = GPT.forward
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "forward", forward)
        patch.setattr(startup, "measure_pace", lambda *_: Pace(1.0, 1.0))
        assert program.train(compose_tiny(*words)) == 143
    assert sum(calls) == 4 * 2 + 2 and last_step(run) == 2
    program.train(compose_tiny(*words))
    assert same(run.with_name("straight"), run)


@pytest.mark.slow
def test_a_resumed_run_uses_its_number_of_threads(compose_tiny, run):
    threads = torch.get_num_threads()
    program.train(compose_tiny("training.max_steps=1"))
    try:
        torch.set_num_threads(threads + 1)
        program.train(compose_tiny("training.max_steps=2"))
        assert last(run).state["environment"]["threads"] == threads
        program.train(compose_tiny("training.max_steps=3", "allow_drift=true"))
        assert last(run).state["environment"]["threads"] == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_the_number_of_threads_can_be_changed(compose_tiny, run, capsys, monkeypatch):
    used, accumulate = [], trainer.accumulate_gradients

    def spy(*arguments):
        used.append(torch.get_num_threads())
        return accumulate(*arguments)

    monkeypatch.setattr(trainer, "accumulate_gradients", spy)
    for number, threads, steps in ((1, 1, 2), (3, 3, 3), (0, 3, 4)):
        program.train(compose_tiny(f"training.max_steps={steps}", f"training.threads={number}"))
        assert used[-1] == last(run).state["environment"]["threads"] == threads
        if steps == 3:
            assert "Resuming with 3 threads instead of 1: the result is not bit-identical" in capsys.readouterr().out


def test_compile_auto_is_decided_at_the_first_start(compose_tiny, run, monkeypatch):
    """Also if the run was killed before its first checkpoint."""
    choices = []
    monkeypatch.setattr(startup, "maybe_compile", lambda loss_fn, batch, choice, *_: choices.append(choice) or loss_fn)
    run.mkdir(parents=True)
    (run / "environment.jsonl").write_text(json.dumps({"step": 0, "compiled": True}) + "\n")
    program.train(compose_tiny("training.max_steps=1"))
    assert choices == ["true"] and compiled_at_last_start(run) is False


def test_a_run_that_ends_by_time_is_no_longer_for_compile(compose_tiny, monkeypatch):
    planned = []
    monkeypatch.setattr(startup, "maybe_compile", lambda loss_fn, batch, choice, flops, *_:
                        planned.append(flops / loss_fn.device.nominal_flops()) or loss_fn)
    program.train(compose_tiny("training.max_steps=1000000000", "training.max_seconds=0.01"))
    assert planned == [pytest.approx(0.01)]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"compiled": "yes"}', "[" * 100_000])
def test_a_damaged_record_of_starts_is_ignored(tmp_path, content):
    (tmp_path / "environment.jsonl").write_text(content)
    assert compiled_at_last_start(tmp_path) is None


def test_a_different_environment_is_refused_unless_allowed(compose_tiny, run, monkeypatch):
    environment = Device.environment
    changes = {"torch": "2.0.0", "processor": "another", "deterministic": True, "compiled": True}
    with monkeypatch.context() as patch:
        patch.setattr(Device, "environment", lambda *words: replace(environment(*words), **changes))
        program.train(compose_tiny("training.max_steps=2"))
    changes |= {"deterministic": "true", "compiled": "true"}
    words = ["training.max_steps=3", "training.compile=false"]
    with pytest.raises(ValueError, match=r"not be bit-identical on this machine: .*allow_drift=true") as refusal:
        program.train(compose_tiny(*words))
    assert all(f"{key} was {value}, now " in str(refusal.value) for key, value in changes.items())
    assert last_step(run) == 2
    assert program.train(compose_tiny(*words, "allow_drift=true")) == 0


def test_auto_keeps_its_meaning(compose_tiny, run, monkeypatch, capsys):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", "1")
    words = ["training.precision=auto", "training.device=auto", "allow_drift=true"]
    program.train(compose_tiny(*words, "training.max_steps=2"))
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", "0")
    program.train(compose_tiny(*words, "training.max_steps=3"))
    assert last(run).state["environment"]["precision"] == "bf16"
    printed = capsys.readouterr().out
    assert "bf16 (native here)" in printed and "bf16 (as when the run began)" in printed and "as set" not in printed


def test_a_run_resumes_with_smaller_micro_batches(compose_tiny, run, capsys):
    """The sequences of a step stay the same: the result differs by rounding alone."""
    program.train(compose_tiny("training.max_steps=3", "optim.schedule=constant"))
    shutil.copytree(run, run.with_name("straight"))
    more = ["training.max_steps=6", "optim.schedule=constant"]
    program.train(compose_tiny(*more, "name=straight"))
    capsys.readouterr()
    program.train(compose_tiny(*more, "training.batch_size=2", "training.tokens_per_step=128"))
    printed = capsys.readouterr().out
    assert "icro-batches of 2 sequences instead of 4: " in printed and "not bit-identical" in printed
    straight, other = ([row["loss"] for row in read_metrics(folder) if "loss" in row] for folder in (run.with_name("straight"), run))
    assert other[:3] == straight[:3] and other[3:] == pytest.approx(straight[3:], abs=1e-4)


def test_the_automatic_name_ignores_micro_batches(book):
    words = [f"data.path={book}", "data=text"]
    settings = compose("config", words)
    tokens = settings.training.batch_size * settings.model.block_size
    other = compose("config", [*words, "training.batch_size=8", f"training.tokens_per_step={tokens}"])
    assert other.auto_name == settings.auto_name


# Damaged checkpoints


def test_the_checkpoint_before_a_damaged_one_gives_the_same_run(compose_tiny, run, capsys):
    words = ["training.max_steps=6", "training.checkpoint_every=2"]
    program.train(compose_tiny(*words))
    shutil.copytree(run, run.with_name("straight"))
    damaged = run / "checkpoints/step_00000006" / MODEL
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    open_checkpoint(run, "last", Device("cpu", "fp32"))
    assert "using step_00000004" in capsys.readouterr().err and damaged.exists()  # sampling renames nothing
    assert program.train(compose_tiny(*words)) == 0
    printed = capsys.readouterr().out
    assert printed.count("Warning") == 1 and f"{damaged} does not match its checksum" in printed and "using step_00000004" in printed
    assert same(run.with_name("straight"), run)
    assert (run / "checkpoints/damaged-step_00000006").is_dir()


# Signals and threads


@pytest.mark.parametrize("number, code", [(signal.SIGHUP, 129), (signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGXCPU, 152)])
def test_signals_save_and_exit_with_their_code(compose_tiny, run, interrupt_at, number, code):
    before = signal.signal(number, signal.default_int_handler)  # these tests may run under nohup
    try:
        interrupt_at(3, number)
        assert program.train(compose_tiny()) == code
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert last_step(run) == 3


def test_nohup_keeps_a_run_alive(compose_tiny, interrupt_at):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt_at(2, signal.SIGHUP)
        assert program.train(compose_tiny("training.max_steps=3")) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread_trains_and_saves(compose_tiny, run):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(program.train(compose_tiny("training.max_steps=2"))))
    thread.start()
    thread.join()
    assert codes == [0] and last_step(run) == 2
