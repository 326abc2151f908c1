"""Batches as a pure function of (seed, step, micro-step, rank)."""

import math
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from data.config import DataConfig
from data.loader import Loader, Prefetch, Validation, mix, permute
from data.prepare import prepare
from data.shards import Tokens


def positions(n_tokens: int) -> Tokens:
    """A split in which each token is its own position."""
    return Tokens([np.arange(n_tokens, dtype=np.uint32)])


def endless(n_tokens: int) -> Tokens:
    """A split of any length without memory."""
    return Tokens([np.broadcast_to(np.uint16(7), n_tokens)])


def epochs(loader: Loader, n_epochs: int) -> torch.Tensor:
    """The inputs of the first epochs, `[n_epochs, n_windows, block_size]`."""
    n_steps = -(-n_epochs * loader.parts[0].count // loader.batch_size)
    windows = torch.cat([loader.batch(step)[0] for step in range(n_steps)])[:n_epochs * loader.parts[0].count]
    return windows.view(n_epochs, loader.parts[0].count, loader.block_size)


SHAPES = [(1000, 8, 124), (257, 1, 10), (65, 64, 3), (129, 64, 5), (1001, 7, 31), (514, 16, 32), (513, 16, 32)]
shapes = pytest.mark.parametrize(("n_tokens", "block_size", "batch_size"), SHAPES)


# The permutation


def keys(number: int, count: int) -> np.ndarray:
    return np.full(count, mix(np.array([number], dtype=np.uint64)))


@pytest.mark.parametrize("number", [0, 2**63])
def test_permute_permutes(number):
    for n in [*range(1, 70), 255, 256, 257, 300]:
        assert sorted(permute(np.arange(n), n, keys(number, n))) == list(range(n)), n


@pytest.mark.parametrize("n", [2**20 + 1, 10**12, 2**40])
def test_permute_stays_in_range_for_large_n(n):
    scattered = np.random.default_rng(0).integers(0, n, 2000)
    index = np.unique(np.concatenate([np.arange(1000), np.arange(n - 1000, n), scattered]))
    result = permute(index, n, keys(3, len(index)))
    assert result.dtype == np.int64 and result.min() >= 0 and result.max() < n
    assert len(np.unique(result)) == len(index)
    assert n // 3 < result.mean() < 2 * n // 3  # spread over the range


def test_permute_depends_on_its_keys():
    orders = {tuple(permute(np.arange(100), 100, keys(number, 100))) for number in range(50)}
    assert len(orders) == 50


def test_permute_uses_the_key_of_each_element():
    index, mixed = np.arange(100), np.where(np.arange(100) % 2, keys(1, 100), keys(2, 100))
    expected = np.where(index % 2, permute(index, 100, keys(1, 100)), permute(index, 100, keys(2, 100)))
    assert np.array_equal(permute(index, 100, mixed), expected)


def test_permute_sends_each_index_everywhere():
    """With 5,000 keys, each of 10 places is hit 500 times, within 5 sigma."""
    index = np.tile(np.arange(10), 5000)
    counts = np.zeros((10, 10), dtype=int)
    np.add.at(counts, (index, permute(index, 10, mix(np.repeat(np.arange(5000, dtype=np.uint64), 10)))), 1)
    assert abs(counts - 500).max() < 5 * 500**0.5


# Training batches


def test_the_order_is_frozen():
    """Another order would change the batches of resumed runs."""
    loader = Loader([positions(1000)], block_size=8, batch_size=4, seed=0)
    starts = {step: loader.batch(step)[0][:, 0].tolist() for step in (0, 7, 100, 10**9)}
    assert starts == {0: [549, 437, 357, 29], 7: [61, 901, 517, 965], 100: [562, 154, 458, 938], 10**9: [964, 660, 788, 244]}
    assert Loader([positions(1000)], 8, 4, seed=1337).batch(0)[0][:, 0].tolist() == [496, 256, 264, 512]


def test_a_batch_is_a_pure_function_of_seed_and_step():
    """The same in a new loader, in any order, and independent of other random numbers."""
    loader = Loader([positions(1000)], 8, 4, seed=5)
    first = [loader.batch(step) for step in range(40)]
    torch.manual_seed(99)
    np.random.seed(99)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    for step in (39, 0, 17, 17, 3):
        for again in (loader, Loader([positions(1000)], 8, 4, seed=5)):
            assert all(map(torch.equal, again.batch(step), first[step]))
    assert torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(np.random.get_state()[1], states[1])


def test_a_batch_has_the_shape_and_dtype_of_a_model_input():
    loader = Loader([positions(1000)], block_size=8, batch_size=4, micro_steps=3, world_size=2)
    for part in loader.batch(0, micro_step=2, rank=1):
        assert part.shape == (4, 8) and part.dtype == torch.int64
    assert loader.tokens_per_step == 4 * 8 * 3 * 2


@shapes
def test_targets_are_the_next_tokens(n_tokens, block_size, batch_size):
    """The split is read as a ring: the first token follows the last."""
    loader = Loader([positions(n_tokens)], block_size, batch_size)
    for step in range(20):
        inputs, targets = loader.batch(step)
        assert torch.equal(targets, (inputs + 1) % n_tokens)
        assert torch.equal(inputs, (inputs[:, :1] + torch.arange(block_size)) % n_tokens)


@shapes
def test_every_window_is_read_once_an_epoch(n_tokens, block_size, batch_size):
    """Also if batches straddle epochs. The windows of an epoch are adjacent and do not overlap."""
    loader = Loader([positions(n_tokens)], block_size, batch_size, seed=2)
    assert loader.parts[0].count == (n_tokens - 1) // block_size
    for epoch in epochs(loader, 5):
        assert epoch.unique().numel() == epoch.numel()
        starts = epoch[:, 0].sort().values
        assert torch.equal(starts, starts[0] + torch.arange(loader.parts[0].count) * block_size)


def test_each_epoch_has_its_own_cut_and_order():
    starts = epochs(Loader([positions(1000)], 8, 124), 40)[:, :, 0]
    assert len(set((starts.min(dim=1).values).tolist())) == 8  # every offset within a block occurs
    assert len({tuple((one // 8).tolist()) for one in starts}) == 40


def test_another_seed_gives_another_order():
    orders = {tuple(epochs(Loader([positions(1000)], 8, 124, seed=seed), 1)[0, :, 0].tolist()) for seed in range(20)}
    assert len(orders) == 20


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_read_contiguous_pieces_of_the_same_step(world_size, mixed):
    """Micro-step m of rank r is micro-step r * micro_steps + m of one rank."""
    tokens = [positions(1000), positions(400)] if mixed else [positions(1000)]
    alone = Loader(tokens, 8, 2, micro_steps=8, seed=3)
    loader = Loader(tokens, 8, 2, 8 // world_size, seed=3, world_size=world_size)
    assert loader.tokens_per_step == alone.tokens_per_step == 128
    for step in (0, 1, 7, 200):  # step 7 straddles two epochs
        read = [loader.batch(step, micro_step, rank) for rank in range(world_size) for micro_step in range(8 // world_size)]
        for micro_step, batch in enumerate(read):
            assert all(map(torch.equal, batch, alone.batch(step, micro_step)))
        assert loader.sequences(step) == torch.cat([inputs[:, 0] for inputs, _ in read]).tolist()


@pytest.mark.parametrize(("batch_size", "micro_steps"), [(4, 2), (1, 8)])
def test_the_batch_size_does_not_change_a_steps_sequences(batch_size, micro_steps):
    whole, split = Loader([positions(1000)], 8, 8), Loader([positions(1000)], 8, batch_size, micro_steps)
    for step in (0, 15):
        parts = [split.batch(step, micro_step)[0] for micro_step in range(micro_steps)]
        assert torch.equal(torch.cat(parts), whole.batch(step)[0])


def test_a_huge_split_takes_no_memory_and_no_time():
    """There is no list of windows: 10^12 tokens are as easy as 10^3."""
    # What the first batch imports does not count.
    Loader([endless(10**3)], block_size=8, batch_size=4).batch(0)
    tracemalloc.start()
    loader = Loader([endless(10**12)], block_size=8, batch_size=64)
    starts = loader.parts[0].shuffled(np.arange(10**6, 10**6 + 64))
    inputs, _ = loader.batch(10**6)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 200_000
    assert inputs.eq(7).all() and len(np.unique(starts)) == 64 and starts.max() > 10**11


@pytest.mark.parametrize("n_tokens", [0, 64])
def test_a_split_shorter_than_a_context_is_an_error(n_tokens):
    tokens = positions(n_tokens) if n_tokens else Tokens([])
    with pytest.raises(ValueError, match=f"training split has {n_tokens} tokens, one context needs 65"):
        Loader([tokens], block_size=64, batch_size=1)
    with pytest.raises(ValueError, match=f"validation split has {n_tokens} tokens, one context needs 65.*val_fraction"):
        Validation([tokens], block_size=64, batch_size=1, max_tokens=10**6)


# Mixtures


def parts(loader: Loader, n_sequences: int) -> list[int]:
    """The parts of the first sequences; their tokens are a thousand apart."""
    n_steps = -(-n_sequences // loader.batch_size)
    return (torch.cat([loader.batch(step)[0][:, 0] for step in range(n_steps)])[:n_sequences] // 1000).tolist()


def three_parts(seed: int = 0, batch_size: int = 4, **rest) -> Loader:
    tokens = [Tokens([np.arange(1000 * part, 1000 * part + size, dtype=np.uint32)]) for part, size in enumerate((1000, 100, 500))]
    return Loader(tokens, 8, batch_size, seed=seed, weights=[6, 1, 3], **rest)


def test_the_parts_of_a_mixture_alternate_by_weight():
    source = np.array(parts(three_parts(), 400))
    for length in (1, 7, 10, 33, 100):
        for start in range(0, 400 - length):
            counts = np.bincount(source[start : start + length], minlength=3)
            assert abs(counts - length * np.array([0.6, 0.1, 0.3])).max() < 2


def test_each_part_of_a_mixture_has_its_own_epochs():
    """The second part, 12 windows of 8, is read once in 120 sequences."""
    loader = three_parts(batch_size=10)
    for epoch in range(3):
        read = torch.cat([loader.batch(step)[0] for step in range(12 * epoch, 12 * epoch + 12)]).flatten()
        mine = read[read // 1000 == 1]
        assert len(mine) == mine.unique().numel() == 96
    assert loader.steps_an_epoch() == pytest.approx([124 / 6, 12 / 1, 62 / 3])


def test_a_mixed_batch_is_a_pure_function_of_seed_and_step():
    first = [three_parts().batch(step)[0] for step in range(30)]
    for step in (29, 3, 3):
        assert torch.equal(three_parts().batch(step)[0], first[step])
    assert not torch.equal(three_parts(seed=1).batch(0)[0], first[0])


def test_the_order_of_a_mixture_is_frozen():
    assert three_parts().batch(0)[0][:, 0].tolist() == [549, 437, 2047, 357]
    assert three_parts().batch(100)[0][:, 0].tolist() == [644, 804, 2395, 572]


def test_mixed_sequences_start_in_their_own_parts():
    loader = three_parts(batch_size=10)
    starts = loader.batch(3)[0][:, 0]
    assert loader.sequences(3) == (starts % 1000).tolist() and len(set((starts // 1000).tolist())) == 3


def test_a_short_part_of_a_mixture_is_named():
    for part, tokens in ((2, [positions(100), positions(8)]), (1, [positions(8), positions(100)])):
        with pytest.raises(ValueError, match=f"training split of part {part} of the mixture has 8 tokens, one context needs 9"):
            Loader(tokens, block_size=8, batch_size=1)
        with pytest.raises(ValueError, match=f"validation split of part {part} of the mixture has 8 tokens, one context needs 9"):
            Validation(tokens, block_size=8, batch_size=1, max_tokens=100)


def test_mixed_validation_weighs_parts_by_their_shares():
    tokens = [Tokens([np.full(size, part, dtype=np.uint32)]) for part, size in enumerate((10_000, 100))]
    batches = list(Validation(tokens, block_size=8, batch_size=16, max_tokens=800, weights=[1, 3]))
    mean = sum(inputs.float().mean().item() * weight for inputs, _, weight in batches)
    assert mean == pytest.approx(0.75) and sum(len(inputs) for inputs, _, _ in batches) == 25 + 12


# Validation windows


@pytest.mark.parametrize(("n_tokens", "max_tokens", "sizes"), [
    (1000, 10**6, [50, 50, 24]),  # 124 windows of 8 and the last token's target
    (801, 10**6, [50, 50]),
    (800, 10**6, [50, 49]),  # the hundredth window would have no last target
    (1000, 400, [50]),
    (1000, 409, [50, 1]),
    (1000, 415, [50, 1]),
    (1000, 3, [1]),  # less than a context: still one window
    (9, 10**6, [1]),
])
def test_validation_reads_max_tokens_in_order(n_tokens, max_tokens, sizes):
    validation = Validation([positions(n_tokens)], block_size=8, batch_size=50, max_tokens=max_tokens)
    for _ in range(2):  # the same at every evaluation
        batches = list(validation)
        assert [len(inputs) for inputs, _, _ in batches] == sizes
        assert [weight for _, _, weight in batches] == pytest.approx([size / sum(sizes) for size in sizes])
        inputs, targets = (torch.cat(parts) for parts in list(zip(*batches, strict=True))[:2])
        assert torch.equal(inputs.flatten(), torch.arange(sum(sizes) * 8))
        assert torch.equal(targets, inputs + 1)
        assert inputs.dtype == targets.dtype == torch.int64


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_validation_batches(world_size):
    tokens = [positions(801), positions(200)]
    options = {"block_size": 8, "batch_size": 16, "max_tokens": 10**6, "weights": [1, 3]}
    alone = list(Validation(tokens, **options))
    assert len(alone) == 9
    for rank in range(world_size):
        shared = list(Validation(tokens, **options, rank=rank, world_size=world_size))
        own = alone[rank::world_size]
        for (*batch, weight), (*expected, expected_weight) in zip(shared, own, strict=False):
            assert all(map(torch.equal, batch, expected)) and weight == expected_weight
        # All ranks have equally many.
        assert [weight for *_, weight in shared[len(own):]] == [0] * (math.ceil(9 / world_size) - len(own))


def test_shakespeare_has_1742_validation_windows(shakespeare):
    folder = prepare(DataConfig(source="shakespeare", path=str(shakespeare), tokenizer="char"))
    validation = Validation([Tokens.open(folder, "val")], block_size=64, batch_size=1000, max_tokens=10**9)
    assert [len(inputs) for inputs, _, _ in validation] == [1000, 742]


# Prefetching


@pytest.fixture
def pretend_gpu(monkeypatch):
    """A "cuda" device in this machine's memory, and the list of tensors in pinned memory."""
    def pin(ids):
        pinned.append(torch.empty_strided(ids.shape, ids.stride(), dtype=ids.dtype).copy_(ids))  # keeps the strides
        return pinned[-1]

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return pinned


class Watched(Loader):
    """A loader that records its batches and threads, and can fail or wait."""

    def __init__(self, **options):
        super().__init__([positions(1000)], 8, 4, **options)
        self.read, self.fail_at, self.go_on = [], None, threading.Event()
        self.go_on.set()

    def batch(self, step, micro_step=0, rank=0):
        assert self.go_on.wait(30)
        self.read.append((step, micro_step, threading.current_thread() is threading.main_thread()))
        if (step, micro_step) == self.fail_at:
            raise OSError("the disk is gone")
        return super().batch(step, micro_step, rank)

    def wait_for(self, count):
        until = time.monotonic() + 30
        while len(self.read) < count:
            assert time.monotonic() < until
            time.sleep(0.001)


GPU = torch.device("cuda")


def test_each_batch_is_prefetched_once_on_a_thread(pretend_gpu):
    loader, plain = Watched(micro_steps=3), Loader([positions(1000)], 8, 4, micro_steps=3)
    batches = Prefetch(loader, GPU)
    order = [(step, micro_step) for step in range(5, 9) for micro_step in range(3)]
    for count, place in enumerate(order, start=2):
        assert all(map(torch.equal, batches.batch(*place), plain.batch(*place)))
        loader.wait_for(count)  # the next batch is read before it is requested
    assert loader.read == [(5, 0, True), *((*place, False) for place in order[1:]), (9, 0, False)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_prefetch_reads_the_batches_of_its_rank(pretend_gpu, device):
    loader = Watched(micro_steps=2, world_size=2)
    batches = Prefetch(loader, torch.device(device), rank=1)
    for place in ((0, 0), (0, 1), (1, 0)):
        assert all(map(torch.equal, batches.batch(*place), Loader.batch(loader, *place, rank=1)))


def test_a_batch_does_not_wait_for_the_next_one(pretend_gpu):
    loader = Watched()
    batches = Prefetch(loader, GPU)
    batches.batch(0)
    loader.wait_for(2)
    loader.go_on.clear()
    batches.batch(1)  # would hang
    assert len(loader.read) == 2
    loader.go_on.set()
    assert all(map(torch.equal, batches.batch(2), Loader([positions(1000)], 8, 4).batch(2)))


def test_batches_are_contiguous_and_pinned(pretend_gpu):
    batches = Prefetch(Watched(), GPU)
    read = [ids for step in range(3) for ids in batches.batch(step)]
    assert all(ids.is_contiguous() and any(ids is one for one in pretend_gpu) for ids in read)


@pytest.mark.parametrize("jump", [(0, 0), (3, 1), (10**9, 0)])
def test_batches_can_be_requested_in_any_order(pretend_gpu, jump):
    plain = Loader([positions(1000)], 8, 4, micro_steps=2)
    batches = Prefetch(Watched(micro_steps=2), GPU)
    for place in ((3, 0), jump, (7, 0), (7, 0)):
        assert all(map(torch.equal, batches.batch(*place), plain.batch(*place)))


def test_an_error_on_the_thread_is_raised_for_its_batch(pretend_gpu):
    loader = Watched()
    loader.fail_at = 2, 0
    batches = Prefetch(loader, GPU)
    batches.batch(0)
    batches.batch(1)
    loader.wait_for(3)
    with pytest.raises(OSError, match="the disk is gone"):
        batches.batch(2)
    batches.batch(7)  # other batches can still be read
    assert loader.read[2] == (2, 0, False)


def test_a_cpu_uses_neither_thread_nor_pinned_memory(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)
    loader = Watched(micro_steps=2)
    batches = Prefetch(loader, torch.device("cpu"))
    threads = threading.active_count()
    for place in ((0, 0), (0, 1), (1, 0)):
        assert all(map(torch.equal, batches.batch(*place), Loader([positions(1000)], 8, 4, micro_steps=2).batch(*place)))
    assert loader.read == [(0, 0, True), (0, 1, True), (1, 0, True)] and threading.active_count() == threads


@pytest.mark.parametrize(("ending", "said"), [
    pytest.param("", "", id="at its end"),
    pytest.param("raise KeyboardInterrupt", "KeyboardInterrupt", id="raising", marks=pytest.mark.slow),
    pytest.param("threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start(); batches.batch(1)", "KeyboardInterrupt",
                 id="interrupted as it waits for the batch", marks=pytest.mark.slow),
])
@pytest.mark.slow
def test_a_program_ends_while_a_batch_is_being_read(ending, said):
    program = f"""
import os, signal, threading, time
import numpy as np, torch
from data.loader import Loader, Prefetch
from data.shards import Tokens
class Slow(Loader):
    def batch(self, step, micro_step=0, rank=0):
        time.sleep(step)
        return super().batch(step, micro_step, rank)
torch.Tensor.pin_memory = lambda ids: ids
batches = Prefetch(Slow([Tokens([np.arange(100)])], 8, 4), torch.device("cuda"))
batches.batch(0)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent, timeout=60, capture_output=True, text=True)
    assert (done.returncode == 0) == (not ending) and said in done.stderr
