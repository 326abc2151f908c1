"""Weights and configurations under the names of other programs.

A layout is named as `model_type` in Hugging Face's config.json: "gpt2", "nanochat", "qwen3" and
"llama". Two kinds of files have layouts of their own: nanoGPT's checkpoints, "nanogpt", and GGUF
files, "gguf-gpt2", "gguf-qwen3" and "gguf-llama". One table for each layout says which published
tensor holds which tensor of ours, and serves both directions.

Knows tensors and plain dicts: opens no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from model.config import GPTConfig
from model.gpt import GPT
from model.skip_init import SkipInit
from setting import as_word

# The classes of transformers.
CLASSES = {"gpt2": "GPT2LMHeadModel", "nanochat": "NanoChatForCausalLM",
           "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
LAYOUTS = (*CLASSES, "nanogpt", "gguf-gpt2", "gguf-qwen3", "gguf-llama")

# The flags of GPTConfig that each class supports.
LIKE_LLAMA = {"position": ("rotary",), "norm": ("rms", "rms_gain"),
              "activation": ("swiglu", "relu2"), "embedding_norm": (False,), "bias": (False,)}
SUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {"position": ("learned",), "norm": ("layer",), "qk_norm": (False,),
             "activation": ("gelu", "gelu_erf", "relu2"), "embedding_norm": (False,)},
    "nanochat": {"position": ("rotary",), "norm": ("rms",), "qk_norm": (True,),
                 "activation": ("relu2",), "embedding_norm": (True,), "bias": (False,)},
    "qwen3": LIKE_LLAMA | {"qk_norm": (True,)},
    "llama": LIKE_LLAMA | {"qk_norm": (False,)},
}

# Our sizes, and their names in config.json.
NAMES_LIKE_LLAMA = {
    "block_size": "max_position_embeddings", "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size"}
SIZES = {
    "gpt2": {"block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer",
             "n_head": "n_head", "n_embd": "n_embd"},
    "nanogpt": {name: name for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd",
                                        "bias")},
    "nanochat": NAMES_LIKE_LLAMA,
    "qwen3": NAMES_LIKE_LLAMA,
    "llama": NAMES_LIKE_LLAMA,
}
# torch's default of RMSNorm in fp32.
EPSILON = torch.finfo(torch.float32).eps
ROTARY_BASE = 10_000.0
# Fields of config.json of which one value is supported.
REQUIRED_LIKE_LLAMA = {"rms_norm_eps": EPSILON, "attention_bias": False, "rope_theta": ROTARY_BASE}
REQUIRED: dict[str, dict[str, Any]] = {
    "gpt2": {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
             "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    "nanochat": REQUIRED_LIKE_LLAMA | {"final_logit_softcapping": None},
    "qwen3": REQUIRED_LIKE_LLAMA | {"use_sliding_window": False},
    "llama": REQUIRED_LIKE_LLAMA | {"mlp_bias": False},
    "nanogpt": {},
}
# Those whose default value is another one.
NEEDED = ("rms_norm_eps", "final_logit_softcapping")
# Activations in config.json, the default first, and ours.
ACTIVATIONS = {
    "gpt2": {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf",
             "relu2": "relu2"},
    "nanochat": {"relu2": "relu2"},
    "qwen3": {"silu": "swiglu", "relu": "relu2"},
    "llama": {"silu": "swiglu", "relu": "relu2"},
}

ACTIVATION_NAMES = {"gpt2": "activation_function", "nanochat": "hidden_act",
                    "qwen3": "hidden_act", "llama": "hidden_act"}
# Those of llama.cpp.
GGUF_ACTIVATION = {"gpt2": {"activation": ("gelu",)}, "qwen3": {"activation": ("swiglu",)},
                   "llama": {"activation": ("swiglu",)}}

# GPT-2 stores these transposed.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# What torch.compile and the class with the head put before the names.
PREFIX = re.compile(r"(_orig_mod\.)?(transformer\.)?")
# Masks and tables, which some versions store.
BUFFER = re.compile(r"(^|\.)h\.\d+\.attn\.(bias|masked_bias)$|rotary_emb\.inv_freq$")

# The table of n-gram embeddings has our name in all layouts.
NGRAMS = "ngram.table.weight"
# Parts of our names, and those in Llama's layout and in GGUF files.
PARTS_LIKE_LLAMA = {"h.": "model.layers.", "wte": "model.embed_tokens", "ln_f": "model.norm",
                    "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
                    "attn.c_proj": "self_attn.o_proj", "mlp.c_proj": "mlp.down_proj",
                    "mlp.c_gate": "mlp.gate_proj", "mlp.c_fc": "mlp.up_proj"}
PARTS_NANOCHAT = {"mlp.c_proj": "mlp.fc2", "mlp.c_fc": "mlp.fc1"}
PARTS_GGUF = {"h.": "blk.", "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm",
              "lm_head": "output", "ln_1": "attn_norm", "ln_2": "ffn_norm",
              "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_gate": "ffn_gate",
              "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}

Change = Literal["", "transposed", "negated", "interleaved"]


@dataclass(frozen=True)
class Entry:
    """A published tensor, and the tensor of ours with the same values.

    `rows` are its rows in ours; None: all. Without a tensor of ours, all values are `fill`. An
    optional tensor may be missing when weights are read, and is not written. `change` tells how the
    values differ from ours:

    - "transposed": the matrix is transposed.
    - "negated": the second half of each head's rows is negated, for rotation the other way.
    - "interleaved": the rows of each head's halves alternate, for rotation of adjacent pairs.
    """

    published: str
    shape: tuple[int, ...]
    ours: str = ""
    rows: slice | None = None
    change: Change = ""
    head_width: int = 1
    fill: float = 0.0
    optional: bool = False

    def publish(self, state: Mapping[str, Tensor]) -> Tensor:
        """The published tensor of our weights; a view where that is possible."""
        if not self.ours:
            return torch.full((), self.fill).expand(self.shape)
        tensor = state[self.ours]
        if self.rows is not None:
            tensor = tensor[self.rows]
        if self.change == "interleaved":
            # [heads, 2, D/2, C] -> [heads, D/2, 2, C]
            halves = tensor.unflatten(0, (-1, 2, self.head_width // 2))
            return halves.transpose(1, 2).flatten(0, 2)
        return self.changed(tensor)

    def restore(self, tensor: Tensor) -> Tensor:
        """The inverse of `publish`, in fp32."""
        tensor = tensor.float()
        if self.change == "interleaved":
            pairs = tensor.unflatten(0, (-1, self.head_width // 2, 2))
            return pairs.transpose(1, 2).flatten(0, 2)
        return self.changed(tensor).contiguous()

    def changed(self, tensor: Tensor) -> Tensor:
        """The changes that are their own inverse."""
        if self.change == "transposed":
            return tensor.mT
        if self.change == "negated":
            left, right = tensor.unflatten(0, (-1, 2, self.head_width // 2)).unbind(1)
            return torch.stack((left, -right), dim=1).flatten(0, 2)
        return tensor


def weights_from(layout: str, config: GPTConfig,
                 tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `GPT(config)` from published tensors, in fp32.

    Raises ValueError for a tensor that is missing, unknown, or of another shape or type.
    """
    entries = table(layout, config)
    names = match_names(layout, entries, list(tensors))
    pieces: dict[str, dict[int, Tensor]] = {}
    for entry in entries:
        if entry.published not in names:
            continue
        name = names[entry.published]
        tensor = tensors[name]
        if tuple(tensor.shape) != entry.shape:
            raise ValueError(f"The weights have {shown(name)} of the shape {list(tensor.shape)}; "
                             f"this configuration of {layout} has {list(entry.shape)}.")
        if not tensor.is_floating_point():
            raise ValueError(f"The weights have {shown(name)} of the type {tensor.dtype}; "
                             "supported are floating-point types.")
        restored = entry.restore(tensor)
        if not entry.ours:
            if not (restored == entry.fill).all():
                raise ValueError(f"The weights have {shown(name)} with values other than "
                                 f"{entry.fill:g}, which this configuration does not support.")
            continue
        start = entry.rows.start if entry.rows else 0
        known = pieces.setdefault(entry.ours, {}).setdefault(start, restored)
        if known is not restored and not torch.equal(known, restored):
            raise ValueError(f"The weights have {shown(name)} with other values than those of "
                             f"{entry.ours}, which must be equal.")
    state = {}
    for ours, found in pieces.items():
        rows = [found[start] for start in sorted(found)]
        state[ours] = rows[0] if len(rows) == 1 else torch.cat(rows)
    return state


