"""Decoding beside nanoGPT's and transformers' `generate`: prefill, tokens a second, memory rate.

  python -m bench decode peer=../nanoGPT

All sides have the same weights and prompts. Each case runs in processes of its own, in turn, and
medians are printed. The rate counts the tokens after the first one. transformers is measured if it
is installed.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bench import peer as nanogpt
from bench import timing
from bench.timing import seconds_of
from conf.sampling import SamplingConfig
from generation import kernels
from generation.decoder import Decoder
from generation.sampling import generate
from hardware import native
from model import GPT, GPTConfig
from model.formats import config_to
from model.pretrained import weights_to
from setting import setting
from training.configure import keep_freed_memory

SAMPLING = {"temperature": 0.8, "top_k": 50}
RULES = SamplingConfig(**SAMPLING, top_p=1.0)
GPT2 = GPTConfig()
MODERN = replace(GPT2, position="rotary", norm="rms", qk_norm=True, activation="relu2", bias=False,
                 tie_head=False)
SHAPES = {
    "gpt2": GPT2,
    "gpt2-medium": replace(GPT2, n_layer=24, n_head=16, n_embd=1024),
    "modern": MODERN,
    "grouped": replace(MODERN, n_kv_head=4),
}
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
# Decodes a number of tokens after prompts `[B, T]`.
Decode = Callable[[Tensor, int], object]


class Case(NamedTuple):
    """One row of the table."""

    side: str
    precision: str
    batch: int


@dataclass(frozen=True)
class DecodeSettings(nanogpt.PeerSettings):
    """Settings of the benchmark of decoding."""

    shape: Literal["gpt2", "gpt2-medium", "modern", "grouped"] = setting("gpt2", "of the model")
    prompt: int = setting(768, "tokens that are given", ge=1)
    tokens: int = setting(192, "tokens that are decoded", ge=2)
    batch: int = setting(16, "sequences in the batched cases", ge=1)

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        yield from super().problems()
        block_size = SHAPES[self.shape].block_size
        if self.prompt + self.tokens > block_size:
            yield (f"prompt={self.prompt} and tokens={self.tokens} exceed the context of "
                   f"{block_size} tokens, where the sides behave differently.")


def main(settings: DecodeSettings) -> int:
    def measure_case(case: Case) -> dict[str, float]:
        return timing.measure_in_process("bench.decode", *case, settings.shape, settings.prompt,
                                         settings.tokens, settings.peer)

    bf16 = "native" if native("bf16") else "not native"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, bf16 {bf16}; "
          f"{settings.shape}, prompt of {settings.prompt}, {settings.tokens} tokens\n")
    timing.print_header("side", "precision", "batch", "prefill, s", "tokens/s",
                        "memory is read at, GB/s", "of that rate", "prepared in, s")
    runs = timing.in_turn(cases(settings), settings.rounds, measure_case)
    for case, measured in runs.items():
        median = timing.medians(measured)
        timing.print_row(case.side, case.precision, f"{case.batch}", f"{median['prefill']:.2f}",
                         f"{median['rate']:.1f}", f"{median['reading'] / 1e9:.0f}",
                         f"{median['of_reading']:.0%}", f"{median['prepare']:.2f}")
    timing.write_json(settings.out, [case._asdict() | {"runs": measured}
                                     for case, measured in runs.items()])
    return 0


def cases(settings: DecodeSettings) -> list[Case]:
    """The cases that are measured.

    The peers decode in bf16 only where the CPU has it natively: emulated it is 30 times as slow.
    """
    batch_precision = "bf16" if native("bf16") else "fp32"
    in_batch = batch_precision, settings.batch
    found: list[Case] = []
    if SHAPES[settings.shape].position == "learned":
        if settings.peer:
            found.append(Case("nanogpt", "fp32", 1))
        if importlib.util.find_spec("transformers"):
            for precision, batch in (("fp32", 1), (batch_precision, 1), in_batch):
                found.append(Case("transformers", precision, batch))
    singles = [("fp32", 1), ("bf16", 1)]
    if kernels.available():
        singles.append(("int8", 1))
    for precision, batch in (*singles, in_batch, ("bf16", settings.batch)):
        found.append(Case("ours", precision, batch))
    return list(dict.fromkeys(found))


def measure(
    side: str, precision: str, batch: int, shape: str, prompt: int, tokens: int, peer: str
) -> dict[str, float]:
    """Time one side in this process."""
    config = SHAPES[shape]
    torch.manual_seed(0)
    keep_freed_memory()
    model = GPT(config).eval()
    prompts = torch.randint(config.vocab_size, (batch, prompt))
    # nanoGPT has no cache: each token costs as much as the whole context.
    if side == "nanogpt":
        tokens = min(tokens, 4)
    start = time.perf_counter()
    decode = open_side(side, model, precision, peer)
    preparing = time.perf_counter() - start

    # Warm up.
    decode(prompts, 2)
    # The memory rate of a shared machine changes, so it is measured before and after.
    before = read_rate()
    prefill = seconds_of(decode, prompts, 1)
    whole = seconds_of(decode, prompts, tokens)
    reading = statistics.mean([before, read_rate()])

    rate = batch * (tokens - 1) / (whole - prefill)
    read = rate / batch * bytes_read(model, precision, batch, prompt + tokens / 2)
    return {"prepare": preparing, "prefill": prefill, "rate": rate, "reading": reading,
            "of_reading": read / reading}


def bytes_read(model: GPT, precision: str, batch: int, context: float) -> float:
    """Bytes of weights and of cached keys and values that one decoding step reads."""
    config = model.config
    weights = sum(each.numel() for each in model.h.parameters()) + model.head_weight.numel()
    cached = config.n_layer * 2 * batch * config.kv_heads * config.head_width * context
    cache_bytes = 4 if precision == "fp32" else 2
    return weights * WEIGHT_BYTES[precision] + cached * cache_bytes


def read_rate() -> float:
    """The highest rate at which a sum over 400 MB reads memory, in bytes per second."""
    return timing.best_rate(4e8, torch.ones(100_000_000).sum)


def open_side(side: str, model: GPT, precision: str, peer: str) -> Decode:
    """The decoding function of a side, with the weights of `model`."""
    if side == "nanogpt":
        other = nanogpt.build_model(Path(peer), model.config).eval()
        weights = {f"transformer.{name}": each for name, each in model.state_dict().items()}
        # Some versions also store attention masks.
        other.load_state_dict(weights | {"lm_head.weight": model.head_weight}, strict=False)
        return lambda prompts, tokens: other.generate(prompts, tokens, **SAMPLING)

    if side == "transformers":
        other = as_transformers(model, precision)
        return lambda prompts, tokens: other.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens,
            min_new_tokens=tokens, do_sample=True, pad_token_id=0, **SAMPLING)

    decoder = Decoder(model, precision)
    lower = nullcontext() if precision == "fp32" else torch.autocast("cpu", torch.bfloat16)

    def decode(prompts: Tensor, tokens: int) -> object:
        with lower:
            rules = replace(RULES, max_new_tokens=tokens)
            return list(generate(model, prompts, rules, decoder=decoder))

    return decode


def as_transformers(model: GPT, precision: str) -> Any:
    """GPT-2 of transformers with the weights of our model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(**config_to("gpt2", model.config))).eval()
    # Without the head, which it ties.
    other.load_state_dict(weights_to("gpt2", model.config, model.state_dict()), strict=False)
    return other.to(torch.bfloat16 if precision == "bf16" else torch.float32)
