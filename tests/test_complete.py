"""Files of prompts: each line is completed, and an interrupted file is continued."""

from __future__ import annotations

import errno
import io
import json
import os
from os import mkfifo
from pathlib import Path

import pytest
import torch

import locks
import sample
from conf.schema import ConfigError, compose
from generation import engine as engines
from generation import kernels
from generation.engine import Engine, open_checkpoint
from generation.prompts import read_text
from training.device import Device

PROMPTS = ["The", "", "Every old house\r", "A", "No", "The"]


@pytest.fixture
def fill(tiny_runs, tmp_path, capsys):
    """The lines that `prompts=... out=...` writes, where `out` has this content before."""
    def run(prompts: list[str], *overrides: str, content: str = "") -> list[dict]:
        (tmp_path / "prompts.txt").write_text("\n".join(prompts), newline="")
        out = tmp_path / "out.jsonl"
        out.write_text(content) if content else out.unlink(missing_ok=True)
        base = [f"runs_dir={tiny_runs}", "precision=fp32", "max_new_tokens=20", f"prompts={tmp_path / 'prompts.txt'}", f"out={out}"]
        assert sample.sample(compose("sample", [*base, *overrides])) == 0
        return [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    return run


@pytest.fixture
def batches(monkeypatch):
    """The size of each batch that is completed."""
    sizes, complete = [], Engine.complete
    monkeypatch.setattr(Engine, "complete", lambda engine, jobs, *rest, **more: sizes.append(len(jobs)) or complete(engine, jobs, *rest, **more))
    return sizes


# Completing


def test_each_prompt_is_completed_as_if_alone(fill, tiny_runs, capsys):
    lines = fill(PROMPTS, "num_samples=2", "batch_size=3")
    assert [(line["prompt"], line["sample"]) for line in lines] == [
        (prompt, number) for prompt in ("The", "Every old house", "A", "No", "The") for number in (0, 1)]
    capsys.readouterr()
    for first, second in zip(lines[:6:2], lines[1:6:2], strict=True):
        sample.sample(compose("sample", [f"runs_dir={tiny_runs}", "precision=fp32", f"prompt={first['prompt']}", "num_samples=2", "max_new_tokens=20"]))
        assert capsys.readouterr().out == "".join(f"--- {n} of 2\n{line['prompt']}{line['text']}\n" for n, line in ((1, first), (2, second)))


def test_finished_sequences_leave_their_batch(fill, monkeypatch):
    sizes, generate = [], engines.generate

    def counted(*arguments, **rules):
        for step in generate(*arguments, **rules):
            sizes.append(len(step[0]))
            yield step

    monkeypatch.setattr(engines, "generate", counted)
    together = fill(PROMPTS, "stop=e", "batch_size=8")
    assert sizes[0] == 5 > sizes[-1] and sum(sizes) == sum(line["tokens"] for line in together)
    alone = fill(PROMPTS, "stop=e", "batch_size=1")
    assert [(one["text"], one["tokens"]) for one in alone] == [(one["text"], one["tokens"]) for one in together]


def test_a_line_has_tokens_log_probability_and_reason(fill, tiny_runs):
    free = fill(["The quiet"], "temperature=0")[0]
    assert (free["tokens"], free["finish_reason"]) == (20, "length")
    engine = open_checkpoint(tiny_runs / "tiny", "best", Device("cpu", "fp32"))
    drawn = engine.encode(free["text"])
    window = torch.tensor([[*engine.encode("The quiet"), *drawn][-33:-1]])
    logprobs = engine.model(window)[0, -20:].log_softmax(-1).gather(1, torch.tensor(drawn)[:, None])
    assert free["mean_logprob"] == pytest.approx(logprobs.mean().item(), abs=1e-4)
    stop = free["text"][5:7]
    stopped = fill(["The quiet"], "temperature=0", f"stop={stop}")[0]
    assert stopped["finish_reason"] == "stop" and stopped["text"] == free["text"][: free["text"].index(stop)]
    assert stopped["tokens"] == free["text"].index(stop) + 2


@pytest.mark.skipif(not kernels.available(), reason=f"no kernels here: {kernels.library()}")
@pytest.mark.parametrize("bits", ["precision=bf16", "int8=true"])
def test_with_few_bits_a_prompt_is_completed_as_if_alone(fill, bits):
    alone = [fill([prompt], bits, "temperature=1.5")[0]["text"] for prompt in ("The", "Every old house", "A")]
    assert [line["text"] for line in fill(["The", "Every old house", "A"], bits, "temperature=1.5")] == alone


def test_the_folder_of_the_file_is_made(tiny_runs, tmp_path):
    (tmp_path / "prompts.txt").write_text("The")
    out = tmp_path / "new" / "folder" / "a.jsonl"
    sample.sample(compose("sample", [f"runs_dir={tiny_runs}", "max_new_tokens=2", f"prompts={tmp_path / 'prompts.txt'}", f"out={out}"]))
    assert len(out.read_text().splitlines()) == 1


def test_only_line_feeds_separate_prompts(fill, monkeypatch):
    monkeypatch.setattr(engines.Tokenizer, "encode", lambda tokenizer, text: [0])
    lines = fill(["\ufeffa\rb\r", "c\u2028d", "\x85e"])  # a byte order mark is no part of the first
    assert [line["prompt"] for line in lines] == ["a\rb", "c\u2028d", "\x85e"]


# Continuing


def test_a_killed_file_is_continued_by_whole_batches(fill, tmp_path, batches):
    """Since with some kernels the last digits of a row depend on the others."""
    prompts, rules = ["The", "Every old house", "A", "No", "The quiet"], ["batch_size=3", "temperature=1.5"]
    whole = fill(prompts, *rules)
    lines = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    for kept in range(5):
        batches.clear()
        assert fill(prompts, *rules, content="".join(lines[:kept]) + lines[kept][:20]) == whole
        assert batches == ([3, 2] if kept < 3 else [2])
    batches.clear()
    assert fill(prompts, *rules, content="".join(lines)) == whole and batches == []


def test_another_batch_size_continues_only_in_fp32(fill, tmp_path):
    def continue_with_one(*rules):
        fill(["The", "No"], "batch_size=2", *rules)
        content = (tmp_path / "out.jsonl").read_text()
        return fill(["The", "No"], "batch_size=1", *rules, content=content[: content.index("\n") + 1])

    assert len(continue_with_one()) == 2
    with pytest.raises(ValueError, match="is from another model or other settings"):
        continue_with_one("precision=bf16")


@pytest.mark.parametrize(("prompts", "override", "problem"), [
    (["The", "A"], "seed=1337", "line 2 is no completion of the prompt 'A'"), (["The", "No"], "temperature=0.5", "line 1 is from another model or other settings"),
    (["The"], "seed=1337", "has 2 lines, more than the 1 completion"), (["The", "café"], "seed=1337", "no character")])
def test_completions_of_other_prompts_are_not_changed(fill, tmp_path, prompts, override, problem):
    fill(["The", "No"])
    content = (tmp_path / "out.jsonl").read_text()
    with pytest.raises(ValueError, match=problem):
        fill(prompts, override, content=content)
    assert (tmp_path / "out.jsonl").read_text() == content


def test_a_cut_line_more_than_asked_for_is_not_changed(fill, tmp_path):
    fill(["The", "No"])
    content = (tmp_path / "out.jsonl").read_text()[:-30]
    with pytest.raises(ValueError, match="has 2 lines, more than the 1 completion"):
        fill(["The"], content=content)
    assert (tmp_path / "out.jsonl").read_text() == content


@pytest.mark.parametrize("content", ["my notes\n", "my notes", "1\n", "[]\n", "[" * 100_000 + "\n", '{"prompt": "No', '{"prompt": "The", "answer": "one"}'],
                         ids=lambda content: content[:12])
def test_a_file_of_something_else_is_not_changed(fill, tmp_path, content):
    """Also one whose last line has no end, and is not the beginning of one of ours."""
    with pytest.raises(ValueError, match="line 1 is no completion of the prompt 'The'"):
        fill(["The"], content=content)
    assert (tmp_path / "out.jsonl").read_text() == content


def test_the_file_of_prompts_is_not_overwritten(fill, tmp_path):
    with pytest.raises(ValueError, match="line 1 is no completion of the prompt 'The'"):
        fill(["The"], f"out={tmp_path / 'prompts.txt'}")
    assert (tmp_path / "prompts.txt").read_text() == "The"


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("real.jsonl"), mkfifo], ids=["folder", "link", "pipe"])
def test_completions_go_to_regular_files_only(fill, tmp_path, make):
    make(tmp_path / "there")
    with pytest.raises(ValueError, match=r"out=.*there is not a regular file: choose another"):
        fill(["The"], f"out={tmp_path / 'there'}")


