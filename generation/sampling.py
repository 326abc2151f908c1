"""Generation: the rules that pick the next token, and the loop that asks for it.

Knows token ids only; what they mean is the tokenizer's business.
"""

from __future__ import annotations

import math
import random
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from generation.decoder import Decoder, native_autocast, window_start
from model.gpt import GPT

COLD = 1e-20  # below it only the largest logit can be drawn, and dividing by it would soon give infinities
LIKELY = 1024  # so many of the likeliest tokens are ordered first: a nucleus is seldom larger


def finite(logits: Tensor) -> Tensor:
    """The logits. Raises ValueError if there is one that nothing can be drawn from."""
    if not math.isfinite(logits.sum()) and not logits.isfinite().all():  # the sum is the faster question
        raise ValueError("The model's output is NaN or infinite: its weights are damaged, or its training diverged.")
    return logits


def candidates(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row of `[B, V]`, in order: probabilities `[B, K]`, and ids `[B, K]`.

    They are the `top_k` largest (0: all), and of these the fewest that hold `top_p` (nucleus sampling, arXiv:1904.09751);
    what is not among them has probability 0. The probabilities need not sum to 1.
    """
    for k in [top_k] if top_k else [LIKELY, logits.size(-1)]:
        likeliest, ids = logits.topk(min(k, logits.size(-1)))
        probabilities = (likeliest - (likeliest if top_k else logits).logsumexp(-1, keepdim=True)).exp()
        reached = probabilities.cumsum(-1)
        if (reached[:, -1] >= top_p).all():
            break
    return probabilities.masked_fill(reached - probabilities >= top_p, 0), ids


def pick(logits: Tensor, temperature: float, top_k: int, top_p: float, draws: Tensor) -> Tensor:
    """One token id a row from logits `[B, V]` -> `[B]`, by `draws` `[B]` from (0, 1]; temperature 0 takes the largest.

    Raises ValueError for logits that are not finite.
    """
    logits = finite(logits.float())
    if temperature < COLD:
        return logits.argmax(-1)
    logits = logits / temperature
    probabilities, ids = candidates(logits, top_k, top_p) if top_k or top_p < 1 else (logits.softmax(-1), None)
    reached = probabilities.cumsum(-1)
    places = torch.searchsorted(reached, draws[:, None] * reached[:, -1:])  # the first that reaches it has a probability
    return (places if ids is None else ids.gather(-1, places)).squeeze(-1)


def generate(model: GPT, prompts: Tensor | Sequence[Sequence[int]], max_new_tokens: int, **rules: Any) -> Iterator[Tensor]:
    """Continue `prompts` to the end, yielding the next ids `[B]` one position at a time; all else is as `steps` has it."""
    for _, tokens, _ in steps(model, prompts, max_new_tokens, **rules):
        yield tokens


@torch.inference_mode()
def steps(
    model: GPT, prompts: Tensor | Sequence[Sequence[int]], max_new_tokens: int, *,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, numbers: Sequence[int] | None = None,
    use_cache: bool = True, decoder: Decoder | None = None, done: Container[int] = (),
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Continue `prompts`, `[B, T]` or rows of any lengths: yields which rows, their next ids `[B]`, and the logits `[B, V]`.

    `top_k=0` and `top_p=1` switch those rules off. What is drawn is a function of the seed and of the row's number (its
    place, or what `numbers` say): the same with and without a cache, alone and in a batch (in fp32; with fewer bits without
    a cache, and in a batch by other kernels than ours, last digits differ). No other random stream is touched. A `decoder`
    made before spares making one. Raises ValueError for a prompt without tokens.

    A caller can add rows to `done` whose next ids it does not want. They leave the batch, and the last ones take their
    places; only where that would save nothing they still come. It ends when all are done.
    """
    texts = [list(row) for row in (prompts.tolist() if isinstance(prompts, Tensor) else prompts)]
    if not all(texts):
        raise ValueError("The prompt has no tokens: generation continues at least one.")
    device = model.wte.weight.device
    rows = list(range(len(texts)))
    streams = [random.Random(f"{seed} {number}") for number in numbers or rows]
    was_training = model.training
    model.eval()
    try:
        if use_cache:
            decoder = decoder or Decoder(model)
            decoder.begin(texts, max_new_tokens)
        for _ in range(max_new_tokens):
            logits = decoder.next_logits(texts) if use_cache else uncached_logits(model, texts)
            draws = torch.tensor([1 - stream.random() for stream in streams], device=device)
            tokens = pick(logits, temperature, top_k, top_p, draws)
            for text, token in zip(texts, tokens.tolist(), strict=True):
                text.append(token)
            yield rows.copy(), tokens, logits
            leaving = [place for place, row in enumerate(rows) if row in done]
            if len(leaving) == len(rows):
                return
            if use_cache and not decoder.can_drop:
                continue
            for place in reversed(leaving):
                for held in (rows, texts, streams):
                    held[place] = held[-1]  # the last one takes its place
                    held.pop()
                if use_cache:
                    decoder.drop(place)
    finally:
        model.train(was_training)


def uncached_logits(model: GPT, texts: list[list[int]]) -> Tensor:
    """Logits `[B, V]` behind `texts`, each window read as a whole; those of one length together."""
    logits = torch.empty(len(texts), model.config.vocab_size, device=model.wte.weight.device)
    for length in set(map(len, texts)):
        rows = [row for row, text in enumerate(texts) if len(text) == length]
        start = window_start(length, model.config.block_size)
        window = torch.tensor([texts[row][start:] for row in rows], device=logits.device)
        with native_autocast(model):
            logits[rows] = model.head(model.features(window)[:, -1]).float()
    return logits
