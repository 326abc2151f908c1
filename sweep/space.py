"""A search space: the settings that vary, their ranges, fixed settings, and constraints.

    space:
      optim.lr: {low: 1e-3, high: 1e-1, log: true}  # a range
      model.n_embd: {low: 64, high: 256, step: 32}  # of integers, because the setting is one
      model.n_head: [1, 2, 4]                       # choices, also of presets: optim: [adamw, muon]
    fixed:
      training.max_steps: 100
    constraints:
      - model.n_embd % model.n_head == 0            # arithmetic, comparisons, and, or, not

With `sampler: grid`, each point of a space of choices is trained once. Knows nothing of how a space
is searched.
"""

import ast
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import CodeType
from typing import Any

from conf.convert import convert
from conf.identity import flat, kind
from conf.presets import CONF, groups, options
from conf.schema import compose
from conf.settings import Settings, leaves
from conf.unknown import unknown
from conf.yaml_files import ConfigError, is_yaml, read_yaml, without_references
from setting import as_word

PARTS = ("space", "fixed", "constraints", "sampler")
SAMPLERS = ("tpe", "grid")
MAX_POINTS = 10_000  # of a grid, before its constraints
MAX_INVALID = 20  # random points, of which one must be valid settings
MAX_DRAWS = 10_000  # random points, of which one must satisfy the constraints
RANGE_FORM = ("is neither a range, as in {low: 1, high: 4}, with step: or log: true, nor choices, "
              "as in [1, 2]")
ARITHMETIC = (
    ast.Expression, ast.BoolOp, ast.boolop, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.cmpop,
    ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Constant, ast.Name,
    ast.Load)
