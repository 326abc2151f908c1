"""YAML files: read with limits, and given to Hydra by group and name.

Every YAML file of settings goes through `read_yaml`: presets, experiments of the user's own, a
run's config.yaml, and the space of a sweep. Knows nothing of what the settings mean.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigNode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.hints import instead_of_hydras
from conf.identity import flat

MOST_BYTES = 100_000  # of a file
MOST_VALUES = 10_000  # in a file, each alias (*name) counted as all that it stands for
# What PyYAML raises for values that do not fit their tag, beside its own errors.
UNFIT = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class ConfigError(ValueError):
    """What is wrong with the configuration: all of it, one line a problem."""

    def __init__(self, problems: list[str]) -> None:
        head = "" if len(problems) == 1 else f"{len(problems)} problems in the configuration:\n  "
        super().__init__(head + "\n  ".join(problems))


def read_text(path: Path) -> str:
    """The text of a file of settings. Raises ConfigError for what is not a small UTF-8 file."""
    if not path.is_file():
        raise ConfigError([f"{path} is not a file: name a YAML file."])
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ConfigError([f"{path} is too large for settings: the most is {MOST_BYTES:,} bytes."])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"at offset {error.start}"
        raise ConfigError([f"{path} is not UTF-8 {where}: save it as UTF-8."]) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; 1e-3 is a number, which in YAML itself would be text.

    Raises ConfigError naming the file for what cannot be read: no YAML, a key twice, or more than
    the limits above.
    """
    text = read_text(path)
    try:
        values = expanded_size(yaml.compose(text, yaml.SafeLoader), {})
        if values > MOST_VALUES:
            raise ConfigError([f"{path} holds more than {MOST_VALUES:,} values, with its aliases "
                               f"(*name) written out: leave them out."])
        content = OmegaConf.to_container(OmegaConf.create(text))
    except RecursionError:
        problem = f"{path} is nested too deeply for settings: they have two levels."
        raise ConfigError([problem]) from None
    except yaml.MarkedYAMLError as error:
        line = f", at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = f"{path} is not YAML that can be read{line}: {error.problem}."
        raise ConfigError([problem]) from None
    except (yaml.YAMLError, OmegaConfBaseException, *UNFIT) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"{path} is not YAML that can be read: {first_line(error)}."]) from None
    if not isinstance(content, dict):
        raise ConfigError([f"{path} holds no settings: write lines such as key: value."])
    return content


def without_references(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Settings of a file with each ${...} replaced.

    Raises ConfigError for one that stands for nothing.
    """
    try:
        return OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([f"{path}: {unresolved(error)}"]) from None


def unresolved(error: OmegaConfBaseException) -> str:
    """The sentence about a ${...} that stands for nothing."""
    said = first_line(error)
    if missing := re.search(r"Environment variable '(.*?)' not found", said):
        return (f"{error.full_key}: the environment variable {missing[1]} is not set: set it, or "
                f"give a default, as in ${{oc.env:{missing[1]},100}}.")
    return f"{error.full_key}: the value cannot be read: {said}."


def expanded_size(node: yaml.Node | None, sizes: dict[int, float]) -> float:
    """The values in a YAML node, all aliases written out; infinite where one stands for itself.

    `sizes` are those that are known, by the node's id: an alias is the same node again, so this
    takes no longer than reading the file.
    """
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        # What it is if it is met again below.
        sizes[id(node)] = math.inf
        inner = node.value
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(expanded_size(one, sizes) for one in inner)
    return sizes[id(node)]


def nested(values: dict[Any, Any], path: Path, prefix: str = "") -> dict[str, Any]:
    """{"training.max_steps": 4} as {"training": {"max_steps": 4}}.

    To Hydra, a dot in a key of a file is a character like any other.

    Raises ConfigError for a setting that is there twice.
    """
    made: dict[str, Any] = {}
    for key, value in values.items():
        *groups, name = str(key).split(".")
        place = made
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise ConfigError([f"{prefix}{key} ({path}) is set twice, once as a part of "
                                   f"{group}: leave one out."])
        if isinstance(value, dict):
            value = nested(value, path, f"{prefix}{key}.")
        both = isinstance(value, dict) and isinstance(place.get(name), dict)
        if both and not value.keys() & place[name].keys():
            place[name] |= value
        elif name in place:
            raise ConfigError([f"{prefix}{key} ({path}) is set twice: leave one out."])
        else:
            place[name] = value
    return made


class Group(dict[str, Path]):
    """The YAML files of a group, by their names in Hydra's ConfigStore; read when chosen."""

    def __init__(self, name: str, files: dict[str, Path]) -> None:
        super().__init__({f"{preset}.yaml": path for preset, path in files.items()})
        self.name = name
        self.nodes: dict[str, ConfigNode] = {}

    def __getitem__(self, name: str) -> ConfigNode:
        if name not in self.nodes:
            path = super().__getitem__(name)
            self.nodes[name] = config_node(name, path, self.name)
        return self.nodes[name]


def config_node(name: str, path: Path, group: str | None) -> ConfigNode:
    """A YAML file as Hydra's ConfigStore keeps it. An experiment sets settings of all groups."""
    header = re.search(r"\A(?:\s*#.*\n)*?\s*#\s*@package\s+(\S+)", read_text(path))
    package = header[1] if header else "_global_" if group == "experiment" else None
    content = nested(read_yaml(path), path)
    refuse_hydras(content, path)
    return ConfigNode(name, OmegaConf.create(content), group, package, provider=None)


def refuse_hydras(content: dict[str, Any], path: Path) -> None:
    """Raise ConfigError for settings of Hydra's own in a file: they would do nothing."""
    keys = list(flat({"hydra": content["hydra"]})) if "hydra" in content else []
    for choice in content.get("defaults") or []:
        if isinstance(choice, dict):
            keys += [key.split()[-1].lstrip("/") for key in map(str, choice) if "hydra/" in key]
    if keys:
        raise ConfigError([f"{key} ({path}) is not used here: {instead_of_hydras(key)}."
                           for key in keys])


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
