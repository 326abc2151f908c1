"""The bridge from Hydra's composed configuration to frozen dataclasses; past it nobody sees a DictConfig.

Defaults live in the dataclasses beside the code that reads them. Here they are gathered, given to Hydra's
ConfigStore, overridden by the YAML presets and the command line, checked, and frozen. All problems
come in one report: unknown keys, wrong types, values out of range.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from conf.identity import flat, identity_differences, in_one_line, in_short
from data.sources import DataConfig
from model.config import GPTConfig
from training.config import OptimConfig, TrainingConfig
from training.recorder import LoggerConfig

CONF = Path(__file__).parent
SWEEP_ADVICE = "several values are a sweep: add -m to run them all, or choose one."


@dataclass(frozen=True)
class Settings:
    """Everything about a training run."""

    name: str = ""  # of the run's folder; empty: auto_name
    auto_name: str = ""  # made from the experiment and what differs from it
    seed: int = 1337
    runs_dir: str = "runs"
    restart: bool = False  # begin anew: what is in the run's folder is moved aside
    allow_drift: bool = False  # go on although machine or versions are others, and the last bits with them
    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work, the groups' own included."""
        if not 0 <= self.seed < 2**63:
            yield f"seed={self.seed} must be at least 0, and less than 2**63."
        if self.name != self.name.strip():
            yield f"name={self.name} begins or ends with white space: use a plain name."
        if Path(self.name).is_absolute() or ".." in Path(self.name).parts or (self.name and not Path(self.name).parts):
            yield f"name={self.name} would leave runs_dir={self.runs_dir}: use a plain name."
        for group in ("model", "data", "optim", "training", "logger"):
            yield from (f"{group}.{problem}" for problem in getattr(self, group).problems())
        try:
            self.training.micro_steps(self.model.block_size)
        except ValueError as error:
            yield str(error)


@dataclass(frozen=True)
class SampleSettings:
    """Everything about sampling from a run."""

    run: str = ""  # the run's name, or the path of its folder; empty: the run that was trained last
    runs_dir: str = "runs"
    checkpoint: str = "best"  # best, last, or the number of a step
    prompt: str = ""  # empty: start a new text
    prompt_file: str = ""  # read the prompt from this file; - reads standard input
    prompts: str = ""  # a file with a prompt a line, to complete all of them into `out`
    out: str = ""  # one JSON line a completion; what is there already is not made again
    batch_size: int = 16  # of `prompts`: completions at once
    logprobs: bool = False  # print each token with its probability
    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 50  # 0: no such limit
    top_p: float = 0.9  # the fewest likely tokens that hold this probability; 1: no such limit
    num_samples: int = 1
    seed: int = 1337
    stop: str = ""  # end at this text, which is not printed
    interactive: bool = False  # ask for prompts until the input ends
    cache: bool = True  # off: recompute the whole context for each token
    int8: bool = False  # weights of 8 bits, on the CPU: see docs/benchmarks.md for what that gives and costs
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        for name in ("max_new_tokens", "num_samples", "batch_size"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} must be at least 1."
        for name in ("top_k", "seed"):
            if getattr(self, name) < 0:
                yield f"{name}={getattr(self, name)} must be at least 0."
        if not 0 <= self.temperature < float("inf"):
            yield f"temperature={self.temperature} must be at least 0; 0 always takes the most likely token."
        if not 0 < self.top_p <= 1:
            yield f"top_p={self.top_p} is a probability: choose 0 < top_p <= 1."
        if sum(map(bool, (self.prompt, self.prompt_file, self.prompts, self.interactive))) > 1:
            yield "prompt, prompt_file, prompts and interactive exclude each other: choose one."
        if bool(self.prompts) != bool(self.out):
            yield "prompts=FILE and out=FILE.jsonl belong together: give both."
        if self.prompts and self.logprobs:
            yield "logprobs=true prints, and prompts= writes: their mean is in each line of out anyway."
        if self.int8 and not self.cache:
            yield "int8=true needs the cache: leave cache=false out."
        yield from checkpoint_problems(self.checkpoint)


def checkpoint_problems(which: str) -> Iterator[str]:
    """One sentence if the setting `checkpoint` is neither best, nor last, nor a step."""
    if which not in ("best", "last") and not (which.isdecimal() and len(which) < 20):
        yield f"checkpoint={which} is not best, last or the number of a step{closest(which, ('best', 'last'))}."


SCHEMAS = {"config": Settings, "sample": SampleSettings}  # by conf/NAME.yaml

DERIVED = ("model.vocab_size", "auto_name", "train")  # nobody sets these: the tokenizer and the other settings decide them


class ConfigError(ValueError):
    """What is wrong with the configuration: all of it, one line a problem."""

    def __init__(self, problems: list[str]) -> None:
        head = "" if len(problems) == 1 else f"{len(problems)} problems in the configuration:\n  "
        super().__init__(head + "\n  ".join(problems))


