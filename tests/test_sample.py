"""Sampling from a run: prompts in, completions out."""

from __future__ import annotations

import ast
import errno
import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys
import termios
from contextlib import suppress
from dataclasses import replace
from os import mkfifo
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import reseal

import locks
import sample as story
import train
from checkpointing import checkpoint, store
from conf.schema import ConfigError, compose
from data.tokenizer import fingerprint, from_json
from generation import engine as engines
from generation import kernels
from generation.decoder import Decoder
from generation.engine import Completion, Engine, open_checkpoint
from generation.prompts import read_text
from model import GPT, Undrawn
from training.device import Device

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def runs_dir(book, tmp_path_factory):
    """A folder with one finished run, `tiny`, by characters."""
    folder = tmp_path_factory.mktemp("runs")
    train.train(compose("config", ["model=nano", "data=text", f"data.path={book}", "data.tokenizer=char", "training=smoke",
                                   "training.max_steps=60", "training.precision=fp32", f"runs_dir={folder}", "name=tiny",
                                   "optim.lr=1e-2", "training.eval_every=20", "training.checkpoint_every=20"]))
    return folder


@pytest.fixture
def say(runs_dir, capsys):
    """What `python sample.py` prints for these overrides."""
    def run(*overrides):
        capsys.readouterr()
        base = [f"runs_dir={runs_dir}", "precision=fp32", "max_new_tokens=40"]
        assert story.sample(compose("sample", [*base, *overrides])) == 0
        return capsys.readouterr().out
    return run


def test_the_same_seed_gives_the_same_text_and_another_another(say):
    assert say("prompt=The", "seed=1") == say("prompt=The", "seed=1") != say("prompt=The", "seed=2")


def test_a_tokenizer_that_the_model_was_not_trained_with_is_refused_with_both_names(runs_dir, tmp_path):
    """Although the vocabularies are of one size, and all checksums agree."""
    shutil.copytree(runs_dir / "tiny", tmp_path / "tiny")
    for one in store.list_checkpoints(tmp_path / "tiny" / "checkpoints"):
        saved = json.loads((one.folder / "tokenizer.json").read_text())
        other = saved | {"characters": saved["characters"].replace("a", "!")}
        other["characters"] = "".join(sorted(other["characters"]))
        (one.folder / "tokenizer.json").write_text(json.dumps(other))
        reseal(one.folder)
        names = fingerprint(from_json(other, ""))[:12], fingerprint(from_json(saved, ""))[:12]
    with pytest.raises(ValueError, match=r"tokenizer.json \(fingerprint {}\) is not the tokenizer .*\(fingerprint {}\)".format(*names)):
        open_checkpoint(tmp_path / "tiny", "last", Device("cpu", "fp32"))


def test_a_run_older_than_the_note_of_its_tokenizer_is_sampled_as_it_is(runs_dir, tmp_path):
    shutil.copytree(runs_dir / "tiny", tmp_path / "tiny")
    for one in store.list_checkpoints(tmp_path / "tiny" / "checkpoints"):
        state = json.loads((one.folder / checkpoint.STATE).read_text())
        del state["settings"]["data"]["tokenizer_fingerprint"]
        (one.folder / checkpoint.STATE).write_text(json.dumps(state))
        reseal(one.folder)
    engine = open_checkpoint(tmp_path / "tiny", "last", Device("cpu", "fp32"))
    assert engine.tokenizer.vocab_size > 1


def test_the_prompt_comes_first_and_as_many_tokens_as_asked_follow(say):
    said = say("prompt=The quiet", "temperature=0", "max_new_tokens=25")
    assert said.startswith("The quiet") and len(said) == len("The quiet") + 25 + 1


def test_cached_equals_uncached_past_the_context(say):
    assert say("prompt=A", "temperature=0", "max_new_tokens=100") == say("prompt=A", "temperature=0", "max_new_tokens=100", "cache=false")


