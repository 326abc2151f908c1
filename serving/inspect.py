"""Look inside a model: the loss of each token of a text, the next token, and attention.

Knows no HTTP. All use the model, so they run in its thread.
"""

from __future__ import annotations

import math

import torch

from generation.inspection import attention_weights, next_tokens, predictions, token_label
from generation.sampling import finite
from report.attention import max_tokens, page_data
from serving.answers import Json, token_text
from serving.fields import BadRequest, Fields
from serving.tasks import Model, encoded

MAX_TOKENS = 2048  # of a text; decoding waits while it is read
MAX_ATTENTION = 128  # tokens of a picture
N_TOP, N_NEXT = 10, 15


async def losses(model: Model, fields: Fields) -> Json:
    """The loss of each token of `text`, its alternatives, and the most likely next tokens."""
    ids = text_ids(model, fields)
    if len(ids) > MAX_TOKENS:
        raise BadRequest(f"The text has {len(ids):,} tokens, and the limit is {MAX_TOKENS:,}: "
                         "shorten it.", "text")
    return await model.batcher.call(lambda: losses_of(model, ids))


def losses_of(model: Model, ids: list[int]) -> Json:
    tokenizer = model.engine.tokenizer
    *before, last = predictions(model.engine.model, ids, N_NEXT)
    # An end of text that precedes the text predicts its first token.
    start = int(ids[0] == tokenizer.end_of_text)
    tokens = []
    if not start:
        tokens.append({"text": token_text(tokenizer, ids[0]), "logprob": None, "top": []})
    for token, found in zip(ids[1:], before, strict=True):
        top = [(token_text(tokenizer, id), value) for id, value in found.top.items()][:N_TOP]
        tokens.append({"text": token_text(tokenizer, token), "logprob": found.logprob, "top": top})
    total = -math.fsum(found.logprob for found in before)
    n_bytes = len(tokenizer.decode_bytes(ids[1:]))
    following = [(token_text(tokenizer, id), value) for id, value in last.top.items()]
    return {"tokens": tokens, "next": following, "loss": total / max(1, len(before)),
            "bits_per_byte": total / math.log(2) / max(1, n_bytes)}


async def attention(model: Model, fields: Fields) -> Json:
    """The data of the attention page for the last tokens of `text`."""
    ids = text_ids(model, fields)
    return await model.batcher.call(lambda: attention_of(model, ids))


def attention_of(model: Model, ids: list[int]) -> Json:
    gpt, tokenizer = model.engine.model, model.engine.tokenizer
    config = gpt.config
    shown = ids[-min(MAX_ATTENTION, config.block_size,
                     max_tokens(config.n_layer, config.n_head)):]
    logits, weights = attention_weights(gpt, torch.tensor([shown], device=gpt.wte.weight.device))
    finite(logits)
    labels = [token_label(tokenizer, token) for token in shown]
    data = page_data(model.name, labels, weights.float().cpu().numpy(),
                     next_tokens(logits, tokenizer))
    return {"data": data, "left_out": len(ids) - len(shown)}


def text_ids(model: Model, fields: Fields) -> list[int]:
    """The token ids of `text`, after the end-of-text token where the tokenizer has one."""
    text, end_of_text = fields.take("text", ""), model.engine.tokenizer.end_of_text
    ids = encoded("text", model, text)
    if text and end_of_text is not None:
        ids = [end_of_text, *ids]
    return ids
