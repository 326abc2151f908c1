"""Error messages about settings and presets that do not exist, with a similar name."""

import difflib
import os
from typing import Any

from conf.hints import closest, instead_of_hydras, last_part, our_name, unit_note
from conf.presets import groups, options
from conf.settings import SampleSettings, Settings, leaves
from conf.yaml_files import is_yaml

SWEEP_ADVICE = "several values are a sweep: add -m to run them all, or choose one."
OF_SWEEPS = ("jobs", "processes_per_job", "trials", "pruner", "sweep")


def unknown(key: str, known: dict[str, Any], place: str, group: str = "") -> str:
    """The sentence about a key that does not exist; `group` if it is in a preset of that group."""
    # A setting of Hydra's.
    inside = key.removeprefix(f"{group}.")
    advice = instead_of_hydras(inside)
    if advice:
        return f"{key} ({place}) is not used here: {advice}."
    # A setting that exists, in a preset of another group or with a group too many.
    if group and inside in known:
        advice = "a preset sets its own group only, and an experiment all of them."
        if inside.startswith(f"{group}."):
            advice = f"write {inside.removeprefix(f'{group}.')}, without the group."
        return f"{inside} ({place}) is not for a preset of {group}: {advice}"
    # A name of another project, or a setting of another program; at last a similar spelling.
    meant = likely_name(key, known)
    program = program_of(key)
    if program and not meant:
        return f"{key} ({place}) is a setting of {program} only; --help lists the settings."
    meant = meant or similar_name(key, known, 0.7)
    guess = f" (did you mean {meant}?){unit_note(key)}" if meant else ""
    return f"{key} ({place}) is not a setting{guess}; --help lists the settings."


def likely_name(key: str, known: dict[str, Any]) -> str:
    """The setting or group that others call `key`, or that has its last part; empty for none."""
    return our_name(key, {*known, *choosable(known)}) or similar_name(key, known, 1)


def similar_name(key: str, known: dict[str, Any], cutoff: float) -> str:
    """The setting or group whose last part is most like that of `key`; empty where none is close.

    A group that is right proves nothing.
    """
    by_last = {last_part(name): name for name in (*choosable(known), *known)}
    near = difflib.get_close_matches(last_part(key), by_last, n=1, cutoff=cutoff)
    return by_last[near[0]] if near else ""


def choosable(known: dict[str, Any]) -> list[str]:
    """The groups whose presets can be chosen: all of them, beside the settings of a training."""
    return groups() if known.keys() >= leaves(Settings).keys() else []


def program_of(key: str) -> str:
    """The program that has the setting or group `key`; empty if none has it."""
    if key in OF_SWEEPS:
        return "sweeps (python train.py -m, python -m scripts.sweep)"
    if key in leaves(SampleSettings):
        return "sample.py"
    return "train.py" if key in (*leaves(Settings), *groups()) else ""


def wrong_preset(group: str, value: str) -> str:
    """The sentence about a preset or an experiment's file that does not exist; empty if it does."""
    if value in options(group):
        return ""
    is_file = group == "experiment" and is_yaml(value)
    # Commas separate the values of a sweep, but a file's name may contain them.
    if is_file and ("," not in value or os.path.exists(value)):
        return ""
    if "," in value or "(" in value:
        return f"{group}={value}: {SWEEP_ADVICE}"
    choices = f"Presets: {', '.join(options(group))}."
    if group == "experiment":
        choices += " A file of your own is named by its path, as in experiment=own.yaml."
    return f"{group}={value}: no such preset{closest(value, options(group))}. {choices}"


def not_an_override(word: str, known: dict[str, Any]) -> str:
    """The sentence about a word that is not key=value, from a command with the settings `known`."""
    meant = "write key=value, as in training.max_steps=100"
    if "run" in known and word and "=" not in word:
        meant = f"write run={word} for a run"
    elif is_yaml(word):
        meant = f"write experiment={word} for a file of settings"
    elif word and os.path.exists(word):
        meant = f"write data=text data.path={word} to train on it"
    return f"{word!r} is not an override: {meant}."
