"""The tensors of published weights: which of them holds which tensor of ours, and how it differs.

One table for each layout (formats.py) lists its tensors, and serves both directions. Knows names
and tensors: opens no file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from model.config import GPTConfig
from model.gpt import GPT

# GPT-2 stores these transposed.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# The table of n-gram embeddings has our name in all layouts.
NGRAMS = "ngram.table.weight"

# Parts of our names, and those in their place in Llama's layout and in GGUF files. Where queries,
# keys and values are separate, `attn.c_attn` becomes `attn.q`, `attn.k` and `attn.v`.
PARTS_LLAMA = {
    "h.": "model.layers.", "wte": "model.embed_tokens", "ln_f": "model.norm",
    "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
    "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
    "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_gate": "mlp.gate_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
PARTS_GGUF = {
    "h.": "blk.", "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm",
    "lm_head": "output", "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv",
    "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v",
    "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm", "attn.c_proj": "attn_output",
    "mlp.c_gate": "ffn_gate", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}

PARTS = {
    "nanochat": PARTS_LLAMA | {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"},
    "qwen3": PARTS_LLAMA, "llama": PARTS_LLAMA,
    "gguf-gpt2": PARTS_GGUF, "gguf-qwen3": PARTS_GGUF, "gguf-llama": PARTS_GGUF}

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
        return self.transpose_or_negate(tensor)

    def restore(self, tensor: Tensor) -> Tensor:
        """The inverse of `publish`, in fp32; a view where that is possible."""
        tensor = tensor.float()
        if self.change == "interleaved":
            # [heads, D/2, 2, C] -> [heads, 2, D/2, C]
            pairs = tensor.unflatten(0, (-1, self.head_width // 2, 2))
            return pairs.transpose(1, 2).flatten(0, 2)
        return self.transpose_or_negate(tensor)

    def transpose_or_negate(self, tensor: Tensor) -> Tensor:
        """The changes that are their own inverse."""
        if self.change == "transposed":
            return tensor.mT
        if self.change == "negated":
            # [heads, 2, D/2, C]
            left, right = tensor.unflatten(0, (-1, 2, self.head_width // 2)).unbind(1)
            return torch.stack((left, -right), dim=1).flatten(0, 2)
        return tensor


def table(layout: str, config: GPTConfig) -> list[Entry]:
    """All tensors of a layout."""
    # The published tensors under our names. GPT-2's layers always have biases, and the norms of
    # Llama and Qwen3 gains: without ours, the biases are zero, and the gains one.
    is_gpt2 = layout in ("gpt2", "nanogpt", "gguf-gpt2")
    shapes = published = state_shapes(config)
    if layout in ("gpt2", "gguf-gpt2"):
        published = state_shapes(replace(config, bias=True))
    elif layout not in ("nanogpt", "nanochat"):
        published = state_shapes(replace(config, norm="rms_gain"))

    # Their names, and how they are stored.
    entries = []
    for name, shape in published.items():
        theirs = published_name(layout, name)
        ours = name if name in shapes else ""
        if name.endswith("attn.c_attn.weight") and not is_gpt2:
            entries += heads_entries(layout, config, name)
        elif name.endswith(TRANSPOSED) and layout == "gpt2":
            entries.append(Entry(theirs, shape[::-1], ours, change="transposed"))
        else:
            entries.append(Entry(theirs, shape, ours, fill=0.0 if is_gpt2 else 1.0))
        # The product of relu(x) and x is the squared relu.
        has_gate = not is_gpt2 and layout != "nanochat" and config.activation == "relu2"
        if name.endswith("mlp.c_fc.weight") and has_gate:
            gate = published_name(layout, name.replace("c_fc", "c_gate"))
            entries.append(Entry(gate, shape, name))
    if config.tie_head:
        # nanoGPT stores the shared weights twice.
        head = published_name(layout, "lm_head.weight")
        is_left_out = layout != "nanogpt"
        entries.append(Entry(head, shapes["wte.weight"], "wte.weight", optional=is_left_out))
    return entries


def state_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of `GPT(config)`."""
    return {name: tuple(tensor.shape) for name, tensor in GPT.empty(config).state_dict().items()}


def heads_entries(layout: str, config: GPTConfig, name: str) -> Iterator[Entry]:
    """The tensors of queries, keys and values, which ours has in one, and the gains of their norms.

    `name` is that of ours, as in "h.0.attn.c_attn.weight".
    """
    width, C = config.head_width, config.n_embd
    start = 0
    for letter, heads in (("q", config.n_head), ("k", config.kv_heads), ("v", config.kv_heads)):
        rows = slice(start, start + heads * width)
        start = rows.stop
        # Values are not rotated, so they are the same in all layouts.
        change: Change = ""
        if letter != "v" and layout == "nanochat":
            change = "negated"
        elif letter != "v" and layout == "gguf-llama":
            change = "interleaved"
        theirs = published_name(layout, name.replace("c_attn", letter))
        yield Entry(theirs, (heads * width, C), name, rows, change, width)
        if letter != "v" and layout in ("qwen3", "gguf-qwen3"):
            # Its norms of queries and keys always have gains; ours have none.
            gain = published_name(layout, name.replace("c_attn", f"{letter}_norm"))
            yield Entry(gain, (width,), fill=1.0)


def published_name(layout: str, name: str) -> str:
    """The name of our parameter in a layout."""
    if name == NGRAMS:
        return name
    if layout not in PARTS:
        return name if name.startswith("lm_head") else f"transformer.{name}"
    # The parts of the name, and before them the layer.
    parts, prefix = PARTS[layout], ""
    if name.startswith("h."):
        _, layer, name = name.split(".", 2)
        prefix = f"{parts['h.']}{layer}."
    part, _, kind = name.rpartition(".")
    return f"{prefix}{parts.get(part, part)}.{kind}"
