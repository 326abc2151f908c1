"""The log probabilities of continuations, where beginnings that requests share are read once.

Requests that begin alike form a tree of tokens, which is one row of a batch: a token attends to
those on the way from the root. Shapes: B rows, T tokens of a row, N scored tokens, C width.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import atomic
from generation.engine import Engine
from model.attention import attend
from progress import ProgressBar

# The number of positions whose logits are in memory at once.
MAX_POSITIONS = 256
# Requests form a tree if they have this number of tokens in common, and this part of the inputs.
LEAST_SHARED = 8
LEAST_PART_SHARED = 0.2
# A token attends to all tokens of its tree by a mask, so that large trees are slow.
MAX_TREE = 512


@dataclass(frozen=True)
class Request:
    """The tokens of a context and a continuation, without the last one, and the continuation."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    # Whether the request is longer than the context of the model, and its beginning left out.
    is_cut: bool = False


@dataclass(frozen=True)
class Score:
    """The log probability of a continuation in nats, and whether each token is the likeliest."""

    logprob: float
    is_greedy: bool


@dataclass
class Tree:
    """The inputs of requests as one tree; those of a single request are a chain.

    `parents` has the number of the token before each token, -1 for the first; `depths` its position
    in the requests.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    # For each request, its number and those of the tokens whose logits predict its targets.
    requests: list[tuple[int, list[int]]] = field(default_factory=list)
    numbers: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, number: int, request: Request) -> None:
        path = [-1]
        for depth, token in enumerate(request.inputs):
            step = path[-1], token
            if step not in self.numbers:
                self.numbers[step] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(path[-1])
                self.depths.append(depth)
            path.append(self.numbers[step])
        self.requests.append((number, path[-len(request.targets) :]))

    @property
    def is_chain(self) -> bool:
        return len(self.requests) == 1


class TreeAttention:
    """The attention context of a batch of trees: a token attends to those before it in a request.

    Padding attends to itself only.
    """

    def __init__(self, trees: Sequence[Tree], length: int, device: torch.device) -> None:
        positions = torch.zeros(len(trees), length, dtype=torch.long)
        mask = torch.eye(length, dtype=torch.bool).repeat(len(trees), 1, 1)
        for row, tree in enumerate(trees):
            positions[row, : len(tree.depths)] = torch.tensor(tree.depths)
            attended = mask[row].numpy()
            for number, parent in enumerate(tree.parents):
                if parent >= 0:
                    attended[number, :number] = attended[parent, :number]
        self.positions = positions.to(device)  # [B, T]
        self.mask = mask[:, None].to(device)  # [B, 1, T, T]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        return attend(q, k, v, self.mask, dropout)


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
    return request_of(engine, ids, len(before))


def request_of(engine: Engine, ids: Sequence[int], n_context: int) -> Request:
    """The request whose first `n_context` tokens are the context."""
    # Where context and continuation are one token together, it is scored.
    first = min(n_context, len(ids) - 1)
    kept = ids[-(engine.model.config.block_size + 1) :]
    targets = kept[-min(len(ids) - first, len(kept) - 1) :]
    return Request(tuple(kept[:-1]), tuple(targets), len(kept) < len(ids))


class FinishedScores:
    """A file of the scores so far, so that an evaluation that was interrupted resumes.

    A line has a hash of the weights, the precision and the tokens of a request, and its score.
    """

    def __init__(self, path: Path, weights: str, precision: str) -> None:
        self.model = f"{weights} {precision}"
        self.scores: dict[str, Score] = {}
        self.file = atomic.LineFile(path)
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, TypeError):
                key, logprob, is_greedy = json.loads(line)
                self.scores[key] = Score(float(logprob), bool(is_greedy))

    def key(self, request: Request) -> str:
        text = f"{self.model} {request.inputs} {request.targets}"
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def find(self, request: Request) -> Score | None:
        return self.scores.get(self.key(request))

    def add(self, request: Request, score: Score) -> None:
        self.file.add(json.dumps([self.key(request), score.logprob, score.is_greedy]))


@dataclass
class Scorer:
    """Scores the requests of one model, up to `batch_tokens` tokens at once."""

    engine: Engine
    batch_tokens: int
    finished: FinishedScores | None = None

    def score(self, requests: Sequence[Request], title: str) -> list[Score]:
        """The score of each request. What several requests begin with is read once."""
        scores: dict[int, Score] = {}
        if self.finished:
            for number, request in enumerate(requests):
                found = self.finished.find(request)
                if found:
                    scores[number] = found
        left = [number for number in range(len(requests)) if number not in scores]
        with ProgressBar(total=len(requests), initial=len(scores), desc=title, unit="requests",
                         leave=False) as bar:
            for trees in batches(plant(self.engine, requests, left), self.batch_tokens):
                new = score_batch(self.engine, trees, requests)
                if self.finished:
                    for number, one in new.items():
                        self.finished.add(requests[number], one)
                scores |= new
                bar.update(len(new))
        return [scores[number] for number in range(len(requests))]


def plant(engine: Engine, requests: Sequence[Request], numbers: Sequence[int]) -> list[Tree]:
    """The trees of the requests with these numbers."""
    # An n-gram embedding takes the tokens before it in the row for those before it in the text.
    most = MAX_TREE if engine.model.config.ngrams == 1 else 0
    trees: list[Tree] = []
    before: tuple[int, ...] = ()
    # In this order, a request has no longer beginning in common with another than the one before.
    for number in sorted(numbers, key=lambda number: requests[number].inputs):
        inputs = requests[number].inputs
        shared = shared_length(before, inputs)
        least = max(LEAST_SHARED, LEAST_PART_SHARED * len(inputs))
        if shared < least or len(trees[-1].tokens) + len(inputs) - shared > max(most, len(inputs)):
            trees.append(Tree())
        trees[-1].add(number, requests[number])
        before = inputs
    return trees


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of tokens that two sequences begin with."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length


def batches(trees: list[Tree], batch_tokens: int) -> Iterator[list[Tree]]:
    """Trees that are read together; with padding at most `batch_tokens`, but at least one tree."""
    batch: list[Tree] = []
    # The longest first: if memory does not suffice, that shows at once.
    for tree in sorted(trees, key=lambda tree: (tree.is_chain, -len(tree.tokens))):
        if batch and (tree.is_chain != batch[0].is_chain
                      or (len(batch) + 1) * len(batch[0].tokens) > batch_tokens):
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


@torch.inference_mode()
def score_batch(engine: Engine, trees: Sequence[Tree],
                requests: Sequence[Request]) -> dict[int, Score]:
    """The scores of the requests of some trees, by their numbers in `requests`."""
    device, length = engine.device, len(trees[0].tokens)
    ids = torch.zeros((len(trees), length), dtype=torch.long)
    # Each place in the batch with a target that it predicts; requests can have them in common.
    pairs: dict[tuple[int, int], None] = {}
    places: dict[int, list[tuple[int, int]]] = {}
    for row, tree in enumerate(trees):
        # Padding on the right is not attended to.
        ids[row, : len(tree.tokens)] = torch.tensor(tree.tokens)
        for number, path in tree.requests:
            targets = requests[number].targets
            places[number] = [(row * length + column, target)
                              for column, target in zip(path, targets, strict=True)]
            pairs |= dict.fromkeys(places[number])
    ordered = sorted(pairs)
    context = None
    if not trees[0].is_chain:
        context = TreeAttention(trees, length, device.torch)
    with device.autocast():
        features = engine.model.features(ids.to(device.torch), context=context)
        found = token_scores(engine, features.flatten(0, 1), ordered)
    of_pair = dict(zip(ordered, found, strict=True))
    scores = {}
    for number, of_request in places.items():
        logprobs, is_greedy = zip(*(of_pair[pair] for pair in of_request), strict=True)
        scores[number] = Score(math.fsum(logprobs), all(is_greedy))
    return scores


def token_scores(engine: Engine, features: Tensor,
                 pairs: Sequence[tuple[int, int]]) -> list[tuple[float, bool]]:
    """For sorted pairs of a row of features `[N, C]` and a target: its log probability, and
    whether it is the likeliest token."""
    scored = sorted({row for row, _ in pairs})
    features = features[torch.tensor(scored, device=features.device)]
    found: list[tuple[float, bool]] = []
    for start in range(0, len(scored), MAX_POSITIONS):
        rows = scored[start : start + MAX_POSITIONS]
        chunk = pairs[bisect_left(pairs, (rows[0],)) : bisect_left(pairs, (rows[-1] + 1,))]
        index = torch.tensor([bisect_left(rows, row) for row, _ in chunk])
        targets = torch.tensor([target for _, target in chunk])
        logits = engine.model.head(features[start : start + MAX_POSITIONS]).float()
        logprobs = logits[index, targets] - logits.logsumexp(1)[index]
        is_greedy = logits.argmax(1)[index] == targets.to(logits.device)
        found += zip(logprobs.tolist(), is_greedy.tolist(), strict=True)
    return found
