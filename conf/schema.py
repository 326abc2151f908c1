"""The bridge from Hydra's composed configuration to frozen dataclasses; past it nobody sees a DictConfig.

Defaults live in the dataclasses beside the code that reads them. Here they are gathered, given to Hydra's
ConfigStore, overridden by the YAML presets and the command line, checked, and frozen. All problems
come in one report: unknown keys, wrong types, values out of range.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, NewType, Union, get_args, get_origin, get_type_hints

import yaml
from hydra import compose as hydra_compose
from hydra import initialize, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.hints import OTHER_VALUES, instead_of_hydras, our_name, unit_note
from conf.identity import flat, identity_differences, in_one_line, in_short
from conf.presets import (
    ConfigError,
    Group,
    config_node,
    first_line,
    nested,
    read_yaml,
    unresolved,
)
from conf.sampling import SamplingConfig
from data.sources import DataConfig
from model.config import GPTConfig
from training.config import OptimConfig, TrainingConfig
from training.recorder import LoggerConfig

CONF = Path(__file__).parent
SWEEP_ADVICE = "several values are a sweep: add -m to run them all, or choose one."
YAML_FILES = (".yaml", ".yml")
GIVEN_FILE = "given-file"  # Hydra's name for an experiment that is given by its path
VERBATIM = ("prompt", "stop", "data.separator")  # text in which ${...} means nothing
# The types of settings that name a file or folder, or several with commas between: ~ is expanded.
FilePath = NewType("FilePath", str)
FilePaths = NewType("FilePaths", str)


@dataclass(frozen=True)
class Settings:
    """Everything about a training run."""

    name: str = ""  # of the run's folder; empty: auto_name
    auto_name: str = ""  # made from the experiment and what differs from it
    seed: int = 1337
    runs_dir: FilePath = "runs"
    restart: bool = False  # start over, once: the run in the folder is renamed; see docs/runs.md
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

    def warnings(self) -> Iterator[str]:
        """One sentence for each value that works, and is probably not meant."""
        steps = self.training.max_steps
        if self.optim.warmup_steps > self.optim.last_full_step(steps):
            yield (f"optim.warmup_steps={self.optim.warmup_steps} of training.max_steps={steps}: "
                   f"the learning rate falls, or the run ends, before it reaches its full value.")


@dataclass(frozen=True)
class SampleSettings(SamplingConfig):
    """Everything about sampling from a run."""

    run: FilePath = ""  # the run's name, or its folder; empty: the run that was trained last
    runs_dir: FilePath = "runs"
    checkpoint: str = "best"  # best, last, or the number of a step
    prompt: str = ""  # empty: start a new text
    prompt_file: FilePath = ""  # read the prompt from this file; - reads standard input
    prompts: FilePath = ""  # a file with one prompt per line: complete each of them into `out`
    out: FilePath = ""  # one JSON line per completion; existing lines are kept
    batch_size: int = 16  # of `prompts`: completions at once
    logprobs: bool = False  # print each token with its probability
    num_samples: int = 1
    interactive: bool = False  # ask for prompts until the input ends
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        yield from super().problems()
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} must be at least 1."
        if sum(map(bool, (self.prompt, self.prompt_file, self.prompts, self.interactive))) > 1:
            yield "prompt, prompt_file, prompts and interactive exclude each other: choose one."
        if bool(self.prompts) != bool(self.out):
            yield "prompts=FILE and out=FILE.jsonl belong together: give both."
        if self.prompts and self.logprobs:
            yield ("logprobs=true prints to the terminal, prompts= writes a file: leave it out. "
                   "Each line of out has the mean log probability.")
        yield from checkpoint_problems(self.checkpoint)


def checkpoint_problems(which: str) -> Iterator[str]:
    """One sentence if the setting `checkpoint` is neither best, nor last, nor a step."""
    if which not in ("best", "last") and not (which.isdecimal() and len(which) < 20):
        yield f"checkpoint={which} is not best, last or the number of a step{closest(which, ('best', 'last'))}."


SCHEMAS = {"config": Settings, "sample": SampleSettings}  # by conf/NAME.yaml

DERIVED = ("model.vocab_size", "auto_name", "train")  # nobody sets these: the tokenizer and the other settings decide them


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

    `root` can also be a dataclass of a script's own settings, which needs no YAML. Raises
    ConfigError with every problem found. Writes nothing.
    """
    schema = SCHEMAS[root] if isinstance(root, str) else root
    known = leaves(schema)
    trains = any(field.name == "train" for field in fields(schema))
    about_training: list[str] = []
    if trains:
        # What a script does not know is for the training that it starts, which checks it.
        about_training = [word for word in overrides if word.partition("=")[0] not in known]
        overrides = [word for word in overrides if word not in about_training]
    words = checked(root, known, overrides)
    values, choices = compose_with_hydra(root, schema, words)

    settings_or_inside = tuple(f"{name}." for name in known)
    problems = [unknown(key, known, *place_in_yaml(key, choices))
                for key in flat(values) if not f"{key}.".startswith(settings_or_inside)]
    settings = freeze(schema, values, "", problems)
    if not problems:
        problems += settings.problems()
    if problems:
        raise ConfigError(problems)
    if isinstance(settings, Settings) and not settings.name:
        automatic = default_name(words, settings, choices["experiment"])
        settings = replace(settings, auto_name=automatic)
    return replace(settings, train=tuple(about_training)) if trains else settings