def test_a_run_is_found_by_name_by_path_and_by_being_the_last(say, runs_dir):
    assert say() == say("run=tiny") == say(f"run={runs_dir / 'tiny'}")


def test_several_samples_are_each_printed_whole(say):
    said = say("prompt=The", "num_samples=3")
    parts = said.split("--- ")[1:]
    assert [part.split("\n")[0] for part in parts] == ["1 of 3", "2 of 3", "3 of 3"]
    assert all(part.split("\n", 1)[1].startswith("The") for part in parts) and len(set(parts)) == 3


def test_stop_ends_before_the_text_and_never_shows_a_part_of_it(say):
    free = say("prompt=The", "temperature=0", "max_new_tokens=60")
    stop = free[12:15]
    assert say("prompt=The", "temperature=0", "max_new_tokens=60", f"stop={stop}") == free[: free.index(stop, 3)] + "\n"


def test_the_prompt_can_come_from_a_file_or_standard_input(say, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("Every old")
    direct = say("prompt=Every old")
    assert say(f"prompt_file={tmp_path / 'prompt.txt'}") == direct
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Every old")))
    assert say("prompt_file=-") == direct


LINES = "a\rb\r\nc\n\x0b\x85\u2028d\n\r"


@pytest.mark.parametrize("place", ["file", "-", "pipe"])
def test_a_prompt_keeps_its_line_endings(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text(LINES, newline="")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(LINES.encode())))
    if place == "pipe":
        reader, writer = os.pipe()
        os.write(writer, LINES.encode())
        os.close(writer)
        place = f"/dev/fd/{reader}"
    monkeypatch.chdir(tmp_path)
    assert read_text("prompt_file", place) == LINES


@pytest.mark.parametrize("setting", ["prompt_file", "prompts"])
@pytest.mark.parametrize(("name", "problem"), [
    ("/dev/zero", "/dev/zero holds more than 16 MB: choose a smaller file"), ("large", "holds more than 16 MB"),
    ("folder", "is a folder: name a file"), ("pipe", "is a pipe that nothing was written to"),
    ("latin", "is not UTF-8 at offset 3"), ("none", "No such file")])
