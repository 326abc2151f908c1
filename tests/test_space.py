"""Spaces to search: what a YAML file may say, in which words the rest is refused, and which points are drawn."""

from __future__ import annotations

import math

import pytest

from conf.schema import ConfigError, compose
from sweep.search import SweepSettings
from sweep.space import Range, read_space

WHOLE = """
space:
  optim.lr: {low: 1e-4, high: 1e-1, log: true}
  model.n_embd: {low: 64, high: 256, step: 32}
  model.n_layer: {low: 1, high: 16, log: true}
  model.dropout: {low: 0, high: 0.5}
  model.n_head: [1, 2, 3, 4]
  model.bias: [true, false]
  training.max_seconds: [null, 60]
fixed:
  experiment: pydocs
  training.max_steps: 1e2
constraints:
  - model.n_embd % (2 * model.n_head) == 0
  - model.n_layer * model.n_embd <= 1024 and training.max_steps < 1000
"""


@pytest.fixture
def space(tmp_path):
    def read(text, *overrides):
        (tmp_path / "mine.yaml").write_text(text)
        return read_space(str(tmp_path / "mine.yaml"), overrides)
    return read


@pytest.mark.slow
def test_points_are_in_the_space_and_satisfy_the_constraints(space):
    whole = space(WHOLE)
    points = [whole.draw(seed) for seed in range(300)]
    assert whole.draw(7) == whole.draw(7) and points[0] != points[1]
    for point in points:
        assert 1e-4 <= point["optim.lr"] <= 1e-1 and 0 <= point["model.dropout"] <= 0.5
        assert point["model.n_embd"] in range(64, 257, 32) and point["model.n_embd"] % (2 * point["model.n_head"]) == 0
        assert isinstance(point["model.n_layer"], int) and 1 <= point["model.n_layer"] * point["model.n_embd"] <= 1024
    assert {point["model.n_head"] for point in points} == {1, 2, 3, 4} and {point["model.bias"] for point in points} == {True, False}
    middle = sum(math.log10(point["optim.lr"]) for point in points) / 300
    assert -2.75 < middle < -2.25  # on a scale of logarithms; evenly it would be -1.4


@pytest.mark.slow
def test_the_overrides_of_a_point_set_its_values(space):
    whole = space(WHOLE, "seed=5")
    point = whole.draw(1) | {"training.max_seconds": None, "model.bias": False}
    settings = compose("config", whole.overrides(point))
    assert settings.optim.lr == point["optim.lr"] and settings.model.n_embd == point["model.n_embd"]
    assert (settings.training.max_steps, settings.training.max_seconds, settings.model.bias, settings.seed) == (100, None, False, 5)


def test_the_type_of_a_range_follows_from_the_setting(space):
    read = space("space:\n  model.n_layer: {low: 1e0, high: 4}\n  optim.lr: {low: 1, high: 2}").varied
    assert read == {"model.n_layer": Range(1, 4), "optim.lr": Range(1.0, 2.0)} and isinstance(read["model.n_layer"].low, int)


def test_references_and_groups_are_read(space, monkeypatch):
    monkeypatch.setenv("NH_HIGH", "8")
    monkeypatch.setenv("NH_STEPS", "30")
    read = space("space: {model.n_layer: {low: 1, high: '${oc.env:NH_HIGH}'}, seed: ['${oc.env:NH_HIGH}']}\n"
                 "fixed:\n  training: {max_steps: '${oc.env:NH_STEPS}', eval_every: 2}\n  optim.lr: 1e-2")
    assert read.varied == {"model.n_layer": Range(1, 8), "seed": [8]}
    made = compose("config", read.overrides(read.draw(0)))
    assert (made.training.max_steps, made.training.eval_every, made.optim.lr) == (30, 2, 0.01)
    with pytest.raises(ConfigError, match="the environment variable NH_NONE is not set"):
        space("space: {seed: ['${oc.env:NH_NONE}']}")


