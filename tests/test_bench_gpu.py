"""python -m bench gpu: its cases run, here on a CPU with a tiny shape."""

from __future__ import annotations

import pytest
import torch

from bench import gpu
from model.loss import LossOptions


@pytest.mark.parametrize(("kind", "variant"), [("training", "eager"), ("decoding", "")])
def test_a_case_gives_a_rate(kind, variant):
    found = gpu.measure(kind, "tiny", variant, 2, 0.01, "cpu")
    assert found["rate"] > 0 and found["first"] > 0 and found["peak_bytes"] == 0
    assert (found["share"] is None) == (kind == "training")  # the peak of a CPU is not known


def test_each_variant_differs_in_one_option(monkeypatch):
    monkeypatch.setattr(gpu, "loss_options", lambda device, fused: LossOptions(2**29, 64, fused))
    device = gpu.Device("cpu", "fp32")
    found = {variant: gpu.options_of(variant, device) for variant in gpu.VARIANTS}
    full = LossOptions(2**29, 64, fused=True)
    assert found["eager"] == found["compiled"] == found["fp32 norms"] == full
    assert found["small chunks"] == LossOptions(2**24, 64, fused=True)
    assert found["unfused loss"] == LossOptions(2**29, 64, fused=False)
    assert found["unpadded vocabulary"] == LossOptions(2**29, 1, fused=True)


def test_a_failing_case_is_a_row_and_the_others_go_on(monkeypatch, capsys):
    def fails(module, kind, shape, variant, *rest):
        if variant == "compiled":
            raise ValueError("no compiler")
        return {"rate": 5.0, "share": 0.5, "first": 1.0, "peak_bytes": 2**20}

    monkeypatch.setattr(gpu, "measure_in_process", fails)
    monkeypatch.setattr(gpu, "run_command", lambda command: "\nThe runs are bit-identical.\n")
    assert gpu.main(gpu.GpuSettings(device="cpu", shape="tiny", decoded="tiny")) == 0
    out = capsys.readouterr().out
    assert "| tiny | compiled | failed: no compiler |" in out and out.count("| 50.0% |") == len(gpu.VARIANTS)
    assert "| 1.00 | 0.88 or more |" in out and out.endswith("killed and resumed: The runs are bit-identical.\n")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_case_on_a_gpu_gives_a_share_of_the_peak():
    found = gpu.measure("training", "gpt2", "eager", 4, 0.1, "cuda")
    assert found["peak_bytes"] > 0 and found["rate"] > 0
