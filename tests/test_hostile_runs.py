"""A run from a stranger is refused by one sentence, or resumed, whatever numbers it contains."""

from __future__ import annotations

import json
import shutil

import pytest
from test_checkpoint import reseal
from test_runs import last

import train as program
from checkpointing.spec import STATE, STATE_FIELDS, TOKENIZER
from generation.engine import open_checkpoint
from training.device import Device


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    return tmp_path_factory.mktemp("copies")


@pytest.fixture
def run(compose_tiny, tmp_path, copies):
    """A run of two steps, trained once and copied for each test."""
    if not (copies / "tiny").exists():
        program.train(compose_tiny("training.max_steps=2", f"runs_dir={copies}"))
    return shutil.copytree(copies / "tiny", tmp_path / "runs/tiny")


def change_state(run, **changes):
    """Change the last checkpoint's state, with a manifest that matches."""
    path = last(run).folder / STATE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    reseal(path.parent)


@pytest.fixture
def refused(compose_tiny, run):
    """Check that the run is refused by one printable sentence, which names the checkpoint or folder."""
    def check(resume, match):
        with pytest.raises(ValueError, match=match) as refusal:
            if resume:
                program.train(compose_tiny("training.max_steps=3"))
            else:
                open_checkpoint(run, "last", Device("cpu", "fp32"))
        assert str(refusal.value).isprintable() and len(str(refusal.value)) < 1000
    return check


@pytest.mark.slow
def test_a_hostile_shape_is_refused_and_takes_no_memory(run, refused):
    shape = last(run).state["model"]
    for change in [{"n_layer": 10**6}, {"n_embd": 10**9}, {"block_size": 10**12}, {"vocab_size": 0}, {"n_layer": "x"}, {"n_layer": 1e308},
                   {"n_layer": 5}, {"more": 1}, {"dropout": -1}, {"vocab_size": 99}, {"position": "x"}, {"block_size": None},
                   {"n_layer": [1]}, {"n_embd": 2**16, "n_layer": 1024}]:
        change_state(run, model=shape | change)
        refused(False, "step_00000002")


def test_the_tokenizer_of_another_run_is_refused(run, refused):
    """By its fingerprint, or by its size if the checkpoint has no fingerprint."""
    folder = last(run).folder
    (folder / TOKENIZER).write_text('{"kind": "byte"}')
    reseal(folder)
    refused(False, r"\(fingerprint \w{12}\) is not the tokenizer that .*\(fingerprint \w{12}\)")
    settings = last(run).state["settings"]
    del settings["data"]["tokenizer_fingerprint"]
    change_state(run, settings=settings)
    refused(False, r"its tokenizer has 257 tokens, its model 28")


def test_a_hostile_environment_is_refused(run, refused):
    environment = last(run).state["environment"]
    for change in [{"threads": 10**9}, {"threads": "x"}, {"device": "../x"}, {"precision": 3}, {"more": 1}, {"torch": {}}]:
        change_state(run, environment=environment | change)
        refused(True, "tiny")
    change_state(run, environment={})
    refused(True, "tiny")


@pytest.mark.parametrize("change", [
    {"scaler": {"scale": 1.0}}, {"scaler": {"_growth_tracker": []}}, {"settings": {}}, {"settings": {"model": 3}},
    {"settings": {"x": [1, 2]}}, {"settings": {"\x1b[31m": "\ud800"}}], ids=ascii)
def test_a_hostile_state_is_refused(run, refused, change):
    change_state(run, **change)
    refused(True, "tiny")


RANGES = {key: bounds for key, (_, *bounds) in STATE_FIELDS.items() if bounds and key != "step"}
EXTREMES = [{key: value} for key in RANGES for value in RANGES[key]]
EXTREMES += [{key: value} for key in ("seconds", "val_loss", "best_val_loss") for value in (5e-324, 1e-308, 1e12)]


@pytest.mark.parametrize("changes", [
    {key: lowest for key, (lowest, _) in RANGES.items()}, {key: highest for key, (_, highest) in RANGES.items()},
    *(pytest.param(one, marks=pytest.mark.slow) for one in EXTREMES)], ids=str)
def test_extreme_numbers_are_resumed_or_refused(compose_tiny, run, changes):
    change_state(run, **changes)
    try:
        assert program.train(compose_tiny("training.max_steps=3", "training.max_seconds=1e9")) == 0
    except ValueError as error:
        assert "\n" not in str(error) and "step_00000002" in str(error)
