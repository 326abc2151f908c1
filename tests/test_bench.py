"""python -m scripts.bench: tables that add up; no times are asserted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from conf.schema import ConfigError, compose
from scripts import bench

PEER = '''
from dataclasses import dataclass
import torch
from torch.nn import functional as F
@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
    def forward(self, idx, targets):
        logits = self.wte(idx) @ self.wte.weight.T
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)
'''


def test_both_sides_are_measured_in_turn_and_the_ratios_agree(tmp_path, monkeypatch, capsys):
    """With a stand-in for the peer that has the same interface."""
    (tmp_path / "model.py").write_text(PEER)
    tiny = replace(bench.GPT2_LIKE, n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=11)
    monkeypatch.setattr(bench, "SHAPES", {"narrow": (tiny, 2)})
    order = []

    def here(side, shape, settings):
        order.append(side)
        capsys.readouterr()
        bench.measure(side, shape, settings.steps, settings.peer)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(bench, "in_a_process", here)
    out = tmp_path / "speed.json"
    assert bench.speed(compose(bench.SpeedSettings, [f"peer={tmp_path}", "shape=narrow", "rounds=2", "steps=3", f"out={out}"])) == 0
    assert order == ["nanogpt", "ours"] * 2
    measured = json.loads(out.read_text())["narrow"]
    assert all(len(run["seconds"]) == 3 for side in measured["runs"].values() for run in side)
    cells = capsys.readouterr().out.splitlines()[-1].split("|")
    ratio = measured["tokens_per_second"]["ours"] / measured["tokens_per_second"]["nanogpt"]
    assert float(cells[4]) == pytest.approx(ratio, abs=0.01)


def test_a_profile_shows_the_parts_of_a_step(capsys, tmp_path):
    words = ["model.n_layer=1", "model.n_embd=16", "model.block_size=8", "training.batch_size=2", "data.vocab_size=300", "rows=5"]
    assert bench.profile(compose(bench.ProfileSettings, [*words, f"trace={tmp_path / 'trace.json'}"])) == 0
    said = capsys.readouterr().out
    shares = [float(line.split("|")[3].strip(" %")) for line in said.splitlines() if line.startswith(("| forward", "| backward", "| optimizer"))]
    assert len(shares) == 3 and 98 <= sum(shares) <= 102
    assert "aten::" in said and json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("words, problem", [(["peer=/nowhere"], "no nanoGPT checkout"), (["rounds=0"], "at least 1"), (["shape=tall"], "is not one of")])
def test_bad_settings_are_one_sentence(words, problem):
    with pytest.raises(ConfigError, match=problem):
        compose(bench.SpeedSettings, words)
