"""Configuration: what composes, and the sentences about what does not."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import yaml
from hydra import compose as hydra_compose
from hydra import initialize
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given
from hypothesis import strategies as st

import conf
from conf import composition, launch, presets, yaml_files
from conf.convert import convert
from conf.evaluation import TextConfig
from conf.help import help_lines
from conf.identity import flat
from conf.schema import ConfigError, compose
from conf.settings import SampleSettings, Settings
from data.config import DataConfig
from data.store import data_root
from model import GPTConfig
from scripts.plan import PlanSettings
from setting import FilePath, FilePaths
from training.config import OptimConfig, TrainingConfig
from training.schedule import lr_scale

pytestmark = pytest.mark.usefixtures("composed_by_hydra")

ROOT = Path(__file__).parent.parent


def complaint(*overrides: str, root: str = "config") -> str:
    with pytest.raises(ConfigError) as caught:
        compose(root, list(overrides))
    return str(caught.value)


def test_the_default_is_the_pydocs_experiment():
    settings = compose("config", [])
    assert settings == compose("config", ["experiment=pydocs"]) == conf.compose([])
    assert (settings.auto_name, settings.data.source, settings.optim.optimizer) == ("pydocs", "pydocs", "muon")
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.model.n_layer = 1


def test_gpt2_presets_are_the_published_shapes():
    shapes = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
    for preset, (n_layer, n_head, n_embd) in shapes.items():
        content = yaml_files.read_yaml(presets.CONF / "model" / f"{preset}.yaml")
        assert GPTConfig(**content) == GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)


def test_every_preset_composes(tmp_path):
    choices = {group: presets.options(group) for group in presets.groups() if group != "experiment"}
    for number in range(max(map(len, choices.values()))):
        chosen = {group: names[number % len(names)] for group, names in choices.items()}
        source = yaml_files.read_yaml(presets.CONF / "data" / f"{chosen['data']}.yaml").get("source")
        needed = {"hub": ["data.hub_name=owner/name"], "text": [f"data.path={tmp_path}"]}
        needed["chat"] = needed["bin"] = needed["text"]
        words = [f"{group}={name}" for group, name in chosen.items()]
        compose("config", [*words, "name=x", *needed.get(source, [])])


def test_modern_presets_differ_only_in_their_sizes():
    sizes = dict.fromkeys(("block_size", "n_layer", "n_head", "n_embd", "ngrams", "ngram_rows"), 1)
    for preset in ("modern-small", "modern-char-nano"):
        model = compose("config", [f"model={preset}", "name=x"]).model
        largest = compose("config", ["model=modern-124m", "name=x"]).model
        assert dataclasses.replace(model, **sizes, embedding_norm=False) == dataclasses.replace(largest, **sizes)


@pytest.mark.parametrize("experiment", presets.options("experiment"))
def test_a_preset_on_the_command_line_wins(experiment, tmp_path):
    chosen = ["model=gpt2", "optim=muon", "data=text", "training=smoke", "name=x"]
    settings = compose("config", [f"experiment={experiment}", *chosen, f"data.path={tmp_path}"])
    assert (settings.model, settings.optim) == (GPTConfig(), compose("config", []).optim)
    assert settings.data.source == "text" and settings.data.tokenizer == "bpe"


def test_a_source_can_be_chosen_without_its_preset(tmp_path):
    settings = compose("config", ["data.source=text", f"data.path={tmp_path}"])
    assert (settings.data.source, settings.auto_name) == ("text", f"pydocs-{tmp_path.name}-source=text")
    assert compose("config", ["data=text", "data.mix=pydocs:1"]).data.mix == "pydocs:1"
    assert "data.path=a is not used by data=pydocs, only by data=text, chat" in complaint("data.path=a")


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


@pytest.mark.parametrize("override", ["+model.foo=3", "++model.foo=3", "foo=3", "+foo.bar=1", "hydra.verbose=true", "model.vocab_size=7"])
def test_unknown_keys_are_refused(override):
    said = complaint(override)
    assert override.lstrip("+").split("=")[0] in said and "on the command line" in said
    assert "+" not in said.replace(override, "")  # Hydra's advice to append does not get through


@pytest.mark.parametrize(("override", "guess"), [
    ("model.n_layr=3", "model.n_layer"), ("lr=3", "optim.lr"), ("modle=gpt2", "model"), ("model=gtp2", "gpt2"),
    ("training.presicion=fp32", "training.precision"), ("optim.schedule=cosin", "cosine"),
])
def test_an_error_suggests_a_similar_name(override, guess):
    assert f"did you mean {guess}?" in complaint(override)


def assert_reported(said: str, cases: dict[str, str]) -> None:
    """Each override has a line of its own in the report."""
    first, *lines = said.split("\n  ")
    assert first == f"{len(cases)} problems in the configuration:" and len(lines) == len(cases)
    for override, words in cases.items():
        assert any(line.startswith(override.split("=")[0]) and words in line for line in lines), (override, lines)


def test_all_wrong_types_come_in_one_report():
    cases = {
        "optim.lr=abc": "is not a number", "model.n_layer=1.5": "is not a whole number", "seed=true": "is not a whole number",
        "training.max_steps=null": "is not a whole number", "training.batch_size=inf": "is not a whole number",
        "training.precision=fp8": "auto, fp32, bf16, fp16", "training.device=tpu": "auto, cpu, cuda, mps",
        "training.max_seconds=None": "is not a number, or null for none", "model.bias=maybe": "true or false",
        "training.keep_last='12x'": "is not a whole number", "model.n_head={a: 1}": "model.n_head={'a': 1} is not",
        "training.threads=" + "9" * 4000: "is too large", "optim.beta1=": "is not a number",
    }
    assert_reported(complaint(*cases), cases)
    assert max(map(len, complaint(*cases).splitlines())) < 400


def test_all_values_out_of_range_come_in_one_report():
    cases = {
        "seed=-1": "must be at least 0", "name=../up": "plain name",
        "optim.lr=-1": "optim.lr=-1.0 must be more than 0", "optim.warmup_steps=-1": "at least 0",
        "model.dropout=1.5": "less than 1", "model.n_embd=130": "n_embd=130", "model.n_kv_head=0": "must divide n_head=4",
        "model.n_head=4": "choose n_embd=132", "training.max_steps=0": "at least 1", "training.max_seconds=nan": "or null",
        "training.batch_size=" + str(2**62): "must be at most 65536", "training.threads=9999": "must be at most 1024",
        "training.patience=2": "raise eval_every", "data.path=/no/such": "not used by data=pydocs", "data.vocab_size=10": "at least 257",
        "data.val_fraction=1": "less than 1", "logger.project=": "name the W&B project",
    }
    del cases["model.n_head=4"]  # it is named in the sentence about n_embd
    assert_reported(complaint(*cases, "model.n_head=4", "training.eval_every=0"), cases)


@pytest.mark.parametrize(("override", "words"), [
    ("training.tokens_per_step=100", "training.tokens_per_step=100"), ("training.tokens_per_step=4097", "try 4096"),
    ("training.tokens_per_step=1e30", "training.tokens_per_step=1"), ("training.eval_tasks=piqa:5,piqa:9", "twice"),
    ("data=text", "data.path"), ("name=/tmp/x", "name=/tmp/x"), ("name= ", "white space"),
    ("model.n_layer=2,4", "add -m"), ("model=nano,gpt2", "add -m"), ("model=glob(*)", "add -m"), ("seed=range(1,5)", "add -m"),
    ("experiment=a.yaml,b.yaml", "add -m"), ("optim.lr=[1", "cannot be read"), ("seed=" + "9" * 5000, "seed=999"),
    ("justaword", "key=value"), ("=3", "key=value"), ("~model.n_layer", "key=value"), ("~model", "settings cannot be removed"),
    ("+model.n_layer=2", "write model.n_layer=2"), ("+model=gpt2", "model exists and can only be set: write model=gpt2"),
    ("model=nope", "Presets: "), ("model={n_layer: 3}", "no such preset"),
])
def test_a_wrong_override_is_one_short_sentence(override, words):
    said = complaint(override)
    assert words in said and "\n" not in said and len(said) < 500
    assert not any(word in said for word in ("Traceback", "hydra.cc", "full_key", "object_type"))


def test_a_run_without_its_key_is_one_sentence(tmp_path):
    (tmp_path / "first").mkdir()
    with pytest.raises(ConfigError, match=r"write run=.*first for a run"):
        compose(SampleSettings, [str(tmp_path / "first")])


def test_wrong_keys_come_in_one_report():
    assert complaint("foo=1", "bar=2", "model=baz").startswith("3 problems")


def test_sizes_of_zero_are_reported_not_divided_by():
    said = complaint("model.n_head=0", "model.block_size=0", "training.batch_size=0", "training.tokens_per_step=100")
    assert said.startswith("3 problems") and all(f"{key}=0 must be at least 1" in said for key in ("n_head", "block_size", "batch_size"))


def test_sampling_settings_are_checked_too():
    cases = {"temperature=-1": "at least 0", "top_p=1.1": "at most 1", "top_k=-1": "at least 0", "num_samples=0": "at least 1",
             "max_new_tokens=0": "at least 1", "checkpoint=first": "is not best, last or the number of a step",
             "int8=true": "needs the cache", "prompts=x": "give both"}
    assert_reported(complaint(*cases, "cache=false", root="sample"), cases)
    assert "top_p=0.0 must be more than 0" in complaint("top_p=0", root="sample")
    assert "did you mean prompt?" in complaint("promt=x", root="sample")


@pytest.mark.parametrize(("value", "hint", "wanted"), [
    ("1e3", int, 1000), (1e1, int, 10), ("7", float, 7.0), ("True", bool, True), ("null", int | None, None), (3, str, "3"),
])
def test_values_are_converted_to_the_type_of_a_setting(value, hint, wanted):
    assert convert(value, hint) == wanted and type(convert(value, hint)) is type(wanted)


@functools.cache
def compose_once(name, *words):
    return hydra_compose(name, list(words), return_hydra_config=True)


@given(text=st.text(st.characters(codec="utf-8")))
@pytest.mark.slow
def test_any_prompt_arrives_unchanged(text):
    """The prompt of a composition that Hydra makes of the other words, which are the same each time."""
    run = "./" + text.replace("$", "")  # of a reference or a shell's variable; ~ at the beginning would be the home folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composition, "hydra_compose", lambda name, words, **options: copy.deepcopy(compose_once(name, *words)))
        settings = compose("sample", [f"prompt={text}", f"stop={text}", f"run={run}"])
    assert (settings.prompt, settings.stop, settings.run) == (text, text, run)


@pytest.mark.parametrize("text", ["To be, or not to be", "{x}", "a = b", "line\nline", "  spaces ", "${oc.env:HOME}", "null", "'", '"q"',
                                  "a,b", "[1", "\\", "~", "1e3", "true", "=", "key=value", "naïve 🎉", "$(ls)", "#", "!x", "%"])
@pytest.mark.slow
def test_any_file_name_arrives_unchanged(text, tmp_path):
    path = tmp_path / text
    path.write_text("x")
    assert compose("config", ["data=text", f"data.path={path}"]).data.path == str(path)


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a ${seed} b\\${x}", "\\\\${", "${" * 3, "{\"odd\"} \\", "it's, [1"])
def test_a_prompt_is_taken_literally(text):
    made = compose("sample", [f"prompt={text}", f"stop={text}"])
    assert (made.prompt, made.stop) == (text, text)


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


def test_the_last_of_equal_overrides_counts():
    made = compose("config", ["seed=1", "model=nano", "name=a", "seed=2", "model=gpt2", "name=b", "++optim.lr=1"])
    assert (made.seed, made.model, made.name, made.optim.lr) == (2, GPTConfig(), "b", 1.0)


def test_cfg_job_prints_yaml_that_composes_to_the_same(capsys):
    assert launch.run_command(lambda settings: 99, "config", "", ["--cfg", "job", "model=nano", "seed=3"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == dataclasses.asdict(compose("config", ["model=nano", "seed=3"]))


def test_help_lists_presets_settings_and_flags(capsys):
    assert launch.run_command(lambda settings: 99, "config", "Train.", ["--help"]) == 0
    said = capsys.readouterr().out
    for words in ("Train.\n", "experiment=", "gpt2-medium", "data.path=", "model.n_layer=4 ", "optim.lr=0.01 ", "logger.wandb=disabled", "-m"):
        assert words in said
    assert max(map(len, said.splitlines())) <= 100
    assert all(line in said.splitlines() for line in help_lines(compose("config", [])))


def test_composing_changes_nothing_global(tmp_path, monkeypatch):
    """A notebook can use Hydra itself, before and after."""
    monkeypatch.chdir(tmp_path)
    store = ConfigStore.instance()
    repo = dict(store.repo)
    with initialize(version_base="1.2", config_path=None):
        mine = GlobalHydra.instance().hydra
        conf.compose(["model=nano", "seed=4711"])
        complaint("model.n_layer=0")
        assert GlobalHydra.instance().hydra is mine
        assert hydra_compose(overrides=["+a=1"]) == {"a": 1}
    assert (dict(store.repo), Path.cwd(), list(tmp_path.iterdir())) == (repo, tmp_path, [])


def test_threads_compose_one_after_the_other():
    with ThreadPoolExecutor(4) as pool:
        seeds = pool.map(lambda seed: conf.compose(["model=nano", f"seed={seed}"]).seed, range(8))
    assert list(seeds) == list(range(8))


@pytest.mark.slow
def test_settings_compose_from_another_folder_without_torch(tmp_path):
    program = ("import sys; sys.modules['torch'] = None; from conf import compose; "
               "print(compose(['training=smoke', 'model.n_layer=3']).auto_name, compose(['seed=2']).auto_name)")
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("pydocs-smoke-n_layer=3 pydocs-seed=2\n", "")


def test_the_exit_code_is_that_of_main_or_1_for_a_mistake(monkeypatch, capsys):
    def code(main, *words):
        monkeypatch.setattr("sys.argv", ["train.py", *words])
        with pytest.raises(SystemExit) as caught:
            launch.launch(main, "config", "")
        return caught.value.code

    assert code(lambda settings: 130) == 130
    assert code(lambda settings: 0, "model.foo=1") == 1
    said = capsys.readouterr()
    assert said.err.startswith("Error: model.foo") and "Traceback" not in said.err and said.out == ""


def test_operations_that_apple_gpus_lack_run_on_the_cpu(monkeypatch):
    """torch reads the variable when it is imported."""
    def imported(name):
        found.append(os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK"))
        return PlanSettings if name == "settings" else lambda settings: 0

    found = []
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK", raising=False)
    monkeypatch.setattr("sys.argv", ["x"])
    monkeypatch.setattr(launch, "imported", imported)
    with pytest.raises(SystemExit):
        launch.launch("main", "settings", "")
    assert found == ["1", "1"]


def test_a_path_that_cannot_be_opened_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sample.py"])
    with pytest.raises(SystemExit):
        launch.launch(lambda settings: Path("/no/such/file").read_text(), "sample", "")
    assert capsys.readouterr().err == "Error: /no/such/file: No such file or directory.\n"


def cuda_is_full(settings):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB")


def mistaken(settings):
    raise RuntimeError("a mistake of ours")


@pytest.mark.parametrize("main", [lambda settings: torch.empty(2**50), cuda_is_full, lambda settings: bytearray(2**60)], ids=["CPU", "GPU", "Python"])
def test_too_little_memory_is_one_sentence_with_advice(main, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py"])
    for root, advice in (("config", "a smaller training.batch_size"), ("sample", "fewer completions at once"), (PlanSettings, "ask for less")):
        with pytest.raises(SystemExit) as caught:
            launch.launch(main, root, "")
        said = capsys.readouterr().err
        assert caught.value.code == 1 and said.startswith("Error: out of memory: ") and advice in said and said.count("\n") == 1
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        launch.launch(mistaken, "config", "")


@pytest.mark.slow
def test_text_that_cannot_be_printed_stops_nothing():
    program = "from conf.launch import launch; launch(lambda settings: print('\\ud800'), 'sample', '')"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout == "\\ud800\n" and not ran.stderr


@pytest.mark.slow
def test_a_reader_that_closes_the_pipe_is_no_error():
    program = "from conf.launch import launch; launch(lambda settings: print('line\\n' * 100_000), 'sample', '')"
    ran = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert ran.stdout.readline() == "line\n"
    ran.stdout.close()
    assert ran.stderr.read() == "" and ran.wait() == 1


@pytest.fixture
def variables(monkeypatch):
    for name, value in {"NH_STEPS": "120", "NH_LR": "1e-3", "NH_YES": "true", "NH_NAME": "from-a-variable",
                        "NH_DEVICE": "cpu", "NH_NONE": "null", "NH_WRONG": "many"}.items():
        monkeypatch.setenv(name, value)


REFERENCES = {
    "training.max_steps": ("${oc.env:NH_STEPS}", 120), "optim.lr": ("${oc.env:NH_LR}", 1e-3), "model.bias": ("${oc.env:NH_YES}", True),
    "training.device": ("${oc.env:NH_DEVICE}", "cpu"), "training.keep_last": ("${oc.env:NH_ABSENT,70}", 70),
    "training.max_seconds": ("${oc.decode:${oc.env:NH_NONE}}", None), "training.eval_every": ("${training.checkpoint_every}", 130),
    "training.batch_size": ("${model.n_head}", 2), "name": ("run-${seed}-${oc.env:NH_STEPS}", "run-1337-120"),
    "runs_dir": ("${oc.env:NH_NAME}/runs", "from-a-variable/runs"), "logger.tags": ("${name}", "run-1337-120"),
}


def test_references_resolve_for_every_type(variables, tmp_path):
    (tmp_path / "own.yaml").write_text("".join(f"{key}: {value}\n" for key, (value, _) in REFERENCES.items()))
    for overrides in ([f"{key}={value}" for key, (value, _) in REFERENCES.items()], [f"experiment={tmp_path}/own.yaml"]):
        made = flat(dataclasses.asdict(compose("config", overrides)))
        assert {key: made[key] for key in REFERENCES} == {key: wanted for key, (_, wanted) in REFERENCES.items()}


def test_a_reference_to_text_of_the_command_line_gets_it(tmp_path):
    (tmp_path / "own.yaml").write_text("logger.tags: ${name}\nlogger.group: ${logger.tags}")
    made = compose("config", [f"experiment={tmp_path}/own.yaml", "name=it's, \"{odd}\" \\ $"])
    assert made.logger.group == made.logger.tags == made.name == "it's, \"{odd}\" \\ $"


@pytest.mark.parametrize(("override", "said"), [
    ("training.max_steps=${oc.env:NH_ABSENT}", "training.max_steps: the environment variable NH_ABSENT is not set"),
    ("training.max_steps=${oc.env:NH_WRONG}", "training.max_steps=many is not a whole number"),
    ("training.max_steps=${model.nope}", "training.max_steps"), ("training.max_steps=${training.max_steps}", "training.max_steps"),
    ("runs_dir=${nope", "runs_dir"), ("training.max_steps=${optim}", "training.max_steps"),
])
def test_an_unknown_reference_is_one_sentence(override, said, variables):
    message = complaint(override)
    assert said in message and "\n" not in message and "full_key" not in message


def test_a_path_may_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for path, wanted in {"~/a b": f"{tmp_path}/a b", "~": str(tmp_path), "a/~/x": "a/~/x", "~root/x": str(Path("~root/x").expanduser())}.items():
        assert convert(path, FilePath) == wanted
    assert convert("a,~/b,~", FilePaths) == f"a,{tmp_path}/b,{tmp_path}"
    assert "runs_dir=~nobody_is_so_named/x names no home folder" in complaint("runs_dir=~nobody_is_so_named/x")
    assert "name=~/a begins with ~" in complaint("name=~/a")
    assert "experiment=~nobody_is_so_named/a.yaml names no home folder" in complaint("experiment=~nobody_is_so_named/a.yaml")
    (tmp_path / "a.txt").write_text("text")
    assert compose("config", ["data=text", "data.path=~/a.txt"]).data.path == f"{tmp_path}/a.txt"
    assert compose("config", ["data.mix=~/a.txt:1"]).data.part("~/a.txt").path == f"{tmp_path}/a.txt"
    (tmp_path / "own.YAML").write_text("seed: 7\nruns_dir: ~/runs")
    made = compose("config", ["experiment=~/own.YAML"])
    assert (made.seed, made.runs_dir) == (7, f"{tmp_path}/runs")


def test_a_variable_that_no_shell_replaced_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for word in ("runs_dir=$HOME/x", "data.path=/data/$USER/*.txt", "experiment=$HOME/own.yaml", "init_from=a/$X", "data.mix='$HOME/a:1 pydocs:1'"):
        assert "which only a shell replaces: leave out the single quotes, or write ${oc.env:" in complaint(word)
    monkeypatch.setenv("NANOHYDRA_DATA", "$HOME/data")
    with pytest.raises(ValueError, match=r"NANOHYDRA_DATA=\$HOME/data has \$HOME, which only a shell replaces"):
        data_root()
    assert "runs_dir: ${HOME} is not a setting: write ${oc.env:HOME}" in complaint("runs_dir=${HOME}/x")
    # In a name, or as the name of a folder that exists, it is a character like any other.
    (tmp_path / "$HOME").mkdir()
    assert compose("config", ["runs_dir=$HOME"]).runs_dir == "$HOME" and convert("a$b", FilePath) == "a$b"


def test_every_setting_that_names_a_path_is_of_type_path():
    from bench import start
    from scripts import attention_map, export_tokenizer, prepare, report
    from sweep import search

    named = ("run", "init_from", "runs_dir", "out", "prompts", "prompt_file", "sweep", "peer", "trace", "path", "val_path", "hub_name", "tokenizer")
    for settings in (Settings, SampleSettings, attention_map.AttentionMapSettings, search.SweepSettings, start.StartSettings,
                     export_tokenizer.ExportTokenizerSettings, prepare.PrepareSettings, DataConfig, TextConfig):
        for name, hint in get_type_hints(settings).items():
            assert (hint is FilePath) == (name in named), (settings, name)
    assert get_type_hints(report.ReportSettings)["runs"] is FilePaths


@pytest.mark.parametrize("text", ["x" * 5000, "${" + "x" * 5000, "~\x00", "\x00${"])
def test_an_impossible_path_is_taken_or_one_sentence(text):
    try:
        compose("config", [f"runs_dir={text}", "name=x"])
    except ConfigError as error:
        assert "runs_dir" in str(error) and "\n" not in str(error)
    assert "write key=value" in complaint(text)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_learning_rate_that_is_never_full_is_a_warning(schedule):
    for warmup in (0, 1, 4, 5, 9, 10, 11, 50):
        optim = OptimConfig(schedule=schedule, decay_fraction=0.5, warmup_steps=warmup)
        settings = Settings(optim=optim, training=TrainingConfig(max_steps=10))
        highest = max(lr_scale(step, optim, 10) for step in range(10))
        assert len(list(settings.warnings())) == (highest < 1)


def test_a_setting_of_mup_without_mup_is_a_warning():
    words = ["model.mup_base_width=128", "model.mup_base_depth=2", "model.n_head=2"]
    assert list(compose("config", words).warnings()) == [
        "model.mup_base_width=128 needs model.parametrization=mup.", "model.mup_base_depth=2 needs model.parametrization=mup."]
    assert not list(compose("config", [*words, "model.parametrization=mup"]).warnings())
    assert not list(compose("config", []).warnings())