def test_a_file_at_home_is_read_with_limits(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.YML").write_text("space: {seed: [1, 2]}")
    settings = compose(SweepSettings, ["sweep=~/mine.YML"])
    assert read_space(settings.sweep, ()).varied == {"seed": [1, 2]}
    (tmp_path / "mine.YML").write_text("space:\n  seed: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
        f"a{n}: &a{n} [{', '.join(['*a' + (str(n - 1) if n else '')] * 9)}]\n" for n in range(9)))
    with pytest.raises(ConfigError, match=r"mine\.YML holds more than 10,000 values"):
        read_space(settings.sweep, ())


@pytest.mark.parametrize(("text", "words"), [
    ("space: {optim.lrr: [1]}", "optim.lrr .* is not a setting .did you mean optim.lr"), ("spcae: {optim.lr: [1]}\nspace: {seed: [1]}", "spcae .* is not a part"),
    ("space: {}", "is empty"), ("fixed: {seed: 1}", "is empty"), ("- 1", "holds no settings"), ("3", "holds no settings"), ("space: [", "not valid YAML.* line 1"),
    ("space: {optim.lr: {low: 3, high: 1}}", "is empty"), ("space: {optim.lr: {low: 0, high: 1, log: true}}", "more than 0"),
    ("space: {optim.lr: {low: 1, high: 2, step: 0}}", "is empty"), ("space: {optim.lr: {low: 1, high: 2, lgo: 3}}", "neither a range"),
    ("space: {optim.lr: 3}", "neither a range"), ("space: {optim.lr: []}", "neither a range"), ("space: {optim.lr: [abc]}", "is not a number"),
    ("space: {model.bias: {low: false, high: true}}", "takes no range"), ("space: {model.n_layer: {low: 1, high: 2.5}}", "whole number"),
    ("space: {model: [nano, nope]}", "has no preset nope"), ("space: {model: {low: 1, high: 2}}", "takes no range"),
    ("space: {seed: [1]}\nfixed: {seed: 2}", "is fixed too"), ("space: {seed: [1]}\nfixed: 3", "must map settings"),
    ("space: {seed: [1]}\nconstraints: [seed <]", "is not a valid expression"), ("space: {seed: [1]}\nconstraints: [model.n_layer < 3]", "uses model.n_layer"),
    ("space: {seed: [1]}\nconstraints: ['__import__(\"os\")']", "more than arithmetic"), ("space: {seed: [1]}\nconstraints: [seed.real > 0]", "uses seed.real"),
    ("space: {seed: [1]}\nconstraints: ['[seed for x in (1,)]']", "more than arithmetic|uses"), ("space: {seed: [1]}\nconstraints: [seed ** seed > 0]", "more than"),
    pytest.param(f"space: {{seed: [1]}}\nconstraints: ['{'-' * 20_000}seed > 0']", "is not a valid expression", id="deep"), ("space: {1: [1]}", "1 .* is not a setting"),
])
def test_a_problem_of_a_space_is_one_sentence(text, words, space):
    with pytest.raises(ConfigError, match=words) as caught:
        space(text)
    assert "\n" not in str(caught.value) and "mine.yaml" in str(caught.value)


def test_all_problems_are_listed_at_once(space):
    with pytest.raises(ConfigError, match="2 problems"):
        space("space: {optim.lr: 3, seed: {low: 2, high: 1}}")


def test_an_unsatisfiable_constraint_is_named(space):
    impossible = space("space: {seed: [1, 2], model.n_head: [1, 2]}\nconstraints: [seed > 0, seed > 2]")
    with pytest.raises(ValueError, match="none of 10,000 random points satisfies the constraint 'seed > 2'"):
        impossible.draw(0)
    together = space("space: {seed: [1, 2], model.n_head: [1, 2]}\nconstraints: [seed > model.n_head, seed < 2]")
    with pytest.raises(ValueError, match="satisfies all of"):
        together.draw(0)
    for constraint, why in (("1 / seed > 0", ".*zero"), ("'%q' % seed == 1", "unsupported"), ("'a' * 99999999999999 == seed", "MemoryError")):
        with pytest.raises(ValueError, match=rf"cannot be computed for .*: {why}"):
            space(f'space: {{seed: [0]}}\nconstraints: ["{constraint}"]').draw(0)


