"""Show what each head of a model attends to, as one page that opens from disk, without a network.

  python -m scripts.attention_map run=pydocs prompt="Return the number of items."
  python -m scripts.attention_map fresh=gpt2 prompt="an untrained model"

Settings, each with its default:
  run=NAME         the run's name or folder; without it, the run that was trained last
  checkpoint=best  or last, or a step such as checkpoint=300
  fresh=PRESET     instead of a run, a model of that shape with random weights, reading bytes
  prompt=TEXT      what the model reads; of a long one the last tokens, as in sampling
  out=FILE         the page; without it, attention.html in the run's folder, or here with fresh=
  png=true         also a still picture, beside the page (needs matplotlib)
"""

from __future__ import annotations

from conf.launch import launch

if __name__ == "__main__":
    # Before the imports below: --help and a wrong setting need not wait for torch.
    launch("scripts.attention_map:main", "scripts.attention_map:AttentionMapSettings", __doc__)

import base64
import json
import math
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import atomic
from checkpointing.run_folder import find_run
from conf.hints import closest
from conf.presets import options
from conf.schema import compose
from conf.settings import checkpoint_problems
from data.tokenizer import ByteTokenizer, Tokenizer
from generation.engine import open_checkpoint
from generation.sampling import finite
from model import GPT
from report.figures import as_image, new_figure, quiet, short_text
from setting import FilePath
from terminal import counted, escaped, readable_size, say
from training.device import Device

TEMPLATE = Path(__file__).with_suffix(".html")
PLACE = '{"this": "is replaced"}'  # where the template holds data
SPACES = {"\n": "⏎", "\t": "⇥", " ": "·"}
LONGEST = 40  # characters of a label
SMALLEST = 5  # points, of a label in a picture
N_NEXT = 8  # tokens that are shown as likely to come next
MOST_VALUES = 2**24  # weights on a page: 45 MB, which a browser opens in some seconds


@dataclass(frozen=True)
class AttentionMapSettings:
    """Everything about a page that shows what a model attends to."""

    run: FilePath = ""  # the run's name, or its folder; empty: the run that was trained last
    runs_dir: FilePath = "runs"
    checkpoint: str = "best"  # best, last, or the number of a step
    fresh: str = ""  # instead of a run: a preset of conf/model with random weights, on bytes
    seed: int = 1337  # of the random weights
    prompt: str = "The quick brown fox jumps."
    out: FilePath = ""  # empty: attention.html in the run's folder, or here
    png: bool = False  # a still picture of the grid beside the page

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        if self.run and self.fresh:
            yield "run and fresh exclude each other: choose one."
        if self.fresh and self.fresh not in options("model"):
            yield (f"fresh={self.fresh}: no such preset{closest(self.fresh, options('model'))}. "
                   f"There are: {', '.join(options('model'))}.")
        if self.out and Path(self.out).suffix.lower() not in (".html", ".htm"):
            yield f"out={self.out} must end in .html."
        yield from checkpoint_problems(self.checkpoint)
        if not self.prompt:
            yield "prompt is empty: a map needs tokens to show."


def main(settings: AttentionMapSettings) -> int:
    model, tokenizer, name, folder = open_model(settings)
    ids = trimmed(tokenizer.encode(settings.prompt), model)
    logits, weights = look(model, torch.tensor([ids]))
    finite(logits)
    out = Path(settings.out) if settings.out else folder / "attention.html"
    labels = [label(tokenizer, token) for token in ids]
    atomic.write_bytes(out, page(name, labels, weights, likely(logits, tokenizer)).encode())
    say(f"Wrote {out} ({readable_size(out.stat().st_size)}): open it in a browser.")
    if settings.png:
        atomic.write_bytes(picture := out.with_suffix(".png"), draw(name, labels, weights))
        say(f"Drew {picture}")
    return 0


