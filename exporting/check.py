"""Whether an exported model computes the same as ours: the logits of both on the same text."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from checkpointing.weights import Weights
from data.tokenizer import Tokenizer

# The largest difference of two logits, as a part of the largest logit. Between programs that add in
# another order, fp32 has a hundredth to a tenth of it.
BOUND = 1e-5
# The text is shorter where its logits would have more numbers than this.
MOST_LOGITS = 2**26


def english_text(tokenizer: Tokenizer) -> str:
    """English text of Python's documentation, without characters that the tokenizer lacks."""
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics)[:40])
    for letter in sorted(set(text)):
        try:
            tokenizer.encode(letter)
        except ValueError:
            text = text.replace(letter, "")
    return text


def text_ids(weights: Weights, text: str) -> Tensor:
    """The ids `[1, T]` of `text`, repeated until they fill the context."""
    vocab_size = weights.config.vocab_size
    length = max(1, min(weights.config.block_size, MOST_LOGITS // vocab_size))
    ids = weights.tokenizer.encode(text[: 20 * length]) or list(range(vocab_size))
    ids *= math.ceil(length / len(ids))
    return torch.tensor([ids[:length]])


@torch.no_grad()
def our_logits(weights: Weights, ids: Tensor) -> Tensor:
    """The logits `[1, T, V]` of our model."""
    return weights.model()(ids)


def difference(ours: Tensor, theirs: Tensor, program: str) -> float:
    """The largest difference of two logits, as a part of the largest of ours.

    Raises ValueError if it exceeds BOUND.
    """
    largest = ours.abs().max().item()
    if not math.isfinite(largest):
        raise ValueError("The model computes NaN or infinite logits: it cannot be checked, so it "
                         "is not exported. Choose an earlier checkpoint=.")
    found = (ours - theirs.float()).abs().max().item() / max(largest, 1e-30)
    if not found <= BOUND:
        raise ValueError(f"The exported model is not the same: in {program}, logits differ by "
                         f"{found:.1e} of the largest, more than {BOUND:g}. Nothing was written.")
    return found