def options(group: str) -> list[str]:
    """The presets of a group, as `conf/GROUP/*.yaml` has them."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def groups() -> list[str]:
    """The configuration groups: the folders of `conf`."""
    return sorted(path.name for path in CONF.iterdir() if path.name != "sweep" and path.is_dir() and options(path.name))


def leaves(schema: Any, prefix: str = "") -> dict[str, Any]:
    """Each setting's full name and type, as in {"model.n_layer": int}."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(schema).items():
        found |= leaves(hint, f"{prefix}{name}.") if is_dataclass(hint) else {f"{prefix}{name}": hint}
    return {name: hint for name, hint in found.items() if name not in DERIVED}


def compose(root: str | type, overrides: list[str]) -> Any:
    """The frozen settings that `conf/ROOT.yaml` and the command line's `overrides` make.

    `root` can also be a dataclass of a script's own settings, which needs no YAML. Raises ConfigError with every
    problem found. Writes nothing.
    """
    schema = SCHEMAS[root] if isinstance(root, str) else root
    known = leaves(schema)
    trains = any(field.name == "train" for field in fields(schema))
    # What a script does not know itself is for the training that it starts, which composes it with what else it knows.
    about_training = [word for word in overrides if trains and word.partition("=")[0] not in known]
    overrides = [word for word in overrides if word not in about_training]
    problems: list[str] = []
    for_hydra: list[str] = []
    free_text: dict[str, str] = {}  # taken past Hydra, whose grammar would refuse most English
    for override in overrides:
        sign, key, value = re.fullmatch(r"(\+\+|\+|~)?([^=]*)(?:=(.*))?", override, re.DOTALL).groups()
        if value is None or not key:
            problems.append(f"{override!r} is not an override: write key=value, as in training.max_steps=100.")
        elif root == "config" and key in groups():
            if "," in value:
                problems.append(f"{override}: {SWEEP_ADVICE}")
            elif value not in options(key):
                problems.append(f"{key}={value}: no such preset{closest(value, options(key))}. "
                                f"There are: {', '.join(options(key))}.")
            for_hydra.append(f"{key}={value}")
        elif key not in known:
            problems.append(unknown(key, known, "on the command line"))
        elif sign in ("+", "~"):
            problems.append(f"{override}: {key} exists and can only be set: write {key}={value}.")
        elif known[key] is str:
            free_text[key] = value
        else:
            for_hydra.append(f"{key}={value}")
    if problems:
        raise ConfigError(problems)

    values, choices = compose_with_hydra(root, schema, for_hydra)
    for key, text in free_text.items():
        group, _, name = key.rpartition(".")
        (values[group] if group else values)[name] = text
    problems += [unknown(key, known, place_in_yaml(key, choices)) for key in flat(values) if key not in known]
    settings = freeze(schema, values, "", problems)
    if not problems:
        problems += settings.problems()
    if problems:
        raise ConfigError(problems)
    if isinstance(settings, Settings) and not settings.name:
        settings = replace(settings, auto_name=default_name(overrides, settings, choices["experiment"]))
    return replace(settings, train=tuple(about_training)) if trains else settings


