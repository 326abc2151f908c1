"""python -m bench attention: all ways compute causal attention; no times are asserted."""

from __future__ import annotations

import torch

from bench import attention, timing


def test_every_way_computes_attention_with_a_gradient():
    ways = attention.make_modules(16, 8, 2, torch.device("cpu"))
    x = torch.randn(3, 8, 16, requires_grad=True)
    outputs = {name: call(x) for name, call in ways.items()}
    assert all(y.shape == x.shape for y in outputs.values())
    for name in ("one projection, plain products", "one projection, fused kernel", "the block, which chooses"):
        torch.testing.assert_close(outputs[name], outputs["split projections"], rtol=0, atol=1e-5)
    changed = x.detach().clone()
    changed[:, -1] += 1
    assert all(torch.equal(call(changed)[:, :-1], outputs[name][:, :-1]) for name, call in ways.items())


def test_the_table_has_a_row_for_each_way(monkeypatch, capsys):
    monkeypatch.setattr(attention, "SIZES", {"small": (2, 8, 16, 2)})
    assert attention.main(attention.AttentionSettings(rounds=2, device="cpu", precision="fp32")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 6 and lines[1].startswith("| head by head |") and lines[1].count("1.00") == 2


def test_calls_alternate_and_the_first_round_is_not_counted(monkeypatch):
    calls, clock = [], [0.0]
    durations = {"a": iter([90, 2, 1, 4]), "b": iter([80, 5, 7, 6])}

    def call(name):
        calls.append(name)
        clock[0] += next(durations[name])

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    found = timing.alternating_medians({name: lambda name=name: call(name) for name in "ab"}, rounds=3)
    assert calls == ["a", "b"] * 4 and found == {"a": 2, "b": 6}