def test_what_is_no_file_of_prompts_is_one_sentence(setting, name, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    mkfifo("pipe")
    Path("latin").write_bytes("café".encode("latin-1"))
    with open("large", "wb") as file:
        file.truncate(2**40)
    with pytest.raises((ValueError, OSError), match=problem):
        read_text(setting, name)


@pytest.mark.parametrize("endless", [True, False])
def test_standard_input_is_bounded_too(endless, monkeypatch):
    with open("/dev/zero" if endless else "/dev/null") as stream:
        monkeypatch.setattr("sys.stdin", stream)
        if endless:
            with pytest.raises(ValueError, match="prompt_file=- holds more than 16 MB"):
                read_text("prompt_file", "-")
        else:
            assert read_text("prompt_file", "-") == ""


def test_interactive_answers_each_line_until_the_input_ends(say, monkeypatch):
    lines = iter(["The", "A §", "No"])
    asked = []

    def answer(prompt):
        asked.append(prompt)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    said = say("interactive=true")
    assert "The" in said and "'§'" in said and "No" in said and len(asked) == 4  # a bad prompt does not end the talk


@pytest.mark.slow
def test_interactive_in_a_terminal(runs_dir):
    """A line that is not UTF-8 is refused and the next one answered; Ctrl-C ends it without a traceback."""
    master, slave = os.openpty()
    command = [sys.executable, "sample.py", f"runs_dir={runs_dir}", "interactive=true", "max_new_tokens=5"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(slave)
    said = b""
    for typed in (b"\xff\n", b"The\n", b"\x03"):
        while not said.endswith(b"prompt> "):
            said += os.read(master, 1000)
        os.write(master, typed)
        said += typed
    with suppress(OSError):  # as Linux says that the other side is closed
        while piece := os.read(master, 1000):
            said += piece
    assert process.wait() == 130
    assert b"Traceback" not in said and b"'\\udcff'" in said and said.count(b"prompt> ") == 3


def test_a_character_that_the_tokenizer_lacks_is_named_and_nothing_is_printed(say, capsys):
    with pytest.raises(ValueError, match="no character 'c', 'é'"):
        say("prompt=café")
    assert capsys.readouterr().out == ""


def test_a_run_that_is_not_there_is_an_error_that_names_those_that_are(say, tmp_path):
    with pytest.raises(ValueError, match=r"run=nope does not exist. There are: tiny"):
        say("run=nope")
    with pytest.raises(ValueError, match="holds no run with a checkpoint"):
        say(f"runs_dir={tmp_path}")


def test_streamed_pieces_are_the_whole_text(runs_dir):
    settings = compose("sample", [f"runs_dir={runs_dir}", "max_new_tokens=50", "stop=zz"])
    device = Device("cpu", "fp32")
    engine = open_checkpoint(runs_dir / "tiny", "best", device)
    pieces = list(engine.stream("The", settings))
    whole = engine.complete([("The", 0)], settings)[0].text
    assert "".join(pieces) == whole and len([piece for piece in pieces if piece]) > 10


def test_best_is_the_checkpoint_with_the_lowest_validation_loss(runs_dir):
    folder = runs_dir / "tiny/checkpoints"
    found = store.list_checkpoints(folder)
    best = store.load_checkpoint(folder, "best", store.verified, pytest.fail)
    assert best.state["val_loss"] == min(one.state["val_loss"] for one in found)
    assert store.load_checkpoint(folder, "last", store.verified, pytest.fail).step == 60
    engine = open_checkpoint(runs_dir / "tiny", "best", Device("cpu", "fp32"))
    saved = load_file(best.folder / checkpoint.MODEL)
    assert all(torch.equal(weights, saved[name]) for name, weights in engine.model.state_dict().items())


def test_a_checkpoint_is_chosen_by_its_step(runs_dir):
    for step in (40, 60):
        engine = open_checkpoint(runs_dir / "tiny", str(step), Device("cpu", "fp32"))
        saved = load_file(runs_dir / f"tiny/checkpoints/step_{step:08d}" / checkpoint.MODEL)
        assert all(torch.equal(weights, saved[name]) for name, weights in engine.model.state_dict().items())


def test_a_step_without_a_checkpoint_is_said_with_those_there_are(say, runs_dir):
    steps = ", ".join(str(one.step) for one in store.list_checkpoints(runs_dir / "tiny/checkpoints"))
    with pytest.raises(ValueError, match=rf"checkpoint=30 is not in .*tiny/checkpoints. There are: {steps}.$"):
        say("checkpoint=30")


def test_a_damaged_step_is_not_replaced_by_another(say, runs_dir, tmp_path):
    shutil.copytree(runs_dir / "tiny", tmp_path / "tiny")
    model = tmp_path / "tiny/checkpoints/step_00000060" / checkpoint.MODEL
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"step_00000060.*: choose another checkpoint"):
        say(f"runs_dir={tmp_path}", "checkpoint=60")


@pytest.mark.parametrize("which", ["besst", "-1", "1.5", "", "9" * 5000, "../x", "step_00000060"])
def test_a_checkpoint_is_best_last_or_a_step(which):
    with pytest.raises(ConfigError, match="is not best, last or the number of a step"):
        compose("sample", [f"checkpoint={which}"])


def test_a_checkpoint_is_opened_as_it_would_be_with_drawn_weights_and_buffers(runs_dir):
    """Weights that are not drawn first are all from the file; the caller's random stream is untouched."""
    before = torch.get_rng_state()
    engine = open_checkpoint(runs_dir / "tiny", "best", Device("cpu", "fp32"))
    assert torch.equal(torch.get_rng_state(), before) and not any(weights.is_meta for weights in engine.model.state_dict().values())
    with Undrawn("meta"):
        shapes = GPT(replace(engine.model.config, position="rotary", tie_head=False))
    assert all(weights.is_meta for weights in shapes.parameters()) and shapes.rotary.isfinite().all()


@pytest.mark.slow
def test_neither_opening_nor_sampling_nor_going_on_imports_torchs_compiler(runs_dir):
    """Which takes a second: what `python sample.py` needs until its first token."""
    code = ("import sys; from conf.schema import compose; import sample; from checkpointing.resume import max_file_bytes; "
            "from model import GPTConfig; max_file_bytes(GPTConfig()); "  # as going on with a run asks
            f"sample.sample(compose('sample', ['runs_dir={runs_dir}', 'max_new_tokens=3'])); print('torch._dynamo' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stdout + done.stderr


@pytest.mark.parametrize(("setting", "more"), [("num_samples", []), ("batch_size", ["prompts=p.txt", "out=out.jsonl"])])
def test_more_at_once_than_memory_holds_is_one_sentence(setting, more, say, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("The")
    with pytest.raises(ValueError, match=rf"{setting}=1000000000 completions at once take [\d.]+ TB of memory, [\d.]+ \w+ are free: choose a smaller {setting}"):
        say(f"{setting}=1000000000", *more)
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]


def test_what_a_decoder_says_it_takes_is_what_it_takes(runs_dir):
    engine = open_checkpoint(runs_dir / "tiny", "best", Device("cpu", "fp32"))
    decoder = Decoder(engine.model)
    decoder.begin([[1], [1], [1]], 9)
    held = sum(each.nbytes for each in (*decoder.cache.keys, *decoder.cache.values))
    assert held == decoder.nbytes(3, 10) - 3 * 4 * 3 * engine.model.config.vocab_size


# Files of prompts


@pytest.fixture
def fill(runs_dir, tmp_path, capsys):
    """The lines that `prompts=... out=...` writes, after what `out` holds at first."""
    def run(prompts: list[str], *overrides: str, held: str = "") -> list[dict]:
        (tmp_path / "prompts.txt").write_text("\n".join(prompts), newline="")
        out = tmp_path / "out.jsonl"
        out.write_text(held) if held else out.unlink(missing_ok=True)
        base = [f"runs_dir={runs_dir}", "precision=fp32", "max_new_tokens=20", f"prompts={tmp_path / 'prompts.txt'}", f"out={out}"]
        assert story.sample(compose("sample", [*base, *overrides])) == 0
        return [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    return run


PROMPTS = ["The", "", "Every old house\r", "A", "No", "The"]


def test_each_prompt_of_a_file_is_completed_as_if_alone(fill, say):
    lines = fill(PROMPTS, "num_samples=2", "batch_size=3")
    assert [(line["prompt"], line["sample"]) for line in lines] == [
        (prompt, number) for prompt in ("The", "Every old house", "A", "No", "The") for number in (0, 1)]
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        said = say(f"prompt={first['prompt']}", "num_samples=2", "max_new_tokens=20")
        assert said == "".join(f"--- {n} of 2\n{line['prompt']}{line['text']}\n" for n, line in ((1, first), (2, second)))


def test_what_is_finished_leaves_its_batch(fill, monkeypatch):
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


def test_a_line_says_how_many_tokens_how_likely_and_how_it_ended(fill, runs_dir):
    free = fill(["The quiet"], "temperature=0")[0]
    assert (free["tokens"], free["finish_reason"]) == (20, "length")
    engine = open_checkpoint(runs_dir / "tiny", "best", Device("cpu", "fp32"))
    prompt, drawn = engine.encode("The quiet"), engine.encode(free["text"])
    loss = engine.model(torch.tensor([[*prompt, *drawn][-33:-1]]))[0, -20:].log_softmax(-1).gather(1, torch.tensor(drawn)[:, None])
    assert free["mean_logprob"] == pytest.approx(loss.mean().item(), abs=1e-4)
    stop = free["text"][5:7]
    stopped = fill(["The quiet"], "temperature=0", f"stop={stop}")[0]
    assert stopped["finish_reason"] == "stop" and stopped["text"] == free["text"][: free["text"].index(stop)]
    assert stopped["tokens"] == free["text"].index(stop) + 2


def test_a_file_of_completions_is_gone_on_with_where_a_kill_left_it(fill, tmp_path, monkeypatch):
    whole = fill(PROMPTS, "batch_size=2")
    content = (tmp_path / "out.jsonl").read_text()
    written = []
    complete = Engine.complete
    monkeypatch.setattr(Engine, "complete", lambda engine, jobs, *rest, **more: written.append(jobs) or complete(engine, jobs, *rest, **more))
    assert fill(PROMPTS, "batch_size=2", held=content[: len(content) // 2]) == whole
    kept = content[: len(content) // 2].count("\n")
    made = len(whole) - kept // 2 * 2
    assert sum(map(len, written)) == made > 0
    assert fill(PROMPTS, "batch_size=2", held=content) == whole and sum(map(len, written)) == made


@pytest.mark.parametrize(("prompts", "override", "problem"), [
    (["The", "A"], "seed=1337", "line 2, is not of the prompt 'A'"), (["The", "No"], "temperature=0.5", "line 1, is of another model or of other"),
    (["The"], "seed=1337", "has 2 lines, and 1 are asked for"), (["The", "café"], "seed=1337", "no character")])
def test_completions_of_something_else_are_left_as_they_are(fill, tmp_path, prompts, override, problem):
    fill(["The", "No"])
    content = (tmp_path / "out.jsonl").read_text()
    with pytest.raises(ValueError, match=problem):
        fill(prompts, override, held=content)
    assert (tmp_path / "out.jsonl").read_text() == content


@pytest.mark.parametrize("held", ["my notes\n", "my notes", "1\n", "[]\n", "null\n", "[" * 100_000 + "\n", '{"prompt": "No',
                                  '{"prompt": "The", "answer": "one"}'], ids=lambda held: held[:12])
def test_a_file_that_holds_something_else_is_left_as_it_is(fill, tmp_path, held):
    """Also one whose last line has no end, and is not the beginning of one of ours."""
    with pytest.raises(ValueError, match="holds something else"):
        fill(["The"], held=held)
    assert (tmp_path / "out.jsonl").read_text() == held


def test_the_file_of_prompts_is_not_written_over(fill, tmp_path):
    with pytest.raises(ValueError, match="holds something else"):
        fill(["The"], f"out={tmp_path / 'prompts.txt'}")
    assert (tmp_path / "prompts.txt").read_text() == "The"


def test_a_line_more_than_asked_for_is_left_as_it_is(fill, tmp_path):
    fill(["The", "No"])
    content = (tmp_path / "out.jsonl").read_text()[:-30]  # the second is cut
    with pytest.raises(ValueError, match="has 2 lines, and 1 are asked for"):
        fill(["The"], held=content)
    assert (tmp_path / "out.jsonl").read_text() == content


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("real.jsonl"), mkfifo], ids=["folder", "link", "pipe"])
def test_completions_go_into_plain_files_only(fill, tmp_path, make):
    make(tmp_path / "there")
    with pytest.raises(ValueError, match="there is not a plain file"):
        fill(["The"], f"out={tmp_path / 'there'}")


def test_a_file_that_another_process_writes_is_left_to_it(fill, tmp_path):
    fill(["The"])
    content = (tmp_path / "out.jsonl").read_text()
    with locks.exclusive_lock(tmp_path / "out.jsonl"):
        with pytest.raises(BlockingIOError, match=r"^[^\[]*out.jsonl is being written by another process: wait, or choose another file.$"):
            fill(["The", "No"], held=content[:-30])
        assert (tmp_path / "out.jsonl").read_text() == content[:-30]
    assert len(fill(["The", "No"], held=content[:-30])) == 2


def test_what_fails_keeps_nobody_out(fill, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "complete", lambda *arguments, **rest: interrupted())
        fill(["The"])
    assert len(fill(["The"])) == 1


def interrupted():
    raise KeyboardInterrupt


def test_a_file_system_without_locks_is_written_to_all_the_same(fill, monkeypatch):
    def flock(handle, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    assert len(fill(["The"])) == 1


def test_batches_of_another_size_go_on_with_a_file_only_where_they_give_the_same(fill, tmp_path):
    def go_on(*rules):
        fill(["The", "No"], "batch_size=2", *rules)
        content = (tmp_path / "out.jsonl").read_text()
        return fill(["The", "No"], "batch_size=1", *rules, held=content[: content.index("\n") + 1])

    assert len(go_on()) == 2
    with pytest.raises(ValueError, match="is of another model or of other settings"):
        go_on("precision=bf16")


def test_a_prompt_of_a_file_keeps_what_does_not_end_its_line(fill, monkeypatch):
    monkeypatch.setattr(engines.Tokenizer, "encode", lambda tokenizer, text: [0])
    prompts = [line["prompt"] for line in fill(["a\rb\r", "c\u2028d", "\x85e"])]
    assert prompts == ["a\rb", "c\u2028d", "\x85e"]


@pytest.mark.parametrize("prompts", [[""], ["", "\r", ""]])
def test_a_file_without_prompts_is_said_and_nothing_is_made(fill, tmp_path, prompts):
    with pytest.raises(ValueError, match=r"prompts.txt holds no prompts: write one a line"):
        fill(prompts)
    assert not (tmp_path / "out.jsonl").exists()


def test_the_mark_at_the_beginning_of_a_file_is_not_part_of_a_prompt(fill):
    assert fill(["\ufeffThe"]) == fill(["The"])


def test_a_batch_that_a_kill_cut_is_made_again_as_a_whole(fill, tmp_path, monkeypatch):
    """Since there are products by which a row's last digits depend on the others'."""
    prompts, rules = ["The", "Every old house", "A", "No", "The quiet"], ["batch_size=3", "temperature=1.5"]
    whole, complete, sizes = fill(prompts, *rules), Engine.complete, []
    lines = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    monkeypatch.setattr(Engine, "complete", lambda engine, jobs, *rest, **more: sizes.append(len(jobs)) or complete(engine, jobs, *rest, **more))
    for kept in range(5):
        sizes.clear()
        assert fill(prompts, *rules, held="".join(lines[:kept]) + lines[kept][:20]) == whole
        assert sizes == ([3, 2] if kept < 3 else [2])


@pytest.mark.skipif(not kernels.available(), reason=f"no kernels here: {kernels.library()}")
@pytest.mark.parametrize("bits", ["precision=bf16", "int8=true"])
def test_with_few_bits_a_prompt_is_completed_as_if_alone_too(fill, bits):
    alone = [fill([prompt], bits, "temperature=1.5")[0]["text"] for prompt in ("The", "Every old house", "A")]
    assert [line["text"] for line in fill(["The", "Every old house", "A"], bits, "temperature=1.5")] == alone


@pytest.fixture
def no_kernels(monkeypatch):
    missing = OSError("There is no C compiler here (gcc): install gcc.")
    monkeypatch.setattr(kernels, "library", lambda: missing)


def test_without_a_compiler_completions_are_the_same(say, request):
    told = say("prompt=The")
    request.getfixturevalue("no_kernels")
    assert say("prompt=The") == told


def test_int8_without_a_compiler_says_what_to_install(say, no_kernels):
    with pytest.raises(ValueError, match=r"int8=true is not supported: .*install gcc"):
        say("prompt=The", "int8=true")


@pytest.fixture
def warnings_of(runs_dir, capsys):
    """What `python sample.py` prints on standard error for these overrides."""
    def run(*overrides):
        capsys.readouterr()
        settings = compose("sample", [f"runs_dir={runs_dir}", "max_new_tokens=5", *overrides])
        assert story.sample(settings) == 0
        return capsys.readouterr().err
    return run


def test_without_a_compiler_it_takes_longer_and_says_so(warnings_of, no_kernels):
    said = warnings_of("precision=fp32")
    assert "takes two to four times as long" in said and "install gcc" in said


@pytest.mark.parametrize("words", [["cache=false"], []])
@pytest.mark.parametrize("native", ["0", "1"])
def test_fp32_in_place_of_an_emulated_precision_is_said(warnings_of, words, native, no_kernels, monkeypatch):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    said = "precision=bf16 is not native to this processor: computing in fp32."
    assert (said in warnings_of("precision=bf16", *words)) == (native == "0")


@pytest.mark.skipif(not kernels.available(), reason=f"no kernels here: {kernels.library()}")
@pytest.mark.parametrize("native", ["0", "1"])
def test_weights_of_fewer_bits_cost_nothing_to_be_said(warnings_of, native, monkeypatch):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    assert not warnings_of("precision=bf16")


@pytest.mark.parametrize(("words", "problem"), [
    (["prompts=a.txt"], "belong together"), (["out=a.jsonl"], "belong together"),
    (["prompts=a.txt", "out=b", "prompt=The"], "exclude each other"), (["prompts=a.txt", "out=b", "logprobs=true"], "prints"),
    (["int8=true", "cache=false"], "needs the cache"), (["batch_size=0"], "at least 1")])
def test_settings_that_cannot_be_together_are_one_sentence(words, problem):
    with pytest.raises(ConfigError, match=problem):
        compose("sample", words)


# Probabilities


def test_probabilities_are_listed_token_by_token_and_coloured_on_a_terminal(say, monkeypatch):
    plain = say("prompt=The", "temperature=0", "logprobs=true", "max_new_tokens=30")
    free = say("prompt=The", "temperature=0", "max_new_tokens=30")
    rows = [re.fullmatch(r" *([\d.]+)%  ('.+')", line) for line in plain.splitlines()[1:]]
    assert plain.startswith("The\n") and "The" + "".join(ast.literal_eval(row[2]) for row in rows) + "\n" == free
    assert all(100 / 28 <= float(row[1]) <= 100 for row in rows)  # the likeliest of 28
    monkeypatch.setattr(story.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    colours = {"31": (0, 10), "33": (10, 50), "32": (50, 100)}
    said = say("prompt=The", "temperature=2.0", "top_k=0", "top_p=1", "logprobs=true", "num_samples=4")
    found = re.findall(r"\x1b\[(\d+)m *([\d.]+)%.*\x1b\[0m", said)
    assert {colour for colour, _ in found} == set(colours) and len(found) == 160
    assert all(colours[colour][0] - 0.01 <= float(p) <= colours[colour][1] + 0.01 for colour, p in found)


class Bytes:
    """A tokenizer for `Completion`: bytes, and 256 for the end of a text."""

    end_of_text = 256

    def decode_bytes(self, ids):
        return bytes(ids)


def feed(text: bytes, stop: str = "") -> tuple[list[str], Completion]:
    row = Completion(Bytes(), stop)
    shown = []
    for token in text:
        row.add(token)
        shown.append(row.printable())
    return shown, row


def test_a_character_of_several_tokens_arrives_whole():
    shown, row = feed("né🎉".encode())
    assert set(shown) == {"n", "né", "né🎉"} and row.text == "né🎉"


def test_bytes_that_are_no_character_become_a_replacement_at_the_end():
    _, row = feed("n🎉".encode()[:-1])
    row.finish()
    assert row.text == "n\ufffd"


def test_an_end_that_could_become_stop_is_held_back():
    shown, row = feed(b"abXabXY.", stop="XY")
    assert shown == ["a", "ab", "ab", "abXa", "abXab", "abXab", "abXab", "abXab"] and row.finished


def test_end_of_text_ends_a_row():
    row = Completion(Bytes(), "")
    for token in (65, 256, 66):
        row.add(token)
    assert row.text == "A" and row.finished
