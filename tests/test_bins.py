"""Token files of nanoGPT, llm.c and NumPy."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import numpy as np
import pytest

from data import bins
from data.bpe import BPETokenizer
from data.config import DataConfig
from data.prepare import describe, load_tokenizer, prepare
from data.shards import Tokens, read_meta
from data.tokenizer import CharTokenizer

TEXT = "It was the best of times, it was the worst of times. Žluťoučký kůň! " * 20


@pytest.fixture
def nanogpt(tmp_path):
    """A folder like the one that nanoGPT's data/shakespeare_char/prepare.py makes."""
    (tmp_path / "bins").mkdir()
    (tmp_path / "bins" / "input.txt").write_text(TEXT, encoding="utf-8")
    characters = sorted(set(TEXT))
    ids = np.array([characters.index(one) for one in TEXT], dtype=np.uint16)
    cut = int(len(TEXT) * 0.9)
    ids[:cut].tofile(tmp_path / "bins" / "train.bin")
    ids[cut:].tofile(tmp_path / "bins" / "val.bin")
    (tmp_path / "bins" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters)}))
    return tmp_path / "bins"


def llmc(path, ids, magic=20240520, version=1, dtype=np.uint16):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, dtype=dtype).tobytes())


def config(path, tokenizer="char"):
    return DataConfig("bin", str(path), tokenizer)


def everything(folder, split):
    tokens = Tokens.open(folder, split)
    return tokens.read(np.arange(len(tokens)))


def test_nanogpts_character_tokens_are_read(nanogpt, fresh_data):
    folder = prepare(config(nanogpt))
    tokenizer = load_tokenizer(folder)
    texts = [tokenizer.decode_bytes(everything(folder, split)).decode() for split in ("train", "val")]
    assert "".join(texts) == TEXT and len(texts[0]) == int(len(TEXT) * 0.9)
    train = read_meta(folder)["splits"]["train"]
    assert (train["tokens"], train["bytes"]) == (len(texts[0]), len(texts[0].encode()))
    assert {path.name for path in folder.iterdir()} == {"meta.json", "tokenizer.json"}  # nothing is copied
    assert f"vocabulary of {len(set(TEXT))}," in describe(folder)


def test_hidden_files_of_macos_are_not_read(nanogpt, fresh_data):
    before = prepare(config(nanogpt))
    for name in ("._train.bin", "._val.bin"):
        (nanogpt / name).write_bytes(b"Mac OS X")
    assert prepare(config(nanogpt)) == before


def test_nanogpts_gpt2_tokens_are_read(tmp_path, fresh_data, gpt2_files):
    gpt2 = BPETokenizer.published("gpt2")
    ids = [*gpt2.encode(TEXT), gpt2.end_of_text] * 3
    for name in ("train.bin", "val.bin"):
        np.array(ids, dtype=np.uint16).tofile(tmp_path / name)
    folder = prepare(config(tmp_path, "gpt2"))
    assert everything(folder, "train").tolist() == ids
    splits = read_meta(folder)["splits"]
    assert splits["val"]["documents"] == 3 and splits["val"]["bytes"] == 3 * len(TEXT.encode())


@pytest.mark.parametrize("magic, dtype", [(20240520, np.uint16), (20240801, np.uint32)])
def test_llmcs_shards_are_read_in_order(tmp_path, fresh_data, magic, dtype):
    for number in range(3):
        llmc(tmp_path / f"fineweb_train_{number:06d}.bin", range(10 * number, 10 * number + 10), magic, dtype=dtype)
    llmc(tmp_path / "fineweb_val_000000.bin", [7] * 20, magic, dtype=dtype)
    folder = prepare(config(tmp_path, "byte"))
    assert everything(folder, "train").tolist() == list(range(30)) and everything(folder, "val").tolist() == [7] * 20
    assert prepare(config(tmp_path / "fineweb*.bin", "byte")) == folder


