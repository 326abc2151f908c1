"""Reading texts that grow by a token a step: with a cache, a copy of the weights, and on GPUs a recording of the step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial

import torch
from torch import Tensor

from generation import kernels
from generation.caches import PackedCache, RaggedCache, SteadyCache
from generation.packed import can_pack, cast, pack
from hardware import native
from model.gpt import GPT
from model.ngram import NOTHING


class Enough(Exception):
    """The last layer's keys and values are there: what it makes of them is nobody's input."""


class FirstReading:
    """What `GPT.features` fills when it reads the beginning of a row's text, until it is `Enough`."""

    within, before, length = None, None, 0

    def __init__(self, cache: RaggedCache, row: int) -> None:
        self.cache, self.row = cache, row

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.cache.fill(layer, self.row, k[0], v[0])
        if layer == len(self.cache.keys) - 1:
            raise Enough
        return k, v  # as they were before rounding


class Recording:
    """What a GPU was asked to do in a `call`, to be done again at once: launching a step's small kernels takes longer."""

    def __init__(self, call: Callable[[], Tensor], device: torch.device) -> None:
        self.graph = torch.cuda.CUDAGraph()
        ours = torch.cuda.current_stream(device)
        with torch.cuda.device(device), torch.cuda.stream(ours), torch.cuda.graph(self.graph):  # back to ours if it fails
            self.result = call()

    def play(self) -> Tensor:
        """The result, in new memory, of the same on what the same tensors hold now."""
        self.graph.replay()
        return self.result.clone()