def match_names(layout: str, entries: list[Entry], given: list[str]) -> dict[str, str]:
    """The given name of each published tensor. Raises ValueError for missing and unknown ones."""
    plain: dict[str, str] = {}
    for name in given:
        if BUFFER.search(name):
            continue
        short = PREFIX.sub("", name, count=1)
        if short in plain:
            raise ValueError(f"The weights have {shown(short)} twice, as {shown(plain[short])} and "
                             f"{shown(name)}.")
        plain[short] = name
    names: dict[str, str] = {}
    missing: list[str] = []
    for entry in entries:
        name = plain.pop(PREFIX.sub("", entry.published, count=1), None)
        if name is not None:
            names[entry.published] = name
        elif not entry.optional:
            missing.append(entry.published)
    unknown = sorted(plain.values())
    if missing:
        other = ""
        if unknown:
            other = f" They have {shown(unknown[0])}, which {layout} does not have."
        raise ValueError(f"The weights lack {listed(missing)} that this configuration of {layout} "
                         f"has.{other}")
    if unknown:
        raise ValueError(f"The weights have {listed(unknown)} that this configuration of {layout} "
                         "does not have.")
    return names


class Published(Mapping[str, Tensor]):
    """Tensors of ours in a layout. Each is made when it is asked for, and shares memory if it can.

    So a file can be written without a second copy of all weights.
    """

    def __init__(self, entries: list[Entry], state: Mapping[str, Tensor]) -> None:
        self.entries = {entry.published: entry for entry in entries if not entry.optional}
        self.state = state

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].publish(self.state)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def weights_to(layout: str, config: GPTConfig, state: Mapping[str, Tensor]) -> Published:
    """The published tensors of a state dict of `GPT(config)`."""
    return Published(table(layout, config), state)


