"""Configurations of other programs: Hugging Face's config.json, and nanoGPT's `model_args`.

A layout is named as `model_type` in config.json: "gpt2", "nanochat", "qwen3" and "llama". One
`Format` for each says what of `GPTConfig` it has. Two kinds of files have layouts of their own:
nanoGPT's checkpoints, "nanogpt", and GGUF files, "gguf-gpt2", "gguf-qwen3" and "gguf-llama".

Knows plain dicts: opens no file. The weights are in pretrained.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from model.config import GPTConfig
from setting import as_word

# torch's defaults of RMSNorm in fp32 and of LayerNorm.
EPSILON = torch.finfo(torch.float32).eps
GPT2_EPSILON = 1e-5
ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class Format:
    """The configuration of a class of transformers, and the models that the class has."""

    class_name: str
    # Our sizes, and their names in config.json.
    sizes: dict[str, str]
    # The supported values of flags of GPTConfig.
    flags: dict[str, tuple[Any, ...]]
    # Fields of config.json with the one value that is supported.
    required: dict[str, Any]
    activation_field: str
    # Activations in config.json, the default first, and ours.
    activations: dict[str, str]
    # Our activation in llama.cpp; empty if GGUF files do not have this class.
    gguf_activation: str = ""


GPT2 = Format(
    "GPT2LMHeadModel",
    sizes={"block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer",
           "n_head": "n_head", "n_embd": "n_embd"},
    flags={"position": ("learned",), "norm": ("layer",), "qk_norm": (False,),
           "activation": ("gelu", "gelu_erf", "relu2"), "embedding_norm": (False,)},
    required={"layer_norm_epsilon": GPT2_EPSILON, "scale_attn_weights": True,
              "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    activation_field="activation_function",
    activations={"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf",
                 "relu2": "relu2"},
    gguf_activation="gelu")

# Fields of Llama and its relatives.
REQUIRED = {"rms_norm_eps": EPSILON, "attention_bias": False, "rope_theta": ROTARY_BASE}

LLAMA = Format(
    "LlamaForCausalLM",
    sizes={"block_size": "max_position_embeddings", "vocab_size": "vocab_size",
           "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
           "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size"},
    flags={"position": ("rotary",), "norm": ("rms", "rms_gain"), "qk_norm": (False,),
           "activation": ("swiglu", "relu2"), "embedding_norm": (False,), "bias": (False,)},
    required=REQUIRED | {"mlp_bias": False},
    activation_field="hidden_act",
    # The MLP multiplies relu(x) by x, which is the squared relu.
    activations={"silu": "swiglu", "relu": "relu2"},
    gguf_activation="swiglu")

QWEN3 = replace(
    LLAMA, class_name="Qwen3ForCausalLM", flags=LLAMA.flags | {"qk_norm": (True,)},
    required=REQUIRED | {"use_sliding_window": False})

NANOCHAT = replace(
    LLAMA, class_name="NanoChatForCausalLM", gguf_activation="",
    flags=LLAMA.flags | {"norm": ("rms",), "qk_norm": (True,), "activation": ("relu2",),
                         "embedding_norm": (True,)},
    required=REQUIRED | {"final_logit_softcapping": None}, activations={"relu2": "relu2"})

# A model gets the first layout that has it.
FORMATS = {"gpt2": GPT2, "nanochat": NANOCHAT, "qwen3": QWEN3, "llama": LLAMA}
CLASSES = {layout: format.class_name for layout, format in FORMATS.items()}
NANOGPT_SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")
# A config.json that lacks one of these means another value than the supported one.
NEEDED = ("rms_norm_eps", "final_logit_softcapping")


def config_from(layout: str, published: Mapping[str, Any],
                place: str = "config.json") -> dict[str, Any]:
    """Fields of `GPTConfig` from Hugging Face's config.json, or from nanoGPT's `model_args`.

    Dropout is left out: it belongs to the training, not to the weights. Raises ValueError for a
    configuration that this model does not support. `GPTConfig.problems` checks the sizes.
    """
    # The sizes.
    if layout == "nanogpt":
        names = {name: name for name in NANOGPT_SIZES}
        return read_sizes(layout, names, [], published, place) | {"activation": "gelu_erf"}
    format = FORMATS[layout]
    needed = [name for name in NEEDED if name in format.required]
    config = read_sizes(layout, format.sizes, needed, published, place)

    # The flags.
    default = next(iter(format.activations))
    activation = str(published.get(format.activation_field, default))
    # An unsupported one is an error below.
    config["activation"] = format.activations.get(activation, "gelu")
    config["tie_head"] = published.get("tie_word_embeddings", layout == "gpt2")
    if layout != "gpt2":
        published = with_rotary_base(published)
        for name, values in format.flags.items():
            if len(values) == 1:
                config[name] = values[0]
        # Of the norms that Llama and Qwen3 have, published weights use the one with gains.
        config.setdefault("norm", "rms_gain")
        if config["n_kv_head"] == config["n_head"]:
            config["n_kv_head"] = None

    # Fields that have no flag here must have the values of this model.
    for name, values in supported_values(layout, config).items():
        value = published.get(name, values[0])
        if value not in values:
            raise ValueError(f"{place} has {name}={shown(value)}, which is not supported; "
                             f"supported are {', '.join(map(str, values))}.")
    return config


def read_sizes(layout: str, names: Mapping[str, str], needed: list[str],
               published: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Our sizes from the fields that `names` has for them.

    Raises ValueError if one is missing or no number, or if a `needed` field is missing.
    """
    missing = [name for name in (*names.values(), *needed) if name not in published]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}: it is no configuration of {layout}.")
    sizes = {ours: published[name] for ours, name in names.items()}
    for ours, name in names.items():
        if not isinstance(sizes[ours], int):
            raise ValueError(f"{place} has {name}={shown(sizes[ours])}, which is no number.")
    return sizes


