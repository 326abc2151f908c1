"""The gradients of a step, without waiting for the device."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from test_documents import forward  # noqa: F401 (a kernel of documents for the CPU)
from torch.utils._python_dispatch import TorchDispatchMode

import model.gpt
from data.loader import Loader, Prefetch, Validation
from data.shards import Tokens
from model import GPT, GPTConfig
from training.buckets import GradientBuckets
from training.config import OptimConfig
from training.device import Device
from training.distributed import World
from training.interrupt import Interrupt
from training.optim import Optimizers
from training.step import accumulate_gradients, evaluate, most_documents

READS = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}


class CountReads(TorchDispatchMode):
    """Counts the operations that wait for a device."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in READS:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def tiny():
    config = GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=16)
    tokens = Tokens([np.arange(400, dtype=np.uint32) % 16])
    return GPT(config), Prefetch(Loader([tokens], 8, 2, micro_steps=3), torch.device("cpu"))


def all_gradients(model):
    """Those of one process, which owns all of them."""
    return GradientBuckets(World({}), list(model.parameters()), [[]])


@pytest.mark.parametrize(("optimizer", "boundary"), [("adamw", None), ("muon", 0)])
def test_a_step_reads_nothing_from_the_device(tiny, optimizer, boundary, monkeypatch):
    """The training loop itself reads loss and norm, once."""
    monkeypatch.setattr(model.gpt, "supports_varlen", lambda *_: True)
    gpt, batches = tiny
    config, device = OptimConfig(optimizer=optimizer), Device("cpu", "fp32")
    optimizers = Optimizers(gpt.parameters_by_role(), config)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with CountReads() as reads:
        loss = accumulate_gradients(gpt, all_gradients(gpt), batches, boundary, 0, scaler, device, 0, Interrupt())
        norm = optimizers.gradient_norm(scaler)
        optimizers.step(scaler, norm, 1.0)
    assert not reads.counts and loss.shape == (3,) and norm.ndim == 0


def test_the_bound_on_documents_rarely_changes():
    inputs = torch.ones(4, 256, dtype=torch.int64)
    for count, bound in ((0, 16), (12, 16), (13, 32), (60, 64)):
        inputs.flatten()[:count] = 0
        assert most_documents(inputs, 0) == bound


def test_the_loss_of_a_step_is_the_mean_of_its_micro_steps(tiny):
    model, batches = tiny
    scaler, device = torch.amp.GradScaler("cpu", enabled=False), Device("cpu", "fp32")
    loss = accumulate_gradients(model, all_gradients(model), batches, None, 5, scaler, device, 0, Interrupt())
    losses = [model(*batches.batch(5, micro_step)).item() for micro_step in range(3)]
    assert loss.sum().item() == pytest.approx(sum(losses) / 3)


def test_an_interrupt_between_micro_steps_gives_no_loss(tiny):
    model, batches = tiny
    interrupt = Interrupt()
    interrupt.exit_code = 130
    scaler, device = torch.amp.GradScaler("cpu", enabled=False), Device("cpu", "fp32")
    assert accumulate_gradients(model, all_gradients(model), batches, None, 0, scaler, device, 0, interrupt) is None


def test_evaluation_reads_the_device_once(tiny):
    """On a CPU, `tolist` is not an operation, so nothing is counted."""
    model, batches = tiny
    tokens = batches.loader.parts[0].tokens
    validation = Validation([tokens], 8, 2, max_tokens=40)
    with CountReads() as reads:
        loss = evaluate(model, validation, Device("cpu", "fp32"), None, World({}))
    losses = [model.eval()(*batch).item() * weight for *batch, weight in validation]
    assert not reads.counts
    assert loss == pytest.approx(sum(losses))


def test_a_step_in_fp16_reads_nothing_from_the_device(tiny):
    """The training loop reads the norm, and says whether it overflowed."""
    model, batches = tiny
    optimizers = Optimizers(model.parameters_by_role(), OptimConfig(optimizer="muon"))
    scaler, device = torch.amp.GradScaler("cpu"), Device("cpu", "fp16")
    before = model.wte.weight.clone()
    with CountReads() as reads:
        accumulate_gradients(model, all_gradients(model), batches, None, 0, scaler, device, 0, Interrupt())
        optimizers.step(scaler, optimizers.gradient_norm(scaler), 1.0, overflowed=False)
    assert not reads.counts and not torch.equal(model.wte.weight, before)
