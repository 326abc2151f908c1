"""The sequences of a split of conversations: whole ones, of which only the answers are targets.

Consecutive conversations are put into a sequence as long as they fit. The rest of it is padding. A
conversation that is longer than a sequence is cut at its end, and left out if no part of an answer
remains. A sequence starts with the end of text before its first conversation, as in sampling.
"""

import numpy as np

from data.chat import Markers
from data.order import mix, permute
from data.shards import Tokens
from data.tokenizer import Tokenizer, bytes_of_counts
from terminal import counted

# The target of a token that is not trained on, as in torch.nn.functional.cross_entropy.
MASKED = -100
SEQUENCES_AT_ONCE = 256


class Examples:
    """The sequences of whole conversations in a split, in an endless shuffled order.

    Each epoch has all of them, in another order. Raises ValueError, which names the `split`, if
    there are none.
    """

    def __init__(self, tokens: Tokens, block_size: int, markers: Markers, split: str,
                 seed: np.ndarray) -> None:
        self.tokens, self.block_size, self.markers, self.seed = tokens, block_size, markers, seed

        # Find the conversations, and count their targets.
        ends = tokens.positions_of(markers.end_of_text)
        if not len(ends):
            raise ValueError(f"The {split} split has no conversation: use more of them, or raise "
                             f"data.val_fraction.")
        # A conversation starts with the end of text before it, and ends before the next one.
        starts = np.concatenate(([-1], ends[:-1]))
        targets = targets_within(tokens, markers, starts, ends, block_size)
        self.n_conversations = len(ends)
        self.n_cut = int((ends - starts > block_size + 1).sum())
        self.n_left_out = int((targets == 0).sum())

        # Put them into sequences: `first` and `last` are the conversations of each.
        first, last = pack(starts, ends, targets > 0, block_size + 1)
        if not len(first):
            raise ValueError(f"The {split} split has no conversation with an answer within a "
                             f"context of {block_size} tokens: use a larger model.block_size.")

        # What reading a sequence needs, and the number of its targets.
        self.count = len(first)
        self.first_positions = starts[first]
        self.lengths = np.minimum(ends[last] - starts[first], block_size + 1)
        before = np.concatenate(([0], np.cumsum(targets)))
        self.targets = before[last + 1] - before[first]

    def shuffled(self, index: np.ndarray) -> np.ndarray:
        """The sequences at `index`, counted from the start of the run, by their numbers."""
        epoch, in_epoch = np.divmod(index, self.count)
        return permute(in_epoch, self.count, mix(self.seed ^ mix(epoch.astype(np.uint64))))

    def in_order(self, index: np.ndarray) -> np.ndarray:
        """The numbers of the sequences in the order of the split."""
        return index

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """The first positions of the sequences with these numbers."""
        return self.first_positions[numbers] % len(self.tokens)

    def n_targets(self, numbers: np.ndarray) -> np.ndarray:
        """The number of targets in each of the sequences with these numbers."""
        return self.targets[numbers]

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the sequences with these numbers, each `[N, block_size]`."""
        offsets = np.arange(self.block_size + 1)
        # The first conversation starts with the end of text of the last one.
        positions = (self.first_positions[numbers][:, None] + offsets) % len(self.tokens)
        is_padding = offsets >= self.lengths[numbers][:, None]
        ids = np.where(is_padding, self.markers.end_of_text, self.tokens.read(positions))
        # [N, block_size]; a target is the token after an input.
        is_target = in_answers(ids, self.markers)[:, 1:] & ~is_padding[:, 1:]
        return ids[:, :-1], np.where(is_target, ids[:, 1:], MASKED)

    def count_within(self, max_tokens: int) -> int:
        """The number of first sequences with at most `max_tokens` tokens, at least one.

        Padding does not count.
        """
        ends = np.cumsum(self.lengths - 1)
        return max(1, int(np.searchsorted(ends, max_tokens, side="right")))

    def questions(self, number: int) -> list[list[int]]:
        """The first sequences up to the beginning of their first answer, to be sampled from."""
        found = []
        for ids in self.read(np.arange(min(number, self.count)))[0]:
            start = int(np.flatnonzero(ids == self.markers.assistant)[0])
            found.append(ids[: start + 1].tolist())
        return found

    def bytes_per_target(self, number: int, tokenizer: Tokenizer) -> float:
        """The bytes of text in the answers of the first sequences by the number of targets."""
        counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        for start in range(0, number, SEQUENCES_AT_ONCE):
            targets = self.read(np.arange(start, min(start + SEQUENCES_AT_ONCE, number)))[1]
            counts += np.bincount(targets[targets != MASKED], minlength=len(counts))
        n_targets = int(counts.sum())
        # The end marker of an answer is a target, and no text.
        counts[self.markers.end] = 0
        return bytes_of_counts(counts, tokenizer) / n_targets

    def describe(self) -> str:
        """The numbers of conversations and sequences, and what was cut."""
        size = self.count * self.block_size
        text = (f"{counted(self.n_conversations, 'conversation')} in "
                f"{counted(self.count, 'sequence')}, {(self.lengths - 1).sum() / size:.0%} of "
                f"which is not padding and {self.targets.sum() / size:.0%} answers")
        if self.n_cut:
            text += f"; {self.n_cut:,} cut at {self.block_size} tokens"
        if self.n_left_out:
            text += f", {self.n_left_out:,} of them left out, as no answer begins before that"
        return text


def targets_within(tokens: Tokens, markers: Markers, starts: np.ndarray, ends: np.ndarray,
                   block_size: int) -> np.ndarray:
    """The number of targets of each conversation, after it is cut: the tokens of its answers.

    Each answer has one more target, its end marker.
    """
    first = tokens.positions_of(markers.assistant)
    answer_ends = tokens.positions_of(markers.end)
    last = answer_ends[np.searchsorted(answer_ends, first)]
    # A conversation that is too long is cut: an answer beyond the cut has no targets.
    conversation = np.searchsorted(ends, first)
    last = np.minimum(last, starts[conversation] + block_size)
    lengths = np.maximum(last - first, 0)
    return np.bincount(conversation, lengths, minlength=len(ends)).astype(np.int64)


def pack(starts: np.ndarray, ends: np.ndarray, kept: np.ndarray,
         length: int) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last conversation of each sequence of up to `length` tokens.

    One that is longer has a sequence of its own. Those that are not `kept` are in no sequence.
    """
    first, last = [], []
    begins, ends = starts.tolist(), ends.tolist()
    for number in np.flatnonzero(kept).tolist():
        # After one that is left out, the rest of a sequence is padding.
        if last and last[-1] == number - 1 and ends[number] - begins[first[-1]] <= length:
            last[-1] = number
        else:
            first.append(number)
            last.append(number)
    return np.array(first, dtype=np.int64), np.array(last, dtype=np.int64)


def in_answers(ids: np.ndarray, markers: Markers) -> np.ndarray:
    """Whether each token of rows `[N, T]` belongs to an answer, as does its end marker.

    A token does if the last marker before it is the assistant's. The first token of a row does not.
    """
    # The position of the last marker up to each token.
    is_marker = np.isin(ids, markers)
    places = np.where(is_marker, np.arange(ids.shape[1]), 0)
    last = np.maximum.accumulate(places, axis=1)[:, :-1]
    after = np.take_along_axis(ids, last, axis=1) == markers.assistant
    return np.concatenate((np.zeros((len(ids), 1), dtype=bool), after), axis=1)
