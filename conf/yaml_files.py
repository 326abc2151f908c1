"""Read YAML files of settings: presets, experiments, a run's config.yaml, the space of a sweep.

The files may come from strangers, so their size is limited, and every error is one sentence. Knows
no names of settings.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import atomic
from conf.identity import flat_pairs
from terminal import escaped, first_line

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


def is_yaml(name: str) -> bool:
    """Whether a name is that of a YAML file."""
    return name.lower().endswith((".yaml", ".yml"))


def read_text(path: Path) -> str:
    """The text of a file of settings. Raises ConfigError if it is not a small UTF-8 file."""
    if not atomic.is_regular(path):
        raise ConfigError([f"{path} is not a file: name a YAML file."])
    # Special files can have more than the size that the system tells.
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ConfigError([f"{path} is too large for settings: the limit is {MAX_BYTES:,} bytes."])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"{path} is not UTF-8 at offset {error.start}: save it as UTF-8."
        raise ConfigError([problem]) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; 1e-3 is a number, unlike in plain YAML.

    Raises ConfigError naming the file if it is not valid YAML, has a key twice or is too large.
    """
    text = read_text(path)
    root = content = None
    count, problem = 0, ""
    # PyYAML counts the values, OmegaConf reads them: it knows 1e-3 as a number.
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        # OmegaConf has an assertion against a single number.
        if isinstance(root, yaml.CollectionNode):
            count = expanded_size(root, {})
            if count <= MAX_VALUES:
                content = OmegaConf.to_container(OmegaConf.create(text))
    except RecursionError:
        problem = "is nested too deeply for settings: they have two levels"
    except yaml.MarkedYAMLError as error:
        line = f", at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = f"is not valid YAML{line}: {error.problem}"
    except (yaml.YAMLError, OmegaConfBaseException, *BAD_VALUES) as error:
        problem = f"is not valid YAML: {first_line(error)}"
    # Too many values, or none that are settings.
    if count > MAX_VALUES:
        problem = (f"holds more than {MAX_VALUES:,} values, with its aliases (*name) written out: "
                   "remove the aliases")
    elif not problem and not isinstance(content, dict):
        problem = "holds no settings: write lines such as key: value"
    if problem:
        raise ConfigError([f"{path} {problem}."])
    # Values that are valid, but not what they look like. One with aliases is met several times.
    traps = dict.fromkeys(find_traps(root))
    if traps:
        raise ConfigError([f"{path}, {trap}." for trap in traps])
    return content


def expanded_size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """The number of values in a YAML node with all aliases written out.

    An alias is the same node again: `sizes`, by the nodes' ids, keeps this as fast as reading. A
    node that contains itself is infinite.
    """
    if id(node) in sizes:
        return sizes[id(node)]
    # This is the answer if the node is met again inside itself.
    sizes[id(node)] = math.inf
    sizes[id(node)] = 1 + sum(expanded_size(one, sizes) for one in inner_nodes(node))
    return sizes[id(node)]


def find_traps(node: yaml.Node) -> Iterator[str]:
    """Yield a sentence about each value that YAML or Hydra reads otherwise than it looks."""
    place = f"line {node.start_mark.line + 1}: {node.value}"
    if isinstance(node, yaml.CollectionNode):
        for one in inner_nodes(node):
            yield from find_traps(one)
    elif node.value == "???":
        yield f"{place} marks a missing value: write the value, or remove the line"
    elif node.tag == "tag:yaml.org,2002:int" and re.match(r"[-+]?0[\d_]|.*:", node.value):
        number = yaml.SafeLoader("").construct_yaml_int(node)
        yield f"{place} is the number {number} in YAML: write that, or use quotes"


def inner_nodes(node: yaml.Node) -> list[yaml.Node]:
    """The keys and values of a mapping, or the items of a sequence."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


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
        return (f"{error.full_key}: the environment variable {missing[1]} is not set: set it, or "
                f"give a default, as in ${{oc.env:{missing[1]},100}}.")
    missing = re.search(r"Interpolation key '(.*?)' not found", said)
    if missing and missing[1] in os.environ:
        return (f"{error.full_key}: ${{{missing[1]}}} is not a setting: write "
                f"${{oc.env:{missing[1]}}} for the environment variable.")
    return f"{error.full_key}: the value cannot be read: {said}."


def nested(values: dict[Any, Any], path: Path) -> dict[str, Any]:
    """{"training.max_steps": 4} as {"training": {"max_steps": 4}}.

    To Hydra, a dot in a key of a file is a character like any other. Raises ConfigError for a
    setting that occurs twice.
    """
    made: dict[str, Any] = {}
    for key, value in flat_pairs(values):
        *groups, name = key.split(".")
        inner = made
        for group in groups:
            inner = inner.setdefault(group, {})
            if not isinstance(inner, dict):
                break
        if not isinstance(inner, dict) or name in inner:
            raise ConfigError([f"{key} ({path}) is set twice: remove one."])
        inner[name] = value
    return made
