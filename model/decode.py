"""What makes decoding fast: a cache in which each row has its own length, and who reads texts with it, a token at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import KVCache
from model.config import GPTConfig
from model.gpt import GPT
from model.ngram import NOTHING
from model.packed import can_copy, cast, decoding_copy, has_kernels, packed

STEADY = 256  # so many positions on end a `SteadyCache` does the same with
BLOCK = 128  # positions at most in a block of keys of a `TableCache`


class RaggedCache(KVCache):
    """A cache whose rows hold texts of different lengths; one step adds a position to each.

    It lends `GPT.features` the hook that `Documents` have: `positions`, and `attend` for the new queries.
    """

    can_drop = True

    def __init__(self, config: GPTConfig, batch_size: int, positions: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, batch_size, device, dtype, positions)
        self.dtype, self.lengths = dtype, [0] * batch_size
        self.rows = torch.arange(batch_size, device=device)
        self.within = self

    def clear(self) -> None:
        """Hold zeros: what a mask hides is still multiplied, by 0."""
        for each in (*self.keys, *self.values):
            each.zero_()

    def repeat(self, source: int, target: int) -> None:
        """Let row `target` hold what row `source` holds."""
        self.lengths[target] = self.lengths[source]
        for each in (*self.keys, *self.values):
            each[target] = each[source]  # the whole row: one piece of memory, whichever way it is turned

    def drop(self, row: int) -> None:
        """Hold a row less: the last takes the place of `row`."""
        last = len(self.lengths) - 1
        if row != last:
            self.repeat(last, row)
        self.lengths.pop()
        self.rows = self.rows[:last]
        self.keys, self.values = [keys[:last] for keys in self.keys], [values[:last] for values in self.values]

    def fill(self, layer: int, row: int, k: Tensor, v: Tensor) -> None:
        """Hold the first keys and values `[G, T, D]` of a row."""
        self.keys[layer][row, :, : k.size(1)] = k
        self.values[layer][row, :, : v.size(1)] = v

    def begin_step(self) -> None:
        """Say where the next position of each row is, and what it sees; then each row is longer by it."""
        self.length = max(self.lengths)
        self.look()
        self.lengths = [length + 1 for length in self.lengths]

    def look(self) -> None:
        """The next `positions` `[B, 1]` see of the first `end` positions what no `mask` hides."""
        self.end, self.mask = self.length + 1, None
        self.positions = torch.tensor(self.lengths, device=self.rows.device)[:, None]
        if min(self.lengths) < self.length:
            self.mask = self.hidden()

    def hidden(self) -> Tensor:
        """What is added to scores of `end` positions: -infinity where a row has none yet, `[B, 1, 1, end]`."""
        later = torch.arange(self.end, device=self.rows.device) > self.positions  # [B, end]
        mask = torch.zeros(later.shape, device=later.device, dtype=self.dtype)
        return mask.masked_fill_(later, -torch.inf)[:, None, None]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.extend`, for one new position at each row's own place."""
        if self.mask is None:
            return super().extend(layer, k, v)
        for held, new in ((self.keys[layer], k), (self.values[layer], v)):
            held[self.rows, :, self.positions[:, 0]] = new[:, :, 0].to(self.dtype)
        return self.keys[layer][:, :, : self.end], self.values[layer][:, :, : self.end]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """What the heads take `[B, H, 1, D]`. The heads that share keys are asked as rows of one product."""
        grouped = q.to(k.dtype).reshape(q.size(0), k.size(1), -1, q.size(3))  # [B, G, H / G, D]
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=self.mask).to(q.dtype).reshape(q.shape)


