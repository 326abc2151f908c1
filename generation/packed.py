"""A copy of a model whose weights are laid out to be read once a token: it runs the model's own code on other products."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.gpt import GPT

KNOWN = {"block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "dropout", "bias", "position", "norm",
         "qk_norm", "activation", "zero_init", "tie_head", "embedding_norm", "ngrams", "ngram_rows"}
Product = Callable[[Tensor], Tensor]


def can_copy(model: GPT) -> bool:
    """Whether `decoding_copy` knows all flags of the model, and its products fit it; else the model itself must decode."""
    return model.wte.weight.dtype == torch.float32 and all(
        getattr(model.config, field.name) == field.default for field in fields(model.config) if field.name not in KNOWN)


def cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Product:
    """The plain product of rows `[..., in]` with `weight` `[out, in]`, in `dtype`, to which the weight is cast once."""
    weight, bias = weight.to(dtype), bias if bias is None else bias.to(dtype)
    return lambda x: F.linear(x.to(dtype), weight, bias)


@torch.no_grad()
def decoding_copy(model: GPT, lay_out: Callable[[Tensor, Tensor | None], Product]) -> GPT:
    """A model like `model` that shares its tensors, but whose products are what `lay_out` makes of weights and biases."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared).eval()
    twin.head = lay_out(twin.head_weight.detach(), None)
    if not model.config.tie_head:
        del twin.lm_head
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                bias = child.bias if child.bias is None else child.bias.detach()
                delattr(module, name)  # a module's name takes nothing but modules
                setattr(module, name, lay_out(child.weight.detach(), bias))
    return twin
