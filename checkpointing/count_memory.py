"""Count the memory that a training step takes, without training: on tensors without content.

Knows nothing about the memory of Python and torch themselves.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpointing.state import State
from conf.settings import Settings
from model import GPT
from model.loss import loss_options
from training.device import Device
from training.optim import Optimizers


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

    Both are those of one process, counted in a training step on fake tensors, which have no
    content. `gpu_bytes` is the memory of a GPU for which this is planned on another device.
    """
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
