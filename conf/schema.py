"""Compose the settings of a command: frozen dataclasses, from presets and overrides.

The defaults are those of the dataclasses. All problems come in one report: unknown keys, wrong
types, values out of range. Hydra's part of the work is in composition.py.
"""

import hashlib
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml

from conf.composition import compose_with_hydra
from conf.convert import freeze, from_text
from conf.identity import flat, identity_differences, in_short
from conf.presets import Origins, groups
from conf.settings import SampleSettings, Settings, leaves
from conf.unknown import not_an_override, unknown, wrong_preset
from conf.yaml_files import ConfigError, is_yaml
from model.config import GPTConfig
from setting import expanded

OVERRIDE = re.compile(r"(\+\+|\+|~)?([^=]*)(?:=(.*))?", re.DOTALL)
# The dataclass by the name of its file, conf/NAME.yaml.
SCHEMAS = {"config": Settings, "sample": SampleSettings}


def compose(root: str | type, overrides: list[str], validate: bool = True) -> Any:
    """The frozen settings that `conf/ROOT.yaml` and the command line's `overrides` make.

    `root` can also be the dataclass of a script's own settings, which needs no YAML. Raises
    ConfigError with every problem found, without `validate` only with wrong names and types.
    Writes nothing and changes no global state.
    """
    # Parse the overrides, and let Hydra compose.
    schema = SCHEMAS[root] if isinstance(root, str) else root
    known = leaves(schema)
    # The overrides for a training that the script starts are checked by that training.
    of_training = []
    if hasattr(schema, "train"):
        of_training = [word for word in overrides if word.partition("=")[0] not in known]
        overrides = [word for word in overrides if word not in of_training]
    overrides = parse_overrides(root, known, overrides)
    values, experiment, origins = compose_with_hydra(root, schema, overrides)

    # Find unknown keys in YAML files, convert the values, and check them.
    known_prefixes = tuple(f"{name}." for name in known)
    problems = []
    for key in flat(values):
        if not f"{key}.".startswith(known_prefixes):
            place, group = origins.get(key, ("in conf/config.yaml", ""))
            problems.append(unknown(key, known, place, group))
    settings = freeze(schema, values, "", problems)
    if isinstance(settings, Settings) and settings.init_from:
        settings = replace(settings, model_given=chosen_for_model(overrides, origins))
    if isinstance(settings, Settings) and not settings.name and not problems:
        settings = replace(settings, auto_name=automatic_name(overrides, settings, experiment))
    if validate and not problems:
        problems = list(settings.problems())
    if problems:
        raise ConfigError(problems)
    if of_training:
        return replace(settings, train=tuple(of_training))
    return settings


def chosen_for_model(overrides: list[str], origins: Origins) -> str:
    """The names of the settings of the model that the command line or an experiment sets.

    A preset on the command line sets the shape, but neither dropout nor the length of a sequence.
    What an experiment chooses by a preset is not included: weights replace it.
    """
    keys = {override.partition("=")[0] for override in overrides}
    keys |= {key for key, (_, group) in origins.items() if not group}
    given = {key.removeprefix("model.") for key in keys if key.startswith("model.")}
    if "model" in keys:
        given |= {one.name for one in fields(GPTConfig)} - {"vocab_size", "block_size", "dropout"}
    return " ".join(sorted(given))


def parse_overrides(root: str | type, known: dict[str, Any], overrides: list[str]) -> list[str]:
    """The overrides as key=value. Raises ConfigError with all problems of their keys."""
    problems: list[str] = []
    made: list[str] = []
    for override in overrides:
        # A sign of Hydra's, the key and the value.
        sign, key, value = OVERRIDE.fullmatch(override).groups()
        is_group = root == "config" and key in groups()
        problem = ""
        # The file of an experiment is a path.
        if key == "experiment" and value and is_yaml(value):
            try:
                value = expanded(value)
            except ValueError as error:
                problem = f"{override} {error}."
        # Only the first problem of an override is reported.
        if sign == "~" and key:
            problem = (f"{override}: settings cannot be removed: write key=value, as in "
                       "training.max_seconds=null.")
        # It must have a value, and the name of a setting or group.
        elif value is None or not key:
            problem = not_an_override(override, known)
        elif key not in known and not is_group:
            problem = unknown(key, known, "on the command line")
        elif sign == "+":
            problem = f"{override}: {key} exists and can only be set: write {key}={value}."
        elif is_group:
            problem = problem or wrong_preset(key, value)
        if problem:
            problems.append(problem)
        made.append(f"{key}={value}")
    if problems:
        raise ConfigError(problems)
    return made


def automatic_name(overrides: list[str], settings: Settings, experiment: str) -> str:
    """A short name for a run: its experiment, and the overrides of its identity."""
    # The presets and paths on the command line are named as they are.
    chosen = dict(override.split("=", 1) for override in overrides)
    choices = {group: chosen[group] for group in groups() if group in chosen}
    paths = {"data.path": settings.data.path, "data.hub_name": settings.data.hub_name,
             "init_from": settings.init_from}
    named = [f"{key}={value}" for key, value in (paths | choices).items()]
    # All else by its difference from the run with these presets and paths alone. Without the other
    # overrides, a setting may be missing, or not be used.
    plain = settings
    if set(overrides) - set(named):
        plain = compose("config", ["name=-", *named], validate=False)
    # The name: the experiment, the presets, the ends of the paths, the differences.
    start = choices.pop("experiment", "" if "data" in choices else experiment)
    if is_yaml(start):
        start = Path(start).stem
    choices.pop("logger", None)
    sources = [Path(settings.data.path).stem, Path(chosen.get("data.hub_name", "")).name,
               Path(chosen.get("init_from", "")).stem]
    changes = identity_differences(asdict(plain), asdict(settings))
    parts = [start, *choices.values(), *sources, *in_short(changes)]
    return folder_name("-".join(part for part in parts if part))


def as_yaml(settings: Any) -> str:
    """Settings as `--cfg job` prints them, and as config.yaml keeps them."""
    return yaml.dump_all([asdict(settings)], Dumper=Dumper, sort_keys=False, allow_unicode=True)


class Dumper(yaml.SafeDumper):
    """Writes quotes around text that `read_yaml` would read as a number, such as 1e3."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        style = None if isinstance(from_text(text), str) else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


Dumper.add_representer(str, Dumper.represent_str)


def folder_name(text: str) -> str:
    """`text` as a name that every file system accepts; a long one is cut and gets a hash."""
    name = re.sub(r"[^\w.,=+-]+", "_", text)
    if len(name) <= 120:
        return name
    return f"{name[:111]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
