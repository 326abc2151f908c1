"""A run starts from the weights of another run: their shape, their tokenizer, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sample as sampling
import train as program
from checkpointing import initial, store
from checkpointing.find_weights import find_weights
from checkpointing.initial import InitialWeights, shape_of_weights
from checkpointing.spec import MODEL
from conf.schema import compose
from generation import open_run, open_weights


@pytest.fixture
def start(compose_tiny, tiny_runs):
    """Train 2 steps from the weights of the run `tiny`, with these overrides, as `more`."""
    def train(*words):
        return program.train(compose_tiny(f"init_from={tiny_runs / 'tiny'}", "name=more", "training.max_steps=2", *words))
    return train


@pytest.fixture
def more(tmp_path):
    return tmp_path / "runs/more"


def best(run: Path) -> Path:
    return min(store.list_checkpoints(run / "checkpoints"), key=store.ORDERS["best"]).folder




def test_a_run_starts_from_the_best_weights_of_another(start, more, tiny_runs, capsys):
    """With a learning rate of nearly 0, they are unchanged."""
    assert start("optim.lr=1e-12", "optim.muon_lr=1e-12", "optim.weight_decay=0") == 0
    before, after = (load_file(best(run) / MODEL) for run in (tiny_runs / "tiny", more))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    saved = store.list_checkpoints(more / "checkpoints")[-1].state["settings"]
    assert saved["init_source"] == str(best(tiny_runs / "tiny"))
    line = f"Weights: {saved['init_source']}, {len(before)} tensors, {sum(map(torch.numel, before.values())):,} parameters, fingerprint {saved['init_fingerprint']}"
    assert line in capsys.readouterr().out and line in (more / "log.txt").read_text()


def test_the_shape_is_that_of_the_weights(start, more):
    """Also where a preset that was not chosen has another one; dropout and a shorter context may be set."""
    assert start("model.block_size=16", "model.dropout=0.1") == 0
    config = open_run(more).model.config
    assert (config.n_embd, config.block_size, config.dropout) == (32, 16, 0.1)


@pytest.mark.parametrize(("words", "said"), [
    (["model.n_layer=3"], "model.n_layer=3 contradicts init_from=.*, whose weights have 2: leave it out"),
    (["model=modern-nano"], "model.activation=relu2 contradicts"),
    (["model.block_size=64"], "model.block_size=64 is longer than the context of init_from=.*: choose at most 32"),
    (["data.tokenizer=byte"], r"has a vocabulary of 28 tokens, data.tokenizer=byte one of 257: set data.tokenizer=.*step_00000060\.$"),
])
def test_settings_that_contradict_the_weights_are_refused(start, more, words, said):
    with pytest.raises(ValueError, match=said) as refused:
        start(*words)
    assert "\n" not in str(refused.value) and not more.exists()


def test_a_plan_refuses_a_longer_context_as_training_does(compose_tiny, tiny_runs):
    settings = compose_tiny(f"init_from={tiny_runs / 'tiny'}", "model.block_size=64")
    with pytest.raises(ValueError, match="longer than the context"):
        shape_of_weights(settings)


def test_another_tokenizer_of_the_same_size_is_refused(start, more, book, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(book.read_text().replace("y", "7"))
    with pytest.raises(ValueError, match=r"although both have 28 different ones: set data.tokenizer="):
        start(f"data.path={other}")
    assert not more.exists()


def test_a_run_continues_on_another_text_with_its_tokenizer(start, more, book, tmp_path, tiny_runs):
    other = tmp_path / "other.txt"
    other.write_text(book.read_text()[: 20_000].replace("y", "s"))
    assert start(f"data.path={other}", f"data.tokenizer={tiny_runs / 'tiny'}") == 0
    assert open_run(more).tokenizer.characters == open_run(tiny_runs / "tiny").tokenizer.characters


def test_a_shorter_context_keeps_the_first_positions(tiny_runs):
    weights = find_weights(str(tiny_runs / "tiny"), tiny_runs)
    assert torch.equal(weights.fitted(16, 28)["wpe.weight"], weights.tensors["wpe.weight"][:16])


def test_tokens_that_are_added_get_the_mean_embedding(tiny_runs):
    weights = find_weights(str(tiny_runs / "tiny"), tiny_runs)
    embedding = weights.fitted(16, 30)["wte.weight"]
    assert torch.equal(embedding[:28], weights.tensors["wte.weight"])
    assert torch.allclose(embedding[28:], weights.tensors["wte.weight"].mean(0))


def test_a_run_resumes_without_the_weights_it_started_from(compose_tiny, tiny_runs, tmp_path, interrupt_at, more):
    source = shutil.copytree(tiny_runs / "tiny", tmp_path / "source")
    settings = compose_tiny(f"init_from={source}", "name=more", "training.max_steps=4")
    interrupt_at(2)
    assert program.train(settings) == 130
    shutil.rmtree(source)
    assert program.train(settings) == 0
    assert store.list_checkpoints(more / "checkpoints")[-1].step == 4


def test_other_initial_weights_make_another_run(start, tiny_runs, more, capsys):
    """The same weights in another place do not."""
    start()
    (other,) = {one.folder for one in store.list_checkpoints(tiny_runs / "tiny/checkpoints")} - {best(tiny_runs / "tiny")}
    with pytest.raises(ValueError, match="different settings: the weights of init_from have changed"):
        start(f"init_from={other}")
    capsys.readouterr()
    assert start(f"init_from={best(tiny_runs / 'tiny')}") == 0 and "is finished" in capsys.readouterr().out


def test_initial_weights_are_read_and_hashed_once(start, monkeypatch):
    calls = []
    for module, name in ((initial, "find_weights"), (initial.Weights, "fingerprint")):
        call = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *words, call=call, name=name: calls.append(name) or call(*words))
    assert start() == 0
    assert calls == ["find_weights", "fingerprint"]


def test_weights_that_change_meanwhile_are_refused(compose_tiny, tiny_runs):
    """By a process that reads them itself, as the others of several do."""
    chosen = InitialWeights().choose_settings(compose_tiny(f"init_from={tiny_runs / 'tiny'}"))
    tokenizer = find_weights(chosen.init_source, tiny_runs).tokenizer
    assert InitialWeights().load(chosen, tokenizer)
    with pytest.raises(ValueError, match="has changed since this command began: run it again"):
        InitialWeights().load(replace(chosen, init_fingerprint="0" * 12), tokenizer)


def test_a_run_is_named_by_its_initial_weights():
    assert compose("config", ["init_from=runs/other", "optim.lr=0.1"]).auto_name == "pydocs-other-lr=0.1"


def test_settings_of_a_finetuned_run_are_those_of_the_run(start, more, capsys):
    start("model.block_size=16")
    assert program.train(compose("config", [f"experiment={more / 'config.yaml'}"])) == 0
    assert "is finished" in capsys.readouterr().out


# Sampling


def test_weights_are_sampled_without_a_run(tiny_runs, tmp_path, capsys):
    words = ["prompt=The", "max_new_tokens=20", "precision=fp32"]
    for chosen in (f"run={tiny_runs / 'tiny'}", f"init_from={best(tiny_runs / 'tiny')}"):
        assert sampling.sample(compose("sample", [chosen, *words])) == 0
    found = capsys.readouterr()
    half = len(found.out) // 2
    assert found.out[:half] == found.out[half:] and "Weights: " in found.err
    assert open_weights(best(tiny_runs / "tiny")).generate("The", seed=1) == open_run(tiny_runs / "tiny").generate("The", seed=1)


def test_a_place_without_weights_is_refused(tiny_runs, tmp_path):
    with pytest.raises(ValueError, match=r"init_from=nope does not exist.*tiny.*Without init_from=, a run starts from random"):
        find_weights("nope", tiny_runs)