def table(layout: str, config: GPTConfig) -> list[Entry]:
    """All tensors of a layout. Raises ValueError for a layout that is not supported."""
    check_layout(layout)
    shapes = state_shapes(config)
    if layout in ("gpt2", "nanogpt", "gguf-gpt2"):
        return list(gpt2_entries(layout, config, shapes))
    return list(llama_entries(layout, config, shapes))


def state_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of `GPT(config)`."""
    with SkipInit("meta"):
        return {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}


def gpt2_entries(layout: str, config: GPTConfig,
                 shapes: dict[str, tuple[int, ...]]) -> Iterator[Entry]:
    """The tensors of GPT-2, of nanoGPT, or of GPT-2 in a GGUF file."""
    published = shapes
    if layout != "nanogpt":
        # Its layers always have biases: without biases of ours they are zero.
        published = state_shapes(replace(config, bias=True))
    for name, shape in published.items():
        ours = name if name in shapes else ""
        if name == NGRAMS:
            yield Entry(name, shape, ours)
        elif layout == "gpt2" and name.endswith(TRANSPOSED):
            yield Entry(f"transformer.{name}", shape[::-1], ours, change="transposed")
        elif layout == "gguf-gpt2":
            yield Entry(renamed(name, PARTS_GGUF), shape, ours)
        else:
            prefix = "" if name.startswith("lm_head") else "transformer."
            yield Entry(f"{prefix}{name}", shape, ours)
    if config.tie_head:
        head = "output.weight" if layout == "gguf-gpt2" else "lm_head.weight"
        # nanoGPT stores the shared weights twice.
        yield Entry(head, shapes["wte.weight"], "wte.weight", optional=layout != "nanogpt")


def llama_entries(layout: str, config: GPTConfig,
                  shapes: dict[str, tuple[int, ...]]) -> Iterator[Entry]:
    """The tensors of Llama, of Qwen3 and of NanoChat, or of the first two in a GGUF file."""
    parts = PARTS_LIKE_LLAMA
    if layout == "nanochat":
        parts = PARTS_LIKE_LLAMA | PARTS_NANOCHAT
    elif layout.startswith("gguf-"):
        parts = PARTS_GGUF
    published = shapes
    if layout != "nanochat":
        # Its norms always have gains: without gains of ours they are one.
        published = state_shapes(replace(config, norm="rms_gain"))
    for name, shape in published.items():
        ours = name if name in shapes else ""
        if name.endswith("attn.c_attn.weight"):
            yield from heads_entries(layout, config, name)
            continue
        theirs = name if name == NGRAMS else renamed(name, parts)
        yield Entry(theirs, shape, ours, fill=1.0)
        # The product of relu(x) and x is the squared relu.
        is_c_fc = name.endswith("mlp.c_fc.weight")
        if is_c_fc and layout != "nanochat" and config.activation == "relu2":
            gate = name.replace("c_fc", "c_gate")
            yield Entry(renamed(gate, parts), shape, name)
    if config.tie_head:
        head = renamed("lm_head.weight", parts)
        yield Entry(head, shapes["wte.weight"], "wte.weight", optional=True)


def heads_entries(layout: str, config: GPTConfig, name: str) -> Iterator[Entry]:
    """The tensors of queries, keys and values, which ours has in one, and the gains of their norms.

    `name` is that of ours, as in "h.0.attn.c_attn.weight".
    """
    layer = name.split(".")[1]
    width, C = config.head_width, config.n_embd
    start = 0
    for letter, heads in (("q", config.n_head), ("k", config.kv_heads), ("v", config.kv_heads)):
        rows = slice(start, start + heads * width)
        start = rows.stop
        change: Change = ""
        if letter != "v" and layout == "nanochat":
            change = "negated"
        elif letter != "v" and layout == "gguf-llama":
            change = "interleaved"
        if layout.startswith("gguf-"):
            prefix, norm = f"blk.{layer}.attn_{letter}", f"blk.{layer}.attn_{letter}_norm"
        else:
            attention = f"model.layers.{layer}.self_attn."
            prefix, norm = f"{attention}{letter}_proj", f"{attention}{letter}_norm"
        yield Entry(f"{prefix}.weight", (heads * width, C), name, rows, change, width)
        if letter != "v" and layout in ("qwen3", "gguf-qwen3"):
            yield Entry(f"{norm}.weight", (width,), fill=1.0)


def renamed(name: str, parts: Mapping[str, str]) -> str:
    """Our name of a parameter with the parts that another layout has in their place."""
    prefix = ""
    if name.startswith("h."):
        _, layer, name = name.split(".", 2)
        prefix = f"{parts['h.']}{layer}."
    part, _, kind = name.rpartition(".")
    return f"{prefix}{parts.get(part, part)}.{kind}"


def layout_for(config: GPTConfig, gguf: bool = False) -> str:
    """The layout of Hugging Face, or of GGUF files, that has this model.

    N-gram embeddings are not considered. Raises ValueError with the reason if there is none.
    """
    if config.query_scale != 1:
        raise ValueError(f"Other programs do not scale attention by model.mup_base_head_width="
                         f"{config.mup_base_head_width}: train with heads of that width.")
    lacking: dict[str, list[str]] = {}
    for layout in CLASSES:
        name = f"gguf-{layout}" if gguf else layout
        if name in LAYOUTS:
            lacking[layout] = unsupported_flags(layout, config, gguf)
            if not lacking[layout]:
                return name
    nearest = min(lacking, key=lambda layout: len(lacking[layout]))
    kind = f"class of transformers has this model: {CLASSES[nearest]}"
    if gguf:
        kind = f"GGUF architecture has this model: {nearest}"
    raise ValueError(f"No {kind}, the nearest, does not have {', '.join(lacking[nearest])}.")


def unsupported_flags(layout: str, config: GPTConfig, gguf: bool) -> list[str]:
    """The flags of a model that a layout does not have, each with the values that it has."""
    flags = SUPPORTED[layout] | (GGUF_ACTIVATION[layout] if gguf else {})
    found = []
    for name, values in flags.items():
        value = getattr(config, name)
        if value not in values:
            found.append(f"model.{name}={as_word(value)} (only "
                         f"{' and '.join(map(as_word, values))})")
    if layout == "gpt2" and config.kv_heads != config.n_head:
        found.append(f"model.n_kv_head={config.n_kv_head} (only null)")
    return found


def config_from(layout: str, published: Mapping[str, Any],
                place: str = "config.json") -> dict[str, Any]:
    """Fields of `GPTConfig` from Hugging Face's config.json, or from nanoGPT's `model_args`.

    Dropout is left out: it belongs to the training, not to the weights. Raises ValueError for a
    configuration that this model does not support. `GPTConfig.problems` checks the sizes.
    """
    check_layout(layout, (*CLASSES, "nanogpt"))
    missing = [name for name in SIZES[layout].values() if name not in published]
    missing += [name for name in NEEDED if name in REQUIRED[layout] and name not in published]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}: it is no configuration of {layout}.")
    config = {ours: published[name] for ours, name in SIZES[layout].items()}
    for ours, name in SIZES[layout].items():
        if not isinstance(config[ours], int):
            raise ValueError(f"{place} has {name}={shown(config[ours])}, which is no number.")
    if layout == "nanogpt":
        return config | {"activation": "gelu_erf"}

    tied = published.get("tie_word_embeddings", layout == "gpt2")
    supported = {name: [value] for name, value in REQUIRED[layout].items()}
    supported["tie_word_embeddings"] = [True, False]
    activation_name = ACTIVATION_NAMES[layout]
    supported[activation_name] = list(ACTIVATIONS[layout])
    default = next(iter(ACTIVATIONS[layout]))
    activation = ACTIVATIONS[layout].get(str(published.get(activation_name, default)), "gelu")
    config |= {"tie_head": tied, "activation": activation}
    if layout == "gpt2":
        supported["n_inner"] = [None, 4 * config["n_embd"]]
    else:
        config |= {name: values[0] for name, values in SUPPORTED[layout].items()
                   if len(values) == 1}
        if layout != "nanochat":
            config["norm"] = "rms_gain"
        if config["n_kv_head"] == config["n_head"]:
            config["n_kv_head"] = None
        published = with_rotary_base(published)
        shape = GPTConfig(n_embd=config["n_embd"], activation=activation)
        supported["intermediate_size"] = [shape.mlp_width]
        supported["head_dim"] = [config["n_embd"] // max(config["n_head"], 1)]
    for name, values in supported.items():
        value = published.get(name, values[0])
        if value not in values:
            raise ValueError(f"{place} has {name}={shown(value)}, which is not supported; "
                             f"supported are {', '.join(map(str, values))}.")
    return config


def with_rotary_base(published: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with `rope_theta`, which is in `rope_parameters` since transformers 5."""
    scaled = published.get("rope_scaling") or published.get("rope_parameters") or {}
    found = dict(published)
    if isinstance(scaled, Mapping):
        base = published.get("rope_theta", ROTARY_BASE)
        found["rope_theta"] = scaled.get("rope_theta", base)
    if scaled and (not isinstance(scaled, Mapping) or scaled.get("rope_type") != "default"):
        # Stretched positions, which this model does not have.
        found["rope_theta"] = scaled
    return found


