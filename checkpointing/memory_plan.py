"""The memory that each of several processes takes, whether it suffices, and what to do if not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from checkpointing.count_memory import count_memory
from conf.settings import Settings
from model import GPT, SkipInit
from terminal import readable_size
from training.buckets import BUCKET_NUMBERS, MOST_IN_FLIGHT
from training.device import Device
from training.distributed import World
from training.memory import MOST_BYTES_KEPT, memory_limit

# The part of a device's memory that training may be planned to take. The rest is for libraries, and
# lost by fragmentation.
USABLE_MEMORY = 0.9


def memory_of_each(settings: Settings, state_bytes: int, peak_bytes: int, processes: int = 1,
                   sharded: bool = False) -> dict[str, float]:
    """The bytes that each of several processes takes in a step, by their purpose.

    `state_bytes` and `peak_bytes` are those of `count_memory`. `sharded` is training.shard=full.
    """
    with SkipInit("meta"):
        model = GPT(settings.model)
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
    config, training = settings.model, settings.training
    with SkipInit("meta"):
        weights = weight_bytes(GPT(config))
    # A bound that does not need the import of fake tensors, which takes seconds.
    residual_stream = training.batch_size * config.block_size * config.n_embd * config.n_layer
    logits = 4 * training.batch_size * config.block_size * config.vocab_size
    if 8 * weights + residual_stream * MOST_BYTES_KEPT + 2 * logits < usable:
        return False
    state_bytes, peak_bytes = count_memory(settings, device)
    memory = memory_of_each(settings, state_bytes, peak_bytes, world.size)
    return sum(memory.values()) > usable
