"""Write a GGUF file, which llama.cpp and the programs that are built on it run, and check it.

Needs the package gguf. The check reads the file back and runs its tensors in our own model.
"""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from checkpointing.weights import Weights
from data.bpe import BPETokenizer
from data.hugging_face import to_hugging_face
from data.patterns import CL100K_TIKTOKEN, GPT2, GPT2_TIKTOKEN, LLAMA3, O200K, PATTERN, QWEN2
from data.tokenizer import ExtendedTokenizer, Tokenizer
from exporting.check import our_logits
from model import GPTConfig
from model.formats import EPSILON, GPT2_EPSILON, ROTARY_BASE, layout_for
from model.layouts import table
from model.pretrained import weights_from
from optional import import_optional

# llama.cpp's names of the patterns that split a text into words before merging.
SPLITTERS = {PATTERN: "llama-bpe", LLAMA3: "llama-bpe", CL100K_TIKTOKEN: "llama-bpe",
             GPT2: "gpt-2", GPT2_TIKTOKEN: "gpt-2", QWEN2: "qwen2", O200K: "gpt-4o"}
PUBLISHED_SPLITTERS = {"gpt2": "gpt-2", "cl100k_base": "llama-bpe", "o200k_base": "gpt-4o"}


def import_gguf() -> ModuleType:
    return import_optional("gguf", "format=gguf needs the package gguf", "gguf")


def choose_layout(config: GPTConfig) -> str:
    """The layout of a model. Raises ValueError with the reason if llama.cpp lacks it."""
    if config.ngrams > 1:
        raise ValueError(f"GGUF files have no n-gram embeddings (model.ngrams={config.ngrams}): "
                         "train with model=llama-style or a GPT-2 preset.")
    return layout_for(config, gguf=True)


def splitter(tokenizer: Tokenizer) -> str:
    """llama.cpp's name of how the tokenizer splits a text. Raises ValueError if it has none."""
    base = tokenizer.base if isinstance(tokenizer, ExtendedTokenizer) else tokenizer
    if not isinstance(base, BPETokenizer):
        raise ValueError("GGUF files have no tokenizer of characters or bytes: train with "
                         "data.tokenizer=bpe or gpt2.")
    if base.normalizer:
        raise ValueError(f"GGUF files have no {base.normalizer} normalization, which this "
                         "tokenizer begins with: train with data.tokenizer=bpe or gpt2.")
    found = PUBLISHED_SPLITTERS.get(base.encoding.name) or SPLITTERS.get(base.pattern)
    if found is None:
        raise ValueError("llama.cpp does not have the pattern by which this tokenizer splits a "
                         "text: train with data.tokenizer=bpe or gpt2.")
    return found


def write_file(path: Path, weights: Weights, layout: str, name: str) -> None:
    """Write a GGUF file, tensor by tensor."""
    # The metadata: name, shape and tokenizer.
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, layout.removeprefix("gguf-"))
    writer.add_name(name)
    add_shape(writer, weights.config)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_tokenizer(gguf, writer, weights.tokenizer)

    # The header lists all tensors, whose data follows.
    entries = [entry for entry in table(layout, weights.config) if not entry.optional]
    for entry in entries:
        nbytes = 4 * torch.Size(entry.shape).numel()
        writer.add_tensor_info(entry.published, entry.shape, np.dtype(np.float32), nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.publish(weights.tensors).contiguous().numpy())
    finally:
        writer.close()


def add_shape(writer: object, config: GPTConfig) -> None:
    """The sizes of the model."""
    # Those of all architectures.
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.n_head)
    # Learned positions are those of GPT-2, whose norms are layer norms.
    if config.position == "learned":
        writer.add_layer_norm_eps(GPT2_EPSILON)
        return
    # Llama and Qwen3: grouped keys and values, RMS norms and rotary positions.
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(ROTARY_BASE)
    writer.add_vocab_size(config.vocab_size)


def add_tokenizer(gguf: ModuleType, writer: object, tokenizer: Tokenizer) -> None:
    """The tokens, their types and their merges."""
    # Ordinary tokens as Hugging Face's tokenizers write them. Each id needs a token, also those
    # that pad the vocabulary.
    model = to_hugging_face(tokenizer)["model"]
    base = tokenizer.base if isinstance(tokenizer, ExtendedTokenizer) else tokenizer
    kinds = gguf.TokenType
    words = [f"[UNUSED{token}]" for token in range(tokenizer.vocab_size)]
    types = [kinds.UNUSED] * tokenizer.vocab_size
    for word, token in model["vocab"].items():
        words[token], types[token] = word, kinds.NORMAL

    # The special tokens, which `model` lists, too.
    for word, token in tokenizer.special.items():
        # llama.cpp finds user-defined tokens in any text, and the others only where asked.
        types[token] = kinds.USER_DEFINED if word in base.in_text else kinds.CONTROL

    # llama.cpp calls every byte-pair encoding "gpt2". A text begins without a special token.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter(tokenizer))
    writer.add_token_list(words)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)


def read_back(path: Path, weights: Weights, layout: str, ids: Tensor) -> Tensor:
    """The logits of our model with the tensors of a file and the shape of `weights`."""
    # "c" maps the file into memory, and writes nothing to it.
    found = import_gguf().GGUFReader(path, "c").tensors
    published = {tensor.name: torch.from_numpy(np.asarray(tensor.data)) for tensor in found}
    tensors = weights_from(layout, weights.config, published)
    return our_logits(replace(weights, tensors=tensors), ids)