def test_a_constraint_can_use_a_fixed_preset(space):
    presets = "space: {seed: [1, 2]}\nfixed: {model: nano}\nconstraints: [\"model == 'nano' or seed == 2\"]"
    assert space(presets).allows({"seed": 1}) and not space(presets, "model=modern-nano").allows({"seed": 1})


def test_a_setting_cannot_be_varied_and_fixed(space):
    with pytest.raises(ConfigError, match=r"optim.lr varies .* fixed too"):
        space("space: {optim.lr: [1]}", "optim.lr=2")


def test_a_missing_space_is_named_with_the_existing_ones():
    with pytest.raises(ConfigError, match=r"sweep=lr_widht does not exist: use one of isoflop, .*lr_width, or a YAML file"):
        read_space("lr_widht", ())


def test_a_grid_has_all_points_that_the_constraints_allow(space):
    text = "sampler: grid\nspace: {model.n_head: [1, 2], model.n_embd: [33, 64]}\nconstraints: [model.n_embd % model.n_head == 0]"
    assert [tuple(point.values()) for point in space(text).grid] == [(1, 33), (1, 64), (2, 64)]


@pytest.mark.parametrize(("text", "said"), [
    ("sampler: grid\nspace: {optim.lr: {low: 1e-3, high: 1e-2}}", r"optim.lr \(in .*\) is a range, and sampler: grid takes choices"),
    ("sampler: gird\nspace: {seed: [1]}", r"sampler: gird \(in .*\) does not exist: use tpe or grid"),
    (f"sampler: grid\nspace: {{seed: {[*range(1000)]}, model.n_layer: {[*range(1, 900)]}}}", r"has 899,000 points, at most 10,000 are supported: list fewer"),
])
def test_an_invalid_sampler_is_refused(space, text, said):
    with pytest.raises(ConfigError, match=said):
        space(text)


def test_the_shipped_grid_of_rates_is_complete():
    shipped = read_space("lr_transfer", ())
    assert len(shipped.grid) == 20 == SweepSettings().trials
    for point in shipped.grid[::7]:
        assert compose("config", ["name=-", *shipped.overrides(point)]).model.mup_base_width == 128


def test_a_sweep_that_exists_needs_no_text(space, tmp_path):
    words = ["space: {seed: [1, 2]}\nfixed: {data: text}", f"data.path={tmp_path / 'gone.txt'}"]
    with pytest.raises(ConfigError, match=r"gone\.txt does not exist"):
        _ = space(*words).example
    (tmp_path / "study").mkdir()
    assert read_space(str(tmp_path / "mine.yaml"), tuple(words[1:]), tmp_path / "study").example.folder == tmp_path / "study"


@pytest.mark.slow
def test_the_shipped_space_has_valid_points():
    shipped = read_space("lr_width", ())
    for seed in range(3):
        assert compose("config", shipped.overrides(shipped.draw(seed))).training.max_steps == 100


@pytest.mark.slow
def test_free_settings_are_no_part_of_the_identity(space):
    one = space(WHOLE).description()
    assert one == space(WHOLE, "logger.wandb=offline").description() != space(WHOLE, "seed=1").description()
    assert one != space(WHOLE.replace("high: 1e-1", "high: 1")).description() != space(WHOLE.replace("1024", "1000")).description()


def test_fixed_settings_need_only_be_valid_with_the_space(space):
    """Three heads do not divide the default width, but they do the space's."""
    words = compose(SweepSettings, ["sweep=mine", "model.n_head=3"]).train
    assert space("space: {optim.lr: [1e-3]}\nfixed: {model.n_embd: 96}\n", *words).example.model.n_head == 3
    with pytest.raises(ConfigError, match="n_head=3"):
        _ = space("space: {optim.lr: [1e-3]}\n", *words).example
    with pytest.raises(ConfigError, match=r"model\.n_haed .*on the command line.*did you mean model\.n_head"):
        space("space: {optim.lr: [1e-3]}\n", *compose(SweepSettings, ["sweep=mine", "model.n_haed=3"]).train)
