"""Sampling from a run: prompts in, completions out."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import reseal

import sample as story
import train
from conf.schema import compose
from data.tokenizer import fingerprint, from_json
from training import checkpoint
from training.device import Device


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
    for one in checkpoint.find(tmp_path / "tiny" / "checkpoints"):
        saved = json.loads((one.folder / "tokenizer.json").read_text())
        other = saved | {"characters": saved["characters"].replace("a", "!")}
        other["characters"] = "".join(sorted(other["characters"]))
        (one.folder / "tokenizer.json").write_text(json.dumps(other))
        reseal(one.folder)
        names = fingerprint(from_json(other, ""))[:12], fingerprint(from_json(saved, ""))[:12]
    with pytest.raises(ValueError, match=r"tokenizer.json \(fingerprint {}\) is not the tokenizer .*\(fingerprint {}\)".format(*names)):
        story.open_checkpoint(tmp_path / "tiny", "last", Device("cpu", "fp32"))


def test_a_run_older_than_the_note_of_its_tokenizer_is_sampled_as_it_is(runs_dir, tmp_path):
    shutil.copytree(runs_dir / "tiny", tmp_path / "tiny")
    for one in checkpoint.find(tmp_path / "tiny" / "checkpoints"):
        state = json.loads((one.folder / checkpoint.STATE).read_text())
        del state["settings"]["data"]["tokenizer_fingerprint"]
        (one.folder / checkpoint.STATE).write_text(json.dumps(state))
        reseal(one.folder)
    _, tokenizer = story.open_checkpoint(tmp_path / "tiny", "last", Device("cpu", "fp32"))
    assert tokenizer.vocab_size > 1


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
    monkeypatch.setattr("sys.stdin", io.StringIO("Every old"))
    assert say("prompt_file=-") == direct


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


def test_a_character_that_the_tokenizer_lacks_is_named_and_nothing_is_printed(say, capsys):
    with pytest.raises(ValueError, match="no character 'c', 'é'"):
        say("prompt=café")
    assert capsys.readouterr().out == ""


def test_a_run_that_is_not_there_is_an_error_that_names_those_that_are(say, tmp_path):
    with pytest.raises(ValueError, match=r"run=nope is not there. There are: tiny"):
        say("run=nope")
    with pytest.raises(ValueError, match="holds no run with a checkpoint"):
        say(f"runs_dir={tmp_path}")


def test_streamed_pieces_are_the_whole_text(runs_dir):
    settings = compose("sample", [f"runs_dir={runs_dir}", "max_new_tokens=50", "stop=zz"])
    device = Device("cpu", "fp32")
    model, tokenizer = story.open_checkpoint(runs_dir / "tiny", "best", device)
    pieces = []
    whole = story.complete(model, tokenizer, "The", settings, device, show=pieces.append)[0]
    assert "".join(pieces) == "The" + whole and len([piece for piece in pieces if piece]) > 10


def test_best_is_the_checkpoint_with_the_lowest_validation_loss(runs_dir):
    folder = runs_dir / "tiny/checkpoints"
    found = checkpoint.find(folder)
    best = checkpoint.choose(folder, "best", checkpoint.whole, pytest.fail)
    assert best.state["val_loss"] == min(one.state["val_loss"] for one in found)
    assert checkpoint.choose(folder, "last", checkpoint.whole, pytest.fail).step == 60
    model, _ = story.open_checkpoint(runs_dir / "tiny", "best", Device("cpu", "fp32"))
    saved = load_file(best.folder / checkpoint.MODEL)
    assert all(torch.equal(weights, saved[name]) for name, weights in model.state_dict().items())


class Bytes:
    """A tokenizer for `Completion`: bytes, and 256 for the end of a text."""

    end_of_text = 256

    def decode_bytes(self, ids):
        return bytes(ids)


def feed(text: bytes, stop: str = "") -> tuple[list[str], story.Completion]:
    row = story.Completion(Bytes(), stop)
    shown = []
    for token in text:
        row.add(token)
        shown.append(row.certain())
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
    row = story.Completion(Bytes(), "")
    for token in (65, 256, 66):
        row.add(token)
    assert row.text == "A" and row.finished
