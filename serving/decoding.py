"""Continuous batching: a thread that decodes the requests for a model together.

The sequences of a request join the batch between two steps and leave it when they have ended, so a
request waits for room, but never for the end of another one. Knows no HTTP and no JSON.
"""

import asyncio
import queue
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from conf.sampling import SamplingConfig
from data.tokenizer import Tokenizer
from generation.decoder import Decoder
from generation.engine import Completion, Engine
from generation.inspection import most_likely
from generation.sampling import Batch, Row
from serving.fields import Refused
from training.device import Device

# The number of tokens of prompts after which the next step begins.
PREFILL_TOKENS = 512


@dataclass(frozen=True)
class Token:
    """A token with its log probability, and those of the most likely ones, by their ids."""

    id: int
    # The number of characters of the completion before its text; negative in an echo.
    offset: int
    # None for the first token of an echo, which nothing predicts.
    logprob: float | None
    top: dict[int, float] | None


@dataclass(frozen=True)
class Piece:
    """What one sequence of a generation has grown by. The last piece has a reason."""

    index: int
    text: str
    tokens: list[Token]
    # The number of tokens of the sequence so far.
    n_tokens: int
    # "", "length", "stop" or "end_of_text".
    reason: str


@dataclass(eq=False)
class Generation:
    """The sequences of one request: prompts, each with the number of its sample.

    Ends before the first of the texts `stops`. `top` is the number of likely tokens that each
    token has; None: no log probabilities. If it does not stream, each sequence is one piece.
    """

    jobs: Sequence[tuple[list[int], int]]
    rules: SamplingConfig
    stops: Sequence[str] = ()
    top: int | None = None
    streams: bool = False
    # Whether the client has gone; its sequences then leave the batch.
    cancelled: bool = False
    received: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.n_open = len(self.jobs)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Its pieces until all sequences have ended. Raises the exception that ended them."""
        n_ended = 0
        while n_ended < len(self.jobs):
            piece = await self.received.get()
            if isinstance(piece, Exception):
                raise piece
            n_ended += bool(piece.reason)
            yield piece


class Sample(Row):
    """A row of the batch: one sequence of a generation, and its text so far."""

    def __init__(self, generation: Generation, index: int, tokenizer: Tokenizer) -> None:
        prompt, number = generation.jobs[index]
        super().__init__(list(prompt), generation.rules, number, index)
        self.generation, self.completion = generation, Completion(tokenizer, *generation.stops)
        self.n_shown = 0
        self.tokens: list[Token] = []

    def add(self, token: int, logits: Tensor) -> Piece | None:
        """Count a token that the batch has added. Returns the text that it completes."""
        generation, completion = self.generation, self.completion
        if generation.top is not None:
            logprobs = logits.float().log_softmax(-1)
            top = most_likely(logprobs, generation.top)
            self.tokens.append(Token(token, len(completion.text), logprobs[token].item(), top))
        completion.add(token)
        if len(completion.tokens) == self.rules.max_new_tokens:
            completion.finish()
        if not generation.streams and not completion.finished:
            return None
        text = completion.printable()
        reason = completion.reason if completion.finished else ""
        # Without the tokens of a stop, and of a character that is not complete.
        n_characters = len(text) + (reason == "end_of_text")
        tokens = [one for one in self.tokens if one.offset < n_characters]
        self.tokens = self.tokens[len(tokens) :]
        piece = Piece(self.index, text[self.n_shown :], tokens, len(completion.tokens), reason)
        self.n_shown = len(text)
        return piece if piece.text or reason else None


class DecodingThread(threading.Thread):
    """The thread that uses the models: opens them, decodes, and runs other functions of them.

    All in one thread, for OpenMP has a team of threads for each thread that computes. Teams with
    more threads than there are processors wait for their next work in the kernel, not by spinning:
    a step of a small model took 2.5 times as long once the main thread had opened the model.
    """

    def __init__(self, device: Device) -> None:
        super().__init__(daemon=True)
        self.device = device
        self.batchers: list[Batcher] = []
        # What it runs next, in order; None ends it.
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.stopped = False

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run a function between two steps."""
        future: Future[Any] = Future()
        self.inbox.put(partial(fulfil, future, function))
        return future

    def stop(self) -> None:
        """End all requests. A signal may call it at any time."""
        self.stopped = True
        self.inbox.put(None)

    def run(self) -> None:
        """Run what is in the inbox until `stop`."""
        # Autocast is a setting of a thread.
        with self.device.autocast():
            for function in iter(self.inbox.get, None):
                function()
        for batcher in self.batchers:
            batcher.end_all(stopped())


