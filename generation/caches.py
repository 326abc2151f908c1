"""Caches of keys and values in which each row has its own length: for any device, for GPUs, for CPUs.

Shapes: B rows, H heads, G key-value heads, D head width, S positions so far.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from generation import kernels
from model.attention import KVCache
from model.config import GPTConfig

STEADY = 256  # so many positions on end a `SteadyCache` does the same with


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

    def fits(self, batch_size: int, positions: int) -> bool:
        """Whether it serves other texts too: as many, and of so many positions. One that is cheap to make need not."""
        return False

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
        rounded = min(-(-positions // STEADY) * STEADY, config.block_size)  # so that it also fits the next texts
        super().__init__(config, batch_size, rounded, device, dtype)
        self.clear()
        self.positions = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.masks: dict[int, Tensor] = {}

    def fits(self, batch_size: int, positions: int) -> bool:
        return batch_size == len(self.lengths) and positions <= self.keys[0].size(2)

    def look(self) -> None:
        self.end = min(-(-(self.length + 1) // STEADY) * STEADY, self.keys[0].size(2))
        self.positions.copy_(torch.tensor(self.lengths)[:, None])
        hidden = self.hidden()
        self.mask = self.masks.setdefault(self.end, hidden)  # what a recording reads stays where it is
        self.mask.copy_(hidden)


class PackedCache(RaggedCache):
    """The same for CPUs, as generation/kernels.c reads it: each row to where it is, so that nothing needs to be hidden."""

    def __init__(self, config: GPTConfig, batch_size: int, positions: int, device: torch.device, dtype: torch.dtype) -> None:
        D, groups = config.head_width, config.kv_heads
        dtype = torch.float32 if D % 2 else dtype  # two of bf16 lie together
        super().__init__(config, batch_size, 1, device, dtype)  # and then with matrices of its own
        n, width, room = 4 // dtype.itemsize, kernels.values_width(D), -(-positions // kernels.PANEL) * kernels.PANEL
        self.keys = [torch.empty(batch_size, groups, room // kernels.PANEL, D // n, kernels.PANEL, n, dtype=dtype)
                     for _ in range(config.n_layer)]
        self.values = [torch.empty(batch_size, groups, -(-D // width), room // n, width, n, dtype=dtype)
                       for _ in range(config.n_layer)]
        self.scores = torch.empty(batch_size, config.n_head, room)

    def clear(self) -> None:
        """Nothing that was not written comes into a result."""

    def fill(self, layer: int, row: int, k: Tensor, v: Tensor) -> None:
        k = kernels.in_panels(k.to(self.dtype))
        v = kernels.in_panels(v.mT.to(self.dtype), self.values[layer].size(4))
        self.keys[layer][row, :, : k.size(1)] = k
        self.values[layer][row, :, :, : v.size(2)] = v

    def look(self) -> None:
        assert self.length < self.scores.size(2), "longer than was said"
        self.positions = torch.tensor(self.lengths)[:, None]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The new ones alone: they join the others when `attend` comes to them."""
        self.layer = layer
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """What the heads take `[B, H, 1, D]`."""
        return kernels.attend(q, k, v, self.keys[self.layer], self.values[self.layer], self.scores, self.positions)
