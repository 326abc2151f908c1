"""Gradients reach the processes that update them, while the backward pass computes the rest."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import nn

from training.buckets import Bucket, GradientBuckets, fill
from training.distributed import World
from training.sharding import deal_out, slices
from training.tree_sum import TreeSum


class ThreadWorld(World):
    """A rank of several that are threads of this process, connected by gloo."""

    def __init__(self, rank, size, store):
        super().__init__({})
        self.rank, self.size = rank, size
        self.group = dist.ProcessGroupGloo(store, rank, size)

    def exchange(self, sent, sizes):
        received = sent.new_empty(self.size * sizes[self.rank])
        own = [sizes[self.rank]] * self.size
        return received, self.group.alltoall_base(received, sent, own, sizes)


def make_model():
    """Matrices, vectors, a parameter that is used twice, and one that is not used."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 40), nn.Tanh())
    model.append(model[0])
    model.append(nn.Linear(60, 1))
    model.unused = nn.Parameter(torch.zeros(3))
    return model


def parts_of(parameters, size):
    matrices = [weights for weights in parameters if weights.ndim == 2]
    others = [weights for weights in parameters if weights.ndim == 1]
    # One matrix is cut into slices, as AdamW's are.
    dealt, sliced = deal_out(matrices[1:], size), slices([matrices[0], *others], size)
    return [left + right for left, right in zip(dealt, sliced, strict=True)]


def train_rank(model, rank, size, micro_steps, store, **options):
    """The sums of the gradients of the parts of one rank, by parameter and start."""
    world = ThreadWorld(rank, size, store) if size > 1 else World({})
    parameters = list(model.parameters())
    parts = parts_of(parameters, size)
    buckets = GradientBuckets(world, parameters, parts, **options)
    each = micro_steps // size
    total = TreeSum(parameters, each)
    inputs = torch.randn(micro_steps, 5, 40, generator=torch.Generator().manual_seed(1))
    for micro_step in range(each):
        if micro_step == each - 1:
            buckets.start(total.put_total)
        model(inputs[rank * each + micro_step]).sum().backward()
        total.after_backward(micro_step)
    total.finish()
    buckets.finish()
    assert not any(weights._post_accumulate_grad_hooks for weights in parameters)
    names = {weights: name for name, weights in model.named_parameters()}
    found = {(names[part.weights], part.start): part.tensor.grad for part in parts[rank]}
    owned = {part.weights for part in parts[rank] if part.tensor is part.weights}
    assert all(weights.grad is None for weights in parameters if size > 1 and weights not in owned)
    return found


def gradients(size, micro_steps=4, **options):
    """The sums over all ranks, put together: one tensor for each parameter."""
    store = dist.HashStore()
    # The generator of random numbers belongs to all threads.
    models = [make_model() for _ in range(size)]
    with ThreadPoolExecutor(size) as pool:
        ranks = [pool.submit(train_rank, models[rank], rank, size, micro_steps, store, **options)
                 for rank in range(size)]
        found = {key: value for rank in ranks for key, value in rank.result(30).items()}
    whole = {}
    for (name, _), gradient in sorted(found.items()):
        if gradient is not None:
            whole.setdefault(name, []).append(gradient.flatten())
    return {name: torch.cat(pieces) for name, pieces in whole.items()}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("bucket_numbers", [1, 3000, 10**6])
def test_sums_are_bit_identical_to_one_process(size, bucket_numbers):
    one, several = gradients(1), gradients(size, bucket_numbers=bucket_numbers)
    assert one.keys() == several.keys() == {"0.weight", "0.bias", "1.weight", "1.bias", "4.weight",
                                            "4.bias"}
    for name, gradient in one.items():
        assert torch.equal(gradient, several[name]), name


def test_three_processes_add_all_gradients():
    one, several = gradients(1, micro_steps=3), gradients(3, micro_steps=3)
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, several[name])


def test_buckets_are_sent_during_the_backward_pass(monkeypatch):
    """The last layers' gradients are on their way before the first layers' exist."""
    sent, first_layer_exists = [], []
    send = Bucket.send

    def spy(bucket):
        if bucket.world.rank == 0:
            sent.append(bucket.parameters[0].shape)
            first_layer_exists.append(bucket.first_layer.grad is not None)
        send(bucket)

    def remember(bucket, world, parameters, parts):
        make(bucket, world, parameters, parts)
        bucket.first_layer = next(part.weights for some in parts for part in some
                                  if part.weights.shape == (60, 40))

    make = Bucket.__init__
    monkeypatch.setattr(Bucket, "__init__", remember)
    monkeypatch.setattr(Bucket, "send", spy)
    gradients(2, micro_steps=2, bucket_numbers=1)
    assert sent == [weights.shape for weights in reversed(list(make_model().parameters()))]
    assert first_layer_exists[:3] == [False] * 3


def test_buckets_hold_the_last_parameters_first():
    parameters = [torch.zeros(size) for size in (5, 3, 2, 9, 1)]
    assert [[len(weights) for weights in bucket] for bucket in fill(parameters, 6)] == [
        [1], [9], [2, 3], [5]]


def test_one_process_has_no_buckets_and_no_hooks():
    weights = nn.Parameter(torch.ones(3))
    buckets = GradientBuckets(World({}), [weights], [[]])
    buckets.start(lambda index: None)
    assert not weights._post_accumulate_grad_hooks
    weights.grad = torch.ones(3)
    buckets.finish()
    assert torch.equal(weights.grad, torch.ones(3))
