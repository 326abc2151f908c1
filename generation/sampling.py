"""The sampling rules, which choose the next token, and the loop that generates token by token.

Knows token ids only; the tokenizer knows their text. Shapes: B rows, V vocabulary.
"""

import math
import random
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.sampling import SamplingConfig
from generation.decoder import Decoder, native_autocast, window_start
from model.gpt import GPT

# Below this temperature only the largest logit can be drawn, and dividing by it could overflow.
MIN_TEMPERATURE = 1e-20
# top_p first sorts this number of tokens, which nearly always hold its probability.
FIRST_SORTED = 1024


def finite(logits: Tensor) -> Tensor:
    """The logits. Raises ValueError if any is NaN or infinite."""
    # The sum is the faster test.
    if not math.isfinite(logits.sum()) and not logits.isfinite().all():
        raise ValueError("The model's output is NaN or infinite: its weights are damaged, or its "
                         "training diverged.")
    return logits


def cumulative_sum(probabilities: Tensor) -> Tensor:
    """The cumulative sum of rows: on the CPU where deterministic kernels were asked for.

    torch has no deterministic one on GPUs.
    """
    if probabilities.is_cpu or not torch.are_deterministic_algorithms_enabled():
        return probabilities.cumsum(-1)
    return probabilities.cpu().cumsum(-1).to(probabilities.device)


