"""The parts of the parameters that each process updates."""

from __future__ import annotations

import pytest
import torch

from model import GPT, GPTConfig
from training.config import OptimConfig
from training.distributed import World
from training.optim import Optimizers
from training.sharding import CHUNK, deal_out, row_range, slices


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_slices_cover_each_number_once(size):
    parameters = [torch.zeros(shape) for shape in [(1,), (1024,), (1025,), (100, 130), (3, 5)]]
    for parts in slices(parameters, size):
        for part in parts:
            part.tensor.add_(1)
    assert all((weights == 1).all() for weights in parameters)


def test_slices_are_equal_and_aligned():
    weights = torch.zeros(1000, 96)
    parts = slices([weights], 4)
    sizes = [sum(part.tensor.numel() for part in some) for some in parts]
    assert max(sizes) - min(sizes) <= CHUNK
    assert all(part.start % CHUNK == 0 for some in parts for part in some)


def test_small_parameters_are_dealt_out_in_turn():
    parts = slices([torch.zeros(300) for _ in range(8)], 4)
    assert [len(some) for some in parts] == [2, 2, 2, 2]


def test_matrices_are_dealt_out_by_shape():
    matrices = [torch.zeros(4, 8) for _ in range(4)] + [torch.zeros(8, 8) for _ in range(2)]
    for parts in deal_out(matrices, 2):
        assert sorted(tuple(part.weights.shape) for part in parts) == [(4, 8), (4, 8), (8, 8)]


def test_a_slice_is_updated_like_the_whole_by_adamw():
    """The same bits, although vector instructions treat the end of a tensor differently."""
    from training.optim import AdamW

    torch.manual_seed(0)
    whole = torch.randn(5000)
    sliced, gradient = whole.clone(), torch.randn(5000)
    for weights, size in ((whole, 1), (sliced, 4)):
        for (part,) in slices([weights], size):
            part.tensor.grad = part.of(gradient).clone()
            optimizer = AdamW([{"params": [part.tensor], "weight_decay": 0.1}], 0.01, (0.9, 0.95))
            optimizer.step()
            optimizer.step()
    assert torch.equal(whole, sliced)


def process(rank, size):
    return World({"TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "WORLD_SIZE": str(size),
                  "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})


def state_bytes(rank, size, optimizer):
    """The bytes of the optimizer state that a process allocates."""
    config = GPTConfig(block_size=64, vocab_size=512, n_layer=8, n_head=2, n_embd=64)
    optimizers = Optimizers(GPT(config).parameters_by_role(), OptimConfig(optimizer=optimizer),
                            process(rank, size))
    return sum(tensor.nbytes for one in optimizers.all for state in one.state.values()
               for tensor in state.values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_process_has_1_nth_of_the_state(optimizer):
    whole = state_bytes(0, 1, optimizer)
    for size in (2, 4, 8):
        found = [state_bytes(rank, size, optimizer) for rank in range(size)]
        assert max(found) < 1.05 * whole / size and sum(found) < 1.01 * whole


@pytest.mark.parametrize("n_rows", [1, 3, 4, 5, 8, 33])
def test_rows_are_divided_as_fsdp_does(n_rows):
    chunks = torch.arange(n_rows).chunk(4)
    for rank in range(4):
        first, last = row_range(n_rows, rank, 4)
        expected = chunks[rank].tolist() if rank < len(chunks) else []
        assert list(range(first, last)) == expected
