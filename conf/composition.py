"""Hydra composes the YAML presets, an experiment and the overrides into plain containers.

No other module sees a DictConfig, except conf/presets.py. Knows neither types nor valid ranges.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize, initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.version import VersionBase, setbase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import presets
from conf.convert import is_text
from conf.identity import flat
from conf.presets import Group, Origins, config_node, groups, node_of
from conf.settings import DERIVED, leaves
from conf.unknown import SWEEP_ADVICE, wrong_preset
from conf.yaml_files import ConfigError, is_yaml, nested, read_yaml, unresolved
from terminal import first_line

# Hydra's name for an experiment that is given by its path.
GIVEN_FILE = "given-file"
# In these texts ${...} has no meaning.
VERBATIM = ("prompt", "stop", "system", "data.separator")
HYDRA_VERSION = "1.3"
# All threads share Hydra's state.
HYDRA_LOCK = threading.RLock()


def compose_with_hydra(root: str | type, schema: Any,
                       overrides: list[str]) -> tuple[dict[str, Any], str, Origins]:
    """The composed settings as plain containers, the experiment, and the origins of settings.

    An experiment that is a file of the user's own is named by its path. The origins say which YAML
    file a setting is from, for messages.
    """
    # The defaults of the dataclasses, without what users cannot set.
    defaults = without_derived(asdict(schema()))

    # Hydra's grammar refuses most English text and some references: they are set afterwards.
    known = leaves(schema)
    literal: dict[str, str] = {}
    parsed: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key in known and (is_text(known[key]) or "${" in value):
            literal[key] = value
        else:
            parsed.append(override)
    own, content, parsed = own_experiment(parsed)

    # Let Hydra compose the rest.
    origins: Origins = {}
    try:
        with unchanged_hydra() as store:
            name = register(store, root, defaults, origins)
            if own:
                node = node_of(content, own, "experiment")
                store.repo["experiment"].add(f"{GIVEN_FILE}.yaml", own, node)
            composed = hydra_compose(name, parsed, return_hydra_config=True)
            values = resolved(composed, literal)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError([plain_sentence(error, parsed).replace(GIVEN_FILE, str(own))]) from None
    return values, str(own or composed.hydra.runtime.choices.get("experiment")), origins


class Uncopied(dict[str, Any]):
    """Hydra's stored configurations. Hydra copies them deeply for each composition, for nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Uncopied:
        return self


@functools.cache
def hydra_without_folder() -> Any:
    """It is made once: for this, Hydra looks up the source of every frame of the stack."""
    with initialize(version_base=HYDRA_VERSION, config_path=None):
        return GlobalHydra.instance().hydra


@functools.cache
def hydra_without_presets() -> dict[str, ConfigNode]:
    """Hydra's group of its own settings.

    Its presets (of logging, help, ...) have no effect here, and composing them takes half of the
    time.
    """
    node = OmegaConf.structured(HydraConf(defaults=[]))
    return {"config.yaml": ConfigNode("config.yaml", node, "hydra", None, "hydra")}


@contextmanager
def unchanged_hydra() -> Iterator[ConfigStore]:
    """Hydra that reads no folder, only the ConfigStore, without its own presets.

    Its global state is restored at the end, so that a program can use Hydra itself, too.
    """
    with HYDRA_LOCK:
        store, version = ConfigStore.instance(), VersionBase.instance()
        before = store.repo, version.getbase(), GlobalHydra.instance().hydra
        try:
            # The first start registers the settings of Hydra's plugins, for all compositions.
            GlobalHydra.instance().hydra = None
            GlobalHydra.instance().hydra = hydra_without_folder()
            setbase(HYDRA_VERSION)
            # A shallow copy: nodes that are stored during the composition are dropped with it.
            store.repo = Uncopied(store.repo, hydra=hydra_without_presets())
            yield store
        finally:
            store.repo, version.version_base, GlobalHydra.instance().hydra = before


def own_experiment(overrides: list[str]) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The path and the content of an experiment that is given by its path, if one is.

    Also returns the overrides, which then choose it by the name GIVEN_FILE.
    """
    given = [word.partition("=")[2] for word in overrides if word.startswith("experiment=")]
    if not given or not is_yaml(given[-1]):
        return None, {}, overrides
    path = Path(given[-1])
    content = nested(read_yaml(path), path)
    others = [word for word in overrides if not word.startswith("experiment=")]
    # A run's config.yaml has all settings: only presets of the command line apply. Each replaces
    # the whole of its group.
    if "auto_name" in content:
        content = without_derived(content)
        chosen = {word.partition("=")[0] for word in others}
        for group in groups():
            if group in chosen:
                content.pop(group, None)
            elif group != "experiment":
                others.append(f"~{group}")
    return path, content, [*others, f"experiment={GIVEN_FILE}"]


def without_derived(values: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, without those that users cannot set."""
    kept = {key: value for key, value in flat(values).items() if key not in DERIVED}
    return nested(kept, Path())


def register(store: ConfigStore, root: str | type, defaults: dict[str, Any],
             origins: Origins) -> str:
    """Store the defaults and the YAML files for Hydra; return the root's name there."""
    if not isinstance(root, str):
        store.store(root.__name__, defaults)
        return root.__name__
    store.store(f"{root}_defaults", defaults)
    for group in groups():
        store.repo[group] = Group(group, origins)
    store.repo[f"{root}.yaml"] = config_node(presets.CONF / f"{root}.yaml", group=None)
    return root


def resolved(composed: DictConfig, literal: dict[str, str]) -> dict[str, Any]:
    """The settings with all ${...} replaced, except where `literal` text means no reference."""
    for key, value in literal.items():
        if key in VERBATIM or os.path.exists(value):
            # Escape ${, and the backslashes before it, as OmegaConf's grammar asks.
            value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
        OmegaConf.update(composed, key, value, force_add=True)
    settings = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
    return OmegaConf.to_container(settings, resolve=True)


def launcher_settings(overrides: list[str]) -> dict[str, Any]:
    """The settings made by hydra/launcher=... and hydra.launcher.SETTING=...

    Raises ConfigError for names that do not exist.
    """
    try:
        with initialize_config_dir(str(presets.CONF), "app", HYDRA_VERSION):
            composed = hydra_compose(overrides=overrides, return_hydra_config=True)
            return OmegaConf.to_container(composed.hydra.launcher)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError([plain_sentence(error, overrides)]) from None


def plain_sentence(error: Exception, overrides: list[str]) -> str:
    """The sentence about an error of Hydra's, without its advice."""
    # Hydra does not say which override it cannot read.
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
        except (HydraException, ValueError):
            return (f"{override[:200]}: the value cannot be read; write a number, a word, true, "
                    "false or null.")
        if parsed.is_sweep_override():
            return f"{override}: {SWEEP_ADVICE}"
    if isinstance(error, OmegaConfBaseException):
        return unresolved(error)
    # A preset that does not exist, named in a file.
    said = first_line(error)
    missing = re.search(r"Could not find '(\w+)/([^/]*?)'", said)
    if missing and missing[1] in groups():
        chosen = [override for override in overrides if override.startswith("experiment=")]
        where = f" (in {chosen[-1]})" if chosen else ""
        return wrong_preset(*missing.groups()).replace(":", f"{where}:", 1)
    return f"The configuration cannot be composed: {said}."