class SteadyCache(RaggedCache):
    """The same for GPUs: a step works on the same memory as the one before, in the same shapes while `end` is the same.

    So it can be recorded, and played again: of all rows, of which fewer would take a GPU as long.
    """

    can_drop = False

    def __init__(self, config: GPTConfig, batch_size: int, positions: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, batch_size, positions, device, dtype)
        self.clear()
        self.positions = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.masks: dict[int, Tensor] = {}

    def look(self) -> None:
        self.end = min(-(-(self.length + 1) // STEADY) * STEADY, self.keys[0].size(2))
        self.positions.copy_(torch.tensor(self.lengths)[:, None])
        hidden = self.hidden()
        self.mask = self.masks.setdefault(self.end, hidden)  # what a recording reads stays where it is
        self.mask.copy_(hidden)


class TableCache(RaggedCache):
    """The same for CPUs, where no attention kernel reads many keys for one query at the memory's speed.

    But `embedding_bag` does: it sums rows of a table, each times a number. What a head takes is the S rows of its values,
    each times its weight. Its scores are D rows of keys, each times a number of the query: keys lie turned, in blocks of a
    few positions, so that no more are read than there are, and their sums stay in the processor's registers.
    """

    def __init__(self, config: GPTConfig, batch_size: int, positions: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, batch_size, positions, device, dtype)
        blocks = -(-positions // BLOCK)
        self.wide = -(-positions // blocks)
        groups, D = config.kv_heads, config.head_width
        self.keys = [torch.empty(batch_size, groups, blocks, D, self.wide, dtype=dtype) for _ in range(config.n_layer)]
        self.tables = [(self.keys[layer].flatten(0, 3), self.values[layer].flatten(0, 2)) for layer in range(config.n_layer)]
        self.heads = torch.arange(batch_size * config.n_head, dtype=torch.int32)
        group = self.heads[:, None] // (config.n_head // groups)  # [B * H, 1]
        self.key_rows = group * blocks * D + torch.arange(blocks * D, dtype=torch.int32)  # [B * H, blocks * D]
        self.value_rows = group * positions + torch.arange(positions, dtype=torch.int32)  # [B * H, positions]

    def drop(self, row: int) -> None:
        kept = len(self.heads) - len(self.heads) // len(self.lengths)
        super().drop(row)
        self.heads, self.key_rows, self.value_rows = self.heads[:kept], self.key_rows[:kept], self.value_rows[:kept]

    def look(self) -> None:
        super().look()
        D, heads = self.values[0].size(3), len(self.heads)
        self.blocks = -(-self.end // self.wide)  # that hold something
        self.seen_keys = self.key_rows[:, : self.blocks * D].flatten()  # [B * H * blocks * D]
        self.seen_values = self.value_rows[:, : self.end].flatten()  # [B * H * S]
        self.key_starts = torch.arange(heads * self.blocks, dtype=torch.int32) * D  # where the rows of each sum begin
        self.value_starts = self.heads * self.end
        self.queries = torch.empty(len(self.rows), heads // len(self.rows), self.blocks, D, dtype=self.dtype)  # once a block

    def fill(self, layer: int, row: int, k: Tensor, v: Tensor) -> None:
        T = k.size(1)
        for block, part in enumerate(k.split(self.wide, dim=1)):
            self.keys[layer][row, :, block, :, : part.size(1)] = part.mT
        self.values[layer][row, :, :T] = v

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[B * G * blocks * D, wide]` and values `[B * G * positions, D]`, with the new ones in them."""
        if self.mask is None:
            block, place = divmod(self.length, self.wide)
            self.keys[layer][:, :, block, :, place] = k[:, :, 0]
            self.values[layer][:, :, self.length] = v[:, :, 0]
        else:
            places = self.positions[:, 0]
            self.keys[layer][self.rows, :, places // self.wide, :, places % self.wide] = k[:, :, 0].to(self.dtype)
            self.values[layer][self.rows, :, places] = v[:, :, 0].to(self.dtype)
        return self.tables[layer]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """What the heads take `[B, H, 1, D]`."""
        torch.mul(q.expand_as(self.queries), 1 / math.sqrt(q.size(3)), out=self.queries)
        scores = F.embedding_bag(self.seen_keys, k, self.key_starts, mode="sum", per_sample_weights=self.queries.view(-1))
        scores = scores.view(*q.shape[:3], -1)[..., : self.end]
        weights = (scores if self.mask is None else scores + self.mask).softmax(-1).flatten()
        y = F.embedding_bag(self.seen_values, v, self.value_starts, mode="sum", per_sample_weights=weights)
        return y.to(q.dtype).view(q.shape)


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

    `precision` is "fp32", "bf16" (weights and cache of 16 bits) or "int8" (weights of 8); if not said, what autocast has.
    Raises ValueError for int8 where there is no way to do it.
    """

    def __init__(self, model: GPT, rows: int, precision: str = "") -> None:
        self.model, self.config, self.device = model, model.config, model.wte.weight.device
        self.kind = kind_of_cache(model)
        if precision == "int8" and self.kind is not TableCache:
            raise ValueError("int8=true is for CPUs of the x86 kind, and not for every flag of a model: leave it out.")
        self.dtype, self.records = cache_dtype(model), self.kind is SteadyCache
        self.can_drop = self.kind.can_drop
        self.reader = self.prefiller = model
        if self.kind is SteadyCache:
            self.reader = decoding_copy(model, partial(cast, dtype=self.dtype))
        elif self.kind is TableCache:
            precision = precision or ("fp32" if self.dtype == torch.float32 else "bf16")
            self.dtype = torch.float32 if precision == "fp32" else torch.float16
            self.reader = decoding_copy(model, partial(packed, rows=rows, precision=precision))
            if precision != "fp32":
                self.prefiller = decoding_copy(model, partial(packed, rows=512, precision=precision))

    def nbytes(self, rows: int, positions: int) -> int:
        """What so many rows of so many positions take: their cache, logits, and what is drawn from them."""
        config, width = self.config, self.config.kv_heads * self.config.head_width
        cache = 2 * config.n_layer * rows * min(positions, config.block_size) * width * self.dtype.itemsize
        return cache + 3 * 4 * rows * config.vocab_size

    def begin(self, texts: list[list[int]], max_new_tokens: int) -> None:
        """Make the cache for `texts` that grow by so many tokens at most."""
        lengths, rows = [len(text) for text in texts], len(texts)
        positions = min(max(lengths) + max_new_tokens, self.config.block_size)
        self.cache = self.recordings = None  # their memory is there for the new ones
        self.cache = self.kind(self.config, rows, positions, self.device, self.dtype)
        if min(lengths) < max(lengths):
            self.cache.clear()
        self.starts = [-1] * rows
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
        """A copy's is in its products, the model's autocast's; but beside a `TableCache` it is that of its weights."""
        autocast = model is self.model and self.kind is not TableCache
        return nullcontext() if autocast else torch.autocast(self.device.type, enabled=False)


def kind_of_cache(model: GPT) -> type[RaggedCache]:
    """What suits the device, and the flags of the model."""
    if not can_copy(model):
        return RaggedCache
    return TableCache if has_kernels(model) else SteadyCache if model.wte.weight.is_cuda else RaggedCache


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