def test_a_file_that_another_process_writes_is_refused(fill, tmp_path):
    fill(["The"])
    content = (tmp_path / "out.jsonl").read_text()
    with locks.exclusive_lock(tmp_path / "out.jsonl"):
        with pytest.raises(BlockingIOError, match=r"^[^\[]*out.jsonl is being written by another process: wait for it, or use another file.$"):
            fill(["The", "No"], content=content[:-30])
        assert (tmp_path / "out.jsonl").read_text() == content[:-30]
    assert len(fill(["The", "No"], content=content[:-30])) == 2


def test_an_interruption_releases_the_file(fill, monkeypatch):
    def interrupt(*arguments, **rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "complete", interrupt)
        fill(["The"])
    assert len(fill(["The"])) == 1


def test_a_file_system_without_locks_is_written_to(fill, monkeypatch):
    def flock(handle, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    assert len(fill(["The"])) == 1


# Reading


@pytest.mark.parametrize("prompts", [[""], ["", "\r", ""]])
def test_a_file_without_prompts_is_an_error(fill, tmp_path, prompts):
    with pytest.raises(ValueError, match=r"prompts.txt holds no prompts: write one per line"):
        fill(prompts)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("place", ["file", "-", "pipe"])
def test_a_prompt_keeps_its_line_endings(place, tmp_path, monkeypatch):
    text = "a\rb\r\nc\n\x0b\x85\u2028d\n\r"
    (tmp_path / "file").write_text(text, newline="")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    if place == "pipe":
        reader, writer = os.pipe()
        os.write(writer, text.encode())
        os.close(writer)
        place = f"/dev/fd/{reader}"
    monkeypatch.chdir(tmp_path)
    assert read_text("prompt_file", place) == text


@pytest.mark.parametrize(("name", "problem"), [
    ("/dev/zero", "prompts=/dev/zero holds more than 16 MB: choose a smaller file"), ("large", "holds more than 16 MB"),
    ("folder", "is a folder: name a file"), ("pipe", "is a pipe that nothing was written to"),
    ("latin", "is not UTF-8 at offset 3"), ("none", "No such file")])
def test_what_is_no_file_of_prompts_is_refused(name, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    mkfifo("pipe")
    Path("latin").write_bytes("café".encode("latin-1"))
    with open("large", "wb") as file:
        file.truncate(2**40)
    with pytest.raises((ValueError, OSError), match=problem):
        read_text("prompts", name)


def test_endless_standard_input_is_refused(monkeypatch):
    with open("/dev/zero") as stream:
        monkeypatch.setattr("sys.stdin", stream)
        with pytest.raises(ValueError, match="prompt_file=- holds more than 16 MB"):
            read_text("prompt_file", "-")


@pytest.mark.parametrize(("words", "problem"), [
    (["prompts=a.txt"], "belong together"), (["out=a.jsonl"], "belong together"), (["batch_size=0"], "at least 1"),
    (["prompts=a.txt", "out=b", "prompt=The"], "exclude each other"), (["prompts=a.txt", "out=b", "logprobs=true"], "prints")])
def test_settings_that_exclude_each_other_are_refused(words, problem):
    with pytest.raises(ConfigError, match=problem):
        compose("sample", words)
