"""The samples that a run prints when it has been trained."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from conf.sampling import SamplingConfig
from generation.engine import Prompt, open_checkpoint
from terminal import output, say
from training.config import TrainingConfig
from training.configure import configure
from training.device import Device


def print_samples(run: Path, prompts: Sequence[Prompt], training: TrainingConfig,
                  device: Device) -> None:
    """Print what the best checkpoint makes of the prompts, if asked for, and how to get more."""
    if training.sample_tokens:
        with configure(device):
            engine = open_checkpoint(run, "best", device)
            jobs = [(prompt, number) for number, prompt in enumerate(prompts)]
            for number, completion in enumerate(engine.complete(jobs, SamplingConfig()), 1):
                prompt = engine.prompt_text(prompts[number - 1])
                output(f"--- {number} of {len(jobs)}\n{prompt}{completion.text}")
    # Without an empty prompt, the model is one for chat.
    argument = shlex.quote(f"run={run}")
    more = 'prompt="..."' if "" in prompts else "chat=true"
    say(f"More: python sample.py {argument} {more}")
