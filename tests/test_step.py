"""The gradients of a step, without waiting for the device."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import test_documents  # with a kernel of documents for the CPU
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import model.gpt
import model.loss
import train
from data.loader import Loader, Prefetch, Validation
from data.shards import Tokens
from model import GPT, GPTConfig
from model.loss import MASKED, LossOptions, next_token_loss
from trainer import Trainer
from training.buckets import GradientBuckets
from training.config import OptimConfig
from training.device import Device
from training.distributed import World
from training.interrupt import Interrupt
from training.optim import Optimizers
from training.step import (
    BatchLoss,
    accumulate_gradients,
    document_options,
    evaluate,
    most_documents,
)

OPERATIONS = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
METHODS = {"item", "tolist", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__contains__"}


class CountMethods(TorchFunctionMode):
    """Counts the methods of tensors that wait for a device. On a CPU, not all of them are operations.

    `numpy` is not among them: it refuses tensors of other devices. Of `to`, our copies to a device are counted.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        # What takes the place of the kernel of documents reads its arguments.
        caller, name, kwargs = sys._getframe(1).f_code.co_filename, getattr(function, "__name__", ""), kwargs or {}
        if name in METHODS and caller != test_documents.__file__:
            self.counts[name] += 1
        has_device = any(isinstance(argument, torch.device) for argument in args)
        if name == "to" and has_device and not kwargs.get("non_blocking") and not caller.startswith(torch.__path__[0]):
            self.counts[name] += 1
        return function(*args, **kwargs)


class CountReads(TorchDispatchMode):
    """Counts the methods and the operations that wait for a device."""

    def __init__(self):
        super().__init__()
        self.methods = CountMethods()
        self.counts = self.methods.counts

    def __enter__(self):
        self.methods.__enter__()
        return super().__enter__()

    def __exit__(self, *failure):
        super().__exit__(*failure)
        self.methods.__exit__(*failure)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        # The places of a mask are counted first.
        is_by_mask = name in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in OPERATIONS or is_by_mask:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def numbered_batches(device, block_size=8):
    """Three micro-steps of a step, in which every 16th token is 0."""
    tokens = Tokens([np.arange(50 * block_size, dtype=np.uint32) % 16])
    return Prefetch(Loader([tokens], block_size, 2, micro_steps=3), device)


@pytest.fixture
def tiny():
    config = GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=16)
    return GPT(config), numbered_batches(torch.device("cpu"))


def all_gradients(model):
    """Those of one process, which owns all of them."""
    return GradientBuckets(World({}), list(model.parameters()), [[]])


@pytest.mark.parametrize(("optimizer", "boundary"), [("adamw", None), ("muon", 0)])
def test_a_step_reads_nothing_from_the_device(tiny, optimizer, boundary, monkeypatch):
    """The training loop itself reads loss and norm, once."""
    monkeypatch.setattr(model.gpt, "supports_varlen", lambda *_: True)
    gpt, batches = tiny
    if boundary is not None:
        gpt = GPT(replace(gpt.config, position="rotary"))  # whose angles are looked up by documents
    config, device = OptimConfig(optimizer=optimizer), Device("cpu", "fp32")
    optimizers = Optimizers(gpt.parameters_by_role(), config)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with CountReads() as reads:
        loss = accumulate_gradients(BatchLoss(gpt, device, boundary), batches, all_gradients(gpt), scaler, 0, 0, Interrupt())
        norm = optimizers.gradient_norm(scaler)
        optimizers.step(scaler, norm, 1.0)
    assert not reads.counts and loss.shape == (3,) and norm.ndim == 0


@pytest.mark.parametrize("fused", [True, False])
def test_the_loss_in_chunks_reads_nothing_from_the_device(fused, monkeypatch):
    """As on GPUs, with masked targets. It is compiled where that is asked for."""
    compiled = []
    monkeypatch.setattr(model.loss, "MIN_LOGITS", 0)
    monkeypatch.setattr(model.loss, "compiled_loss_and_gradient", lambda: compiled.append(True) or model.loss.fusible_loss_and_gradient)
    features, weight = torch.randn(64, 16, requires_grad=True), torch.randn(37, 16, requires_grad=True)
    targets = torch.arange(64).remainder(37).masked_fill(torch.arange(64) % 5 == 0, MASKED)
    with CountReads() as reads:
        next_token_loss(features, weight, targets, LossOptions(16 * 37, 8, fused)).backward()
    assert not reads.counts and compiled == [True] * fused and weight.grad.isfinite().all()


def test_the_bound_on_documents_rarely_changes():
    inputs = torch.ones(4, 256, dtype=torch.int64)
    for count, bound in ((0, 16), (12, 16), (13, 32), (60, 64)):
        inputs.flatten()[:count] = 0
        assert most_documents(inputs, 0) == document_options(inputs, 0, inputs.device)["max_documents"] == bound


def test_the_loss_of_a_step_is_the_mean_of_its_micro_steps(tiny):
    model, batches = tiny
    scaler, device = torch.amp.GradScaler("cpu", enabled=False), Device("cpu", "fp32")
    loss = accumulate_gradients(BatchLoss(model, device), batches, all_gradients(model), scaler, 5, 0, Interrupt())
    losses = [model(*batches.batch(5, micro_step)).item() for micro_step in range(3)]
    assert loss.sum().item() == pytest.approx(sum(losses) / 3)


def test_an_interrupt_between_micro_steps_gives_no_loss(tiny):
    model, batches = tiny
    interrupt = Interrupt()
    interrupt.exit_code = 130
    scaler, device = torch.amp.GradScaler("cpu", enabled=False), Device("cpu", "fp32")
    assert accumulate_gradients(BatchLoss(model, device), batches, all_gradients(model), scaler, 0, 0, interrupt) is None


