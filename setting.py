"""Settings as dataclass fields: a default, a help text and the valid range.

The dataclasses live beside the code that reads them. Knows nothing of the command line.
"""

import functools
import math
import operator
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NewType, get_type_hints

# Types of settings that name one path, or several separated by commas. `expanded` completes them.
FilePath = NewType("FilePath", str)
FilePaths = NewType("FilePaths", str)

LIMITS = {"ge": (operator.ge, "at least"), "gt": (operator.gt, "more than"),
          "le": (operator.le, "at most"), "lt": (operator.lt, "less than")}
# A variable of a shell, as a folder's name in a path.
VARIABLE = re.compile(r"(?:^|/)(\$[A-Za-z_]\w*)")


def setting(default: Any, help: str, **limits: float) -> Any:
    """A field of a settings dataclass, with its help text.

    `ge`, `gt`, `le` and `lt` limit a number, as in pydantic's `Field`.
    """
    return field(default=default, metadata={"help": help, "limits": limits})


class SettingsBase:
    """The base of settings dataclasses."""

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value. Subclasses add the rules between settings.

        Here it is each number that is outside its range, NaN or infinite.
        """
        for one in fields(self):
            limits = one.metadata.get("limits", {})
            value = getattr(self, one.name)
            if value is None or not limits:
                continue
            # No comparison holds for NaN.
            wanted = []
            for name, limit in limits.items():
                holds, words = LIMITS[name]
                if not holds(value, limit):
                    wanted.append(f"{words} {limit}")
            if not wanted and abs(value) == math.inf:
                wanted.append("finite")
            if wanted:
                usual = ", or null" if one.default is None else f"; the default is {one.default}"
                yield f"{one.name}={value} must be {' and '.join(wanted)}{usual}."


@dataclass(frozen=True)
class ScriptSettings(SettingsBase):
    """The settings of a script that takes those of train.py, too, as the overrides `train`."""

    train: tuple[str, ...] = ()


@functools.cache
def type_hints(settings: type) -> dict[str, Any]:
    """The type of each field of a dataclass."""
    return get_type_hints(settings)


def as_word(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def expanded(path: str) -> str:
    """`path` with the home folder in place of ~ or ~user at its beginning.

    Raises ValueError, unless the path exists, where there is no such home folder, and for a
    variable: only a shell replaces it, and a folder named $HOME is not what anyone wants.
    """
    found = os.path.expanduser(path)
    if os.path.exists(found):
        return found
    if found.startswith("~"):
        raise ValueError("names no home folder: write ./ before a file name that begins with ~")
    variable = VARIABLE.search(found)
    if variable:
        raise ValueError(f"has {variable[1]}, which only a shell replaces: leave out the single "
                         f"quotes, or write ${{oc.env:{variable[1][1:]}}}")
    return found
