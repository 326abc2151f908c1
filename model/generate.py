"""Generation: prefill, decode, and the rules that pick the next token.

Knows token ids only; what they mean is the tokenizer's business.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.attention import KVCache
from model.gpt import GPT


def window_start(length: int, block_size: int) -> int:
    """Where the context of a text of `length` tokens starts.

    At 0 while everything fits. Past `block_size` the window moves on in steps of half a block, so that a
    cache is filled anew only once in half a block, and the same tokens see the same context without one.
    """
    half = max(block_size // 2, 1)
    return max(0, -((block_size - length) // half) * half)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the `k` largest logits `[B, V]` of each row become -inf (more than k stay where they tie)."""
    smallest = logits.topk(min(k, logits.size(-1))).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest largest logits whose probabilities reach `p` (nucleus sampling, arXiv:1904.09751)."""
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # what the larger ones hold already; 0 for the largest
    return logits.masked_fill((before >= p).gather(-1, order.argsort(-1)), -torch.inf)


def finite(logits: Tensor) -> Tensor:
    """The logits. Raises ValueError if there is one that nothing can be drawn from."""
    if not logits.isfinite().all():
        raise ValueError("The model's output is NaN or infinite: its weights are damaged, or its training diverged.")
    return logits


def pick(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """Draw one token id a row from logits `[B, V]` -> `[B]`; temperature 0 takes the largest.

    Raises ValueError for logits that are not finite.
    """
    logits = finite(logits.float())
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


@torch.inference_mode()
def generate(
    model: GPT, prompt: Tensor, max_new_tokens: int, *,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, use_cache: bool = True,
) -> Iterator[Tensor]:
    """Continue `prompt` `[B, T]`, yielding the next ids `[B]` one position at a time.

    `top_k=0` and `top_p=1` switch those rules off. The same seed gives the same tokens, and no other
    random stream is touched. Raises ValueError for a prompt without tokens.
    """
    if prompt.size(1) == 0:
        raise ValueError("The prompt has no tokens: generation continues at least one.")
    was_training = model.training
    model.eval()
    generator = torch.Generator(prompt.device).manual_seed(seed)
    block_size = model.config.block_size
    ids, cache, cache_start = prompt, None, -1
    try:
        for _ in range(max_new_tokens):
            start = window_start(ids.size(1), block_size)
            if not use_cache:
                features = model.features(ids[:, start:])
            elif start == cache_start:
                features = model.features(ids[:, -1:], cache)
            else:  # the first step, or the window moved: prefill
                cache = KVCache(model.config, ids.size(0), ids.device, cache_dtype(model))
                features, cache_start = model.features(ids[:, start:], cache), start
            token = pick(model.head(features[:, -1]), temperature, top_k, top_p, generator)
            ids = torch.cat((ids, token[:, None]), dim=1)
            yield token
    finally:
        model.train(was_training)


def cache_dtype(model: GPT) -> torch.dtype:
    """What attention computes in: autocast's type where it is on, else the weights'."""
    device_type = model.wte.weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else model.wte.weight.dtype
