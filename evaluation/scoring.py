"""The log probabilities of continuations, where beginnings that requests share are read once.

Requests that begin alike form a tree of tokens: a token attends to those on the way from the root.
The trees of a batch lie end to end, without padding. Shapes: T tokens of a batch, S tokens attended
to, N scored tokens, C width, H heads, G key-value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.result_cache import ResultCache
from generation.engine import Engine
from model.attention import AttentionContext, attend
from progress import ProgressBar

# Logits are computed for this number of positions at a time. On CPUs, more positions and a part of
# the vocabulary at a time take two thirds of the time.
ROWS = 128
ROWS_ON_CPUS, TOKENS_ON_CPUS = 1024, 4096
# A beginning is shared if it has this number of tokens, and this part of the request's.
LEAST_SHARED = 8
LEAST_PART_SHARED = 0.2
# The tokens whose attention is computed together, if they are several requests.
ROW_TOKENS = 256


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
class Batch:
    """Requests that are read together: their tokens `[T]`, each shared beginning only once.

    A token attends to its `parents`: the index of the token before it, that of the token before
    that, and so on; -1 is before the first. `depths` has its position in its requests.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    # For each request, by its number, the indices of the tokens that predict its targets.
    predicting: dict[int, list[int]] = field(default_factory=dict)
    # The tokens of the last request, and their indices.
    inputs: tuple[int, ...] = ()
    path: list[int] = field(default_factory=list)

    def n_shared(self, request: Request) -> int:
        """The number of tokens that a request begins with and that need not be read again."""
        pairs = zip(self.inputs, request.inputs, strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        # For a few tokens, attention to another row takes longer than reading them.
        return shared if shared >= max(LEAST_SHARED, LEAST_PART_SHARED * len(request.inputs)) else 0

    def add(self, number: int, request: Request) -> None:
        shared, start = self.n_shared(request), len(self.tokens)
        before, new = self.path[:shared], request.inputs[shared:]
        end = start + len(new)
        self.inputs, self.path = request.inputs, [*before, *range(start, end)]
        self.predicting[number] = self.path[-len(request.targets) :]
        self.tokens += new
        self.parents += [-1, *self.path][shared:-1]
        self.depths += range(shared, len(request.inputs))
        if not new:
            return
        # Attention computes all pairs of tokens of a row and then masks them: rows are short.
        if not self.rows or end - self.rows[-1].start > ROW_TOKENS:
            self.rows.append(Row(before, start))
        self.rows[-1].end = end
        self.rows[-1].n_requests += 1


@dataclass
class Row:
    """The tokens `start` to `end` of a batch; also those before it that its requests begin with."""

    before: list[int]
    start: int
    end: int = 0
    n_requests: int = 0


class TreeAttention(AttentionContext):
    """The attention context of a batch `[1, T]`, which computes each of its rows by itself."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self.positions = torch.tensor([batch.depths], device=device)
        # The n-grams of first tokens have no token before them, whatever index is there.
        self.parents = torch.tensor([batch.parents], device=device).clamp(min=0)
        self.rows: list[tuple[slice, slice | Tensor, Tensor | None]] = []
        for row in batch.rows:
            queries = slice(row.start, row.end)
            keys: slice | Tensor = queries
            if row.before:
                keys = torch.tensor([*row.before, *range(row.start, row.end)], device=device)
            # Without a mask, attention is causal, which skips half of the pairs.
            mask = None
            if row.n_requests > 1:
                mask = tree_mask(batch, row).to(device)
            self.rows.append((queries, keys, mask))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """Attention `[1, H, T, D]` of queries `[1, H, T, D]` to keys and values `[1, G, T, D]`."""
        parts = [attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], mask, dropout)
                 for queries, keys, mask in self.rows]
        return torch.cat(parts, dim=2)


def tree_mask(batch: Batch, row: Row) -> Tensor:
    """`[T, S]`, True where a token of a row attends to one of those before the row, or in it."""
    n_before, length = len(row.before), row.end - row.start
    mask = np.eye(length, n_before + length, n_before, dtype=bool)
    for index, parent in enumerate(batch.parents[row.start : row.end]):
        if parent >= row.start:
            # A token attends to itself and to those that its parent attends to.
            end = n_before + index
            mask[index, :end] = mask[parent - row.start, :end]
        else:
            mask[index, : batch.depths[row.start + index]] = True
    return torch.from_numpy(mask)


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
        # Where a token crosses the end of the context, the context alone has others.
        if len(ids) > len(before):
            ids[: len(before)] = before
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


@dataclass
class Scorer:
    """Scores the requests of one model, up to `batch_tokens` tokens at once."""

    engine: Engine
    batch_tokens: int
    cache: ResultCache = field(default_factory=ResultCache)

    @property
    def batch_size(self) -> int:
        """The number of whole contexts that are read at once."""
        return max(1, self.batch_tokens // self.engine.model.config.block_size)

    def score(self, requests: Sequence[Request], title: str) -> list[Score]:
        """The score of each request. What several requests begin with is read once."""
        # Those that are not in the cache are computed in batches.
        keys = [self.cache.key(request.inputs, request.targets) for request in requests]
        left = [number for number, key in enumerate(keys) if key not in self.cache.results]
        with ProgressBar(total=len(requests), initial=len(requests) - len(left), desc=title,
                         unit="requests", leave=False) as bar:
            for batch in batches(requests, left, self.batch_tokens):
                new = score_batch(self.engine, batch, requests)
                for number, score in new.items():
                    self.cache.add(keys[number], [score.logprob, score.is_greedy])
                bar.update(len(new))
        return [Score(*self.cache.results[key]) for key in keys]


def batches(requests: Sequence[Request], numbers: Sequence[int],
            batch_tokens: int) -> Iterator[Batch]:
    """The requests with these numbers, at most `batch_tokens` at once, but at least one request."""
    batch = Batch()
    # In this order, a request has no longer beginning in common with another than the one before.
    for number in sorted(numbers, key=lambda number: requests[number].inputs):
        request = requests[number]
        more = len(request.inputs) - batch.n_shared(request)
        if batch.tokens and len(batch.tokens) + more > batch_tokens:
            yield batch
            batch = Batch()
        batch.add(number, request)
    if batch.tokens:
        yield batch


@torch.inference_mode()
def score_batch(engine: Engine, batch: Batch, requests: Sequence[Request]) -> dict[int, Score]:
    """The scores of the requests in a batch, by their numbers in `requests`."""
    # Read the batch once, and score the targets of all requests.
    device = engine.device.torch
    targets = [requests[number].targets for number in batch.predicting]
    pairs = list(zip(chain(*batch.predicting.values()), chain(*targets), strict=True))
    indices, labels = torch.tensor(pairs, device=device).unbind(1)
    # A token may predict targets of several requests: its features are computed once.
    scored, rows = indices.unique(return_inverse=True)
    with engine.device.autocast():
        ids = torch.tensor([batch.tokens], device=device)
        context = TreeAttention(batch, device)
        features = engine.model.features(ids, context=context, at=scored)[0]  # [N, C]
        logprobs, is_greedy = token_scores(engine, features, rows, labels)

    # A score is the sum over the targets of a request.
    counts = list(map(len, targets))
    results = zip(logprobs.cpu().split(counts), is_greedy.cpu().split(counts), strict=True)
    return {number: Score(math.fsum(of_targets.tolist()), bool(greedy.all()))
            for number, (of_targets, greedy) in zip(batch.predicting, results, strict=True)}


def token_scores(engine: Engine, features: Tensor, rows: Tensor,
                 targets: Tensor) -> tuple[Tensor, Tensor]:
    """The log probabilities of `targets`, and whether each is the likeliest token.

    Target n is predicted by row `rows[n]` of the features `[N, C]`.
    """
    weight = engine.model.head_weight
    n_rows, parts = ROWS, [weight]
    if weight.is_cpu:
        n_rows, parts = ROWS_ON_CPUS, weight.split(TOKENS_ON_CPUS)
    logprobs = torch.empty(len(targets), device=targets.device)
    is_greedy = torch.empty_like(logprobs, dtype=torch.bool)
    for start in range(0, len(features), n_rows):
        own = (start <= rows) & (rows < start + n_rows)
        logprobs[own], is_greedy[own] = scores_of_rows(
            features[start : start + n_rows], parts, rows[own] - start, targets[own])
    return logprobs, is_greedy


def scores_of_rows(features: Tensor, parts: Sequence[Tensor], rows: Tensor,
                   targets: Tensor) -> tuple[Tensor, Tensor]:
    """As `token_scores`, with the logits of one part of the head's weights at a time."""
    target_logits = torch.empty(len(targets), device=targets.device)
    # Of each part: the likeliest token of a row, its logit, and the log of the sum of exponentials.
    tokens, top_logits, log_sums = [], [], []
    first = 0
    for part in parts:
        logits = F.linear(features, part).float()
        inside = (first <= targets) & (targets < first + len(part))
        target_logits[inside] = logits[rows[inside], targets[inside] - first]
        top_logit, token = logits.max(1)
        tokens.append(first + token)
        top_logits.append(top_logit)
        # On CPUs, logsumexp takes seven times as long as log_softmax.
        log_sums.append(top_logit - logits.log_softmax(1).amax(1))
        first += len(part)

    # The likeliest token of all, and the log of the whole sum.
    best_part = torch.stack(top_logits).argmax(0, keepdim=True)
    likeliest = torch.stack(tokens).gather(0, best_part)[0]
    log_sum = torch.stack(log_sums).logsumexp(0)
    return target_logits - log_sum[rows], likeliest[rows] == targets
