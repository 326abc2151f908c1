"""The loss of a model on a text, with standard errors.

The text is read in sequences of one context each, without overlap, as training validates.
"""

import math
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conf.convert import freeze
from conf.evaluation import TextConfig
from data.bin_format import describe_bin
from data.bins import ENDINGS, count_tokens, find_bins
from data.config import DataConfig
from data.document import SpecialToken
from data.loader import Validation
from data.prepare import find_prepared, load_tokenizer, prepare
from data.run_data import markers_in, open_validation
from data.shards import Tokens, map_shard, read_meta
from data.sources import open_sources
from data.tokenizer import Tokenizer
from evaluation.scoring import Scorer
from generation.engine import Engine
from model.loss import MASKED, next_token_loss
from progress import ProgressBar
from terminal import counted
from training.step import document_options


@dataclass(frozen=True)
class Text:
    """A text in the tokens of one model, ready to be read."""

    name: str
    # Two models were measured on the same text if this is equal.
    identity: str
    validation: Validation
    bytes_per_token: float
    # The token that starts a document, if attention does not cross documents.
    boundary: int | None = None


def own_validation_split(saved: dict[str, Any], scorer: Scorer, run: Path,
                         max_tokens: int | None) -> Text:
    """The validation split of a run, from the flat settings `saved` in its checkpoint.

    Raises ValueError if the tokens are gone and cannot be prepared again.
    """
    # Find the tokens that the run was validated on, or prepare them again.
    config = data_config(saved, run)
    prepared = prepared_again(config, str(saved["data.prepared"]), run)
    tokenizer = load_tokenizer(prepared)

    # Read them as training does.
    validation, bytes_per_token = open_validation(
        prepared, config, tokenizer, markers_in(config, tokenizer),
        scorer.engine.model.config.block_size, scorer.batch_size, max_tokens)
    boundary = tokenizer.end_of_text if config.respect_documents else None
    identity = f"validation split {read_meta(prepared)['fingerprint'][:12]}"
    return Text("validation split", identity, validation, bytes_per_token, boundary)


def data_config(saved: dict[str, Any], run: Path) -> DataConfig:
    """The settings of the text that a run was trained on. Raises ValueError for invalid ones."""
    problems: list[str] = []
    values = {one.name: saved[f"data.{one.name}"] for one in fields(DataConfig)}
    config = freeze(DataConfig, values, "data.", problems)
    if problems:
        raise ValueError(f"{run} has invalid settings: {problems[0]}")
    return config


def prepared_again(config: DataConfig, expected: str, run: Path) -> Path:
    """The folder of the tokens whose fingerprint starts with `expected`."""
    found = find_prepared(expected)
    if found:
        return found
    problem = "its text has changed"
    try:
        found = prepare(config)
        if read_meta(found)["fingerprint"].startswith(expected):
            return found
    except (ValueError, OSError) as error:
        problem = str(error).rstrip(".")
    raise ValueError(f"The validation split of {run} is gone, and cannot be prepared again "
                     f"({problem}): name a text instead, as in data.path=book.txt.")


def named_text(named: TextConfig, saved: dict[str, Any], scorer: Scorer,
               max_tokens: int | None) -> Text:
    """The text of files, or their tokens, in the tokens of the model.

    `saved` are the flat settings of a run, which say whether attention crosses documents. Raises
    ValueError for a text that is shorter than one context, or that the tokenizer cannot encode.
    """
    # Read the tokens, or encode the text.
    path, tokenizer = named.path, scorer.engine.tokenizer
    config = DataConfig(source="text", path=path, text_field=named.text_field,
                        on_bad_record=named.on_bad_record, encoding=named.encoding,
                        errors=named.errors)
    problems = list(config.problems())
    if problems:
        raise ValueError(f"data.{problems[0]}")
    bins = bins_of(path)
    if bins:
        shards = [describe_bin(file, tokenizer.vocab_size, named.dtype) for file in bins]
        # Raises ValueError for damaged files, and for an id that the tokenizer does not have.
        bytes_per_token = count_tokens(shards, tokenizer)["bytes_per_token"]
        tokens = Tokens([map_shard(Path(), shard) for shard in shards])
    else:
        ids, n_bytes = read_documents(config, tokenizer, max_tokens)
        tokens, bytes_per_token = Tokens([ids]), n_bytes / max(1, len(ids))

    # Divide them into contexts.
    block_size = scorer.engine.model.config.block_size
    if len(tokens) <= block_size:
        raise ValueError(f"data.path={path} has {counted(len(tokens), 'token')}, one context of "
                         f"the model needs {block_size + 1:,}: name a longer text.")
    validation = Validation([tokens], block_size, scorer.batch_size, max_tokens or len(tokens))
    boundary = tokenizer.end_of_text if saved.get("data.respect_documents") else None
    return Text(path, path, validation, bytes_per_token, boundary)


