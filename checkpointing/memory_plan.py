"""The memory of a training step: counted without training, and whether it suffices.

Counted on tensors without content. Knows nothing about the memory of Python and torch themselves.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpointing.state import State
from conf.settings import Settings
from hardware import available_memory, memory_size
from model import GPT
from model.loss import loss_options
from terminal import readable_size
from training.buckets import BUCKET_NUMBERS, MOST_IN_FLIGHT
from training.device import Device
from training.distributed import World
from training.optim import Optimizers

# The part of a device's memory that training may be planned to take. The rest is for libraries, and
# lost by fragmentation.
USABLE_MEMORY = 0.9
# Of a model with more than three times as many, the memory of layers is extrapolated.
COUNTED_LAYERS = 6
# A bound on the bytes that are kept for the backward pass, for each number of a layer's residual
# stream. A tenth of it is usual.
MOST_BYTES_KEPT = 512


class AllocationCounter(TorchDispatchMode):
    """Counts the bytes of all tensors that are created while it is active, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor):
                continue
            # Views share a storage, which is counted once, until the last of them is freed.
            storage = leaf.untyped_storage()
            if storage not in self.seen:
                self.seen.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def count_memory(settings: Settings, device: Device, gpu_bytes: float = 0) -> tuple[int, int]:
    """Bytes of the state that a checkpoint holds, and of the peak in a step, state included.

    Both are those of one process. `gpu_bytes` is the memory of a GPU for which this is planned on
    another device. Counting takes a tenth of a second a layer, so that of a deep model only some
    are counted.
    """
    n_layer = settings.model.n_layer
    if n_layer <= 3 * COUNTED_LAYERS:
        return count_step(settings, device, gpu_bytes)
    # Each further pair of layers takes the same.
    counts = []
    fewest = COUNTED_LAYERS + n_layer % 2
    for counted in (fewest, fewest + COUNTED_LAYERS):
        model = replace(settings.model, n_layer=counted)
        counts.append(count_step(replace(settings, model=model), device, gpu_bytes))
    further = (n_layer - fewest) // 2
    state, peak = (few + further * (more - few) // (COUNTED_LAYERS // 2)
                   for few, more in zip(*counts, strict=True))
    return state, peak


def count_step(settings: Settings, device: Device, gpu_bytes: float) -> tuple[int, int]:
    """The same for any depth, in a training step on fake tensors, which have no content."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Build the model and the optimizers as for a run.
    shape = (settings.training.batch_size, settings.model.block_size)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    with FakeTensorMode(), AllocationCounter() as counter, device.torch:
        model = GPT(settings.model)
        model.recompute = settings.training.recompute
        model.loss_options = loss_options(device.torch, gpu_bytes=gpu_bytes)
        optimizers = Optimizers(model.parameters_by_role(), settings.optim)

        # Train one step.
        ids = torch.zeros(shape, dtype=torch.int64)
        document_ids = ids if settings.data.respect_documents else None
        # In the second micro-step, the gradients of the first exist as well.
        for _ in range(2):
            with device.autocast():
                loss = model(ids, ids, document_ids=document_ids)
            loss.backward()
            del loss
        optimizers.step(scaler, optimizers.gradient_norm(scaler), settings.optim.grad_clip)
        return State(model, optimizers, scaler).nbytes(), counter.peak


def memory_of_each(settings: Settings, state_bytes: int, peak_bytes: int, processes: int = 1,
                   sharded: bool = False) -> dict[str, float]:
    """The bytes that each of several processes takes in a step, by their purpose.

    `state_bytes` and `peak_bytes` are those of `count_memory`. `sharded` is training.shard=full.
    """
    model = GPT.empty(settings.model)
    weights = weight_bytes(model)
    optimizer = state_bytes - weights
    activations = max(0, peak_bytes - state_bytes - weights)
    if processes == 1:
        return {"weights and optimizer": state_bytes, "gradients": weights,
                "activations": activations}

    # Whole weights and gradients, and a part of the optimizer state.
    if not sharded:
        # Gradients in flight; after the backward pass, weights are exchanged in their place.
        sent = 4 * MOST_IN_FLIGHT * min(4 * BUCKET_NUMBERS, weights)
        exchanged = 2 * weights / processes - activations
        return {"weights and optimizer": weights + optimizer / processes, "gradients": weights,
                "activations": activations, "communication": max(sent, exchanged)}

    # A part of all three.
    layers = [weight_bytes(part) for block in model.h for part in (block.attn, block.mlp)]
    # A layer and the next one are whole at the same time, with their gradients. So are embeddings,
    # norms and the head, from the beginning to the end.
    whole = 2 * (2 * max(layers) + weights - sum(layers))
    return {"weights and optimizer": state_bytes / processes, "gradients": weights / processes,
            "activations": activations, "whole layers": whole}


def weight_bytes(module: torch.nn.Module) -> int:
    """The bytes of a module's weights in fp32."""
    return 4 * sum(parameter.numel() for parameter in module.parameters())