def compose_with_hydra(root: str | type, schema: Any, overrides: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """What Hydra makes of defaults, presets and overrides, as plain containers, and the presets it chose."""
    defaults = asdict(schema())
    defaults.get("model", {}).pop("vocab_size", None)
    for name in DERIVED:
        defaults.pop(name, None)
    name = root if isinstance(root, str) else f"{root.__module__}.{root.__name__}"
    ConfigStore.instance().store(f"{name}_defaults" if isinstance(root, str) else name, defaults)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra_compose(name, overrides, return_hydra_config=True)
            ours = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
            return OmegaConf.to_container(ours, resolve=True), dict(composed.hydra.runtime.choices)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError([plain_sentence(error, overrides)]) from None


def launcher_settings(overrides: list[str]) -> dict[str, Any]:
    """What hydra/launcher=... and hydra.launcher.SETTING=... come to. Raises ConfigError for what does not exist."""
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra_compose(overrides=overrides, return_hydra_config=True)
            return OmegaConf.to_container(composed.hydra.launcher)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError([plain_sentence(error, overrides)]) from None


def plain_sentence(error: Exception, overrides: list[str]) -> str:
    """Hydra's complaint without its advice."""
    for override in overrides:  # find the one that it cannot read
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException:
            return f"{override}: the value cannot be read; write a number, a word, true, false or null."
        if parsed.is_sweep_override():
            return f"{override}: {SWEEP_ADVICE}"
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        place = Path(error.problem_mark.name)
        return (f"conf/{place.parent.name}/{place.name} is not YAML that can be read, "
                f"at line {error.problem_mark.line + 1}: {error.problem}.")
    return f"The configuration cannot be composed: {str(error).strip().splitlines()[0]}"


def freeze(schema: Any, values: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    """An instance of the dataclass `schema` from `values`; what does not fit is added to `problems`."""
    arguments: dict[str, Any] = {}
    for name, hint in get_type_hints(schema).items():
        if name not in values:
            continue
        if is_dataclass(hint):
            if isinstance(values[name], dict):
                arguments[name] = freeze(hint, values[name], f"{prefix}{name}.", problems)
            else:
                problems.append(f"{prefix}{name}={values[name]} is a group of settings: set one of them, "
                                f"as in {prefix}{name}.{fields(hint)[0].name}=...")
            continue
        try:
            arguments[name] = convert(values[name], hint)
        except (TypeError, ValueError, OverflowError) as error:
            problems.append(f"{prefix}{name}={str(values[name])[:200]} {error}.")
    return schema(**arguments)


def rebuild(schema: Any, values: dict[str, Any], place: str) -> Any:
    """The dataclass instance that was saved as `values`, which are not to be trusted.

    Raises ValueError naming the `place` they come from for what `schema` does not have and for what cannot be.
    """
    problems = [f"{key[:40]} is not a setting." for key in values if key not in leaves(schema)]
    instance = freeze(schema, values, "", problems)
    if problems := problems or list(instance.problems()):
        raise ValueError(f"{place}: {in_one_line(' '.join(problems[:3]))}")
    return instance


def convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; whole floats such as 1e3 are integers. Raises ValueError saying what is wanted."""
    if get_origin(hint) in (Union, types.UnionType):
        inner = next(one for one in get_args(hint) if one is not type(None))
        return None if value is None else convert(value, inner)
    if get_origin(hint) is Literal:
        word = str(value).lower() if isinstance(value, bool) else value
        if word not in get_args(hint):
            raise ValueError(f"is not one of {', '.join(get_args(hint))}{closest(str(value), get_args(hint))}")
        return word
    if hint is str and not isinstance(value, dict | list | None):
        return str(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
        return int(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
    raise ValueError(f"is not {wanted}")


def closest(word: str, words: Any) -> str:
    """' (did you mean X?)', or nothing where no word is close."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def unknown(key: str, known: dict[str, Any], place: str) -> str:
    """The sentence about a key that does not exist."""
    by_name = {name.rpartition(".")[2]: name for name in known}  # a right name in a wrong or missing group
    guess = closest(key, [*known, *groups()])
    if not guess and (near := difflib.get_close_matches(key.rpartition(".")[2], list(by_name), n=1, cutoff=0.7)):
        guess = f" (did you mean {by_name[near[0]]}?)"
    return f"{key} ({place}) is not a setting{guess}; --help lists what there is."


def place_in_yaml(key: str, choices: dict[str, str]) -> str:
    """Which of the chosen YAML files sets `key`."""
    candidates = [(CONF / group / f"{choice}.yaml", "" if group == "experiment" else f"{group}.")
                  for group, choice in choices.items() if choice]
    for path, prefix in [*candidates, (CONF / "config.yaml", "")]:
        if path.exists() and key in {prefix + name for name in flat(read_yaml(path))}:
            return f"in conf/{path.relative_to(CONF)}"
    return "in conf/"


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, numbers such as 1e-3 included, which YAML itself takes for text."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError) as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        raise ConfigError([f"{path} is not YAML that can be read{f', at line {mark.line + 1}' if mark else ''}."]) from None
    if not isinstance(content, dict):
        raise ConfigError([f"{path} holds no settings."])
    return content


def default_name(overrides: list[str], settings: Settings, experiment: str) -> str:
    """A short, readable name for a run: its experiment, and what the command line changes of its identity."""
    chosen = dict(override.split("=", 1) for override in overrides)
    presets = {group: chosen[group] for group in groups() if group in chosen}
    places = {"data.path": settings.data.path, "data.hub_name": settings.data.hub_name}
    given = [f"{key}={value}" for key, value in (places | presets).items()]
    plain = compose("config", ["name=-", *given]) if set(overrides) - set(given) else settings
    start = presets.pop("experiment", "" if "data" in presets else experiment)
    presets.pop("logger", None)
    changes = identity_differences(asdict(plain), asdict(settings))
    named = [Path(settings.data.path).stem, Path(chosen.get("data.hub_name", "")).name]
    parts = [start, *presets.values(), *named, *in_short(changes)]
    return folder_name("-".join(part for part in parts if part))


def as_word(value: Any) -> str:
    """A value as the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def folder_name(text: str) -> str:
    """`text` as a name that every file system takes; what is cut off a long one leaves a hash."""
    name = re.sub(r"[^\w.,=+-]+", "_", text)
    return name if len(name) <= 120 else f"{name[:111]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
