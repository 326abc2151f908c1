"""The engine: a run is opened and used from Python, in any folder, and nothing global changes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import reseal
from torch.nn import functional as F

from checkpointing import store
from checkpointing.spec import MODEL, STATE
from conf.sampling import SamplingConfig
from data.tokenizer_json import fingerprint, from_json
from generation import open_run
from generation.decoder import Decoder
from generation.engine import Completion, Engine, open_checkpoint
from model import GPT
from model.skip_init import SkipInit
from training.device import Device

ROOT = Path(__file__).parent.parent
CPU = Device("cpu", "fp32")


@pytest.fixture(scope="module")
def engine(tiny_runs):
    return open_run(tiny_runs / "tiny", device="cpu", precision="fp32")


@pytest.fixture
def copied(tiny_runs, tmp_path):
    """A copy of the run, to change."""
    return shutil.copytree(tiny_runs / "tiny", tmp_path / "tiny")


def assert_loaded(engine: Engine, folder: Path) -> None:
    saved = load_file(folder / MODEL)
    assert all(torch.equal(weights, saved[name]) for name, weights in engine.model.state_dict().items())


# Opening


def test_best_is_the_checkpoint_with_the_lowest_loss(tiny_runs):
    found = store.list_checkpoints(tiny_runs / "tiny/checkpoints")
    best = min(found, key=lambda one: one.state["val_loss"])
    assert_loaded(open_checkpoint(tiny_runs / "tiny", "best", CPU), best.folder)
    assert_loaded(open_checkpoint(tiny_runs / "tiny", "last", CPU), found[-1].folder)


def test_a_checkpoint_is_chosen_by_its_step(tiny_runs):
    assert_loaded(open_checkpoint(tiny_runs / "tiny", "40", CPU), tiny_runs / "tiny/checkpoints/step_00000040")
    steps = ", ".join(str(one.step) for one in store.list_checkpoints(tiny_runs / "tiny/checkpoints"))
    with pytest.raises(ValueError, match=rf"checkpoint=30 is not in .*tiny/checkpoints. There are: {steps}.$"):
        open_checkpoint(tiny_runs / "tiny", "30", CPU)


def test_a_damaged_step_is_not_replaced_by_another(copied):
    model = copied / "checkpoints/step_00000060" / MODEL
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"step_00000060.*: choose another checkpoint"):
        open_checkpoint(copied, "60", CPU)


def test_another_tokenizer_of_the_same_size_is_refused(copied):
    """Although all checksums agree."""
    for one in store.list_checkpoints(copied / "checkpoints"):
        saved = json.loads((one.folder / "tokenizer.json").read_text())
        other = saved | {"characters": "".join(sorted(saved["characters"].replace("a", "!")))}
        (one.folder / "tokenizer.json").write_text(json.dumps(other))
        reseal(one.folder)
        names = fingerprint(from_json(other, ""))[:12], fingerprint(from_json(saved, ""))[:12]
    with pytest.raises(ValueError, match=r"tokenizer.json \(fingerprint {}\) is not the tokenizer .*\(fingerprint {}\)".format(*names)):
        open_checkpoint(copied, "last", CPU)


def test_a_run_without_a_tokenizer_fingerprint_is_opened(copied):
    """As runs of earlier versions are."""
    for one in store.list_checkpoints(copied / "checkpoints"):
        state = json.loads((one.folder / STATE).read_text())
        del state["settings"]["data"]["tokenizer_fingerprint"]
        (one.folder / STATE).write_text(json.dumps(state))
        reseal(one.folder)
    assert open_checkpoint(copied, "last", CPU).tokenizer.vocab_size > 1


def test_opening_draws_no_random_weights(tiny_runs):
    before = torch.get_rng_state()
    engine = open_checkpoint(tiny_runs / "tiny", "best", CPU)
    assert torch.equal(torch.get_rng_state(), before) and not any(weights.is_meta for weights in engine.model.state_dict().values())
    with SkipInit("meta"):
        shapes = GPT(replace(engine.model.config, position="rotary", tie_head=False))
    assert all(weights.is_meta for weights in shapes.parameters()) and shapes.rotary.isfinite().all()


# The API


SCRIPT = """
import os, random, signal, sys, threading

sys.path.insert(0, sys.argv[1])
import torch

def state():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return (os.getcwd(), dict(os.environ), handlers, torch.get_num_threads(), torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(),
            torch.get_rng_state().tolist(), random.getstate(), threading.active_count())

