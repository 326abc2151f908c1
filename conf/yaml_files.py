"""Read YAML files of settings: presets, experiments, a run's config.yaml, the space of a sweep.

The files may come from strangers, so their size is limited, and every error is one sentence. Knows
no names of settings.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from terminal import escaped, first_line

YAML_SUFFIXES = (".yaml", ".yml")
MAX_BYTES = 100_000
# In one file, with each alias (*name) written out.
MAX_VALUES = 10_000
# PyYAML raises these, besides its own errors, for values that do not fit their tag.
BAD_VALUES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class ConfigError(ValueError):
    """All problems of a configuration, one per line."""

    def __init__(self, problems: list[str]) -> None:
        problems = [escaped(problem, keep="") for problem in problems]
        count = f"{len(problems)} problems in the configuration:\n  "
        super().__init__(("" if len(problems) == 1 else count) + "\n  ".join(problems))


def read_text(path: Path) -> str:
    """The text of a file of settings. Raises ConfigError if it is not a small UTF-8 file."""
    if not path.is_file():
        raise ConfigError([f"{path} is not a file: name a YAML file."])
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ConfigError([f"{path} is too large for settings: the limit is {MAX_BYTES:,} bytes."])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"at offset {error.start}"
        raise ConfigError([f"{path} is not UTF-8 {where}: save it as UTF-8."]) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; 1e-3 is a number, unlike in plain YAML.

    Raises ConfigError naming the file if it is not valid YAML, has a key twice or is too large.
    """
    text = read_text(path)
    # PyYAML counts the values, OmegaConf reads them: it knows 1e-3 as a number.
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        count = expanded_size(root, {})
        # OmegaConf has an assertion against a single number.
        content = None
        if count <= MAX_VALUES and not isinstance(root, yaml.ScalarNode):
            content = OmegaConf.to_container(OmegaConf.create(text))
    except RecursionError:
        problem = f"{path} is nested too deeply for settings: they have two levels."
        raise ConfigError([problem]) from None
    except yaml.MarkedYAMLError as error:
        line = f", at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError([f"{path} is not valid YAML{line}: {error.problem}."]) from None
    except (yaml.YAMLError, OmegaConfBaseException, *BAD_VALUES) as error:
        raise ConfigError([f"{path} is not valid YAML: {first_line(error)}."]) from None
    if count > MAX_VALUES:
        raise ConfigError([
            f"{path} holds more than {MAX_VALUES:,} values, with its aliases (*name) written out: "
            "remove the aliases."
        ])
    if not isinstance(content, dict):
        raise ConfigError([f"{path} holds no settings: write lines such as key: value."])
    refuse_traps(root, path)
    return content


def expanded_size(node: yaml.Node | None, sizes: dict[int, float]) -> float:
    """The number of values in a YAML node with all aliases written out.

    An alias is the same node again: `sizes`, by the nodes' ids, keeps this as fast as reading. A
    node that contains itself is infinite.
    """
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        # This is the answer if the node is met again inside itself.
        sizes[id(node)] = math.inf
        inner = node.value
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(expanded_size(one, sizes) for one in inner)
    return sizes[id(node)]


def refuse_traps(root: yaml.Node, path: Path) -> None:
    """Raise ConfigError for values that YAML or Hydra reads otherwise than they look."""
    # Visit all nodes, and collect the problems of single values.
    problems = []
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif node.value == "???":
            problems.append((node, "marks a missing value: write the value, or remove the line"))
        elif node.tag == "tag:yaml.org,2002:int" and re.match(r"[-+]?0[\d_]|.*:", node.value):
            number = yaml.SafeLoader("").construct_yaml_int(node)
            problems.append((node, f"is the number {number} in YAML: write that, or use quotes"))
    # The last nodes were visited first.
    if problems:
        raise ConfigError([
            f"{path}, line {node.start_mark.line + 1}: {node.value} {problem}."
            for node, problem in reversed(problems)
        ])


def without_references(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings of a file with each ${...} replaced. Raises ConfigError for an unknown one."""
    try:
        return OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([f"{path}: {unresolved(error)}"]) from None


def unresolved(error: OmegaConfBaseException) -> str:
    """The sentence about a ${...} that has no value."""
    said = first_line(error)
    missing = re.search(r"Environment variable '(.*?)' not found", said)
    if missing:
        return (
            f"{error.full_key}: the environment variable {missing[1]} is not set: set it, or give "
            f"a default, as in ${{oc.env:{missing[1]},100}}.")
    missing = re.search(r"Interpolation key '(.*?)' not found", said)
    if missing and missing[1] in os.environ:
        return (f"{error.full_key}: ${{{missing[1]}}} is not a setting: write "
                f"${{oc.env:{missing[1]}}} for the environment variable.")
    return f"{error.full_key}: the value cannot be read: {said}."


def nested(values: dict[Any, Any], path: Path, prefix: str = "") -> dict[str, Any]:
    """{"training.max_steps": 4} as {"training": {"max_steps": 4}}.

    To Hydra, a dot in a key of a file is a character like any other. Raises ConfigError for a
    setting that occurs twice.
    """
    made: dict[str, Any] = {}
    for key, value in values.items():
        # Find the group of the key, which may have been written in the other form before.
        *groups, name = str(key).split(".")
        twice = ConfigError([f"{prefix}{key} ({path}) is set twice: remove one."])
        place = made
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise twice
        # Put the value there, or merge two groups that share no setting.
        if isinstance(value, dict):
            value = nested(value, path, f"{prefix}{key}.")
        if name not in place:
            place[name] = value
            continue
        both = isinstance(value, dict) and isinstance(place[name], dict)
        if not both or value.keys() & place[name].keys():
            raise twice
        place[name] |= value
    return made
