"""python -m scripts.plan: its figures are those of a training run. No times are asserted."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from checkpointing import memory_plan, store
from checkpointing.memory_plan import AllocationCounter
from checkpointing.spec import MODEL, OPTIMIZER
from conf.schema import ConfigError, compose
from data.bpe import PUBLISHED
from data.prepare import prepare
from model import GPT
from scripts import plan
from train import train
from training.device import Device
from training.gpus import GPUS

ROOT = Path(__file__).parent.parent


def said(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert plan.main(compose(plan.PlanSettings, ["model=nano", "data=text", "data.tokenizer=char", "training=smoke", *words])) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_parameters_tokens_and_flops_are_those_of_the_model(capsys, book, fresh_data, tmp_path):
    words = [f"data.path={book}", "training.tokens_per_step=512", "training.max_steps=50", "measure=false", f"runs_dir={tmp_path / 'runs'}"]
    assert "a vocabulary of 65 (assumed)" in said(capsys, *words)
    settings = compose("config", ["model=nano", "data=text", f"data.path={book}", "data.tokenizer=char"])
    meta = plan.read_meta(prepare(settings.data))
    out = said(capsys, *words)  # now the vocabulary is known
    model = GPT(plan.replace(settings.model, vocab_size=meta["vocab_size"]))
    count = sum(weights.numel() for weights in model.parameters())
    assert f"Model: {count:,} parameters" in out and "Time" not in out
    parts = [int(number.replace(",", "")) for number in re.findall(r"^  (?:embedding|attention|mlp|vector|head) +([\d,]+)$", out, re.MULTILINE)]
    assert len(parts) == 5 and sum(parts) == count
    epochs = 50 * 512 / meta["splits"]["train"]["tokens"]
    assert f"Tokens: 25,600, in 50 steps of 512; {epochs:,.1f} epochs" in out
    assert f"FLOPs: {model.flops_per_token() * 25_600:.3g}" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("tokenizer, size", [("byte", 257), ("gpt2", 50257), ("bpe", 777)])
def test_vocabulary_sizes_are_known_without_the_data(tokenizer, size):
    config = compose("config", ["data=hub", "data.hub_name=a/b", f"data.tokenizer={tokenizer}", "data.vocab_size=777"]).data
    assert plan.describe_data(config) == (size, None, f"not looked up; a vocabulary of {size:,} (of {tokenizer})")


def test_sizes_of_published_vocabularies(gpt2_files):
    from data.bpe import PUBLISHED_SIZES, BPETokenizer

    assert PUBLISHED_SIZES.keys() == PUBLISHED.keys()
    assert BPETokenizer.published("gpt2").vocab_size == PUBLISHED_SIZES["gpt2"]


def test_a_deep_model_is_planned_by_some_of_its_layers(monkeypatch):
    monkeypatch.setattr(memory_plan, "COUNTED_LAYERS", 2)
    settings = compose("config", ["name=-", "model=nano", "model.n_layer=7", "model.n_embd=32"])
    assert memory_plan.count_memory(settings, Device("cpu", "fp32")) == memory_plan.count_step(settings, Device("cpu", "fp32"), 0)


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_checkpoint_is_as_large_as_planned(compose_tiny, tmp_path, optim):
    settings = compose_tiny("training.max_steps=1", "training.sample_tokens=0", f"optim={optim}")
    train(settings)
    folder = store.list_checkpoints(tmp_path / "runs/tiny/checkpoints")[-1].folder
    there = sum((folder / name).stat().st_size for name in (MODEL, OPTIMIZER))
    vocab_size = plan.describe_data(settings.data)[0]
    kept, peak = memory_plan.count_memory(plan.replace(settings, model=plan.replace(settings.model, vocab_size=vocab_size)), Device("cpu", "fp32"))
    assert kept <= there <= kept + 20_000 and peak > kept  # the rest is names


def test_bytes_are_counted_while_their_tensors_live():
    with AllocationCounter() as counter:
        a = torch.zeros(1000)
        b = a + 1
        view = b[10:]
        assert counter.now == 8000
        del a
        assert counter.now == 4000 and counter.peak == 8000
        b.add_(1)
        del b
        assert counter.now == 4000  # the view holds it
        del view
        assert counter.now == 0
        layer = nn.Linear(10, 100, bias=False)
        loss = layer(torch.zeros(50, 10)).relu().sum()  # 4,000 + 2,000 + 20,000 + 20,000 that are kept for the way back, + 4
        assert 4000 + 20_000 <= counter.now <= 46_004
        del loss
        assert counter.now == 4000 and counter.peak >= 46_000


@pytest.mark.slow
def test_counting_memory_allocates_none(monkeypatch):
    """A part of GPT-2 XL: more than 8 GB would be needed."""
    settings = compose("config", ["model=gpt2-xl", "model.n_layer=8", "optim=adamw", "training.batch_size=16"])
    before = plan.resident_bytes()
    kept, peak = memory_plan.count_memory(settings, Device("cpu", "bf16"))
    assert kept > 3.9e9 and peak > 8e9 and plan.resident_bytes() - before < 2**30


@pytest.mark.slow
def test_batches_and_document_masks_cost_memory():
    def activations(*words: str) -> int:
        settings = compose("config", ["model=modern-nano", "data=pydocs", *words])
        kept, peak = memory_plan.count_memory(plan.replace(settings, model=plan.replace(settings.model, vocab_size=257)), Device("cpu", "fp32"))
        return peak - kept

    small, large = activations("training.batch_size=64"), activations("training.batch_size=128")
    assert 1.6 < large / small < 2.1
    assert activations("training.batch_size=64", "data.respect_documents=true") > small


@pytest.mark.slow
def test_time_is_measured_unless_memory_is_short(capsys, monkeypatch, book):
    words = [f"data.path={book}", "training.max_steps=1e6", "training.device=cpu"]
    out = said(capsys, *words)
    steps = r"1,000,000 steps of [\d.e-]+ s, 100,000 evaluations of [\d.e-]+ s"
    assert re.search(rf"Time: about [\d.]+ (minutes|hours|days) on this machine: {steps} \(cpu, ", out)
    monkeypatch.setattr(plan, "available_memory", lambda: 10 * 2**20)
    assert "Time: not measured, because only 10 MB of memory are free" in said(capsys, *words)


@pytest.mark.slow
def test_checkpoints_that_are_kept_are_counted(capsys, book):
    def disk(*words: str) -> tuple[int, int]:
        found = re.search(r"Disk: ([\d.]+) MB for checkpoints of ([\d.]+) MB: (\d+) that are kept", said(capsys, f"data.path={book}", "measure=false", "model=baby-cpu", *words))
        return round(float(found[1]) / float(found[2])), int(found[3])

    assert disk("training.keep_last=4", "training.max_steps=100", "training.checkpoint_every=10") == (6, 5)
    assert disk("training.keep_last=4", "training.max_steps=20", "training.checkpoint_every=10") == (3, 2)
    assert disk("training.max_steps=20", "training.checkpoint_every=0", "training.eval_every=0") == (2, 1)


# Between this process and the training: a process is said to have held what the one that started it held, and tests hold much.
MOST_MEMORY_OF = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("words", [["model=nano"], ["model=modern-small", "optim=muon", "training.batch_size=32"]], ids=["nano", "default"])
def test_planned_memory_is_within_a_quarter_of_the_measured(tmp_path, prepared_data, words):
    """A training of two steps in a process of its own, which is asked for the most that it held."""
    if sys.platform != "linux":
        pytest.skip("measured on Linux")
    words = ["data=text", "data.path=docs", "data.tokenizer=bpe", *words, "training.max_steps=2", "training.eval_tokens=1024", "training.sample_tokens=0", f"runs_dir={tmp_path}", "training.device=cpu"]
    here = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    planned = subprocess.run([sys.executable, "-m", "scripts.plan", *words, "measure=false"], **here).stdout
    training = subprocess.run([sys.executable, "-c", MOST_MEMORY_OF, sys.executable, "train.py", *words, "logger.report=false"], **here).stdout
    number, unit = re.search(r"Memory: ([\d.]+) (MB|GB)", planned).groups()
    measured, expected = int(training.split()[-1]) / 1024, float(number) * {"MB": 1, "GB": 1024}[unit]
    assert 0.75 < expected / measured < 1.25, (expected, measured)


@pytest.fixture
def uncounted(monkeypatch):
    """The import of fake tensors takes seconds, and other tests count memory."""
    monkeypatch.setattr(memory_plan, "count_memory", lambda settings, device, gpu_bytes: (10**6, 3 * 10**6))


@pytest.mark.slow
def test_a_plan_needs_no_data(capsys, uncounted):
    """As `experiment=gpt2_124m`, whose text is the user's; here in a small shape."""
    for words in (["data=text"], ["data=text", "data.path=/no/such"], ["data=hub"], ["data.mix=/no/such:1 pydocs:1"], ["data=bin"]):
        assert plan.main(compose(plan.PlanSettings, ["model=nano", "measure=false", *words])) == 0
        assert "Data: not found; a vocabulary of " in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"^training\.max_steps=0 must be at least 1; the default is 260\.$"):
        plan.main(compose(plan.PlanSettings, ["data=text", "training.max_steps=0"]))