before = state()
from generation import open_run
run = open_run(sys.argv[2])
text = run.generate("The", max_new_tokens=20, temperature=0.8, seed=1)
logits = run.logits("The ")
assert run.decode(run.encode("The")) == "The"
assert logits.shape == (4, run.tokenizer.vocab_size) and not run.model.training
assert state() == before, [pair for pair in zip(state(), before) if pair[0] != pair[1]]
assert os.listdir() == []

from conf import compose
from train import train
train(compose(["model=nano", "data=text", "data.path=" + sys.argv[3], "data.tokenizer=char", "training=smoke", "name=second",
               "training.max_steps=2", "training.threads=2", "training.sample_tokens=0", "logger.report=false"]))
assert state() == before, [pair for pair in zip(state(), before) if pair[0] != pair[1]]
assert os.listdir() == ["runs"] and os.listdir("runs") == ["second"]
print(text)
"""


@pytest.mark.slow
def test_a_script_elsewhere_samples_and_trains(tiny_runs, book, tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(ROOT), str(tiny_runs / "tiny"), str(book)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n" + open_run(tiny_runs / "tiny").generate("The", max_new_tokens=20, seed=1) + "\n")


def test_the_repository_says_that_it_is_not_installed():
    done = subprocess.run([sys.executable, "setup.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Clone the repository" in done.stderr and done.stderr.count("\n") == 1


def test_the_same_seed_generates_the_same_text(engine):
    assert engine.generate("The", seed=1) == engine.generate("The", seed=1) != engine.generate("The", seed=2)
    assert len(engine.generate(max_new_tokens=7)) == 7


def test_logits_are_those_of_the_model(engine):
    ids = torch.tensor([engine.encode("The quiet dog")])
    logits = engine.logits("The quiet dog")
    assert torch.equal(logits, engine.model(ids)[0]) and not logits.requires_grad
    assert F.cross_entropy(logits[:-1], ids[0, 1:]) < 0.8 * torch.tensor(engine.tokenizer.vocab_size).log()
    assert engine.logits("").shape[0] == 1


def test_a_text_longer_than_the_context_is_refused(engine):
    with pytest.raises(ValueError, match="longer than block_size"):
        engine.logits("The" * engine.model.config.block_size)


def test_invalid_rules_are_refused(engine):
    with pytest.raises(ValueError, match=r"temperature=-1 must be[^$]*int8=true needs the cache"):
        engine.generate("The", temperature=-1, int8=True, cache=False)


def test_streamed_pieces_are_the_whole_text(engine):
    rules = SamplingConfig(max_new_tokens=50, stop="zz")
    pieces = list(engine.stream("The", rules))
    assert "".join(pieces) == engine.complete([("The", 0)], rules)[0].text
    assert len([piece for piece in pieces if piece]) > 10


def test_autocast_is_off_between_two_pieces(engine):
    lower = Engine(engine.model, engine.tokenizer, Device("cpu", "bf16"))
    for _ in lower.stream("The", SamplingConfig(max_new_tokens=3)):
        assert not torch.is_autocast_enabled("cpu")


def test_a_decoder_takes_the_memory_that_it_announces(engine):
    decoder = Decoder(engine.model)
    decoder.begin(3, 10)
    cache_bytes = sum(each.nbytes for each in (*decoder.cache.keys, *decoder.cache.values))
    assert cache_bytes == decoder.nbytes(3, 10) - 3 * 4 * 3 * engine.tokenizer.vocab_size


# Completions


class Bytes:
    """A tokenizer for `Completion`: bytes, and 256 for the end of a text."""

    end_of_text = 256
    special = {"<|endoftext|>": 256}  # noqa: RUF012

    def decode_bytes(self, ids):
        return bytes(ids)


def feed(text: bytes, stop: str = "") -> tuple[list[str], Completion]:
    """The printable text after each byte, and the completion."""
    completion = Completion(Bytes(), stop)
    printable = []
    for token in text:
        completion.add(token)
        printable.append(completion.printable())
    return printable, completion


def test_a_character_of_several_tokens_arrives_whole():
    printable, completion = feed("né🎉".encode())
    assert set(printable) == {"n", "né", "né🎉"} and completion.text == "né🎉"


def test_an_incomplete_character_is_replaced_at_the_end():
    _, completion = feed("n🎉".encode()[:-1])
    completion.finish()
    assert completion.text == "n\ufffd"


def test_a_part_of_stop_is_printed_when_it_is_none():
    printable, completion = feed(b"abXabXY.", stop="XY")
    assert printable == ["a", "ab", "ab", "abXa", "abXab", "abXab", "abXab", "abXab"] and completion.finished


def test_end_of_text_finishes_a_completion():
    completion = Completion(Bytes(), "")
    for token in (65, 256, 66):
        completion.add(token)
    assert completion.text == "A" and completion.finished and completion.reason == "end_of_text"
