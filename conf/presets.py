"""YAML files of settings: presets, a user's experiments, a run's config.yaml, a sweep's space.

Every such file is read by `read_yaml`, which limits its size. Knows no names of settings.
"""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigNode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.hints import closest, instead_of_hydras
from conf.identity import flat
from terminal import escaped, first_line

CONF = Path(__file__).parent
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


def options(group: str) -> list[str]:
    """The names of a group's presets, which are the files `conf/GROUP/*.yaml`."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def groups() -> list[str]:
    """The configuration groups, which are the folders of `conf` with presets."""
    return list(groups_of(CONF))


@functools.cache
def groups_of(conf: Path) -> list[str]:
    folders = [path for path in conf.iterdir() if path.is_dir() and path.name != "sweep"]
    return sorted(path.name for path in folders if any(path.glob("*.yaml")))


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
    if problems:
        raise ConfigError([
            f"{path}, line {node.start_mark.line + 1}: {node.value} {problem}."
            for node, problem in reversed(problems)
        ])


def default_presets() -> dict[str, dict[str, Any]]:
    """By group, the settings of the presets that conf/config.yaml chooses, read without Hydra."""
    chosen = {}
    for choice in read_yaml(CONF / "config.yaml")["defaults"]:
        if isinstance(choice, dict):
            chosen |= choice
    return {group: preset(group, name) for group, name in chosen.items()}


def preset(group: str, name: str) -> dict[str, Any]:
    """The settings of a preset, those of the presets in its defaults list included."""
    values = read_yaml(CONF / group / f"{name}.yaml")
    made: dict[str, Any] = {}
    for base in values.pop("defaults", []):
        made |= values if base == "_self_" else preset(group, base)
    return made | values


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


class Group(dict[str, Path]):
    """The YAML files of a group in Hydra's ConfigStore, which are read when they are chosen."""

    def __init__(self, group: str) -> None:
        super().__init__({f"{name}.yaml": CONF / group / f"{name}.yaml" for name in options(group)})
        self.group = group
        self.nodes: dict[str, ConfigNode] = {}

    def __getitem__(self, name: str) -> ConfigNode:
        if name not in self.nodes:
            self.nodes[name] = config_node(super().__getitem__(name), self.group)
        return self.nodes[name]

    def add(self, name: str, path: Path, content: dict[str, Any]) -> None:
        """Add the file `path`, whose content is known, as the preset `name`."""
        self[f"{name}.yaml"] = path
        self.nodes[f"{name}.yaml"] = config_node(path, self.group, content)

    def origins(self) -> dict[str, tuple[str, str]]:
        """By each setting in the files that were read: the file's name in messages, and the group.

        The group is empty for experiments, which set settings of all groups.
        """
        group = "" if self.group == "experiment" else self.group
        found = {}
        for name, node in self.nodes.items():
            path = super().__getitem__(name)
            where = f"conf/{path.relative_to(CONF)}" if path.is_relative_to(CONF) else str(path)
            for key in flat(OmegaConf.to_container(node.node)):
                found[f"{group}.{key}" if group else key] = (f"in {where}", group)
        return found


def config_node(path: Path, group: str | None, content: dict[str, Any] | None = None) -> ConfigNode:
    """A YAML file as Hydra's ConfigStore keeps it."""
    text = read_text(path)
    if content is not None:
        return node_of(content, path, group, text)
    return node_of_text(path, group, text)


@functools.cache
def node_of_text(path: Path, group: str | None, text: str) -> ConfigNode:
    """A file with this text, which is parsed once for all compositions of a program."""
    return node_of(nested(read_yaml(path), path), path, group, text)


def node_of(content: dict[str, Any], path: Path, group: str | None, text: str) -> ConfigNode:
    """A file with this text and this content, which can be changed."""
    refuse_hydras(content, path)
    if group == "experiment":
        content = with_overrides(content, path)
    # Hydra reads a header "# @package" only from files that it opens itself.
    header = re.search(r"\A(?:\s*#.*\n)*?\s*#\s*@package\s+(\S+)", text)
    package = "_global_" if group == "experiment" else None
    # `_group_` is the default.
    if header and header[1] != "_group_":
        package = header[1]
    return ConfigNode(path.name, OmegaConf.create(content), group, package, provider=None)


def with_overrides(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """An experiment whose defaults list has `override /model` in place of `model` or `/model`.

    Raises ConfigError for a preset that is written as a setting, as in `model: gpt2`.
    """
    for group in content.keys() & groups():
        if not isinstance(content[group], dict):
            raise ConfigError([
                f"{group}: {content[group]} ({path}) is not a group of settings: indent settings "
                f"below {group}, or choose a preset: under defaults, write - override /{group}: "
                f"NAME."
            ])
    # Each choice of a preset becomes one that replaces the preset of conf/config.yaml.
    choices = content.get("defaults")
    if not isinstance(choices, list):
        return content
    made = []
    for choice in choices:
        if isinstance(choice, dict) and len(choice) == 1:
            [(key, value)] = choice.items()
            group = str(key).split()[-1].lstrip("/")
            if group == "experiment":
                # The name of another experiment, which this one extends.
                choice = value
            elif group in groups():
                choice = {f"override /{group}": value}
            else:
                known = groups()
                raise ConfigError([
                    f"{group} (in the defaults of {path}) is no group of presets"
                    f"{closest(group, known)}: the groups are {', '.join(known)}."
                ])
        made.append(choice)
    return content | {"defaults": made}


def refuse_hydras(content: dict[str, Any], path: Path) -> None:
    """Raise ConfigError for settings of Hydra's own in a file: they would have no effect."""
    keys = list(flat({"hydra": content["hydra"]})) if "hydra" in content else []
    for choice in content.get("defaults") or []:
        if isinstance(choice, dict):
            names = [str(key).split()[-1].lstrip("/") for key in choice]
            keys += [name for name in names if name.startswith("hydra/")]
    if keys:
        raise ConfigError([
            f"{key} ({path}) is not used here: {instead_of_hydras(key)}." for key in keys
        ])
