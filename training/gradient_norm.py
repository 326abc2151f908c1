"""The norm of all gradients, bit-identical however the parameters are divided among processes.

A sum depends on the order of its terms, so the norm is taken in two stages: of each chunk of a
parameter, which one process has whole, and then of the norms of all chunks, in a fixed order.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from training.distributed import World
from training.sharding import CHUNK, Part


class GradientNorm:
    """Measures the gradients of parts of parameters; `parts[rank]` are those of a rank."""

    def __init__(self, world: World, parameters: list[Tensor], parts: list[list[Part]]) -> None:
        self.world = world
        # Where the norms of a parameter are: those of its full chunks, and that of its remainder.
        self.full: dict[Tensor, range] = {}
        self.remainder: dict[Tensor, int] = {}
        end = 0
        for weights in parameters:
            self.full[weights] = range(end, end + weights.numel() // CHUNK)
            end = self.full[weights].stop
        for weights in self.full:
            if weights.numel() % CHUNK:
                self.remainder[weights] = end
                end += 1

        # This process's parts, and the norms of all chunks at the last measurement.
        self.own = parts[world.rank]
        self.chunks = torch.zeros(end, device=parameters[0].device)
        if world.size > 1:
            positions = [self.positions_of(some) for some in parts]
            self.longest = max(len(some) for some in positions)
            # The position of each chunk's norm among the gathered norms of all processes.
            self.gathered = torch.empty(end, dtype=torch.int64)
            for rank, some in enumerate(positions):
                self.gathered[some] = rank * self.longest + torch.arange(len(some))
            self.gathered = self.gathered.to(self.chunks.device)

    def positions_of(self, parts: list[Part]) -> Tensor:
        """The positions of the norms that `measure_chunks` returns for these parts."""
        full, remainders = [], []
        for part in parts:
            first = self.full[part.weights].start
            full.append(torch.arange(first + part.start // CHUNK, first + part.end // CHUNK))
            if part.end % CHUNK:
                remainders.append(self.remainder[part.weights])
        return torch.cat([*full, torch.tensor(remainders, dtype=torch.int64)])

    @torch.no_grad()
    def measure(self) -> Tensor:
        """The norm of the gradients of all processes. Does not wait for the device."""
        # A process without parts has no norms.
        norms = torch.cat([self.chunks[:0], *measure_chunks(self.own)])
        # Gather those of all processes, padded to one length, and bring them into a fixed order.
        if self.world.size > 1:
            padded = torch.nn.functional.pad(norms, (0, self.longest - len(norms)))
            norms = self.world.gather(padded)[self.gathered]
        self.chunks = norms
        return torch.linalg.vector_norm(norms)

    def of(self, parameters: Iterable[Tensor]) -> Tensor:
        """The norm of the gradients of these parameters at the last measurement."""
        norms = []
        for weights in parameters:
            full = self.full[weights]
            norms.append(self.chunks[full.start : full.stop])
            if weights in self.remainder:
                norms.append(self.chunks[self.remainder[weights]][None])
        return torch.linalg.vector_norm(torch.cat(norms))


def measure_chunks(parts: list[Part]) -> list[Tensor]:
    """The norms of the gradients' full chunks, then those of the remainders."""
    norms, remainders = [], []
    for part in parts:
        gradient = part.tensor.grad
        if gradient is None:
            gradient = torch.zeros_like(part.tensor)
        # The chunks of CHUNK numbers, and what is left after the last.
        numbers = gradient.reshape(-1)
        full = numbers.numel() // CHUNK * CHUNK
        if full:
            norms.append(torch.linalg.vector_norm(numbers[:full].view(-1, CHUNK), dim=1))
        if full < numbers.numel():
            remainders.append(numbers[full:])
    # One launch on a GPU for all remainders.
    if remainders:
        norms.append(torch.stack(torch._foreach_norm(remainders)))
    return norms
