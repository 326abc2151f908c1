"""The log probabilities of continuations, where beginnings that requests share are read once.

Requests that begin alike form a tree of tokens: a token attends to those on the way from the root.
Several trees make up a row of a batch, so that there is little padding. Shapes: B rows, T tokens of
a row, N scored tokens, C width.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

import atomic
from generation.engine import Engine
from model.attention import attend
from progress import ProgressBar

# The number of positions whose logits are in memory at once.
MAX_POSITIONS = 128
# Requests form a tree if they have this number of tokens in common, and this part of the inputs.
LEAST_SHARED = 8
LEAST_PART_SHARED = 0.2
# Attention computes all pairs of tokens of a row and then masks them, so that long rows are slow.
MAX_TREE = 512
LEAST_ROW = 256


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
class Row:
    """The inputs of requests as trees of tokens in one row of a batch.

    `parents` has the place of the token before each token, -1 for the first; `depths` its position
    in the requests.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    # For each request, its number and the places of the tokens whose logits predict its targets.
    requests: list[tuple[int, list[int]]] = field(default_factory=list)
    places: dict[tuple[int, int], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, number: int, request: Request) -> None:
        path = [-1]
        for depth, token in enumerate(request.inputs):
            step = path[-1], token
            if step not in self.places:
                self.places[step] = len(self)
                self.tokens.append(token)
                self.parents.append(path[-1])
                self.depths.append(depth)
            path.append(self.places[step])
        self.requests.append((number, path[-len(request.targets) :]))

    def join(self, other: Row) -> None:
        """Put the trees of another row behind those of this one."""
        start = len(self)
        self.tokens += other.tokens
        self.depths += other.depths
        self.parents += [parent + start if parent >= 0 else -1 for parent in other.parents]
        for number, path in other.requests:
            self.requests.append((number, [place + start for place in path]))

    @property
    def is_causal(self) -> bool:
        """Whether each token attends to all tokens before it."""
        return len(self.requests) == 1


class TreeAttention:
    """The attention context of a batch: a token attends to those before it in its requests.

    Padding attends to itself only.
    """

    def __init__(self, rows: Sequence[Row], length: int, device: torch.device) -> None:
        # A token attends to itself and to those that its parent attends to.
        positions = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
        for number, row in enumerate(rows):
            positions[number, : len(row)] = torch.tensor(row.depths)
            attended = mask[number].numpy()
            for place, parent in enumerate(row.parents):
                if parent >= 0:
                    attended[place, :place] = attended[parent, :place]
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
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = atomic.LineFile(path)
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, TypeError, RecursionError, OverflowError):
                key, logprob, is_greedy = json.loads(line)
                self.scores[key] = Score(float(logprob), bool(is_greedy))

    def key(self, request: Request) -> str:
        text = f"{self.model} {request.inputs} {request.targets}"
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def add(self, key: str, score: Score) -> None:
        self.file.add(json.dumps([key, score.logprob, score.is_greedy]))


@dataclass
class Scorer:
    """Scores the requests of one model, up to `batch_tokens` tokens at once."""

    engine: Engine
    batch_tokens: int
    finished: FinishedScores | None = None

    def score(self, requests: Sequence[Request], title: str) -> list[Score]:
        """The score of each request. What several requests begin with is read once."""
        # Take the scores that an earlier evaluation left.
        scores: dict[int, Score] = {}
        keys: list[str] = []
        if self.finished:
            keys = [self.finished.key(request) for request in requests]
            for number, key in enumerate(keys):
                if key in self.finished.scores:
                    scores[number] = self.finished.scores[key]

        # Compute the others in batches.
        left = [number for number in range(len(requests)) if number not in scores]
        with ProgressBar(total=len(requests), initial=len(scores), desc=title, unit="requests",
                         leave=False) as bar:
            trees = build_trees(self.engine, requests, left)
            for rows in batches(pack_rows(trees), self.batch_tokens):
                new = score_batch(self.engine, rows, requests)
                if self.finished:
                    for number, one in new.items():
                        self.finished.add(keys[number], one)
                scores |= new
                bar.update(len(new))
        return [scores[number] for number in range(len(requests))]


