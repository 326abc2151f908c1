"""A space to search: which settings vary and between what, which are fixed, what must hold between them.

    space:
      optim.lr: {low: 1e-3, high: 1e-1, log: true}     a range: of whole numbers where the setting is one
      model.n_embd: {low: 64, high: 256, step: 32}
      model.n_head: [1, 2, 4]                          choices: also of presets, as in optim: [adamw, muon]
    fixed:
      training.max_steps: 100
    constraints:
      - model.n_embd % model.n_head == 0               arithmetic and comparisons of what stands above

Knows nothing of how a space is searched.
"""

from __future__ import annotations

import ast
import math
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from conf.convert import convert
from conf.identity import flat, kind
from conf.presets import CONF, ConfigError, groups, options, read_yaml, without_references
from conf.schema import compose
from conf.settings import Settings, leaves
from conf.unknown import unknown
from setting import as_word

TRIES = 20  # points of which one must make settings that can be trained
DRAWS = 10_000  # points among which one must satisfy the constraints
ARITHMETIC = (ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.cmpop, ast.BinOp,
              ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Constant, ast.Name, ast.Load)
Point = dict[str, Any]  # a value for each setting that varies


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both included; evenly by logarithm or in steps if asked for."""

    low: float
    high: float
    step: float | None = None
    log: bool = False


@dataclass(frozen=True)
class Space:
    """What `conf/sweep/NAME.yaml` says, checked."""

    place: str
    varied: dict[str, Range | list[Any]]
    fixed: dict[str, str]  # by setting, as on a command line
    constraints: dict[str, CodeType]
    known: Point  # the values of what is fixed, for the constraints

    def words(self, point: Point) -> list[str]:
        """The overrides that make the training of `point`."""
        values = self.fixed | {key: as_word(value) for key, value in point.items()}
        return [f"{key}={value}" for key, value in values.items()]

    def holds(self, constraint: str, point: Point) -> bool:
        try:
            names = {plain_name(key): value for key, value in (self.known | point).items()}
            return bool(eval(self.constraints[constraint], {"__builtins__": {}}, names))
        except (ArithmeticError, TypeError, ValueError, MemoryError) as error:
            raise ValueError(f"The constraint {constraint!r} ({self.place}) cannot be computed for "
                             f"{' '.join(self.words(point))}: {str(error) or type(error).__name__}.") from None

    def allows(self, point: Point) -> bool:
        return all(self.holds(constraint, point) for constraint in self.constraints)

    def draw(self, seed: int) -> Point:
        """A point that satisfies the constraints. Raises ValueError if `DRAWS` random ones do not."""
        chance = random.Random(seed)
        unmet = set(self.constraints)
        for _ in range(DRAWS):
            point = {key: drawn(values, chance) for key, values in self.varied.items()}
            if self.allows(point):
                return point
            unmet = {constraint for constraint in unmet if not self.holds(constraint, point)}
        which = f"the constraint {min(unmet)!r}" if unmet else f"all of {', '.join(map(repr, self.constraints))}"
        raise ValueError(f"The space {self.place}: none of {DRAWS:,} points drawn from it satisfies {which}: widen the "
                         f"space, or loosen the constraint.")

    def usual(self) -> Settings:
        """The settings of one of its points. Raises ConfigError if none of some can be trained."""
        return first_settings(self.words(self.draw(seed)) for seed in range(TRIES))

    def description(self) -> dict[str, Any]:
        """What makes it this space and no other, as JSON can hold it."""
        varied = {f"space of {key}": asdict(values) if isinstance(values, Range) else values
                  for key, values in self.varied.items()}
        fixed = {key: value for key, value in self.fixed.items() if key in groups() or kind(key) != "free"}
        return flat(varied) | fixed | {"constraints": sorted(self.constraints)}


def read_space(name: str, overrides: tuple[str, ...]) -> Space:
    """The space `conf/sweep/NAME.yaml`, or that of a YAML file, with more that is fixed on the command line.

    Raises ConfigError with all that is wrong with it.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONF / "sweep" / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(one.stem for one in (CONF / "sweep").glob("*.yaml")))
        raise ConfigError([f"sweep={name} is not there: choose one of {there}, or name a YAML file."])
    place = f"in conf/sweep/{path.name}" if path.parent == CONF / "sweep" else f"in {path}"
    content, settings, presets = read_yaml(path), leaves(Settings), groups()
    problems = [f"{key} ({place}) is not a part of a space: there are space, fixed and constraints."
                for key in content if key not in ("space", "fixed", "constraints")]
    varied, fixed = (content.get(part) or {} for part in ("space", "fixed"))
    if not isinstance(varied, dict) or not isinstance(fixed, dict) or not isinstance(content.get("constraints") or [], list):
        raise ConfigError([f"{path}: space and fixed are settings with their values, constraints is a list."])
    varied, fixed = without_references(varied, path), flat(fixed)
    problems += [unknown(str(key), settings, place) for key in (*varied, *fixed) if key not in (*settings, *presets)]
    if not varied:
        problems.append(f"{path} has no space: name what varies, as in optim.lr: {{low: 1e-4, high: 1e-2, log: true}}.")
    given = dict(word.partition("=")[::2] for word in overrides)
    problems += [unknown(key, settings, "on the command line") for key in given if key not in (*settings, *presets)]
    problems += [f"{key} varies {place}, and is fixed too: leave one of them out." for key in varied if key in fixed | given]
    if problems:
        raise ConfigError(problems)
    fixed = {key: as_word(value) for key, value in fixed.items()} | given
    read = {}
    for key, values in varied.items():
        try:
            read[key] = read_values(values, settings.get(key, str))
            if key in presets and (others := [value for value in read[key] if value not in options(key)]):
                raise ValueError(f"has no preset {others[0]}: there are {', '.join(options(key))}")
        except (TypeError, ValueError) as error:
            problems.append(f"{key} ({place}) {error}.")
    constraints = {}
    for text in map(str, content.get("constraints") or []):
        try:
            constraints[text] = arithmetic(text, [*read, *fixed])
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: too deep
            problems.append(f"the constraint {text!r} ({place}) {error if type(error) is ValueError else 'cannot be read'}.")
    if problems:
        raise ConfigError(problems)
    space = Space(place, read, fixed, constraints, {})
    if not constraints:
        return space
    chance = random.Random(0)
    some = first_settings(space.words({key: drawn(values, chance) for key, values in read.items()}) for _ in range(TRIES))
    known = fixed | flat(asdict(some))  # a preset is the word that chose it
    return Space(place, read, fixed, constraints, {key: known[key] for key in fixed})


