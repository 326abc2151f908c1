"""Text that we did not write reaches a terminal or a log only without control characters."""

from __future__ import annotations

import ast
import io
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sample as story
import train
from conf.launch import launch
from conf.schema import compose
from generation.engine import open_checkpoint
from progress import print_line
from terminal import counted, escaped, output, readable_size, say
from training.config import LoggerConfig
from training.device import Device
from training.recorder import Recorder

ROOT = Path(__file__).parent.parent
# A window title, the clipboard, a cleared screen, an eight-bit control sequence, an overwritten
# line, reversed writing, a line separator, half of a surrogate pair, and an invisible tag.
ATTACKS = ["\x1b]0;title\x07", "\x1b]52;c;aGk=\x07", "\x1b[2J", "\x9b2J", "safe\rrm", "ab\b\b", "\u202egpj.exe",
           "\u2028", "\ud83d", "\U000e0041", "\x7f", "\x00"]
HARMLESS = ["The old house\n\tsees", "naïve café", "中文\u3000空格", "می\u200cخواهم", "👩\u200d💻", "a\u00a0b", "\ue0b0", ""]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def is_safe(text: str) -> bool:
    return all(letter in "\n\t" or unicodedata.category(letter)[0] != "C" for letter in text)


@pytest.mark.parametrize("attack", ATTACKS, ids=ascii)
def test_control_characters_are_written_out(attack):
    assert is_safe(escaped(attack)) and "\\" in escaped(attack)


@pytest.mark.parametrize("text", HARMLESS)
def test_text_of_any_language_is_left_as_it_is(text):
    assert escaped(text) == text


def test_a_name_inside_a_message_loses_its_newlines():
    assert escaped("a\nb\tc\x1b", keep="") == "a\\nb\\tc\\x1b"


@given(st.text(st.characters(codec=None), max_size=30))
def test_escaping_twice_changes_nothing_more(text):
    assert escaped(escaped(text)) == escaped(text)


def test_results_are_exact_in_a_pipe_and_escaped_on_a_terminal(capsys, monkeypatch):
    text = "".join(ATTACKS[:8])
    output(text, end="")
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys, "stdout", stream := Terminal())
    output(text, end="")
    assert stream.getvalue() == escaped(text)


def test_messages_are_escaped_everywhere(capsys):
    say("run \x1b[2J")
    say("run \x1b[2J", sys.stderr)
    assert capsys.readouterr() == ("run \\x1b[2J\n", "run \\x1b[2J\n")


@pytest.mark.parametrize("error", [ValueError("\x1b]0;x\x07 is\nwrong"), OSError(2, "gone\x1b", "\x1b]0;x\x07")], ids=type)
def test_an_error_message_is_escaped(monkeypatch, capsys, error):
    def fail(settings):
        raise error

    monkeypatch.setattr(sys, "argv", ["sample.py"])
    with pytest.raises(SystemExit):
        launch(fail, "sample", "")
    said = capsys.readouterr().err
    assert is_safe(said) and "\\x1b]0;x\\x07" in said


def test_what_a_run_says_is_escaped_in_its_log_too(tmp_path, capsys):
    with Recorder(tmp_path, 0, 1, LoggerConfig(), {"name": "x"}) as recorder:
        recorder.say("Data: \x1b[2J\ud83d")
        recorder.sample(1, "".join(ATTACKS))
    assert is_safe(capsys.readouterr().out) and is_safe((tmp_path / "log.txt").read_text())


@pytest.mark.parametrize(("number", "said"), [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (2000, "2,000 steps")])
def test_a_count_agrees_with_its_noun(number, said):
    assert counted(number, "step") == said


@pytest.mark.parametrize(("nbytes", "said"), [
    (0, "0 bytes"), (1, "1 byte"), (367, "367 bytes"), (1000, "1 KB"), (1500, "1.5 KB"), (2**20, "1 MB"), (10.2 * 2**20, "10.2 MB"), (128 * 2**30, "128 GB"),
    (1010 * 2**20, "1 GB"), (2**40, "1 TB"), (5000 * 2**40, "5,000 TB"), (99.96 * 2**20, "100 MB")])
def test_a_size_is_never_0_of_a_large_unit(nbytes, said):
    assert readable_size(nbytes) == said


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The folder of a run whose text, and so its samples, are full of control characters."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "book.txt").write_text("\x1b]0;title\x07\x9b2J\r\b\u202ea\n\t" * 800, newline="")
    train.train(compose("config", ["model=nano", "data=text", f"data.path={folder / 'book.txt'}", "data.tokenizer=char",
                                   "training=smoke", "training.precision=fp32", f"runs_dir={folder}", "name=run",
                                   "training.max_steps=5", "training.sample_tokens=0", "logger.report=false"]))
    return folder


@pytest.mark.parametrize("options", [[], ["num_samples=2"], ["logprobs=true"]], ids=str)
def test_a_model_cannot_control_the_terminal(hostile, monkeypatch, options):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    settings = compose("sample", [f"runs_dir={hostile}", "max_new_tokens=60", "temperature=2", "prompt=\x1b]", *options])
    assert story.sample(settings) == 0
    said = terminal.getvalue()
    for color in ("\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"):
        said = said.replace(color, "")  # ours
    assert "\\x1b" in said and is_safe(said)


def test_samples_in_a_pipe_are_the_exact_text(hostile, capsys):
    settings = compose("sample", [f"runs_dir={hostile}", "max_new_tokens=60", "temperature=2", "prompt=\x1b]"])
    story.sample(settings)
    said = capsys.readouterr().out
    device = Device("auto", "auto")
    engine = open_checkpoint(hostile / "run", "best", device)
    assert said == "\x1b]" + engine.complete([("\x1b]", 0)], settings)[0].text + "\n"


def test_messages_are_printed_by_say_or_output():
    """Except by the scripts that measure, which print numbers."""
    ours = [path for folder in ("conf", "data", "model", "report", "training") for path in (ROOT / folder).glob("*.py")]
    ours += [ROOT / "train.py", *(ROOT / f"scripts/{name}.py" for name in ("attention_map", "export_tokenizer", "plan", "sweep"))]
    for path in ours:
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            assert name != "print", f"{path}:{node.lineno}"


def test_a_program_without_an_output_prints_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    for call in (say, output, print_line):
        call("text")


def test_a_full_disk_behind_the_output_is_named(monkeypatch):
    def full(text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(name="<stdout>", isatty=lambda: False, write=full, flush=None))
    for call in (say, output):
        with pytest.raises(OSError) as caught:
            call("text")
        assert caught.value.filename == "<stdout>"
