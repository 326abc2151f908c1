"""Whether an exported model computes the same as ours: the logits of both on the same text."""

import math

import torch
from torch import Tensor

from checkpointing.weights import Weights
from data.tokenizer import Tokenizer
from terminal import counted

# The largest difference of two logits, as a part of the largest logit. Between programs that add in
# another order, fp32 has a hundredth to a tenth of it.
BOUND = 1e-5
# The tokens of text that are compared, if the context is longer.
LONGEST_TEXT = 4096
# The logits of all positions could take more memory than the model: fewer positions are compared
# where they would be more numbers than this.
MOST_LOGITS = 2**22


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


def reference(weights: Weights) -> tuple[str, Tensor, Tensor]:
    """A text, its ids `[1, T]`, repeated until they fill the context, and their `our_logits`."""
    text = english_text(weights.tokenizer)
    length = min(weights.config.block_size, LONGEST_TEXT)
    ids = weights.tokenizer.encode(text[: 20 * length]) or list(range(weights.config.vocab_size))
    ids *= math.ceil(length / len(ids))
    ids = torch.tensor([ids[:length]])
    return text, ids, our_logits(weights, ids)


def compared_positions(ids: Tensor, vocab_size: int) -> Tensor:
    """The positions `[P]` of ids `[1, T]` whose logits are compared, with the last one."""
    length = ids.size(1)
    count = max(1, min(length, MOST_LOGITS // vocab_size))
    return torch.linspace(length - 1, 0, count).long()


@torch.no_grad()
def our_logits(weights: Weights, ids: Tensor) -> Tensor:
    """The logits `[1, P, V]` of our model at the compared positions."""
    model = weights.model()
    positions = compared_positions(ids, weights.config.vocab_size)
    return model.head(model.features(ids, at=positions))


def compare(ours: Tensor, theirs: Tensor, program: str, n_tokens: int) -> str:
    """A sentence about the largest difference of logits `[1, P, V]` for a text of `n_tokens`.

    Raises ValueError if it exceeds BOUND, as a part of the largest of ours.
    """
    largest = ours.abs().max().item()
    if not math.isfinite(largest):
        raise ValueError("The model computes NaN or infinite logits: it cannot be checked, so it "
                         "is not exported. Choose an earlier checkpoint=.")
    found = (ours - theirs.float()).abs().max().item() / max(largest, 1e-30)
    if not found <= BOUND:
        raise ValueError(f"The exported model is not the same: in {program}, logits differ by "
                         f"{found:.1e} of the largest, more than {BOUND:g}. Nothing was written.")
    return (f"The largest difference of a logit in {program} is {found:.1e} of the largest logit, "
            f"at {ours.size(1):,} of {counted(n_tokens, 'position')} of a text.")