def checked(root: str | type, known: dict[str, Any], overrides: list[str]) -> list[str]:
    """The overrides as key=value. Raises ConfigError with all that is wrong with their keys."""
    problems: list[str] = []
    words: list[str] = []
    for override in overrides:
        parts = re.fullmatch(r"(\+\+|\+|~)?([^=]*)(?:=(.*))?", override, re.DOTALL)
        sign, key, value = parts.groups()
        if sign == "~" and key:
            problems.append(f"{override}: settings cannot be removed: write key=value, as "
                            f"in training.max_seconds=null.")
        elif value is None or not key:
            problems.append(no_override(override))
        elif key not in known and not (root == "config" and key in groups()):
            problems.append(unknown(key, known, "on the command line"))
        elif sign == "+":
            problems.append(f"{override}: {key} exists and can only be set: write {key}={value}.")
        elif key not in known and (problem := wrong_preset(key, value)):
            problems.append(problem)
        words.append(f"{key}={value}")
    if problems:
        raise ConfigError(problems)
    return words


def no_override(word: str) -> str:
    """The sentence about a word that is not key=value."""
    meant = "write key=value, as in training.max_steps=100"
    if Path(word).suffix in YAML_FILES:
        meant = f"write experiment={word} for a file of settings"
    elif word and os.path.exists(word):
        meant = f"write data=text data.path={word} to train on it"
    return f"{word!r} is not an override: {meant}."


def wrong_preset(group: str, value: str) -> str:
    """What is wrong with the choice of a preset or an experiment's file; empty if nothing is."""
    if value in options(group):
        return ""
    is_file = group == "experiment" and Path(value).suffix in YAML_FILES
    if is_file and ("," not in value or os.path.exists(os.path.expanduser(value))):
        return ""
    if "," in value or "(" in value:
        return f"{group}={value}: {SWEEP_ADVICE}"
    there = f"There are: {', '.join(options(group))}."
    if group == "experiment":
        there += " A file of your own is named by its path, as in experiment=own.yaml."
    return f"{group}={value}: no such preset{closest(value, options(group))}. {there}"


