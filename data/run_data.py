"""The data of a run: its prepared text, as batches to train on and to validate on."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from data.chat import Markers, markers_of
from data.config import DataConfig
from data.loader import Loader, Validation
from data.prepare import load_tokenizer, val_bytes_per_token
from data.shards import open_parts
from data.tokenizer import Tokenizer

# The number of prompts that a trained model completes at the end.
PROMPTS = 3


@dataclass(frozen=True)
class RunData:
    """The prepared text of a run, and the batches of it that one process trains on."""

    prepared: Path
    tokenizer: Tokenizer
    loader: Loader
    validation: Validation
    bytes_per_token: float  # of the validation text
    boundary: int | None  # the token between documents, if attention does not cross them
    prompts: list[str | list[int]]  # of the samples at the end

    @cached_property
    def first_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets to try and to time a micro-step with, each `[B, T]`."""
        return self.loader.batch(0)


def open_data(prepared: Path, config: DataConfig, block_size: int, batch_size: int,
              micro_steps: int, eval_tokens: int, seed: int, rank: int = 0,
              world_size: int = 1) -> RunData:
    """Open the prepared text of a run for the process `rank`.

    Raises ValueError for a split that is too short, and for one without documents if attention is
    not to cross them.
    """
    tokenizer = load_tokenizer(prepared)
    # A document starts with the end-of-text token of the one before it.
    boundary = tokenizer.end_of_text if config.respect_documents else None
    if config.respect_documents and boundary is None:
        raise ValueError("data.respect_documents=true needs several documents, and this text is a "
                         "single one without an end-of-text token: leave it out.")
    markers = markers_in(config, tokenizer)
    loader = Loader(open_parts(prepared, "train"), block_size, batch_size, micro_steps, seed,
                    world_size, config.weights(), markers)
    validation, bytes_per_token = open_validation(prepared, config, tokenizer, markers, block_size,
                                                  batch_size, eval_tokens, rank, world_size)
    prompts: list[str | list[int]] = [""] * PROMPTS
    if markers:
        prompts = validation.parts[0].questions(PROMPTS)
    return RunData(prepared, tokenizer, loader, validation, bytes_per_token, boundary, prompts)


def open_validation(prepared: Path, config: DataConfig, tokenizer: Tokenizer,
                    markers: Markers | None, block_size: int, batch_size: int,
                    max_tokens: int | None, rank: int = 0,
                    world_size: int = 1) -> tuple[Validation, float]:
    """The validation split for the process `rank`, and the bytes of each of its tokens.

    `max_tokens=None` reads all of it. Raises ValueError if it is too short.
    """
    tokens, weights = open_parts(prepared, "val"), config.weights()
    if max_tokens is None:
        # A part of a mixture is read up to its share of the most tokens.
        max_tokens = sum(map(len, tokens)) * sum(weights)
    validation = Validation(tokens, block_size, batch_size, max_tokens, weights, rank, world_size,
                            markers)
    bytes_per_token = val_bytes_per_token(prepared, weights)
    if markers:
        # Of conversations, only the answers are targets.
        n_sequences = validation.n_windows[0]
        bytes_per_token = validation.parts[0].bytes_per_target(n_sequences, tokenizer)
    return validation, bytes_per_token


def markers_in(config: DataConfig, tokenizer: Tokenizer) -> Markers | None:
    """The markers of conversations; None in other texts."""
    return markers_of(tokenizer) if config.source == "chat" else None