def bins_of(path: str) -> list[Path]:
    """The files of tokens that a path names: itself, or those for validation in a folder or glob.

    Empty if it names a text. Raises ValueError for a folder or glob without tokens for validation.
    """
    place = Path(path)
    names_bins = place.suffix.lower() in ENDINGS
    if names_bins and place.is_file():
        return [place]
    has_bins = place.is_dir() and any(file.suffix.lower() in ENDINGS for file in place.iterdir())
    return find_bins(path)["val"] if has_bins or names_bins else []


def read_documents(config: DataConfig, tokenizer: Tokenizer,
                   max_tokens: int | None) -> tuple[np.ndarray, int]:
    """The tokens of all documents, and their bytes; reads a little more than `max_tokens`.

    As in training, each of several documents is followed by the end-of-text token.
    """
    ends = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    end_of_text = np.array(ends, dtype=np.uint32)
    chunks = [end_of_text[:0]]
    n_tokens = n_bytes = n_documents = 0
    documents = chain.from_iterable(one.documents() for one in open_sources(config).values())
    for n_documents, document in enumerate(documents, 1):
        if n_documents > 1:
            chunks.append(end_of_text)
        for piece in document.pieces():
            if isinstance(piece, SpecialToken):
                continue
            chunks.append(tokenizer.encode_array(piece).astype(np.uint32))
            n_tokens += len(chunks[-1])
            n_bytes += len(piece.encode())
            # One more token, the target of the last.
            if max_tokens and n_tokens > max_tokens:
                return np.concatenate(chunks), n_bytes
    if n_documents > 1:
        chunks.append(end_of_text)
    return np.concatenate(chunks), n_bytes


def measure_loss(scorer: Scorer, text: Text, title: str) -> dict[str, Any]:
    """The mean loss on a text in nats per token, perplexity and bits per byte, with their errors.

    The standard errors treat the sequences as independent samples of the text.
    """
    sums, counts = sequence_losses(scorer, text, title)

    # The mean of the parts of a mixture by their shares; its variance is that of a weighted sum.
    loss = variance = 0.0
    ends = np.cumsum(text.validation.n_windows)[:-1]
    parts = zip(np.split(sums, ends), np.split(counts, ends), strict=True)
    for part, share in zip(parts, text.validation.shares, strict=True):
        mean, part_variance = mean_of_sums(*part)
        loss += share * mean
        variance += share**2 * part_variance

    error = math.sqrt(variance)
    per_byte = 1 / (math.log(2) * text.bytes_per_token)
    # Past the largest number, perplexity is infinite.
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"text": text.name, "identity": text.identity, "sequences": len(sums),
            "tokens": int(counts.sum()), "loss": loss, "loss_se": error,
            "perplexity": perplexity, "perplexity_se": perplexity * error,
            "bits_per_byte": loss * per_byte, "bits_per_byte_se": error * per_byte}


@torch.inference_mode()
def sequence_losses(scorer: Scorer, text: Text, title: str) -> tuple[np.ndarray, np.ndarray]:
    """The sum of the losses of each sequence, and the number of its targets."""
    cache, sums, counts = scorer.cache, [], []
    total = sum(text.validation.n_windows)
    with ProgressBar(total=total, desc=title, unit="sequences", leave=False) as bar:
        for inputs, targets, _ in text.validation:
            # Those that are in the cache are not read again.
            keys = [cache.key(*pair, text.boundary)
                    for pair in zip(inputs.tolist(), targets.tolist(), strict=True)]
            if not all(key in cache.results for key in keys):
                losses = row_losses(scorer.engine, inputs, targets, text.boundary)
                for key, loss in zip(keys, losses, strict=True):
                    cache.add(key, loss)
            losses = [cache.results[key] for key in keys]
            n_targets = (targets != MASKED).sum(1).tolist()
            sums += [loss * n for loss, n in zip(losses, n_targets, strict=True)]
            counts += n_targets
            bar.update(len(inputs))
    return np.array(sums), np.array(counts)


def row_losses(engine: Engine, inputs: torch.Tensor, targets: torch.Tensor,
               boundary: int | None) -> list[float]:
    """The mean loss of each row of a batch `[B, T]`, in nats per token."""
    model, device = engine.model, engine.device
    options = document_options(inputs, boundary, device.torch)
    targets = targets.to(device.torch)
    losses = []
    with device.autocast():
        features = model.features(inputs.to(device.torch), **options)  # [B, T, C]
        # Row by row, so that the logits of only one are in memory.
        for row, row_targets in zip(features, targets, strict=True):
            loss = next_token_loss(row, model.head_weight, row_targets, model.loss_options)
            losses.append(loss)
    return torch.stack(losses).float().tolist()


def mean_of_sums(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """The mean loss per target, and the variance of that mean over sequences.

    For sequences with different numbers of targets, it is the variance of a ratio of means
    (Cochran, Sampling Techniques, section 6.3).
    """
    mean, n = float(sums.sum() / counts.sum()), len(sums)
    if n < 2:
        return mean, math.nan
    residuals = sums - mean * counts
    return mean, float((residuals**2).sum() / (n - 1) / n / counts.mean() ** 2)
