"""Serving clients at once beside one after another: tokens a second, time to the first token.

  python -m bench serve
  python -m bench serve run=NAME clients=32

The server is in a process of its own: serve.py with a run, or without one a model with random
weights. Each round asks for the same completions as streams, one after another and then from all
clients at once. The medians of the rounds are printed, and percentiles over all requests.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from bench.decode import SHAPES as GPT2_SHAPES
from bench.speed import SHAPES as SMALL_SHAPES
from bench.timing import BenchSettings, in_turn, median_ratio, print_header, print_row, write_json
from scripts.server import PROGRAM, running_server
from setting import FilePath, setting

SHAPES = {"gpt2": GPT2_SHAPES["gpt2"], "modern": GPT2_SHAPES["modern"],
          "wide": replace(SMALL_SHAPES["wide"][0], block_size=256)}


@dataclass(frozen=True)
class ServeSettings(BenchSettings):
    """Settings of the benchmark of the server."""

    run: FilePath = setting("", "a run; empty: random weights")
    shape: Literal["gpt2", "modern", "wide"] = setting("gpt2", "of the random weights")
    clients: int = setting(16, "requests at once", ge=2, le=64)
    requests: int = setting(32, "of each side in a round", ge=2)
    prompt: int = setting(64, "tokens of a prompt", ge=1)
    tokens: int = setting(64, "tokens of a completion", ge=1)
    precision: Literal["auto", "fp32", "bf16"] = setting("auto", "as in serve.py")


class Words:
    """A tokenizer whose tokens all have the same text and end nothing."""

    end_of_text = None
    special: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def decode_bytes(self, ids: tuple[int, ...]) -> bytes:
        return b" word" * len(ids)


def main(settings: ServeSettings) -> int:
    sides = {"one after another": 1, f"{settings.clients} at once": settings.clients}
    options = [f"batch_size={settings.clients}", f"precision={settings.precision}"]
    program = ["-c", f"from bench.serve import serve_random; serve_random({settings.shape!r})"]
    if settings.run:
        program = [PROGRAM, f"run={settings.run}"]
    with running_server(options, program) as address:
        port = urlsplit(address).port
        print(f"{settings.run or settings.shape}; {settings.requests} completions of "
              f"{settings.tokens} tokens, prompts of {settings.prompt}\n")
        # Warm up.
        measure(port, settings, 2, 2)
        runs = in_turn(sides, settings.rounds, lambda side: measure(
            port, settings, sides[side], settings.requests))
    print_header("clients", "tokens/s", "x", "first token p50, ms", "p95, ms")
    for side, of_side in runs.items():
        rate = statistics.median(run["rate"] for run in of_side)
        ratio = median_ratio(of_side, runs["one after another"], "rate")
        firsts = np.concatenate([run["firsts"] for run in of_side])
        p50, p95 = 1000 * np.percentile(firsts, [50, 95], method="inverted_cdf")
        print_row(side, f"{rate:,.0f}", f"{ratio:.2f}", f"{p50:.0f}", f"{p95:.0f}")
    write_json(settings.out, runs)
    return 0


def serve_random(shape: str) -> None:
    """Serve a model with random weights, as serve.py does a run, by the settings in sys.argv."""
    import torch

    import serve
    from conf.schema import compose
    from conf.serving import ServeSettings
    from generation.engine import Engine
    from model import GPT

    def open_models(settings: ServeSettings, device: Any) -> serve.Opened:
        torch.manual_seed(0)
        model = GPT(SHAPES[shape]).to(device.torch)
        return {shape: (Engine(model, Words(model.config.vocab_size), device), [])}

    serve.serve(compose(ServeSettings, sys.argv[1:]), open_models)


def measure(port: int, settings: ServeSettings, clients: int, requests: int) -> dict[str, Any]:
    """Tokens a second to a number of clients at once, and seconds to the first token of each."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda number: ask(port, settings, number), range(requests)))
    seconds = time.perf_counter() - start
    return {"rate": sum(tokens for _, tokens in answers) / seconds,
            "firsts": [first for first, _ in answers]}


def ask(port: int, settings: ServeSettings, number: int) -> tuple[float, int]:
    """Read one stream to its end: seconds to the first token, and the number of tokens.

    A request's number decides its prompt.
    """
    prompt = [(31 * number + 7 * place) % 20 for place in range(settings.prompt)]
    body = json.dumps({"prompt": prompt, "max_tokens": settings.tokens, "seed": number,
                       "stream": True, "stream_options": {"include_usage": True}})
    start = time.perf_counter()
    connection = HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/completions", body,
                       {"Content-Type": "application/json", "Connection": "close"})
    first, last = 0.0, b""
    for line in connection.getresponse():
        # An event, or an error that is not one.
        if line.startswith((b"data: {", b"{")):
            first = first or time.perf_counter() - start
            last = line.removeprefix(b"data: ")
    usage = json.loads(last or b"{}").get("usage")
    if not usage:
        raise ValueError(f"The server answered {last.decode()[:200]}")
    return first, usage["completion_tokens"]
