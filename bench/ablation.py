"""The validation loss of a recipe without each of its ingredients, after the same steps.

  python -m bench ablation                             speedrun_shakespeare, 15 minutes
  python -m bench ablation experiment=pydocs seeds=5   another recipe

Takes the settings of train.py too.

A difference that is smaller than the spread between seeds is noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from bench.result import train_ours
from bench.timing import print_header
from conf.schema import compose
from progress import ProgressBar, print_line
from setting import range_problems, setting
from training.config import TrainingConfig

WITHOUT = {
    "the recipe": "",
    "n-grams": "model.ngrams=1",
    "n-grams of more than 2": "model.ngrams=2",
    "n-grams of more than 3": "model.ngrams=3",
    "embedding norm": "model.embedding_norm=false",
    "Muon (AdamW for all, 3e-3)": "optim.optimizer=adamw optim.lr=3e-3",
    "Muon (AdamW for all, 1e-2)": "optim.optimizer=adamw",
    "a larger rate for embedding and head (3e-3)": "optim.lr=3e-3",
    "QK-norm": "model.qk_norm=false",
    "squared ReLU (GELU)": "model.activation=gelu_erf",
    "zero-initialised projections": "model.zero_init=false",
    "a head of its own": "model.tie_head=true",
    "rotary positions (learned)": "model.position=learned",
    "RMS norm (layer norm)": "model.norm=layer",
    "decay over 60% of the steps (20%)": "optim.decay_fraction=0.2",
}


@dataclass(frozen=True)
class AblationSettings:
    """Settings of the ablation; all others are those of train.py."""

    seeds: int = setting(3, "runs of each variant", ge=2)
    train: tuple[str, ...] = ()

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        yield from range_problems(self)


def main(settings: AblationSettings) -> int:
    recipe = settings.train or ("experiment=speedrun_shakespeare",)
    variants = all_variants(compose("config", list(recipe)).training)
    print_header("without", "validation loss", "spread", "more than the recipe")
    recipe_mean = 0.0
    total = len(variants) * settings.seeds
    with ProgressBar(desc="Training", total=total, unit="runs", leave=False) as bar:
        for name, overrides in variants.items():
            losses = []
            for seed in range(settings.seeds):
                losses.append(train_ours(*recipe, *overrides, f"seed={seed}")["val_loss"])
                bar.update()
            mean = statistics.mean(losses)
            if name == "the recipe":
                recipe_mean = mean
            spread = max(losses) - min(losses)
            print_line(f"| {name} | {mean:.4f} | {spread:.4f} | {mean - recipe_mean:+.4f} |")
    return 0


def all_variants(limits: TrainingConfig) -> dict[str, list[str]]:
    """The overrides of each variant."""
    variants = {name: overrides.split() for name, overrides in WITHOUT.items()}
    variants["small batches (2 x, half the steps)"] = [
        f"training.batch_size={2 * limits.batch_size}",
        f"training.max_steps={max(1, limits.max_steps // 2)}",
    ]
    return variants
