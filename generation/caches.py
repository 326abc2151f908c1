"""Key-value caches whose rows have their own lengths: one for any device, for GPUs and for CPUs.

Shapes: B rows, H heads, G key-value heads, D head width, S positions so far.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from generation import kernels
from model.attention import KVCache
from model.config import GPTConfig

# A `StaticCache` attends to a multiple of this number of positions.
BUCKET = 256


class RaggedCache(KVCache):
    """A cache of sequences of different lengths; one step adds a position to each.

    It has memory for `batch_size` sequences, and is empty at first; they fill the first rows. It is
    also the attention context of `GPT.features`, with the `positions` of the new tokens and
    `attend` for their queries.
    """

    parents = None

    def __init__(self, config: GPTConfig, batch_size: int, positions: int, device: torch.device,
                 dtype: torch.dtype) -> None:
        super().__init__(config, batch_size, device, dtype, positions)
        self.dtype, self.batch_size = dtype, batch_size
        self.heads_per_group = config.n_head // config.kv_heads
        self.lengths: list[int] = []
        self.rows = torch.arange(batch_size, device=device)
        self.attention_context = self

    def fits(self, batch_size: int, positions: int) -> bool:
        """Whether it can be used for another batch. One that is cheap to allocate is not."""
        return False

    @property
    def step_rows(self) -> int:
        """The number of rows that a step computes."""
        return len(self.lengths)

    def clear(self, row: int) -> None:
        """Set a row to zero: masked positions are multiplied by 0, which does not remove NaN."""
        for tensor in (*self.keys, *self.values):
            tensor[row].zero_()

    def join(self) -> None:
        """Add an empty row after the others."""
        assert len(self.lengths) < self.batch_size, "more rows than were allocated"
        self.clear(len(self.lengths))
        self.lengths.append(0)

    def copy_row(self, source: int, target: int) -> None:
        length = self.lengths[target] = self.lengths[source]
        # Each is [rows, G, positions, D].
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def drop(self, row: int) -> None:
        """Remove a row: the last one takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            self.copy_row(last, row)
        self.lengths.pop()

    def fill(self, layer: int, row: int, k: Tensor, v: Tensor) -> None:
        """Write the first keys and values `[G, T, D]` of a row."""
        self.keys[layer][row, :, : k.size(1)] = k
        self.values[layer][row, :, : v.size(1)] = v

    def begin_step(self) -> None:
        """Set the positions and the mask of the next token of each row, and count it."""
        self.length = max(self.lengths)
        self.update()
        self.lengths = [length + 1 for length in self.lengths]

    def update(self) -> None:
        """Set `positions` `[B, 1]`, `end`, the number of positions attended to, and `mask`."""
        # Rows of one length need no mask.
        self.end, self.mask = self.length + 1, None
        self.positions = torch.tensor(self.lengths, device=self.rows.device)[:, None]
        if min(self.lengths) < self.length:
            self.mask = self.length_mask()

    def length_mask(self) -> Tensor:
        """-infinity behind each row's new position, else 0: `[B, 1, H / G, end]`, added to scores.

        Not a view that is expanded to all queries: cuDNN's attention may not support one.
        """
        later = torch.arange(self.end, device=self.rows.device) > self.positions  # [B, end]
        later = later[:, None, None].expand(-1, 1, self.heads_per_group, -1)
        mask = torch.zeros(later.shape, device=later.device, dtype=self.dtype)
        return mask.masked_fill_(later, -torch.inf)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.extend`, for one new position at the end of each row."""
        # k and v are [B, G, 1, D], and keys and values [B, G, positions, D].
        rows = k.size(0)
        keys, values = self.keys[layer][:rows], self.values[layer][:rows]
        for cached, new in ((keys, k), (values, v)):
            # Without a mask all rows have the same length.
            if self.mask is None:
                cached[:, :, self.length] = new[:, :, 0]
            else:
                cached[self.rows[:rows], :, self.positions[:, 0]] = new[:, :, 0].to(self.dtype)
        return keys[:, :, : self.end], values[:, :, : self.end]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """Attention `[B, H, 1, D]`. Heads that share keys are the rows of one product."""
        grouped = q.to(k.dtype).reshape(q.size(0), k.size(1), -1, q.size(3))  # [B, G, H / G, D]
        y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=self.mask)
        return y.to(q.dtype).reshape(q.shape)


class StaticCache(RaggedCache):
    """A cache for CUDA graphs: steps use the same memory, and the same shapes within a bucket.

    A step computes all rows, also those without a sequence: fewer would need another graph, and
    would hardly be faster on a GPU.
    """

    def __init__(self, config: GPTConfig, batch_size: int, positions: int, device: torch.device,
                 dtype: torch.dtype) -> None:
        # Rounded up, so that it also fits the next batch.
        positions = min(round_up(positions, BUCKET), config.block_size)
        super().__init__(config, batch_size, positions, device, dtype)
        for row in range(batch_size):
            self.clear(row)
        self.positions = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.masks: dict[int, Tensor] = {}

    def fits(self, batch_size: int, positions: int) -> bool:
        return batch_size == self.batch_size and positions <= self.keys[0].size(2)

    @property
    def step_rows(self) -> int:
        return self.batch_size

    def update(self) -> None:
        self.end = min(round_up(self.length + 1, BUCKET), self.keys[0].size(2))
        unused = [0] * (self.batch_size - len(self.lengths))
        self.positions.copy_(torch.tensor([*self.lengths, *unused])[:, None])
        mask = self.length_mask()
        # Graphs read the mask at a fixed address.
        self.mask = self.masks.setdefault(self.end, mask)
        self.mask.copy_(mask)


class PackedCache(RaggedCache):
    """A cache for CPUs, packed for generation/kernels.c, which reads each row only to its end."""

    def __init__(self, config: GPTConfig, batch_size: int, positions: int, device: torch.device,
                 dtype: torch.dtype) -> None:
        D, G = config.head_width, config.kv_heads
        # Two bf16 numbers lie together.
        dtype = torch.float32 if D % 2 else dtype
        # One position, since the keys and values below take the place of those allocated here.
        super().__init__(config, batch_size, 1, device, dtype)
        # The order of kernels.in_panels, with n numbers in 4 bytes: keys as matrices
        # [positions, D], values as [D, positions].
        n, panel, width = 4 // dtype.itemsize, kernels.PANEL, kernels.values_width(D)
        positions = round_up(positions, panel)
        keys_shape = (batch_size, G, positions // panel, D // n, panel, n)
        values_shape = (batch_size, G, math.ceil(D / width), positions // n, width, n)
        layers = range(config.n_layer)
        self.keys = [torch.empty(keys_shape, dtype=dtype) for _ in layers]
        self.values = [torch.empty(values_shape, dtype=dtype) for _ in layers]
        self.scores = torch.empty(batch_size, config.n_head, positions)

    def clear(self, row: int) -> None:
        """Nothing to do: the kernels read no position that was not written."""

    def fill(self, layer: int, row: int, k: Tensor, v: Tensor) -> None:
        # Keys as matrices [T, D] of each head, values as [D, T].
        k = kernels.in_panels(k.to(self.dtype))
        v = kernels.in_panels(v.mT.to(self.dtype), self.values[layer].size(4))
        self.keys[layer][row, :, : k.size(1)] = k
        self.values[layer][row, :, :, : v.size(2)] = v

    def copy_row(self, source: int, target: int) -> None:
        length = self.lengths[target] = self.lengths[source]
        # The panels of keys and the steps of values that hold the positions.
        keys_end = math.ceil(length / self.keys[0].size(4))
        values_end = math.ceil(length / self.values[0].size(5))
        for keys, values in zip(self.keys, self.values, strict=True):
            keys[target, :, :keys_end] = keys[source, :, :keys_end]
            values[target, :, :, :values_end] = values[source, :, :, :values_end]

    def update(self) -> None:
        assert self.length < self.scores.size(2), "more positions than were allocated"
        self.positions = torch.tensor(self.lengths)[:, None]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The new keys and values alone: `attend` appends them."""
        self.layer = layer
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        return kernels.attend(q, k, v, self.keys[self.layer], self.values[self.layer], self.scores,
                              self.positions)


def round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple
