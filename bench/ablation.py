"""What each ingredient of a recipe gives: the validation loss without it, after as many steps, over several seeds.

  python -m bench.bench ablation                                   experiment=speedrun_shakespeare, a quarter of an hour
  python -m bench.bench ablation experiment=pydocs seeds=5         another recipe

A difference that is smaller than the spread between seeds says nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from bench.result import train_ours
from conf.schema import compose
from progress import ProgressBar, print_line

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
    "small batches (2 x, half the steps)": "",  # filled in below, from the recipe's own
}


@dataclass(frozen=True)
class AblationSettings:
    """How often; all other settings are the training's own."""

    seeds: int = 3
    train: tuple[str, ...] = ()

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        if self.seeds < 2:
            yield f"seeds={self.seeds} must be at least 2: one alone has no spread."


def ablation(settings: AblationSettings) -> int:
    """A row for each ingredient, and for the recipe itself."""
    recipe = settings.train or ("experiment=speedrun_shakespeare",)
    limits = compose("config", list(recipe)).training
    variants = {name: words.split() for name, words in WITHOUT.items()}
    variants["small batches (2 x, half the steps)"] = [f"training.batch_size={2 * limits.batch_size}",
                                                       f"training.max_steps={max(1, limits.max_steps // 2)}"]
    print("| without | validation loss | spread | more than the recipe |\n" + "|---" * 4 + "|")
    usual = 0.0
    with ProgressBar(desc="Training", total=len(variants) * settings.seeds, unit="runs", leave=False) as bar:
        for name, words in variants.items():
            losses = []
            for seed in range(settings.seeds):
                losses.append(train_ours(*recipe, *words, f"seed={seed}")["val_loss"])
                bar.update()
            mean = statistics.mean(losses)
            usual = usual or mean
            print_line(f"| {name} | {mean:.4f} | {max(losses) - min(losses):.4f} | {mean - usual:+.4f} |")
    return 0