def test_counts_are_those_of_all_shards_and_chunks(tmp_path, fresh_data, monkeypatch):
    monkeypatch.setattr("data.shards.CHUNK", 3)
    for number, ids in enumerate(([65, 66, 256, 67], [68, 256, 69, 70, 71])):
        llmc(tmp_path / f"train_{number}.bin", ids)
    llmc(tmp_path / "val.bin", [256, 65])
    splits = read_meta(prepare(config(tmp_path, "byte")))["splits"]
    assert splits["train"] == {"documents": 2, "bytes": 7, "tokens": 9, "bytes_per_token": 7 / 9}
    assert splits["val"] == {"documents": 1, "bytes": 1, "tokens": 2, "bytes_per_token": 0.5}


@pytest.mark.parametrize("one", [257, 300])
def test_an_id_beyond_the_vocabulary_is_named(tmp_path, fresh_data, monkeypatch, one):
    monkeypatch.setattr("data.shards.CHUNK", 4)
    llmc(tmp_path / "train.bin", [1, 2, 3, 4, 5, 6, one, 8])
    llmc(tmp_path / "val.bin", [1])
    with pytest.raises(ValueError, match=rf"train.bin has the id {one} \(token 6\), beyond the vocabulary of 257"):
        prepare(config(tmp_path, "byte"))


def test_a_trained_tokenizer_is_read_beside_its_tokens(tmp_path, fresh_data):
    folders = []
    for vocab_size in (270, 280):
        tokenizer = BPETokenizer.train(iter([TEXT]), vocab_size)
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.to_json()))
        for name in ("train.bin", "val.bin"):
            np.arange(260, dtype=np.uint16).tofile(tmp_path / name)
        folders.append(prepare(config(tmp_path, "bpe")))
        assert load_tokenizer(folders[-1]).ranks() == tokenizer.ranks()
    assert folders[0] != folders[1]  # the same ids are another text


def test_names_of_any_case_are_found(nanogpt, fresh_data):
    before = prepare(config(nanogpt))
    (nanogpt / "train.bin").rename(nanogpt / "Train.bin")
    assert prepare(config(nanogpt)) == before


def test_moved_files_keep_their_folder(nanogpt, tmp_path, fresh_data):
    before = prepare(config(nanogpt))
    nanogpt.rename(tmp_path / "moved")
    assert prepare(config(tmp_path / "moved")) == before
    assert len(everything(before, "train")) == int(len(TEXT) * 0.9)


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_other_tokens_have_another_folder(nanogpt, fresh_data, name):
    before = prepare(config(nanogpt))
    content = bytearray((nanogpt / name).read_bytes())
    content[0] ^= 1
    (nanogpt / name).write_bytes(content)
    assert prepare(config(nanogpt)) != before


@pytest.mark.parametrize("damage, words", [
    (lambda bins: (bins / "val.bin").unlink(), "has no .bin or .npy file with val in its name"),
    (shutil.rmtree, "does not exist: check the spelling"),
    (lambda bins: [path.unlink() for path in bins.glob("*.bin")], "train and none with val in its name"),
    (lambda bins: os.truncate(bins / "val.bin", 21), "val.bin has 21 bytes, no whole number of 16-bit tokens"),
    (lambda bins: llmc(bins / "val.bin", range(50)) or os.truncate(bins / "val.bin", 1100), "val.bin is truncated or damaged: its header says 50"),
    (lambda bins: np.array([1, 300], dtype=np.uint16).tofile(bins / "val.bin"), r"val.bin has the id 300 \(token 1\), beyond the vocabulary of"),
    (lambda bins: (bins / "input.txt").unlink(), "input.txt is missing: character tokens need their text"),
    (lambda bins: (bins / "val.bin").write_bytes(b""), r"val.bin is empty"),
    (lambda bins: llmc(bins / "val.bin", range(50), magic=int.from_bytes((20240520).to_bytes(4, "little"), "big") - 2**32), "big-endian byte order"),
    (lambda bins: (bins / "train_val.bin").write_bytes(b"abcd"), "train_val.bin is named for both splits"),
    (lambda bins: (bins / "input.txt").write_bytes(b"\xff"), "input.txt is not UTF-8"),
], ids=["no val", "no folder", "none", "odd", "cut", "beyond", "no text", "empty", "swapped", "both", "no utf-8"])
def test_unusable_files_are_explained(nanogpt, fresh_data, damage, words):
    damage(nanogpt)
    with pytest.raises(ValueError, match=words):
        prepare(config(nanogpt))
    assert not any(fresh_data.glob("*"))


