"""Configuration: what composes, what is refused and in which words, and that free text arrives unchanged."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conf import launch, presets, schema
from conf.identity import flat
from conf.schema import ConfigError, compose
from model import GPTConfig
from scripts.plan import PlanSettings
from setting import FilePath


def complaint(*overrides: str, root: str = "config") -> str:
    with pytest.raises(ConfigError) as caught:
        compose(root, list(overrides))
    return str(caught.value)


def test_the_default_is_the_pydocs_experiment():
    settings = compose("config", [])
    assert settings == compose("config", ["experiment=pydocs"])
    assert (settings.auto_name, settings.data.source, settings.optim.optimizer) == ("pydocs", "pydocs", "muon")


def test_settings_are_frozen_all_the_way_down():
    settings = compose("config", [])
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.model.n_layer = 1


def test_gpt2_presets_are_the_published_shapes():
    shapes = {preset: compose("config", [f"model={preset}"]).model for preset in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
    assert shapes["gpt2"] == GPTConfig()
    assert {preset: (shape.n_layer, shape.n_head, shape.n_embd) for preset, shape in shapes.items()} == {
        "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}


@pytest.mark.parametrize("group", presets.groups())
def test_every_preset_composes(group, tmp_path):
    for preset in presets.options(group):
        compose("config", [f"{group}={preset}", f"data.path={tmp_path}", "data.hub_name=owner/name"])


@pytest.mark.parametrize("experiment", presets.options("experiment"))
def test_a_preset_on_the_command_line_wins_over_any_experiment(experiment, tmp_path):
    chosen = ["model=gpt2", "optim=muon", "data=text", "training=smoke"]
    settings = compose("config", [f"experiment={experiment}", *chosen, f"data.path={tmp_path}"])
    assert settings.model == GPTConfig()
    assert settings.optim == compose("config", ["optim=muon"]).optim
    assert settings.data.source == "text" and settings.data.tokenizer == "bpe"


def test_experiments_are_what_their_names_promise(tmp_path):
    cpu = compose("config", ["experiment=shakespeare_cpu"])
    assert (cpu.model.n_layer, cpu.model.n_head, cpu.model.n_embd, cpu.model.block_size) == (4, 4, 128, 64)
    assert (cpu.training.batch_size, cpu.training.max_steps, cpu.data.source) == (12, 2000, "shakespeare")
    gpu = compose("config", ["experiment=shakespeare_gpu"])
    assert (gpu.model.n_layer, gpu.model.n_head, gpu.model.n_embd, gpu.model.block_size) == (6, 6, 384, 256)
    assert (gpu.model.dropout, gpu.training.max_steps) == (0.2, 5000)
    gpt2 = compose("config", ["experiment=gpt2_124m", f"data.path={tmp_path}"])
    assert gpt2.model == GPTConfig() and gpt2.training.tokens_per_step == 2**19 and gpt2.data.tokenizer == "gpt2"
    assert "data.path" in complaint("experiment=gpt2_124m")


def test_a_whole_float_is_an_integer():
    assert compose("config", ["training.max_steps=1e3"]).training.max_steps == 1000
    assert "training.max_steps=1.5 is not a whole number" in complaint("training.max_steps=1.5")
    assert "is not a whole number" in complaint("training.max_steps=inf")
    assert "is not a whole number" in complaint("training.max_steps=true")


def test_a_whole_float_in_yaml_is_an_integer(extra_preset):
    extra_preset("model", "n_layer: 1e1")
    assert compose("config", ["model=extra"]).model.n_layer == 10


@pytest.fixture
def extra_preset(tmp_path, monkeypatch):
    """Write conf/GROUP/extra.yaml, in a copy of conf."""
    import shutil

    shutil.copytree(presets.CONF, tmp_path / "conf")
    monkeypatch.setattr(presets, "CONF", tmp_path / "conf")
    return lambda group, text: (tmp_path / "conf" / group / "extra.yaml").write_text(text)


def test_a_wrong_key_in_yaml_is_named_with_its_file(extra_preset):
    extra_preset("model", "n_layr: 3")
    assert complaint("model=extra") == ("model.n_layr (in conf/model/extra.yaml) is not a setting "
                                        "(did you mean model.n_layer?); --help lists the settings.")
    extra_preset("experiment", "# @package _global_\ndefaults:\n- override /model: nano\n- override /data: pydocs\n"
                               "- override /optim: muon\ntraning:\n  max_steps: 3")
    assert "traning.max_steps (in conf/experiment/extra.yaml)" in complaint("experiment=extra")


def test_yaml_that_cannot_be_read_is_one_sentence(extra_preset):
    extra_preset("model", "n_layer: [")
    said = complaint("model=extra")
    assert "extra" in said and "\n" not in said


@pytest.mark.parametrize("override", ["+model.foo=3", "++model.foo=3", "model.foo=3", "foo=3", "+foo.bar=1", "hydra.verbose=true",
                                      "model.vocab_size=7"])
def test_unknown_keys_are_refused_with_or_without_plus(override):
    said = complaint(override)
    assert override.lstrip("+").split("=")[0] in said and "on the command line" in said
    assert "+" not in said.replace(override, "")  # Hydra's advice to append does not get through


@pytest.mark.parametrize(("override", "guess"), [
    ("model.n_layr=3", "model.n_layer"), ("lr=3", "optim.lr"), ("n_head=3", "model.n_head"), ("modle=gpt2", "model"),
    ("model=gtp2", "gpt2"), ("training.presicion=fp32", "training.precision"), ("optim.schedule=cosin", "cosine"),
])
def test_the_error_says_what_was_probably_meant(override, guess):
    assert f"did you mean {guess}?" in complaint(override)


@pytest.mark.parametrize(("override", "words"), [
    ("optim.lr=-1", "optim.lr=-1.0 must be more than 0"), ("optim.lr=nan", "optim.lr=nan"), ("optim.lr=abc", "is not a number"),
    ("model.dropout=1.5", "model.dropout=1.5"), ("model.n_embd=130", "n_embd=130"), ("model.n_layer=0", "n_layer=0"),
    ("training.max_steps=0", "training.max_steps=0"), ("training.max_seconds=-5", "max_seconds=-5"),
    (f"training.batch_size={2**62}", "must be at most 65536"), ("training.threads=-1", "threads=-1"), ("training.threads=9999", "must be at most 1024"),
    ("training.precision=fp8", "auto, fp32, bf16, fp16"), ("training.device=tpu", "auto, cpu, cuda, mps"),
    ("training.tokens_per_step=100", "training.tokens_per_step=100"), ("training.tokens_per_step=4097", "try 4096"),
    ("data=text", "data.path"), ("data.path=/no/such", "data.path=/no/such does not exist"), ("data.vocab_size=10", "vocab_size=10"),
    ("data.val_fraction=1", "val_fraction=1"), ("name=../up", "name=../up"), ("name=/tmp/x", "name=/tmp/x"), ("seed=-1", "seed=-1"),
    ("seed=99999999999999999999", "seed=99999999999999999999"), ("training.max_seconds=inf", "max_seconds=inf must be"), ("training.max_seconds=nan", "max_seconds=nan must be"), ("name= ", "white space"),
    ("model.n_layer=2,4", "add -m"), ("model=nano,gpt2", "add -m"), ("optim.lr=[1", "cannot be read"), ("optim.lr=", "optim.lr="),
    ("justaword", "key=value"), ("=3", "key=value"), ("~model.n_layer", "key=value"), ("+model.n_layer=2", "write model.n_layer=2"),
    ("model=nope", "Presets: "), ("model.bias=maybe", "true or false"), ("model={n_layer: 3}", "no such preset"),
])
def test_bad_values_are_one_clear_sentence(override, words):
    said = complaint(override)
    assert words in said and "\n" not in said
    assert not any(word in said for word in ("Traceback", "hydra.cc", "full_key", "object_type"))


def test_all_problems_come_in_one_report():
    said = complaint("optim.lr=-1", "model.dropout=1.5", "model.n_embd=130", "training.max_steps=0")
    assert said.startswith("4 problems") and all(key in said for key in ("optim.lr", "model.dropout", "model.n_embd", "max_steps"))
    assert complaint("foo=1", "bar=2", "model=baz").startswith("3 problems")


@pytest.mark.parametrize("override", ["temperature=-1", "top_p=0", "top_p=1.1", "top_k=-1", "num_samples=0", "max_new_tokens=0",
                                      "promt=x", "checkpoint=first"])
def test_sampling_settings_are_checked_too(override):
    assert override.split("=")[0] in complaint(override, root="sample")


@given(text=st.text(st.characters(codec="utf-8")))
@pytest.mark.slow
def test_any_prompt_arrives_unchanged(text):
    run = "./" + text.replace("${", "")  # which would be a reference; ~ at the beginning would be the home folder
    settings = compose("sample", [f"prompt={text}", f"stop={text}", f"run={run}"])
    assert (settings.prompt, settings.stop, settings.run) == (text, text, run)


@pytest.mark.parametrize("text", ["To be, or not to be", "{x}", "a = b", "line\nline", "  spaces ", "${oc.env:HOME}", "null", "'", '"q"',
                                  "a,b", "[1", "\\", "~", "1e3", "true", "=", "key=value", "naïve 🎉", "$(ls)", "#", "!x", "%"])
@pytest.mark.slow
def test_any_file_name_arrives_unchanged(text, tmp_path):
    path = tmp_path / text
    path.write_text("x")
    assert compose("config", ["data=text", f"data.path={path}"]).data.path == str(path)


@pytest.mark.slow
def test_names_tell_runs_apart(tmp_path):
    def name(*overrides):
        settings = compose("config", list(overrides))
        return settings.name or settings.auto_name

    book = tmp_path / "book.txt"
    book.write_text("x")
    assert name("training.max_steps=7", "logger.wandb=offline", "training.eval_every=3") == "pydocs"
    assert name("model.n_layer=6", "optim.lr=1e-4") == "pydocs-n_layer=6-lr=0.0001"
    assert name("model=nano") == "pydocs-nano"
    assert name("data=text", f"data.path={book}") == "text-book"
    assert name("experiment=shakespeare_cpu", "seed=2") == "shakespeare_cpu-seed=2"
    assert name("name=mine", "seed=2") == "mine"


def test_cfg_job_prints_yaml_that_composes_to_the_same(capsys):
    assert launch.run_command(lambda settings: 99, "config", "", ["--cfg", "job", "model=nano", "seed=3"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == dataclasses.asdict(compose("config", ["model=nano", "seed=3"]))


def test_help_lists_groups_and_common_overrides(capsys):
    import train

    assert launch.run_command(lambda settings: 99, "config", train.__doc__, ["--help"]) == 0
    said = capsys.readouterr().out
    for word in ("experiment=", "gpt2-medium", "data.path=", "optim.lr=", "training.max_steps=", "logger.wandb=", "-m"):
        assert word in said


def test_composing_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compose("config", ["model=nano"])
    complaint("model.foo=1")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_flag_is_refused():
    with pytest.raises(ValueError, match="--verbose: no such flag"):
        launch.run_command(lambda settings: 0, "config", "", ["--verbose"])


def test_the_exit_code_is_the_storys_and_1_for_a_mistake(monkeypatch, capsys):
    def code(story, *words):
        monkeypatch.setattr("sys.argv", ["train.py", *words])
        with pytest.raises(SystemExit) as caught:
            launch.launch(story, "config", "")
        return caught.value.code

    assert code(lambda settings: 130) == 130
    assert code(lambda settings: 0, "model.foo=1") == 1
    said = capsys.readouterr()
    assert said.err.startswith("Error: model.foo") and "Traceback" not in said.err and said.out == ""


def test_a_path_that_cannot_be_opened_is_one_plain_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sample.py"])
    with pytest.raises(SystemExit):
        launch.launch(lambda settings: Path("/no/such/file").read_text(), "sample", "")
    assert capsys.readouterr().err == "Error: /no/such/file: No such file or directory.\n"


def cuda_is_full(settings):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB")


@pytest.mark.parametrize("story", [lambda settings: torch.empty(2**50), cuda_is_full, lambda settings: bytearray(2**60)], ids=["CPU", "GPU", "Python"])
def test_too_little_memory_is_one_sentence_that_says_what_to_lower(story, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py"])
    for root, advice in (("config", "a smaller training.batch_size"), ("sample", "fewer completions at once"), (PlanSettings, "ask for less")):
        with pytest.raises(SystemExit) as caught:
            launch.launch(story, root, "")
        said = capsys.readouterr().err
        assert caught.value.code == 1 and said.startswith("Error: out of memory: ") and advice in said and said.count("\n") == 1
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        launch.launch(mistaken, "config", "")


def mistaken(settings):
    raise RuntimeError("a mistake of ours")


@pytest.mark.slow
def test_what_cannot_be_printed_stops_nothing():
    program = "from conf.launch import launch; launch(lambda settings: print('\\ud800'), 'sample', '')"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert ran.stdout == "\\ud800\n" and not ran.stderr


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error():
    program = "from conf.launch import launch; launch(lambda settings: print('line\\n' * 100_000), 'sample', '')"
    ran = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    assert ran.stdout.readline() == "line\n"
    ran.stdout.close()
    assert ran.stderr.read() == "" and ran.wait() == 1


@pytest.fixture
def variables(monkeypatch):
    for name, value in {"NH_STEPS": "120", "NH_LR": "1e-3", "NH_YES": "true", "NH_NAME": "from-a-variable",
                        "NH_DEVICE": "cpu", "NH_NONE": "null", "NH_WRONG": "many"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("key", "value", "wanted"), [
    ("training.max_steps", "${oc.env:NH_STEPS}", 120), ("optim.lr", "${oc.env:NH_LR}", 1e-3), ("model.bias", "${oc.env:NH_YES}", True),
    ("name", "${oc.env:NH_NAME}", "from-a-variable"), ("training.device", "${oc.env:NH_DEVICE}", "cpu"),
    ("training.max_seconds", "${oc.env:NH_STEPS}", 120.0), ("training.max_seconds", "${oc.decode:${oc.env:NH_NONE}}", None),
    ("training.max_steps", "${oc.env:NH_ABSENT,70}", 70), ("training.max_steps", "${training.eval_every}", 130),
    ("training.batch_size", "${model.n_head}", 2), ("name", "run-${seed}-${oc.env:NH_STEPS}", "run-1337-120"),
    ("runs_dir", "${oc.env:NH_NAME}/runs", "from-a-variable/runs"), ("logger.tags", "${name}", "first"),
])
def test_references_resolve_for_every_type(key, value, wanted, variables, tmp_path):
    def found(settings):
        return flat(dataclasses.asdict(settings))[key]

    first = [] if key == "name" else ["name=first"]
    assert found(compose("config", [*first, f"{key}={value}"])) == wanted
    (tmp_path / "own.yaml").write_text(f"{key}: {value}")
    assert found(compose("config", [*first, f"experiment={tmp_path}/own.yaml"])) == wanted


def test_a_reference_to_text_of_the_command_line_gets_it(tmp_path):
    (tmp_path / "own.yaml").write_text("logger.tags: ${name}\nlogger.group: ${logger.tags}")
    made = compose("config", [f"experiment={tmp_path}/own.yaml", "name=it's, \"{odd}\" \\ ${"[:-2] + "$"])
    assert made.logger.group == made.logger.tags == made.name == "it's, \"{odd}\" \\ $"


@pytest.mark.parametrize(("override", "said"), [
    ("training.max_steps=${oc.env:NH_ABSENT}", "training.max_steps: the environment variable NH_ABSENT is not set"),
    ("name=${oc.env:NH_ABSENT}", "name: the environment variable NH_ABSENT is not set"),
    ("training.max_steps=${oc.env:NH_WRONG}", "training.max_steps=many is not a whole number"),
    ("training.max_steps=${model.nope}", "training.max_steps"), ("training.max_steps=${training.max_steps}", "training.max_steps"),
    ("runs_dir=${nope", "runs_dir"), ("runs_dir=${nope:1}", "runs_dir"), ("training.max_steps=${optim}", "training.max_steps"),
    ("training.max_steps='12x'", "is not a whole number"), ("model.bias='maybe'", "is not true or false"),
])
def test_a_reference_to_nothing_is_one_sentence(override, said, variables):
    message = complaint(override)
    assert said in message and "\n" not in message and "full_key" not in message


def test_content_keeps_what_looks_like_a_reference():
    made = compose("sample", ["prompt=${oc.env:HOME}", "stop=${seed}"])
    assert (made.prompt, made.stop) == ("${oc.env:HOME}", "${seed}")


@pytest.mark.parametrize(("root", "key"), [
    ("config", "runs_dir"), ("sample", "run"), ("sample", "runs_dir"), ("sample", "prompt_file"), ("sample", "out"),
])
def test_a_path_may_begin_at_home(root, key, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))

    def found(value):
        return getattr(compose(root, [f"{key}={value}", *(["prompts=x"] if key == "out" else [])]), key)

    assert found("~/a b") == f"{tmp_path}/a b" and found("~") == str(tmp_path)
    assert found("~root/x") == str(Path("~root/x").expanduser())
    assert found("a/~/x") == "a/~/x"
    assert f"{key}=~nobody_is_so_named/x names no home folder" in complaint(f"{key}=~nobody_is_so_named/x", root=root)


def test_every_setting_that_names_a_path_is_one_of_type_path():
    from typing import get_type_hints

    from bench import start
    from scripts import attention_map, export_tokenizer, prepare, report
    from sweep import search

    named = ("run", "runs_dir", "out", "prompts", "prompt_file", "sweep", "peer", "trace")
    for settings in (schema.Settings, schema.SampleSettings, attention_map.AttentionMapSettings, search.SweepSettings,
                     start.StartSettings, export_tokenizer.ExportTokenizerSettings,
                     prepare.PrepareSettings, report.ReportSettings):
        for name, hint in get_type_hints(settings).items():
            assert (hint is FilePath) == (name in named), (settings, name)


def test_each_of_several_paths_may_begin_at_home(monkeypatch, tmp_path):
    from scripts.report import ReportSettings

    monkeypatch.setenv("HOME", str(tmp_path))
    assert compose(ReportSettings, ["runs=a,~/b,~"]).runs == f"a,{tmp_path}/b,{tmp_path}"


def test_an_experiment_may_lie_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("seed: 7\nruns_dir: ~/runs")
    made = compose("config", ["experiment=~/own.yaml"])
    assert (made.seed, made.runs_dir) == (7, f"{tmp_path}/runs")


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 4, 5, 9, 10, 11, 50])
def test_a_rate_that_is_never_full_is_warned_about(schedule, warmup):
    from training.schedule import lr_scale

    settings = compose("config", [f"optim.schedule={schedule}", "optim.decay_fraction=0.5", f"optim.warmup_steps={warmup}",
                                  "training.max_steps=10"])
    highest = max(lr_scale(step, settings.optim, 10) for step in range(10))
    assert len(list(settings.warnings())) == (highest < 1)


@pytest.mark.parametrize(("override", "said"), [
    ("+model=gpt2", "model exists and can only be set: write model=gpt2"), ("~model", "settings cannot be removed"),
    ("training.max_steps=null", "training.max_steps=null is not a whole number"), ("seed=true", "seed=true is not a whole number"),
    ("training.max_seconds=None", "is not a number, or null for none"), ("experiment=a.yaml,b.yaml", "add -m"),
    ("training.max_steps=" + "9" * 5000, "training.max_steps=999"), ("seed=" + "9" * 4000, "seed=999"), ("model.n_layer={a: 1}", "model.n_layer={'a': 1} is not"),
    ("model=glob(*)", "add -m"), ("seed=range(1,5)", "add -m"), ("seed=choice(1,2)", "add -m"),
])
def test_habits_of_hydra_and_python_are_one_short_sentence(override, said):
    message = complaint(override)
    assert said in message and "\n" not in message and len(message) < 500


def test_the_last_of_equal_overrides_counts():
    made = compose("config", ["seed=1", "model=nano", "name=a", "seed=2", "model=gpt2", "name=b", "++optim.lr=1"])
    assert (made.seed, made.model, made.name, made.optim.lr) == (2, GPTConfig(), "b", 1.0)


@pytest.mark.parametrize("text", ["x" * 5000, "${" + "x" * 5000, "~" + "x" * 5000, "~\x00", "\x00${", "${seed}" + "/y" * 4000])
def test_a_path_that_no_system_has_is_one_sentence_or_taken(text):
    try:
        compose("config", [f"runs_dir={text}", "name=x"])
    except ConfigError as error:
        assert "runs_dir" in str(error) and "\n" not in str(error)
    assert "write key=value" in complaint(text)
