"""Operations in the type of their input, which autocast on GPUs would compute and return in fp32.

Their kernels add up in fp32 anyway, so fp32 would only be more memory to read and write. Autocast
on CPUs leaves these operations alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor) -> Tensor:
    """`F.rms_norm` over the last dimension, without parameters."""
    if x.is_cpu:
        return F.rms_norm(x, (x.size(-1),))
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, (x.size(-1),))


def square(x: Tensor) -> Tensor:
    if x.is_cpu:
        return x.square()
    with torch.autocast(x.device.type, enabled=False):
        return x.square()