def fulfil(future: Future[Any], function: Callable[[], Any]) -> None:
    """Call a function for a future, unless nobody waits for it any more."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)


def stopped() -> Refused:
    return Refused("The server was stopped.", code="stopped", status=503)


class Batcher:
    """Decodes up to `rows` sequences of a model at once, of up to `max_requests` open requests."""

    def __init__(self, thread: DecodingThread, engine: Engine, decoder: Decoder | None, rows: int,
                 max_requests: int) -> None:
        self.thread, self.engine, self.decoder = thread, engine, decoder
        self.rows, self.max_requests = rows, max_requests
        self.waiting: deque[Generation] = deque()
        # What was submitted and has not ended.
        self.open: set[Generation | Future[Any]] = set()
        self.new_batch()
        thread.batchers.append(self)

    # Called by the event loop, which is one for all requests

    def submit(self, generation: Generation) -> None:
        """Start a generation. Raises Refused as `hand_in` does."""
        self.loop = asyncio.get_running_loop()
        self.hand_in(generation, partial(self.start, generation))

    async def call(self, function: Callable[[], Any]) -> Any:
        """The result of a function that uses the model. Raises Refused as `hand_in` does."""
        future: Future[Any] = Future()
        self.hand_in(future, partial(fulfil, future, function))
        try:
            return await asyncio.wrap_future(future)
        finally:
            self.open.discard(future)

    def hand_in(self, task: Generation | Future[Any], function: Callable[[], None]) -> None:
        """Let the thread run `function`. Raises Refused with too many open, and after `stop`."""
        if len(self.open) >= self.max_requests:
            raise Refused(f"{self.max_requests} requests are open, which is the limit: try again "
                          "later.", code="too_many_requests", status=429)
        self.open.add(task)
        self.thread.inbox.put(function)
        # Afterwards, since a signal may come before.
        if self.thread.stopped:
            raise stopped()

    # Called by the thread

    def start(self, generation: Generation) -> None:
        """Let a generation wait for room. If it is alone, no step is in the inbox: begin one."""
        self.waiting.append(generation)
        if len(self.waiting) == 1 and not self.batch.rows:
            self.advance()

    def new_batch(self) -> None:
        self.batch = Batch(self.engine.model, self.decoder, self.rows,
                           self.engine.model.config.block_size)

    def advance(self) -> None:
        """Let sequences join, and add a token to each. A failure ends all requests."""
        try:
            self.admit()
            if self.batch.rows:
                self.step()
        except Exception as error:
            # A ValueError says that the model's output is not finite.
            if not isinstance(error, ValueError):
                traceback.print_exc()
            self.end_all(error)
            self.new_batch()
        # First what the inbox has.
        if self.batch.rows or self.waiting:
            self.thread.inbox.put(self.advance)

    def admit(self) -> None:
        """Let generations that wait join in their order, while there is room.

        The sequences of the others do not grow while prompts are read, so that the rest waits for
        the next step once the prompts have PREFILL_TOKENS tokens.
        """
        for generation in [one for one in self.waiting if one.cancelled]:
            self.waiting.remove(generation)
            self.open.discard(generation)
        n_tokens = 0
        while self.waiting and n_tokens < PREFILL_TOKENS:
            generation = self.waiting[0]
            if len(self.batch.rows) + len(generation.jobs) > self.rows:
                return
            self.waiting.popleft()
            for index, (prompt, _) in enumerate(generation.jobs):
                self.batch.join(Sample(generation, index, self.engine.tokenizer))
                n_tokens += len(prompt)

    def step(self) -> None:
        """Add a token to each sequence. Those that have ended leave the batch."""
        tokens, logits = self.batch.step()
        tokens, pieces = tokens.tolist(), []
        try:
            # From the last one on, since the last one takes the place of one that leaves.
            for place in reversed(range(len(tokens))):
                sample = self.batch.rows[place]
                generation = sample.generation
                piece = sample.add(tokens[place], logits[place])
                if piece:
                    pieces.append((generation, piece))
                if sample.completion.finished or generation.cancelled:
                    self.batch.leave(place)
                    generation.n_open -= 1
                    if not generation.n_open:
                        self.open.discard(generation)
        finally:
            # A generation that has ended is not open any more, so a failure does not reach it.
            self.hand_over(pieces)

    def hand_over(self, pieces: Sequence[tuple[Generation, Piece | Exception]]) -> None:
        """Give pieces to those who wait for them. Waking the event loop is slow: once a step."""
        def put() -> None:
            for generation, piece in pieces:
                generation.received.put_nowait(piece)

        # A loop that is closed has nobody who waits.
        if pieces:
            with suppress(RuntimeError):
                self.loop.call_soon_threadsafe(put)

    def end_all(self, error: Exception) -> None:
        """End all generations with an exception. Functions are still called."""
        # A copy, for the event loop may add to it meanwhile.
        generations = [task for task in self.open.copy() if isinstance(task, Generation)]
        self.hand_over([(generation, error) for generation in generations])
        self.open.difference_update(generations)
        self.waiting.clear()
