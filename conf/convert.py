"""Plain values, as YAML and the command line have them, become dataclass instances.

Knows nothing of Hydra.
"""

import types
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

from conf.hints import OTHER_VALUES, closest
from conf.identity import in_one_line
from conf.settings import leaves
from setting import FilePath, FilePaths, as_word, expanded, type_hints

TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false"}


def freeze(schema: Any, values: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    """An instance of the dataclass `schema`; sentences about invalid values go to `problems`."""
    arguments: dict[str, Any] = {}
    for name, hint in type_hints(schema).items():
        if name not in values:
            continue
        key, value = f"{prefix}{name}", values[name]
        # A value, or a group of settings, which is a dataclass of its own.
        try:
            if not is_dataclass(hint):
                arguments[name] = convert(value, hint)
            elif isinstance(value, dict):
                arguments[name] = freeze(hint, value, f"{key}.", problems)
            else:
                first = fields(hint)[0].name
                problems.append(
                    f"{key}={value} is a group of settings: set one, as in {key}.{first}=...")
        except (TypeError, ValueError, OverflowError) as error:
            problems.append(f"{key}={as_word(value)[:200]} {error}.")
    return schema(**arguments)


def rebuild(schema: Any, values: dict[str, Any], place: str) -> Any:
    """The dataclass instance that was saved as `values`, which may come from a stranger.

    Raises ValueError naming the `place` they come from for unknown names and invalid values.
    """
    known = leaves(schema)
    problems = [f"{key[:40]} is not a setting." for key in values if key not in known]
    instance = freeze(schema, values, "", problems)
    problems = problems or list(instance.problems())
    if problems:
        raise ValueError(f"{place}: {in_one_line(' '.join(problems[:3]))}")
    return instance


def convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; whole floats such as 1e3 are integers.

    Raises ValueError saying what the type is.
    """
    # A type or none.
    if get_origin(hint) in (Union, types.UnionType):
        if value in (None, "null"):
            return None
        inner = next(one for one in get_args(hint) if one is not type(None))
        try:
            return convert(value, inner)
        except ValueError as error:
            raise ValueError(f"{error}, or null for none") from None
    # One of several words.
    if get_origin(hint) is Literal:
        return one_of(value, get_args(hint))
    # Text, or paths. YAML reads no as false, and 1.10 as 1.1.
    if is_text(hint) and isinstance(value, bool | float | bytes):
        raise ValueError("is not text, as YAML reads it: put the text in quotes")
    if is_text(hint) and isinstance(value, str | int):
        if hint is FilePaths:
            return ",".join(expanded(path) for path in str(value).split(","))
        return expanded(str(value)) if hint is FilePath else str(value)
    # A boolean or a number.
    if isinstance(value, str):
        value = from_text(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is float and is_number:
        return float(value)
    if hint is int and is_number and value == value // 1:
        if abs(value) >= 2**127:
            raise ValueError("is too large")
        return int(value)
    raise ValueError(f"is not {TYPE_NAMES.get(hint, 'text')}")


def one_of(value: Any, choices: tuple[str, ...]) -> str:
    """`value` if it is one of the `choices`. Raises ValueError listing them."""
    # YAML reads true and false as booleans.
    word = as_word(value) if isinstance(value, bool) else value
    if word in choices:
        return word
    # Suggest the word for one of other projects, or one that is spelled like it.
    meant = str(value).lower()
    guess = closest(OTHER_VALUES.get(meant, meant), choices)
    raise ValueError(f"is not one of {', '.join(choices)}{guess}")


def is_text(hint: Any) -> bool:
    """Whether settings of this type are text, which is taken literally."""
    return hint in (str, FilePath, FilePaths)


def from_text(text: str) -> Any:
    """The number or boolean in `text`, such as an environment variable; else the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    return text
