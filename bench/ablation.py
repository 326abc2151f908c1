"""Which ingredients of a recipe lower its validation loss: the recipe without each of them.

  python -m bench ablation                                   speedrun_shakespeare
  python -m bench ablation experiment=modern_shakespeare seeds=16 jobs=2
  python -m bench ablation model=modern-small                another recipe
  python -m bench ablation size=small seeds=6                the default recipe, small

Takes the settings of train.py too. Each variant is compared with the recipe over the same seeds, as
by python -m scripts.compare (docs/evaluation.md). The same command resumes.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from bench.timing import print_header, print_row
from conf.identity import flat
from conf.schema import compose
from evaluation import comparison
from report.runs import differing_settings
from scripts.compare import CompareSettings, plan_arm, read_arms, results_of, train_all
from setting import FilePath, ScriptSettings, setting

RECIPE = "the recipe"
# Smaller runs, by `size`, on one core. Results do not depend on how busy the machine is.
SMALLER = {
    "small": ("model.n_layer=2", "model.n_embd=96", "training.batch_size=8",
              "training.max_steps=100"),
    "medium": ("model.n_layer=2", "model.n_embd=128", "model.n_head=1", "training.batch_size=16",
               "training.max_steps=200"),
}
ON_ONE_CORE = ("training.eval_every=0", "training.eval_tokens=32768",
               "training.checkpoint_every=0", "training.precision=fp32", "training.threads=1")
WITHOUT = {
    "embedding norm": "model.embedding_norm=false",
    "Muon (AdamW for all, 3e-3)": "optim.optimizer=adamw optim.lr=3e-3",
    "Muon (AdamW for all, 1e-2)": "optim.optimizer=adamw",
    "a larger rate for embedding and head (3e-3)": "optim.lr=3e-3",
    "a smaller rate for n-grams": "optim.ngram_lr_ratio=1",
    "QK-norm": "model.qk_norm=false",
    "squared ReLU (GELU)": "model.activation=gelu_erf",
    "zero-initialised projections": "model.zero_init=false",
    "a head of its own": "model.tie_head=true",
    "rotary positions (learned)": "model.position=learned",
    "RMS norm (layer norm)": "model.norm=layer",
    "layers without biases (with)": "model.bias=true",
    "decay over 60% of the steps (20%)": "optim.decay_fraction=0.2",
}


@dataclass(frozen=True)
class AblationSettings(ScriptSettings):
    """Settings of the ablation; all others are those of train.py."""

    seeds: int = setting(8, "runs of each variant; 4 or fewer cannot decide", ge=2)
    jobs: int = setting(1, "that run at a time", ge=1)
    size: Literal["full", "small", "medium"] = setting(
        "full", "small: 2 blocks of width 96, 100 steps of 1,024 tokens, in fp32 on one core; "
        "medium: width 128, 200 steps of 2,048 tokens")
    runs_dir: FilePath = setting("runs/ablation", "folder for the runs of all variants")


def main(settings: AblationSettings) -> int:
    # Before hours of training.
    comparison.import_stats()
    if settings.size in SMALLER:
        recipe = [*SMALLER[settings.size], *ON_ONE_CORE, *settings.train]
    else:
        recipe = settings.train or ("experiment=speedrun_shakespeare",)
    own = CompareSettings(seeds=settings.seeds, jobs=settings.jobs, runs_dir=settings.runs_dir,
                          base=shlex.join([*recipe, "training.sample_tokens=0"]))
    plans = {RECIPE: plan_arm([], own)}
    for name, overrides in variants_of(list(recipe)).items():
        plans[name] = plan_arm(overrides, own)
    results = {}
    for name, folder in train_all(plans).items():
        [runs] = read_arms(name, Path(own.runs_dir), folder).values()
        results[name] = results_of(runs, "val_loss")
    print_header("without", "validation loss", "more than the recipe", "p", "beyond the noise")
    for one in comparison.compare_all(results, RECIPE):
        print_row(one.second, f"{fmean(results[one.second].values()):.4f}",
                  f"{one.difference:+.4f} ± {one.error:.4f}", f"{one.p:.2g}",
                  "yes" if one.is_decided else "no")
    return 0


def variants_of(recipe: list[str]) -> dict[str, list[str]]:
    """The overrides of each variant that differs from the recipe."""
    settings = compose("config", recipe)
    variants = {}
    for ngrams in range(1, settings.model.ngrams):
        name = f"n-grams of more than {ngrams}" if ngrams > 1 else "n-grams"
        variants[name] = [f"model.ngrams={ngrams}"]
    variants |= {name: overrides.split() for name, overrides in WITHOUT.items()}
    variants["small batches (2 x, half the steps)"] = [
        f"training.batch_size={2 * settings.training.batch_size}",
        f"training.max_steps={max(1, settings.training.max_steps // 2)}",
    ]
    found = {}
    for name, overrides in variants.items():
        changed = compose("config", [*recipe, *overrides])
        if differing_settings([flat(asdict(settings)), flat(asdict(changed))]):
            found[name] = overrides
    return found