def test_another_gpu_is_planned_by_its_data_sheet(capsys, uncounted):
    words = ["model=nano", "data=text", "training=smoke", "training.max_steps=1e11"]
    assert plan.main(compose(plan.PlanSettings, [*words, "device=h100"])) == 0
    out = capsys.readouterr().out
    flops = float(re.search(r"FLOPs: ([\d.e+]+)", out)[1])
    hours = float(re.search(r"Time: about ([\d.]+) hours on one H100, if training reaches 40%", out)[1])
    assert hours == pytest.approx(flops / (989e12 * 0.4) / 3600, abs=0.1, rel=0.01)
    assert plan.main(compose(plan.PlanSettings, [*words, "device=RTX4090", "mfu=0.2"])) == 0
    hours = float(re.search(r"Time: about ([\d.]+) hours on one RTX 4090", capsys.readouterr().out)[1])
    assert hours == pytest.approx(flops / (165e12 * 0.2) / 3600, abs=0.1, rel=0.01)


MILLION = 10**6


@pytest.mark.parametrize(("sharded", "state"), [(False, lambda weights, moments: weights + moments / 8),
                                               (True, lambda weights, moments: (weights + moments) / 8)])
def test_processes_divide_the_planned_memory(sharded, state):
    settings = compose("config", ["model=nano", "model.n_layer=8", "data=pydocs"])
    weights = 4 * sum(tensor.numel() for tensor in GPT(settings.model).parameters())
    one = memory_plan.memory_of_each(settings, 3 * weights, 4 * weights + MILLION)
    assert one == {"weights and optimizer": 3 * weights, "gradients": weights, "activations": MILLION}
    each = memory_plan.memory_of_each(settings, 3 * weights, 4 * weights + MILLION, 8, sharded)
    assert each["weights and optimizer"] == state(weights, 2 * weights) and each["activations"] == MILLION
    assert each["gradients"] == (weights / 8 if sharded else weights)