def trimmed(ids: list[int], model: GPT) -> list[int]:
    """The last of the prompt's tokens: as many as the model reads and a page holds. Says so if that is not all."""
    config = model.config
    fits = math.isqrt(MOST_VALUES // (config.n_layer * config.n_head))
    if len(ids) > min(fits, config.block_size):
        reason = "as many as the model reads" if config.block_size <= fits else (
            f"as many as a page holds for {config.n_layer} layers of {config.n_head} heads")
        ids, whole = ids[-min(fits, config.block_size):], len(ids)
        say(f"The prompt has {counted(whole, 'token')}: the map shows the last {len(ids):,}, {reason}.")
    return ids


def open_model(settings: AttentionMapSettings) -> tuple[GPT, Tokenizer, str, Path]:
    """A model, its tokenizer, its name, and the folder for its page."""
    if settings.fresh:
        tokenizer = ByteTokenizer()
        config = compose("config", [f"model={settings.fresh}"]).model
        torch.manual_seed(settings.seed)
        model = GPT(replace(config, vocab_size=tokenizer.vocab_size)).eval()
        return model, tokenizer, f"{settings.fresh}, random weights", Path()
    run = find_run(Path(settings.runs_dir), settings.run)
    engine = open_checkpoint(run, settings.checkpoint, Device("cpu", "fp32"))
    return engine.model, engine.tokenizer, run.name, run


@torch.inference_mode()
def look(model: GPT, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `[T, V]` for ids `[1, T]`, and the weights `[L, H, T, T]` of all layers and heads that led to them."""
    weights: list[Tensor] = []
    handles = [block.attn.register_forward_hook(lambda attn, given, _: weights.append(attn.explicit(*given)[1]))
               for block in model.h]
    try:
        logits = model(ids)[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits, torch.cat(weights)


def likely(logits: Tensor, tokenizer: Tokenizer) -> list[list[tuple[str, float]]]:
    """For each position the likeliest next tokens, with their probabilities."""
    top = logits.float().softmax(-1).topk(min(N_NEXT, logits.size(-1)))
    return [[(label(tokenizer, token), round(p, 5)) for token, p in zip(*row, strict=True)]
            for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


def label(tokenizer: Tokenizer, token: int) -> str:
    """A token's text so that each character can be seen, and not more than LONGEST of them."""
    text = tokenizer.decode_bytes([token]).decode(errors="backslashreplace")
    if len(text) > LONGEST:
        text = text[:LONGEST] + "…"
    if text and unicodedata.category(text[0]).startswith("M"):
        text = "◌" + text  # or it would change the character before it
    return "".join(map(visible, text)) or "∅"


def visible(letter: str) -> str:
    """A character, or what stands for one that shows nothing."""
    if letter in SPACES:
        return SPACES[letter]
    if letter.isspace():
        return ascii(letter)[1:-1]
    return escaped(letter, keep="")


def page(name: str, labels: list[str], weights: Tensor, following: list[list[tuple[str, float]]]) -> str:
    """The page. Weights are stored as 16-bit fractions: 4 digits, in a fifth of the space that JSON needs."""
    fractions = (weights * 65535).round().to(torch.int32).numpy().astype("<u2")
    content: dict[str, Any] = {"name": escaped(name, keep=""), "words": labels, "next": following, "layers": weights.size(0),
                               "heads": weights.size(1), "weights": base64.b64encode(fractions.tobytes()).decode()}
    text = json.dumps(content).replace("<", "\\u003c")  # or a token could end the script
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text)


def draw(name: str, labels: list[str], weights: Tensor) -> bytes:
    """The grid of all layers and heads, as PNG. Raises ValueError if matplotlib is missing."""
    layers, heads = weights.shape[:2]
    size = 2.4 if layers * heads <= 24 else 1.6  # inches
    figure, style = new_figure(1.5 + size * heads, 1.5 + size * layers, "attention")
    points = 72 * 0.9 * size / len(labels)  # the height of a row
    every = math.ceil(SMALLEST / points)
    ticks = {"ticks": range(0, len(labels), every), "labels": [short_text(text) for text in labels[::every]],
             "fontsize": max(SMALLEST, min(8, 0.85 * points))}
    with style, quiet():
        axes = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
        for layer in range(layers):
            for head in range(heads):
                cell = axes[layer][head]
                roots = weights[layer, head].sqrt().numpy()  # so that small weights show too
                cell.imshow(roots, cmap="cividis", vmin=0, vmax=1)
                cell.grid(False)
                cell.tick_params(length=0)
                if layer == 0:
                    cell.set_title(f"head {head}", fontsize=9)
                if head == 0:
                    cell.set_ylabel(f"layer {layer}", fontsize=9)
        axes[0][0].set_yticks(**ticks)
        axes[0][0].set_xticks(**ticks, rotation=90)
        for cell in axes[-1]:
            cell.tick_params(axis="x", labelrotation=90, labelsize=ticks["fontsize"])
        for cell in axes[:, 0]:
            cell.tick_params(axis="y", labelsize=ticks["fontsize"])
        figure.suptitle(f"{escaped(name, keep='')}: each row is a token, and shows which tokens it attends to", fontsize=10)
        return as_image(figure, "png", dpi=120)
