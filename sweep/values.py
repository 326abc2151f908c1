"""The values that an override of a grid stands for: `optim.lr=1e-3,3e-3` is two overrides.

Numbers and presets follow Hydra's grammar; text is split at its commas.
"""

import re
from contextlib import suppress

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString, RangeSweep
from hydra.errors import HydraException

from conf.convert import is_text
from conf.presets import groups, options
from conf.settings import Settings, leaves
from conf.yaml_files import ConfigError

MAX_JOBS = 10_000
FUNCTION = re.compile(r"(choice|range|interval|glob|sort|shuffle)\(.*\)$", re.DOTALL)
# The text before the next comma, or before the end.
QUOTED_TEXT = re.compile(
    r"""\s*(?P<quote>['"])(?P<text>(?:\\.|(?!(?P=quote))[^\\])*)(?P=quote)\s*(?=,|$)""", re.DOTALL)
PLAIN_TEXT = re.compile(r"(?P<text>(?:\{[^{}]*\}|\[[^][]*\]|\([^()]*\)|\\.|[^,])*)", re.DOTALL)


def too_many_jobs(overrides: str) -> ConfigError:
    return ConfigError([f"{overrides} would be more than {MAX_JOBS:,} jobs: list fewer values, "
                        f"or search the space with python -m scripts.sweep."])


def values_of(override: str) -> list[str]:
    """The overrides with one value each that an override of a grid stands for.

    Raises ValueError for values that cannot be listed, such as interval(0, 1).
    """
    # Split text here: Hydra's grammar refuses much of it, such as paths with spaces.
    key, _, value = override.partition("=")
    takes_text = key in groups() or is_text(leaves(Settings).get(key))
    if takes_text and not FUNCTION.match(value):
        return [f"{key}={text}" for text in split_text(value)]

    # Let Hydra parse the rest. An override with a single value stands for itself.
    try:
        parsed = OverridesParser.create().parse_override(override)
    except (HydraException, ValueError):
        # The schema prints what is wrong with it.
        return [override]
    if not parsed.is_sweep_override():
        return [override]

    # A glob of presets stands for their names; other sweeps for values that Hydra lists.
    if isinstance(parsed.value(), Glob) and key in groups():
        words = parsed.value().filter(options(key))
        if not words:
            raise ValueError(f"{override} matches no preset. There are: {', '.join(options(key))}.")
    else:
        words = listed_values(parsed)
        if not words:
            raise ValueError(f"{override} has no values that can be listed: separate values by "
                             f"commas, or write range(1,4). python -m scripts.sweep searches "
                             f"intervals.")
    return [f"{key}={word}" for word in words]


def listed_values(override: Override) -> list[str]:
    """The values of a parsed sweep, as on a command line; none if they cannot be listed."""
    # Count the values of a range before they are listed: there may be billions.
    span = override.value()
    if isinstance(span, RangeSweep) and abs(span.stop - span.start) > MAX_JOBS * abs(span.step):
        raise too_many_jobs(override.input_line)
    pairs = []
    with suppress(HydraException, ValueError):
        pairs = list(zip(override.sweep_iterator(), override.sweep_string_iterator(), strict=True))

    words = []
    for value, word in pairs:
        # Text stays as it is: Hydra would write it with quotes and backslashes.
        text = value.text if isinstance(value, QuotedString) else value
        words.append(text if isinstance(text, str) else word)
    return words


def split_text(value: str) -> list[str]:
    """The texts between commas.

    A comma in quotes or brackets, or after a backslash, is part of a text. The quotes around a
    text, and the backslash before a comma or quote, are removed.
    """
    texts: list[str] = []
    end = -1
    while end < len(value):
        # Start after the comma.
        quoted = QUOTED_TEXT.match(value, end + 1)
        match = quoted or PLAIN_TEXT.match(value, end + 1)
        text = match["text"] if quoted else match["text"].strip()
        texts.append(re.sub(r"""\\([,'"])""", r"\1", text))
        end = match.end()
    return texts
