"""Suggestions for the names of other projects."""

from __future__ import annotations

from typing import get_args

import pytest

from conf import hints
from conf.convert import convert
from conf.presets import groups
from conf.schema import compose
from conf.settings import SampleSettings, Settings, leaves
from conf.yaml_files import ConfigError

pytestmark = pytest.mark.usefixtures("composed_by_hydra")

KNOWN = {*leaves(Settings), *leaves(SampleSettings), *groups()}


def complaint(*overrides, root="config"):
    with pytest.raises(ConfigError) as caught:
        compose(root, list(overrides))
    return str(caught.value)


def test_each_suggestion_is_a_setting_that_exists():
    assert hints.OTHER_NAMES.keys() <= KNOWN
    values = {value for hint in leaves(Settings).values() for value in get_args(hint)}
    assert set(hints.OTHER_VALUES.values()) <= values


def test_names_of_other_projects_are_not_settings_here():
    others = [name for names in hints.OTHER_NAMES.values() for name in names.split()]
    assert not set(others) & KNOWN
    assert set(hints.UNITS) <= set(others)


@pytest.mark.parametrize(("key", "meant"), [
    ("learning_rate", "optim.lr"), ("min_lr", "optim.min_lr_ratio"), ("dtype", "training.precision"),
    ("gradient_accumulation_steps", "training.tokens_per_step"), ("device", "training.device"),
    ("per_device_train_batch_size", "training.batch_size"), ("num_train_epochs", "training.max_steps"),
    ("max_iters", "training.max_steps"), ("eval_interval", "training.eval_every"), ("eval_iters", "training.eval_tokens"),
    ("warmup_iters", "optim.warmup_steps"), ("lr_decay_iters", "training.max_steps"), ("n_embed", "model.n_embd"),
    ("hidden_size", "model.n_embd"), ("wandb_log", "logger.wandb"), ("out_dir", "runs_dir"), ("compile", "training.compile"),
    ("block_size", "model.block_size"), ("batch_size", "training.batch_size"), ("optimizer.learning_rate", "optim.lr"),
    ("trainer.max_epochs", "training.max_steps"), ("weight_decay", "optim.weight_decay"), ("Learning_Rate", "optim.lr"),
    ("epochs", "training.max_steps"), ("dataset", "data"), ("lr", "optim.lr"), ("bf16", "training.precision"),
])
def test_names_of_other_projects_find_ours(key, meant):
    assert f"{key} (on the command line) is not a setting (did you mean {meant}?)" in complaint(f"{key}=1")


def test_a_hint_names_a_different_unit():
    assert "(did you mean training.max_steps?): it counts steps;" in complaint("num_train_epochs=3")


def test_sampling_has_its_own_names():
    assert "did you mean max_new_tokens?" in complaint("max_tokens=3", root="sample")
    assert "did you mean prompt?" in complaint("start=x", root="sample")


@pytest.mark.parametrize(("value", "key", "meant"), [
    ("gpu", "training.device", "cuda"), ("cuda:0", "training.device", "cuda"), ("float32", "training.precision", "fp32"),
    ("bfloat16", "training.precision", "bf16"), (16, "training.precision", "fp16"), ("FP16", "training.precision", "fp16"),
    ("adam", "optim.optimizer", "adamw"),
])
def test_values_of_other_projects_find_ours(value, key, meant):
    with pytest.raises(ValueError, match=rf"did you mean {meant}\?"):
        convert(value, leaves(Settings)[key])


@pytest.mark.parametrize(("override", "advice"), [
    ("hydra.run.dir=x", "runs_dir=FOLDER"), ("hydra.sweep.dir=x", "runs_dir=FOLDER"), ("hydra/job_logging=none", "log.txt"),
    ("hydra/launcher=joblib", "jobs=2"), ("hydra/sweeper=optuna", "scripts.sweep"), ("hydra.sweeper.n_trials=3", "scripts.sweep"),
    ("hydra.mode=MULTIRUN", "-m"), ("hydra.searchpath=[x]", "own.yaml"), ("hydra.verbose=true", "log.txt"),
    ("+hydra.job.chdir=true", "name="), ("hydra.output_subdir=null", "log.txt"),
])
def test_settings_of_hydra_name_the_alternative(override, advice):
    said = complaint(override)
    assert "is not used here" in said and advice in said


@pytest.mark.parametrize(("root", "key", "said"), [
    ("config", "prompt", "is a setting of sample.py only"), ("config", "temperature", "is a setting of sample.py only"),
    ("config", "jobs", "is a setting of sweeps (python train.py -m"), ("sample", "model", "is a setting of train.py only"),
    ("sample", "optim.lr", "is a setting of train.py only"), ("sample", "experiment", "is a setting of train.py only"),
    ("config", "device", "did you mean training.device?"), ("config", "precision", "did you mean training.precision?"),
    ("config", "SEED", "did you mean seed?"), ("config", "training.MAX_STEPS", "did you mean training.max_steps?"),
    ("config", "training.max-steps", "did you mean training.max_steps?"), ("config", "training.seed", "did you mean seed?"),
    ("config", "training.num_workers", "is not a setting; --help"), ("config", "optim.fused", "is not a setting; --help"),
])
def test_a_setting_of_another_program_is_told_from_a_mistake(root, key, said):
    message = complaint(f"{key}=1", root=root)
    assert said in message and f"did you mean {key}?" not in message
