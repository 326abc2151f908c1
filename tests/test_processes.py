"""Several processes train the same run as one, and what one of them meets is answered by all."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import warnings
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
from forks import start_forks, wait_for_forks
from test_faults import FullDisk
from test_runs import last_step, same

import atomic
import train as program
from checkpointing import notices, shared_disk
from conf.launch import launch
from data.loader import Loader
from data.prepare import prepare
from data.shards import open_parts
from model import GPT
from scripts.verify_resume import read_metrics
from training.distributed import World

WORDS = ["training.batch_size=2", "training.tokens_per_step=256", "training.max_steps=6",
         "training.checkpoint_every=2"]


@pytest.fixture
def train_together(tmp_path):
    """Train in forks of this process; return the exit code and the output of each.

    `prepare_rank(rank)` is called in each before it trains.
    """
    def start(settings, size, prepare_rank=lambda rank: None):
        def train_rank(rank):
            prepare_rank(rank)
            launch(lambda _: program.train(settings), "config", "")

        return wait_for_forks(start_forks(size, train_rank, tmp_path), tmp_path)
    return start


@pytest.fixture
def run(tmp_path):
    return tmp_path / "runs/tiny"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [
    ["model=modern-nano", "optim=muon", "model.dropout=0.1"],
    ["optim=adamw", "model.dropout=0.1", "optim.grad_clip=0.1"],
    ["training.precision=fp16"],
])
def test_two_processes_are_bit_identical_to_one(compose_tiny, train_together, run, recipe):
    for size, name in ((1, "alone"), (2, "tiny")):
        codes, output = train_together(compose_tiny(*WORDS, *recipe, f"name={name}"), size)
        assert codes == [0] * size, output
    assert "(2 processes x 2 x 2 sequences of 32)" in output[0]
    assert same(run.with_name("alone"), run)


@pytest.mark.slow
def test_a_run_moves_between_numbers_of_processes(compose_tiny, train_together, run):
    """One process, then four, then two: as if it had been one."""
    words = [*WORDS, "model=modern-nano", "optim=muon", "model.dropout=0.1", "optim.schedule=constant", "training.eval_every=2"]
    for steps, size in ((2, 1), (4, 4), (6, 2)):
        codes, output = train_together(compose_tiny(*words, f"training.max_steps={steps}"), size)
        assert codes == [0] * size, output
    train_together(compose_tiny(*words, "name=alone"), 1)
    assert same(run.with_name("alone"), run)


def test_a_mistake_is_printed_once(compose_tiny, train_together):
    """On each node, although the first process alone finds it. The third one stands for another node."""
    def prepare_rank(rank):
        if rank == 2:
            os.environ["LOCAL_RANK"] = "0"

    codes, output = train_together(compose_tiny("init_from=nothing"), 3, prepare_rank)
    assert codes == [1, 1, 1] and output[1] == ""
    assert output[0] == output[2] and output[0].count("Error: init_from=nothing") == 1


def plant_nan(settings, step, micro_step):
    """Make the loss of one micro-step of one step NaN, known by its tokens."""
    limits = settings.training
    parts = open_parts(prepare(settings.data), "train")
    loader = Loader(parts, settings.model.block_size, limits.batch_size,
                    limits.micro_steps(settings.model.block_size), settings.seed)
    bad, forward = loader.batch(step, micro_step)[0], GPT.forward

    def planted(model, idx, targets=None, cache=None, document_ids=None):
        loss = forward(model, idx, targets, cache, document_ids)
        if model.training and targets is not None and torch.equal(idx, bad):
            return loss * math.nan
        return loss

    return planted


@pytest.mark.slow
@pytest.mark.parametrize("action", ["skip", "rollback", "stop"])
def test_a_nan_in_one_process_is_answered_by_all(compose_tiny, train_together, run, monkeypatch, action):
    """As one process would: here the last of four micro-steps of step 4, which the second one has."""
    words = [*WORDS, f"training.on_nonfinite={action}"]
    monkeypatch.setattr(GPT, "forward", plant_nan(compose_tiny(*words), 3, 3))
    codes, output = train_together(compose_tiny(*words), 2)
    alone, _ = train_together(compose_tiny(*words, "name=alone"), 1)
    assert codes == 2 * alone and codes[0] == (action == "stop"), output
    assert same(run.with_name("alone"), run)
    reports = [[path.read_text() for path in folder.glob("nonfinite/*.json")] for folder in (run, run.with_name("alone"))]
    assert len(reports[0]) == 1 and reports[0] == reports[1]
    assert output[0].count("Step 4 had a loss of nan") == 1 and output[1] == ""


def fill_disk_of_the_first(run):
    def prepare_rank(rank):
        if rank == 0:
            atomic.os = FullDisk(run / "checkpoints/step_00000002")
    return prepare_rank


@pytest.mark.parametrize(("ended", "kind"), [(0, OSError), (1, ValueError)])
def test_a_process_that_ends_before_the_first_step_ends_all(compose_tiny, train_together, run, monkeypatch, ended, kind):
    """It says why: it may be the only one that is short of memory, for example."""
    def fail(*_):
        raise kind("there is no space left")

    def prepare_rank(rank):
        if rank == ended:
            program.check_resources = fail

    monkeypatch.setattr("forks.SECONDS", 20)
    monkeypatch.setattr("training.distributed.REPORT_TIMEOUT", timedelta(seconds=0.1))
    codes, output = train_together(compose_tiny(*WORDS), 2, prepare_rank)
    assert codes == [1, 1] and "Error: there is no space left" in output[ended]
    assert output[1 - ended].count("Error: ") == ended


@pytest.mark.slow
def test_a_full_disk_ends_all_and_the_run_resumes(compose_tiny, train_together, run):
    words = [*WORDS, "training.max_steps=4"]
    codes, output = train_together(compose_tiny(*words), 2, fill_disk_of_the_first(run))
    assert codes == [1, 1] and last_step(run) == 2
    assert output[0].count("Error: ") == 1 and "Error: Only 2 of 4 steps are saved" in output[0]
    assert output[1] == ""
    assert train_together(compose_tiny(*words), 2)[0] == [0, 0]
    train_together(compose_tiny(*words, "name=straight"), 1)
    assert same(run.with_name("straight"), run)


@pytest.mark.slow
def test_a_full_disk_stops_all_at_once_if_asked(compose_tiny, train_together, run):
    words = [*WORDS, "training.max_steps=2000", "training.eval_every=0", "training.on_save_error=stop"]
    codes, output = train_together(compose_tiny(*words), 2, fill_disk_of_the_first(run))
    assert codes == [1, 1] and last_step(run) == 2
    assert output[0].count("Error: ") == 1 and "could not be written" in output[0].partition("Error: ")[2]
    assert output[1] == ""


@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_that_torchrun_repeats_saves(compose_tiny, train_together, run, size):
    """Ctrl-C in a terminal reaches all processes, and torchrun sends it again."""
    def signalled_twice(rank):
        agree = World.agree
        warnings.showwarning = lambda message, *_: print(f"Warning: {message}")

        def interrupted(world, *values):
            print("Step.")
            warnings.warn("as a library does", stacklevel=1)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return agree(world, *values)

        World.agree = interrupted

    codes, output = train_together(compose_tiny(*WORDS, "training.checkpoint_every=0"), size, signalled_twice)
    assert codes == [130] * size and "Interrupted: " in output[0] and last_step(run) >= 1
    # Only the first process prints.
    assert "Step." in output[0] and "Warning: as a library does" in output[0] and output[1:] == [""] * (size - 1)


def test_a_mixture_is_bit_identical_in_two_processes(compose_tiny, train_together, book, run, tmp_path):
    (tmp_path / "digits.txt").write_text("0123456789 " * 300)
    words = [*WORDS, "training.max_steps=2", f"data.mix={book}:2 {tmp_path / 'digits.txt'}:1"]
    for size, name in ((1, "alone"), (2, "tiny")):
        assert train_together(compose_tiny(*words, f"name={name}"), size)[0] == [0] * size
    assert same(run.with_name("alone"), run)


@pytest.mark.slow
def test_more_processes_do_not_enlarge_a_step(compose_tiny, train_together, run):
    """A step of one micro-step cannot be divided. The message has settings that keep the step."""
    assert train_together(compose_tiny("training.max_steps=2"), 1)[0] == [0]
    codes, output = train_together(compose_tiny("training.max_steps=4"), 2)
    assert codes == [1, 1] and output[1] == ""
    advice = re.search(r"1 micro-step a step .* cannot be divided among 2 processes: .*, use (.*)\.", output[0])[1]
    assert train_together(compose_tiny("training.max_steps=4", *advice.split()), 2)[0] == [0, 0]
    assert "Resuming with world_size=2 instead of 1: sums are" in (run / "log.txt").read_text()
    assert [row["tokens"] for row in read_metrics(run) if "tokens" in row] == [128, 256, 384, 512]


def test_a_run_on_one_of_several_gpus_says_how_to_use_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(sys, "argv", ["train.py", "data.path=a b.txt"])
    assert notices.unused_gpus("cuda", 1) == (
        "This run uses one of 4 GPUs. To use all: torchrun --standalone --nproc-per-node=4 train.py 'data.path=a b.txt'")
    assert notices.unused_gpus("cuda", 4) == notices.unused_gpus("cpu", 1) == ""


@pytest.mark.parametrize("before, now, said", [(2, 2, ""), (4, 1, "as before"), (1, 3, "not bit-identical"), (3, 2, "not bit-identical")])
def test_another_number_of_processes_is_said(before, now, said):
    last = SimpleNamespace(state={"environment": {"world_size": before}})
    found = notices.changed_world_size(last, now)
    assert said in found and bool(found) == bool(said)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    environment = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0",
                   "LOCAL_WORLD_SIZE": "4"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"4 processes for 2 GPUs: use --nproc-per-node=2, or"), \
         World(environment).joined():
        pass


def test_processes_on_gpus_send_tensors_of_gpus_by_nccl(monkeypatch):
    """And all else by gloo. Each process uses the GPU of its number."""
    environment = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    called = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", called.append)
    store = torch.distributed.HashStore()
    store.set("restart 0/started 0", "")
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **options: iter([(store, 1, 2)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: called.append(backend))
    with World(environment).joined():
        assert called == [1, "cpu:gloo,cuda:nccl"]


def test_a_disk_that_a_node_does_not_share_is_a_mistake(compose_tiny, tmp_path, monkeypatch):
    """The first process has opened the folder of the prepared tokens, on its own disk."""
    monkeypatch.setattr(shared_disk, "SHARED_SECONDS", 0.0)
    monkeypatch.setattr(program, "prepared_tokens", lambda settings: tmp_path / "prepared")
    with pytest.raises(ValueError, match=r"prepared is not on .* all nodes need the same disk"):
        program.train(compose_tiny())
