"""Several processes train one run: the same bits, and what happens when one of them ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from forks import start_forks, wait_for_forks

import atomic
import train as program
from checkpointing import snapshot, store
from checkpointing.spec import MODEL, OPTIMIZER
from conf.launch import launch
from conf.schema import compose
from scripts.verify_resume import all_tensors
from training.config import TrainingConfig
from training.distributed import World

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
TINY = ["model=nano", "data=text", "data.tokenizer=char", "training=smoke", "training.device=cpu",
        "training.precision=fp32", "training.threads=1", "training.eval_tokens=512",
        "logger.report=false", "training.sample_tokens=0", "training.batch_size=2",
        "training.tokens_per_step=256", "training.checkpoint_every=2"]
RECIPES = {
    "muon": ["model=modern-nano", "optim=muon", "model.dropout=0.1"],
    "adamw": ["optim=adamw", "model.dropout=0.1", "optim.grad_clip=0.1"],
}


@pytest.fixture
def overrides(book, tmp_path):
    return lambda *words: [*TINY, f"data.path={book}", f"runs_dir={tmp_path}", *words]


def content(run):
    """The weights, the optimizer state, and the metrics without times."""
    last = store.list_checkpoints(run / "checkpoints")[-1]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: row.get(key) for key in ("step", "loss", "gradient_norm", "val_loss")}
               for row in rows]
    return all_tensors(last, MODEL), all_tensors(last, OPTIMIZER), metrics


def assert_bit_identical(left, right):
    for ours, theirs in zip(left[:2], right[:2], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert left[2] == right[2]


def wait_for(condition, process):
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)


def training_processes(name):
    """The ids of the processes that train a run, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"name={name}".encode() in words and b"TORCHELASTIC_RUN_ID" in b" ".join(environment):
            ranks = [word for word in environment if word.startswith(b"RANK=")]
            if ranks:
                found[int(ranks[0][5:])] = int(folder.name)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_torchrun_restarts_a_killed_rank(overrides, tmp_path):
    words = [*RECIPES["adamw"], "training.max_steps=30"]
    start = [*TORCHRUN, "2", "train.py", *overrides("name=killed", *words)]
    start.insert(start.index("--standalone"), "--max-restarts=1")
    process = subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    checkpoints = tmp_path / "killed/checkpoints"
    wait_for(lambda: checkpoints.exists() and store.list_checkpoints(checkpoints), process)
    os.kill(training_processes("killed")[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    own = [line for line in errors.splitlines() if line.startswith("Error:")]
    assert len(own) <= 1 and all("Another process of this run has ended" in line for line in own)
    assert not list(checkpoints.glob(".*"))
    assert program.train(compose("config", overrides("name=whole", *words))) == 0
    assert_bit_identical(content(tmp_path / "whole"), content(tmp_path / "killed"))


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_run_resumes(overrides, tmp_path, monkeypatch):
    """Rank 1 is killed while it writes its part of the second checkpoint: the first one is used."""
    monkeypatch.setattr(snapshot, "MAX_BYTES_OF_ONE_WRITER", 10_000)
    words = [*RECIPES["muon"], "training.max_steps=6"]
    write_file = atomic.write_file

    def write_or_die(path, chunks):
        if "step_00000004" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return write_file(path, chunks)

    def train_rank(rank):
        if rank == 1:
            atomic.write_file = write_or_die
        launch(lambda _: program.train(compose("config", overrides("name=parts", *words))), "config", "")

    codes, output = wait_for_forks(start_forks(2, train_rank, tmp_path), tmp_path)
    assert codes == [1, -signal.SIGKILL] and output[0].count("Error: ") == 1
    assert "Another process of this run has ended" in output[0]
    (last,) = store.list_checkpoints(tmp_path / "parts/checkpoints")
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert last.step == 2 and last.files(MODEL) == parts
    sizes = [last.manifest[part]["bytes"] for part in parts]
    assert max(sizes) < 1.5 * min(sizes)
    for name in ("parts", "whole"):
        assert program.train(compose("config", overrides(f"name={name}", *words))) == 0
    assert not list((tmp_path / "parts/checkpoints").glob(".*"))
    assert_bit_identical(content(tmp_path / "parts"), content(tmp_path / "whole"))


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_once(overrides, tmp_path):
    checkpoints = tmp_path / "stopped" / "checkpoints"
    process = subprocess.Popen(
        [*TORCHRUN, "2", "train.py",
         *overrides("name=stopped", "training.max_steps=10000", "training.checkpoint_every=0")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) > 3, process)
    # As a scheduler may do, whose signal torchrun then repeats.
    for rank in training_processes("stopped").values():
        os.kill(rank, signal.SIGTERM)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert output.count("Interrupted: ") == 1
    assert len(store.list_checkpoints(checkpoints)) == 1


def test_micro_steps_are_divided_among_processes():
    limits = TrainingConfig(batch_size=4, tokens_per_step=128 * 8)
    assert [limits.micro_steps(32, size) for size in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ValueError, match=r"8 micro-steps .* 3 processes: use another number"):
        limits.micro_steps(32, 3)
    with pytest.raises(ValueError, match=r"training\.batch_size=2 training\.tokens_per_step=1024"):
        limits.micro_steps(32, 16)
    with pytest.raises(ValueError, match=r"1 micro-step a .*use training\.batch_size=16 "):
        TrainingConfig(batch_size=32).micro_steps(32, 2)


def test_one_process_does_not_use_torch_distributed(monkeypatch):
    monkeypatch.setattr("training.distributed.dist", None)
    world = World({})
    with world.joined():
        assert world.first(lambda: 5) == 5 and world.agree(1.5, True) == (1.5, True)
        world.share([[torch.zeros(1)]])
    assert (world.size, world.rank, world.is_first) == (1, 0, True)


def test_a_process_that_never_starts_is_not_waited_for(monkeypatch):
    """For example if the other node has too few GPUs."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "0",
                   "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("training.distributed.CONNECT_TIMEOUT", timedelta(seconds=0.1))
    with pytest.raises(OSError, match="Another process of this run has ended"), \
         World(environment).joined(use_gpus=False):
        pass


@pytest.mark.parametrize("message", [
    "[gloo/transport/tcp/pair.cc:537] Read error [10.77.0.2]:59538: No route to host.",
    "[gloo/transport/tcp/pair.cc:537] Read error [10.77.0.1]:37301: Connection timed out."],
    ids=["no route", "timed out"])
def test_a_node_that_the_network_has_lost_is_one_sentence(message, monkeypatch):
    world = World({"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0",
                   "LOCAL_WORLD_SIZE": "1"})
    monkeypatch.setattr("training.distributed.dist.rendezvous", Mock(side_effect=RuntimeError(message)))
    with pytest.raises(OSError, match="has ended or cannot be reached"), world.joined(use_gpus=False):
        pass


def test_world_is_read_from_torchruns_environment():
    world = World({"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1",
                   "LOCAL_WORLD_SIZE": "2"})
    assert (world.size, world.rank, world.local_rank, world.is_first) == (8, 3, 1, False)
