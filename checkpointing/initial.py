"""The weights that `init_from=` names: which they are, and how they decide a run's settings."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from checkpointing import pretrained, published, store
from checkpointing.changes import last_checkpoint
from checkpointing.checkpoint import Checkpoint
from checkpointing.find_runs import find_run
from checkpointing.format import MANIFEST, STATE
from checkpointing.weight_files import other_kind
from checkpointing.weights import Weights, own_weights
from checkpointing.weights_check import check
from conf.convert import rebuild
from conf.identity import flat
from conf.presets import preset
from conf.settings import Settings
from data.bpe import PUBLISHED, BPETokenizer
from data.tokenizer import ExtendedTokenizer, Tokenizer
from data.tokenizer_file import planned_size
from data.tokenizer_json import fingerprint
from model import GPTConfig
from setting import as_word

# The settings of the model that need not be those of the weights.
CHANGEABLE = ("block_size", "dropout")


def find_weights(name: str, runs_dir: Path) -> Weights:
    """The weights that `init_from=NAME` means; docs/weights.md lists the kinds of names.

    Raises ValueError with one sentence if there are none, or if they are invalid.
    """
    path = Path(name)
    # A published model, one of our checkpoints, a file of nanoGPT, or a folder of either kind.
    if name in published.NAMES:
        return pretrained.read_folder(published.find_published(name))
    if (path / MANIFEST).exists():
        return own_weights(Checkpoint.open(path))
    if path.is_file():
        refuse_other_files(name, path)
        return pretrained.read_nanogpt(path)
    if pretrained.is_folder_of_weights(path):
        return pretrained.read_folder(path)
    # The name or folder of a run.
    try:
        run = find_run(runs_dir, name)
    except ValueError as error:
        if path.is_dir():
            raise ValueError(f"init_from={name} is a folder without weights: it has neither the "
                             f"checkpoints of a run nor {pretrained.CONFIG} nor "
                             f"{pretrained.NANOGPT}.") from None
        # The values of nanoGPT's init_from include scratch and resume.
        names = ", ".join(published.NAMES)
        raise ValueError(f"{str(error).replace(f'run={name} ', f'init_from={name} ')} Published "
                         f"models are {names}. Without init_from=, a run starts from random "
                         f"weights, or resumes.") from None
    return store.load_of_run(run, "best", own_weights)


def refuse_other_files(name: str, path: Path) -> None:
    """Raise ValueError for a file that is no checkpoint of nanoGPT."""
    kind, advice = other_kind(path), ""
    if path.suffix in (".safetensors", ".gguf", ".bin"):
        kind = "one file of a model"
    elif kind == "a text file":
        advice = f" To train on a text, pass data=text data.path={path}."
    if kind:
        raise ValueError(f"init_from={name} is {kind}: name a run, a folder with "
                         f"{pretrained.CONFIG} and {pretrained.TENSORS}, or a checkpoint of "
                         f"nanoGPT ({pretrained.NANOGPT}).{advice}")


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
            place = f"{last.folder / STATE}, model"
            shape = rebuild(GPTConfig, last.state["model"], place)
            kept = {name: str(saved.get(name)) for name in ("init_source", "init_fingerprint")}
            return replace(settings, model=given_shape(settings, shape), **kept)

        # Check the vocabulary before weights are downloaded, and all else before text is prepared.
        if settings.init_from in published.NAMES:
            check_vocabulary(settings, pretrained.GPT2_TOKENS, "set data.tokenizer=gpt2")
        weights = find_weights(settings.init_from, Path(settings.runs_dir))
        check_vocabulary(settings, weights.config.vocab_size, how_to_encode(weights))
        asked = settings.model.block_size
        if "block_size" in settings.model_given.split() and asked > weights.config.block_size:
            raise ValueError(f"model.block_size={asked} is longer than the context of "
                             f"init_from={settings.init_from}, {weights.config.block_size} tokens: "
                             "choose at most that, or leave it out.")

        # The shape is that of the weights. Their fingerprint becomes part of the run's identity.
        model = given_shape(settings, weights.config)
        fingerprint = weights.fingerprint()
        self.weights = weights
        self.messages.append(f"{weights.describe()}, fingerprint {fingerprint}")
        checked = check(weights, fingerprint)
        if checked:
            self.messages.append(checked)
        return replace(settings, model=model, init_source=str(weights.place),
                       init_fingerprint=fingerprint)

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
    if settings.init_from in published.NAMES:
        return given_shape(settings, GPTConfig(**preset("model", settings.init_from)))
    weights = find_weights(settings.init_from, Path(settings.runs_dir))
    return given_shape(settings, weights.config)


def check_vocabulary(settings: Settings, expected: int, advice: str) -> None:
    """Raise ValueError if it is known that the text will not have `expected` different tokens."""
    data = settings.data
    found = None
    if not (data.source == "bin" and data.tokenizer == "bpe"):
        found = planned_size(data.tokenizer, data.vocab_size)
    if found not in (None, expected):
        raise ValueError(f"init_from={settings.init_from} has a vocabulary of {expected:,} tokens, "
                         f"data.tokenizer={data.tokenizer} one of {found:,}: {advice}.")


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