def test_a_trained_tokenizer_must_be_beside_its_tokens(nanogpt, fresh_data):
    with pytest.raises(ValueError, match=r"tokenizer.json is missing: name the tokenizer"):
        prepare(config(nanogpt, "bpe"))


def test_split_names_are_whole_words(nanogpt, fresh_data):
    before = prepare(config(nanogpt))
    (nanogpt / "interval.bin").write_bytes(b"abc")
    (nanogpt / "trained.bin").write_bytes(b"abc")
    assert prepare(config(nanogpt)) == before


def test_files_of_only_end_of_text_are_refused(tmp_path, fresh_data):
    np.array([104, 105, 256, 104], dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.array([104], dtype=np.uint16).tofile(tmp_path / "val.bin")
    assert everything(prepare(config(tmp_path, "byte")), "val").tolist() == [104]
    np.array([256, 256], dtype=np.uint16).tofile(tmp_path / "val.bin")
    with pytest.raises(ValueError, match=r"val.bin has no text"):
        prepare(config(tmp_path, "byte"))


def test_the_settings_require_a_path():
    [problem] = DataConfig("bin").problems()
    assert problem.startswith("path is missing: name the folder where train.bin")
    [problem] = DataConfig(mix="bin:1 pydocs:1", path=".").problems()
    assert "bin has tokens" in problem


# Types of tokens


def some_ids(vocab_size, count=3000):
    return np.random.default_rng(0).integers(0, vocab_size, count)


def write_both(folder, ids, dtype):
    for name in ("train.bin", "val.bin"):
        ids.astype(dtype).tofile(folder / name)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int64"])
@pytest.mark.parametrize("asked", [False, True], ids=["detected", "named"])
def test_all_integer_types_are_read(tmp_path, fresh_data, dtype, asked):
    # All bytes are ids of a vocabulary of 256, so bytes are detected only for smaller ones.
    ids = some_ids(100 if dtype == "uint8" and not asked else 256)
    write_both(tmp_path, ids, dtype)
    (tmp_path / "input.txt").write_bytes(bytes(range(1, 101)))
    tokenizer = "char" if len(set(ids)) == 100 else "byte"
    folder = prepare(DataConfig("bin", str(tmp_path), tokenizer, dtype=dtype if asked else "auto"))
    assert everything(folder, "train").tolist() == ids.tolist()
    assert read_meta(folder)["splits"]["val"]["tokens"] == len(ids)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64"])
def test_gpt2_tokens_of_any_width_are_read(tmp_path, fresh_data, gpt2_files, dtype):
    ids = np.append(some_ids(50257), 50256)
    write_both(tmp_path, ids, dtype)
    assert everything(prepare(config(tmp_path, "gpt2")), "train").tolist() == ids.tolist()


def test_the_type_of_each_file_is_detected(tmp_path, fresh_data):
    some_ids(256).astype("uint16").tofile(tmp_path / "train.bin")
    some_ids(256).astype("uint32").tofile(tmp_path / "val.bin")
    folder = prepare(config(tmp_path, "byte"))
    assert everything(folder, "train").tolist() == everything(folder, "val").tolist() == some_ids(256).tolist()


def test_another_type_gives_other_tokens(tmp_path, fresh_data):
    write_both(tmp_path, some_ids(250), "uint32")
    right, wrong = prepare(config(tmp_path, "byte")), prepare(DataConfig("bin", str(tmp_path), "byte", dtype="uint16"))
    assert right != wrong and read_meta(right)["fingerprint"] != read_meta(wrong)["fingerprint"]
    assert len(everything(wrong, "train")) == 2 * len(everything(right, "train"))


@pytest.mark.parametrize("ids, dtype, words", [
    ([5, 0, 7, 0], "uint16", "train.bin is too short, or has too many zeros, to detect the type of its tokens: set data.dtype="),
    ([0] * 1000, "uint16", "train.bin is too short, or has too many zeros"),
    (some_ids(257) + 256, "uint16", r"train.bin has the id \d+ \(token \d+\), beyond the vocabulary of 257"),
    (some_ids(257), ">u2", "train.bin was written in big-endian byte order"),
    (some_ids(257), ">u4", "train.bin (was written in big-endian byte order|is too short|has the id)"),
    (np.r_[some_ids(256), 70_000], "uint32", "train.bin (is too short, or has too many zeros|has the id)"),
    (np.linspace(0, 1, 1000), "float32", "train.bin has the id"),
], ids=["few", "zeros", "beyond", "swapped 16", "swapped 32", "beyond 32", "floats"])
def test_an_ambiguous_type_is_never_guessed(tmp_path, fresh_data, ids, dtype, words):
    write_both(tmp_path, np.array(ids), dtype)
    with pytest.raises(ValueError, match=words):
        prepare(config(tmp_path, "byte"))


@pytest.mark.parametrize("dtype, words", [
    ("int32", r"has the id -1 \(token 3000\), beyond the vocabulary"), ("int16", r"has the id -1 \(token 3000\)"),
    ("uint64", "has the id 18446744073709551615")])
def test_a_negative_id_is_named(tmp_path, fresh_data, dtype, words):
    write_both(tmp_path, np.append(some_ids(256), -1), dtype)
    with pytest.raises(ValueError, match=words):
        prepare(DataConfig("bin", str(tmp_path), "byte", dtype=dtype))


@pytest.mark.parametrize("write", [lambda path, ids: llmc(path, ids), lambda path, ids: np.array(ids, "<u2").tofile(path)])
def test_a_large_vocabulary_needs_wider_tokens(tmp_path, monkeypatch, fresh_data, write):
    large = CharTokenizer("".join(map(chr, [*range(0xD800), *range(0xE000, 0x20000)])), with_end_of_text=False)
    monkeypatch.setattr("data.bins.tokenizer_of", lambda folder, name: large)
    for name in ("train.bin", "val.bin"):
        write(tmp_path / name, range(1, 3001))
    with pytest.raises(ValueError, match=r"train.bin (has uint16 tokens, too small for a vocabulary of 129,024|has the id)"):
        prepare(config(tmp_path, "char"))
    write_both(tmp_path, ids := some_ids(100_000), "uint32")
    assert everything(prepare(config(tmp_path, "char")), "train").tolist() == ids.tolist()


# NumPy's files


@pytest.mark.parametrize("dtype", ["uint8", "<u2", ">i8"])
def test_numpy_files_are_read_by_their_header(tmp_path, fresh_data, dtype):
    ids = some_ids(256, 30)
    for number in range(2):
        np.save(tmp_path / f"fineweb_train_{number:06d}.npy", ids.astype(dtype))
    np.save(tmp_path / "fineweb_val_000000.npy", ids[:5].astype(dtype))
    folder = prepare(config(tmp_path, "byte"))
    assert everything(folder, "train").tolist() == [*ids.tolist()] * 2 and everything(folder, "val").tolist() == ids[:5].tolist()
    for path in tmp_path.glob("*.npy"):
        path.rename(path.with_suffix(".bin"))
    assert prepare(config(tmp_path, "byte")) == folder


@pytest.mark.parametrize("array, words", [
    (np.zeros((2, 3), np.uint16), r"is an array of uint16 with shape \(2, 3\)"), (np.zeros(3), "is an array of float64"),
    (np.zeros(3, bool), "is an array of bool"), (np.array([{}], dtype=object), "cannot be read as a NumPy file"),
    (np.zeros(0, np.uint16), "cannot be read as a NumPy file|is empty")])
def test_numpy_files_without_tokens_are_refused(tmp_path, fresh_data, array, words):
    for name in ("train.npy", "val.npy"):
        np.save(tmp_path / name, array, allow_pickle=True)
    with pytest.raises(ValueError, match=rf"train.npy ({words})"):
        prepare(config(tmp_path, "byte"))


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content + b"x", lambda content: b"x" + content,
                                    lambda content: content[:20], lambda content: content[:10] + b"{(" * 30 + content[70:]])
