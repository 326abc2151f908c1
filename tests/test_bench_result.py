"""python -m bench result, start, pretrained and ablation: what is taken from a peer's run; no times are asserted."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import yaml
from test_report import write_run

from bench import ablation, pretrained, result, start
from bench import peer as peer_module
from conf import presets
from conf.schema import ConfigError, compose
from evaluation import comparison
from scripts import compare

VAL = (np.arange(1000) ** 2 % 97).astype(np.uint16)

TRAIN = '''
import os, torch, numpy as np
device = "cpu"
torch.manual_seed(1337 + 0)
block_size, data_dir = 4, "data/shakespeare_char"
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Linear(2, 5)
    def forward(self, inputs, targets):
        assert not self.training and torch.equal(inputs[:, 1:], targets[:, :-1])
        return None, targets.double().mean()
raw_model = Model()
for step in range(501):
    print(f"iter {step}: loss {torch.initial_seed()}, time {9000 if step % 250 == 0 else 20:.2f}ms, mfu 0.00%")
'''


@pytest.fixture
def peer(tmp_path):
    folder = tmp_path / "peer/data/shakespeare_char"
    folder.mkdir(parents=True)
    (tmp_path / "peer/train.py").write_text(TRAIN)
    VAL.tofile(folder / "val.bin")
    for name in ("input.txt", "train.bin", "meta.pkl"):
        (folder / name).touch()
    return tmp_path / "peer"


@pytest.mark.slow
def test_the_peer_trains_from_the_seed_on_the_whole_split(peer, monkeypatch):
    said = []
    original = peer_module.run_command
    monkeypatch.setattr(peer_module, "run_command", lambda *args: said.append(original(*args)) or said[0])
    found = peer_module.train(peer, 7, "cpu")
    assert "iter 0: loss 7," in said[0]
    assert found["seconds"] == pytest.approx(501 * 0.02)  # without what it spends on evaluating
    assert found["parameters"] == 15
    assert found["val_loss"] == pytest.approx(VAL[1:997].mean())  # 249 windows of 4


def test_a_peer_that_fails_is_one_sentence(peer):
    (peer / "train.py").write_text("raise RuntimeError('no such device')")
    with pytest.raises(ValueError, match="no such device"):
        peer_module.train(peer, 7, "cpu")


def test_each_round_has_another_seed(peer, monkeypatch, tmp_path, capsys):
    seeds = []
    run = {"val_loss": 1.5, "parameters": 1}
    monkeypatch.setattr(peer_module, "train", lambda peer, seed, device: seeds.append(seed) or run | {"seconds": 8.0})
    monkeypatch.setattr(result, "train_in", lambda folder, *words: seeds.append(words[-1]) or run | {"seconds": 2.0})
    assert result.main(compose(result.ResultSettings, [f"peer={peer}", "rounds=2", f"out={tmp_path / 'r.json'}"])) == 0
    assert seeds == [1337, "seed=1337", "seed=1337", 1338, "seed=1338", "seed=1338"]
    assert "nanoGPT trains 4.0 times as long" in capsys.readouterr().out and (tmp_path / "r.json").is_file()


@pytest.mark.parametrize("words, problem", [([], "must name"), (["peer=/nowhere"], "no prepared text"), (["rounds=0"], "at least 1")])
def test_bad_settings_are_one_sentence(words, problem):
    with pytest.raises(ConfigError, match=problem):
        compose(result.ResultSettings, words)


@pytest.mark.slow
def test_an_ablation_compares_the_same_seeds_with_and_without(monkeypatch, tmp_path, capsys):
    pytest.importorskip("scipy")

    def run_plan(plan):
        for name, (_, settings) in plan.composed.items():
            worse = 2 if settings.model.ngrams == 1 else 0
            write_run(plan.folder / name, end=3 + worse + settings.seed % 3 / 10 + worse * settings.seed / 50, seed=settings.seed)
        return 0, []

    monkeypatch.setattr(compare, "run_plan", run_plan)
    monkeypatch.setattr(ablation, "variants_of", lambda recipe: {"n-grams": ["model.ngrams=1"]})
    assert ablation.main(compose(ablation.AblationSettings, [f"runs_dir={tmp_path}", "seeds=4", "model.ngrams=2"])) == 0
    _, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows == [["n-grams", "5.2560", "+2.0449 ± 0.0256", "0.004", "yes"]]


@pytest.mark.parametrize(("size", "expected"), [("small", (96, 3, 100)), ("medium", (128, 3, 200))])
def test_a_small_ablation_trains_small_models(monkeypatch, tmp_path, size, expected):
    def run_plan(plan):
        sizes.append({(settings.model.n_embd, settings.model.ngrams, settings.training.max_steps) for _, settings in plan.composed.values()})
        return 130, []  # interrupted

    sizes = []
    monkeypatch.setattr(compare, "run_plan", run_plan)
    monkeypatch.setattr(ablation, "variants_of", lambda recipe: {})
    monkeypatch.setattr(comparison, "import_stats", lambda: None)
    with pytest.raises(SystemExit):
        ablation.main(compose(ablation.AblationSettings, [f"runs_dir={tmp_path}", "seeds=2", f"size={size}", "model.ngrams=3"]))
    assert sizes == [{expected}]


def test_an_ablation_without_scipy_ends_before_it_trains(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setattr(compare, "run_plan", lambda plan: pytest.fail("a run was trained"))
    with pytest.raises(ValueError, match="needs SciPy: pip install scipy"):
        ablation.main(compose(ablation.AblationSettings, [f"runs_dir={tmp_path}"]))


@pytest.mark.slow
def test_every_ingredient_of_the_modern_models_has_a_variant():
    """Which train.py accepts; those that change nothing are left out."""
    variants = ablation.variants_of(["experiment=modern_shakespeare"])
    assert variants.keys() > ablation.WITHOUT.keys()
    changed = {word.partition("=")[0] for words in variants.values() for word in words}
    for preset in (presets.CONF / "model").glob("modern-*.yaml"):
        flags = yaml.safe_load(preset.read_text()).keys() - {"defaults", "block_size", "n_layer", "n_head", "n_embd", "ngram_rows"}
        assert {f"model.{flag}" for flag in flags} <= changed, preset
    assert "n-grams" not in ablation.variants_of(["experiment=shakespeare_cpu"])  # it has none


def test_the_clock_stops_at_the_first_step():
    program = "import time; print('loading'); time.sleep(0.2); print('Step 1: done'); time.sleep(60)"
    assert 0.2 <= start.seconds_until("Step 1:", ["-c", program], ".") < 30
    with pytest.raises(ValueError, match="before its first step"):
        start.seconds_until("Step 2:", ["-c", "print('Step 1: done')"], ".")


def test_starts_are_compared_with_the_first_one_left_out(tmp_path, monkeypatch, capsys):
    times = iter([90, 90, 90, 2, 1, 4, 3, 2, 5])
    monkeypatch.setattr(start, "seconds_until", lambda prefix, arguments, folder: next(times))
    out = tmp_path / "out.json"
    assert start.main(start.StartSettings(peer=str(tmp_path), rounds=2, out=str(out))) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["| nanoGPT | 2.50 | 1.00 |", "| the same recipe | 1.50 | 0.60 |", "| the default run | 4.50 | 1.80 |"]
    assert json.loads(out.read_text()) == {"nanoGPT": [2, 3], "the same recipe": [1, 2], "the default run": [4, 5]}


@pytest.mark.slow
def test_pretrained_weights_are_measured_in_pairs(tmp_path, monkeypatch, capsys):
    """Both sides get the same batches, and ratios are those of the same round."""
    pytest.importorskip("transformers")
    for name in ("model.py", "train.py"):
        (tmp_path / name).touch()
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("To be, or not to be, that is the question. " * 40)
    commands, batches, times = [], [], iter([8.0, 2.0, 6.0, 3.0])

    def measure_command(command, folder=None):
        commands.append(command)
        return {"seconds": 1.0, "peak_bytes": 2**21}

    def finetune(work, file, options):
        batches.append(np.load(file))
        return {"seconds": next(times), "val_loss": 2.5}

    monkeypatch.setattr(pretrained, "measure_command", measure_command)
    monkeypatch.setattr(peer_module, "finetune", finetune)
    monkeypatch.setattr(pretrained, "train_in", lambda run, *words: {"seconds": next(times), "val_loss": 2.25})
    words = [f"peer={tmp_path}", f"text={text}", "rounds=2", "steps=3", "block_size=8", f"out={out}"]
    assert pretrained.main(compose(pretrained.PretrainedSettings, words)) == 0
    assert batches[0].shape == (6, 2, 1, 8) and (batches[0] == batches[1]).all()
    assert (batches[0][:, 0, :, 1:] == batches[0][:, 1, :, :-1]).all()
    lines = capsys.readouterr().out.splitlines()
    assert "| fine-tuning, steps | ours | 2.50 | 0.38 |  | 2.25000 |" in lines
    assert "| export | ours | 1.00 | 1.00 | 2 MB |  |" in lines
    assert len(json.loads(out.read_text())) == 2 and len(commands) == 1 + 2 * 4