def candidates(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The most likely tokens of each row of `[B, V]`: probabilities `[B, K]` and ids `[B, K]`.

    In descending order: the `top_k` largest (0: all), and of these the fewest with a total
    probability of `top_p` (nucleus sampling, arXiv:1904.09751); all others have probability 0.
    The probabilities need not sum to 1.
    """
    # Without top_k, all tokens compete, but sorting a few of them is nearly always enough.
    sizes = [top_k] if top_k else [FIRST_SORTED, logits.size(-1)]
    for size in sizes:
        largest, ids = logits.topk(min(size, logits.size(-1)))  # [B, K]
        # The softmax of the largest alone, or of all.
        competing = largest if top_k else logits
        probabilities = (largest - competing.logsumexp(-1, keepdim=True)).exp()
        cumulative = cumulative_sum(probabilities)
        if (cumulative[:, -1] >= top_p).all():
            break
    # A token is left out if those before it already have the probability top_p.
    return probabilities.masked_fill(cumulative - probabilities >= top_p, 0), ids


def pick(logits: Tensor, rules: SamplingConfig, draws: Tensor) -> Tensor:
    """Sample one token id per row of logits `[B, V]` -> `[B]`.

    `draws` `[B]` are random numbers from (0, 1]. Raises ValueError if a logit is not finite.
    """
    logits = finite(logits.float())
    # Without randomness, the most likely token.
    if rules.temperature < MIN_TEMPERATURE:
        return logits.argmax(-1)
    logits = logits / rules.temperature

    # The probabilities of all tokens, [B, V], or of the K candidates with their ids, [B, K].
    ids = None
    if rules.top_k or rules.top_p < 1:
        probabilities, ids = candidates(logits, rules.top_k, rules.top_p)
    else:
        probabilities = logits.softmax(-1)

    # Invert the cumulative distribution: draws are scaled to its total, which may not be 1.
    cumulative = cumulative_sum(probabilities)
    # The first place that reaches the draw cannot have probability 0.
    places = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:])  # [B, 1]
    # A place among candidates is not yet the id of a token.
    if ids is not None:
        places = ids.gather(-1, places)
    return places.squeeze(-1)


@dataclass
class Row:
    """A sequence that grows. The seed of its rules and its `number` decide its random draws.

    `index` is the place of its prompt among those of the caller.
    """

    sequence: list[int]
    rules: SamplingConfig
    number: int
    index: int = 0

    def __post_init__(self) -> None:
        if not self.sequence:
            raise ValueError("The prompt has no tokens: generation continues at least one.")
        self.stream = random.Random(f"{self.rules.seed} {self.number}")


class Batch:
    """Rows that grow together, by one token per step. They can join and leave between two steps.

    In fp32, a row gets the same tokens whatever the other rows are, and with and without a decoder.
    There is room for `rows` rows of `positions` tokens, or of the model's context if it is shorter.
    """

    def __init__(self, model: GPT, decoder: Decoder | None, rows: int, positions: int) -> None:
        self.model, self.decoder = model, decoder
        self.rows: list[Row] = []
        if decoder:
            decoder.begin(rows, positions)

    def join(self, row: Row) -> None:
        """Add a row after the others."""
        self.rows.append(row)
        if self.decoder:
            self.decoder.join()

    def leave(self, place: int) -> None:
        """Remove the row at `place`. The last one takes its place."""
        self.rows[place] = self.rows[-1]
        self.rows.pop()
        if self.decoder:
            self.decoder.drop(place)

    @torch.inference_mode()
    def step(self) -> tuple[Tensor, Tensor]:
        """Add a token to each row; the tokens `[B]`, and the logits `[B, V]` they are from."""
        # The logits of what follows each sequence.
        sequences = [row.sequence for row in self.rows]
        if self.decoder:
            logits = self.decoder.next_logits(sequences)
        else:
            logits = uncached_logits(self.model, sequences)
        # A row draws from its own stream, so that the other rows do not change its text.
        draws = torch.tensor([1 - row.stream.random() for row in self.rows], device=logits.device)
        tokens = self.pick_by_rules(logits, draws)
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.sequence.append(token)
        return tokens, logits

    def pick_by_rules(self, logits: Tensor, draws: Tensor) -> Tensor:
        """As `pick`, where each row has its own rules: rows of the same rules together."""
        # The places of the rows with the same rules.
        by_rules: dict[tuple[float, int, float], list[int]] = {}
        for place, row in enumerate(self.rows):
            rules = row.rules
            key = (rules.temperature, rules.top_k, rules.top_p)
            by_rules.setdefault(key, []).append(place)
        # Usually all rows have the same.
        if len(by_rules) == 1:
            return pick(logits, self.rows[0].rules, draws)
        tokens = torch.empty(len(self.rows), dtype=torch.long, device=logits.device)
        for places in by_rules.values():
            rules = self.rows[places[0]].rules
            tokens[places] = pick(logits[places], rules, draws[places])
        return tokens


def generate(model: GPT, prompts: Tensor | Sequence[Sequence[int]], rules: SamplingConfig,
             numbers: Sequence[int] | None = None, decoder: Decoder | None = None,
             done: Container[int] = ()) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Continue `prompts`, `[B, T]` or rows of any lengths, by one token per iteration.

    Yields the indices of the prompts in the batch, their next ids `[B]`, and the logits `[B, V]`
    that these were sampled from. The seed and a prompt's number (its index, or its entry of
    `numbers`) decide its random draws: it gets the same text with and without a cache, alone and in
    a batch (in fp32; in lower precision, or with other kernels than ours, the last digits differ).
    The global random state is not used. `decoder` saves making one. Raises ValueError for a prompt
    without tokens.

    The caller can add the indices of finished prompts to `done`. They leave the batch and the last
    ones take their places. It ends when all are done.
    """
    if isinstance(prompts, Tensor):
        prompts = prompts.tolist()
    numbered = zip(prompts, numbers or range(len(prompts)), strict=True)
    rows = [Row(list(prompt), rules, number, index)
            for index, (prompt, number) in enumerate(numbered)]

    was_training = model.training
    model.eval()
    try:
        # Prefill the prompts, as rows of one batch.
        if not rules.cache:
            decoder = None
        elif decoder is None:
            decoder = Decoder(model, rules.decoder_precision)
        longest = max(map(len, prompts))
        batch = Batch(model, decoder, len(rows), longest + rules.max_new_tokens)
        for row in rows:
            batch.join(row)

        # One token a row and step, until all are done.
        for _ in range(rules.max_new_tokens):
            tokens, logits = batch.step()
            yield [row.index for row in batch.rows], tokens, logits
            # From the last one on, so that the places of the others stay.
            for place in reversed(range(len(batch.rows))):
                if batch.rows[place].index in done:
                    batch.leave(place)
            if not batch.rows:
                return
    finally:
        model.train(was_training)


def uncached_logits(model: GPT, sequences: list[list[int]]) -> Tensor:
    """Logits `[B, V]` for the next tokens, by a whole forward pass for each length of sequence."""
    logits = torch.empty(len(sequences), model.config.vocab_size, device=model.wte.weight.device)
    # Rows of one length are a rectangle, which needs no padding.
    for length in {len(sequence) for sequence in sequences}:
        rows = [row for row, sequence in enumerate(sequences) if len(sequence) == length]
        start = window_start(length, model.config.block_size)
        # [rows, T], of which only the last position is needed.
        window = torch.tensor([sequences[row][start:] for row in rows], device=logits.device)
        with native_autocast(model):
            logits[rows] = model.head(model.features(window)[:, -1]).float()
    return logits