Point = dict[str, Any]  # a value for each setting that varies


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included: uniform, log-uniform or in steps."""

    low: float
    high: float
    step: float | None = None
    log: bool = False

    def draw(self, rng: random.Random) -> float:
        if self.log:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
            return round(value) if isinstance(self.low, int) else value
        if self.step is None and isinstance(self.low, float):
            return rng.uniform(self.low, self.high)
        step = self.step or 1
        # The term allows for rounding errors in (high - low) / step.
        return self.low + step * rng.randint(0, int((self.high - self.low) / step + 1e-9))


@dataclass(frozen=True)
class Space:
    """A checked search space."""

    place: str  # the file, for messages
    varied: dict[str, Range | list[Any]]
    fixed: dict[str, str]  # values as on a command line
    constraints: dict[str, CodeType]
    sampler: str = "tpe"
    folder: Path = Path("-")  # of the sweep

    def settings(self, point: Point) -> Settings:
        """The settings that train `point`. Raises ConfigError if they are invalid.

        A text may be gone once the folder of the sweep exists: a trial keeps its tokens.
        """
        place = [f"runs_dir={self.folder.parent}", f"name={self.folder.name}"]
        return compose("config", [*self.overrides(point), *place])

    @cached_property
    def example(self) -> Settings:
        """The settings of a random point. Raises ConfigError if MAX_INVALID points are invalid."""
        rng = random.Random(0)
        for _ in range(MAX_INVALID):
            try:
                return self.settings(self.random_point(rng))
            except ConfigError as error:
                last_error = error
        raise last_error

    @cached_property
    def known(self) -> Point:
        """The values of fixed settings, for constraints. A preset is known by its name."""
        values = self.fixed | flat(asdict(self.example))
        return {key: values[key] for key in self.fixed}

    def overrides(self, point: Point) -> list[str]:
        """The command line that trains `point`."""
        values = self.fixed | {key: as_word(value) for key, value in point.items()}
        return [f"{key}={value}" for key, value in values.items()]

    def holds(self, constraint: str, point: Point) -> bool:
        """Whether a point satisfies a constraint. Raises ValueError if that cannot be computed."""
        values = {identifier(key): value for key, value in (self.known | point).items()}
        try:
            # `compile_constraint` has checked that the code only computes.
            return bool(eval(self.constraints[constraint], {"__builtins__": {}}, values))
        except (ArithmeticError, TypeError, ValueError, MemoryError) as error:
            raise ValueError(f"The constraint {constraint!r} ({self.place}) cannot be computed for "
                             f"{' '.join(self.overrides(point))}: "
                             f"{str(error) or type(error).__name__}.") from None

    def allows(self, point: Point) -> bool:
        return all(self.holds(constraint, point) for constraint in self.constraints)

    @cached_property
    def grid(self) -> list[Point]:
        """All points of a space of choices that satisfy the constraints."""
        points = [dict(zip(self.varied, values, strict=True))
                  for values in itertools.product(*self.varied.values())]
        return [point for point in points if self.allows(point)]

    def random_point(self, rng: random.Random) -> Point:
        """A point that may violate constraints."""
        return {key: values.draw(rng) if isinstance(values, Range) else rng.choice(values)
                for key, values in self.varied.items()}

    def draw(self, seed: int) -> Point:
        """A point that satisfies the constraints. Raises ValueError after MAX_DRAWS attempts."""
        rng = random.Random(seed)
        # The constraints that no point has satisfied so far, for the message.
        violated = set(self.constraints)
        for _ in range(MAX_DRAWS):
            point = self.random_point(rng)
            if self.allows(point):
                return point
            violated = {one for one in violated if not self.holds(one, point)}
        which = f"all of {', '.join(map(repr, self.constraints))}"
        if violated:
            which = f"the constraint {min(violated)!r}"
        raise ValueError(f"The space {self.place}: none of {MAX_DRAWS:,} random points satisfies "
                         f"{which}: widen the space, or loosen the constraint.")

    def description(self) -> dict[str, Any]:
        """The identity of the space, as JSON can hold it."""
        parts: dict[str, Any] = {"constraints": sorted(self.constraints)}
        for key, values in self.varied.items():
            parts[f"space of {key}"] = asdict(values) if isinstance(values, Range) else values
        for key, value in self.fixed.items():
            if key in groups() or kind(key) != "free":
                parts[key] = value
        return flat(parts)


def read_space(name: str, overrides: tuple[str, ...], folder: Path = Path("-")) -> Space:
    """The space `conf/sweep/NAME.yaml`, or that of a YAML file; `overrides` fix more settings.

    The sweep is in `folder`.

    Raises ConfigError that lists all problems.
    """
    # Find and read the file.
    shipped = CONF / "sweep"
    path = Path(name) if is_yaml(name) else shipped / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(options("sweep"))
        raise ConfigError([f"sweep={name} does not exist: use one of {there}, or a YAML file."])
    place = f"in conf/sweep/{path.name}" if path.parent == shipped else f"in {path}"
    content = read_yaml(path)
    varied, fixed, constraints = (content.get(part) or {} for part in PARTS[:3])
    sampler = content.get("sampler", "tpe")
    if not isinstance(varied, dict) or not isinstance(fixed, dict):
        raise ConfigError([f"{path}: space and fixed must map settings to values."])
    if constraints and not isinstance(constraints, list):
        raise ConfigError([f"{path}: constraints must be a list."])
    varied, fixed = without_references(varied, path), flat(fixed)
    given = dict(word.partition("=")[::2] for word in overrides)

    # Check the names first: values and constraints of unknown settings mean nothing.
    problems = list(key_problems(content, varied, fixed, given, place))
    if problems:
        raise ConfigError(problems)

    # Then the values, and the constraints on them.
    fixed = {key: as_word(value) for key, value in fixed.items()} | given
    ranges: dict[str, Range | list[Any]] = {}
    for key, values in varied.items():
        try:
            ranges[key] = read_values(key, values)
        except (TypeError, ValueError) as error:
            problems.append(f"{key} ({place}) {error}.")
    compiled: dict[str, CodeType] = {}
    for text in map(str, constraints):
        try:
            compiled[text] = compile_constraint(text, [*ranges, *fixed])
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            # The last two: the expression is too deep.
            reason = error if type(error) is ValueError else "is not a valid expression"
            problems.append(f"the constraint {text!r} ({place}) {reason}.")
    if sampler not in SAMPLERS:
        problems.append(f"sampler: {sampler} ({place}) does not exist: use "
                        f"{' or '.join(SAMPLERS)}.")
    if sampler == "grid":
        problems += [f"{key} ({place}) is a range, and sampler: grid takes choices: list them, as "
                     "in [1, 2]." for key, values in ranges.items() if isinstance(values, Range)]
    if sampler == "grid" and not problems:
        points = math.prod(map(len, ranges.values()))
        if points > MAX_POINTS:
            problems.append(f"sampler: grid ({place}) has {points:,} points, at most "
                            f"{MAX_POINTS:,} are supported: list fewer values, or use "
                            "sampler: tpe.")
    if problems:
        raise ConfigError(problems)
    return Space(place, ranges, fixed, compiled, sampler, folder)


def key_problems(content: Point, varied: Point, fixed: Point, given: dict[str, str],
                 place: str) -> Iterator[str]:
    """The problems with the names in a space's file, and with the settings `given` beside it."""
    # Names that do not exist: parts of a space, and settings.
    for key in content:
        if key not in PARTS:
            yield f"{key} ({place}) is not a part of a space: use {', '.join(PARTS)}."
    known = leaves(Settings)
    for keys, source in (((*varied, *fixed), place), (given, "on the command line")):
        for key in keys:
            if key not in known and key not in groups():
                yield unknown(str(key), known, source)
    # Something must vary, and nothing may both vary and be fixed.
    if not varied:
        yield (f"The space {place} is empty: name the settings that vary, as in optim.lr: "
               f"{{low: 1e-4, high: 1e-2, log: true}}.")
    for key in varied:
        if key in fixed or key in given:
            yield f"{key} varies {place}, and is fixed too: remove one of them."


