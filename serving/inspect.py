"""Look inside a model: the loss of each token of a text, the next token, and attention.

Knows no HTTP. All use the model, so its thread runs them.
"""

import math

from data.tokenizer import Tokenizer
from generation.inspection import Prediction, attention_picture, predictions
from report.attention import max_tokens, page_data
from serving.answers import Json, token_text
from serving.fields import Fields, Refused
from serving.tasks import Model, encoded

MAX_TOKENS = 2048  # of a text; decoding waits while it is read
MAX_ATTENTION = 128  # tokens of a picture
N_TOP, N_NEXT = 10, 15


def losses(model: Model, fields: Fields) -> Json:
    """The loss of each token of `text`, its alternatives, and the most likely next tokens."""
    ids = text_ids(model, fields)
    if len(ids) > MAX_TOKENS:
        raise Refused(f"The text has {len(ids):,} tokens, and the limit is {MAX_TOKENS:,}: "
                      "shorten it.", "text")
    tokenizer = model.engine.tokenizer
    *before, last = predictions(model.engine.model, ids, N_NEXT)
    tokens = []
    for token, found in zip(ids, [Prediction(None, {}), *before], strict=True):
        tokens.append({"text": token_text(tokenizer, token), "logprob": found.logprob,
                       "top": as_texts(found.top, tokenizer)[:N_TOP]})
    # The end of text that precedes the text is no part of it.
    if ids[0] == tokenizer.end_of_text:
        tokens.pop(0)
    total = -math.fsum(found.logprob for found in before)
    n_bytes = len(tokenizer.decode_bytes(ids[1:]))
    return {"tokens": tokens, "next": as_texts(last.top, tokenizer),
            "loss": total / max(1, len(before)),
            "bits_per_byte": total / math.log(2) / max(1, n_bytes)}


def as_texts(top: dict[int, float], tokenizer: Tokenizer) -> list[tuple[str, float]]:
    return [(token_text(tokenizer, token), value) for token, value in top.items()]


def attention(model: Model, fields: Fields) -> Json:
    """The data of the attention page for the last tokens of `text`."""
    ids = text_ids(model, fields)
    gpt, config = model.engine.model, model.engine.model.config
    on_a_page = max_tokens(config.n_layer, config.n_head)
    shown = ids[-min(MAX_ATTENTION, config.block_size, on_a_page) :]
    data = page_data(model.name, *attention_picture(gpt, model.engine.tokenizer, shown))
    return {"data": data, "left_out": len(ids) - len(shown)}


def text_ids(model: Model, fields: Fields) -> list[int]:
    """The token ids of `text`, after the end-of-text token where the tokenizer has one."""
    text, end_of_text = fields.take("text", ""), model.engine.tokenizer.end_of_text
    ids = encoded("text", model, text)
    if text and end_of_text is not None:
        ids = [end_of_text, *ids]
    return ids
