"""Check imported weights by the logits of transformers, or by the loss on a sentence."""

import hashlib
import importlib.util
import inspect
import math
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import atomic
from checkpointing.pretrained import CONFIG, INDEX_SUFFIX, TENSORS
from checkpointing.provenance import versions
from checkpointing.weight_files import read_json
from checkpointing.weights import Weights
from data.store import data_root
from model import GPTConfig
from model.formats import CLASSES

# The loss on this sentence shows whether a model knows English.
SENTENCE = ("It is a truth universally acknowledged, that a single man in possession of a good "
            "fortune, must be in want of a wife.")
# Parameters of a model that is compared with transformers: loading it takes seconds.
MOST_COMPARED = 2**28
# From the logits of transformers, relative to the largest: in fp32, sums are rounded differently.
LARGEST_DIFFERENCE = 1e-4


@torch.no_grad()
def check(weights: Weights, fingerprint: str) -> str:
    """A sentence about a check of the weights; empty if their tokenizer cannot encode English.

    Where transformers is installed and has this model, its logits must be ours, or ValueError is
    raised. Elsewhere the loss is told: wrong weights make it as large as that of a guess.
    """
    ids = sentence_ids(weights)
    if ids is None:
        return ""
    if is_comparable(weights):
        # It takes seconds and has the same result the next time, so the sentence is kept.
        result = data_root() / "checked_weights" / f"{comparison_key(weights, fingerprint)}.txt"
        with suppress(OSError, ValueError):
            return f"{result.read_text()} (compared before)"
        compared = compare(weights, ids)
        if compared:
            # Without the file, they are compared again.
            with suppress(OSError):
                atomic.write_bytes(result, compared.encode())
            return compared
    logits = weights.model()(ids)  # [1, T, V]
    loss = F.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    return (f"Check of the weights: the loss on a sentence of English is {loss:.2f}; that of a "
            f"guess is {math.log(weights.config.vocab_size):.2f}")


def compare(weights: Weights, ids: Tensor) -> str:
    """How much the logits for `ids` `[1, T]` differ from those of transformers.

    Empty if transformers does not have the model. Raises ValueError if they are not the same.
    """
    theirs = logits_of_transformers(weights, ids)
    if theirs is None:
        return ""
    # Both compute the same function, and round differently.
    difference = (weights.model()(ids) - theirs).abs().max().item()
    largest = theirs.abs().max().item()
    compared = (f"the logits of a sentence differ from those of transformers by at most "
                f"{difference:.1e}, of {largest:.1f}")
    if not difference <= LARGEST_DIFFERENCE * largest:
        raise ValueError(f"{weights.place} is not used: {compared}, more than "
                         f"{LARGEST_DIFFERENCE:g} of the largest. Please report this.")
    return f"Check of the weights: {compared}"


def sentence_ids(weights: Weights) -> Tensor | None:
    """The ids `[1, T]` of SENTENCE, cut to the context; None where they are not known."""
    if weights.tokenizer is None:
        return None
    try:
        ids = weights.tokenizer.encode(SENTENCE)[: weights.config.block_size]
    except ValueError:
        # A character that the training text did not have.
        return None
    return torch.tensor([ids]) if len(ids) > 1 else None


def is_comparable(weights: Weights) -> bool:
    """Whether transformers is installed, and loads the folder of these weights within seconds."""
    folder = weights.place
    has_tensors = any((folder / name).exists() for name in (TENSORS, f"{TENSORS}{INDEX_SUFFIX}"))
    is_small = sum(tensor.numel() for tensor in weights.tensors.values()) <= MOST_COMPARED
    # The classes of transformers have no n-gram embeddings.
    has_class = (folder / CONFIG).exists() and weights.config.ngrams == 1
    is_installed = importlib.util.find_spec("transformers") is not None
    return has_class and has_tensors and is_small and is_installed


def logits_of_transformers(weights: Weights, ids: Tensor) -> Tensor | None:
    """The logits `[1, T, V]` of the package transformers for comparable weights.

    None if its version does not have their class.
    """
    import transformers

    folder = weights.place
    name = CLASSES[read_json(folder / CONFIG)["model_type"]]
    if not hasattr(transformers, name):
        return None
    model = getattr(transformers, name).from_pretrained(folder, local_files_only=True,
                                                        use_safetensors=True)
    return model.float().eval()(ids).logits


def comparison_key(weights: Weights, fingerprint: str) -> str:
    """Changes with the weights, their configuration, and the programs that are compared."""
    digest = hashlib.sha256(f"{fingerprint} {versions()}".encode())
    code = sorted(Path(inspect.getfile(GPTConfig)).parent.glob("*.py"))
    for path in (weights.place / CONFIG, *code):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
