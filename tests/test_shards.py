"""The format on disk: shards of tokens, read as one sequence."""

import pickle
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.shards import ShardWriter, Tokens, token_dtype


def write_shards(folder: Path, documents: list[list[int]], shard_tokens: int, vocab_size: int = 1000) -> list[Path]:
    writer = ShardWriter(folder, "train", vocab_size, shard_tokens)
    for ids in documents:
        writer.add(ids)
    writer.close()
    assert writer.n_tokens == sum(map(len, documents))
    return sorted(folder.iterdir())


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_tokens_take_two_bytes_where_the_vocabulary_allows(tmp_path, vocab_size, dtype):
    assert token_dtype(vocab_size) is dtype
    [path] = write_shards(tmp_path, [[0, vocab_size - 1]], shard_tokens=10, vocab_size=vocab_size)
    assert np.load(path).dtype == dtype
    assert Tokens.open(tmp_path, "train").read(np.arange(2)).tolist() == [0, vocab_size - 1]


def test_an_id_beyond_the_vocabularys_type_is_refused_not_wrapped(tmp_path):
    with pytest.raises(OverflowError):
        write_shards(tmp_path, [[65_536]], shard_tokens=10)


@given(documents=st.lists(st.lists(st.integers(0, 999), max_size=25), max_size=8), shard_tokens=st.integers(1, 12))
def test_reading_across_shards_equals_the_concatenation(documents, shard_tokens):
    expected = np.array(list(chain(*documents)), dtype=np.int64)
    with TemporaryDirectory() as folder:
        paths = write_shards(Path(folder), documents, shard_tokens)
        sizes = [len(np.load(path)) for path in paths]
        assert sizes[:-1] == [shard_tokens] * (len(sizes) - 1) and all(0 < size <= shard_tokens for size in sizes)

        tokens = Tokens.open(Path(folder), "train")
        assert len(tokens) == len(expected)
        everything = np.arange(len(expected))
        scattered = np.random.default_rng(0).permutation(np.tile(everything, 2)).reshape(2, -1)
        for positions in (everything, everything[::-1], scattered):
            read = tokens.read(positions)
            assert read.dtype == np.int64 and read.shape == positions.shape
            assert np.array_equal(read, expected[positions])


def test_a_split_reads_its_own_shards_only(tmp_path):
    for split, ids in (("train", [1, 2, 3]), ("val", [4, 5])):
        writer = ShardWriter(tmp_path, split, 257, shard_tokens=2)
        writer.add(ids)
        writer.close()
    assert Tokens.open(tmp_path, "train").read(np.arange(3)).tolist() == [1, 2, 3]
    assert Tokens.open(tmp_path, "val").read(np.arange(2)).tolist() == [4, 5]


def test_a_split_without_tokens_is_empty(tmp_path):
    assert write_shards(tmp_path, [[]], shard_tokens=10) == []
    assert len(Tokens.open(tmp_path, "train")) == 0


def test_shards_are_read_only_memory_maps(tmp_path):
    write_shards(tmp_path, [[1, 2, 3]], shard_tokens=2)
    shards = Tokens.open(tmp_path, "train").shards
    assert len(shards) == 2
    assert all(isinstance(shard, np.memmap) and not shard.flags.writeable for shard in shards)


class Bomb:
    """Unpickling it touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_loaded(tmp_path):
    """Neither an array of objects nor a bare pickle under the name of a shard."""
    for name in ("array", "bare"):
        (tmp_path / name).mkdir()
    np.save(tmp_path / "array" / "train_00000.npy", np.array([Bomb(tmp_path / "went off")], dtype=object))
    (tmp_path / "bare" / "train_00000.npy").write_bytes(pickle.dumps(Bomb(tmp_path / "went off")))
    for name in ("array", "bare"):
        with pytest.raises(ValueError):
            Tokens.open(tmp_path / name, "train")
    assert not (tmp_path / "went off").exists()
