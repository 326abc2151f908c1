"""Serving clients at once beside one after another: tokens a second, time to the first token.

  python -m bench serve
  python -m bench serve run=NAME clients=32

The server is in a process of its own: serve.py with a run, or without one a model with random
weights. Each round asks for the same completions as streams, one after another and then from all
clients at once. The medians of the rounds are printed, and percentiles over all requests.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from bench.decode import SHAPES as GPT2_SHAPES
from bench.speed import SHAPES as SMALL_SHAPES
from bench.speed import median_ratio
from bench.timing import print_header, print_row, write_json
from scripts.server import running_server
from setting import FilePath, SettingsBase, setting

SHAPES = {"gpt2": GPT2_SHAPES["gpt2"], "modern": GPT2_SHAPES["modern"],
          "wide": replace(SMALL_SHAPES["wide"][0], block_size=256)}


@dataclass(frozen=True)
class ServeSettings(SettingsBase):
    """Settings of the benchmark of the server."""

    run: FilePath = setting("", "a run; empty: random weights")
    shape: Literal["gpt2", "modern", "wide"] = setting("gpt2", "of the random weights")
    clients: int = setting(16, "requests at once", ge=2, le=64)
    requests: int = setting(32, "of each side in a round", ge=2)
    prompt: int = setting(64, "tokens of a prompt", ge=1)
    tokens: int = setting(64, "tokens of a completion", ge=1)
    rounds: int = setting(3, "of both sides, in turn", ge=1)
    precision: Literal["auto", "fp32", "bf16"] = setting("auto", "as in serve.py")
    out: FilePath = setting("", "write the measurements as JSON")


class Answered(NamedTuple):
    """Measurements of one request."""

    first: float  # seconds to the first token
    tokens: int


class Side(NamedTuple):
    """Measurements of one side in one round."""

    rate: float  # tokens a second
    firsts: list[float]


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
    measured: dict[str, list[Side]] = {name: [] for name in sides}
    with server(settings) as address:
        port = urlsplit(address).port
        print(f"{settings.run or settings.shape}; {settings.requests} completions of "
              f"{settings.tokens} tokens, prompts of {settings.prompt}\n")
        # Warm up.
        asyncio.run(measure(port, settings, 2, 2))
        for _ in range(settings.rounds):
            for name, clients in sides.items():
                found = asyncio.run(measure(port, settings, clients, settings.requests))
                measured[name].append(found)
    print_header("clients", "tokens/s", "x", "first token p50, ms", "p95, ms")
    base = [side.rate for side in next(iter(measured.values()))]
    for name, found in measured.items():
        rates = [side.rate for side in found]
        firsts = sorted(first for side in found for first in side.firsts)
        print_row(name, f"{statistics.median(rates):,.0f}", f"{median_ratio(rates, base):.2f}",
                  f"{1000 * percentile(firsts, 50):.0f}", f"{1000 * percentile(firsts, 95):.0f}")
    write_json(settings.out, {name: [side._asdict() for side in found]
                              for name, found in measured.items()})
    return 0


def percentile(values: list[float], percent: int) -> float:
    """The smallest of the sorted `values` that at least `percent` percent do not exceed."""
    return values[-(-percent * len(values) // 100) - 1]


def server(settings: ServeSettings) -> AbstractContextManager[str]:
    """The address of the server to measure, while it runs."""
    options = [f"batch_size={settings.clients}", f"precision={settings.precision}"]
    if settings.run:
        return running_server([f"run={settings.run}", *options])
    start = f"from bench.serve import serve_random; serve_random({settings.shape!r})"
    return running_server(options, ["-c", start])


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


async def measure(port: int, settings: ServeSettings, clients: int, requests: int) -> Side:
    """Ask for completions from a number of clients at once."""
    left = iter(range(requests))
    answers: list[Answered] = []

    async def client() -> None:
        for number in left:
            answers.append(await ask(port, settings, number))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    rate = sum(answer.tokens for answer in answers) / seconds
    return Side(rate, [answer.first for answer in answers])


async def ask(port: int, settings: ServeSettings, number: int) -> Answered:
    """Read one stream to its end. A request's number decides its prompt."""
    prompt = [(31 * number + 7 * place) % 20 for place in range(settings.prompt)]
    body = json.dumps({"prompt": prompt, "max_tokens": settings.tokens, "seed": number,
                       "stream": True, "stream_options": {"include_usage": True}})
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
                 f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                 f"{body}".encode())
    first, last = 0.0, b""
    async for line in reader:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - start
            last = line
    writer.close()
    usage = json.loads(last.removeprefix(b"data: ")).get("usage")
    if not usage:
        raise ValueError(f"The server answered {last.decode()[:200]}")
    return Answered(first, usage["completion_tokens"])