def fitting_batch_size(settings: Settings, device: Device, gpu_bytes: float, processes: int = 1,
                       sharded: bool = False) -> int:
    """The most sequences at once that are planned to fit into a GPU with `gpu_bytes`; 0 if none."""
    def needed(batch_size: int) -> float:
        training = replace(settings.training, batch_size=batch_size)
        counted = count_memory(replace(settings, training=training), device, gpu_bytes)
        return sum(memory_of_each(settings, *counted, processes, sharded).values())

    # Each further sequence takes the same.
    batch_size = settings.training.batch_size
    once, twice = needed(batch_size), needed(2 * batch_size)
    for_each = max(1, twice - once) / batch_size
    return max(0, int(batch_size + (USABLE_MEMORY * gpu_bytes - once) // for_each))


@contextmanager
def memory_advice(settings: Settings, world: World, device: Device,
                  sharded: bool) -> Iterator[None]:
    """Turn an error of a GPU without free memory into a ValueError with the batch that fits."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        gpu_bytes = memory_limit(device)
        fitting = fitting_batch_size(settings, device, gpu_bytes, world.size, sharded)
        batch_size = settings.training.batch_size
        # Other programs may use the memory.
        if not 0 < fitting < batch_size:
            raise
        raise ValueError(
            f"training.batch_size={batch_size} does not fit into the {readable_size(gpu_bytes)} of "
            f"this GPU: training.batch_size={fitting} is planned to (training.tokens_per_step "
            "keeps a step as large as it was), and more with training.recompute=true.") from error


def divides_weights(settings: Settings, world: World, device: Device) -> bool:
    """Whether the weights are divided among the processes, by training.shard."""
    shard = settings.training.shard
    if world.size == 1 or shard == "none":
        return False
    return shard == "full" or world.first(lambda: exceeds_memory(settings, world, device))


def exceeds_memory(settings: Settings, world: World, device: Device) -> bool:
    """Whether a process with whole weights is planned to take more than its device's memory.

    Depends on the size of the memory, not on how much of it is free.
    """
    usable = USABLE_MEMORY * memory_limit(device)
    if device.type == "cpu":
        usable /= world.local_size
    if most_bytes(settings) < usable:
        return False
    memory = memory_of_each(settings, *count_memory(settings, device), world.size)
    return sum(memory.values()) > usable


def check_memory(settings: Settings, device: Device, local_processes: int = 1) -> None:
    """Raise ValueError if the activations of a micro-step on a CPU need more than the free memory.

    The system ends a process that asks for too much, without a message. `local_processes` train on
    this machine.
    """
    free = available_memory() / local_processes
    if device.type != "cpu" or most_bytes(settings) < free:
        return
    needed = memory_of_each(settings, *count_memory(settings, device))["activations"]
    if needed > free:
        training = settings.training
        advice = "" if training.recompute else ", or training.recompute=true"
        raise ValueError(f"training.batch_size={training.batch_size} sequences at once take "
                         f"{readable_size(needed)} of memory, {readable_size(free)} are free: "
                         f"choose a smaller one (training.tokens_per_step makes it up){advice}.")


def most_bytes(settings: Settings) -> int:
    """A bound on the memory of a step, without the import of fake tensors, which takes seconds."""
    config = settings.model
    # Twice the weights, gradients and moments; what layers keep; the logits and their gradient.
    weights = weight_bytes(GPT.empty(config))
    tokens = settings.training.batch_size * config.block_size
    kept = MOST_BYTES_KEPT * tokens * config.n_embd * config.n_layer
    return 8 * weights + kept + 2 * 4 * tokens * config.vocab_size


def memory_limit(device: Device) -> float:
    """The bytes of a device's memory, free or not; of a CPU, those that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return memory_size()