def test_a_damaged_numpy_file_is_explained(tmp_path, fresh_data, damage):
    for name in ("train.npy", "val.npy"):
        np.save(tmp_path / name, some_ids(256).astype(np.uint16))
    (tmp_path / "val.npy").write_bytes(damage((tmp_path / "val.npy").read_bytes()))
    with pytest.raises(ValueError, match=r"val.npy (cannot be read as a NumPy file|is damaged|is not a NumPy file)") as caught:
        prepare(config(tmp_path, "byte"))
    assert "\n" not in str(caught.value)


def test_a_file_that_changes_while_it_is_read_is_explained(tmp_path, fresh_data, monkeypatch):
    for name in ("train.npy", "val.npy"):
        np.save(tmp_path / name, some_ids(256).astype(np.uint16))
    hash_files = bins.sha256_of
    monkeypatch.setattr(bins, "sha256_of", lambda paths: [hash_files(paths), os.truncate(tmp_path / "val.npy", 200)][0])
    with pytest.raises(ValueError, match=r"val\.npy changed while it was read: run the command again"):
        prepare(config(tmp_path, "byte"))


def test_an_unknown_header_is_not_read_as_tokens(tmp_path, fresh_data, gpt2_files):
    for name in ("train.bin", "val.bin"):
        llmc(tmp_path / name, some_ids(50257, 900), magic=1234)
    with pytest.raises(ValueError, match=r"train.bin seems to start with the header of another program"):
        prepare(config(tmp_path, "gpt2"))
    assert describe(prepare(DataConfig("bin", str(tmp_path), "gpt2", dtype="uint16")))


