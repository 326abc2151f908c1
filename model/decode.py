"""What makes decoding fast: a copy of the model whose weights are laid out to be read once a token, and its cache.

With one new position a row a step does few operations for each weight: it is as fast as memory is read. How fast a product
reads its weights depends on their layout; docs/benchmarks.md has what was measured. The copy runs the model's own code.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import KVCache
from model.config import GPTConfig
from model.gpt import GPT
from model.ngram import NOTHING

KNOWN = {"block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "dropout", "bias", "position", "norm",
         "qk_norm", "activation", "zero_init", "tie_head", "embedding_norm", "ngrams", "ngram_rows"}
FP16_MOST = 65504.0


def can_decode_fast(model: GPT) -> bool:
    """Whether `decoding_copy` has the kernels it needs and knows all flags of the model; else the model itself decodes."""
    weight = model.wte.weight
    kernels = (torch.backends.mkldnn.is_available() and torch.backends.quantized.engine in ("x86", "fbgemm")
               and hasattr(torch.ops.quantized, "linear_prepack_fp16") and hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and kernels and all(
        getattr(model.config, field.name) == field.default for field in fields(model.config) if field.name not in KNOWN)


class RaggedCache(KVCache):
    """A cache whose rows hold texts of different lengths; one step adds a position to each.

    It lends `GPT.features` the hook that `Documents` have: `positions`, and `attend` for the new queries.
    """

    def __init__(self, config: GPTConfig, batch_size: int, positions: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, batch_size, device, dtype, positions)
        self.lengths = [0] * batch_size
        self.rows = torch.arange(batch_size, device=device)
        self.within = self

    def repeat(self, source: int, target: int) -> None:
        """Let row `target` hold what row `source` holds."""
        self.lengths[target] = self.lengths[source]
        for each in (*self.keys, *self.values):
            each[target] = each[source]  # the whole row: one piece of memory, whichever way it is turned

    def begin_step(self) -> None:
        """Say where the next position of each row is, and what it sees."""
        self.length, device = max(self.lengths), self.rows.device
        self.positions = torch.tensor(self.lengths, device=device)[:, None]  # [B, 1]
        self.mask = None
        if min(self.lengths) < self.length:
            hidden = torch.arange(self.length + 1, device=device) > self.positions  # [B, S]
            self.mask = torch.zeros(hidden.shape, device=device).masked_fill(hidden, -torch.inf)[:, None, None]
        self.lengths = [length + 1 for length in self.lengths]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.extend`, for one new position at each row's own place."""
        if self.mask is None:
            return super().extend(layer, k, v)
        end = self.length + 1
        for held, new in ((self.keys[layer], k), (self.values[layer], v)):
            held[self.rows, :, self.positions[:, 0]] = new[:, :, 0].to(held.dtype)
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """What the heads take `[B, H, 1, D]`. The heads that share keys are asked as rows of one product."""
        mask = None if self.mask is None else self.mask.to(k.dtype)
        grouped = q.to(k.dtype).reshape(q.size(0), k.size(1), -1, q.size(3))  # [B, G, H / G, D]
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)


class Enough(Exception):
    """The last layer's keys and values are there: what it makes of them is nobody's input."""


class FirstReading:
    """What `GPT.features` fills when it reads the beginning of a row's text, until it is `Enough`."""

    within, before, length = None, None, 0

    def __init__(self, cache: KVCache, row: int) -> None:
        self.cache, self.row = cache, row

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.cache.keys[layer][self.row, :, : k.size(2)] = k[0]
        self.cache.values[layer][self.row, :, : v.size(2)] = v[0]
        if layer == len(self.cache.keys) - 1:
            raise Enough
        return k, v  # as they were before rounding


