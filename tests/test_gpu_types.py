"""The number formats on a GPU, seen on any machine: tensors of the device "cuda" without content."""

from __future__ import annotations

import ctypes
import inspect
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_compile import tiny_presets
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from conf.schema import compose
from generation.caches import StaticCache
from generation.decoder import Decoder
from model import GPT, GPTConfig
from model.documents import takes_shared_heads
from model.loss import LossOptions
from model.skip_init import SkipInit
from training.config import OptimConfig
from training.device import Device
from training.optim import Optimizers, own_states
from training.step import BatchLoss

PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}


def let_cuda_be_named():
    """Without CUDA, torch refuses its name in some operations. The guard of another device takes its place."""
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
        return lambda: None
    kinds = torch._C._autograd.DeviceType
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / ("libc10.so" if Path("/proc").exists() else "libc10.dylib")))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[int(kinds.CUDA)] = guards[int(kinds.Meta)]
    return lambda: guards.__setitem__(int(kinds.CUDA), None)


def attention_of_a_gpu(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False):
    """Stands in for torch's choice of a kernel."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask.to(q.dtype), False, dropout_p, is_causal)[0]


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with bfloat16. Tensors have no content."""
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", "0")  # of the CPU
    monkeypatch.setattr(FakeTensorMode, "avoid_device_init", True)  # whatever is_available answers
    if not torch.cuda.is_available():
        if torch.backends.cuda.is_built():
            pytest.skip("torch is built for GPUs, and asks for the driver of one")
        # Before torch 2.13, fake tensors ask for one in any build.
        monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention_of_a_gpu)
    forget = let_cuda_be_named()
    with FakeTensorMode():
        device = Device("cuda")
        device.torch = torch.device("cuda:0")  # the other device's guard does not know a present one
        yield device
    forget()


class Types(TorchDispatchMode):
    """Collects the types of activations, which are known by their shapes."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.heads, self.hidden, self.stream = set(), set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            assert result.device.type == "cuda", function
            if result.size() and result.size(-1) == self.config.mlp_width:
                self.hidden.add(result.dtype)
            if function in PRODUCTS:
                assert result.dtype == torch.bfloat16
        return result

    def attention(self, q, k, v, *rest, **options):
        self.heads.update((q.dtype, k.dtype, v.dtype))
        return attention_of_a_gpu(q, k, v, *rest, **options)

    def watch(self, model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(F, "scaled_dot_product_attention", self.attention)
        for block in model.h:
            block.register_forward_hook(lambda _, inputs, output: self.stream.update((inputs[0].dtype, output.dtype)))


def model_on_gpu(preset: str) -> GPT:
    """One layer of a preset, with GPT-2's vocabulary."""
    config = replace(compose("config", [f"model={preset}"]).model, n_layer=1, vocab_size=50257)
    with SkipInit("cuda"), torch.device("cuda"):
        model = GPT(config)
    model.loss_options = LossOptions(2**29, 64)
    return model


@torch.no_grad()
def gradients_of(loss: Tensor) -> dict[Tensor, Tensor]:
    """By plain Python: the engine of autograd asks for the streams of a device."""
    nodes, parents = [loss.grad_fn], Counter()
    for node in nodes:
        for child, _ in node.next_functions:
            if child is not None:
                parents[child] += 1
                nodes += [child] * (parents[child] == 1)
    found, given, ready = {}, {loss.grad_fn: {0: torch.ones_like(loss)}}, [loss.grad_fn]
    while ready:
        node = ready.pop()
        gradients = given.pop(node, {})
        if hasattr(node, "variable"):
            found[node.variable] = gradients[0]
            continue
        call = node if callable(node) else node.apply  # of a function in Python
        results = call(*(gradients.get(place) for place in range(max(gradients) + 1)))
        results = results if isinstance(results, tuple) else (results,)
        for (child, place), gradient in zip(node.next_functions, results, strict=False):
            if child is None:
                continue
            if gradient is not None:
                own = given.setdefault(child, {})
                gradient = gradient.to(child._input_metadata[place].dtype)
                own[place] = own[place] + gradient if place in own else gradient
            parents[child] -= 1
            if not parents[child]:
                ready.append(child)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("preset", tiny_presets())  # others differ by their sizes only
def test_a_gpu_multiplies_and_attends_in_bf16(gpu, preset, monkeypatch):
    """Forward, backward, in evaluation and in decoding; the residual stream, the loss and the weights are in fp32."""
    model = model_on_gpu(preset)
    ids = torch.zeros(16, model.config.block_size, dtype=torch.int64, device="cuda")
    with Types(model.config) as types:
        types.watch(model, monkeypatch)
        loss = BatchLoss(model, gpu)((ids, ids))
        assert types.heads == types.hidden == {torch.bfloat16}
        assert types.stream == {torch.float32} and loss.dtype == torch.float32
        with torch.inference_mode():
            assert BatchLoss(model.eval(), gpu)((ids, ids)).dtype == torch.float32
        assert types.heads == types.hidden == {torch.bfloat16} and types.stream == {torch.float32}

    with Types(model.config):  # checks products
        gradients = gradients_of(loss)
    assert gradients.keys() == set(model.parameters()) and {gradient.dtype for gradient in gradients.values()} == {torch.float32}

    with gpu.autocast():
        decoder = Decoder(model)
    assert decoder.cache_type is StaticCache and decoder.dtype == torch.bfloat16
    # In inference mode, tensors with content would be sent to the device that there is not.
    next_logits = inspect.unwrap(Decoder.next_logits)
    sequences = [[1, 2, 3], [4, 5]]
    with gpu.autocast(), torch.no_grad(), Types(model.config) as types:
        types.watch(decoder.step_model, monkeypatch)
        decoder.begin(2, 7)
        decoder.join()
        decoder.join()
        logits = next_logits(decoder, sequences)
    assert types.heads == {torch.bfloat16} and types.stream == {torch.float32}
    assert logits.shape == (2, 50257) and logits.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_presets())
def test_documents_in_bf16_on_a_gpu_are_one_graph(name, gpu, monkeypatch):
    from torch.nn.attention.varlen import varlen_attn  # imports the compiler

    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: None)
    with torch.device("cuda"), SkipInit("cuda"):
        gpt = GPT(tiny_presets()[name])
        ids = torch.zeros(3, 32, dtype=torch.int64)
    found = []
    torch._dynamo.reset()
    with gpu.autocast():
        compiled = torch.compile(gpt, backend=lambda graph, _: found.append(graph.code) or graph, fullgraph=True, dynamic=False)
        compiled(ids, ids, document_ids=ids, max_documents=8)
    assert len(found) == 1 and "varlen_attn" in found[0]
    assert "repeat_interleave" not in found[0] or not takes_shared_heads(varlen_attn)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_on_a_gpu_keeps_weights_in_fp32(gpu, optimizer):
    model = model_on_gpu("modern-nano")
    optimizers = Optimizers(model.parameters_by_role(), OptimConfig(optimizer=optimizer))
    for weights in model.parameters():
        weights.grad = torch.empty_like(weights)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    with Types(model.config):
        optimizers.step(scaler, optimizers.gradient_norm(scaler), 1.0)
    states = [state for _, state in own_states(optimizers).values()]
    assert {(tensor.dtype, tensor.device.type) for tensor in (*model.parameters(), *states)} == {(torch.float32, "cuda")}
