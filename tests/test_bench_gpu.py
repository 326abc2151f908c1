"""python -m bench gpu: its cases run, here on a CPU with a tiny shape."""

from __future__ import annotations

import contextlib
import json
from unittest.mock import Mock

import pytest
import torch
from test_decoder import TracedCall, as_on_a_gpu  # noqa: F401

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


def test_without_a_compiler_the_loss_is_not_compiled(monkeypatch):
    monkeypatch.setattr("model.loss.MIN_LOGITS", 0)
    monkeypatch.setattr("model.loss.compiled_loss_and_gradient", Mock(side_effect=RuntimeError("no compiler")))
    monkeypatch.setattr(gpu, "options_of", lambda variant, device: LossOptions(2**24, 64, fused=True))
    case = gpu.Case("training", "tiny", "eager")
    found = gpu.measure(*case, 2, 0.01, "cpu")
    assert found["loss_failed"] and gpu.cells(case, found, found)[0].endswith(", but its loss could not be compiled")


@pytest.mark.usefixtures("as_on_a_gpu")
def test_no_graph_is_captured_while_decoding_is_timed(monkeypatch):
    def rate_of(*arguments):
        before = TracedCall.made
        rate = best_rate(*arguments)
        made.append(TracedCall.made - before)
        return rate

    made, best_rate = [], gpu.timing.best_rate
    monkeypatch.setattr(gpu.timing, "best_rate", rate_of)
    assert gpu.measure("decoding", "tiny", "", 2, 0.01, "cpu")["rate"] > 0
    assert TracedCall.made > 1 and not any(made)


@pytest.fixture
def measured(monkeypatch, capsys, tmp_path):
    """Run the benchmark with cases that take no time, but for those that a dict says more of; the table and the file."""
    def run(failures, **settings):
        def command(command, timeout):
            return "\nThe runs are bit-identical.\n"

        def case(module, kind, shape, variant, *rest, timeout):
            assert module == "bench.gpu" and timeout <= min(60 * options.minutes, gpu.MOST_SECONDS + options.seconds)
            for error in failures.get(variant or kind, []):
                raise error
            return {"rate": 5.0, "share": 0.5, "first": 1.0, "peak_bytes": 2**20}

        options = gpu.GpuSettings(device="cpu", shape="tiny", decoded="tiny", out=str(tmp_path / "out.json"), **settings)
        monkeypatch.setattr(gpu, "measure_in_process", case)
        monkeypatch.setattr(gpu, "run_command", command)
        with contextlib.suppress(KeyboardInterrupt):
            assert gpu.main(options) == 0
        return capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())

    return run


def test_a_failing_case_is_a_row_and_the_others_go_on(measured):
    error = ValueError("no compiler")
    error.add_note("many lines")
    table, found = measured({"compiled": [error]})
    assert "| tiny | compiled | not measured: no compiler |" in table and table.count("| 50.0% |") == 5
    assert found["training tiny compiled"] == {"error": "no compiler", "lines": ["many lines"]}
    assert "| 1.00 | 0.88 or more |" in table and "| nano | resume | The runs are bit-identical. |" in table
    assert list(found)[1:5] == ["training tiny eager", "training tiny compiled", "decoding tiny", "resume nano"]


def test_what_was_measured_before_an_interrupt_is_written(measured):
    _, found = measured({"decoding": [KeyboardInterrupt()]})
    assert list(found)[1:] == ["training tiny eager", "training tiny compiled"]


def test_no_case_begins_when_the_time_is_over(measured):
    table, _ = measured({}, minutes=0.3)
    assert table.count("not measured: minutes=0.3 are over") == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_case_on_a_gpu_gives_a_share_of_the_peak():
    found = gpu.measure("training", "gpt2", "eager", 4, 0.1, "cuda")
    assert found["peak_bytes"] > 0 and found["rate"] > 0
