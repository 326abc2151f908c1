"""Documents to token shards: made when missing and never otherwise."""

import asyncio
import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data.prepare
from conf import compose
from data import encode
from data.config import DataConfig
from data.corpus import Corpus, Seen
from data.prepare import describe, find_prepared, load_tokenizer, prepare
from data.shards import ShardWriter, Tokens, read_meta
from data.sources import Files
from data.tokenizer_json import fingerprint

ROOT = Path(__file__).parent.parent
MANY = [f"Document {number} says {number * number}.\n" for number in range(200)]
FEW = ["Once upon a time there was a text. " * 4, "Then came another one, and it was read. " * 5, "The end. " * 10]


@pytest.fixture
def corpus(tmp_path, fresh_data):
    """Write texts to a folder and return settings for it: bytes, and a fifth for validation."""

    def write(texts: list[str], **settings) -> DataConfig:
        folder = tmp_path / "corpus"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if len(texts) > 10:  # one file is much faster
            (folder / "records.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        else:
            for number, text in enumerate(texts):
                (folder / f"{number:03d}.txt").write_bytes(text.encode())
        return DataConfig(**{"source": "text", "path": str(folder), "tokenizer": "byte", "val_fraction": 0.2} | settings)

    return write


@pytest.fixture
def short_tails(monkeypatch):
    """Short documents give their tails too."""
    monkeypatch.setattr("data.split.TAIL", 1)


def read(folder: Path, split: str) -> list[int]:
    tokens = Tokens.open(folder, split)
    return tokens.read(np.arange(len(tokens))).tolist()


def documents(folder: Path, split: str) -> list[str]:
    """The texts before each end-of-text token."""
    tokenizer, texts = load_tokenizer(folder), [[]]
    for one in read(folder, split):
        if one == tokenizer.end_of_text:
            texts.append([])
        else:
            texts[-1].append(one)
    assert not texts.pop()
    return [tokenizer.decode_bytes(ids).decode() for ids in texts]


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


# The folder


def test_the_folder_holds_shards_tokenizer_and_meta(corpus, fresh_data):
    config = corpus(MANY)
    folder = prepare(config)
    assert list(fresh_data.iterdir()) == [folder] and folder.name.startswith("text-byte-")
    assert set(files(folder)) == {"train_00000.npy", "val_00000.npy", "tokenizer.json", "meta.json"}
    meta = read_meta(folder)
    assert (meta["tokenizer"], meta["vocab_size"], meta["val_fraction"]) == ("byte", 257, 0.2)
    assert meta["tokenizer_fingerprint"] == fingerprint(load_tokenizer(folder))


@pytest.mark.parametrize(("texts", "tokenizer"), [(MANY, "byte"), (FEW, "char"), (["Only one, with an é. " * 9], "bpe")])
def test_the_counts_in_meta_add_up(corpus, short_tails, texts, tokenizer):
    folder = prepare(corpus(texts, tokenizer=tokenizer, vocab_size=260))
    splits = read_meta(folder)["splits"]
    for split, counts in splits.items():
        assert counts["tokens"] == len(read(folder, split))
        assert counts["bytes_per_token"] == pytest.approx(counts["bytes"] / counts["tokens"])
    assert sum(counts["bytes"] for counts in splits.values()) == sum(len(text.encode()) for text in texts)
    n_documents = [counts["documents"] for counts in splits.values()]
    assert sum(n_documents) == len(MANY) if texts is MANY else n_documents == [len(texts)] * 2


def test_tokens_are_prepared_only_once(corpus, monkeypatch):
    config = corpus(FEW)
    before = files(folder := prepare(config))
    monkeypatch.setattr("data.prepare.build", lambda *args: pytest.fail("built again"))
    assert prepare(config) == folder and files(folder) == before


def test_another_source_or_setting_gives_another_folder(corpus, fresh_data):
    config = corpus(FEW)
    before = files(first := prepare(config))
    folders = [first, prepare(replace(config, val_fraction=0.3)), prepare(replace(config, tokenizer="char"))]
    folders += [prepare(replace(config, tokenizer="bpe", vocab_size=vocab_size)) for vocab_size in (258, 259)]
    folders += [prepare(corpus([*FEW[:2], FEW[2].replace("end", "End")]))]
    assert len(set(folders)) == len(folders) == len(list(fresh_data.iterdir()))
    assert files(first) == before
    assert prepare(corpus(FEW)) == first


def test_another_format_gives_another_folder(corpus, monkeypatch):
    first = prepare(config := corpus(FEW))
    monkeypatch.setattr("data.prepare.FORMAT", data.prepare.FORMAT + 1)
    assert prepare(config) != first


def test_vocab_size_matters_only_to_a_trained_tokenizer(corpus):
    config = corpus(FEW)
    assert prepare(replace(config, vocab_size=300)) == prepare(replace(config, vocab_size=400))


def test_time_and_place_do_not_change_name_or_content(corpus, tmp_path, monkeypatch):
    first = prepare(corpus(MANY, tokenizer="bpe", vocab_size=280))
    (tmp_path / "corpus").rename(tmp_path / "moved")
    monkeypatch.setenv("NANOHYDRA_DATA", str(tmp_path / "elsewhere"))
    second = prepare(DataConfig("text", str(tmp_path / "moved"), "bpe", 280, 0.2))
    assert second.name == first.name and second.parent != first.parent
    assert {name: content for name, (content, _) in files(second).items()} == {
        name: content for name, (content, _) in files(first).items()}


def test_the_description_states_the_size(corpus):
    folder = prepare(corpus(["a" * 100_000]))
    assert describe(folder) == ("80,000 tokens to train on, 20,000 to validate on, vocabulary of 257, "
                                f"1.00 bytes a token ({folder}); read from 1 file, 1 document")


# The documents of the splits


def test_exact_duplicates_are_dropped(corpus):
    folder = prepare(corpus([*MANY, *MANY[:50]]))
    assert sorted(documents(folder, "train") + documents(folder, "val")) == sorted(MANY)


def test_copies_of_one_document_are_one_document(corpus):
    folder = prepare(corpus(["The same. " * 20] * 5))
    assert "".join(map(chr, read(folder, "train") + read(folder, "val"))) == "The same. " * 20


def test_many_documents_are_held_out_whole(corpus):
    folder = prepare(corpus(MANY))
    train, val = documents(folder, "train"), documents(folder, "val")
    assert sorted(train + val) == sorted(MANY) and not set(train) & set(val)
    deviation = math.sqrt(len(MANY) * 0.2 * 0.8)
    assert abs(len(val) - 0.2 * len(MANY)) < 4 * deviation
    assert train == [text for text in MANY if text in set(train)]  # in the order of the source


def test_a_documents_split_depends_on_its_text_alone(corpus):
    """Not on the order or the number of documents."""
    held_out = set(documents(prepare(corpus(MANY)), "val"))
    more = [*(f"New {number}.\n" for number in range(50)), *reversed(MANY)]
    assert {text for text in documents(prepare(corpus(more)), "val") if text in MANY} == held_out


def test_which_documents_are_held_out_is_frozen(corpus):
    """Tokens that are prepared again must not move validation documents of a run to its training split."""
    held_out = documents(prepare(corpus(MANY, val_fraction=0.1)), "val")
    assert [int(text.split()[1]) for text in held_out] == [0, 7, 8, 11, 26, 35, 50, 73, 74, 95, 117, 121, 144, 146, 148, 153]


def test_a_larger_fraction_holds_out_more_of_the_same(corpus):
    held_out = [set(documents(prepare(corpus(MANY, val_fraction=fraction)), "val")) for fraction in (0.1, 0.3, 0.6)]
    assert held_out[0] < held_out[1] < held_out[2]


def test_few_documents_give_their_tails(corpus, short_tails):
    folder = prepare(corpus(FEW))
    train, val = documents(folder, "train"), documents(folder, "val")
    assert [head + tail for head, tail in zip(train, val, strict=True)] == FEW
    assert [len(tail) for tail in val] == [len(text) - int(0.8 * len(text)) for text in FEW]


def test_a_document_of_many_pieces_is_divided_once(corpus, short_tails, monkeypatch):
    """Also if the training part ends at the end of a piece."""
    monkeypatch.setattr("data.document.PIECE", 10)
    texts = [letter * length for letter, length in zip("abcd", (50, 100, 87, 49), strict=True)]
    folder = prepare(corpus(texts))
    heads = [int(0.8 * len(text)) for text in texts]
    assert documents(folder, "train") == [text[:head] for text, head in zip(texts, heads, strict=True)]
    assert documents(folder, "val") == [text[head:] for text, head in zip(texts, heads, strict=True)]
    assert [counts["documents"] for counts in read_meta(folder)["splits"].values()] == [4, 4]


def test_a_single_document_has_no_end_of_text(corpus):
    text = "0123456789" * 10
    folder = prepare(corpus([text]))
    assert bytes(read(folder, "train")).decode() == text[:80]
    assert bytes(read(folder, "val")).decode() == text[80:]


@pytest.mark.parametrize(("texts", "characters"), [(["banana é!"], " !abné"), (["banana", "é!"], "!abné")])
def test_char_lists_the_whole_corpus_by_code_point(corpus, texts, characters):
    """Also the characters of the validation split; with an end of text only between several documents."""
    tokenizer = load_tokenizer(prepare(corpus(texts, tokenizer="char", val_fraction=0.5)))
    assert tokenizer.encode(characters) == list(range(len(characters)))
    assert tokenizer.end_of_text == (len(characters) if len(texts) > 1 else None)
    assert tokenizer.vocab_size == len(characters) + (len(texts) > 1)


def test_bpe_learns_from_the_training_split_only(corpus):
    tail = "zq" * 40
    folder = prepare(corpus(["a quiet text. " * 20 + tail], tokenizer="bpe", vocab_size=265, val_fraction=80 / 360))
    assert load_tokenizer(folder).decode_bytes(read(folder, "val")).decode() == tail
    assert len(read(folder, "val")) == len(tail)  # no merge of z and q was learned


def test_the_sample_for_training_is_counted_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("data.document.PIECE", 10)
    (tmp_path / "a.txt").write_text("é" * 1000, encoding="utf-8")
    corpus = Corpus(Files(str(tmp_path / "a.txt")), 0.1)
    assert "".join(corpus.training_text(100)) == "é" * 50
    assert "".join(corpus.training_text(10**6)) == "é" * 900


@pytest.mark.parametrize("tokenizer", ["bpe", "byte"])
@pytest.mark.slow
def test_millions_of_blanks_in_a_row_are_text(corpus, tokenizer):
    """tiktoken and rustbpe fail on a million of them, but get shorter pieces."""
    text = "It was a dark and stormy night. " * 40 + " " * 2_500_000 + "The end. " * 100
    folder = prepare(corpus([text], tokenizer=tokenizer, vocab_size=270, val_fraction=0.0001))
    both = [load_tokenizer(folder).decode_bytes(read(folder, split)).decode() for split in ("train", "val")]
    assert "".join(both) == text


def test_an_end_of_text_in_a_text_is_plain_text(corpus, short_tails):
    texts = ["one<|endoftext|>two " * 5, "three " * 5]
    folder = prepare(corpus(texts, tokenizer="bpe", vocab_size=258))
    train, val = documents(folder, "train"), documents(folder, "val")
    assert [head + tail for head, tail in zip(train, val, strict=True)] == texts


@pytest.mark.parametrize("tokenizer", ["char", "bpe", "gpt2"])
def test_the_saved_tokenizer_gives_the_same_ids(corpus, tokenizer, request):
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2_files")
    folder = prepare(corpus(["It was the best of times. " * 20], tokenizer=tokenizer, vocab_size=270))
    saved = load_tokenizer(folder)
    assert saved.vocab_size == read_meta(folder)["vocab_size"]
    ids = read(folder, "train")
    assert saved.encode(saved.decode_bytes(ids).decode()) == ids


def test_shakespeare_has_nanogpts_characters_and_splits(shakespeare):
    folder = prepare(DataConfig(source="shakespeare", path=str(shakespeare), tokenizer="char"))
    tokenizer, splits = load_tokenizer(folder), read_meta(folder)["splits"]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (65, None)
    assert tokenizer.encode("\n !AZaz") == [0, 1, 2, 13, 38, 39, 64]
    assert (splits["train"]["tokens"], splits["val"]["tokens"]) == (1_003_854, 111_540)


@pytest.mark.slow
def test_the_default_corpus_is_pythons_documentation(prepared_data):
    """Its size depends on the version of Python."""
    folder = prepare(compose([]).data)
    assert folder.parent == prepared_data
    train, val = (read_meta(folder)["splits"][split] for split in ("train", "val"))
    assert train["documents"] + val["documents"] > 5000 and train["bytes"] + val["bytes"] > 1_500_000
    assert 0.05 < val["bytes"] / (train["bytes"] + val["bytes"]) < 0.2
    assert load_tokenizer(folder).vocab_size == 4096 and train["bytes_per_token"] > 3
    texts = [documents(folder, split) for split in ("train", "val")]
    assert not set(texts[0]) & set(texts[1])
    assert "Pretty-print a Python object to a stream [default is sys.stdout]." in texts[0] + texts[1]


# Validation


def test_records_are_held_out_whole(corpus):
    """Not a few characters of each, on which the validation loss would be noise."""
    texts = [f"{number:04d}" + "word " * 99 + "." for number in range(999)]
    folder = prepare(corpus(texts, val_fraction=0.005))
    train, val = documents(folder, "train"), documents(folder, "val")
    assert sorted(train + val) == sorted(texts) and 25 <= len(val) <= 40


@pytest.mark.parametrize("known", [True, False])
def test_much_text_is_split_without_knowing_all_of_it(corpus, monkeypatch, known):
    """By the hash of each document; a document that is much longer than the others gives its tail."""
    if not known:
        for name in ("KNOWN_CHARACTERS", "LEAST_HELD_OUT"):
            monkeypatch.setattr(f"data.split.{name}", 1)
    texts = ["A long book. " * 10_000, *MANY]
    folder = prepare(corpus(texts, val_fraction=0.1))
    train, val = documents(folder, "train"), documents(folder, "val")
    assert train[0] + val[0] == texts[0] and len(val[0]) == 13_000
    assert sorted(train[1:] + val[1:]) == sorted(MANY) and 10 < len(val[1:]) < 30


def test_kept_copies_are_in_one_split(corpus):
    texts = MANY + MANY[:100]
    folder = prepare(corpus(texts, deduplicate=False))
    train, val = documents(folder, "train"), documents(folder, "val")
    assert sorted(train + val) == sorted(texts) and not set(train) & set(val)
    assert len(set(val)) < len(val)


def test_kept_copies_of_one_document_share_its_tail(corpus):
    folder = prepare(corpus(["The same. " * 20] * 3, deduplicate=False))
    train, val = documents(folder, "train"), documents(folder, "val")
    assert len(set(train)) == len(set(val)) == 1 and len(train) == len(val) == 3
    assert train[0] + val[0] == "The same. " * 20


@pytest.fixture
def validation(tmp_path):
    """Write validation texts to another folder."""

    def write(texts: list[str]) -> str:
        (tmp_path / "held out").mkdir(exist_ok=True)
        for number, text in enumerate(texts):
            (tmp_path / "held out" / f"{number:03d}.txt").write_text(text)
        return str(tmp_path / "held out")

    return write


@pytest.mark.parametrize("source", [{}, {"source": "pydocs", "path": ""}], ids=["files", "pydocs"])
def test_a_validation_text_is_the_validation_split(corpus, validation, source, monkeypatch):
    package = Path(asyncio.__file__).parent  # a part of the standard library
    monkeypatch.setattr("data.sources.sysconfig.get_paths", lambda: {"stdlib": package})
    config = corpus(FEW, val_path=validation(["Another text. " * 9, "And one more. "]), **source)
    folder = prepare(config)
    assert documents(folder, "val") == ["Another text. " * 9, "And one more. "]
    assert len(documents(folder, "train")) > 200 if source else documents(folder, "train") == FEW
    assert prepare(replace(config, val_fraction=0.3)) == folder
    validation(["Changed."])
    assert prepare(config) != folder


@pytest.mark.parametrize("deduplicate", [True, False])
def test_validation_documents_are_dropped_from_training(corpus, validation, deduplicate):
    folder = prepare(corpus([*MANY, FEW[0]], val_path=validation([*MANY[:3], "x"]), deduplicate=deduplicate))
    assert documents(folder, "train") == [*MANY[3:], FEW[0]] and documents(folder, "val") == [*MANY[:3], "x"]
    assert "3 documents dropped that the validation text also has; validation text: 4 files" in describe(folder)


@pytest.mark.parametrize("train, val, words", [
    (MANY, MANY, "Every document of the training text is also in the validation text"), (MANY, [" "], "validation text is empty"),
    ([" "], ["a"], "/corpus holds no text")])
def test_an_empty_split_is_an_error(corpus, validation, train, val, words):
    with pytest.raises(ValueError, match=words):
        prepare(corpus(train, val_path=validation(val)))


def test_a_single_text_and_validation_text_have_no_end(corpus, validation):
    folder = prepare(corpus([FEW[0]], val_path=validation([FEW[1]]), tokenizer="char"))
    assert load_tokenizer(folder).end_of_text is None


def test_the_description_says_what_was_left_out(corpus):
    config = corpus([*FEW, *FEW[:2], " "])
    for name in ("a.py", "b.py", "c", ".hidden.txt"):
        (Path(config.path) / name).write_text("x")
    said = describe(prepare(config))
    assert said.endswith("read from 6 files (skipped 2 .py, 1 hidden, 1 without an extension), 5 documents, 2 exact duplicates dropped")


# What can go wrong


@pytest.mark.parametrize("texts", [[""], ["", " \t\r\n"]])
def test_a_source_of_blanks_is_an_error(corpus, fresh_data, texts):
    with pytest.raises(ValueError, match="holds no text"):
        prepare(corpus(texts))
    assert not any(fresh_data.rglob("*"))


def test_the_loader_reports_an_empty_training_split(corpus):
    folder = prepare(corpus(["abc"], val_fraction=0.9))
    assert read(folder, "train") == [] and read(folder, "val") == [97, 98, 99]
    from data.loader import Loader  # imported here, or the processes below would import torch

    with pytest.raises(ValueError, match="has 0 tokens"):
        Loader([Tokens.open(folder, "train")], block_size=8, batch_size=1)


PLACES = ["data.prepare.make_tokenizer", "data.shards.ShardWriter.add", "data.shards.ShardWriter.close", "data.prepare.fingerprint",
          "data.prepare.write_meta"]


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_leaves_no_complete_folder(corpus, fresh_data, monkeypatch, place):
    config = corpus(FEW)

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(place, fail)
        prepare(config)
    assert all(path.name.startswith(".building-") for path in fresh_data.iterdir())
    folder = prepare(config)
    assert len(documents(folder, "train") + documents(folder, "val")) == len(FEW)
    assert list(fresh_data.iterdir()) == [folder]


def test_an_invalid_source_leaves_nothing(corpus, fresh_data, monkeypatch):
    """The repaired source has another fingerprint, so that it could not resume."""
    config = corpus([*FEW, "bad"])
    (Path(config.path) / "003.txt").write_bytes(b"bad \xff byte")
    with pytest.raises(ValueError, match=r"003.txt is not UTF-8"):
        prepare(config)
    assert not any(fresh_data.iterdir())


def test_a_full_temporary_folder_is_named(corpus, monkeypatch):
    begin = Seen.__init__
    monkeypatch.setattr(Seen, "__init__", lambda seen: (begin(seen), seen.table.execute("PRAGMA max_page_count=2"))[0])
    with pytest.raises(OSError, match=r"^No space for temporary files.*set SQLITE_TMPDIR"):
        prepare(corpus(MANY))


# On all cores


def test_results_are_in_order_with_little_read_ahead():
    asked = []

    def items():
        for number in range(100):
            asked.append(number)
            yield number

    results = encode.in_order(lambda number: number * number, items(), 3)
    assert next(results) == (0, 0) and len(asked) == 3 + 2
    assert list(results) == [(number, number * number) for number in range(1, 100)]


def test_closing_ends_the_threads_and_drops_waiting_work(monkeypatch):
    class Pool(ThreadPoolExecutor):
        def shutdown(self, **options):
            super().shutdown(wait=False, **options)
            go_on.set()
            super().shutdown()

    def work(number):
        begun.append(number)
        assert number == 0 or go_on.wait(30)

    monkeypatch.setattr(encode, "ThreadPoolExecutor", Pool)
    begun, go_on, before = [], threading.Event(), threading.active_count()
    try:
        results = encode.in_order(work, iter(range(100)), 1)
        next(results)
        results.close()
        assert begun in ([0], [0, 1]) and threading.active_count() == before
    finally:
        go_on.set()


def test_progress_counts_the_parts_of_a_mixture_alike(tmp_path, monkeypatch):
    monkeypatch.setattr("data.document.PIECE", 100)
    monkeypatch.setattr("data.encodings.BLOCK", 100)
    monkeypatch.setattr(encode, "BATCH_BYTES", 1000)
    for name, length in (("a.txt", 10_000), ("b.txt", 5_000)):
        (tmp_path / name).write_text("word " * (length // 5))
    found = list(encode.batches([Corpus(Files(str(tmp_path / name)), 0.1) for name in ("a.txt", "b.txt")]))
    read = [batch.progress for batch in found]
    assert read == sorted(read) and len(set(read)) > 10 and 0 < read[0] < 0.1
    assert [max(batch.progress for batch in found if batch.part == part) for part in (0, 1)] == [0.5, 1]


@pytest.mark.parametrize(("progress", "total"), [(0.5, 800), (0.8, 500), (0, None)])
def test_the_bar_estimates_the_total_from_the_progress(progress, total):
    bar = SimpleNamespace(n=300, total=None, update=lambda n_bytes: None)
    encode.show(bar, encode.Batch(0, 0, [], {"train": 80, "val": 20}, progress))
    assert bar.total == total


# Resuming after a kill


@pytest.fixture
def small_steps(monkeypatch):
    """Many batches and segments in a small corpus."""
    monkeypatch.setattr("data.encode.BATCH_BYTES", 300)
    monkeypatch.setattr("data.encode.SEGMENT_BYTES", 1000)


@pytest.mark.parametrize(("texts", "tokenizer"), [(MANY, "char"), (["One long text, read in many pieces. " * 500], "bpe")])
def test_it_resumes_after_any_kill_to_identical_files(corpus, tmp_path, monkeypatch, small_steps, texts, tokenizer):
    monkeypatch.setattr("data.document.PIECE", 100)
    config = corpus(texts, tokenizer=tokenizer, vocab_size=270)
    straight = {name: content for name, (content, _) in files(prepare(config)).items()}
    assert len(straight) > 8
    monkeypatch.setenv("NANOHYDRA_DATA", str(tmp_path / "killed"))
    add, encoded = ShardWriter.add, 0

    def killed(writer, ids):
        nonlocal encoded
        encoded += 1
        if encoded % 9 == 0:  # more than a segment takes
            raise KeyboardInterrupt
        add(writer, ids)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", killed)
        kills, folder = 0, None
        while folder is None and kills < 1000:
            try:
                folder = prepare(config)
            except KeyboardInterrupt:
                kills += 1
    assert kills > 2
    assert {name: content for name, (content, _) in files(folder).items()} == straight
    assert encoded < 2.5 * len(straight) * 8  # complete segments were not encoded again


def killed_in_the_fourth_segment(config: DataConfig, monkeypatch) -> None:
    """Prepare until three segments are complete."""
    add = ShardWriter.add

    def killed(writer, ids):
        if writer.path.name.endswith("00003.npy"):
            raise KeyboardInterrupt
        add(writer, ids)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardWriter, "add", killed)
        prepare(config)


def test_complete_segments_are_not_encoded_again(corpus, monkeypatch, small_steps):
    config = corpus(MANY, tokenizer="bpe", vocab_size=270)
    killed_in_the_fourth_segment(config, monkeypatch)
    add = ShardWriter.add
    begun = []
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", lambda writer, ids: (begun.append(writer.path.name), add(writer, ids)))
        patch.setattr("data.prepare.make_tokenizer", lambda *args: pytest.fail("trained again"))
        prepare(config)
    assert min(begun) == "train_00003.npy"


PREPARING = """
import sys
import data.document, data.encode
from data.prepare import prepare
from data.config import DataConfig
from data.sources import Files
data.encode.BATCH_BYTES, data.encode.SEGMENT_BYTES = 2**12, 2**15
data.document.PIECE = 2**10
print(prepare(DataConfig("text", sys.argv[1], "bpe", 300, 0.1)))
"""


@pytest.mark.slow
def test_a_kill_loses_at_most_a_segment(tmp_path):
    book = tmp_path / "book.txt"
    draw = random.Random(1)
    book.write_text(" ".join("".join(draw.choices("etaoin shrdlu", k=draw.randint(1, 9))) for _ in range(150_000)))

    def start(place):
        return subprocess.Popen([sys.executable, "-c", PREPARING, book], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                cwd=ROOT, env=os.environ | {"NANOHYDRA_DATA": str(tmp_path / place)})
    began = time.monotonic()
    straight = Path(start("straight").communicate()[0].strip())
    seconds = time.monotonic() - began
    grown = [0]
    for _ in range(10):
        process = start("killed")
        time.sleep(seconds * draw.uniform(0.5, 1))
        process.kill()
        process.communicate()
        grown.append(len(list((tmp_path / "killed").rglob("train_*.npy"))))
    killed = Path(start("killed").communicate()[0].strip())
    assert grown == sorted(grown)
    assert {path.name: path.read_bytes() for path in killed.iterdir()} == {path.name: path.read_bytes() for path in straight.iterdir()}
    # A kill just after the last rename leaves the lock file, unlocked.
    assert [path.name for path in (tmp_path / "killed").iterdir() if not path.name.startswith(".lock-")] == [killed.name]


# Damaged tokens


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def replaced(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize("damage, words", [
    (lambda folder: os.truncate(folder / "train_00000.npy", 200), r"train_00000.npy has 200 bytes instead of [\d,]+: delete"),
    (lambda folder: damaged(folder / "val_00000.npy"), r"val_00000.npy was changed"),
    (lambda folder: (folder / "val_00000.npy").unlink(), r"val_00000.npy is missing: delete"),
    (lambda folder: replaced(folder / "meta.json", '"bytes": ', '"bytes": 1'), r"meta.json was changed: delete"),
    (lambda folder: (folder / "meta.json").write_text("{}"), r"meta.json cannot be read: delete"),
    (lambda folder: (folder / "meta.json").unlink(), r"meta.json cannot be read: delete"),
], ids=["truncated", "changed", "missing", "a number", "no meta", "meta gone"])
def test_damaged_tokens_are_named(corpus, damage, words):
    config = corpus(MANY)
    damage(folder := prepare(config))
    with pytest.raises(ValueError, match=words) as caught:
        prepare(config)
    assert str(folder) in str(caught.value)
    shutil.rmtree(folder)
    assert prepare(config) == folder


def test_the_meta_file_of_other_shards_is_refused(corpus):
    other = prepare(corpus([text.replace("t", "T") for text in FEW]))
    one = prepare(config := corpus(FEW))
    before = (one / "meta.json").read_text()
    shutil.copy(other / "meta.json", one / "meta.json")
    with pytest.raises(ValueError, match=r"meta.json describes other tokens \(sources is .* instead of .*\): delete"):
        prepare(config)
    meta = read_meta(one) | {key: value for key, value in json.loads(before).items() if key in ("sources", "format")}
    (one / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"_00000.npy was changed"):
        prepare(config)
    (one / "meta.json").write_text(json.dumps(json.loads(before) | {"fingerprint": "0"}))
    with pytest.raises(ValueError, match=r"meta.json was changed"):
        prepare(config)


@pytest.mark.parametrize("text, after", [("Another text of another length. " * 9, 1), ("", 1)])
def test_a_source_that_changes_meanwhile_is_refused(corpus, fresh_data, monkeypatch, text, after):
    config = corpus(FEW)
    make_tokenizer = data.prepare.make_tokenizer

    def meanwhile(*args):
        (Path(config.path) / "001.txt").write_text(text)
        return make_tokenizer(*args)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="changed while it was being read: run the command again"):
        patch.setattr("data.prepare.make_tokenizer", meanwhile)
        prepare(config)
    assert not any(fresh_data.iterdir())


@pytest.mark.parametrize("damage", [
    lambda partial: (partial / "tokenizer.json").write_text('{"kind": "byte"}'),
    lambda partial: (partial / "progress.json").write_text('{"a": 1}'),
    lambda partial: (partial / "progress.json").write_bytes(b"\xff"),
    lambda partial: (partial / "progress.json").write_text(json.dumps(json.loads((partial / "progress.json").read_text()) | {"segments": [1]})),
    lambda partial: damaged(partial / "train_00000.npy"),
    lambda partial: replaced(partial / "progress.json", '"bytes": ', '"bytes": 1'),
    lambda partial: (lambda saved: (partial / "progress.json").write_text(json.dumps(saved | {"segments": saved["segments"][1:]})))(
        json.loads((partial / "progress.json").read_text())),
], ids=["another tokenizer", "keys", "binary", "no segments", "changed", "a number", "first one gone"])
def test_damage_before_a_resume_is_repaired(corpus, tmp_path, monkeypatch, small_steps, damage):
    config = corpus(MANY, tokenizer="bpe", vocab_size=270)
    straight = {name: content for name, (content, _) in files(prepare(config)).items()}
    monkeypatch.setenv("NANOHYDRA_DATA", str(tmp_path / "killed"))
    killed_in_the_fourth_segment(config, monkeypatch)
    [partial] = (tmp_path / "killed").glob(".building-*")
    damage(partial)
    assert {name: content for name, (content, _) in files(prepare(config)).items()} == straight


def test_a_kill_before_the_last_rename_loses_nothing(corpus, monkeypatch):
    config = corpus(MANY)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("atomic.publish_folder", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(config)
    monkeypatch.setattr(ShardWriter, "add", lambda *args: pytest.fail("encoded again"))
    assert len(documents(prepare(config), "val")) > 0


def test_another_tokenizer_beside_the_tokens_is_refused(corpus):
    folder = prepare(corpus(MANY, tokenizer="bpe", vocab_size=270))
    other = prepare(corpus(MANY, tokenizer="bpe", vocab_size=271))
    shutil.copy(other / "tokenizer.json", folder / "tokenizer.json")
    names = [read_meta(one)["tokenizer_fingerprint"][:12] for one in (other, folder)]
    with pytest.raises(ValueError, match=rf"did not make the tokens beside it .*is {names[0]}, expected {names[1]}\)"):
        load_tokenizer(folder)


def test_a_full_disk_keeps_complete_segments(corpus, monkeypatch, small_steps):
    config = corpus(MANY)
    add = ShardWriter.add

    def full(writer, ids):
        if writer.path.name.endswith("00002.npy"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(writer, ids)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"is full \(No space left.*the same command resumes"):
        patch.setattr(ShardWriter, "add", full)
        prepare(config)
    assert len(list(Path(os.environ["NANOHYDRA_DATA"]).rglob("train_0000?.npy"))) == 2
    assert not list(Path(os.environ["NANOHYDRA_DATA"]).rglob(".partial*"))  # they would take free space
    assert len(documents(prepare(config), "train")) + len(documents(prepare(config), "val")) == len(MANY)


def test_a_read_only_folder_is_explained(corpus, monkeypatch):
    config = corpus(MANY)

    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), f"{os.environ['NANOHYDRA_DATA']}/x")

    monkeypatch.setattr("data.store.fill", refuse)
    with pytest.raises(OSError, match=r"is not writable \(Read-only file system\): set NANOHYDRA_DATA"):
        prepare(config)


def prepare_together(config: DataConfig, barrier, made) -> None:
    """Start when the other processes do, and count the builds."""
    build = data.prepare.build

    def slow(*args):
        made.release()
        time.sleep(0.5)  # the others come meanwhile
        build(*args)

    data.prepare.build = slow
    barrier.wait(timeout=60)
    prepare(config)


@pytest.mark.slow
def test_one_of_several_processes_prepares_the_tokens(corpus, fresh_data):
    context = multiprocessing.get_context("spawn")
    config, barrier, made = corpus(FEW), context.Barrier(4), context.Semaphore(0)
    processes = [context.Process(target=prepare_together, args=(config, barrier, made)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert made.get_value() == 1
    [folder] = fresh_data.iterdir()  # no leftovers
    assert folder == prepare(config)
    assert sorted(documents(folder, "train") + documents(folder, "val")) == sorted(FEW)


# The tokens of a checkpoint


def test_tokens_are_found_by_their_fingerprint(corpus):
    folder, other = prepare(corpus(MANY)), prepare(corpus(FEW))
    for one in (folder, other):
        assert find_prepared(read_meta(one)["fingerprint"][:12]) == one
    assert find_prepared("0" * 12) is None and find_prepared("") is None


@pytest.mark.parametrize("damage", [
    lambda folder: damaged(folder / "train_00000.npy"),
    lambda folder: (folder / "meta.json").write_text("[" * 100_000),
    lambda folder: folder.rename(folder.with_name(f".building-{folder.name}")),
], ids=["altered shard", "nested meta", "unfinished"])
def test_damaged_or_unfinished_tokens_are_not_found(corpus, damage):
    folder = prepare(corpus(MANY))
    fingerprint = read_meta(folder)["fingerprint"]
    damage(folder)
    assert find_prepared(fingerprint) is None