def first_settings(candidates: Iterable[list[str]]) -> Settings:
    """The first of several lists of overrides that can be trained. Raises ConfigError if none can."""
    for words in candidates:
        try:
            return compose("config", ["name=-", *words])
        except ConfigError as error:
            refused = error
    raise refused


def read_values(values: Any, hint: Any) -> Range | list[Any]:
    """A range or choices for a setting of the type `hint`. Raises ValueError saying what is wrong."""
    if isinstance(values, list) and values:
        return [convert(value, hint) for value in values]
    if not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= {"low", "high", "step", "log"}:
        raise ValueError("is neither a range, as in {low: 1, high: 4}, with step: or log: true, nor choices, as in [1, 2]")
    low, high, step = (None if values.get(end) is None else convert(values[end], hint) for end in ("low", "high", "step"))
    if not all(type(end) in (int, float) and math.isfinite(end) for end in (low, high)):
        raise ValueError("takes no range: give choices, as in [a, b]")
    ends = Range(low, high, step, convert(values.get("log", False), bool))
    if ends.low > ends.high or (ends.step is not None and ends.step <= 0):
        raise ValueError(f"goes from {ends.low} to {ends.high} by {ends.step or 'any step'}, which has no values")
    if ends.log and (ends.low <= 0 or ends.step is not None):
        raise ValueError("is on a logarithmic scale: low must be more than 0, and there is no step")
    return ends


def arithmetic(text: str, names: list[str]) -> CodeType:
    """A constraint, ready to be computed; it can do no more than compute."""
    plain = {plain_name(name) for name in names}
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, plain_name(name))
    tree = ast.parse(text.strip(), mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) or (isinstance(node, ast.Name) and node.id not in plain):
            raise ValueError(f"speaks of {ast.unparse(node)}, which is neither in the space nor fixed here")
        if not isinstance(node, ARITHMETIC):
            raise ValueError("is more than arithmetic, comparisons, and, or, not")
    return compile(tree, "constraint", "eval")


def plain_name(key: str) -> str:
    return key.replace(".", "__")


def drawn(values: Range | list[Any], chance: random.Random) -> Any:
    """One of the values, at random."""
    if isinstance(values, list):
        return chance.choice(values)
    if values.log:
        found = math.exp(chance.uniform(math.log(values.low), math.log(values.high)))
        return round(found) if isinstance(values.low, int) else found
    if values.step is not None or isinstance(values.low, int):
        step = values.step or 1
        return values.low + step * chance.randint(0, int((values.high - values.low) / step + 1e-9))
    return chance.uniform(values.low, values.high)
