"""Embeddings of the last few tokens together, looked up by their hash: what a short context says, at the price of a lookup.

After arXiv:2501.16975 and arXiv:2412.09871. Knows tensors only.
Shapes: B batch, T time, C width, N the longest n-gram.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model.config import GPTConfig

NOTHING = -1  # stands where a text has no earlier token
MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # odd and without pattern, as an int64; products wrap around


class NGramEmbedding(nn.Module):
    """The sum of the embeddings of the bigram, the trigram, ... up to the N-gram that end at each position.

    All share one table of `ngram_rows` rows, and rows that collide; a row of its own for each trigram of 65 characters
    would already take 274,625.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.longest = config.ngrams
        self.table = nn.Embedding(config.ngram_rows, config.n_embd)

    def forward(self, idx: Tensor, before: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Ids `[B, T]` -> `[B, T, C]`. `before` `[B, N - 1]` are the ids in front of them, where there are any.

        With `positions` `[B, T]`, those of each id in its own document, no n-gram reaches into another.
        """
        return self.table(self.rows(idx, before, positions)).sum(dim=2)

    def rows(self, idx: Tensor, before: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """The rows `[B, T, N - 1]` of the n-grams that end at each position, the shortest first."""
        T, reach = idx.size(1), self.longest - 1
        ids = F.pad(idx, (reach, 0), value=NOTHING) if before is None else torch.cat((before, idx), dim=1)
        rows, gram = [], idx
        for back in range(1, self.longest):
            earlier = ids[:, reach - back : reach - back + T]
            if positions is not None:
                earlier = earlier.masked_fill(positions < back, NOTHING)
            gram = gram * MULTIPLIER + earlier
            gram = gram ^ gram >> 32  # the upper half is where all bits have met
            rows.append((gram * MULTIPLIER >> 32) % self.table.num_embeddings)
        return torch.stack(rows, dim=2)

    def following(self, idx: Tensor, before: Tensor | None) -> Tensor:
        """The `before` `[B, N - 1]` of what comes behind `idx`."""
        reach = self.longest - 1
        ids = F.pad(idx, (reach, 0), value=NOTHING) if before is None else torch.cat((before, idx), dim=1)
        return ids[:, ids.size(1) - reach :]
