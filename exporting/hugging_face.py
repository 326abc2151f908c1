"""Write a folder that the package transformers loads, and check it.

Knows no command line. The check is by transformers if it is installed; otherwise the written
weights are read back into our own model.
"""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import atomic
from checkpointing.snapshot import safetensors_chunks
from checkpointing.weights import Weights
from data.chat import END, JINJA, has_markers
from data.hugging_face import to_hugging_face
from data.tokenizer import Tokenizer
from exporting.check import compared_positions, our_logits
from model import GPTConfig
from model.formats import CLASSES, config_to, layout_for
from model.pretrained import weights_from, weights_to

WEIGHTS = "model.safetensors"
# A module with a class that has n-gram embeddings, derived from NanoChat's.
MODELING = Path(__file__).with_name("modeling_nanohydra.py")


def choose_layout(config: GPTConfig, remote_code: bool) -> str:
    """The layout of a model. Raises ValueError with the reason if transformers lacks its class."""
    layout = layout_for(config)
    if config.ngrams > 1 and not remote_code:
        raise ValueError(f"No class of transformers has n-gram embeddings (model.ngrams="
                         f"{config.ngrams}): pass remote_code=true, which writes a class that "
                         "trust_remote_code=True loads, or train with model.ngrams=1.")
    return layout


def write_folder(folder: Path, weights: Weights, layout: str) -> None:
    """Write the files of a model into an empty folder, tensor by tensor."""
    # The configurations and the tokenizer.
    config, tokenizer = weights.config, weights.tokenizer
    # The token between documents begins and ends a text. Answers also end at their marker.
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end_of_text)
    ends = {"eos_token_id": [tokenizer.end_of_text, tokenizer.special.get(END)]}
    contents: dict[str, Any] = {
        "config.json": model_config(config, layout) | ids,
        "generation_config.json": ids | ends if has_markers(tokenizer) else ids,
        "tokenizer.json": to_hugging_face(tokenizer),
        "tokenizer_config.json": tokenizer_config(config, tokenizer),
    }
    for name, content in contents.items():
        # The list of all tokens has no line for each.
        indent = None if name == "tokenizer.json" else 2
        text = json.dumps(content, ensure_ascii=False, indent=indent)
        atomic.write_file(folder / name, [text.encode()])

    # The code of a class that transformers does not have, and the weights.
    if config.ngrams > 1:
        atomic.write_file(folder / MODELING.name, [modeling_source(layout).encode()])
    tensors = weights_to(layout, config, weights.tensors)
    atomic.write_file(folder / WEIGHTS, safetensors_chunks(tensors, metadata={"format": "pt"}))


def model_config(config: GPTConfig, layout: str) -> dict[str, Any]:
    """The content of config.json, without special tokens."""
    content = config_to(layout, config) | {"dtype": "float32"}
    if config.ngrams > 1:
        name = class_name(config, layout)
        content |= {"model_type": "nanohydra", "architectures": [name],
                    "ngrams": config.ngrams, "ngram_rows": config.ngram_rows,
                    "auto_map": {"AutoConfig": f"{MODELING.stem}.NanohydraConfig",
                                 "AutoModelForCausalLM": f"{MODELING.stem}.{name}"}}
    return content


def tokenizer_config(config: GPTConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size,
               "clean_up_tokenization_spaces": False,
               # Without token_type_ids, which GPT-2 would embed.
               "model_input_names": ["input_ids", "attention_mask"],
               # In a text, special tokens are plain text.
               "split_special_tokens": True}
    for word, token in tokenizer.special.items():
        if token == tokenizer.end_of_text:
            content |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), word)
    if has_markers(tokenizer):
        # transformers makes a text of a conversation first, with the markers.
        content |= {"chat_template": JINJA, "split_special_tokens": False}
    return content


def modeling_source(layout: str) -> str:
    """The module with the class that has n-gram embeddings, derived from that of `layout`."""
    base = CLASSES[layout].removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    source = MODELING.read_text().replace("NanoChatForCausalLM", CLASSES[layout])
    return source.replace("NanoChatConfig", f"{base}Config")


def class_name(config: GPTConfig, layout: str) -> str:
    """The class that loads the folder."""
    return "NanohydraForCausalLM" if config.ngrams > 1 else CLASSES[layout]


def check_folder(folder: Path, weights: Weights, layout: str, text: str,
                 ids: Tensor) -> tuple[Tensor, str]:
    """The logits of the model in a folder, and the program that computed them.

    Of `weights`, it uses the shape and the tokenizer. Raises ValueError if the tokenizer in the
    folder is not the same.
    """
    # By transformers, if it is installed and has the class.
    try:
        import transformers
    except ImportError:
        reason = "transformers is not installed"
    else:
        version = f"transformers {transformers.__version__}"
        if hasattr(transformers, CLASSES[layout]):
            logits = transformers_logits(folder, weights.config, ids)
            check_tokenizer(folder, weights.tokenizer, text)
            return logits, version
        reason = f"{version} has no {CLASSES[layout]}"

    # Without its class of transformers, our own model reads the written weights.
    tensors = weights_from(layout, weights.config, load_file(folder / WEIGHTS))
    logits = our_logits(replace(weights, tensors=tensors), ids)
    return logits, f"this model with the written weights ({reason})"


def transformers_logits(folder: Path, config: GPTConfig, ids: Tensor) -> Tensor:
    """The logits `[1, P, V]` of the model in a folder, loaded by transformers."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    auto = transformers.AutoModelForCausalLM
    if config.ngrams > 1:
        # As trust_remote_code=True, which would keep a copy of the module in the user's cache.
        found = importlib.util.spec_from_file_location(MODELING.stem, folder / MODELING.name)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        auto = module.NanohydraForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        positions = compared_positions(ids, config.vocab_size)
        return model(ids, use_cache=False, logits_to_keep=positions).logits


def check_tokenizer(folder: Path, tokenizer: Tokenizer, text: str) -> None:
    """Raise ValueError if transformers' tokenizer gives other ids than ours."""
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    part = text[:100_000]
    if theirs(part, verbose=False)["input_ids"] != tokenizer.encode(part):
        raise ValueError("The exported tokenizer is not the same: transformers gives other ids for "
                         "the same text. Nothing was written.")