def config_to(layout: str, config: GPTConfig) -> dict[str, Any]:
    """The part of Hugging Face's config.json about the model."""
    published = {name: getattr(config, ours) for ours, name in SIZES[layout].items()}
    known = ACTIVATIONS[layout].items()
    activation = next(name for name, ours in known if ours == config.activation)
    published |= {ACTIVATION_NAMES[layout]: activation, "tie_word_embeddings": config.tie_head}
    if layout == "gpt2":
        published |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    else:
        published |= {
            "num_key_value_heads": config.kv_heads, "head_dim": config.head_width,
            "intermediate_size": config.mlp_width, "attention_dropout": config.dropout,
            "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE}}
    return {"model_type": layout, "architectures": [CLASSES[layout]], **published,
            **REQUIRED[layout]}


def check_layout(layout: str, supported: tuple[str, ...] = LAYOUTS) -> None:
    if layout not in supported:
        raise ValueError(f"model_type={shown(layout)} is not supported; supported are "
                         f"{', '.join(supported)}.")


def shown(text: Any) -> str:
    """A text from a file, short and without control characters."""
    return ascii(text)[1:81].rstrip("'") if isinstance(text, str) else ascii(text)[:80]


def listed(names: list[str]) -> str:
    """The first of some tensors, and the number of the others."""
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{shown(names[0])}{rest}"
