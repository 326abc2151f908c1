"""The presets in conf/: their names and settings, and their files in Hydra's ConfigStore.

Knows no names of settings.
"""

import functools
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigNode
from omegaconf import OmegaConf

from conf.hints import closest, instead_of_hydras
from conf.identity import flat
from conf.yaml_files import ConfigError, nested, read_text, read_yaml
from setting import as_word

CONF = Path(__file__).parent
# For each setting from a YAML file: the file, as messages name it, and the group of its preset.
Origins = dict[str, tuple[str, str]]


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


def preset(group: str, name: str) -> dict[str, Any]:
    """The settings of a preset, those of the presets in its defaults list included."""
    values = read_yaml(CONF / group / f"{name}.yaml")
    made: dict[str, Any] = {}
    for base in values.pop("defaults", []):
        made |= values if base == "_self_" else preset(group, base)
    return made | values


class Group(dict[str, Path]):
    """The YAML files of a group in Hydra's ConfigStore, which are read when they are chosen.

    `origins` gets each setting in them, with the file's name in messages and the group. The group
    is empty for experiments, which set settings of all groups.
    """

    def __init__(self, group: str, origins: Origins) -> None:
        super().__init__({f"{name}.yaml": CONF / group / f"{name}.yaml" for name in options(group)})
        self.group, self.origins = group, origins
        self.nodes: dict[str, ConfigNode] = {}

    def __getitem__(self, name: str) -> ConfigNode:
        if name not in self.nodes:
            path = super().__getitem__(name)
            self.add(name, path, config_node(path, self.group))
        return self.nodes[name]

    def add(self, name: str, path: Path, node: ConfigNode) -> None:
        """Add the file `path`, which has been read as `node`."""
        self[name], self.nodes[name] = path, node
        group = "" if self.group == "experiment" else self.group
        where = f"conf/{path.relative_to(CONF)}" if path.is_relative_to(CONF) else str(path)
        for key in flat(OmegaConf.to_container(node.node)):
            self.origins[f"{group}.{key}" if group else key] = (f"in {where}", group)


def config_node(path: Path, group: str | None) -> ConfigNode:
    """A YAML file as Hydra's ConfigStore keeps it."""
    return node_of_text(path, group, read_text(path))


@functools.cache
def node_of_text(path: Path, group: str | None, text: str) -> ConfigNode:
    """A file with this `text`, which is parsed once for all compositions of a program."""
    return node_of(nested(read_yaml(path), path), path, group)


def node_of(content: dict[str, Any], path: Path, group: str | None) -> ConfigNode:
    """A file with this content. An experiment sets settings of all groups.

    Raises ConfigError for settings of Hydra's own in a file: they would have no effect.
    """
    of_hydra = flat({"hydra": content["hydra"]}) if "hydra" in content else ()
    if of_hydra:
        raise ConfigError([not_used(key, path) for key in of_hydra])
    package = None
    if group == "experiment":
        content, package = with_overrides(content, path), "_global_"
    return ConfigNode(path.name, OmegaConf.create(content), group, package, provider=None)


def not_used(key: str, path: Path) -> str:
    """The sentence about a setting of Hydra's own in a file."""
    return f"{key} ({path}) is not used here: {instead_of_hydras(key)}."


def with_overrides(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """An experiment whose defaults list has `override /model` in place of `model` or `/model`.

    Raises ConfigError for a preset that is written as a setting, as in `model: gpt2`, and for a
    group that does not exist.
    """
    known = groups()
    for group in content.keys() & known:
        if not isinstance(content[group], dict):
            raise ConfigError([
                f"{group}: {as_word(content[group])} ({path}) is not a group of settings: indent "
                f"settings below {group}, or choose a preset: under defaults, write - override "
                f"/{group}: NAME."])

    # Each choice of a preset becomes one that replaces the preset of conf/config.yaml.
    choices = content.get("defaults")
    if not isinstance(choices, list):
        return content
    made = []
    for choice in choices:
        if isinstance(choice, dict) and len(choice) == 1:
            [(key, value)] = choice.items()
            group = str(key).split()[-1].lstrip("/")
            # The name of another experiment, which this one extends, stands alone.
            choice = value if group == "experiment" else {f"override /{group}": value}
            if group.startswith("hydra"):
                raise ConfigError([not_used(group, path)])
            if group not in known:
                raise ConfigError([
                    f"{group} (in the defaults of {path}) is no group of presets"
                    f"{closest(group, known)}: the groups are {', '.join(known)}."])
        made.append(choice)
    return content | {"defaults": made}
