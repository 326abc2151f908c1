"""The memory of a device, and whether a file or a micro-step fits into it, before it is tried.

On a CPU the system ends a process that asks for too much, without a message.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hardware import available_memory, memory_size
from terminal import readable_size
from training.device import Device

# A bound on the bytes that are kept for the backward pass, for each number of a layer's residual
# stream. A tenth of it is usual.
MOST_BYTES_KEPT = 512


def memory_limit(device: Device) -> float:
    """The bytes of a device's memory, free or not; of a CPU, those that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return memory_size()


def bytes_kept(call: Callable[[], object]) -> int:
    """The bytes that `call` keeps for the backward pass, weights included."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # The result holds the kept tensors, so that no two have the same address.
        result = call()
    del result
    return sum(kept.values())


def check_free(nbytes: float, place: object) -> None:
    """Raise ValueError, naming the `place` of the content, if it does not fit in free memory."""
    free = available_memory()
    if nbytes > free:
        raise ValueError(f"{place} needs {readable_size(nbytes)} of memory, {readable_size(free)} "
                         "are free.")


def check_memory(model: nn.Module, inputs: Tensor, documents: Tensor | None,
                 device: Device) -> None:
    """Raise ValueError where a micro-step of `inputs` `[B, T]` keeps more than the free memory.

    `model` is a GPT; `documents` are as its `features` takes them.
    """
    free = available_memory()
    residual_stream = inputs.numel() * model.config.n_embd * model.config.n_layer
    if device.type != "cpu" or residual_stream * MOST_BYTES_KEPT < free:
        return

    def kept(sequences: int) -> int:
        """The bytes that the forward pass of the first sequences keeps."""
        # Without the loss, which handles a batch in chunks.
        some = documents[:sequences] if documents is not None else None
        with device.autocast():
            return bytes_kept(lambda: model.features(inputs[:sequences], document_ids=some))

    # Measure one sequence; two if the first estimate, which counts the weights with each sequence,
    # does not fit.
    batch_size = len(inputs)
    if batch_size * kept(1) <= free:
        return
    # The weights are in both measurements, so the difference is what one sequence takes.
    needed = batch_size * (kept(2) - kept(1))
    if needed <= free:
        return
    advice = "" if model.recompute else ", or training.recompute=true"
    raise ValueError(f"training.batch_size={batch_size} sequences at once take "
                     f"{readable_size(needed)} of memory, {readable_size(free)} are free: choose a "
                     f"smaller one (training.tokens_per_step makes it up){advice}.")
