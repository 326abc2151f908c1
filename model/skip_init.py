"""Construct a model without initializing its weights, when they are loaded from a file."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

INITIALIZERS = ("normal_", "uniform_", "kaiming_uniform_")


class SkipInit(TorchFunctionMode):
    """Inside this context, random initialization is skipped, as by `torch.nn.utils.skip_init`.

    On the device "meta" parameters have shapes, but take no memory. (The context of
    `torch.device("meta")` first imports torch's compiler, which takes a second.)
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Callable[..., Any], types: Any,
                           args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function.__name__ in INITIALIZERS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if function is torch.empty:
            kwargs["device"] = self.device
        return function(*args, **kwargs)
