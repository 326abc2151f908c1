"""Show the attention of each head of a model, as one page that opens from disk without a network.

  python -m scripts.attention_map run=pydocs prompt="Return the number of items."
  python -m scripts.attention_map fresh=gpt2 prompt="an untrained model"
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.hints import closest
from conf.launch import launch
from conf.presets import options
from conf.settings import checkpoint_problems
from setting import FilePath, SettingsBase, setting


@dataclass(frozen=True)
class AttentionMapSettings(SettingsBase):
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
        yield from super().problems()
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

from dataclasses import replace

import torch

import atomic
from checkpointing.find_runs import find_run
from conf.schema import compose
from data.tokenizer import ByteTokenizer, Tokenizer
from generation.engine import open_checkpoint
from generation.inspection import attention_picture
from model import GPT
from report.attention import draw, max_tokens, page
from terminal import counted, readable_size, say
from training.device import Device


def main(settings: AttentionMapSettings) -> int:
    # The end of the prompt that the model reads and a page holds.
    model, tokenizer, name, folder = open_model(settings)
    config, ids = model.config, tokenizer.encode(settings.prompt)
    limit = min(max_tokens(config.n_layer, config.n_head), config.block_size)
    if len(ids) > limit:
        say(f"The prompt has {counted(len(ids), 'token')}: the map shows the last {limit:,}, as "
            "many as the model reads and a page holds.")
        ids = ids[-limit:]

    # Compute the weights, and write the page and the picture.
    out = Path(settings.out) if settings.out else folder / "attention.html"
    labels, weights, following = attention_picture(model, tokenizer, ids)
    content = page(name, labels, weights, following)
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
