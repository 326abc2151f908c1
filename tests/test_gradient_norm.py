"""The norm of the gradients, for any division of the parameters among processes."""

from __future__ import annotations

import pytest
import torch

from training.distributed import World
from training.gradient_norm import GradientNorm
from training.sharding import CHUNK, deal_out, slices

SHAPES = [(48, 32), (32, 48), (32, 48), (7,), (CHUNK,), (3 * CHUNK + 1,), (100, 130), (1,)]


class Together(World):
    """One rank of several, which all run in this process: they gather in two rounds."""

    def __init__(self, size, rank, sent):
        super().__init__({})
        self.size, self.rank, self.sent = size, rank, sent

    def gather(self, values):
        self.sent[self.rank] = values
        return torch.cat([self.sent.get(rank, values) for rank in range(self.size)])


def norms_of(parameters, size):
    """What each of `size` ranks measures."""
    matrices, rest = parameters[:3], parameters[3:]
    parts = [left + right for left, right in
             zip(deal_out(matrices, size), slices(rest, size), strict=True)]
    sent = {}
    ranks = [GradientNorm(Together(size, rank, sent), parameters, parts) for rank in range(size)]
    for some in parts:
        for part in some:
            if part.weights.grad is not None:
                part.tensor.grad = part.of(part.weights.grad)
    for norm in ranks:
        norm.measure()
    return [(norm.measure(), norm) for norm in ranks]


@pytest.fixture
def parameters():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for weights in parameters:
        weights.grad = torch.randn(weights.shape) * 10.0 ** torch.randint(4, weights.shape)
    return parameters


def test_norm_is_bit_identical_for_any_number_of_ranks(parameters):
    gradients = torch.cat([weights.grad.flatten() for weights in parameters])
    (one, _), = norms_of(parameters, 1)
    torch.testing.assert_close(one, gradients.norm())
    for size in (2, 4, 7, 40):
        for norm, of_rank in norms_of(parameters, size):
            assert torch.equal(norm, one)
            for weights in parameters:
                assert of_rank.of([weights]) == pytest.approx(weights.grad.norm().item())


def test_norm_does_not_depend_on_the_number_of_threads(parameters):
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(norms_of(parameters, 1)[0][0].item())
    finally:
        torch.set_num_threads(threads)
    assert len(set(found)) == 1


def test_missing_gradients_count_as_zero(parameters):
    parameters[0].grad = parameters[3].grad = None
    gradients = [weights.grad for weights in parameters if weights.grad is not None]
    for size in (1, 2):
        for norm, _ in norms_of(parameters, size):
            torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(gradients))
