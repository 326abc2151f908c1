"""python -m bench.bench: tables that add up; no times are asserted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bench import bench, decode
from conf.schema import ConfigError, compose
from generation import kernels

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


@pytest.mark.slow
def test_both_sides_are_measured_in_turn_and_the_ratios_agree(tmp_path, monkeypatch, capsys):
    """With a stand-in for the peer that has the same interface."""
    (tmp_path / "model.py").write_text(PEER)
    tiny = replace(bench.GPT2_LIKE, n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=11)
    monkeypatch.setattr(bench, "SHAPES", {"narrow": (tiny, 2)})
    order = []

    def here(side, shape, settings):
        order.append(side)
        capsys.readouterr()
        bench.measure(side, shape, settings.seconds, settings.peer)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(bench, "in_a_process", here)
    out = tmp_path / "speed.json"
    assert bench.speed(compose(bench.SpeedSettings, [f"peer={tmp_path}", "shape=narrow", "rounds=2", "seconds=0.05", f"out={out}"])) == 0
    assert order == ["nanogpt", "ours"] * 2
    measured = json.loads(out.read_text())["narrow"]
    assert all(sum(run["seconds"]) >= 0.05 and len(run["seconds"]) >= 2 for side in measured["runs"].values() for run in side)
    cells = capsys.readouterr().out.splitlines()[-1].split("|")
    assert float(cells[4]) == pytest.approx(bench.middle_ratio(measured["tokens_per_second"]), abs=0.01)


@pytest.mark.parametrize(("native", "precision"), [("1", torch.bfloat16), ("0", torch.float32)])
def test_the_product_rate_is_of_the_precision_of_the_steps(native, precision, monkeypatch):
    """A CPU that emulates bf16 would multiply for minutes."""
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    monkeypatch.setattr(bench, "PRODUCT_SIZES", (4, 8))
    made, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **how: made.append(randn(*size, **how)) or made[-1])
    assert bench.product_rate(bench.Device("cpu")) > 0
    assert [matrix.dtype for matrix in made] == 4 * [precision]


def test_a_ratio_is_of_the_two_sides_of_one_round():
    assert bench.middle_ratio({"nanogpt": [10, 100, 1000], "ours": [20, 300, 1000]}) == 2


@pytest.mark.slow
def test_a_profile_shows_the_parts_of_a_step(capsys, tmp_path):
    words = ["model.n_layer=1", "model.n_embd=16", "model.block_size=8", "training.batch_size=2", "data.vocab_size=300", "rows=5"]
    assert bench.profile(compose(bench.ProfileSettings, [*words, f"trace={tmp_path / 'trace.json'}"])) == 0
    said = capsys.readouterr().out
    shares = [float(line.split("|")[3].strip(" %")) for line in said.splitlines() if line.startswith(("| forward", "| backward", "| optimizer"))]
    assert len(shares) == 3 and 98 <= sum(shares) <= 102
    assert "aten::" in said and json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("words, problem", [(["peer=/nowhere"], "no nanoGPT checkout"), (["rounds=0"], "at least 1"), (["seconds=0"], "more than 0"), (["shape=tall"], "is not one of")])
def test_bad_settings_are_one_sentence(words, problem):
    with pytest.raises(ConfigError, match=problem):
        compose(bench.SpeedSettings, words)


GENERATES = PEER.replace("        self.wte = ", "        self.transformer = torch.nn.Module()\n        self.transformer.wte = ").replace(
    "self.wte(idx) @ self.wte", "self.transformer.wte(idx) @ self.transformer.wte") + '''
    def generate(self, idx, max_new_tokens, temperature, top_k):
        for _ in range(max_new_tokens):
            idx = torch.cat((idx, self(idx, idx)[0][:, -1:].argmax(-1)), dim=1)
        return idx
'''


@pytest.mark.parametrize(("native", "batches"), [("1", ["bf16"]), ("0", ["fp32", "bf16"])])
def test_decoding_is_measured_side_by_side(tmp_path, monkeypatch, capsys, native, batches):
    """With a stand-in for nanoGPT, and without transformers: every case once a round, in turn, and a row a case."""
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    (tmp_path / "model.py").write_text(GENERATES)
    tiny = replace(bench.GPT2_LIKE, n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=80)
    monkeypatch.setattr(decode, "SHAPES", {"gpt2": tiny})
    monkeypatch.setattr(decode, "read_rate", lambda: 1e9)
    monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name: None)
    order = []

    def here(case, settings):
        order.append(case)
        capsys.readouterr()
        decode.measure(*case, settings)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(decode, "in_a_process", here)
    out = tmp_path / "decode.json"
    words = [f"peer={tmp_path}", "prompt=6", "tokens=5", "batch=3", "rounds=2", f"out={out}"]
    assert decode.decode(compose(decode.DecodeSettings, words)) == 0
    singles = ["fp32", "bf16", "int8"] if kernels.available() else ["fp32", "bf16"]
    cases = [("nanogpt", "fp32", 1), *(("ours", precision, 1) for precision in singles),
             *(("ours", precision, 3) for precision in batches)]
    assert order == 2 * cases
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][-len(cases):]
    for row, case in zip(rows, json.loads(out.read_text()), strict=True):
        assert row.startswith(f"| {case['side']} | {case['precision']} | {case['batch']} |") and len(case["runs"]) == 2
        assert all(set(run) == {"prepare", "prefill", "rate", "of_reading", "reading"} and run["prefill"] > 0 for run in case["runs"])
        assert all(run["reading"] == 1e9 for run in case["runs"])


@pytest.mark.parametrize(("native", "many"), [("1", "bf16"), ("0", "fp32")])
def test_peers_decode_in_bf16_only_where_it_is_native(native, many, monkeypatch):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name: name)
    found = decode.cases(decode.DecodeSettings())
    assert {case[1] for case in found if case[0] == "transformers"} == {"fp32", many}
    assert len(found) == len(set(found))


@pytest.mark.parametrize("words, problem", [(["peer=/nowhere"], "no nanoGPT checkout"), (["tokens=1"], "at least 2"), (["prompt=1000"], "pass the block")])
def test_bad_settings_of_decode_are_one_sentence(words, problem):
    with pytest.raises(ConfigError, match=problem):
        compose(decode.DecodeSettings, words)
