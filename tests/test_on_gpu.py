"""What only a GPU can show: `pytest -m gpu` runs these tests, and the few in other files, in about two minutes."""

from __future__ import annotations

import os
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_compile import tiny_presets
from test_step import all_gradients, numbered_batches

import train
from checkpointing import store
from checkpointing.memory_plan import count_memory
from conf.sampling import SamplingConfig
from generation.decoder import CapturedCall, Decoder
from generation.sampling import Batch, Row
from model import GPT
from model.loss import loss_options, next_token_loss
from training.config import OptimConfig
from training.configure import configure
from training.device import Device
from training.interrupt import Interrupt
from training.optim import Optimizers
from training.step import BatchLoss, accumulate_gradients

# torch looks for it once: at the first product, which may be that of another test.
if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture
def gpu():
    """The GPU, configured; afterwards it may wait again."""
    device = Device("cuda")
    with configure(device):
        yield device
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["auto", "fp16"])
@pytest.mark.parametrize("name", ["modern-nano", "nano"])
def test_a_resumed_run_is_bit_identical(compose_tiny, name, precision):
    """Deterministic, with evaluations and samples, which decode with CUDA graphs, while the next batch is read."""
    words = [f"model={name}", "training.device=cuda", f"training.precision={precision}", "training.deterministic=true", "optim=muon",
             "model.dropout=0.1", "training.eval_every=2", "training.sample_tokens=40"]
    weights = []
    for run, lengths in (("whole", [6]), ("resumed", [3, 6])):
        for steps in lengths:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="The CUDA graph")
                settings = compose_tiny(*words, f"training.max_steps={steps}", f"name={run}", "optim.schedule=constant")
                assert train.train(settings) == 0
        last = store.list_checkpoints(Path(settings.runs_dir) / run / "checkpoints")[-1]
        weights.append(load_file(last.folder / "model.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("optimizer", "boundary"), [("adamw", None), ("muon", 0)])
@pytest.mark.parametrize("name", tiny_presets())
def test_a_step_does_not_wait_for_the_gpu(gpu, name, optimizer, boundary, precision):
    """Micro-steps, the norm and the update; the losses stay on the GPU."""
    device = Device("cuda", precision)
    model = GPT(tiny_presets()[name]).to(device.torch)
    optimizers = Optimizers(model.parameters_by_role(), OptimConfig(optimizer=optimizer))
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0, enabled=precision == "fp16")
    batches = numbered_batches(device.torch, block_size=32)
    for step in range(3):
        # The first step sets up libraries.
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        losses = accumulate_gradients(BatchLoss(model, device, boundary), batches, all_gradients(model), scaler, step, 0, Interrupt())
        optimizers.step(scaler, optimizers.gradient_norm(scaler), 1.0, overflowed=False)
    torch.cuda.set_sync_debug_mode("default")
    assert losses.is_cuda and losses.isfinite().all()


@pytest.mark.parametrize("name", tiny_presets())
def test_a_cuda_graph_decodes_as_without_it(gpu, name):
    """Past the positions of one graph, for rows that join and leave, while another thread pins memory."""
    torch.manual_seed(0)
    model = GPT(replace(tiny_presets()[name], block_size=512)).to(gpu.torch).eval()
    done, pinned = threading.Event(), []

    def pin():
        while not done.wait(0.001):
            # Memory that is freed would be given out again, without a call of CUDA.
            pinned.append(torch.empty(10_000).pin_memory())

    thread = threading.Thread(target=pin)
    thread.start()
    found = []
    try:
        with gpu.autocast(), warnings.catch_warnings():
            warnings.filterwarnings("error", message="The CUDA graph")
            for uses_graphs in (True, False):
                decoder = Decoder(model)
                decoder.uses_graphs = uses_graphs
                batch = Batch(model, decoder, 2, 300)
                batch.join(Row([1] * 250, SamplingConfig(temperature=0), 0))
                steps = [batch.step() for _ in range(4)]
                batch.join(Row([2, 3], SamplingConfig(temperature=0), 1))
                steps += [batch.step() for _ in range(10)]
                batch.leave(0)
                steps += [batch.step() for _ in range(4)]
                found.append([logits for _, logits in steps])
                assert decoder.uses_graphs == uses_graphs and (len(decoder.graphs) == 2) == uses_graphs
    finally:
        done.set()
        thread.join()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("fused", [True, False])
def test_the_loss_on_a_gpu_is_that_of_cross_entropy(gpu, fused):
    """It does not wait for the GPU, once it is compiled."""
    torch.manual_seed(0)
    features, weight = torch.randn(600, 64, device="cuda"), torch.randn(50257, 64, device="cuda") / 8
    targets = torch.randint(50257, (600,), device="cuda")
    targets[5:9] = -100
    results = []
    for chunked in (True, True, False):
        x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
        with gpu.autocast():
            options = replace(loss_options(gpu.torch, fused=fused), max_logits=2**23)
            loss = next_token_loss(x, w, targets, options) if chunked else F.cross_entropy(F.linear(x, w).float(), targets)
        loss.backward()
        results.append((loss.detach(), x.grad, w.grad))
        torch.cuda.set_sync_debug_mode("default" if results[1:] else "error")
    torch.testing.assert_close(results[1][0], results[2][0], rtol=1e-3, atol=1e-3)
    for one, other in zip(results[1][1:], results[2][1:], strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_a_step_takes_the_memory_that_is_planned(gpu, compose_tiny):
    """Which decides the batch that a plan, or the error of a full GPU, names."""
    settings = compose_tiny("model=gpt2", "model.n_layer=2", "training.batch_size=8", "optim=muon")
    settings = replace(settings, model=replace(settings.model, vocab_size=50257))
    _, planned = count_memory(settings, gpu)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = GPT(settings.model).to(gpu.torch)
    model.loss_options = loss_options(gpu.torch)
    optimizers, scaler = Optimizers(model.parameters_by_role(), settings.optim), torch.amp.GradScaler("cuda", enabled=False)
    ids = torch.zeros(8, settings.model.block_size, dtype=torch.int64)
    for _ in range(2):
        BatchLoss(model, gpu)((ids, ids)).backward()
    optimizers.step(scaler, optimizers.gradient_norm(scaler), 1.0)
    assert 0.8 < (torch.cuda.max_memory_allocated() - before) / planned < 1.25


def test_a_failed_capture_leaves_the_gpu_as_it_was(gpu):
    """Afterwards, dropout draws random numbers as before, and another capture succeeds."""
    device = torch.ones(1, device="cuda").device
    with pytest.raises(RuntimeError, match="captur"):
        CapturedCall(lambda: torch.ones(1, device=device).cpu(), device)
    torch.manual_seed(0)
    drawn = torch.rand(3, device=device)
    torch.cuda.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3, device=device))
    expected = drawn + 1  # also loads the kernel, which cannot be done in a capture
    assert torch.equal(CapturedCall(lambda: drawn + 1, device).replay(), expected)


def test_the_memory_of_this_gpu_is_in_a_plan(gpu, capsys):
    from scripts import plan

    assert plan.main(plan.PlanSettings(measure=False, train=("model=gpt2-xl", "training.batch_size=4096"))) == 0
    assert "this does not fit into the" in capsys.readouterr().out
