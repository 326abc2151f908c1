"""The importable API: a run is opened and used from any folder, and nothing global changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from conf.schema import compose
from generation import open_run
from generation.engine import Engine
from train import train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(book, tmp_path_factory):
    """The folder of a finished run, by characters."""
    folder = tmp_path_factory.mktemp("runs")
    train(compose("config", ["model=nano", "data=text", f"data.path={book}", "data.tokenizer=char", "training=smoke",
                             "training.max_steps=30", "training.precision=fp32", f"runs_dir={folder}", "name=tiny",
                             "training.sample_tokens=0", "logger.report=false"]))
    return folder / "tiny"


@pytest.fixture(scope="module")
def engine(run):
    return open_run(run, precision="fp32")


SCRIPT = """
import os, random, signal, sys, threading

sys.path.insert(0, sys.argv[1])
import torch

def state():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    precision = torch.get_float32_matmul_precision()
    return (os.getcwd(), dict(os.environ), handlers, torch.get_num_threads(), precision,
            torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu"),
            torch.get_rng_state().tolist(), random.getstate(), threading.active_count())

before = state()
from generation import open_run
run = open_run(sys.argv[2])
text = run.generate("The", max_new_tokens=20, temperature=0.8, seed=1)
logits = run.logits("The ")
assert run.decode(run.encode("The")) == "The"
assert logits.shape == (4, run.tokenizer.vocab_size) and not run.model.training
assert state() == before, [pair for pair in zip(state(), before) if pair[0] != pair[1]]
print(text, end="")
"""


def test_a_script_in_another_folder_uses_a_run(run, tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(ROOT), str(run)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout) == 20, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_importing_the_api_does_not_import_torch():
    code = "import generation, sys; generation.SamplingConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_same_seed_generates_the_same_text(engine):
    assert engine.generate("The", seed=1) == engine.generate("The", seed=1) != engine.generate("The", seed=2)
    assert len(engine.generate(max_new_tokens=7)) == 7


def test_logits_are_those_of_the_model(engine):
    ids = torch.tensor([engine.encode("The quiet dog")])
    assert torch.equal(engine.logits("The quiet dog"), engine.model(ids)[0])
    assert engine.logits("").shape[0] == 1
    loss = F.cross_entropy(engine.logits("The quiet dog")[:-1], ids[0, 1:])
    assert loss < torch.tensor(engine.tokenizer.vocab_size).log()


def test_a_text_longer_than_the_context_is_refused(engine):
    with pytest.raises(ValueError, match="longer than block_size"):
        engine.logits("The" * engine.model.config.block_size)


@pytest.mark.parametrize(("rules", "problem"), [({"temperature": -1}, "temperature=-1 must be"), ({"int8": True, "cache": False}, "int8")])
def test_invalid_rules_are_refused(engine, rules, problem):
    with pytest.raises(ValueError, match=problem):
        engine.generate("The", **rules)


def test_autocast_is_off_between_two_pieces(engine):
    bf16 = Engine(engine.model, engine.tokenizer, open_device("bf16"))
    for _ in bf16.stream("The", compose("sample", ["max_new_tokens=3"])):
        assert not torch.is_autocast_enabled("cpu")


def open_device(precision):
    from training.device import Device

    return Device("cpu", precision)
