"""Weights, gradients and optimizer state divided among the processes by rows (FSDP2).

As ZeRO stage 3: a layer has whole weights only while it computes. Checkpoints hold whole tensors
nevertheless. Knows no files. See
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from collections.abc import Callable, Iterable
from typing import Any
from warnings import filterwarnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.device import Device
from training.distributed import World
from training.muon import Muon
from training.sharding import Part, row_range


def shard(model: nn.Module, world: World, device: Device) -> None:
    """Divide the weights of a GPT among the processes, and move them to the device.

    All processes must have the same weights, and from now on run the same number of forward and
    backward passes: otherwise they wait for each other forever.
    """
    # These imports take seconds.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # FSDP2 warns of outputs that are then changed in place, which the model does to none.
    filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy()
    if device.precision != "fp32":
        # With autocast alone, the backward pass would keep all weights in this precision.
        policy = MixedPrecisionPolicy(param_dtype=device.low_dtype, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
    # Attention and MLP of each block are whole in turn.
    layers = []
    for block in model.h:
        layers += [block.attn, block.mlp]
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # The rest, embeddings, norms and head, is whole from the start of a forward pass to the end of
    # the backward pass, and stays fp32.
    fully_shard(model, mesh=mesh)
    for module in (*layers, model):
        # The loss of a micro-step is its part of the step's loss, so gradients are only added.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


class RowGradients:
    """The gradients of a step, which FSDP2 has added; takes the place of `GradientBuckets`."""

    def __init__(self, parameters: list[Tensor], own: list[Part]) -> None:
        self.parameters, self.own = parameters, own

    def start(self, put_total: Callable[[int], None]) -> None:
        """Nothing is left to send."""

    def finish(self) -> None:
        """Put this process's rows of the gradients into the own parts' `.grad`."""
        for part in self.own:
            part.tensor.grad = part.weights.grad.to_local()
            part.weights.grad = None


class RowNorm:
    """Measures gradients that are divided by rows; takes the place of `GradientNorm`."""

    def __init__(self, world: World, parts: list[Part]) -> None:
        self.world, self.own = world, parts
        self.positions = {part.weights: position for position, part in enumerate(parts)}
        # The norm of each parameter's gradient at the last measurement.
        self.norms = torch.zeros(len(parts), device=parts[0].tensor.device)

    @torch.no_grad()
    def measure(self) -> Tensor:
        """The norm of the gradients of all processes. Does not wait for the device."""
        own = torch.stack(torch._foreach_norm([part.tensor.grad for part in self.own]))
        of_all = self.world.gather(own).view(self.world.size, -1)
        self.norms = torch.linalg.vector_norm(of_all, dim=0)
        return torch.linalg.vector_norm(self.norms)

    def of(self, parameters: Iterable[Tensor]) -> Tensor:
        """The norm of the gradients of these parameters at the last measurement."""
        positions = [self.positions[weights] for weights in parameters]
        return torch.linalg.vector_norm(self.norms[positions])


class RowMuon(Muon):
    """Muon for matrices that are divided by rows, as is their momentum.

    Each process gathers a part of the matrices whole, orthogonalizes them, and sends the rows back.
    """

    def __init__(self, params: list[dict[str, Any]], lr: float, momentum: float,
                 normalize_rows: bool, parts: list[Part], world: World) -> None:
        super().__init__(params, lr, momentum, normalize_rows)
        self.rank, self.size = world.rank, world.size
        self.shapes = {part.tensor: part.weights.shape for part in parts}

    def shape(self, weights: Tensor) -> torch.Size:
        return self.shapes[weights]

    def updates(self, batch: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
        # Gather whole matrices: number i goes to the process i % size.
        ranks = range(self.size)
        shapes = [[self.shapes[weights] for weights in batch[owner :: self.size]]
                  for owner in ranks]
        sent = [directions[owner :: self.size] for owner in ranks]
        expected = [[self.rows_shape(shape, source) for shape in shapes[self.rank]]
                    for source in ranks]
        received = exchange(sent, expected, directions[0])
        matrices = [torch.cat(rows) for rows in zip(*received, strict=True)]

        # Orthogonalize them, and send each process its rows.
        whole = super().updates(batch[self.rank :: self.size], matrices)
        sent = [[self.rows(update, target) for update in whole] for target in ranks]
        expected = [[self.rows_shape(shape, self.rank) for shape in some] for some in shapes]
        # From each process come the rows of its matrices.
        own = list(directions)
        for owner, rows in enumerate(exchange(sent, expected, directions[0])):
            own[owner :: self.size] = rows
        return own

    def rows(self, matrix: Tensor, rank: int) -> Tensor:
        first, last = row_range(len(matrix), rank, self.size)
        return matrix[first:last]

    def rows_shape(self, shape: torch.Size, rank: int) -> torch.Size:
        first, last = row_range(shape[0], rank, self.size)
        return torch.Size((last - first, *shape[1:]))


def exchange(sent: list[list[Tensor]], expected: list[list[torch.Size]],
             like: Tensor) -> list[list[Tensor]]:
    """Send `sent[rank]` to each rank, and return what each sends here, of shapes `expected[rank]`.

    All tensors have the dtype and the device of `like`.
    """
    # As bytes: gloo does not know every dtype.
    flat = [torch.cat([like.new_empty(0), *(tensor.reshape(-1) for tensor in some)])
            for some in sent]
    flat = [some.view(torch.uint8) for some in flat]
    counts = [[shape.numel() for shape in some] for some in expected]
    sizes = [sum(some) * like.itemsize for some in counts]
    received = flat[0].new_empty(sum(sizes))
    dist.all_to_all_single(received, torch.cat(flat), sizes, [len(some) for some in flat])

    # Divide the numbers from each process into tensors.
    found = []
    for numbers, some, shapes in zip(received.split(sizes), counts, expected, strict=True):
        tensors = numbers.view(like.dtype).split(some)
        found.append([tensor.view(shape) for tensor, shape in zip(tensors, shapes, strict=True)])
    return found
