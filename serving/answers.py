"""The JSON of OpenAI's API: completions, chat completions, their chunks, and errors.

Knows no HTTP.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from data.tokenizer import Tokenizer
from serving.decoding import Piece, Token

Json = dict[str, Any]

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
REASONS = {"length": "length", "stop": "stop", "end_of_text": "stop", "": None}


def error_json(message: str, status: int, param: str | None = None,
               code: str | None = None) -> Json:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": ERROR_TYPES.get(status, kind), "param": param,
             "code": code}
    return {"error": error}


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token. Bytes that are no character by themselves are escaped."""
    for word, special in tokenizer.special.items():
        if token == special:
            return word
    return tokenizer.decode_bytes((token,)).decode(errors="backslashreplace")


class Answer:
    """The JSON that answers one request for completions: whole, or chunk by chunk.

    `echoes` are the texts that precede the completions; their pieces come first.
    """

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], n: int,
                 echoes: Sequence[str] = ()) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.n_prompt = sum(map(len, prompts))
        self.n_tokens = [0] * len(prompts) * n
        self.echoes = echoes or [""] * len(self.n_tokens)
        self.texts = [""] * len(self.n_tokens)
        self.tokens: list[list[Token]] = [[] for _ in self.n_tokens]
        self.reasons = [""] * len(self.n_tokens)

    def add(self, piece: Piece) -> None:
        """Add a piece to the whole answer."""
        self.texts[piece.index] += piece.text
        self.tokens[piece.index] += piece.tokens
        self.n_tokens[piece.index] = piece.n_tokens
        self.reasons[piece.index] = piece.reason

    def to_json(self, has_logprobs: bool) -> Json:
        """The whole answer."""
        choices = []
        for index, text in enumerate(self.texts):
            choice = self.choice(index, text, self.reasons[index])
            if has_logprobs:
                choice["logprobs"] = self.logprobs(index, self.tokens[index])
            choices.append(choice)
        return self.object(self.whole, choices) | {"usage": self.usage()}

    def first_chunks(self) -> list[Json]:
        """The chunks before the first piece."""
        return []

    def chunk_of(self, piece: Piece, has_logprobs: bool) -> Json:
        self.n_tokens[piece.index] = piece.n_tokens
        choice = self.delta(piece)
        if has_logprobs:
            choice["logprobs"] = self.logprobs(piece.index, piece.tokens)
        return self.object(self.chunk, [choice])

    def last_chunk(self) -> Json:
        """A chunk of the usage alone."""
        return self.object(self.chunk, []) | {"usage": self.usage()}

    def object(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "choices": choices}

    def usage(self) -> Json:
        n_tokens = sum(self.n_tokens)
        return {"prompt_tokens": self.n_prompt, "completion_tokens": n_tokens,
                "total_tokens": self.n_prompt + n_tokens}

    def choice(self, index: int, text: str, reason: str) -> Json:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": REASONS[reason]}

    def delta(self, piece: Piece) -> Json:
        """The choice of a chunk."""
        return self.choice(piece.index, piece.text, piece.reason)

    def logprobs(self, index: int, tokens: Sequence[Token]) -> Json:
        start = len(self.echoes[index])
        return {
            "tokens": [self.text_of(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self.top_logprobs(token.top) for token in tokens],
            "text_offset": [start + token.offset for token in tokens],
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

    def choice(self, index: int, text: str, reason: str) -> Json:
        return {"index": index, "message": {"role": "assistant", "content": text},
                "logprobs": None, "finish_reason": REASONS[reason]}

    def first_chunks(self) -> list[Json]:
        choices = []
        for index in range(len(self.n_tokens)):
            delta = {"role": "assistant", "content": ""}
            choices.append({"index": index, "delta": delta, "logprobs": None,
                            "finish_reason": None})
        return [self.object(self.chunk, choices)]

    def delta(self, piece: Piece) -> Json:
        content = {"content": piece.text} if piece.text else {}
        return {"index": piece.index, "delta": content, "logprobs": None,
                "finish_reason": REASONS[piece.reason]}

    def logprobs(self, index: int, tokens: Sequence[Token]) -> Json:
        content = []
        for token in tokens:
            top = [self.one_logprob(id, logprob) for id, logprob in token.top.items()]
            content.append(self.one_logprob(token.id, token.logprob) | {"top_logprobs": top})
        return {"content": content}

    def one_logprob(self, token: int, logprob: float) -> Json:
        content = self.tokenizer.decode_bytes((token,))
        return {"token": self.text_of(token), "logprob": logprob, "bytes": list(content)}
