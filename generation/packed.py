"""Pack a model's weights for decoding: the model's own code with faster matrix products."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import CausalSelfAttention
from model.gpt import GPT, MLP

Product = Callable[[Tensor], Tensor]
# A packed model calls `forward` of these itself. The checks of `nn.Module.__call__` take much of a
# step, since the weights replace what the processor's caches hold.
CALLED_DIRECTLY = (CausalSelfAttention, MLP, nn.LayerNorm, nn.RMSNorm)


def cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Product:
    """A function from rows `[..., in]` to rows @ `weight`.T + bias in `dtype`, cast once."""
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return lambda x: F.linear(x.to(dtype), weight, bias)


@torch.no_grad()
def pack(model: GPT, make_product: Callable[[Tensor, Tensor | None], Product]) -> GPT:
    """A copy of `model` whose linear layers and head are products that `make_product` makes.

    Everything else is the model's own code on the same tensors, so a flag of the model needs no
    code here unless it changes the head or attention; tests/test_decoder.py compares every flag.
    """
    # To `deepcopy`, tensors in its memo are copied already: the two models share them.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    packed = copy.deepcopy(model, shared).eval()
    # The head, and then each linear layer.
    packed.head = make_product(packed.head_weight.detach(), None)
    if not model.config.tie_head:
        del packed.lm_head
    for module in list(packed.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                bias = child.bias if child.bias is None else child.bias.detach()
                call = make_product(child.weight.detach(), bias)
            elif isinstance(child, nn.Dropout):
                call = unchanged
            elif isinstance(child, CALLED_DIRECTLY):
                call = child.forward
            else:
                continue
            # The name of a child module accepts modules only.
            delattr(module, name)
            setattr(module, name, call)
    return packed


def unchanged(x: Tensor) -> Tensor:
    """Dropout in evaluation."""
    return x
