"""python -m bench: tables that add up; no times are asserted."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import pytest
import torch

from bench import __main__ as command
from bench import decode, profile, speed, timing, workers
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


def test_the_benchmarks_are_listed_with_their_first_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench"])
    # SIGPIPE would end this process in later tests.
    monkeypatch.setattr(command.signal, "signal", lambda *words: None)
    command.main()
    for name, line in zip(command.BENCHMARKS, capsys.readouterr().out.splitlines()[1:], strict=True):
        assert line.split(maxsplit=1) == [name, command.docstring(name).partition("\n")[0]]


@pytest.mark.parametrize("name", command.BENCHMARKS)
def test_every_benchmark_has_help_with_its_settings(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", ["bench", name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and f"python -m bench {name}" in said
    assert re.search(r"^  (rounds|rows|seeds|batch_size)=\d+ ", said, re.MULTILINE)


def test_an_unknown_benchmark_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "sped"])
    with pytest.raises(SystemExit, match="sped is not a benchmark: choose one of ablation, "):
        command.main()


def test_a_measurement_in_a_process_returns_its_result(tmp_path, monkeypatch):
    (tmp_path / "doubling.py").write_text("def measure(number): print('noise'); return {'twice': 2 * number}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert timing.measure_in_process("doubling", 4) == {"twice": 8}
    with pytest.raises(ValueError, match="TypeError: unsupported operand") as failure:
        timing.measure_in_process("doubling", None)
    assert "Traceback" in failure.value.__notes__[0]
    (tmp_path / "failing.py").write_text("import time\n\ndef measure(seconds):\n    time.sleep(seconds)\n"
                                         "    raise RuntimeError('CUDA error: out of luck\\nFor debugging consider this')")
    with pytest.raises(ValueError, match="failing") as failure:
        timing.measure_in_process("failing", 0)
    assert str(failure.value).endswith("failing import measure: RuntimeError: CUDA error: out of luck")
    with pytest.raises(ValueError, match="not finished after 0 s"):
        timing.measure_in_process("failing", 20, timeout=0.3)


@pytest.fixture
def in_this_process(monkeypatch, capsys):
    """Replaces the measurement in a process of its own; gives the arguments of each call."""
    def replace_in(module):
        calls = []

        def here(name, *arguments):
            calls.append(arguments)
            return json.loads(json.dumps(module.measure(*arguments)))

        monkeypatch.setattr(timing, "measure_in_process", here)
        return calls

    return replace_in


@pytest.mark.slow
def test_speed_measures_both_sides_in_turn(tmp_path, monkeypatch, capsys, in_this_process):
    """With a stand-in for nanoGPT that has the same interface."""
    (tmp_path / "model.py").write_text(PEER)
    tiny = replace(speed.GPT2_LIKE, n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=11)
    monkeypatch.setattr(speed, "SHAPES", {"narrow": (tiny, 2)})
    monkeypatch.setattr(speed, "PRODUCT_SIZES", (64,))
    calls, out = in_this_process(speed), tmp_path / "speed.json"
    words = [f"peer={tmp_path}", "shape=narrow", "rounds=2", "seconds=0.05", f"out={out}"]
    assert speed.main(compose(speed.SpeedSettings, words)) == 0
    assert [side for side, *_ in calls] == ["nanogpt", "ours"] * 2
    measured = json.loads(out.read_text())["narrow"]
    for run in measured["runs"]["nanogpt"] + measured["runs"]["ours"]:
        assert sum(run["seconds"]) >= 0.05 and len(run["seconds"]) >= 2
    cells = capsys.readouterr().out.splitlines()[-1].split("|")
    assert cells[1:3] == [" narrow ", " ours "]
    assert float(cells[4]) == pytest.approx(timing.median_ratio(measured["runs"]["ours"], measured["runs"]["nanogpt"], "rate"), abs=0.01)


@pytest.mark.slow
def test_workers_are_measured_under_torchrun(monkeypatch, capsys):
    """Two processes have half of the optimizer state each, and wait for each other."""
    monkeypatch.setattr(workers, "SIDES", ((2, 1),))
    monkeypatch.setattr(workers, "sum_seconds", lambda *_: {"plain": 1.0, "tree": 1.0})
    words = ["shape=narrow", "optimizer=adamw", "rounds=1", "seconds=0.01", "micro_steps=2"]
    assert workers.main(compose(workers.WorkersSettings, words)) == 0
    (cells,) = [line.split("|") for line in capsys.readouterr().out.splitlines() if "| 2 x 1 |" in line]
    assert cells[3] == " 1.00 " and float(cells[4].strip(" %")) > 0
    numbers = sum(weights.numel() for weights in speed.GPT(speed.SHAPES["narrow"][0]).parameters())
    assert float(cells[7]) == pytest.approx(8 * numbers / 2 / 2**20, rel=0.05)


@pytest.mark.parametrize(("native", "precision"), [("1", torch.bfloat16), ("0", torch.float32)])
def test_the_product_rate_uses_the_precision_of_training(native, precision, monkeypatch):
    """A CPU that emulates bf16 would multiply for minutes."""
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    monkeypatch.setattr(speed, "PRODUCT_SIZES", (4, 8))
    made, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **how: made.append(randn(*size, **how)) or made[-1])
    assert speed.product_rate(speed.Device("cpu")) > 0
    assert [matrix.dtype for matrix in made] == 4 * [precision]


def test_a_ratio_compares_the_sides_of_one_round():
    ours, theirs = ([{"rate": rate} for rate in rates] for rates in ([20, 300, 1000], [10, 100, 1000]))
    assert timing.median_ratio(ours, theirs, "rate") == 2


@pytest.mark.slow
def test_a_profile_shows_the_parts_of_a_step(capsys, tmp_path):
    words = ["model.n_layer=1", "model.n_embd=16", "model.block_size=8", "training.batch_size=2", "data.vocab_size=300", "rows=5"]
    assert profile.main(compose(profile.ProfileSettings, [*words, f"trace={tmp_path / 'trace.json'}"])) == 0
    said = capsys.readouterr().out
    parts = re.findall(r"^\| (forward|backward|optimizer) \|.*\| (\d+)% \|$", said, re.MULTILINE)
    assert len(parts) == 3 and 98 <= sum(int(share) for _, share in parts) <= 102
    assert "aten::" in said and json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("settings, word, problem", [
    (speed.SpeedSettings, "peer=/nowhere", "not a nanoGPT checkout"),
    (speed.SpeedSettings, "rounds=0", "at least 1"),
    (speed.SpeedSettings, "seconds=0", "more than 0"),
    (speed.SpeedSettings, "shape=tall", "is not one of"),
    (decode.DecodeSettings, "peer=/nowhere", "not a nanoGPT checkout"),
    (decode.DecodeSettings, "tokens=1", "at least 2"),
    (decode.DecodeSettings, "prompt=1000", "exceed the context of 1024 tokens"),
    (profile.ProfileSettings, "rows=0", "at least 1"),
    (workers.WorkersSettings, "micro_steps=3", "cannot be divided among 2"),
])
def test_bad_settings_are_one_sentence(settings, word, problem):
    with pytest.raises(ConfigError, match=problem):
        compose(settings, [word])


GENERATES = PEER.replace("        self.wte = ", "        self.transformer = torch.nn.Module()\n        self.transformer.wte = ").replace(
    "self.wte(idx) @ self.wte", "self.transformer.wte(idx) @ self.transformer.wte") + '''
    def generate(self, idx, max_new_tokens, temperature, top_k):
        for _ in range(max_new_tokens):
            idx = torch.cat((idx, self(idx, idx)[0][:, -1:].argmax(-1)), dim=1)
        return idx
'''


@pytest.mark.parametrize(("native", "batches"), [("1", ["bf16"]), ("0", ["fp32", "bf16"])])
def test_decoding_is_measured_side_by_side(tmp_path, monkeypatch, capsys, in_this_process, native, batches):
    """With a stand-in for nanoGPT, and without transformers: every case once a round, in turn, and a row a case."""
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    (tmp_path / "model.py").write_text(GENERATES)
    tiny = replace(speed.GPT2_LIKE, n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=80)
    monkeypatch.setattr(decode, "SHAPES", {"gpt2": tiny})
    monkeypatch.setattr(decode, "read_rate", lambda: 1e9)
    monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name: None)
    calls = in_this_process(decode)
    out = tmp_path / "decode.json"
    words = [f"peer={tmp_path}", "prompt=6", "tokens=5", "batch=3", "rounds=2", f"out={out}"]
    assert decode.main(compose(decode.DecodeSettings, words)) == 0
    singles = ["fp32", "bf16", "int8"] if kernels.available() else ["fp32", "bf16"]
    cases = [("nanogpt", "fp32", 1), *(("ours", precision, 1) for precision in singles),
             *(("ours", precision, 3) for precision in batches)]
    assert [call[:3] for call in calls] == 2 * cases
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
