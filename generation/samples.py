"""The samples that a run prints when it has been trained."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from conf.sampling import SamplingConfig
from generation.engine import Prompt, open_checkpoint
from terminal import output, say
from training.configure import configure
from training.device import Device


def print_samples(run: Path, prompts: Sequence[Prompt], device: Device) -> None:
    """Print what the best checkpoint of a run makes of the prompts."""
    with configure(device):
        engine = open_checkpoint(run, "best", device)
        jobs = [(prompt, number) for number, prompt in enumerate(prompts)]
        for number, completion in enumerate(engine.complete(jobs, SamplingConfig())):
            output(f"--- {number + 1} of {len(jobs)}\n"
                   f"{engine.prompt_text(prompts[number])}{completion.text}")


def say_how_to_sample(run: Path, prompts: Sequence[Prompt]) -> None:
    """Print the command for more samples; without an empty prompt, the model is one for chat."""
    argument = shlex.quote(f"run={run}")
    more = 'prompt="..."' if "" in prompts else "chat=true"
    say(f"More: python sample.py {argument} {more}")
