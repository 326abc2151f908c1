"""Check that activations keep their size in wider models, under the standard rules and under muP.

  python -m scripts.coordinate_check                            the default model and optimizer
  python -m scripts.coordinate_check model=nano optim=adamw out=check.png
  python -m scripts.coordinate_check heads=wider                as many heads in all models

Takes the settings of train.py, too. Models of several widths are trained for a few steps on random
tokens. The change of each layer's output since the start must not depend on the width under muP;
otherwise the exit code is 1. See docs/transfer.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from conf.launch import launch
from report.figures import picture_problems
from setting import FilePath, ScriptSettings, setting


@dataclass(frozen=True)
class CoordinateCheckSettings(ScriptSettings):
    """The widths that are compared; all other settings are those of train.py."""

    widths: str = setting("64 128 256 512", "widths of the models; the first is the base")
    heads: Literal["more", "wider"] = setting("more", "what wider models have instead")
    steps: int = setting(4, "training steps before activations are measured", ge=1)
    limit: float = setting(
        0.2, "the largest exponent of the width that counts as independent of it", gt=0)
    out: FilePath = setting("", "also draw a picture: .png, .svg or .pdf; needs matplotlib")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from picture_problems(self.out)
        words = self.widths.split()
        if len(set(words)) < 2 or not all(word.isdecimal() and int(word) for word in words):
            yield f"widths={self.widths} must be two or more different numbers, as in \"64 128\"."


if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for torch.
    launch("scripts.coordinate_check:main", CoordinateCheckSettings, __doc__)

import re
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from conf.settings import Settings
from model import GPT, GPTConfig
from report.figures import as_image, new_figure, write_picture
from report.labels import log_ticks
from scripts.plan import settings_without_data
from terminal import say
from training.optim import Optimizers

PARAMETRIZATIONS = ("standard", "mup")
# Of many different tokens, the updates of one would be noise in the logits of the others, and noise
# averages out with the width.
VOCABULARY, TOKENS, SEQUENCES, NGRAM_ROWS = 32, 8, 2, 512
# The change of each layer's output, by its name and the width.
Sizes = dict[str, dict[int, float]]


def main(settings: CoordinateCheckSettings) -> int:
    # Measure models of all widths under both parametrizations.
    training, _ = settings_without_data(list(settings.train))
    widths = [int(word) for word in settings.widths.split()]
    found = {}
    for parametrization in PARAMETRIZATIONS:
        configs = [shape(training.model, parametrization, width, widths[0], settings.heads)
                   for width in widths]
        found[parametrization] = measure(configs, training, settings.steps)
        for line in table(parametrization, found[parametrization]):
            say(line)
    if settings.out:
        write_picture(settings.out, lambda kind: draw(found, kind))

    # Under muP, no size may grow or shrink with the width.
    dependent = [name for name, sizes in found["mup"].items()
                 if not abs(exponent(sizes)) <= settings.limit]
    if dependent:
        raise ValueError(f"under mup, the size of {', '.join(dependent)} depends on the width: the "
                         f"exponent is not within {settings.limit} of 0.")
    say(f"Under mup, no size depends on the width: all exponents are within {settings.limit} of 0.")
    return 0


def shape(config: GPTConfig, parametrization: str, width: int, base: int, heads: str) -> GPTConfig:
    """A model of this width, and of the same depth and flags as `config`."""
    factor = width // base if heads == "more" else 1
    kv_heads = config.n_kv_head and config.n_kv_head * factor
    found = replace(
        config, vocab_size=VOCABULARY, block_size=TOKENS, ngram_rows=NGRAM_ROWS, n_embd=width,
        n_head=config.n_head * factor, n_kv_head=kv_heads, parametrization=parametrization,
        mup_base_width=base,
        mup_base_head_width=base // config.n_head if heads == "wider" else None)
    problems = list(found.problems())
    if problems:
        raise ValueError(f"A model of width {width}: {problems[0]}")
    return found


def measure(configs: list[GPTConfig], settings: Settings, steps: int) -> Sizes:
    """The root mean square of each output's change in some steps at the full learning rate."""
    draw = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(VOCABULARY, (SEQUENCES, TOKENS + 1), generator=draw)
    sizes: Sizes = defaultdict(dict)
    for config in configs:
        # Build the model and the optimizer as training does.
        torch.manual_seed(settings.seed)
        model = GPT(config)
        optimizers = Optimizers(model.parameters_by_role(), settings.optim,
                                rates=model.rate_scales(settings.optim.optimizer))
        scaler = torch.amp.GradScaler("cpu", enabled=False)

        # Train it, and compare the outputs of its layers.
        before = outputs(model, ids[:, :-1])
        for _ in range(steps):
            model(ids[:, :-1], ids[:, 1:]).backward()
            norm = optimizers.gradient_norm(scaler)
            optimizers.step(scaler, norm, settings.optim.grad_clip)
        for name, output in outputs(model, ids[:, :-1]).items():
            sizes[name][config.n_embd] = (output - before[name]).square().mean().sqrt().item()
    return sizes


@torch.no_grad()
def outputs(model: GPT, ids: Tensor) -> dict[str, Tensor]:
    """The outputs of embeddings and linear layers, those of all blocks together, and the logits."""
    # h.3.attn.c_attn is attn.c_attn of all blocks.
    kinds = {module: re.sub(r"^h\.\d+\.", "", name) for name, module in model.named_modules()}
    found: dict[str, list[Tensor]] = defaultdict(list)

    def keep(module: nn.Module, _: Any, output: Tensor) -> None:
        if isinstance(module, nn.Embedding | nn.Linear):
            found[kinds[module]].append(output)

    with register_module_forward_hook(keep):
        found["logits"] = [model.eval()(ids)]
    model.train()
    return {kind: torch.stack(tensors) for kind, tensors in found.items()}


def exponent(sizes: dict[int, float]) -> float:
    """The power of the width that the sizes grow with."""
    return float(np.polyfit(np.log(list(sizes)), np.log(list(sizes.values())), 1)[0])


def table(title: str, sizes: Sizes) -> Iterator[str]:
    widths = list(next(iter(sizes.values())))
    yield f"{title:<16}" + "".join(f"{width:>10}" for width in widths) + "  exponent"
    for name, by_width in sizes.items():
        numbers = "".join(f"{size:>10.4f}" for size in by_width.values())
        yield f"  {name:<14}{numbers}{exponent(by_width):>10.2f}"


def draw(found: dict[str, Sizes], kind: str) -> bytes:
    """A picture: the sizes by width, one panel for each parametrization."""
    with new_figure(8, 3.2, "coordinate check") as figure:
        panels = figure.subplots(1, len(found), sharey=True)
        for axes, (title, sizes) in zip(panels, found.items(), strict=True):
            for name, by_width in sizes.items():
                axes.plot(list(by_width), list(by_width.values()), marker="o", label=name)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(list(by_width), list(map(str, by_width)))
            axes.set_title(title)
            axes.set_xlabel("width")
        log_ticks(panels[0].yaxis)
        panels[0].set_ylabel("change of the output (root mean square)")
        panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return as_image(figure, kind)
