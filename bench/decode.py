"""Measure decoding beside nanoGPT's and transformers' `generate`: `python -m bench.bench decode`.

The same weights and prompts, each case in a process of its own, in turn. A side's rate is of the tokens after the first.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import atomic
from bench.peer import nanogpt_module, peer_problems
from conf.schema import FilePath
from generation import kernels
from generation.decoder import Decoder
from generation.sampling import generate
from hardware import native
from model import GPT, GPTConfig
from training.device import keep_freed_memory

ROOT = Path(__file__).parent.parent
RULES = {"temperature": 0.8, "top_k": 50}
GPT2 = GPTConfig()
MODERN = replace(GPT2, position="rotary", norm="rms", qk_norm=True, activation="relu2", bias=False, tie_head=False)
SHAPES = {"gpt2": GPT2, "gpt2-medium": replace(GPT2, n_layer=24, n_head=16, n_embd=1024), "modern": MODERN,
          "grouped": replace(MODERN, n_kv_head=4)}


@dataclass(frozen=True)
class DecodeSettings:
    """What is decoded, and how often."""

    peer: FilePath = ""  # a nanoGPT checkout
    shape: Literal["gpt2", "gpt2-medium", "modern", "grouped"] = "gpt2"
    prompt: int = 768
    tokens: int = 192
    batch: int = 16
    rounds: int = 3
    out: FilePath = ""

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        yield from peer_problems(self.peer)
        for name, least in (("prompt", 1), ("tokens", 2), ("batch", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                yield f"{name}={getattr(self, name)} must be at least {least}."
        if self.prompt + self.tokens > SHAPES[self.shape].block_size:
            yield (f"prompt={self.prompt} and tokens={self.tokens} pass the block of {SHAPES[self.shape].block_size}, "
                   "behind which each side does something else.")


def cases(settings: DecodeSettings) -> list[tuple[str, str, int]]:
    """What is measured: side, precision and batch. The peers' bf16 only where a CPU has it: emulated
    it takes 30 times as long."""
    peers: list[tuple[str, str, int]] = []
    many = "bf16" if native("bf16") else "fp32"
    if SHAPES[settings.shape].position == "learned":
        if settings.peer:
            peers.append(("nanogpt", "fp32", 1))
        if importlib.util.find_spec("transformers"):
            peers += [("transformers", "fp32", 1), ("transformers", many, 1),
                      ("transformers", many, settings.batch)]
    precisions = ("fp32", "bf16", "int8") if kernels.available() else ("fp32", "bf16")
    ours = [("ours", precision, 1) for precision in precisions]
    return list(dict.fromkeys([*peers, *ours, ("ours", many, settings.batch),
                               ("ours", "bf16", settings.batch)]))


def decode(settings: DecodeSettings) -> int:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"bf16 {'native' if native('bf16') else 'not native'}; {settings.shape}, "
          f"prompt of {settings.prompt}, {settings.tokens} tokens\n\n"
          "| side | precision | batch | prefill, s | tokens/s | memory is read at, GB/s "
          "| of that rate | prepared in, s |\n" + "|---" * 8 + "|")
    runs: dict[tuple[str, str, int], list[dict[str, float]]] = {case: [] for case in cases(settings)}
    for _ in range(settings.rounds):
        for case, found in runs.items():
            found.append(in_a_process(case, settings))
    for (side, precision, rows), found in runs.items():
        middle = {name: statistics.median(run[name] for run in found) for name in found[0]}
        print(f"| {side} | {precision} | {rows} | {middle['prefill']:.2f} | {middle['rate']:.1f} "
              f"| {middle['reading'] / 1e9:.0f} | {middle['of_reading']:.0%} | {middle['prepare']:.2f} |", flush=True)
    if settings.out:
        measured = [{"side": side, "precision": precision, "batch": rows, "runs": found}
                    for (side, precision, rows), found in runs.items()]
        atomic.write_bytes(Path(settings.out), json.dumps(measured, indent=2).encode())
    return 0


def read_rate() -> float:
    """The most bytes a second that a sum of 400 MB reads."""
    values, best = torch.ones(100_000_000), 0.0
    for _ in range(6):
        start = time.perf_counter()
        values.sum()
        best = max(best, 4e8 / (time.perf_counter() - start))
    return best


def in_a_process(case: tuple[str, str, int], settings: DecodeSettings) -> dict[str, float]:
    call = f"from bench.decode import *; measure(*{case!r}, DecodeSettings(**{asdict(settings)!r}))"
    done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{case[0]}, {case[1]}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(side: str, precision: str, rows: int, settings: DecodeSettings) -> None:
    """Time one side in this process, and print it as JSON."""
    config = SHAPES[settings.shape]
    torch.manual_seed(0)
    keep_freed_memory()
    model = GPT(config).eval()
    prompts = torch.randint(config.vocab_size, (rows, settings.prompt))
    tokens = settings.tokens if side != "nanogpt" else min(settings.tokens, 4)
    start = time.perf_counter()
    peers = {"nanogpt": lambda: nanogpt(model, Path(settings.peer)), "transformers": lambda: transformers(model, precision)}
    run = peers[side]() if side in peers else our_side(model, precision)
    prepare = time.perf_counter() - start
    run(prompts, 2)  # warms up
    seconds, reading = [], [read_rate()]
    for count in (1, tokens):
        start = time.perf_counter()
        run(prompts, count)
        seconds.append(time.perf_counter() - start)
    reading.append(read_rate())  # before and after: on a shared machine it changes from second to second
    prefill, whole = seconds
    rate = rows * (tokens - 1) / (whole - prefill)
    weights = sum(each.numel() for each in model.h.parameters()) + model.head_weight.numel()
    held = config.n_layer * 2 * rows * config.kv_heads * config.head_width * (settings.prompt + tokens / 2)
    read = weights * {"fp32": 4, "bf16": 2, "int8": 1}[precision] + held * (4 if precision == "fp32" else 2)
    print(json.dumps({"prepare": prepare, "prefill": prefill, "rate": rate, "reading": statistics.mean(reading),
                      "of_reading": rate / rows * read / statistics.mean(reading)}))


def our_side(model: GPT, precision: str) -> Callable[[Tensor, int], object]:
    autocast = nullcontext() if precision == "fp32" else torch.autocast("cpu", torch.bfloat16)
    decoder = Decoder(model, precision)

    def run(prompts: Tensor, count: int) -> object:
        with autocast:
            return list(generate(model, prompts, count, decoder=decoder, **RULES))
    return run


def nanogpt(model: GPT, peer: Path) -> Callable[[Tensor, int], object]:
    module = nanogpt_module(peer)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    other = module.GPT(module.GPTConfig(**{name: getattr(model.config, name) for name in names})).eval()
    weights = {f"transformer.{name}": each for name, each in model.state_dict().items()}
    other.load_state_dict(weights | {"lm_head.weight": model.head_weight}, strict=False)  # some keep masks too
    return lambda prompts, count: other.generate(prompts, count, **RULES)


def transformers(model: GPT, precision: str) -> Callable[[Tensor, int], object]:
    other = as_transformers(model, precision)
    return lambda prompts, count: other.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count,
                                                 min_new_tokens=count, do_sample=True, pad_token_id=0, **RULES)


def as_transformers(model: GPT, precision: str) -> Any:
    """Their GPT-2 with our weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    shape = GPT2Config(vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
                       n_layer=config.n_layer, n_head=config.n_head)
    other = GPT2LMHeadModel(shape).eval()
    weights = {f"transformer.{name}": each.t() if ".c_" in name and each.dim() == 2 else each
               for name, each in model.state_dict().items()}
    other.load_state_dict(weights | {"lm_head.weight": model.head_weight})
    return other.to(torch.bfloat16 if precision == "bf16" else torch.float32)
