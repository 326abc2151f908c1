"""A model of transformers with n-gram embeddings: `trust_remote_code=True` loads it.

Each token's embedding also has those of the 2, ..., N last tokens together, which select rows of a
table by their hash (arXiv:2501.16975). Written by nanohydra beside the weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import NanoChatConfig, NanoChatForCausalLM

# Stands for a missing token: before the start of a sequence, and where it is padded.
NO_TOKEN = -1
# 2^64 divided by the golden ratio (Fibonacci hashing), as an int64. Products wrap around.
MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64


class NanohydraConfig(NanoChatConfig):
    """The configuration of the class without n-grams, and `ngrams` and `ngram_rows`."""

    model_type = "nanohydra"


class NGramEmbedding(nn.Module):
    """The sum of the embeddings of the bigram, ..., N-gram that end at each position."""

    def __init__(self, config: NanohydraConfig) -> None:
        super().__init__()
        self.n_previous = config.ngrams - 1
        self.table = nn.Embedding(config.ngram_rows, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids `[B, N - 1 + T]`, with those before the input -> embeddings `[B, T, C]`."""
        length = ids.size(1) - self.n_previous
        hashes = ids[:, self.n_previous :]
        rows = []
        for distance in range(1, self.n_previous + 1):
            start = self.n_previous - distance
            hashes = hashes * MULTIPLIER + ids[:, start : start + length]
            hashes = hashes ^ (hashes >> 32)
            rows.append(((hashes * MULTIPLIER) >> 32) % self.table.num_embeddings)
        return self.table(torch.stack(rows, dim=2)).sum(dim=2)


class NanohydraForCausalLM(NanoChatForCausalLM):
    """The language model with n-gram embeddings."""

    config_class = NanohydraConfig

    def __init__(self, config: NanohydraConfig) -> None:
        super().__init__(config)
        self.ngram = NGramEmbedding(config)
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                past_key_values: Any = None, inputs_embeds: Tensor | None = None,
                previous_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """As that of the base class. `previous_ids` `[B, N - 1]` are the ids before `input_ids`.

        A cache needs them; `generate` passes them.
        """
        if inputs_embeds is None:
            if previous_ids is None:
                if past_key_values is not None and past_key_values.get_seq_length():
                    raise ValueError("n-gram embeddings need previous_ids with a cache.")
                previous_ids = input_ids.new_full((len(input_ids), self.ngram.n_previous), NO_TOKEN)
            ids = without_padding(torch.cat((previous_ids, input_ids), dim=1), attention_mask)
            inputs_embeds = self.get_input_embeddings()(input_ids) + self.ngram(ids)
        return super().forward(attention_mask=attention_mask, past_key_values=past_key_values,
                               inputs_embeds=inputs_embeds, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any,
                                      **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if inputs.get("input_ids") is not None:
            n_previous = self.ngram.n_previous
            ids = without_padding(input_ids, kwargs.get("attention_mask"))
            earlier = ids[:, : ids.size(1) - inputs["input_ids"].size(1)]
            earlier = F.pad(earlier, (n_previous, 0), value=NO_TOKEN)
            inputs["previous_ids"] = earlier[:, earlier.size(1) - n_previous :]
        return inputs


def without_padding(ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Ids `[B, T]` with NO_TOKEN where a mask `[B, S]` of the last S positions is 0."""
    if attention_mask is None or attention_mask.dim() != 2:
        return ids
    missing = max(ids.size(1) - attention_mask.size(1), 0)
    mask = F.pad(attention_mask, (missing, 0), value=1)[:, -ids.size(1) :]
    return ids.masked_fill(mask == 0, NO_TOKEN)
