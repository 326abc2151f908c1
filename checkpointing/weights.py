"""The weights that a run starts from, or that are sampled: those of a checkpoint of ours.

Knows neither training nor text generation.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpointing import checkpoint, store
from checkpointing.checkpoint import Checkpoint
from checkpointing.run_folder import find_run, has_checkpoint
from conf.convert import rebuild
from conf.identity import flat, in_one_line
from conf.settings import Settings
from data.tokenizer import Tokenizer, fingerprint, from_json
from model import GPT, GPTConfig, SkipInit
from setting import as_word
from terminal import counted, say

# The settings of the model that need not be those of the weights.
CHANGEABLE = ("block_size", "dropout")


@dataclass(frozen=True)
class Weights:
    """The weights of a model in our names, its shape, and its tokenizer where that is known."""

    place: Path
    config: GPTConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer | None

    def fingerprint(self) -> str:
        """The beginning of a hash of names, shapes and values, whatever file they are from."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:12]

    def fitted(self, block_size: int) -> dict[str, Tensor]:
        """The weights for a context that is not longer: of position embeddings, the first ones."""
        if self.config.position == "rotary":
            return self.tensors
        return self.tensors | {"wpe.weight": self.tensors["wpe.weight"][:block_size]}

    def model(self) -> GPT:
        """The model on the CPU."""
        with SkipInit():
            model = GPT(self.config)
        model.load_state_dict(self.tensors)
        return model.eval()

    def describe(self) -> str:
        """Where the weights are from, and how many there are."""
        parameters = sum(tensor.numel() for tensor in self.tensors.values())
        return (f"Weights: {self.place}, {counted(len(self.tensors), 'tensor')}, "
                f"{counted(parameters, 'parameter')}")


def find_weights(name: str, runs_dir: Path) -> Weights:
    """The weights that `init_from=NAME` means: a run's best checkpoint, or a checkpoint.

    Raises ValueError with one sentence if there are none, or if they are invalid.
    """
    path = Path(name)
    if (path / checkpoint.MANIFEST).exists():
        return own_weights(Checkpoint.open(path))
    try:
        run = find_run(runs_dir, name)
    except ValueError as error:
        raise ValueError(str(error).replace(f"run={name} ", f"init_from={name} ")) from None
    found = store.load_checkpoint(run / "checkpoints", "best", own_weights,
                                  lambda text: say(text, sys.stderr))
    assert found or not has_checkpoint(run)
    if found is None:
        raise ValueError(f"{run} has no checkpoint.")
    return found


def with_shape_of_weights(settings: Settings, last: Checkpoint | None
                          ) -> tuple[Settings, list[str]]:
    """The settings with the model's shape from the weights of `init_from`, and messages for users.

    If `last` is a checkpoint of a run that started from the same place, the run resumes: the shape
    is its own, and the weights are not read. Raises ValueError if a setting contradicts the shape.
    """
    saved = flat(last.state["settings"]) if last else {}
    if not settings.init_from:
        return settings, []
    if saved.get("init_from") == settings.init_from:
        shape = rebuild(GPTConfig, last.state["model"], f"{last.folder / checkpoint.STATE}, model")
        told = {name: str(saved.get(name)) for name in ("init_source", "init_fingerprint")}
        return replace(settings, model=given_shape(settings, shape), **told), []
    weights = find_weights(settings.init_from, Path(settings.runs_dir))
    asked = settings.model.block_size
    if "block_size" in settings.model_given.split() and asked > weights.config.block_size:
        raise ValueError(f"model.block_size={asked} is longer than the context of "
                         f"init_from={settings.init_from}, {weights.config.block_size} tokens: "
                         "choose at most that, or leave it out.")
    model = given_shape(settings, weights.config)
    found = weights.fingerprint()
    settings = replace(settings, model=model, init_source=str(weights.place),
                       init_fingerprint=found)
    return settings, [f"{weights.describe()}, fingerprint {found}"]


def given_shape(settings: Settings, shape: GPTConfig) -> GPTConfig:
    """The shape of the weights, with the dropout and the length of a sequence that were set."""
    chosen = {name: getattr(settings.model, name) for name in settings.model_given.split()}
    changed = {name: chosen.pop(name) for name in CHANGEABLE if name in chosen}
    for name, value in chosen.items():
        if value != getattr(shape, name):
            raise ValueError(f"model.{name}={as_word(value)} contradicts "
                             f"init_from={settings.init_from}, whose weights have "
                             f"{as_word(getattr(shape, name))}: leave it out.")
    return replace(shape, **changed)


def initial_weights(settings: Settings, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The weights that a run with these settings starts from.

    Raises ValueError if they are for another tokenizer, or have changed since the settings were
    made.
    """
    weights = find_weights(settings.init_source, Path(settings.runs_dir))
    name, size = settings.init_from, weights.config.vocab_size
    if size != tokenizer.vocab_size:
        raise ValueError(f"init_from={name} has a vocabulary of {size:,} tokens, the training "
                         f"text one of {tokenizer.vocab_size:,} "
                         f"(data.tokenizer={settings.data.tokenizer}): use the tokenizer of the "
                         "weights.")
    if weights.tokenizer and fingerprint(weights.tokenizer) != fingerprint(tokenizer):
        raise ValueError(f"init_from={name} was trained with another tokenizer than that of the "
                         f"training text (data.tokenizer={settings.data.tokenizer}), although both "
                         f"have {size:,} tokens: use the tokenizer of the weights.")
    if weights.fingerprint() != settings.init_fingerprint:
        raise ValueError(f"init_from={name} has changed since this command began: run it again.")
    return weights.fitted(settings.model.block_size)


def own_weights(found: Checkpoint) -> Weights:
    """The weights of a checkpoint. Raises ValueError if its content is invalid."""
    place = f"{found.folder / checkpoint.STATE}, model"
    config = rebuild(GPTConfig, found.state["model"], place)
    tokenizer = tokenizer_of(found)
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(f"{found.folder} is invalid: its tokenizer has {tokenizer.vocab_size} "
                         f"tokens, its model {config.vocab_size}.")
    with SkipInit("meta"):
        shapes = GPT(config).state_dict()
    tensors = found.load_tensors(checkpoint.MODEL, like=shapes)
    return Weights(found.folder, config, tensors, tokenizer)


def tokenizer_of(found: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises ValueError if the model was trained with another."""
    path = found.folder / checkpoint.TOKENIZER
    tokenizer = from_json(found.tokenizer(), f"{path}")
    given = fingerprint(tokenizer)[:12]
    trained = flat(found.state["settings"]).get("data.tokenizer_fingerprint")
    if trained not in (None, given):
        raise ValueError(f"{path} (fingerprint {given}) is not the tokenizer that the model was "
                         f"trained with (fingerprint {in_one_line(str(trained))}): restore that "
                         "file.")
    return tokenizer
