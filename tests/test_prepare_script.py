"""python -m scripts.prepare: looking into prepared tokens, and cleaning up."""

from __future__ import annotations

import re

import numpy as np
import pytest

import atomic
import train
from conf.schema import ConfigError, compose
from data.contents import Contents
from data.prepare import load_tokenizer, prepare
from data.shards import open_parts
from data.sources import DataConfig
from scripts.prepare import PrepareSettings, main

DOCUMENTS = [f"Document {number} " + "word " * number for number in range(120)]


@pytest.fixture
def folder_of_texts(tmp_path):
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / "texts" / f"{number:03d}.txt").write_text(text)
    return tmp_path / "texts"


def run(*overrides):
    return main(compose(PrepareSettings, list(overrides)))


def test_inspecting_says_what_is_there(folder_of_texts, tmp_path, fresh_data, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "picture.png"
    words = ["data=text", f"data.path={folder_of_texts}", "data.tokenizer=byte", "inspect=true", f"out={out}"]
    assert run(*words) == 0
    said = capsys.readouterr().out
    train_documents, val_documents = (int(re.search(rf"{split} +(\d+) ", said)[1]) for split in ("train", "val"))
    assert train_documents + val_documents == 120
    assert re.search(r"111 +\d,\d{3} +\d+\.\d\d%  'o'", said)  # "o" comes in "Document" and in each "word"
    shown = re.findall(r"--- Document (\d+) of (\d+): (\d+) tokens\n(Document \d+ (?:word )*)", said)
    assert len(shown) == 3 and all(int(total) == train_documents for _, total, _, _ in shown)
    assert all(len(text) == min(int(length), 600) for _, _, length, text in shown)
    assert out.read_bytes().startswith(b"\x89PNG")
    run(*words)
    assert capsys.readouterr().out == said  # the same documents for the same seed
    run(*words, "seed=7")
    assert capsys.readouterr().out != said


def test_contents_are_those_of_the_texts(folder_of_texts, fresh_data):
    folder = prepare(DataConfig("text", str(folder_of_texts), "byte", val_fraction=0.1))
    contents = Contents(folder, load_tokenizer(folder))
    everything = "".join(DOCUMENTS).encode()
    assert contents.counts[:256].tolist() == [everything.count(bytes((byte,))) for byte in range(256)]
    assert contents.counts[256] == 120
    [tokens] = open_parts(folder, "train")
    texts = [bytes(tokens.read(np.arange(start, end)).tolist()).decode() for start, end in contents.documents(tokens)]
    assert len(texts) == contents.n_documents and set(texts) <= set(DOCUMENTS)
    edges, heights = contents.lengths()
    assert heights.sum() == len(texts) and np.histogram([len(text) for text in texts], edges)[0].tolist() == heights.tolist()
    assert {index for index, _, _ in contents.some_documents(1000, 0)} == set(range(len(texts)))


def test_a_single_text_is_one_document(tmp_path, fresh_data):
    (tmp_path / "a.txt").write_text("abc" * 100)
    folder = prepare(DataConfig("text", str(tmp_path / "a.txt"), "char"))
    contents = Contents(folder, load_tokenizer(folder))
    assert contents.n_documents == 1 and [length for _, length, _ in contents.some_documents(3, 0)] == [270]


def test_cleaning_removes_what_no_run_uses(compose_tiny, folder_of_texts, tmp_path, fresh_data, capsys):
    train.train(settings := compose_tiny("training.max_steps=1"))
    used, unused = prepare(settings.data), prepare(DataConfig("text", str(folder_of_texts), "byte"))
    (fresh_data / ".building-text-byte-1").mkdir()
    (fresh_data / ".building-text-byte-2").mkdir()
    lock = atomic.Lock(fresh_data / ".lock-text-byte-2", "a test")
    capsys.readouterr()
    assert run("clean=true", f"runs_dir={tmp_path / 'runs'}") == 0
    said = capsys.readouterr().out
    assert f"Kept {used} " in said and f"used by {tmp_path / 'runs' / 'tiny'}" in said
    assert f"Removed {unused} " in said and ".building-text-byte-1" in said
    assert re.search(r"Kept \S*building-text-byte-2, which is being prepared", said)
    assert sorted(path.name for path in fresh_data.iterdir()) == sorted([used.name, ".building-text-byte-2", ".lock-text-byte-2"])
    lock.release()
    (fresh_data / ".partial-text-byte-3-abc").mkdir()
    (used / "meta.json").write_text("damaged")
    (tmp_path / "elsewhere").mkdir()
    run("clean=true", f"runs_dir={tmp_path / 'elsewhere'}")
    assert not any(path.is_dir() for path in fresh_data.iterdir())


def test_nothing_is_removed_while_a_run_without_a_checkpoint_trains_or_where_there_are_no_runs(folder_of_texts, tmp_path, fresh_data):
    unused = prepare(DataConfig("text", str(folder_of_texts), "byte"))
    with pytest.raises(ValueError, match=r"runs_dir=\S*nowhere is no folder.*Nothing was removed"):
        run("clean=true", f"runs_dir={tmp_path / 'nowhere'}")
    lock = atomic.Lock(tmp_path / "runs" / "live" / "lock", "a test")
    with pytest.raises(ValueError, match=r"live is being trained .*Nothing was removed"):
        run("clean=true", f"runs_dir={tmp_path / 'runs'}")
    assert unused.is_dir()
    lock.release()
    run("clean=true", f"runs_dir={tmp_path / 'runs'}")
    assert not unused.exists()


def test_nothing_is_removed_where_a_run_cannot_be_read(compose_tiny, tmp_path, fresh_data):
    train.train(settings := compose_tiny("training.max_steps=1"))
    used = prepare(settings.data)
    for state in (tmp_path / "runs").rglob("state.json"):
        state.write_text("{}")
    with pytest.raises(ValueError, match=r"cannot be told which tokens .*tiny uses.*Nothing was removed"):
        run("clean=true", f"runs_dir={tmp_path / 'runs'}")
    assert used.is_dir()


@pytest.mark.parametrize("words, problem", [(["clean=true", "inspect=true"], "exclude each other"), (["inspect=true", "out=a.txt"], "out=a.txt must"),
                                            (["data.pth=x"], "did you mean data.path")])
def test_bad_settings_are_one_sentence(words, problem):
    with pytest.raises(ConfigError, match=problem):
        compose(PrepareSettings, words)
