"""Check that updates keep their size in wider or deeper models, under the standard rules and muP.

  python -m scripts.coordinate_check                            the default model and optimizer
  python -m scripts.coordinate_check model=nano optim=adamw out=check.png
  python -m scripts.coordinate_check heads=wider                as many heads in all models
  python -m scripts.coordinate_check depths="2 4 8 16"          deeper models

Takes the settings of train.py, too. Models of several widths are trained for a few steps on random
tokens. Under muP, neither the change of each layer's output since the start nor the effect of each
parameter's updates on the logits may depend on the width; otherwise the exit code is 1. See
docs/transfer.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from conf.launch import launch
from report.figures import picture_problems
from setting import FilePath, ScriptSettings, setting


@dataclass(frozen=True)
class CoordinateCheckSettings(ScriptSettings):
    """The models that are compared; all other settings are those of train.py."""

    widths: str = setting("64 128 256 512", "widths of the models; the first is the base")
    heads: Literal["more", "wider"] = setting("more", "what wider models have instead")
    depths: str = setting("", "numbers of layers to compare instead; the first is the base")
    steps: int = setting(4, "training steps before activations are measured", ge=1)
    limit: float = setting(
        0.2, "the largest exponent of the width that counts as independent of it; twice as much "
        "for effects on the logits", gt=0)
    out: FilePath = setting("", "also draw a picture: .png, .svg or .pdf; needs matplotlib")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from picture_problems(self.out)
        for name in ("widths", "depths") if self.depths else ("widths",):
            numbers = getattr(self, name).split()
            if len(set(numbers)) < 2 or not all(n.isdecimal() and int(n) for n in numbers):
                yield (f"{name}={getattr(self, name)} must be two or more different numbers, as in "
                       f"\"64 128\".")


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
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook

from conf.settings import Settings
from model import GPT, GPTConfig
from model.attention import attend, repeat_kv
from report.figures import as_image, new_figure, write_picture
from report.labels import log_ticks
from scripts.plan import settings_without_data
from terminal import say
from training.optim import Optimizers

PARAMETRIZATIONS = ("standard", "mup")
# Of many different tokens, the updates of one would be noise in the logits of the others, and noise
# averages out with the width.
VOCABULARY, TOKENS, SEQUENCES, NGRAM_ROWS = 32, 8, 2, 512
SCORES = "attn.scores"
EFFECT = "effect of "
SMALL_EFFECT = 0.01  # of the change of the logits
# The change of each layer's output, and the effect of each parameter, by the width or the depth.
Sizes = dict[str, dict[int, float]]


def main(settings: CoordinateCheckSettings) -> int:
    # Measure all models under both parametrizations.
    training, _ = settings_without_data(list(settings.train))
    measured = "depth" if settings.depths else "width"
    found = {}
    for parametrization in PARAMETRIZATIONS:
        base = replace(training.model, parametrization=parametrization)
        found[parametrization] = measure(shapes(base, settings), training, settings.steps)
        for line in table(parametrization, found[parametrization]):
            say(line)
    if settings.out:
        write_picture(settings.out, lambda kind: draw(found, measured, kind))

    # Under muP, no size may grow or shrink.
    dependent = [name for name in found["mup"]
                 if not is_independent(name, found["mup"], settings.limit)]
    limits = (f"within {settings.limit} of 0, or {2 * settings.limit} for effects; scores may "
              "shrink, and small effects are not judged")
    if dependent:
        raise ValueError(f"under mup, the size of {', '.join(dependent)} depends on the "
                         f"{measured}: the exponent is not {limits}.")
    say(f"Under mup, no size depends on the {measured}: all exponents are {limits}.")
    return 0


def shapes(config: GPTConfig, settings: CoordinateCheckSettings) -> dict[int, GPTConfig]:
    """Models of all widths or depths, with the other flags of `config`."""
    widths = [int(word) for word in settings.widths.split()]
    if not settings.depths:
        return {width: shape(config, width, widths[0], settings.heads) for width in widths}
    depths = [int(word) for word in settings.depths.split()]
    config = shape(config, widths[0], widths[0], settings.heads)
    return {depth: replace(config, n_layer=depth, mup_base_depth=depths[0]) for depth in depths}


def shape(config: GPTConfig, width: int, base: int, heads: str) -> GPTConfig:
    """A model of this width, and of the same depth and flags as `config`."""
    factor = width // base if heads == "more" else 1
    kv_heads = config.n_kv_head and config.n_kv_head * factor
    found = replace(
        config, vocab_size=VOCABULARY, block_size=TOKENS, ngram_rows=NGRAM_ROWS, n_embd=width,
        n_head=config.n_head * factor, n_kv_head=kv_heads, mup_base_width=base,
        mup_base_head_width=base // config.n_head if heads == "wider" else None)
    problems = list(found.problems())
    if problems:
        raise ValueError(f"A model of width {width}: {problems[0]}")
    return found


def measure(configs: dict[int, GPTConfig], settings: Settings, steps: int) -> Sizes:
    """Train each model for some steps at the full learning rate, and measure what has changed.

    Sizes are root mean squares: of the change of each output, and of the change of the logits if a
    parameter had not been updated.
    """
    draw = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(VOCABULARY, (SEQUENCES, TOKENS + 1), generator=draw)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    sizes: Sizes = defaultdict(dict)
    for number, config in configs.items():
        # Build the model and the optimizer as training does.
        torch.manual_seed(settings.seed)
        model = GPT(config)
        optimizers = Optimizers(model.parameters_by_role(), settings.optim,
                                rates=model.rate_scales(settings.optim.optimizer))
        scaler = torch.amp.GradScaler("cpu", enabled=False)

        # Train it, and compare the outputs of its layers.
        before = outputs(model, inputs)
        initial = {name: weights.detach().clone() for name, weights in model.named_parameters()}
        for _ in range(steps):
            model(inputs, targets).backward()
            norm = optimizers.gradient_norm(scaler)
            optimizers.step(scaler, norm, settings.optim.grad_clip)
        after = outputs(model, inputs)
        for name, output in after.items():
            # Of more blocks, each has to change less.
            if config.mup_base_depth is None or name == "logits":
                sizes[name][number] = root_mean_square(output - before[name])

        # Compare the logits with those without the updates of a parameter, in all blocks.
        groups = defaultdict(dict)
        for name, weights in initial.items():
            groups[kind_of(name)][name] = weights
        for kind, weights in groups.items():
            logits = logits_with(model, weights, inputs)
            effect = root_mean_square(after["logits"][0] - logits)
            # With zero_init, the first steps do not update all parameters.
            if effect:
                sizes[EFFECT + kind][number] = effect
    return sizes


def root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def kind_of(name: str) -> str:
    """The name of a module or parameter without its block: h.3.attn.c_attn is attn.c_attn."""
    return re.sub(r"^h\.\d+\.", "", name)


class KeptScores:
    """Causal attention that keeps its scores before the softmax: an attention context."""

    parents = None

    def __init__(self, ids: Tensor) -> None:
        self.positions = torch.arange(ids.size(1)).expand_as(ids)
        self.scores: list[Tensor] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        self.scores.append(q @ repeat_kv(k, q.size(1)).mT * q.size(-1) ** -0.5)
        return attend(q, k, v, None, dropout)


@torch.no_grad()
def outputs(model: GPT, ids: Tensor) -> dict[str, Tensor]:
    """The outputs of embeddings and linear layers, attention scores, and the logits.

    Those of all blocks are together.
    """
    kinds = {module: kind_of(name) for name, module in model.named_modules()}
    found: dict[str, list[Tensor]] = defaultdict(list)

    def keep(module: nn.Module, _: Any, output: Tensor) -> None:
        if isinstance(module, nn.Embedding | nn.Linear):
            found[kinds[module]].append(output)

    kept = KeptScores(ids)
    with register_module_forward_hook(keep):
        found["logits"] = [model.head(model.eval().features(ids, context=kept))]
    found[SCORES] = kept.scores
    model.train()
    return {kind: torch.stack(tensors) for kind, tensors in found.items()}


@torch.no_grad()
def logits_with(model: GPT, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The logits if these `weights` took the place of the model's own."""
    logits = functional_call(model.eval(), weights, (ids,))
    model.train()
    return logits