class Decoder:
    """Reads texts that grow by a token a step, and says what comes next. Holds what can be prepared before the texts come.

    `precision` is "fp32", "bf16" (weights and cache of 16 bits) or "int8" (weights of 8); by default
    that of autocast. A CPU without bf16 instructions computes in fp32, also with such weights.
    Raises ValueError for int8 where it is not supported.
    """

    def __init__(self, model: GPT, precision: str = "") -> None:
        self.model, self.config, self.device = model, model.config, model.wte.weight.device
        self.kind = kind_of_cache(model)
        missing = kernels.library() if self.kind is RaggedCache and can_pack(model) and model.wte.weight.is_cpu else None
        self.advice = f"Decoding takes two to four times as long without its kernels. {missing}" if missing else ""
        if precision == "int8" and self.kind is not PackedCache:
            reason = missing or "it is for CPUs and for fp32 weights."
            raise ValueError(f"int8=true is not supported: {reason}")
        asked = autocast_dtype(model)
        self.dtype, self.records = native_dtype(model), self.kind is SteadyCache
        self.has_kernels = self.kind is PackedCache
        self.keeps_autocast = not self.has_kernels and self.dtype == asked
        self.can_drop, self.cache = self.kind.can_drop, None
        self.reader = self.prefiller = model
        if self.has_kernels:
            precision = precision or ("fp32" if asked == torch.float32 else "bf16")
            self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
            self.reader = pack(model, partial(kernels.product, precision=precision))
            if precision != "fp32" and native("bf16"):
                self.prefiller = pack(model, partial(cast, dtype=torch.bfloat16))
        elif can_pack(model):
            self.reader = pack(model, partial(cast, dtype=self.dtype))

    def nbytes(self, rows: int, positions: int) -> int:
        """What so many rows of so many positions take: their cache, logits, and what is drawn from them."""
        one = self.kind(self.config, 1, min(positions, self.config.block_size), self.device, self.dtype)
        return rows * (sum(each.nbytes for each in (*one.keys, *one.values)) + 3 * 4 * self.config.vocab_size)

    def begin(self, texts: list[list[int]], max_new_tokens: int) -> None:
        """Have a cache for `texts` that grow by so many tokens at most."""
        lengths, rows = [len(text) for text in texts], len(texts)
        positions = min(max(lengths) + max_new_tokens, self.config.block_size)
        if not (self.cache and self.cache.fits(rows, positions)):  # else recordings stay of use
            self.make_cache(rows, positions)
        self.cache.lengths, self.starts = [0] * rows, [-1] * rows
        if min(lengths) < max(lengths):
            self.cache.clear()

    def make_cache(self, rows: int, positions: int) -> None:
        """Make a cache, and what else a step reads."""
        self.cache = self.recordings = None  # their memory is there for the new ones
        self.cache = self.kind(self.config, rows, positions, self.device, self.dtype)
        self.last = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
        self.before = torch.zeros(rows, self.config.ngrams - 1, dtype=torch.long, device=self.device)
        self.recordings: dict[int, Recording] = {}
        self.warm: set[int] = set()

    @torch.inference_mode()
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
            self.before.copy_(torch.tensor([[NOTHING] * (reach - len(end)) + end for end in ends]))
        self.last.copy_(torch.tensor([[text[-1]] for text in texts]))
        return self.recorded_step() if self.records else self.step()

    def drop(self, row: int) -> None:
        """Continue a text no more. The last takes its place, in the cache and in what `next_logits` is given from now on."""
        self.cache.drop(row)
        self.starts[row] = self.starts[-1]
        self.starts.pop()
        self.last, self.before = self.last[:-1], self.before[:-1]

    def step(self) -> Tensor:
        """Logits `[B, V]` behind `last`, by what the cache holds, which then holds `last` too."""
        self.cache.before = self.before if self.config.ngrams > 1 else None
        with self.own_precision(self.reader):
            return self.reader.head(self.reader.features(self.last, self.cache)[:, -1])

    def recorded_step(self) -> Tensor:
        """The same, from the second step with an `end` on by playing a recording of it."""
        end = self.cache.end
        if end not in self.warm:
            self.warm.add(end)
            return self.step()  # in which libraries set themselves up, as they may not in a recording
        try:
            if end not in self.recordings:
                self.recordings[end] = Recording(self.step, self.device)
        except RuntimeError as error:
            warnings.warn(f"This GPU could not record a step, and takes longer without: {error}", stacklevel=1)
            self.records = False
            self.cache.length = max(self.cache.lengths) - 1  # it may have come so far as to move on
            return self.step()
        return self.recordings[end].play()

    def prefill(self, row: int, ids: tuple[int, ...]) -> None:
        self.cache.lengths[row] = len(ids)
        if ids:
            with self.own_precision(self.prefiller), suppress(Enough):
                self.prefiller.features(torch.tensor([ids], device=self.device), FirstReading(self.cache, row))

    def own_precision(self, model: GPT) -> AbstractContextManager[None]:
        """The precision of a copy is in its products; the model itself may have that of autocast."""
        keeps = model is self.model and self.keeps_autocast
        return nullcontext() if keeps else without_autocast(model)


def kind_of_cache(model: GPT) -> type[RaggedCache]:
    """What suits the device, and the flags of the model."""
    if model.wte.weight.is_cuda and can_pack(model):
        return SteadyCache
    return PackedCache if model.wte.weight.is_cpu and can_pack(model) and kernels.available() else RaggedCache


def window_start(length: int, block_size: int) -> int:
    """Where the context of a text of `length` tokens starts.

    At 0 while everything fits. Past `block_size` the window moves on in steps of half a block, so that a
    cache is filled anew only once in half a block, and the same tokens see the same context without one.
    """
    half = max(block_size // 2, 1)
    return max(0, -((block_size - length) // half) * half)


def autocast_dtype(model: GPT) -> torch.dtype:
    """The type of autocast where it is on, else that of the weights."""
    kind = model.wte.weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.wte.weight.dtype


def native_dtype(model: GPT) -> torch.dtype:
    """The type of autocast where it is on, but that of the weights where a CPU would emulate it."""
    dtype, own = autocast_dtype(model), model.wte.weight
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
    return own.dtype if own.is_cpu and not native(precision) else dtype


def native_autocast(model: GPT) -> AbstractContextManager[None]:
    """Autocast as it is, or switched off where a CPU would emulate its type."""
    return nullcontext() if native_dtype(model) == autocast_dtype(model) else without_autocast(model)


def without_autocast(model: GPT) -> AbstractContextManager[None]:
    return torch.autocast(model.wte.weight.device.type, enabled=False)
