"""The learning rate of each step, and how it changes when a run is extended."""

import math

from terminal import counted
from training.config import OptimConfig


def lr_scale(step: int, config: OptimConfig, max_steps: int) -> float:
    """The fraction of the full learning rate at `step`, counted from 0. It depends on nothing else.

    After a linear warm-up, `cosine` falls to `min_lr_ratio` in half a cosine (arXiv:1608.03983),
    `wsd` stays at 1 and falls linearly in the last `decay_fraction` of the run (arXiv:2404.06395),
    and `constant` stays at 1.
    """
    # 1. Linear warm-up.
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    # 2. The full learning rate.
    if config.schedule == "constant":
        return 1.0
    # 3. The decay: `progress` rises from 0 to 1.
    is_cosine = config.schedule == "cosine"
    start = config.warmup_steps if is_cosine else config.decay_start(max_steps)
    progress = min(1.0, max(0, step - start) / max(1, max_steps - start))
    if is_cosine:
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return 1.0 - (1.0 - config.min_lr_ratio) * progress


def same_rates(step: int, config: OptimConfig, old_max_steps: int, max_steps: int) -> bool:
    """Whether the learning rates before `step` are the same for both lengths of the run."""
    if step == 0:
        return True
    # Comparing the last rate is enough: schedules that have parted never meet again.
    before = lr_scale(step - 1, config, old_max_steps)
    return before == lr_scale(step - 1, config, max_steps)


def extension(step: int, config: OptimConfig, old_max_steps: int, max_steps: int,
              replanned: bool) -> str:
    """A message about the rates of a run of `old_max_steps` that becomes one of `max_steps`.

    It has taken `step` steps; `replanned`: an earlier change like this gave it other rates.
    """
    longer = counted(max_steps, "step")
    if same_rates(step, config, old_max_steps, max_steps) and not replanned:
        return (f"The learning rates so far are those of a run planned for {longer}: "
                f"it becomes that run.")
    before = lr_scale(step - 1, config, old_max_steps)
    after = lr_scale(step, config, max_steps)
    end = lr_scale(max_steps - 1, config, max_steps)
    return (f"The {config.schedule} schedule for {counted(old_max_steps, 'step')} becomes the one "
            f"for {longer} from here on: the rate was {before:.0%} of its peak, continues at "
            f"{after:.0%}, and ends at {end:.0%}. A run planned for {longer} from the start would "
            f"have had other rates until here.")
