"""The weights of a model, with its shape and tokenizer; and how to read them from a checkpoint.

Knows neither training nor text generation.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpointing.checkpoint import Checkpoint
from checkpointing.spec import MODEL, STATE, TOKENIZER
from conf.convert import rebuild
from conf.identity import flat, in_one_line
from data.tokenizer import Tokenizer
from data.tokenizer_json import fingerprint, from_json
from model import GPT, GPTConfig
from terminal import counted


@dataclass(frozen=True)
class Weights:
    """The weights of a model under our names, its shape, and its tokenizer where that is known."""

    place: Path
    config: GPTConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer | None
    note: str = ""

    def fingerprint(self) -> str:
        """The beginning of a hash of names, shapes and values, whatever file they are from."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:12]

    def fitted(self, block_size: int, vocab_size: int) -> dict[str, Tensor]:
        """The weights for a context that is not longer, and a vocabulary that is not smaller.

        Of learned position embeddings, the first ones are kept. Tokens that are added get the mean
        of all embeddings: their logits are then neither likely nor unlikely.
        """
        fitted = dict(self.tensors)
        # wpe: [block_size, C]
        if self.config.position == "learned":
            fitted["wpe.weight"] = fitted["wpe.weight"][:block_size]
        # wte and lm_head: [vocab_size, C]
        added = vocab_size - self.config.vocab_size
        for name in ("wte.weight", "lm_head.weight"):
            if added and name in fitted:
                mean = fitted[name].mean(0, keepdim=True)
                fitted[name] = torch.cat([fitted[name], mean.expand(added, -1)])
        return fitted

    def model(self) -> GPT:
        """The model on the CPU, in evaluation mode. It shares the memory of the weights."""
        model = GPT.empty(self.config)
        model.load_state_dict(self.tensors, assign=True)
        return model.eval()

    def describe(self) -> str:
        """Where the weights are from, and how many there are."""
        parameters = sum(tensor.numel() for tensor in self.tensors.values())
        return (f"Weights: {self.place}, {counted(len(self.tensors), 'tensor')}, "
                f"{counted(parameters, 'parameter')}{self.note}")


def own_weights(found: Checkpoint) -> Weights:
    """The weights of a checkpoint. Raises ValueError if its content is invalid."""
    config = rebuild(GPTConfig, found.state["model"], f"{found.folder / STATE}, model")
    tokenizer = tokenizer_of(found)
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(f"{found.folder} is invalid: its tokenizer has {tokenizer.vocab_size} "
                         f"tokens, its model {config.vocab_size}.")
    # The model decides which tensors the file must have.
    tensors = found.load_tensors(MODEL, like=GPT.empty(config).state_dict())
    return Weights(found.folder, config, tensors, tokenizer)


def tokenizer_of(found: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises ValueError if the model was trained with another."""
    path = found.folder / TOKENIZER
    tokenizer = from_json(found.tokenizer(), f"{path}")
    given = fingerprint(tokenizer)[:12]
    trained = flat(found.state["settings"]).get("data.tokenizer_fingerprint")
    if trained not in (None, given):
        raise ValueError(
            f"{path} (fingerprint {given}) is not the tokenizer that the model was trained with "
            f"(fingerprint {in_one_line(str(trained))}): restore that file.")
    return tokenizer
