"""The weights that a run starts from: they decide some of its settings, and must fit the others."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from checkpointing import pretrained
from checkpointing.changes import last_checkpoint
from checkpointing.find_weights import find_weights
from checkpointing.spec import STATE
from checkpointing.weights import Weights
from checkpointing.weights_check import check
from conf.convert import rebuild
from conf.identity import flat
from conf.presets import preset
from conf.settings import Settings
from data.bpe import PUBLISHED, BPETokenizer
from data.tokenizer import ExtendedTokenizer, Tokenizer
from data.tokenizer_json import fingerprint, planned_size
from model import GPTConfig
from setting import as_word

# The settings of the model that need not be those of the weights.
CHANGEABLE = ("block_size", "dropout")


@dataclass
class InitialWeights:
    """The weights that `init_from=` names: they decide settings of a run, which starts from them.

    Of several processes, the first one chooses the settings.
    """

    weights: Weights | None = None
    messages: list[str] = field(default_factory=list)

    def choose_settings(self, settings: Settings) -> Settings:
        """The settings with the shape of the weights. Keeps the weights, and messages about them.

        A run that resumes has the shape of its checkpoint, and does not need the weights. Raises
        ValueError for weights that are invalid or contradict the settings.
        """
        if not settings.init_from:
            return settings
        last = last_checkpoint(settings.folder, settings)
        saved = flat(last.state["settings"]) if last else {}
        if saved.get("init_from") == settings.init_from:
            shape = rebuild(GPTConfig, last.state["model"], f"{last.folder / STATE}, model")
            kept = {name: str(saved.get(name)) for name in ("init_source", "init_fingerprint")}
            return replace(settings, model=given_shape(settings, shape), **kept)

        # Check the vocabulary before weights are downloaded, and all else before text is prepared.
        if settings.init_from in pretrained.PUBLISHED:
            check_vocabulary(settings, pretrained.GPT2_TOKENS, "set data.tokenizer=gpt2")
        weights = find_weights(settings.init_from, Path(settings.runs_dir))
        check_vocabulary(settings, weights.config.vocab_size, how_to_encode(weights))
        model = shape_for_training(settings, weights.config)

        # The fingerprint of the weights becomes part of the run's identity.
        found = weights.fingerprint()
        self.weights = weights
        self.messages.append(f"{weights.describe()}, fingerprint {found}")
        checked = check(weights, found)
        if checked:
            self.messages.append(checked)
        return replace(settings, model=model, init_source=str(weights.place),
                       init_fingerprint=found)

    def load(self, settings: Settings, tokenizer: Tokenizer) -> dict[str, Tensor]:
        """The weights for a run with these settings; they are not kept any longer.

        Raises ValueError if they are for another tokenizer, or have changed since the settings
        were chosen.
        """
        weights, self.weights = self.weights, None
        name = settings.init_from
        if weights is None:
            # Another process chose the settings, by the weights as they were then.
            weights = find_weights(settings.init_source, Path(settings.runs_dir))
            if weights.fingerprint() != settings.init_fingerprint:
                raise ValueError(f"init_from={name} has changed since this command began: run it "
                                 "again.")

        # The tokenizer may extend that of the weights, as by the markers of a chat.
        size, known = weights.config.vocab_size, tokenizer
        if isinstance(tokenizer, ExtendedTokenizer) and tokenizer.vocab_size > size:
            known = tokenizer.base
        if known.vocab_size != size:
            raise ValueError(f"init_from={name} has a vocabulary of {size:,} tokens, the training "
                             f"text one of {known.vocab_size:,}: {how_to_encode(weights)}.")
        if weights.tokenizer and not has_same_tokens(weights.tokenizer, known):
            raise ValueError(f"init_from={name} was trained with other tokens than the training "
                             f"text has, although both have {size:,} different ones: "
                             f"{how_to_encode(weights)}.")
        return weights.fitted(settings.model.block_size, tokenizer.vocab_size)


def shape_of_weights(settings: Settings) -> GPTConfig:
    """The model of a run that would start now. Published weights are not downloaded."""
    if not settings.init_from:
        return settings.model
    if settings.init_from in pretrained.PUBLISHED:
        shape = GPTConfig(**preset("model", settings.init_from))
    else:
        shape = find_weights(settings.init_from, Path(settings.runs_dir)).config
    return shape_for_training(settings, shape)


def check_vocabulary(settings: Settings, expected: int, advice: str) -> None:
    """Raise ValueError if it is known that the text will not have `expected` different tokens."""
    data = settings.data
    found = None
    if not (data.source == "bin" and data.tokenizer == "bpe"):
        found = planned_size(data.tokenizer, data.vocab_size)
    if found not in (None, expected):
        raise ValueError(f"init_from={settings.init_from} has a vocabulary of {expected:,} tokens, "
                         f"data.tokenizer={data.tokenizer} one of {found:,}: {advice}.")


def shape_for_training(settings: Settings, shape: GPTConfig) -> GPTConfig:
    """As `given_shape`. Raises ValueError if the sequences are longer than the weights' context."""
    chosen = given_shape(settings, shape)
    if chosen.block_size > shape.block_size:
        raise ValueError(f"model.block_size={chosen.block_size} is longer than the context of "
                         f"init_from={settings.init_from}: choose at most {shape.block_size}.")
    return chosen


def given_shape(settings: Settings, shape: GPTConfig) -> GPTConfig:
    """The shape of the weights, with the dropout and the length of a sequence that were set.

    Raises ValueError if another setting of the model is not that of the weights.
    """
    chosen = {name: getattr(settings.model, name) for name in settings.model_given.split()}
    changed = {name: chosen.pop(name) for name in CHANGEABLE if name in chosen}
    for name, value in chosen.items():
        if value != getattr(shape, name):
            found = as_word(getattr(shape, name))
            raise ValueError(f"model.{name}={as_word(value)} contradicts init_from="
                             f"{settings.init_from}, whose weights have {found}: leave it out.")
    return replace(shape, **changed)


def how_to_encode(weights: Weights) -> str:
    """The advice to use the tokenizer of the weights."""
    if weights.tokenizer is None:
        return "use the text and the tokenizer that the weights were trained with"
    kind = weights.tokenizer.to_json()["kind"]
    name = kind if kind in (*PUBLISHED, "byte") else weights.place
    return f"set data.tokenizer={name}"


def has_same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether all ids mean the same. A text may be split into words in other ways."""
    if isinstance(one, BPETokenizer) and isinstance(other, BPETokenizer):
        return (one.merged, one.special) == (other.merged, other.special)
    return fingerprint(one) == fingerprint(other)