def read_values(key: str, values: Any) -> Range | list[Any]:
    """The range or choices of a setting or preset. Raises ValueError saying what is wrong."""
    hint = leaves(Settings).get(key, str)
    if not isinstance(values, list) or not values:
        return read_range(values, hint)
    choices = [convert(value, hint) for value in values]
    if key in groups() and set(choices) - set(options(key)):
        missing = min(set(choices) - set(options(key)))
        raise ValueError(f"has no preset {missing}: use {', '.join(options(key))}")
    return choices


def read_range(values: Any, hint: Any) -> Range:
    """A range of numbers of the type `hint`. Raises ValueError saying what is wrong."""
    keys = values.keys() if isinstance(values, dict) else set()
    if not {"low", "high"} <= keys <= {"low", "high", "step", "log"}:
        raise ValueError(RANGE_FORM)
    numbers = {key: convert(values[key], hint) for key in values if key != "log"}
    for number in numbers.values():
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ValueError("takes no range: list choices, as in [a, b]")
    low, high, step = numbers["low"], numbers["high"], numbers.get("step")
    log = convert(values.get("log", False), bool)
    if low > high or (step is not None and step <= 0):
        raise ValueError(f"is empty: low={low}, high={high}, step={step}")
    if log and (low <= 0 or step is not None):
        raise ValueError("is logarithmic: low must be more than 0, and step is not supported")
    return Range(low, high, step, log)


def compile_constraint(text: str, names: list[str]) -> CodeType:
    """A constraint, compiled; the code can only compute. Raises ValueError for anything else."""
    # Longer names first: optim is a part of optim.lr.
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, identifier(name))

    # Allow arithmetic on these names only.
    allowed = {identifier(name) for name in names}
    tree = ast.parse(text.strip(), mode="eval")
    for node in ast.walk(tree):
        is_unknown = isinstance(node, ast.Name) and node.id not in allowed
        if is_unknown or isinstance(node, ast.Attribute):
            raise ValueError(f"uses {ast.unparse(node)}, which is neither varied nor fixed here")
        if not isinstance(node, ARITHMETIC):
            raise ValueError("is more than arithmetic, comparisons, and, or, not")
    return compile(tree, "constraint", "eval")


def identifier(key: str) -> str:
    """A setting's name as a Python identifier."""
    return key.replace(".", "__")
