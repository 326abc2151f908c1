"""Models whose weights come from elsewhere, made without drawing any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Undrawn(TorchFunctionMode):
    """Weights inside this context are not drawn, for they come from a file. On the device "meta" they take no memory either.

    (As `torch.device("meta")` has it, torch imports its compiler first, which takes a second.)
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if function is torch.empty:
            kwargs["device"] = self.device
        return function(*args, **kwargs)
