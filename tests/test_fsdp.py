"""A run whose weights are divided among the processes (training.shard=full) is the same run."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from forks import start_forks, wait_for_forks

from checkpointing import store
from checkpointing.spec import MODEL, OPTIMIZER
from conf.schema import compose
from scripts.verify_resume import all_tensors
from train import train, train_together
from training.distributed import World

TINY = ["data=text", "data.tokenizer=char", "training=smoke", "training.device=cpu",
        "training.threads=1", "training.eval_tokens=512", "logger.report=false",
        "training.sample_tokens=0", "training.batch_size=2", "training.tokens_per_step=256",
        "training.max_steps=12", "optim.schedule=constant"]
RECIPES = {
    "muon": ["model=modern-nano", "optim=muon", "optim.normalize_rows=true", "model.dropout=0.1", "training.precision=fp32"],
    # A width that two processes cannot divide equally.
    "adamw": ["model=nano", "model.n_embd=33", "model.n_head=3", "optim.grad_clip=0.1",
              "training.precision=fp32"],
    "fp16": ["model=nano", "training.precision=fp16"],
}
# The largest difference of a step's loss. Measured: 5e-6, 2e-7 and 8e-5.
MOST = {"muon": 3e-5, "adamw": 1e-6, "fp16": 3e-4}


@pytest.fixture(scope="module")
def runs(book, tmp_path_factory):
    """Whole runs of one process, divided runs of two, and one that moves between them."""
    folder = tmp_path_factory.mktemp("runs")
    common = [*TINY, f"data.path={book}", f"runs_dir={folder}"]

    def alone(name, recipe, *words):
        train(compose("config", [*common, *RECIPES[recipe], f"name={name}", *words]))

    for recipe in RECIPES:
        alone(recipe, recipe)
    alone("moving", "muon", "training.max_steps=4")
    divided = [[*common, *words, f"name={name}-divided", "training.shard=full"]
               for name, words in RECIPES.items()]
    divided[0] += ["training.recompute=true", "training.sample_tokens=8"]
    divided.append([*common, *RECIPES["muon"], "name=moving", "training.shard=full",
                    "training.max_steps=8"])

    import torch.distributed.fsdp  # noqa: F401  Here, so that the forks need not.

    def train_divided(_):
        warnings.showwarning = lambda message, *_: print(f"A library warns: {message}")
        world = World()
        with world.joined():
            for words in divided:
                train_together(compose("config", words), world)

    codes, output = wait_for_forks(start_forks(2, train_divided, folder), folder)
    assert codes == [0, 0] and "A library warns" not in "".join(output), output
    alone("moving", "muon")
    return folder


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [row["loss"] for row in rows(run) if row.get("loss") is not None]


def last(run):
    return store.list_checkpoints(run / "checkpoints")[-1]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_divided_weights_learn_the_same(runs, recipe):
    whole, divided = runs / recipe, runs / f"{recipe}-divided"
    assert losses(divided) == pytest.approx(losses(whole), abs=MOST[recipe], rel=0)
    assert len(losses(divided)) == 12
    for key in ("val_loss", "gradient_norm"):
        ours, theirs = ([row[key] for row in rows(run) if row.get(key)] for run in (divided, whole))
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_checkpoints_hold_whole_tensors(runs, name):
    whole, divided = (all_tensors(last(runs / run), name) for run in ("muon", "muon-divided"))
    assert divided.keys() == whole.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(divided[key], tensor, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_a_run_moves_to_divided_weights_and_back(runs):
    assert losses(runs / "moving") == pytest.approx(losses(runs / "muon"), abs=MOST["muon"], rel=0)


@pytest.mark.slow
def test_a_divided_model_is_sampled(runs):
    samples = [row["sample"] for row in rows(runs / "muon-divided") if "sample" in row]
    assert len(samples) == 2 and all(samples)
