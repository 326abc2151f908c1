"""Show the attention of each head of a model, as one page that opens from disk without a network.

  python -m scripts.attention_map run=pydocs prompt="Return the number of items."
  python -m scripts.attention_map fresh=gpt2 prompt="an untrained model"
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.hints import closest
from conf.launch import launch
from conf.presets import options
from conf.settings import checkpoint_problems
from setting import FilePath, range_problems, setting


@dataclass(frozen=True)
class AttentionMapSettings:
    """The settings of an attention map."""

    run: FilePath = setting("", "name or folder of a run; empty: the run that was trained last")
    runs_dir: FilePath = setting("runs", "the folder that the name is in")
    checkpoint: str = setting("best", "best, last, or the number of a step")
    fresh: str = setting(
        "", "instead of a run, a model preset with random weights, which reads bytes")
    seed: int = setting(1337, "of the random weights", ge=0, lt=2**63)
    prompt: str = setting(
        "The quick brown fox jumps.", "the text for the model; of a long one the last tokens")
    out: FilePath = setting(
        "", "the page; empty: attention.html in the run's folder, or here with fresh=")
    png: bool = setting(False, "also draw all heads, beside the page (needs matplotlib)")

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        yield from range_problems(self)
        presets = options("model")
        if self.run and self.fresh:
            yield "run and fresh exclude each other: choose one."
        if self.fresh and self.fresh not in presets:
            yield (f"fresh={self.fresh}: no such preset{closest(self.fresh, presets)}. "
                   f"There are: {', '.join(presets)}.")
        if self.out and Path(self.out).suffix.lower() not in (".html", ".htm"):
            yield f"out={self.out} must end in .html."
        yield from checkpoint_problems(self.checkpoint)
        if not self.prompt:
            yield "prompt is empty: a map needs tokens to show."


if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for torch.
    launch("scripts.attention_map:main", AttentionMapSettings, __doc__)

import base64
import json
import math
import unicodedata
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import atomic
from checkpointing.run_folder import find_run
from conf.schema import compose
from data.tokenizer import ByteTokenizer, Tokenizer
from generation.engine import open_checkpoint
from generation.sampling import finite
from model import GPT, GPTConfig
from model.attention import CausalSelfAttention
from report.figures import as_image, new_figure, quiet, short_text
from terminal import counted, escaped, readable_size, say
from training.device import Device

TEMPLATE = Path(__file__).with_suffix(".html")
PLACEHOLDER = '{"this": "is replaced"}'  # of the data in the template
SPACES = {"\n": "⏎", "\t": "⇥", " ": "·"}
MAX_LETTERS = 40  # of a label
MIN_POINTS, MAX_POINTS = 5, 8  # font size of labels in a picture
N_NEXT = 8  # most likely next tokens that are shown
MAX_WEIGHTS = 2**24  # on a page: 45 MB, which a browser opens in some seconds


def main(settings: AttentionMapSettings) -> int:
    model, tokenizer, name, folder = open_model(settings)
    ids = last_tokens(tokenizer.encode(settings.prompt), model.config)
    logits, weights = attention_weights(model, torch.tensor([ids]))
    finite(logits)
    out = Path(settings.out) if settings.out else folder / "attention.html"
    labels = [token_label(tokenizer, token) for token in ids]
    content = page(name, labels, weights, next_tokens(logits, tokenizer))
    atomic.write_bytes(out, content.encode())
    say(f"Wrote {out} ({readable_size(out.stat().st_size)}): open it in a browser.")
    if settings.png:
        picture = out.with_suffix(".png")
        atomic.write_bytes(picture, draw(name, labels, weights))
        say(f"Drew {picture}")
    return 0


def open_model(settings: AttentionMapSettings) -> tuple[GPT, Tokenizer, str, Path]:
    """The model, its tokenizer, its name, and the folder for its page."""
    if settings.fresh:
        tokenizer = ByteTokenizer()
        config = compose("config", [f"model={settings.fresh}"]).model
        torch.manual_seed(settings.seed)
        model = GPT(replace(config, vocab_size=tokenizer.vocab_size)).eval()
        return model, tokenizer, f"{settings.fresh}, random weights", Path()
    run = find_run(Path(settings.runs_dir), settings.run)
    engine = open_checkpoint(run, settings.checkpoint, Device("cpu", "fp32"))
    return engine.model, engine.tokenizer, run.name, run


def last_tokens(ids: list[int], config: GPTConfig) -> list[int]:
    """The last tokens that fit into the context and on a page; prints if some are left out."""
    on_a_page = math.isqrt(MAX_WEIGHTS // (config.n_layer * config.n_head))
    limit = min(on_a_page, config.block_size)
    if len(ids) > limit:
        reason = "as many as the model reads"
        if on_a_page < config.block_size:
            reason = (f"as many as fit on a page for {config.n_layer} layers of {config.n_head} "
                      "heads")
        say(f"The prompt has {counted(len(ids), 'token')}: the map shows the last {limit:,}, "
            f"{reason}.")
    return ids[-limit:]


@torch.inference_mode()
def attention_weights(model: GPT, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `[T, V]` for ids `[1, T]`, and the attention weights `[L, H, T, T]` behind them."""
    weights: list[Tensor] = []

    def keep_weights(attention: CausalSelfAttention, inputs: Any, output: Any) -> None:
        weights.append(attention.forward_with_weights(*inputs)[1])

    handles = [block.attn.register_forward_hook(keep_weights) for block in model.h]
    try:
        logits = model(ids)[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits, torch.cat(weights)


def next_tokens(logits: Tensor, tokenizer: Tokenizer) -> list[list[tuple[str, float]]]:
    """For each position the most likely next tokens, with their probabilities."""
    top = logits.float().softmax(-1).topk(min(N_NEXT, logits.size(-1)))
    rows = []
    for ids, probabilities in zip(top.indices.tolist(), top.values.tolist(), strict=True):
        row = []
        for token, probability in zip(ids, probabilities, strict=True):
            row.append((token_label(tokenizer, token), round(probability, 5)))
        rows.append(row)
    return rows


def token_label(tokenizer: Tokenizer, token: int) -> str:
    """The first MAX_LETTERS of a token's text, with every character visible."""
    text = tokenizer.decode_bytes([token]).decode(errors="backslashreplace")
    if len(text) > MAX_LETTERS:
        text = text[:MAX_LETTERS] + "…"
    # A combining character would change the character before the label.
    if text and unicodedata.category(text[0]).startswith("M"):
        text = "◌" + text
    return "".join(map(visible, text)) or "∅"


def visible(character: str) -> str:
    """A character, or a text in its place if it shows nothing."""
    if character in SPACES:
        return SPACES[character]
    if character.isspace():
        return ascii(character)[1:-1]
    return escaped(character, keep="")


def page(
    name: str, labels: list[str], weights: Tensor, following: list[list[tuple[str, float]]]
) -> str:
    """The page. Weights are stored as 16-bit fractions: four digits, in a fifth of JSON's space."""
    fractions = (weights * 65535).round().to(torch.int32).numpy().astype("<u2")
    content = {
        "name": escaped(name, keep=""),
        "words": labels,
        "next": following,
        "layers": weights.size(0),
        "heads": weights.size(1),
        "weights": base64.b64encode(fractions.tobytes()).decode(),
    }
    # A token could end the script that it is in.
    text = json.dumps(content).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACEHOLDER, text)


