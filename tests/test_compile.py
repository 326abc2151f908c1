"""The model compiles as one graph, and once: every preset, with and without documents."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from test_documents import packed_rows  # registers a plain varlen kernel for the CPU, too

import model.gpt
import model.loss
import trainer
from conf.presets import CONF, preset
from data.loader import Validation
from data.shards import Tokens
from model import GPT, GPTConfig
from model.loss import LossOptions
from training.config import OptimConfig
from training.device import Device
from training.distributed import World
from training.optim import Optimizers
from training.step import BatchLoss, evaluate


@functools.cache
def tiny_presets():
    """The configurations of the presets, as small as possible. Those that differ by their size only are one."""
    found = {}
    for path in sorted((CONF / "model").glob("*.yaml")):
        config = GPTConfig(**preset("model", path.stem))
        heads = 2 if config.n_kv_head else None
        config = replace(config, n_layer=1, n_head=4, n_kv_head=heads, n_embd=64, block_size=32, vocab_size=65, ngram_rows=64, dropout=0.0)
        found.setdefault(config, path.stem)
    return {name: config for config, name in found.items()}


@pytest.fixture
def graphs():
    """Compile as `maybe_compile` does, but without code for a device; the graphs so far are in the list."""
    def backend(graph, inputs):
        found.append(graph)
        return aot_eager(graph, inputs)

    found, aot_eager = [], torch._dynamo.lookup_backend("aot_eager")
    torch._dynamo.reset()
    yield lambda gpt: torch.compile(gpt, backend=backend, fullgraph=True, dynamic=False), found
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "documents"), [
    *itertools.product(tiny_presets(), ["none", "varlen"]), ("modern-nano", "mask")])
def test_every_preset_is_one_graph(name, documents, graphs, monkeypatch):
    monkeypatch.setattr(model.gpt, "supports_varlen", lambda *_: documents == "varlen")
    torch.manual_seed(0)
    gpt = GPT(tiny_presets()[name])
    compile_model, found = graphs
    compiled = compile_model(gpt)
    for more in (0, 3):
        idx, numbers, _ = packed_rows()
        idx[1, 3 : 3 + more] = 0
        numbers = None if documents == "none" else (idx == 0).cumsum(1)
        losses = [each(idx, idx.roll(-1, 1), document_ids=numbers) for each in (gpt, compiled)]
        losses[1].backward()
        torch.testing.assert_close(*losses)
    assert len(found) == 1


@pytest.mark.slow
def test_steps_and_evaluation_do_not_compile_again(graphs):
    """Neither another learning rate does, nor the last batch of an evaluation, which is smaller."""
    torch.manual_seed(0)
    gpt = GPT(next(iter(tiny_presets().values())))
    compile_model, found = graphs
    compiled = compile_model(gpt)
    validation = Validation([Tokens([np.arange(200, dtype=np.uint32) % 65])], 32, 4, max_tokens=190)
    idx, _, _ = packed_rows()
    optimizers, scaler = Optimizers(gpt.parameters_by_role(), OptimConfig("muon")), torch.amp.GradScaler("cpu", enabled=False)
    torch._dynamo.utils.counters.clear()
    for step in range(3):
        compiled(idx, idx.roll(-1, 1)).backward()
        optimizers.set_scale(1 / (step + 1))
        optimizers.step(scaler, optimizers.gradient_norm(scaler), 1.0)
        evaluate(BatchLoss(gpt, Device("cpu", "fp32")), validation, World({}))
    assert len(found) == torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_run_is_evaluated_by_the_uncompiled_model(monkeypatch):
    """Batches of evaluations have shapes of their own, and would be compiled for."""
    evaluated, run = [], MagicMock(loss_fn=BatchLoss("compiled", None))
    run.training.evaluates.return_value = False
    monkeypatch.setattr(trainer, "evaluate", lambda loss_fn, *_: evaluated.append(loss_fn.model))
    trainer.Trainer.evaluate(run, trainer.Decision())
    assert evaluated == [run.state.model]


@pytest.mark.slow
def test_the_loss_in_chunks_is_in_the_same_graph(graphs, monkeypatch):
    """As on GPUs, with a padded vocabulary and fusible operations."""
    monkeypatch.setattr(model.loss, "MIN_LOGITS", 40 * 65)
    gpt = GPT(next(iter(tiny_presets().values())))
    gpt.loss_options = LossOptions(40 * 65, 8, fused=True)
    compile_model, found = graphs
    compiled = compile_model(gpt)
    idx, _, _ = packed_rows()
    losses = [each(idx, idx.roll(-1, 1)) for each in (gpt, compiled)]
    losses[1].backward()
    torch.testing.assert_close(*losses)
    assert len(found) == 1 and any("logsumexp" in part.code for part in found[0].modules() if hasattr(part, "code"))
