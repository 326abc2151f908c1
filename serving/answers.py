"""The JSON of OpenAI's API: completions, chat completions, their chunks, and errors.

Knows no HTTP.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from data.tokenizer import Tokenizer
from serving.decoding import Generation, Piece
from serving.fields import Refused

Json = dict[str, Any]

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
REASONS = {"length": "length", "stop": "stop", "end_of_text": "stop", "": None}


def error_json(error: Refused) -> Json:
    usual = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": str(error), "type": ERROR_TYPES.get(error.status, usual),
                      "param": error.param, "code": error.code}}


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token. Bytes that are no character by themselves are escaped."""
    for word, special in tokenizer.special.items():
        if token == special:
            return word
    return tokenizer.decode_bytes((token,)).decode(errors="backslashreplace")


class Answer:
    """The JSON that answers a request with the completions of a generation: whole, or in chunks.

    `n_prompt` is the number of tokens of its prompts. `echoes` are the texts that precede the
    completions; their pieces come first.
    """

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, generation: Generation, n_prompt: int,
                 echoes: Sequence[str] = ()) -> None:
        self.model, self.tokenizer, self.generation = model, tokenizer, generation
        self.n_prompt, self.echoes = n_prompt, echoes
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        # Of each sequence what has been added, or its last chunk.
        self.pieces = [Piece(index, "", [], 0, "") for index in range(len(generation.jobs))]

    def add(self, piece: Piece) -> None:
        """Add a piece to the whole answer."""
        known = self.pieces[piece.index]
        self.pieces[piece.index] = replace(piece, text=known.text + piece.text,
                                           tokens=known.tokens + piece.tokens)

    def to_json(self) -> Json:
        """The whole answer."""
        choices = [self.choice(piece, self.message(piece)) for piece in self.pieces]
        return self.object(self.whole, choices) | {"usage": self.usage()}

    def first_chunks(self) -> list[Json]:
        """The chunks before the first piece."""
        return []

    def chunk_of(self, piece: Piece) -> Json:
        self.pieces[piece.index] = piece
        return self.object(self.chunk, [self.choice(piece, self.delta(piece))])

    def last_chunk(self) -> Json:
        """A chunk of the usage alone."""
        return self.object(self.chunk, []) | {"usage": self.usage()}

    def object(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "choices": choices}

    def usage(self) -> Json:
        n_tokens = sum(piece.n_tokens for piece in self.pieces)
        return {"prompt_tokens": self.n_prompt, "completion_tokens": n_tokens,
                "total_tokens": self.n_prompt + n_tokens}

    def choice(self, piece: Piece, content: Json) -> Json:
        logprobs = None if self.generation.top is None else self.logprobs(piece)
        return {"index": piece.index, **content, "logprobs": logprobs,
                "finish_reason": REASONS[piece.reason]}

    def message(self, piece: Piece) -> Json:
        """The content of a choice."""
        return {"text": piece.text}

    def delta(self, piece: Piece) -> Json:
        """The content of a choice of a chunk."""
        return self.message(piece)

    def logprobs(self, piece: Piece) -> Json:
        start = len(self.echoes[piece.index]) if self.echoes else 0
        return {
            "tokens": [self.text_of(token.id) for token in piece.tokens],
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": [self.top_logprobs(token.top) for token in piece.tokens],
            "text_offset": [start + token.offset for token in piece.tokens],
        }

    def top_logprobs(self, top: dict[int, float] | None) -> Json | None:
        if top is None:
            return None
        return {self.text_of(id): logprob for id, logprob in top.items()}

    def text_of(self, token: int) -> str:
        return token_text(self.tokenizer, token)


class ChatAnswer(Answer):
    """The same for chat completions."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def message(self, piece: Piece) -> Json:
        return {"message": {"role": "assistant", "content": piece.text}}

    def first_chunks(self) -> list[Json]:
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [self.object(self.chunk, [self.choice(piece, delta) for piece in self.pieces])]

    def delta(self, piece: Piece) -> Json:
        return {"delta": {"content": piece.text} if piece.text else {}}

    def logprobs(self, piece: Piece) -> Json:
        content = []
        for token in piece.tokens:
            top = [self.one_logprob(id, logprob) for id, logprob in token.top.items()]
            content.append(self.one_logprob(token.id, token.logprob) | {"top_logprobs": top})
        return {"content": content}

    def one_logprob(self, token: int, logprob: float) -> Json:
        content = self.tokenizer.decode_bytes((token,))
        return {"token": self.text_of(token), "logprob": logprob, "bytes": list(content)}