def test_evaluation_reads_the_device_once(tiny):
    model, batches = tiny
    tokens = batches.loader.parts[0].tokens
    validation = Validation([tokens], 8, 2, max_tokens=40)
    with CountReads() as reads:
        loss = evaluate(BatchLoss(model, Device("cpu", "fp32")), validation, World({}))
    losses = [model.eval()(*batch).item() * weight for *batch, weight in validation]
    assert reads.counts == {"tolist": 1}
    assert loss == pytest.approx(sum(losses))


def test_a_step_in_fp16_reads_nothing_from_the_device(tiny):
    """The training loop reads the norm, and says whether it overflowed."""
    model, batches = tiny
    optimizers = Optimizers(model.parameters_by_role(), OptimConfig(optimizer="muon"))
    scaler, device = torch.amp.GradScaler("cpu"), Device("cpu", "fp16")
    before = model.wte.weight.clone()
    with CountReads() as reads:
        accumulate_gradients(BatchLoss(model, device), batches, all_gradients(model), scaler, 0, 0, Interrupt())
        optimizers.step(scaler, optimizers.gradient_norm(scaler), 1.0, overflowed=False)
    assert not reads.counts and not torch.equal(model.wte.weight, before)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_of_two_processes_reads_nothing(tiny, optimizer):
    """In fp16, where a process also learns of another one's overflow. The other process is not there."""
    model, batches = tiny
    world = World({"TORCHELASTIC_RUN_ID": "", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"})
    optimizers = Optimizers(model.parameters_by_role(), OptimConfig(optimizer=optimizer), world)
    scaler, device = torch.amp.GradScaler("cpu"), Device("cpu", "fp16")
    buckets = GradientBuckets(world, list(model.parameters()), optimizers.parts)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with CountReads() as reads:
            accumulate_gradients(BatchLoss(model, device), batches, buckets, scaler, 0, 0, Interrupt())
            optimizers.step(scaler, optimizers.gradient_norm(scaler), 1.0, overflowed=False)
    finally:
        dist.destroy_process_group()
    assert not reads.counts


@pytest.fixture
def reads_of_a_run(compose_tiny, monkeypatch):
    """Train; return what each step, each answer to a NaN and each evaluation read from the device, by method of `Trainer`."""
    def count_in(name):
        def counted(*arguments):
            with CountReads() as reads:
                result = original(*arguments)
            found.append((name, dict(reads.counts)))
            return result

        original = getattr(Trainer, name)
        monkeypatch.setattr(Trainer, name, counted)

    def train_and_count(*words):
        assert train.train(compose_tiny(*words)) == 0
        return found

    found = []
    for name in ("take_step", "handle_nonfinite", "evaluate"):
        count_in(name)
    return train_and_count


@pytest.mark.parametrize("words", [
    ["optim=adamw", "training.tokens_per_step=1024", "training.on_nonfinite=skip", "model.dropout=0.1"],
    ["optim=muon", "model=modern-nano", "training.recompute=true", "training.precision=fp16", "optim.grad_clip=0"]], ids=str)
def test_a_step_of_a_run_reads_the_device_once(reads_of_a_run, words):
    found = reads_of_a_run("training.max_steps=2", "training.eval_every=1", *words)
    assert found == [("take_step", {"tolist": 1}), ("evaluate", {"tolist": 1})] * 2


def test_in_fp16_a_gradient_that_overflows_is_no_failure(compose_tiny, monkeypatch):
    """The loss scaler passes over it."""
    measure = Optimizers.gradient_norm
    monkeypatch.setattr(Optimizers, "gradient_norm", lambda self, scaler: measure(self, scaler) * math.inf)
    monkeypatch.setattr(Trainer, "handle_nonfinite", lambda *_: pytest.fail("was handled as one"))
    assert train.train(compose_tiny("training.max_steps=2", "training.precision=fp16")) == 0


def test_masked_targets_are_not_counted_on_the_device(reads_of_a_run, tmp_path):
    lines = [json.dumps({"prompt": f"{number}?", "completion": f"{number}."}) + "\n" for number in range(200)]
    (tmp_path / "chats.jsonl").write_text("".join(lines))
    found = reads_of_a_run("data=chat", f"data.path={tmp_path / 'chats.jsonl'}", "data.tokenizer=byte", "training.max_steps=2",
                           "training.tokens_per_step=1024", "training.precision=fp16")
    assert found == [("take_step", {"tolist": 1})] * 2 + [("evaluate", {"tolist": 1})]


@pytest.mark.parametrize(("action", "precision", "steps_again"), [("skip", "fp32", 0), ("rollback", "fp16", 2)])
def test_a_nan_takes_one_more_read(reads_of_a_run, monkeypatch, action, precision, steps_again):
    """The norms of the gradients by block, for the report. A rollback reads a checkpoint, too, which is on the CPU."""
    def planted(gpt, idx, targets=None, *arguments):
        loss = forward(gpt, idx, targets, *arguments)
        if gpt.training and targets is not None:
            calls.append(loss)
        # The first of two micro-steps of the second step.
        return loss * math.nan if len(calls) == 3 else loss

    calls, forward = [], GPT.forward
    monkeypatch.setattr(GPT, "forward", planted)
    found = reads_of_a_run("training.max_steps=2", "training.tokens_per_step=256", "training.batch_size=4", "training.eval_every=0",
                           f"training.on_nonfinite={action}", f"training.precision={precision}", "optim.grad_clip=1")
    name, reads = found.pop(2)
    assert name == "handle_nonfinite" and (reads == {"tolist": 1} or action == "rollback")
    assert found == [("take_step", {"tolist": 1})] * (2 + steps_again) + [("evaluate", {"tolist": 1})]
