"""sample.py: prompts in, completions out."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from terminal_input import type_into

import sample as story
from conf.schema import ConfigError, compose
from generation import kernels

ROOT = Path(__file__).parent.parent
needs_kernels = pytest.mark.skipif(not kernels.available(), reason=f"no kernels here: {kernels.library()}")


@pytest.fixture
def run(tiny_runs, capsys):
    """What `python sample.py` prints for these overrides: standard output and standard error."""
    def sample(*overrides):
        capsys.readouterr()
        assert story.sample(compose("sample", [f"runs_dir={tiny_runs}", "precision=fp32", "max_new_tokens=40", *overrides])) == 0
        return capsys.readouterr()
    return sample


@pytest.fixture
def say(run):
    """What `python sample.py` prints on standard output."""
    return lambda *overrides: run(*overrides).out


@pytest.fixture
def no_kernels(monkeypatch):
    missing = OSError("There is no C compiler here (gcc): install gcc.")
    monkeypatch.setattr(kernels, "library", lambda: missing)


def test_the_same_seed_gives_the_same_text_and_another_another(say):
    assert say("prompt=The", "seed=1") == say("prompt=The", "seed=1") != say("prompt=The", "seed=2")


def test_the_prompt_precedes_max_new_tokens_tokens(say):
    said = say("prompt=The quiet", "temperature=0", "max_new_tokens=25")
    assert said.startswith("The quiet") and len(said) == len("The quiet") + 25 + 1


def test_text_is_the_same_without_a_cache_past_the_context(say):
    words = "prompt=A", "temperature=0", "max_new_tokens=100"
    assert say(*words) == say(*words, "cache=false")


def test_a_run_is_found_by_name_by_path_and_as_the_last(say, tiny_runs):
    assert say() == say("run=tiny") == say(f"run={tiny_runs / 'tiny'}")


def test_a_missing_run_is_an_error_with_the_existing_ones(say, tmp_path):
    with pytest.raises(ValueError, match=r"run=nope .*tiny"):
        say("run=nope")
    with pytest.raises(ValueError, match="has no run with a checkpoint"):
        say(f"runs_dir={tmp_path}")


@pytest.mark.parametrize("which", ["besst", "-1", "1.5", "", "9" * 5000, "../x", "step_00000060"])
def test_a_checkpoint_is_best_last_or_a_step(which):
    with pytest.raises(ConfigError, match="is not best, last or the number of a step"):
        compose("sample", [f"checkpoint={which}"])


def test_several_completions_are_printed_whole(say):
    parts = say("prompt=The", "num_samples=3").split("--- ")[1:]
    assert [part.split("\n")[0] for part in parts] == ["1 of 3", "2 of 3", "3 of 3"]
    assert all(part.split("\n", 1)[1].startswith("The") for part in parts) and len(set(parts)) == 3


def test_no_part_of_stop_is_printed(say):
    free = say("prompt=The", "temperature=0", "max_new_tokens=60")
    stop = free[12:15]
    assert say("prompt=The", "temperature=0", "max_new_tokens=60", f"stop={stop}") == free[: free.index(stop, 3)] + "\n"


def test_a_prompt_comes_from_a_file_or_standard_input(say, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("Every old")
    direct = say("prompt=Every old")
    assert say(f"prompt_file={tmp_path / 'prompt.txt'}") == direct
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Every old")))
    assert say("prompt_file=-") == direct


def test_nothing_is_printed_for_an_unknown_character(say, capsys):
    with pytest.raises(ValueError, match="no character 'c', 'é'"):
        say("prompt=café")
    assert capsys.readouterr().out == ""


def test_interactive_answers_each_line_of_the_input(say, monkeypatch):
    lines = iter(["The", "A §", "No"])  # a prompt with an unknown character does not end it
    asked = []

    def answer(prompt):
        asked.append(prompt)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    said = say("interactive=true")
    assert "The" in said and "'§'" in said and "No" in said and len(asked) == 4


@pytest.mark.slow
def test_interactive_in_a_terminal(tiny_runs):
    """A line that is not UTF-8 is refused and the next one answered; Ctrl-C ends it without a traceback."""
    words = ["sample.py", f"runs_dir={tiny_runs}", "interactive=true", "max_new_tokens=5", "temperature=0"]
    # The up arrow calls up the line before.
    said, code = type_into(words, b"prompt> ", [b"\xff\n", b"The\n", b"/settings top_k=7\n", b"\x1b[A\x1b[A\n", b"\x03"])
    assert code == 130
    assert b"Traceback" not in said and b"'\\udcff'" in said and said.count(b"\nprompt> ") == 5
    completed = re.findall(rb"\nThe[^\r\n]+", said)
    assert b"top_k=7" in said and len(completed) == 2 and completed[0] == completed[1]


@pytest.mark.slow
def test_sampling_and_resuming_do_not_import_torchs_compiler(tiny_runs):
    """It takes a second, before the first token."""
    code = ("import sys; from conf.schema import compose; import sample; from checkpointing.resume import max_file_bytes; "
            "from model import GPTConfig; max_file_bytes(GPTConfig()); "  # as resuming a run calls it
            f"sample.sample(compose('sample', ['runs_dir={tiny_runs}', 'max_new_tokens=3'])); print('torch._dynamo' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stdout + done.stderr


@pytest.mark.parametrize(("setting", "more"), [("num_samples", []), ("batch_size", ["prompts=p.txt", "out=out.jsonl"])])
def test_more_at_once_than_memory_holds_is_refused(setting, more, say, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("The")
    with pytest.raises(ValueError, match=rf"{setting}=1000000000 completions at once take [\d.]+ TB of memory, [\d.]+ \w+ are free: choose a smaller {setting}"):
        say(f"{setting}=1000000000", *more)
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]


# Kernels and precision


def test_without_a_compiler_completions_are_the_same(run, request):
    told = run("prompt=The").out
    request.getfixturevalue("no_kernels")
    found = run("prompt=The")
    assert found.out == told
    assert "takes two to four times as long" in found.err and "install gcc" in found.err


def test_int8_without_a_compiler_names_one_to_install(say, no_kernels):
    with pytest.raises(ValueError, match=r"int8=true is not supported: .*install gcc"):
        say("prompt=The", "int8=true")


@pytest.mark.parametrize("words", [["cache=false"], []])
@pytest.mark.parametrize("native", ["0", "1"])
def test_fp32_instead_of_an_emulated_format_is_a_warning(run, words, native, no_kernels, monkeypatch):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    warning = "precision=bf16 is not native to this processor: computing in fp32."
    assert (warning in run("precision=bf16", *words).err) == (native == "0")


@needs_kernels
@pytest.mark.parametrize("native", ["0", "1"])
def test_kernels_for_bf16_need_no_warning(run, native, monkeypatch):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    assert not run("precision=bf16").err


# Probabilities


def test_probabilities_are_listed_token_by_token(say):
    plain = say("prompt=The", "temperature=0", "logprobs=true", "max_new_tokens=30")
    free = say("prompt=The", "temperature=0", "max_new_tokens=30")
    rows = [re.fullmatch(r" *([\d.]+)%  ('.+')", line) for line in plain.splitlines()[1:]]
    assert plain.startswith("The\n") and "The" + "".join(ast.literal_eval(row[2]) for row in rows) + "\n" == free
    assert all(100 / 28 <= float(row[1]) <= 100 for row in rows)  # the most likely of 28


def test_probabilities_are_colored_on_a_terminal(say, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    ranges = {"31": (0, 10), "33": (10, 50), "32": (50, 100)}
    said = say("prompt=The", "temperature=2.0", "top_k=0", "top_p=1", "logprobs=true", "num_samples=4")
    found = re.findall(r"\x1b\[(\d+)m *([\d.]+)%.*\x1b\[0m", said)
    assert {color for color, _ in found} == set(ranges) and len(found) == 160
    assert all(ranges[color][0] - 0.01 <= float(p) <= ranges[color][1] + 0.01 for color, p in found)
