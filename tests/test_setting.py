"""Fields of settings dataclasses: ranges, and the help text made from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Literal

import pytest

from bench.__main__ import BENCHMARKS
from conf.help import help_lines
from conf.launch import imported
from conf.settings import DERIVED
from setting import SettingsBase, setting


@dataclass(frozen=True)
class Inner(SettingsBase):
    size: int = setting(4, "number of parts", ge=1, le=8)


@dataclass(frozen=True)
class Example(SettingsBase):
    rate: float = setting(0.5, "speed", gt=0)
    part: float = setting(0.1, "", ge=0, lt=1)
    limit: float | None = setting(None, "seconds", gt=0)
    kind: Literal["a", "b"] = setting("a", "of parts")
    free: int = setting(3, "a word " * 30)
    inner: Inner = Inner()


@pytest.mark.parametrize(("name", "value", "said"), [
    ("rate", 0, "rate=0 must be more than 0; the default is 0.5."),
    ("part", -0.5, "part=-0.5 must be at least 0; the default is 0.1."),
    ("part", 1, "part=1 must be less than 1; the default is 0.1."),
    ("limit", 0, "limit=0 must be more than 0, or null."),
    ("rate", math.inf, "rate=inf must be finite; the default is 0.5."),
    ("rate", math.nan, "rate=nan must be more than 0; the default is 0.5."),
    ("part", math.nan, "part=nan must be at least 0 and less than 1; the default is 0.1."),
])
def test_a_number_out_of_range_is_one_sentence(name, value, said):
    assert list(Example(**{name: value}).problems()) == [said]


def test_numbers_at_their_bounds_are_in_range():
    assert not list(Inner(1).problems()) and not list(Inner(8).problems())
    assert not list(Example(part=0, rate=1e-9, limit=1e9, free=-(10**400)).problems())
    assert len(list(Inner(9).problems())) == len(list(Inner(10**400).problems())) == 1


def test_help_shows_names_values_choices_and_wraps():
    lines = list(help_lines(Example()))
    assert lines[:4] == [
        "  rate=0.5                      speed",
        "  limit=null                    seconds",
        "  kind=a                        of parts (a, b)",
        "  free=3                        " + " ".join(["a word"] * 9) + " a",
    ]
    assert lines[-2:] == ["", "  inner.size=4                  number of parts"]
    assert max(map(len, lines)) <= 100


OF_PROGRAMS = [
    "conf.settings:Settings", "conf.settings:SampleSettings", "sweep.search:SweepSettings", "scripts.plan:PlanSettings",
    "scripts.attention_map:AttentionMapSettings", "scripts.export_tokenizer:ExportTokenizerSettings",
    "scripts.prepare:PrepareSettings", "scripts.report:ReportSettings", "scripts.screenshots:ScreenshotSettings", "scripts.torture:TortureSettings",
    "scripts.verify_resume:VerifySettings", *(f"bench.{name}:{name.capitalize()}Settings" for name in BENCHMARKS),
]


@pytest.mark.parametrize("schema", OF_PROGRAMS)
def test_every_setting_for_users_is_in_the_help(schema):
    def names(settings, prefix=""):
        for field in fields(settings):
            value = getattr(settings, field.name)
            if is_dataclass(value):
                yield from names(value, f"{field.name}.")
            else:
                yield prefix + field.name

    settings = imported(schema)()
    shown = [line.split("=")[0].strip() for line in help_lines(settings) if "=" in line[:32]]
    assert shown == [name for name in names(settings) if name not in DERIVED]
