"""The settings of train.py and sample.py, and the name and type of each."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from conf.hints import closest
from conf.sampling import SamplingConfig
from data.config import DataConfig
from model.config import GPTConfig
from setting import FilePath, FilePaths, SettingsBase, setting, type_hints
from terminal import escaped
from training.config import LoggerConfig, OptimConfig, TrainingConfig

# Users cannot set these: the tokenizer and the other settings decide them.
DERIVED = ("model.vocab_size", "auto_name", "train", "model_given", "init_source",
           "init_fingerprint")


@dataclass(frozen=True)
class Settings(SettingsBase):
    """The settings of a training run."""

    name: str = setting("", "name of the run's folder; empty: a name made from the overrides")
    # The name made from the overrides.
    auto_name: str = ""
    seed: int = setting(1337, "random seed of weights, batches and dropout", ge=0, lt=2**63)
    runs_dir: FilePath = setting("runs", "folder that contains the runs' folders")
    restart: bool = setting(False, "start over: the run in this folder is renamed to NAME.old")
    allow_drift: bool = setting(False, "resume on other hardware or versions, not bit-identically")
    init_from: FilePath = setting("", "weights to start from, as of a run (docs/weights.md)")
    # Where these weights were when the run was started, and a hash of them.
    init_source: str = ""
    init_fingerprint: str = ""
    # The settings of the model that were chosen, rather than the defaults of a preset, by name.
    model_given: str = ""
    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    @property
    def folder(self) -> Path:
        """The folder of the run. Without `name`, another one is used if it holds another run."""
        return Path(self.runs_dir) / (self.name or self.auto_name)

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value, those of the groups included."""
        yield from super().problems()
        # The name: a relative path without control characters.
        parts = Path(self.name).parts
        name = escaped(self.name, keep="")
        if name != self.name.strip():
            yield f"name={name} contains control characters or outer white space: remove them."
        if Path(self.name).is_absolute() or ".." in parts or (self.name and not parts):
            yield f"name={name} is outside runs_dir={self.runs_dir}: use a plain name."
        if self.name.startswith("~"):
            yield (f"name={name} begins with ~, and a name is no path: set runs_dir= for another "
                   "folder.")
        # The groups.
        found = []
        for group, settings in vars(self).items():
            if is_dataclass(settings):
                found += [f"{group}.{problem}" for problem in settings.problems()]
        # A run or sweep that resumes can use the tokens of a text that is gone.
        if not os.path.isdir(self.folder):
            found += [f"data.{problem}" for problem in self.data.missing_files()]
        yield from found
        # The weights of init_from decide the length of a sequence, unless it is set.
        is_known = not self.init_from or "block_size" in self.model_given.split()
        if not found and is_known:
            try:
                self.training.micro_steps(self.model.block_size)
            except ValueError as error:
                yield str(error)

    def warnings(self) -> Iterator[str]:
        """One sentence for each valid value that is probably a mistake."""
        steps = self.training.max_steps
        if self.optim.warmup_steps > self.optim.last_full_step(steps):
            yield (f"optim.warmup_steps={self.optim.warmup_steps} of training.max_steps={steps}: "
                   "the learning rate falls, or the run ends, before it reaches its full value.")
        if self.model.parametrization == "standard":
            for one in fields(self.model):
                value = getattr(self.model, one.name)
                if one.name.startswith("mup_") and value != one.default:
                    yield f"model.{one.name}={value} needs model.parametrization=mup."


@dataclass(frozen=True)
class ModelChoice(SettingsBase):
    """The trained model that a program opens, and where it runs."""

    run: FilePaths = setting("", "runs' names or folders, separated by commas; empty: the latest")
    init_from: FilePath = setting("", "weights to use instead of a run (docs/weights.md)")
    runs_dir: FilePath = setting("runs", "folder that contains the runs' folders")
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where to run the model")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "of matrix products")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.init_from and self.run:
            yield f"run={self.run} and init_from={self.init_from} exclude each other: choose one."


@dataclass(frozen=True)
class SampleSettings(ModelChoice, SamplingConfig):
    """The settings of sampling from a run or from published weights."""

    run: FilePath = setting(
        "", "name or folder of a run, or of a sweep for its best run; empty: the latest run")
    checkpoint: str = setting("best", "best, last, or the number of a step")
    prompt: str = setting("", "the text to continue, taken literally; empty: start a new text")
    prompt_file: FilePath = setting("", "read the prompt from this file; -: from standard input")
    prompts: FilePath = setting("", "a file with one prompt per line; the completions go to out")
    out: FilePath = setting(
        "", "the file for the completions of prompts, one JSON line each; continued if it exists")
    batch_size: int = setting(16, "with prompts: sequences decoded together", ge=1)
    logprobs: bool = setting(False, "print each token with its probability before temperature")
    num_samples: int = setting(1, "number of completions", ge=1)
    interactive: bool = setting(False, "ask for prompts until the input ends")
    chat: bool = setting(False, "a conversation, with a model trained with data=chat")
    system: str = setting("", "chat: instructions that precede the conversation")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        # What is completed: one prompt, a file of prompts, what the user types, or a conversation.
        inputs = (self.prompt, self.prompt_file, self.prompts, self.interactive, self.chat)
        if sum(map(bool, inputs)) > 1:
            yield ("prompt, prompt_file, prompts, interactive and chat exclude each other: choose "
                   "one.")
        if self.chat and (self.logprobs or self.num_samples > 1):
            yield "chat=true gives one answer as text: leave out logprobs and num_samples."
        if self.system and not self.chat:
            yield f"system={self.system} is for chat=true: add it, or leave it out."
        # A file of prompts needs a file for its completions.
        if bool(self.prompts) != bool(self.out):
            yield "prompts=FILE and out=FILE.jsonl belong together: give both."
        if self.prompts and self.logprobs:
            yield ("logprobs=true only prints, and prompts= writes a file: leave logprobs out; "
                   "each line of the file has the mean log probability.")
        # The model.
        yield from checkpoint_problems(self.checkpoint)
        if self.init_from and self.checkpoint != "best":
            yield (f"checkpoint={self.checkpoint} is for run=: name the folder of a checkpoint in "
                   "init_from=.")


def checkpoint_problems(checkpoint: str) -> Iterator[str]:
    """One sentence if `checkpoint` is neither best nor last nor the number of a step."""
    is_step = checkpoint.isdecimal() and len(checkpoint) < 20
    if checkpoint not in ("best", "last") and not is_step:
        guess = closest(checkpoint, ("best", "last"))
        yield f"checkpoint={checkpoint} is not best, last or the number of a step{guess}."


def leaves(schema: type, prefix: str = "") -> dict[str, Any]:
    """The full name and type of each setting, as in {"model.n_layer": int}."""
    found: dict[str, Any] = {}
    for name, hint in type_hints(schema).items():
        key = f"{prefix}{name}"
        if is_dataclass(hint):
            found |= leaves(hint, f"{key}.")
        elif key not in DERIVED:
            found[key] = hint
    return found