def build_trees(engine: Engine, requests: Sequence[Request], numbers: Sequence[int]) -> list[Row]:
    """The trees of the requests with these numbers, each in a row of its own."""
    # An n-gram embedding takes the tokens before it in the row for those before it in the text.
    can_share = engine.model.config.ngrams == 1
    trees: list[Row] = []
    before: tuple[int, ...] = ()
    # In this order, a request has no longer beginning in common with another than the one before.
    for number in sorted(numbers, key=lambda number: requests[number].inputs):
        inputs = requests[number].inputs
        shared = shared_length(before, inputs) if can_share else 0
        is_alike = shared >= max(LEAST_SHARED, LEAST_PART_SHARED * len(inputs))
        if not is_alike or len(trees[-1]) + len(inputs) - shared > max(MAX_TREE, len(inputs)):
            trees.append(Row())
        trees[-1].add(number, requests[number])
        before = inputs
    return trees


def pack_rows(trees: list[Row]) -> list[Row]:
    """Rows of several trees: the largest one that is left, and those that fit behind it."""
    trees = sorted(trees, key=len)
    sizes = [len(tree) for tree in trees]
    rows: list[Row] = []
    while trees:
        row, size = trees.pop(), sizes.pop()
        most = max(size, LEAST_ROW)
        place = bisect_right(sizes, most - size) - 1
        while place >= 0:
            row.join(trees.pop(place))
            size += sizes.pop(place)
            place = bisect_right(sizes, most - size) - 1
        rows.append(row)
    return rows


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of tokens that two sequences begin with."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def batches(rows: list[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Rows that are read together; with padding at most `batch_tokens`, but at least one row."""
    batch: list[Row] = []
    # The longest first: if memory does not suffice, that shows at once.
    for row in sorted(rows, key=lambda row: (row.is_causal, -len(row))):
        is_full = batch and (len(batch) + 1) * len(batch[0]) > batch_tokens
        if is_full or (batch and row.is_causal != batch[0].is_causal):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.inference_mode()
def score_batch(engine: Engine, rows: Sequence[Row],
                requests: Sequence[Request]) -> dict[int, Score]:
    """The scores of the requests in some rows, by their numbers in `requests`."""
    device, length = engine.device, len(rows[0])
    ids = torch.zeros((len(rows), length), dtype=torch.long)
    # Each place in the flattened batch with a target that it predicts; requests can share them.
    pairs: set[tuple[int, int]] = set()
    pairs_of: dict[int, list[tuple[int, int]]] = {}
    for start, row in zip(range(0, ids.numel(), length), rows, strict=True):
        # Padding on the right is not attended to.
        ids[start // length, : len(row)] = torch.tensor(row.tokens)
        for number, path in row.requests:
            targets = requests[number].targets
            pairs_of[number] = [(start + place, target)
                                for place, target in zip(path, targets, strict=True)]
            pairs.update(pairs_of[number])

    # Read the batch once, and compute the logits only where a target is predicted.
    context = None
    if not rows[0].is_causal:
        context = TreeAttention(rows, length, device.torch)
    with device.autocast():
        features = engine.model.features(ids.to(device.torch), context=context)  # [B, T, C]
        found = token_scores(engine, features.flatten(0, 1), sorted(pairs))

    # A score is the sum over the targets of a request.
    scores = {}
    for number, own_pairs in pairs_of.items():
        logprobs, is_greedy = zip(*(found[pair] for pair in own_pairs), strict=True)
        scores[number] = Score(math.fsum(logprobs), all(is_greedy))
    return scores


def token_scores(engine: Engine, features: Tensor,
                 pairs: list[tuple[int, int]]) -> dict[tuple[int, int], tuple[float, bool]]:
    """The log probability of the target of each pair, and whether it is the likeliest token.

    `pairs` are sorted, and each has the number of a row of `features` `[N, C]` and a target.
    """
    scored = sorted({row for row, _ in pairs})
    features = features[torch.tensor(scored, device=features.device)]  # [number of rows, C]
    found: list[tuple[float, bool]] = []
    for start in range(0, len(scored), MAX_POSITIONS):
        # The pairs of these rows, by bisection, and the place of each among the rows.
        rows = scored[start : start + MAX_POSITIONS]
        chunk = pairs[bisect_left(pairs, (rows[0],)) : bisect_left(pairs, (rows[-1] + 1,))]
        index = torch.tensor([bisect_left(rows, row) for row, _ in chunk], device=features.device)
        targets = torch.tensor([target for _, target in chunk], device=features.device)
        logits = engine.model.head(features[start : start + MAX_POSITIONS]).float()  # [rows, V]
        # On CPUs, logsumexp takes seven times as long as log_softmax.
        logprobs = logits.log_softmax(1)[index, targets]
        is_greedy = logits.argmax(1)[index] == targets
        found += zip(logprobs.tolist(), is_greedy.tolist(), strict=True)
    return dict(zip(pairs, found, strict=True))