def compose_with_hydra(
    root: str | type, schema: Any, words: list[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What Hydra makes of defaults, presets and overrides, as plain containers, and its choices.

    An experiment that is a file of the user's own is among the choices by its path.
    """
    defaults = asdict(schema())
    drop_derived(defaults)
    # Hydra's grammar would refuse most English, and some references: they do not pass through it.
    known = leaves(schema)
    text: dict[str, str] = {}
    overrides: list[str] = []
    for word in words:
        key, _, value = word.partition("=")
        if key in known and (is_text(known[key]) or "${" in value):
            text[key] = value
        else:
            overrides.append(word)
    own = own_file(overrides)
    files = {GIVEN_FILE: own} if own else {}
    if own and (saved := saved_settings(own)):
        files = {}
        overrides = start_from(saved, defaults, overrides)
    elif own:
        overrides = [word for word in overrides if not word.startswith("experiment=")]
        overrides.append(f"experiment={GIVEN_FILE}")
    name = register(root, defaults, files)
    try:
        with initialize(version_base="1.3", config_path=None):
            composed = hydra_compose(name, overrides, return_hydra_config=True)
            values = resolved(composed, text)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        sentence = plain_sentence(error, overrides)
        raise ConfigError([sentence.replace(GIVEN_FILE, str(own))]) from None
    choices = dict(composed.hydra.runtime.choices)
    return values, choices | ({"experiment": str(own)} if own else {})


def drop_derived(values: dict[str, Any]) -> None:
    """Remove what other settings decide from all settings."""
    for name in DERIVED:
        group, _, last = name.rpartition(".")
        (values.get(group, {}) if group else values).pop(last, None)


def own_file(overrides: list[str]) -> Path | None:
    """The experiment that is given by its path, if one is."""
    given = [word.partition("=")[2] for word in overrides if word.startswith("experiment=")]
    if given and Path(given[-1]).suffix in YAML_FILES:
        return Path(expanded(given[-1]))
    return None


def saved_settings(path: Path) -> dict[str, Any]:
    """All settings of a run, if that is what the file holds, such as a run's config.yaml."""
    values = nested(read_yaml(path), path)
    if "auto_name" not in values:
        return {}
    drop_derived(values)
    return values


def start_from(saved: dict[str, Any], defaults: dict[str, Any], overrides: list[str]) -> list[str]:
    """Put the settings of a run in the place of the `defaults`; return the overrides to use then.

    No preset is chosen but those of the command line, and each replaces the whole of its group.
    """
    choices = dict(word.split("=", 1) for word in overrides if word.partition("=")[0] in groups())
    for name, value in saved.items():
        if isinstance(value, dict) and isinstance(defaults.get(name), dict):
            if name not in choices:
                defaults[name] |= value
        else:
            defaults[name] = value
    nothing = [f"~{group}" for group in groups() if group not in choices]
    others = [word for word in overrides if not word.startswith("experiment=")]
    return [*nothing, "~experiment", *others]


def register(root: str | type, defaults: dict[str, Any], files: dict[str, Path]) -> str:
    """Give Hydra the defaults, and the YAML files, which it reads when they are chosen.

    `files` are more experiments, by name. Returns the name of the root.
    """
    store = ConfigStore.instance()
    if not isinstance(root, str):
        name = f"{root.__module__}.{root.__name__}"
        store.store(name, defaults)
        return name
    store.store(f"{root}_defaults", defaults)
    for group in groups():
        presets = {name: CONF / group / f"{name}.yaml" for name in options(group)}
        store.repo[group] = Group(group, presets | (files if group == "experiment" else {}))
    store.repo[f"{root}.yaml"] = config_node(f"{root}.yaml", CONF / f"{root}.yaml", None)
    return root


def resolved(composed: DictConfig, text: dict[str, str]) -> dict[str, Any]:
    """The settings with all ${...} replaced. `text` is taken as it is, unless it has one too."""
    OmegaConf.register_new_resolver("text", text.get, replace=True)
    for key, value in text.items():
        literal = key in VERBATIM or "${" not in value or os.path.exists(value)
        OmegaConf.update(composed, key, f"${{text:{key}}}" if literal else value, force_add=True)
    settings = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
    return OmegaConf.to_container(settings, resolve=True)


def launcher_settings(overrides: list[str]) -> dict[str, Any]:
    """What hydra/launcher=... and hydra.launcher.SETTING=... come to. Raises ConfigError for what does not exist."""
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra_compose(overrides=overrides, return_hydra_config=True)
            return OmegaConf.to_container(composed.hydra.launcher)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError([plain_sentence(error, overrides)]) from None


def plain_sentence(error: Exception, overrides: list[str]) -> str:
    """Hydra's complaint without its advice."""
    for override in overrides:  # find the one that it cannot read
        try:
            parsed = OverridesParser.create().parse_override(override)
        except (HydraException, ValueError):
            return (f"{override[:200]}: the value cannot be read; write a number, a word, true, "
                    f"false or null.")
        if parsed.is_sweep_override():
            return f"{override}: {SWEEP_ADVICE}"
    if isinstance(error, OmegaConfBaseException):
        return unresolved(error)
    said = first_line(error)
    absent = re.search(r"Could not find '(\w+)/([^/]*?)'", said)
    if absent and absent[1] in groups():
        chosen = [word for word in overrides if word.startswith("experiment=")]
        where = f" (in {chosen[-1]})" if chosen else ""
        return wrong_preset(*absent.groups()).replace(":", f"{where}:", 1)
    return f"The configuration cannot be composed: {said}."


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
            problems.append(f"{prefix}{name}={as_word(values[name])[:200]} {error}.")
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
        if value in (None, "null"):
            return None
        try:
            return convert(value, inner)
        except ValueError as error:
            raise ValueError(f"{error}, or null for none") from None
    if get_origin(hint) is Literal:
        word = str(value).lower() if isinstance(value, bool) else value
        if word not in get_args(hint):
            meant = OTHER_VALUES.get(str(value).lower(), str(value).lower())
            words = get_args(hint)
            raise ValueError(f"is not one of {', '.join(words)}{closest(meant, words)}")
        return word
    if is_text(hint) and not isinstance(value, dict | list | None):
        if hint is FilePaths:
            return ",".join(expanded(path) for path in str(value).split(","))
        return expanded(str(value)) if hint is FilePath else str(value)
    if isinstance(value, str):
        value = from_text(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and abs(value) >= 2**127:
        raise ValueError("is too large")
    if hint is int and isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
        return int(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "text")
    raise ValueError(f"is not {wanted}")


def is_text(hint: Any) -> bool:
    """Whether settings of this type are text, which is taken as it is."""
    return hint in (str, FilePath, FilePaths)


def from_text(text: str) -> Any:
    """The number, true or false that a text stands for, as a variable's value; else the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def expanded(path: str) -> str:
    """A path with ~ or ~user at its beginning replaced by the home folder.

    Raises ValueError where nobody knows that folder, unless a file of that name is here.
    """
    found = os.path.expanduser(path)
    if path.startswith("~") and found == path and not os.path.exists(path):
        raise ValueError("names no home folder of this machine: write ./ before a name that begins "
                         "with ~")
    return found


def closest(word: str, words: Any) -> str:
    """' (did you mean X?)', or nothing where no word is close."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def unknown(key: str, known: dict[str, Any], place: str, group: str = "") -> str:
    """The sentence about a key that does not exist; `group` if a preset of it has the key."""
    if advice := instead_of_hydras(key.removeprefix(f"{group}.")):
        return f"{key} ({place}) is not used here: {advice}."
    inside = key.removeprefix(f"{group}.")
    if group and inside in known:
        own = inside.startswith(f"{group}.")
        return f"{inside} ({place}) is not for a preset of {group}: " + (
            f"write {inside.removeprefix(f'{group}.')}, without the group." if own else
            "a preset sets its own group only, and an experiment all of them.")
    meant = likely_name(key, known)
    if not meant and (program := program_of(key)):
        return f"{key} ({place}) is a setting of {program} only; --help lists what there is here."
    meant = meant or close_name(key, known)
    guess = f" (did you mean {meant}?){unit_note(key)}" if meant else ""
    return f"{key} ({place}) is not a setting{guess}; --help lists what there is."


def likely_name(key: str, known: dict[str, Any]) -> str:
    """The setting or group that others call `key`, or that has its last part; empty for none."""
    by_last = {name.rpartition(".")[2]: name for name in known}
    last = key.rpartition(".")[2].replace("-", "_").lower()
    return our_name(key, {*known, *choosable(known)}) or by_last.get(last, "")


def close_name(key: str, known: dict[str, Any]) -> str:
    """The setting or group that is spelled most like `key`; empty where none is close."""
    by_last = {name.rpartition(".")[2]: name for name in known}
    if near := difflib.get_close_matches(key.lower(), [*known, *choosable(known)], n=1, cutoff=0.6):
        return near[0]
    near = difflib.get_close_matches(key.lower().rpartition(".")[2], by_last, n=1, cutoff=0.7)
    return by_last[near[0]] if near else ""


def choosable(known: dict[str, Any]) -> list[str]:
    """The groups, where presets can be chosen: beside the settings of a training."""
    return groups() if known.keys() >= leaves(Settings).keys() else []


def program_of(key: str) -> str:
    """The program or the flag that a setting or a group is for; empty for what nobody knows."""
    if key in ("jobs", "trials", "pruner", "sweep"):
        return "sweeps (python train.py -m, python -m scripts.sweep)"
    if key in leaves(SampleSettings):
        return "sample.py"
    return "train.py" if key in (*leaves(Settings), *groups()) else ""


def place_in_yaml(key: str, choices: dict[str, str]) -> tuple[str, str]:
    """Which of the chosen YAML files sets `key`, in words, and the group that it is a preset of."""
    for group, choice in choices.items():
        if not choice or group not in groups():
            continue
        own = Path(choice).suffix in YAML_FILES
        path = Path(choice) if own else CONF / group / f"{choice}.yaml"
        prefix = "" if group == "experiment" else f"{group}."
        if path.exists() and key in {prefix + name for name in flat(nested(read_yaml(path), path))}:
            where = f"{path}" if own else f"conf/{path.relative_to(CONF)}"
            return f"in {where}", prefix.rstrip(".")
    return "in conf/config.yaml", ""


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
    start = Path(start).stem if Path(start).suffix in YAML_FILES else start
    parts = [start, *presets.values(), *named, *in_short(changes)]
    return folder_name("-".join(part for part in parts if part))


def as_yaml(settings: Any) -> str:
    """Settings as `--cfg job` prints them, and as config.yaml keeps them."""
    return yaml.safe_dump(asdict(settings), sort_keys=False, allow_unicode=True)


def as_word(value: Any) -> str:
    """A value as the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def folder_name(text: str) -> str:
    """`text` as a name that every file system takes; what is cut off a long one leaves a hash."""
    name = re.sub(r"[^\w.,=+-]+", "_", text)
    return name if len(name) <= 120 else f"{name[:111]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
