"""Weights and configurations under the names of other programs: GPT-2 as published, and nanoGPT.

A layout is named as `model_type` in Hugging Face's config.json; that of nanoGPT's checkpoints is
"nanogpt". One table for each says which published tensor holds which tensor of ours, and serves
both directions. Knows tensors and plain dicts: opens no file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.config import GPTConfig
from model.gpt import GPT
from model.skip_init import SkipInit

LAYOUTS = ("gpt2", "nanogpt")
# The classes of transformers.
CLASSES = {"gpt2": "GPT2LMHeadModel"}

# GPT-2 stores these transposed.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# What torch.compile and the class with the head put before the names.
PREFIX = re.compile(r"(_orig_mod\.)?(transformer\.)?")
# Causal masks, which some versions store.
MASK = re.compile(r"(^|\.)h\.\d+\.attn\.(bias|masked_bias)$")

# Our sizes, and their names in config.json.
SIZES = {
    "gpt2": {"block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer",
             "n_head": "n_head", "n_embd": "n_embd"},
    "nanogpt": {name: name for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd",
                                        "bias")},
}
# Fields of config.json of which one value is supported. It is also the default.
REQUIRED = {
    "gpt2": {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
             "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
}
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf"}


@dataclass(frozen=True)
class Entry:
    """A published tensor, and the tensor of ours with the same values.

    Without a tensor of ours, all values are `fill`. An optional tensor may be missing when weights
    are read, and is not written.
    """

    published: str
    shape: tuple[int, ...]
    ours: str = ""
    transposed: bool = False
    fill: float = 0.0
    optional: bool = False

    def publish(self, state: Mapping[str, Tensor]) -> Tensor:
        """The published tensor of our weights. A transposed one is a view."""
        if not self.ours:
            return torch.full((), self.fill).expand(self.shape)
        tensor = state[self.ours]
        return tensor.mT if self.transposed else tensor

    def restore(self, tensor: Tensor) -> Tensor:
        """The inverse of `publish`, in fp32."""
        tensor = tensor.float()
        return tensor.mT.contiguous() if self.transposed else tensor


def weights_from(layout: str, config: GPTConfig,
                 tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `GPT(config)` from published tensors, in fp32.

    Raises ValueError for a tensor that is missing, unknown, or of another shape or type.
    """
    entries = table(layout, config)
    names: dict[str, str] = {}
    for name in tensors:
        if MASK.search(name):
            continue
        plain = plain_name(name)
        if plain in names:
            raise ValueError(f"The weights have {plain} twice, as {shown(names[plain])} and "
                             f"{shown(name)}.")
        names[plain] = name
    unknown = sorted(names.keys() - {plain_name(entry.published) for entry in entries})
    missing = [entry.published for entry in entries
               if not entry.optional and plain_name(entry.published) not in names]
    if missing:
        other = f" They have {shown(unknown[0])}, which {layout} does not have." if unknown else ""
        raise ValueError(f"The weights lack {listed(missing)} that this configuration of {layout} "
                         f"has.{other}")
    if unknown:
        raise ValueError(f"The weights have {listed(unknown)} that this configuration of {layout} "
                         "does not have.")

    state: dict[str, Tensor] = {}
    for entry in entries:
        name = names.get(plain_name(entry.published))
        if name is None:
            continue
        tensor = tensors[name]
        if tuple(tensor.shape) != entry.shape:
            raise ValueError(f"The weights have {shown(name)} of the shape {list(tensor.shape)}; "
                             f"this configuration of {layout} has {list(entry.shape)}.")
        if not tensor.is_floating_point():
            raise ValueError(f"The weights have {shown(name)} of the type {tensor.dtype}; "
                             "supported are floating-point types.")
        restored = entry.restore(tensor)
        if not entry.ours and not (restored == entry.fill).all():
            raise ValueError(f"The weights have {shown(name)} with values other than {entry.fill}, "
                             "which this configuration does not support.")
        if entry.ours in state and not torch.equal(restored, state[entry.ours]):
            raise ValueError(f"The weights have {shown(name)} with other values than {entry.ours}, "
                             "but the configuration says that they share them.")
        if entry.ours:
            state[entry.ours] = restored
    return state


