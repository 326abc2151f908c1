"""The data of a run: its prepared text, as batches to train on and to validate on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from data.chat import markers_of
from data.config import DataConfig
from data.loader import Loader, Validation, document_boundary
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
    tokenizer, weights = load_tokenizer(prepared), config.weights()
    boundary = document_boundary(tokenizer) if config.respect_documents else None
    markers = markers_of(tokenizer) if config.source == "chat" else None
    loader = Loader(open_parts(prepared, "train"), block_size, batch_size, micro_steps, seed,
                    world_size, weights, markers)
    validation = Validation(open_parts(prepared, "val"), block_size, batch_size, eval_tokens,
                            weights, rank, world_size, markers)
    prompts: list[str | list[int]] = [""] * PROMPTS
    bytes_per_token = val_bytes_per_token(prepared, weights)
    # Of conversations, only the answers are targets.
    if markers:
        prompts = validation.questions(PROMPTS)
        bytes_per_token = validation.bytes_per_target(tokenizer)
    return RunData(prepared, tokenizer, loader, validation, bytes_per_token, boundary, prompts)
