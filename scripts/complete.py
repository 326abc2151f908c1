"""Complete a file of prompts into a file of JSON lines: `sample.py prompts=FILE out=FILE.jsonl`.

The same command again continues after the lines that are there.
"""

import hashlib
import json
import math
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import atomic
import locks
from conf.sampling import SamplingConfig
from conf.settings import SampleSettings
from generation.decoder import Decoder
from generation.engine import Completion, Engine, Job
from generation.prompts import read_text
from progress import ProgressBar
from terminal import counted, say


def complete_file(engine: Engine, settings: SampleSettings, decoder: Decoder | None) -> None:
    """Complete each line of `prompts` `num_samples` times into `out`, in order.

    Empty lines are skipped. Raises ValueError, changing nothing, if `out` holds completions of
    other prompts or settings, or anything else.
    """
    jobs = read_jobs(settings)
    for prompt, _ in jobs:
        # Raises ValueError before anything is written.
        engine.encode(prompt)
    settings_id = identity(engine, settings)
    path = Path(settings.out)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"out={path} is not a regular file: choose another.")
    path.parent.mkdir(parents=True, exist_ok=True)

    with locks.exclusive_lock(path):
        done = count_done(path, jobs, settings_id)
        progress = ProgressBar(total=len(jobs), initial=done, unit="completions")
        with closing(atomic.LineFile(path)) as out, progress:
            while done < len(jobs):
                # A batch that a kill cut is completed again as a whole: with some kernels, the
                # last digits of a row depend on the number of rows.
                start = done - done % settings.batch_size
                batch = jobs[start : start + settings.batch_size]
                completions = engine.complete(batch, settings, decoder, logprobs=True)
                # The file already holds the first ones.
                for place in range(done - start, len(batch)):
                    out.add(as_line(batch[place], completions[place], settings_id))
                    progress.update()
                out.sync()
                done = start + len(batch)
    say(f"{settings.out}: {counted(len(jobs), 'completion')}")


def read_jobs(settings: SampleSettings) -> list[Job]:
    """Each prompt of the file, as often as it is to be completed."""
    lines = read_text("prompts", settings.prompts).split("\n")
    prompts = [line.removesuffix("\r") for line in lines]
    jobs = [(prompt, n) for prompt in prompts if prompt for n in range(settings.num_samples)]
    if not jobs:
        raise ValueError(f"prompts={settings.prompts} holds no prompts: write one per line.")
    return jobs


def identity(engine: Engine, settings: SampleSettings) -> str:
    """A hash of the model and of the settings that decide the completions."""
    rules = {name: getattr(settings, name) for name in asdict(SamplingConfig())}
    rules |= {"precision": settings.precision, "checkpoint": settings.checkpoint,
              # The sum of squares of all weights tells models apart.
              "weights": math.fsum(tensor.double().square().sum().item()
                                   for tensor in engine.model.parameters())}
    if settings.int8 or engine.device.precision != "fp32":
        # Which kernel multiplies depends on the batch size, and with it the last digits.
        rules["batch_size"] = settings.batch_size
    return hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:12]


def as_line(job: Job, completion: Completion, settings_id: str) -> str:
    prompt, number = job
    line = {"prompt": prompt, "sample": number, "text": completion.text,
            "tokens": len(completion.tokens),
            "mean_logprob": sum(completion.logprobs) / len(completion.logprobs),
            "finish_reason": completion.reason, "settings": settings_id}
    return json.dumps(line, ensure_ascii=False)


def count_done(path: Path, jobs: list[Job], settings_id: str) -> int:
    """The number of jobs whose lines the file holds, without a last line that a kill cut.

    Raises ValueError if it holds anything else.
    """
    *complete, partial = path.read_bytes().split(b"\n")
    lines = [*complete, partial] if partial else complete
    end = f'"settings": "{settings_id}"}}'.encode()
    for number, (line, (prompt, sample)) in enumerate(zip(lines, jobs, strict=False), 1):
        start = json.dumps({"prompt": prompt, "sample": sample}, ensure_ascii=False)
        start = start.removesuffix("}").encode() + b", "
        is_cut = number > len(complete)
        # A kill can cut a line anywhere.
        if not line.startswith(start[: len(line)] if is_cut else start):
            raise ValueError(f"out={path}: line {number} is no completion of the prompt "
                             f"{prompt[:40]!r}: choose another file.")
        if not is_cut and not line.endswith(end):
            raise ValueError(f"out={path}: line {number} is from another model or other settings: "
                             "choose another file.")
    if len(lines) > len(jobs):
        raise ValueError(f"out={path} has {counted(len(lines), 'line')}, more than the "
                         f"{counted(len(jobs), 'completion')} to write: choose another file.")
    return len(complete)