def test_memory_is_printed_for_each_of_several_processes(capsys, uncounted):
    words = ["model=nano", "data=text", "training=smoke", "device=h100", "ranks=8"]
    assert plan.main(compose(plan.PlanSettings, words)) == 0
    out = capsys.readouterr().out
    assert all(f"Memory of each of 8 processes, training.shard={shard}: " in out for shard in ("none", "full"))
    assert "on 8 x H100, if" in out


@pytest.mark.parametrize(("gigabytes", "shard", "divided"), [
    (100, "auto", False), (1, "auto", True), (1, "none", False), (100, "full", True)])
def test_weights_are_divided_if_they_do_not_fit(monkeypatch, gigabytes, shard, divided):
    settings = compose("config", ["model=gpt2", "data=pydocs", "optim=adamw", f"training.shard={shard}"])
    monkeypatch.setattr(memory_plan, "memory_limit", lambda device: gigabytes * 2**30)
    monkeypatch.setattr(memory_plan, "count_memory", lambda settings, device: (15 * 10**8, 4 * 10**9))
    world = SimpleNamespace(size=2, local_size=2, first=lambda call: call())
    assert memory_plan.divides_weights(settings, world, Device("cpu", "fp32")) is divided
    world.size = 1
    assert not memory_plan.divides_weights(settings, world, Device("cpu", "fp32"))


def test_a_batch_that_does_not_fit_names_one_that_does(monkeypatch, capsys):
    """In training, and in a plan for another GPU."""
    def count(settings, device, gpu_bytes):
        return 10 * MILLION, (20 + settings.training.batch_size) * MILLION

    words = ["model=nano", "data=text", "training=smoke", "training.batch_size=64"]
    settings = compose("config", [*words, f"data.path={ROOT}"])
    world, device = SimpleNamespace(size=1), Device("cpu", "bf16")
    monkeypatch.setattr(memory_plan, "count_memory", count)
    monkeypatch.setattr(memory_plan, "USABLE_MEMORY", 1.0)
    for megabytes, error, said in ((25.5, ValueError, "batch_size=64 does not fit into the 24.3 MB of this GPU: training.batch_size=5 is "),
                                   (20, torch.OutOfMemoryError, "full"), (100, torch.OutOfMemoryError, "full")):
        monkeypatch.setattr(memory_plan, "memory_limit", lambda device, megabytes=megabytes: megabytes * MILLION)
        with pytest.raises(error, match=said), memory_plan.memory_advice(settings, world, device, False):
            raise torch.OutOfMemoryError("full")
    monkeypatch.setitem(plan.GPU_GIGABYTES, "L4", 25.5 * MILLION / 2**30)
    assert plan.main(compose(plan.PlanSettings, [*words, "device=l4"])) == 0
    assert "does not fit into the 24.3 MB of L4; training.batch_size=5 does" in capsys.readouterr().out


def test_gpus_are_found_by_their_names():
    for name in [*GPUS, "H100 PCIe", "rtx 3090", "4090", "RTX4090"]:
        found = re.sub("[^a-z0-9]", "", plan.gpu_named(name).lower())
        assert found.endswith(re.sub("[^a-z0-9]", "", name.lower()))


@pytest.mark.parametrize("words, problem", [
    (["device=tpu"], "device=tpu is not known: choose one of a10, "),
    (["device=h100", "mfu=0"], "mfu=0.0 must be more than 0"),
    (["mfu=1.5"], "mfu=1.5 must be at most 1"),
    (["mfu=nan"], "mfu=nan must be more than 0 and at most 1"),
    (["model.n_layr=3"], "did you mean model.n_layer"),
    (["measure=perhaps"], "measure=perhaps is not true or false"),
])
def test_bad_settings_are_one_sentence(words, problem):
    with pytest.raises(ConfigError, match=problem):
        plan.main(compose(plan.PlanSettings, words))