def is_independent(name: str, sizes: Sizes, limit: float) -> bool:
    """Whether the size of `name` does not depend on the width or the depth."""
    growth = exponent(sizes[name])
    # What is random in scores averages out in wider heads, so that these may shrink.
    if name == SCORES:
        return growth <= limit
    if name.startswith(EFFECT):
        # Effects vary more than outputs, and small ones do not matter.
        shares = [effect / sizes["logits"][number] for number, effect in sizes[name].items()]
        return max(shares) < SMALL_EFFECT or abs(growth) <= 2 * limit
    return abs(growth) <= limit


def exponent(sizes: dict[int, float]) -> float:
    """The power of the width or the depth that the sizes grow with."""
    return float(np.polyfit(np.log(list(sizes)), np.log(list(sizes.values())), 1)[0])


def table(title: str, sizes: Sizes) -> Iterator[str]:
    numbers = list(sizes["logits"])
    yield f"{title:<30}" + "".join(f"{number:>10}" for number in numbers) + "  exponent"
    for name, by_number in sizes.items():
        columns = "".join(f"{size:>10.3g}" for size in by_number.values())
        yield f"  {name:<28}{columns}{exponent(by_number):>10.2f}"


def draw(found: dict[str, Sizes], measured: str, kind: str) -> bytes:
    """A picture: a row for outputs and one for effects, a column for each parametrization."""
    with new_figure(9, 6.4, "coordinate check") as figure:
        rows = figure.subplots(2, len(found), sharex=True, sharey="row")
        for column, (title, sizes) in enumerate(found.items()):
            rows[0][column].set_title(title)
            rows[1][column].set_xlabel(measured)
            for name, by_number in sizes.items():
                axes = rows[int(name.startswith(EFFECT))][column]
                axes.plot(list(by_number), list(by_number.values()), marker="o",
                          label=name.removeprefix(EFFECT))
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                axes.set_xticks(list(by_number), list(map(str, by_number)))
        for axes, label in zip(rows, ("change of the output", "effect of the update on the logits"),
                               strict=True):
            log_ticks(axes[0].yaxis)
            axes[0].set_ylabel(label)
            axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return as_image(figure, kind)
