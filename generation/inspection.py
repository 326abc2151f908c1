"""What a model computes for a text: attention weights, the most likely next tokens, and losses."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from generation.sampling import finite
from model import GPT
from model.attention import CausalSelfAttention
from terminal import escaped

SPACES = {"\n": "⏎", "\t": "⇥", " ": "·"}
MAX_LETTERS = 40  # of a label
N_NEXT = 8  # most likely next tokens that are shown


@torch.inference_mode()
def attention_weights(model: GPT, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `[T, V]` for ids `[1, T]`, and the attention weights `[L, H, T, T]` behind them."""
    weights: list[Tensor] = []

    def keep_weights(attention: CausalSelfAttention, inputs: Any, output: Any) -> None:
        weights.append(attention.forward_with_weights(*inputs)[1])

    # A second forward pass of each attention, which returns its weights.
    handles = [block.attn.register_forward_hook(keep_weights) for block in model.h]
    try:
        logits = model(ids)[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits, torch.cat(weights)  # [T, V], [L, H, T, T]


def attention_picture(model: GPT, tokenizer: Tokenizer, ids: list[int]) -> tuple[Any, Any, Any]:
    """Of T tokens the labels, the attention weights `[L, H, T, T]`, and the most likely next ones.

    Raises ValueError if a logit is not finite.
    """
    logits, weights = attention_weights(model, torch.tensor([ids], device=model.wte.weight.device))
    labels = [token_label(tokenizer, token) for token in ids]
    return labels, weights.float().cpu().numpy(), next_tokens(finite(logits), tokenizer)


@dataclass(frozen=True)
class Prediction:
    """The most likely tokens at one position, and the log probability of the token that is there.

    It is None after the last token. Nothing predicts a first token: both are None.
    """

    logprob: float | None
    # Log probabilities by token ids, the largest first.
    top: dict[int, float] | None


@torch.inference_mode()
def predictions(model: GPT, ids: Sequence[int], n_top: int) -> Iterator[Prediction]:
    """The predictions of what follows each of `ids`.

    Beyond the context, sequences of `block_size` tokens are read that overlap by half. Raises
    ValueError if a logit is not finite.
    """
    block_size, device = model.config.block_size, model.wte.weight.device
    done = 0
    while done < len(ids):
        # The rows of earlier positions of the window are only context.
        start = max(0, done - block_size // 2)
        window = torch.tensor([ids[start : start + block_size]], device=device)  # [1, T]
        for row in finite(model(window)[0, done - start :]).float().log_softmax(-1):
            done += 1
            following = row[ids[done]].item() if done < len(ids) else None
            yield Prediction(following, most_likely(row, n_top))


def most_likely(values: Tensor, n_top: int) -> dict[int, float]:
    """The largest of the probabilities `[V]` or their logarithms, by the ids of the tokens."""
    values, ids = values.topk(min(n_top, len(values)))
    return dict(zip(ids.tolist(), values.tolist(), strict=True))


def next_tokens(logits: Tensor, tokenizer: Tokenizer) -> list[list[tuple[str, float]]]:
    """For each position the most likely next tokens, with their probabilities."""
    rows = []
    for probabilities in logits.float().softmax(-1):
        top = most_likely(probabilities, N_NEXT)
        rows.append([(token_label(tokenizer, token), round(top[token], 5)) for token in top])
    return rows


def token_label(tokenizer: Tokenizer, token: int) -> str:
    """The first MAX_LETTERS of a token's text, with every character visible."""
    text = tokenizer.decode_bytes([token]).decode(errors="backslashreplace")
    if len(text) > MAX_LETTERS:
        text = text[:MAX_LETTERS] + "…"
    # A combining character would change the character before the label.
    if text and unicodedata.category(text[0]).startswith("M"):
        text = "◌" + text
    return "".join(map(visible, text)) or "∅"


def visible(character: str) -> str:
    """A character, or a text in its place if it shows nothing."""
    if character in SPACES:
        return SPACES[character]
    if character.isspace():
        return ascii(character)[1:-1]
    return escaped(character, keep="")