def draw(name: str, labels: list[str], weights: Tensor) -> bytes:
    """The grid of all layers and heads, as PNG. Raises ValueError if matplotlib is missing."""
    layers, heads = weights.shape[:2]
    inches = 2.4 if layers * heads <= 24 else 1.6
    row_points = 72 * 0.9 * inches / len(labels)
    every = math.ceil(MIN_POINTS / row_points)
    points = max(MIN_POINTS, min(MAX_POINTS, 0.85 * row_points))
    ticks = range(0, len(labels), every)
    texts = [short_text(label) for label in labels[::every]]
    figure, style = new_figure(1.5 + inches * heads, 1.5 + inches * layers, "attention")
    with style, quiet():
        grid = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
        for layer in range(layers):
            for head in range(heads):
                axes = grid[layer][head]
                # Small weights are visible in their square roots.
                axes.imshow(weights[layer, head].sqrt().numpy(), cmap="cividis", vmin=0, vmax=1)
                axes.grid(False)
                axes.tick_params(length=0)
        grid[0][0].set_yticks(ticks, texts)
        grid[0][0].set_xticks(ticks, texts)
        for head, axes in enumerate(grid[0]):
            axes.set_title(f"head {head}", fontsize=9)
        for axes in grid[-1]:
            axes.tick_params(axis="x", labelrotation=90, labelsize=points)
        for layer, axes in enumerate(grid[:, 0]):
            axes.set_ylabel(f"layer {layer}", fontsize=9)
            axes.tick_params(axis="y", labelsize=points)
        title = "Each row is a token, and shows which tokens it attends to"
        figure.suptitle(f"{escaped(name, keep='')}\n{title}", fontsize=9)
        return as_image(figure, "png", dpi=120)
