"""python -m bench prepare: every way encodes the same text; no times are asserted."""

from __future__ import annotations

import os
import re
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench import prepare
from bench.prepare import PrepareSettings, main, make_text
from conf.schema import ConfigError, compose
from data.document import Document
from data.shards import Tokens

WAYS = ["bare, threads", "bare, processes", "prepared, from file to file"]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A small library in place of the standard one, two threads, and a folder for prepared data that is given back."""
    def line(number, row):
        word = sha256(bytes((number, row))).hexdigest().translate(str.maketrans("0123456789", "ghijklmnop"))
        return f"def f{number}():\n    return '{word}'\n"

    texts = ["".join(line(number, row) for row in range(20)) for number in range(20)]
    monkeypatch.setattr(prepare, "StdLib", lambda: SimpleNamespace(documents=lambda: map(Document.of, texts)))
    monkeypatch.setattr(prepare, "usable_cpus", lambda: 2)
    monkeypatch.setenv("NANOHYDRA_DATA", str(tmp_path / "untouched"))


def rows(said: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in cells}


def test_the_table_follows_from_the_medians(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(prepare, "alternating_medians", lambda ways, rounds: dict(zip(ways, (0.5, 0.25, 2.0), strict=True)))
    assert main(PrepareSettings(megabytes=1, rounds=7, gigabytes=0, tokenizer="byte")) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 MB, byte, 2 threads or processes, medians of 7 alternating rounds")
    expected = [["MB/s", "x"], ["2.0", "1.00"], ["4.0", "2.00"], ["0.5", "0.25"]]
    assert rows(said) == dict(zip(["way", *WAYS], expected, strict=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_every_way_encodes_the_whole_text_each_time(tiny, tmp_path, monkeypatch, tokenizer):
    made, build = [], prepare.prepare.__globals__["build"]
    monkeypatch.setattr("data.prepare.build", lambda partial, *rest: made.append(sorted(one.name for one in partial.iterdir())) or build(partial, *rest))

    def medians(ways, rounds):
        threads, processes = (ways[way]() for way in WAYS[:2])
        assert [list(one) for one in threads] == [list(one) for one in processes]
        for _ in range(2):
            ways[WAYS[2]]()
        [folder] = Path(os.environ["NANOHYDRA_DATA"]).iterdir()
        ids = np.concatenate([(tokens := Tokens.open(folder, split)).read(np.arange(len(tokens))) for split in ("train", "val")])
        if tokenizer == "byte":  # whose pieces end anywhere
            assert bytes(ids.tolist()) == (tmp_path / "rates.txt").read_bytes() and ids.tolist() == [one for ids in threads for one in ids]
        return dict.fromkeys(ways, 1.0)

    monkeypatch.setattr(prepare, "alternating_medians", medians)
    prepare.measure_rates(PrepareSettings(megabytes=1, tokenizer=tokenizer), tmp_path)
    assert 10**6 <= (tmp_path / "rates.txt").stat().st_size < 10**6 + 20
    assert made == [[], ["tokenizer.json"], ["tokenizer.json"]]  # only the tokenizer is trained once


def test_the_text_has_the_size_and_no_document_twice(tiny, tmp_path):
    make_text(tmp_path / "a.txt", 100_000)
    text = (tmp_path / "a.txt").read_text()
    assert 100_000 <= len(text) < 100_020 and text.startswith("# 0\ndef f0():")
    assert text.count("# 0\n") == text.count("# 25\ndef f5():") == 1  # it begins again, under another number


def test_memory_is_that_of_a_process_that_prepares_the_text(tiny, tmp_path, monkeypatch, capsys):
    started, measure_command = [], prepare.measure_command

    def start(words):
        started.append(words[1:])
        return measure_command([sys.executable, "-S", "-c", "some = bytearray(60_000_000)"])

    monkeypatch.setattr(prepare, "measure_command", start)
    prepare.measure_memory(PrepareSettings(gigabytes=1e-4, tokenizer="byte"), tmp_path)
    assert started == [["-m", "scripts.prepare", "data=text", f"data.path={tmp_path / 'memory.txt'}", "data.tokenizer=byte"]]
    assert 100_000 <= (tmp_path / "memory.txt").stat().st_size < 100_020
    assert int(re.search(r"at most (\d+) MB", capsys.readouterr().out)[1]) >= 60


@pytest.mark.parametrize("word", ["megabytes=0", "rounds=0", "gigabytes=-1", "tokenizer=char"])
def test_invalid_settings_are_named(word):
    with pytest.raises(ConfigError, match=word.split("=")[0]):
        compose(PrepareSettings, [word])
