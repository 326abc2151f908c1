"""The format of prepared tokens: shards that are read as one sequence."""

import hashlib
import json
import os
import pickle
import shutil
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.shards import ShardWriter, Tokens, check, read_meta, write_meta


def write_shards(folder: Path, arrays: list[list[int]], split: str = "train", vocab_size: int = 1000) -> list[Path]:
    """A shard an array, and a `meta.json` that says so."""
    shards = []
    for number, ids in enumerate(arrays):
        writer = ShardWriter(folder / f"{split}_{number:05d}.npy", vocab_size)
        for start in range(0, len(ids), 7):
            writer.add(np.array(ids[start : start + 7], dtype=np.uint32))
        shards += writer.close()
    part = {"train": {"shards": []}, "val": {"shards": []}} | {split: {"shards": shards}}
    write_meta(folder, {}, "a tokenizer", vocab_size, {"splits": {"train": {}, "val": {}}, "parts": [part]})
    return sorted(folder.glob("*.npy"))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_tokens_take_two_bytes_if_the_vocabulary_allows(tmp_path, vocab_size, dtype):
    assert ShardWriter(Path(), vocab_size).dtype == dtype
    [path] = write_shards(tmp_path, [[0, vocab_size - 1]], vocab_size=vocab_size)
    assert np.load(path).dtype == dtype
    assert Tokens.open(tmp_path, "train").read(np.arange(2)).tolist() == [0, vocab_size - 1]


@pytest.mark.parametrize("one", [1000, 65_536 + 7])
def test_an_id_beyond_the_vocabulary_is_refused(tmp_path, one):
    with pytest.raises(ValueError, match=f"the id {one} is not below 1000"):
        write_shards(tmp_path, [[1, one]])


@settings(max_examples=20)  # each writes files
@given(arrays=st.lists(st.lists(st.integers(0, 999), max_size=25), max_size=8))
def test_reading_across_shards_equals_the_concatenation(arrays):
    expected = np.array(list(chain(*arrays)), dtype=np.int64)
    with TemporaryDirectory() as folder:
        paths = write_shards(Path(folder), arrays)
        assert [np.load(path).tolist() for path in paths] == [array for array in arrays if array]

        tokens = Tokens.open(Path(folder), "train")
        assert len(tokens) == len(expected)
        everything = np.arange(len(expected))
        scattered = np.random.default_rng(0).permutation(np.tile(everything, 2)).reshape(2, -1)
        for positions in (everything, everything[::-1], scattered):
            read = tokens.read(positions)
            assert read.dtype == np.int64 and read.shape == positions.shape
            assert np.array_equal(read, expected[positions])


def test_a_split_without_tokens_is_empty(tmp_path):
    assert write_shards(tmp_path, [[]]) == []
    assert len(Tokens.open(tmp_path, "train")) == 0


def test_shards_are_read_only_memory_maps(tmp_path):
    write_shards(tmp_path, [[1, 2], [3]])
    shards = Tokens.open(tmp_path, "train").shards
    assert len(shards) == 2
    assert all(isinstance(shard, np.memmap) and not shard.flags.writeable for shard in shards)


def test_a_shard_has_its_name_only_when_it_is_complete(tmp_path):
    writer = ShardWriter(tmp_path / "train_00000.npy", 1000)
    writer.add(np.arange(10))
    assert not list(tmp_path.glob("*.npy"))
    [shard] = writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["train_00000.npy"]
    assert shard["sha256"] == hashlib.sha256((tmp_path / "train_00000.npy").read_bytes()).hexdigest() and shard["tokens"] == 10


def test_the_fingerprint_depends_on_shards_and_tokenizer(tmp_path):
    """And on nothing else, such as their place or source."""
    def fingerprint(made_with="x", train="a", val="b", second="c", place="train_00000.npy", source="pydocs"):
        def part(*sums):
            return {split: {"shards": [{"file": place, "sha256": one, "offset": 0, "tokens": 0, "dtype": "uint16"}]} for split, one in zip(("train", "val"), sums, strict=True)}

        write_meta(tmp_path, {"source": source}, made_with, 1000, {"splits": {"train": {}, "val": {}}, "parts": [part(train, val), part(second, "d")]})
        return read_meta(tmp_path)["fingerprint"]

    changed = [fingerprint(**{name: "other"}) for name in ("made_with", "train", "val", "second")]
    assert len({fingerprint(), *changed}) == 5
    assert fingerprint(place="/elsewhere/train.bin", source="other") == fingerprint()


class Bomb:
    """Unpickling it touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_loaded(tmp_path):
    """Neither an array of objects nor a bare pickle, even with the size that `meta.json` states."""
    for name in ("array", "bare"):
        (tmp_path / name).mkdir()
        [path] = write_shards(tmp_path / name, [[1, 2, 3]])
        if name == "array":
            np.save(path, np.array([Bomb(tmp_path / "went off")], dtype=object))
        else:
            path.write_bytes(pickle.dumps(Bomb(tmp_path / "went off")))
        with pytest.raises(ValueError, match=r"has .* bytes instead of"):
            Tokens.open(tmp_path / name, "train")
        path.write_bytes(path.read_bytes().ljust(134)[:134])
        with pytest.raises(ValueError, match="was changed"):
            check(tmp_path / name, {})
    assert not (tmp_path / "went off").exists()


@pytest.mark.parametrize("field, value", [
    ("tokens", "3"), ("tokens", -1), ("tokens", 1e30), ("tokens", True), ("offset", None), ("dtype", "O"),
    ("dtype", "nonsense"), ("file", 3), ("sha256", None),
])
def test_a_field_of_a_wrong_type_is_a_damaged_meta_file(tmp_path, field, value):
    write_shards(tmp_path, [[1, 2, 3]])
    meta = json.loads((tmp_path / "meta.json").read_text())
    meta["parts"][0]["train"]["shards"][0][field] = value
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"meta\.json cannot be read: delete"):
        check(tmp_path, {})


def test_a_meta_file_without_permissions_is_not_damaged(tmp_path, monkeypatch):
    write_shards(tmp_path, [[1, 2, 3]])

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(PermissionError, match=r"meta\.json"):
        check(tmp_path, {})


@pytest.mark.parametrize("change, refused", [
    (lambda path: path.write_bytes(path.read_bytes()[:-2]), True),
    (lambda path: path.write_bytes(path.read_bytes() + b"xx"), True),
    (lambda path: path.write_bytes(path.read_bytes()[:-2] + b"\xff\xff"), True),
    (lambda path: path.touch(), False),
    (lambda path: path.write_bytes(path.read_bytes()), False),
    (lambda path: path.unlink(), False),
    (lambda path: os.replace(shutil.copy(path.parent / "meta.json", path.parent / "copy"), path), False),
], ids=["cut short", "longer", "altered", "touched", "written again", "deleted", "replaced"])
def test_a_shard_that_is_overwritten_while_open_is_named(tmp_path, change, refused):
    """Reading it could give ids beyond the vocabulary or, if it is shorter now, kill the process."""
    [path] = write_shards(tmp_path, [[1, 2, 3]])
    os.utime(path, (1, 1))
    tokens = Tokens.open(tmp_path, "train")
    change(path)
    for _ in range(2):
        if refused:
            with pytest.raises(ValueError, match=f"{path.name} was overwritten while it was being read"):
                tokens.read(np.array([0, 2]))
        else:
            assert tokens.read(np.array([0, 2])).tolist() == [1, 3]