def test_a_numpy_file_of_an_impossible_size_is_explained(tmp_path, fresh_data):
    header = b"{'descr':'<u2','fortran_order':False,'shape':(" + b"9" * 30 + b",)}"
    for name in ("train.npy", "val.npy"):
        (tmp_path / name).write_bytes(b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(0x75) + b"\n")
    with pytest.raises(ValueError, match=r"train.npy cannot be read as a NumPy file"):
        prepare(config(tmp_path, "byte"))


def test_dtype_must_not_contradict_a_header(tmp_path, fresh_data):
    for name in ("train.npy", "val.npy"):
        np.save(tmp_path / name, some_ids(256).astype(np.uint16))
    with pytest.raises(ValueError, match=r"train.npy has uint16 tokens according to its header: remove data.dtype=uint32"):
        prepare(DataConfig("bin", str(tmp_path), "byte", dtype="uint32"))


# Unsupported files


def test_megatron_files_are_refused(tmp_path, fresh_data):
    for split in ("train", "val"):
        some_ids(256).astype(np.int32).tofile(tmp_path / f"{split}_text_document.bin")
        (tmp_path / f"{split}_text_document.idx").write_bytes(b"MMIDIDX\0\0")
    with pytest.raises(ValueError, match=r"train_text_document.bin is in Megatron-LM's format"):
        prepare(config(tmp_path, "byte"))


def test_both_endings_for_one_split_are_refused(nanogpt, fresh_data):
    np.save(nanogpt / "train.npy", some_ids(10).astype(np.uint16))
    with pytest.raises(ValueError, match=r"has both .bin and .npy files for train, which might hold the same tokens"):
        prepare(config(nanogpt))


@pytest.mark.parametrize("name", ["val.bin", "validation_0.BIN", "val_proc.bin"])
def test_a_pipe_among_tokens_does_not_hang(nanogpt, fresh_data, name):
    (nanogpt / "val.bin").unlink()
    if "proc" in name:
        (nanogpt / name).symlink_to("/proc/version")
    else:
        os.mkfifo(nanogpt / name)
    with pytest.raises(ValueError, match=f"{name} is not a regular file"):
        prepare(config(nanogpt))


def test_text_is_not_taken_for_tokens(tmp_path, fresh_data, gpt2_files):
    (tmp_path / "train.bin").write_text("to be, or not to be\n" * 100)
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "val.bin")
    with pytest.raises(ValueError, match=r"train.bin is text, not tokens.*data=text"):
        prepare(config(tmp_path, "gpt2"))
