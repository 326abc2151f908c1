"""Gradients add up in the same order, whoever computes which part of them."""

from __future__ import annotations

import pytest
import torch

from training.tree_sum import TreeSum, add_in_tree

# Numbers of all sizes, whose sum depends on the order of addition.
VALUES = torch.randn(24, 50, generator=torch.Generator().manual_seed(0)) * 10.0 ** (
    torch.arange(24)[:, None] % 7)


def tree_sum(values):
    """The sum by `TreeSum`, with a backward pass for each value."""
    weights = torch.zeros(50, requires_grad=True)
    total = TreeSum([weights], len(values))
    for micro_step, value in enumerate(values):
        (weights * value).sum().backward()
        total.after_backward(micro_step)
    total.finish()
    return weights.grad


@pytest.mark.parametrize("micro_steps", [1, 2, 3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_sum_is_bit_identical_for_any_power_of_two(micro_steps, processes):
    if micro_steps % processes:
        pytest.skip("these processes cannot share the micro-steps equally")
    values = VALUES[:micro_steps]
    parts = [tree_sum(part) for part in values.chunk(processes)]
    assert torch.equal(add_in_tree(parts), tree_sum(values))


def test_sum_is_right_and_the_order_matters():
    total = tree_sum(VALUES[:8])
    torch.testing.assert_close(total, VALUES[:8].sum(0))
    in_turn = torch.zeros(50)
    for value in VALUES[:8]:
        in_turn += value
    assert not torch.equal(total, in_turn)


def test_three_processes_add_all_parts():
    parts = [value.clone() for value in VALUES[:3]]
    torch.testing.assert_close(add_in_tree(parts), VALUES[:3].sum(0))