def supported_values(layout: str, config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The supported values of fields of config.json, the default first.

    `config` has the sizes and the activation.
    """
    format = FORMATS[layout]
    supported = {name: [value] for name, value in format.required.items()}
    supported["tie_word_embeddings"] = [True, False]
    supported[format.activation_field] = list(format.activations)
    if layout == "gpt2":
        supported["n_inner"] = [None, 4 * config["n_embd"]]
    else:
        shape = GPTConfig(n_embd=config["n_embd"], activation=config["activation"])
        supported["intermediate_size"] = [shape.mlp_width]
        supported["head_dim"] = [config["n_embd"] // max(config["n_head"], 1)]
    return supported


def with_rotary_base(published: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with `rope_theta`, which is in `rope_parameters` since transformers 5."""
    scaled = published.get("rope_scaling") or published.get("rope_parameters") or {}
    found = dict(published)
    if isinstance(scaled, Mapping):
        found["rope_theta"] = scaled.get("rope_theta", published.get("rope_theta", ROTARY_BASE))
    if scaled and (not isinstance(scaled, Mapping) or scaled.get("rope_type") != "default"):
        # Stretched positions, which this model does not have.
        found["rope_theta"] = scaled
    return found


def config_to(layout: str, config: GPTConfig) -> dict[str, Any]:
    """The part of Hugging Face's config.json about the model."""
    # The sizes and the activation, under their names.
    format = FORMATS[layout]
    published = {name: getattr(config, ours) for ours, name in format.sizes.items()}
    activation = next(name for name, ours in format.activations.items()
                      if ours == config.activation)
    published |= {format.activation_field: activation, "tie_word_embeddings": config.tie_head}
    # What only GPT-2 has, or only the others.
    if layout == "gpt2":
        published |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    else:
        published |= {
            "num_key_value_heads": config.kv_heads, "head_dim": config.head_width,
            "intermediate_size": config.mlp_width, "attention_dropout": config.dropout,
            "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE}}
    return {"model_type": layout, "architectures": [format.class_name], **published,
            **format.required}


def layout_for(config: GPTConfig, gguf: bool = False) -> str:
    """The layout of Hugging Face, or of GGUF files, that has this model.

    N-gram embeddings are not considered. Raises ValueError with the reason if there is none.
    """
    if config.query_scale != 1:
        raise ValueError(f"Other programs do not scale attention by model.mup_base_head_width="
                         f"{config.mup_base_head_width}: train with heads of that width.")
    # The first layout without an unsupported flag.
    unsupported: dict[str, list[str]] = {}
    for layout, format in FORMATS.items():
        if gguf and not format.gguf_activation:
            continue
        unsupported[layout] = unsupported_flags(format, config, gguf)
        if not unsupported[layout]:
            return f"gguf-{layout}" if gguf else layout
    # There is none: name the one that lacks least.
    nearest = min(unsupported, key=lambda layout: len(unsupported[layout]))
    kind = f"class of transformers has this model: {CLASSES[nearest]}"
    if gguf:
        kind = f"GGUF architecture has this model: {nearest}"
    raise ValueError(f"No {kind}, the nearest, does not have {', '.join(unsupported[nearest])}.")


def unsupported_flags(format: Format, config: GPTConfig, gguf: bool) -> list[str]:
    """The flags of a model that a class does not have, each with the values that it has."""
    flags = dict(format.flags)
    if gguf:
        flags["activation"] = (format.gguf_activation,)
    if "n_kv_head" not in format.sizes and config.kv_heads != config.n_head:
        flags["n_kv_head"] = (None,)
    found = []
    for name, values in flags.items():
        value = getattr(config, name)
        if value not in values:
            found.append(f"model.{name}={as_word(value)} (only "
                         f"{' and '.join(map(as_word, values))})")
    return found


def shown(text: Any) -> str:
    """A text from a file, short and without control characters."""
    return ascii(text)[1:81].rstrip("'") if isinstance(text, str) else ascii(text)[:80]