def weights_to(layout: str, config: GPTConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors of a state dict of `GPT(config)`. Transposed ones are views."""
    entries = table(layout, config)
    return {entry.published: entry.publish(state) for entry in entries if not entry.optional}


def table(layout: str, config: GPTConfig) -> list[Entry]:
    """All tensors of a layout. Raises ValueError for a layout that is not supported."""
    check_layout(layout)
    shapes = state_shapes(config)
    published = shapes
    if layout == "gpt2":
        # Its layers always have biases: without biases of ours they are zero.
        published = state_shapes(replace(config, bias=True))
    entries = []
    for name, shape in published.items():
        ours = name if name in shapes else ""
        transposed = layout == "gpt2" and name.endswith(TRANSPOSED)
        prefix = "" if name.startswith("lm_head") else "transformer."
        shape = shape[::-1] if transposed else shape
        entries.append(Entry(f"{prefix}{name}", shape, ours, transposed))
    if config.tie_head:
        entries.append(Entry("lm_head.weight", shapes["wte.weight"], "wte.weight",
                             optional=layout == "gpt2"))
    return entries


def state_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of `GPT(config)`."""
    with SkipInit("meta"):
        return {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}


def config_from(layout: str, published: Mapping[str, Any],
                place: str = "config.json") -> dict[str, Any]:
    """Fields of `GPTConfig` from Hugging Face's config.json, or from nanoGPT's `model_args`.

    Dropout is left out: it belongs to the training, not to the weights. Raises ValueError for a
    configuration that this model does not support. `GPTConfig.problems` checks the sizes.
    """
    check_layout(layout)
    missing = [name for name in SIZES[layout].values() if name not in published]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}: it is no configuration of {layout}.")
    config = {ours: published[name] for ours, name in SIZES[layout].items()}
    for ours, name in SIZES[layout].items():
        if not isinstance(config[ours], int):
            raise ValueError(f"{place} has {name}={shown(config[ours])}, which is no number.")
    if layout == "nanogpt":
        return config | {"activation": "gelu_erf"}
    supported = {name: [value] for name, value in REQUIRED[layout].items()}
    supported["activation_function"] = list(ACTIVATIONS)
    supported["n_inner"] = [None, 4 * config["n_embd"]]
    supported["tie_word_embeddings"] = [True, False]
    for name, values in supported.items():
        value = published.get(name, values[0])
        if value not in values:
            raise ValueError(f"{place} has {name}={shown(value)}, which is not supported; "
                             f"supported are {', '.join(map(str, values))}.")
    activation = ACTIVATIONS[published.get("activation_function", "gelu_new")]
    return config | {"activation": activation,
                     "tie_head": published.get("tie_word_embeddings", True)}


def config_to(layout: str, config: GPTConfig) -> dict[str, Any]:
    """The part of Hugging Face's config.json about the model."""
    published = {name: getattr(config, ours) for ours, name in SIZES[layout].items()}
    activation = next(name for name, ours in ACTIVATIONS.items() if ours == config.activation)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    return {"model_type": layout, "architectures": [CLASSES[layout]], **published,
            "activation_function": activation, **REQUIRED[layout], **dropout,
            "tie_word_embeddings": config.tie_head}


def check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"model_type={shown(layout)} is not supported; supported are "
                         f"{', '.join(LAYOUTS)}.")


def plain_name(name: str) -> str:
    return PREFIX.sub("", name, count=1)


def shown(text: Any) -> str:
    """A text from a file, short and without control characters."""
    return ascii(text)[1:81].rstrip("'") if isinstance(text, str) else ascii(text)[:80]


def listed(names: list[str]) -> str:
    """The first of some tensors, and the number of the others."""
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{shown(names[0])}{rest}"