class TableCache(RaggedCache):
    """The same for CPUs, where no attention kernel reads many keys for one query at the memory's speed.

    But `embedding_bag` does: it sums rows of a table, each times a number. A head's scores are the D rows of its turned keys
    `[D, positions]`, each times a number of the query; what it takes is the S rows of its values, each times its weight.
    """

    def __init__(self, config: GPTConfig, batch_size: int, positions: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, batch_size, positions, device, dtype)
        turned = [keys.view(batch_size, config.kv_heads, -1, positions) for keys in self.keys]  # [B, G, D, positions]
        self.keys = [keys.transpose(2, 3) for keys in turned]
        self.tables = [(keys.flatten(0, 2), values.flatten(0, 2)) for keys, values in zip(turned, self.values, strict=True)]
        groups = torch.arange(batch_size * config.n_head)[:, None] // (config.n_head // config.kv_heads)  # [B * H, 1]
        self.key_rows = groups * config.head_width + torch.arange(config.head_width)  # [B * H, D]
        self.value_rows = groups * positions + torch.arange(positions)  # [B * H, positions]

    def begin_step(self) -> None:
        super().begin_step()
        self.seen = self.value_rows[:, : self.length + 1].contiguous()

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[B * G * D, positions]` and values `[B * G * positions, D]`, with the new ones in them."""
        super().extend(layer, k, v)
        return self.tables[layer]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """What the heads take `[B, H, 1, D]`."""
        B, H, _, D = q.shape
        numbers = (q / math.sqrt(D)).to(k.dtype).reshape(B * H, D)
        scores = F.embedding_bag(self.key_rows, k, per_sample_weights=numbers, mode="sum").view(B, H, 1, -1)
        scores = scores[..., : self.length + 1]
        weights = (scores if self.mask is None else scores + self.mask).softmax(-1, dtype=torch.float32).to(v.dtype)
        return F.embedding_bag(self.seen, v, per_sample_weights=weights.view(B * H, -1), mode="sum").float().view(q.shape)


class Packed(nn.Module):
    """`nn.Linear` without gradients, its weights laid out for `rows` rows of input, which is fp32 and stays it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, precision: str) -> None:
        super().__init__()
        self.product = product(weight.detach(), None if bias is None else bias.detach(), rows, precision)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


def product(weight: Tensor, bias: Tensor | None, rows: int, precision: str) -> Callable[[Tensor], Tensor]:
    """The fastest way that was found on CPUs to multiply a few rows `[..., in]` by `weight` `[out, in]`."""
    if precision == "int8" and rows < 100:
        scales = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        integers, zeros = (weight / scales).round().to(torch.int8), torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings(action="ignore"):  # that some day there will be another way
            quantized = torch._make_per_channel_quantized_tensor(integers, scales[:, 0], zeros, 0)
        packed = torch.ops.quantized.linear_prepack(quantized, bias)
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed, True)
    if precision == "bf16" and rows <= 10 and weight.abs().max() <= FP16_MOST:
        # As small as bf16, with more digits, and read faster.
        packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)
    pieces = next((n for n in range(8, 65) if weight.size(0) % n == 0), 0)
    if precision == "fp32" and rows <= 4 and pieces:
        parts = weight.view(pieces, -1, weight.size(1))

        def by_pieces(x: Tensor) -> Tensor:
            y = torch.bmm(parts, x.flatten(0, -2).t().expand(pieces, -1, -1))  # [pieces, out / pieces, rows]
            y = y.flatten(0, 1).t().view(*x.shape[:-1], -1)
            return y if bias is None else y + bias
        return by_pieces
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), min(rows, 2**16))  # it cannot count to 2**31
    bias = bias if bias is None else bias.to(dtype)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, "none", [], "").float()


@torch.no_grad()
def decoding_copy(model: GPT, rows: int, precision: str) -> GPT:
    """A model like `model` that shares its tensors, but whose products have weights laid out for `rows` rows."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared).eval()
    twin.head = product(twin.head_weight, None, rows, precision)
    if not model.config.tie_head:
        del twin.lm_head
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Packed(child.weight, child.bias, rows, precision))
    return twin


class Decoder:
    """Reads texts that grow by a token a step, and says what comes next. Holds what can be prepared before the texts come.

    `precision` is "fp32", "bf16" (weights and cache of 16 bits) or "int8" (weights of 8); if not said, what autocast has.
    Raises ValueError for int8 where `can_decode_fast` says no.
    """

    def __init__(self, model: GPT, rows: int, precision: str = "") -> None:
        self.model, self.config, self.device = model, model.config, model.wte.weight.device
        self.fast = can_decode_fast(model)
        if precision == "int8" and not self.fast:
            raise ValueError("int8=true is for CPUs of the x86 kind, and not for every flag of a model: leave it out.")
        precision = precision or ("fp32" if cache_dtype(model) == torch.float32 else "bf16")
        self.dtype = (torch.float32 if precision == "fp32" else torch.float16) if self.fast else cache_dtype(model)
        self.reader = decoding_copy(model, rows, precision) if self.fast else model
        self.prefiller = decoding_copy(model, 512, precision) if self.fast and precision != "fp32" else model

    def begin(self, texts: list[list[int]], max_new_tokens: int) -> None:
        """Make the cache for `texts` that grow by so many tokens at most."""
        lengths, rows = [len(text) for text in texts], len(texts)
        positions = max(lengths) + max_new_tokens
        kind = TableCache if self.fast else RaggedCache
        self.cache = kind(self.config, rows, min(positions, self.config.block_size), self.device, self.dtype)
        if min(lengths) < max(lengths):
            for each in (*self.cache.keys, *self.cache.values):
                each.zero_()  # what a mask hides is still multiplied, by 0
        self.starts = [-1] * rows

    def next_logits(self, texts: list[list[int]]) -> Tensor:
        """Logits `[B, V]` behind `texts`, each of which has one token more than the last time."""
        read: dict[tuple[int, ...], int] = {}
        for row, text in enumerate(texts):
            start = window_start(len(text), self.config.block_size)
            if start != self.starts[row]:  # the first step, or the window moved: read all but the last token
                self.starts[row] = start
                earlier = tuple(text[start:-1])
                if earlier in read:
                    self.cache.repeat(read[earlier], row)
                else:
                    self.prefill(row, earlier)
                    read[earlier] = row
        self.cache.begin_step()
        if reach := self.config.ngrams - 1:
            ends = [text[max(start, len(text) - 1 - reach) : -1] for text, start in zip(texts, self.starts, strict=True)]
            self.cache.before = torch.tensor([[NOTHING] * (reach - len(end)) + end for end in ends], device=self.device)
        last = torch.tensor([[text[-1]] for text in texts], device=self.device)
        with torch.autocast(self.device.type, enabled=False) if self.fast else nullcontext():
            return self.reader.head(self.reader.features(last, self.cache)[:, -1])

    def prefill(self, row: int, ids: tuple[int, ...]) -> None:
        self.cache.lengths[row] = len(ids)
        if ids:
            with torch.autocast(self.device.type, enabled=False) if self.fast else nullcontext(), suppress(Enough):
                self.prefiller.features(torch.tensor([ids], device=self.device), FirstReading(self.cache, row))


def window_start(length: int, block_size: int) -> int:
    """Where the context of a text of `length` tokens starts.

    At 0 while everything fits. Past `block_size` the window moves on in steps of half a block, so that a
    cache is filled anew only once in half a block, and the same tokens see the same context without one.
    """
    half = max(block_size // 2, 1)
    return max(0, -((block_size - length) // half) * half)


def cache_dtype(model: GPT) -> torch.dtype:
    """What attention computes in: autocast's type where it is on, else the weights'."""
    kind = model.wte.weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.wte.weight.dtype
