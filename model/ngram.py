"""N-gram embeddings: the last few tokens together select rows of a table by their hash.

After arXiv:2501.16975 and arXiv:2412.09871. Knows tensors only.
Shapes: B batch, T time, C width, N the length of the longest n-gram.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model.config import GPTConfig

# Stands for the missing token before the start of a sequence.
NO_TOKEN = -1
# 2^64 divided by the golden ratio (Fibonacci hashing), as an int64. Products wrap around.
MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64


class NGramEmbedding(nn.Module):
    """The sum of the embeddings of the bigram, trigram, ..., N-gram that end at each position.

    All share one table of `ngram_rows` rows, so different n-grams can share a row.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_previous = config.ngrams - 1
        self.table = nn.Embedding(config.ngram_rows, config.n_embd)

    def forward(self, idx: Tensor, previous_ids: Tensor | None = None,
                positions: Tensor | None = None, parents: Tensor | None = None) -> Tensor:
        """Ids `[B, T]` -> `[B, T, C]`.

        `previous_ids` `[B, N - 1]` are the ids before `idx`, if any. `positions` `[B, T]` are those
        of each token in its own document: no n-gram crosses documents. `parents` `[B, T]` are the
        indices of the tokens before each, if not the neighbors.
        """
        return self.table(self.row_indices(idx, previous_ids, positions, parents)).sum(dim=2)

    def row_indices(self, idx: Tensor, previous_ids: Tensor | None = None,
                    positions: Tensor | None = None, parents: Tensor | None = None) -> Tensor:
        """Rows of the table `[B, T, N - 1]`, those of the shortest n-grams first."""
        ids = self.prepend(idx, previous_ids)  # [B, N - 1 + T]
        hashes = earlier = idx
        indices = []
        for distance in range(1, self.n_previous + 1):
            # The id at this distance before each token, [B, T]; in a tree, among its ancestors.
            if parents is None:
                start = self.n_previous - distance
                earlier = ids[:, start : start + idx.size(1)]
            else:
                earlier = earlier.gather(1, parents)
            if positions is not None:
                earlier = earlier.masked_fill(positions < distance, NO_TOKEN)
            # The hash of the n-gram, from that of the shorter one.
            hashes = hashes * MULTIPLIER + earlier
            # The upper half of a product depends on all bits.
            hashes = hashes ^ (hashes >> 32)
            indices.append(((hashes * MULTIPLIER) >> 32) % self.table.num_embeddings)
        return torch.stack(indices, dim=2)

    def prepend(self, idx: Tensor, previous_ids: Tensor | None) -> Tensor:
        """`idx` `[B, T]` after the N - 1 ids before it."""
        if previous_ids is None:
            return F.pad(idx, (self.n_previous, 0), value=NO_TOKEN)
        return torch.cat((previous_ids, idx), dim=1)

    def last_ids(self, idx: Tensor, previous_ids: Tensor | None) -> Tensor:
        """The `previous_ids` `[B, N - 1]` of the tokens that follow `idx`."""
        return self.prepend(idx, previous_ids)[:, -self.n_previous :]
