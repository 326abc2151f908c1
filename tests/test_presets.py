"""YAML files of settings: which are refused, and files of the user's own as experiments."""

from __future__ import annotations

import dataclasses
import shutil
import time

import pytest
import yaml

from conf import presets
from conf.schema import as_yaml, compose
from conf.yaml_files import ConfigError, nested, read_yaml
from model import GPTConfig

pytestmark = pytest.mark.usefixtures("composed_by_hydra")

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True))
MERGE_BOMB = "a: &a {k: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.fixture
def preset(tmp_path, monkeypatch):
    """Write conf/GROUP/extra.yaml, in a copy of conf."""
    shutil.copytree(presets.CONF, tmp_path / "conf", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(presets, "CONF", tmp_path / "conf")
    return lambda group, text: (tmp_path / "conf" / group / "extra.yaml").write_text(text)


@pytest.fixture
def own(tmp_path):
    """Write an experiment of the user's own; the override that chooses it."""
    def write(text, name="own.yaml"):
        (tmp_path / name).write_text(text)
        return f"experiment={tmp_path / name}"
    return write


def complaint(*overrides):
    with pytest.raises(ConfigError) as caught:
        compose("config", list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("text", ["training.max_steps: 4\ntraining: {eval_every: 2}", "training: {max_steps: 4}\ntraining.eval_every: 2",
                                  "training.eval_every: 2\ntraining.max_steps: 4"])
def test_a_dotted_key_sets_what_it_names(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    values = nested(read_yaml(tmp_path / "a.yaml"), tmp_path / "a.yaml")
    assert values == {"training": {"max_steps": 4, "eval_every": 2}}


@pytest.mark.parametrize("header", ["", "# @package _global_\n", "# @package _group_\n"])
def test_an_experiment_sets_settings_of_all_groups(own, preset, header):
    preset("experiment", header + "training.max_steps: 4\nmodel.n_layer: 1e1")
    made = compose("config", ["experiment=extra"])
    assert (made.training.max_steps, made.model.n_layer) == (4, 10)
    assert compose("config", [own(header + "training.max_steps: 4")]).training.max_steps == 4


@pytest.mark.parametrize(("group", "text", "said"), [
    ("experiment", "training.max_steps: 4\ntraining: {max_steps: 5}", "training.max_steps ("),
    ("experiment", "training: 3\ntraining.max_steps: 4", "training.max_steps ("),
    ("experiment", "seed: 1\nseed: 2", "found duplicate key seed"),
    ("model", "n_layer: 1\nn_layer: 2", "line 2: found duplicate key n_layer"),
    ("experiment", "traning.max_steps: 4", "traning.max_steps (in conf/experiment/extra.yaml) is not a setting"),
    ("model", "model.n_layer: 4", "(in conf/model/extra.yaml) is not for a preset of model: write n_layer"),
    ("model", "model: {n_layer: 4}", "model.n_layer (in conf/model/extra.yaml) is not for a preset of model: write n_layer"),
    ("model", "training.max_steps: 4", "training.max_steps (in conf/model/extra.yaml) is not for a preset of model"),
    ("experiment", "learning_rate: 4", "(in conf/experiment/extra.yaml) is not a setting (did you mean optim.lr?)"),
    ("experiment", "hydra: {run: {dir: x}}", "extra.yaml) is not used here: runs_dir="),
    ("experiment", "hydra.run.dir: x", "extra.yaml) is not used here: runs_dir="),
    ("experiment", "defaults:\n- override hydra/launcher: joblib", "hydra/launcher ("),
    ("experiment", "hydra: 3", "hydra ("), ("experiment", "defaults: [modle: nano]", "modle (in the defaults of"),
    ("experiment", 'data.separator: "extra\\n"', "data.separator="),
    ("experiment", "model: gpt2", "override /model: NAME"), ("experiment", "training:", "indent settings below training"),
    ("experiment", "defaults:\n- override /model: gtp2", "model=gtp2 (in experiment=extra): no such preset (did you mean gpt2?)"),
])
def test_a_wrong_key_names_its_file(preset, group, text, said):
    preset(group, text)
    message = complaint(f"{group}=extra")
    assert said in message and "extra" in message and "\n" not in message


def test_a_wrong_key_in_a_base_preset_names_that_file(preset, tmp_path):
    base = tmp_path / "conf" / "model" / "modern-124m.yaml"
    base.write_text(base.read_text() + "n_layr: 3\n")
    assert "model.n_layr (in conf/model/modern-124m.yaml) is not a setting" in complaint("model=modern-nano")


@pytest.mark.parametrize(("text", "said"), [
    (BOMB, "aliases"), (MERGE_BOMB, "aliases"), ("a: &a [*a]", "aliases"), ("a: &a {b: *a}", "aliases"),
    ("a: " + "[" * 600 + "]" * 600, "nested too deeply"),
    ("a:\n" + "".join(" " * n + "a:\n" for n in range(1, 300)), "nested too deeply"),
    ("seed: 1\n" * 20_000, "too large"), ("a: [" + "1, " * 10_000 + "]", "more than 10,000 values"),
    ("seed: !!python/object:os.system x", "line 1"), ("seed: !!int x", "not valid YAML"), ("a: !!bool x", "not valid YAML"),
    ("seed: ${", "not valid YAML"), ("\x07", "not valid YAML"), ("- 1", "holds no settings"),
    ("a:\n b: ???", "line 2: ??? marks"), ("a:\n  - '???'", "line 2: ??? marks"),
    ("a: 010", "line 1: 010 is the number 8 in YAML"), ("a: 1:30", "is the number 90"), ("a: 1\n---\nb: 2", "line"),
], ids=lambda value: value[:12] if len(value) > 12 else value)
def test_yaml_that_is_a_trap_is_refused_at_once(tmp_path, text, said):
    (tmp_path / "own.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        read_yaml(tmp_path / "own.yaml")
    message = str(caught.value)
    assert said in message and "own.yaml" in message and "\n" not in message and len(message) < 400
    # Without its checks, it would take minutes.
    assert time.process_time() - start < 30


@pytest.mark.parametrize("which", ["config.yaml", "model/extra.yaml", "experiment/extra.yaml"])
def test_every_file_of_conf_is_read_with_limits(preset, tmp_path, which):
    preset("model", "{}")
    (tmp_path / "conf" / which).write_text(BOMB)
    choice = f"{which.partition('/')[0]}=extra" if "/" in which else "seed=1"
    assert f"{which} holds more than 10,000 values" in complaint(choice)


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path):
    assert "is not a file" in complaint(f"experiment={tmp_path}/none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "is not a file" in complaint(f"experiment={tmp_path}/folder.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: ä".encode("latin-1"))
    assert "is not UTF-8 at offset 6" in complaint(f"experiment={tmp_path}/latin.yaml")


def test_a_small_alias_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a 1e-3\nb: *a\nc: {<<: {d: 1}}")
    assert read_yaml(tmp_path / "a.yaml") == {"a": 0.001, "b": 0.001, "c": {"d": 1}}


def test_an_own_experiment_starts_from_the_default_run(own):
    default, made = compose("config", []), compose("config", [own("optim.lr: 0.5")])
    assert dataclasses.replace(made, auto_name="", optim=default.optim) == dataclasses.replace(default, auto_name="")
    assert made.optim.lr == 0.5 and made.auto_name == "own"


@pytest.mark.parametrize("choice", ["model: nano", "/model: nano", "override model: nano", "override /model: nano"])
def test_an_own_experiment_chooses_presets(own, choice):
    made = compose("config", [own(f"defaults:\n- {choice}")])
    assert made.model == compose("config", ["model=nano"]).model


def test_an_own_experiment_extends_another(own):
    wanted = compose("config", ["experiment=shakespeare_cpu"])
    for base in ("shakespeare_cpu", "override /experiment: shakespeare_cpu"):
        made = compose("config", [own(f"defaults:\n- {base}\nseed: 3")])
        assert (made.model, made.optim, made.seed) == (wanted.model, wanted.optim, 3)


def test_an_own_experiment_yields_to_overrides(own):
    chosen = own("defaults:\n- override /model: nano\n- override /data: shakespeare\ntraining: {max_steps: 3}", "my.yml")
    made = compose("config", [chosen])
    assert made.model == compose("config", ["model=nano"]).model
    assert (made.data.source, made.training.max_steps) == ("shakespeare", 3)
    made = compose("config", [chosen, "model=gpt2", "training.max_steps=9"])
    assert made.model == compose("config", ["model=gpt2"]).model
    assert (made.training.max_steps, made.auto_name) == (9, "my-gpt2")


@pytest.mark.parametrize("name", ["own", "name=x", "1e3", "1.10", "no", "010"])
def test_saved_settings_run_again(own, name):
    settings = compose("config", ["model=nano", "optim.lr=0.25", "seed=3", f"name={name}", "training.max_seconds=7"])
    chosen = own(as_yaml(settings), "config.yaml")
    assert compose("config", [chosen]) == dataclasses.replace(settings, auto_name="")
    again = compose("config", [chosen, "name=again", "optim.lr=1"])
    assert (again.name, again.optim.lr, again.model, again.seed) == ("again", 1.0, settings.model, 3)


@pytest.mark.parametrize("text", ["no", "1.10", "1e3", "!!binary aGk="])
def test_text_that_yaml_reads_as_something_else_is_refused(own, text):
    assert "is not text, as YAML reads it" in complaint(own(f"name: {text}"))
    assert compose("config", [own(f"name: '{text}'", "quoted.yaml")]).name == text


def test_a_preset_replaces_its_group_of_saved_settings(own):
    chosen = own(as_yaml(compose("config", ["seed=3", "name=x", "training.max_steps=7"])), "config.yaml")
    made = compose("config", [chosen, "model=gpt2", "name=y"])
    assert made.model == compose("config", ["model=gpt2"]).model
    assert (made.seed, made.training.max_steps) == (3, 7)


def test_a_setting_missing_from_saved_settings_is_default(own):
    content = yaml.safe_load(as_yaml(compose("config", ["name=x"])))
    del content["model"]["ngrams"]
    content["model"]["vocab_size"] = 99
    made = compose("config", [own(yaml.safe_dump(content))])
    assert made.model.ngrams == GPTConfig.ngrams
    content["model"]["n_layr"] = 2
    assert "model.n_layr (in " in complaint(own(yaml.safe_dump(content), "wrong.yaml"))


def test_a_file_without_its_ending_is_told_from_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "experiment=own.yaml" in complaint("experiment=own")
    assert "experiment=own.yaml" in complaint("own.yaml")


def test_the_file_that_the_documentation_shows_composes(own):
    text = (presets.CONF.parent / "docs" / "settings.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    made = compose("config", [own(text, "mine.yaml")])
    assert (made.optim.lr, made.training.max_steps, made.data.source) == (3e-3, 500, "shakespeare")
