"""The output of a run: console, progress bar, `metrics.jsonl`, `log.txt`, and a copy in W&B."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import Any

import atomic
from progress import ProgressBar, print_line
from terminal import counted, escaped
from training.config import LoggerConfig
from training.wandb_copy import WandbCopy

RECENT = 20  # losses in a report of a non-finite one


class Recorder:
    """Writes metrics and messages into the `folder` of a run. Use as a context manager.

    Metrics of steps after `start_step`, from which a resumed run continues, are removed.
    """

    def __init__(self, folder: Path, start_step: int, max_steps: int, config: LoggerConfig,
                 settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics = atomic.LineFile(folder / "metrics.jsonl")
        self.log = atomic.LineFile(folder / "log.txt")
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.samples: list[tuple[int, str]] = []
        self.bar = ProgressBar(
            total=max_steps, initial=start_step, unit="steps",
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            plain_format="Step {n_fmt} of {total_fmt} ({percentage:.0f}%), {elapsed} elapsed, "
                         "{remaining} left{postfix}")
        self.cut_back(start_step)
        self.wandb = WandbCopy(folder, config, settings, self.say)

    def say(self, text: str) -> None:
        """Print a message, and add it to the log."""
        text = escaped(text)
        self.log.add(text)
        print_line(text)

    def sample(self, step: int, text: str) -> None:
        """Record a text that the model generated after `step` steps."""
        self.say(f"  {text!r}")
        self.metrics.add(json.dumps({"step": step, "sample": text}))
        self.samples.append((step, text))

    def record(self, step: int, **values: float | bool) -> None:
        """Add a line of metrics after `step` steps. NaN and infinity become null."""
        row: dict[str, float | None] = {"step": step}
        for key, value in values.items():
            row[key] = value if math.isfinite(value) else None
        self.metrics.add(json.dumps(row))
        if row.get("loss") is not None:
            self.recent.append(row["loss"])
        self.wandb.add(row)

    def record_validation(self, step: int, val_loss: float, bytes_per_token: float) -> None:
        """Record a validation loss, with perplexity and bits per byte.

        Bits per byte can be compared between tokenizers.
        """
        # A float cannot hold the exponential of more.
        perplexity = math.exp(min(val_loss, 700))
        bits_per_byte = val_loss / math.log(2) / bytes_per_token
        self.record(step, val_loss=val_loss, perplexity=perplexity, bits_per_byte=bits_per_byte)
        # That of a model that has diverged would have hundreds of digits.
        shown = f"{perplexity:.2f}" if perplexity < 1e9 else f"{perplexity:.2e}"
        self.say(f"Step {step}: validation loss {val_loss:.4f}, perplexity {shown}, "
                 f"{bits_per_byte:.4f} bits per byte")

    def record_tasks(self, step: int, measured: dict[str, float]) -> None:
        """Record numbers on standard tasks, by names such as tasks/piqa/accuracy."""
        self.record(step, **measured)
        shown = [f"{name.removeprefix('tasks/')} {value:.3f}" for name, value in measured.items()]
        self.say(f"Step {step}: {', '.join(shown)}")

    def cut_back(self, step: int) -> None:
        """Remove the metrics after `step`, and damaged lines."""
        self.metrics.close()
        # Read the lines to keep, with their losses and samples.
        kept, losses, damaged = [], [], 0
        self.samples = []
        for line in self.metrics.path.read_bytes().splitlines(keepends=True):
            try:
                row = atomic.parse_json(line)
                if row["step"] > step:
                    continue
                if row.get("loss") is not None:
                    losses.append(float(row["loss"]))
                if "sample" in row:
                    self.samples.append((row["step"], row["sample"]))
                kept.append(line)
            except (ValueError, KeyError, TypeError, OverflowError):
                # One with a number that is too large for a float is damaged, too.
                damaged += 1
        if damaged:
            self.say(f"{self.metrics.path} had {counted(damaged, 'damaged line')}, removed now.")
        # Write the file with these, and continue at its end.
        atomic.truncate(self.metrics.path, b"".join(kept))
        self.metrics = atomic.LineFile(self.metrics.path)
        self.recent.clear()
        self.recent.extend(losses)
        self.bar.n = step

    def sync(self) -> None:
        """Write the metrics to the disk. After an OSError, the next call tries again."""
        self.metrics.sync()

    def expect(self, seconds: float, limited: bool = False) -> None:
        """Show this estimate of the time left until steps have been timed.

        `limited`: training.max_seconds ends the run.
        """
        self.bar.expect(seconds, limited)

    def progress(self, step: int, **shown: str) -> None:
        """Move the progress bar to `step`."""
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *failure: object) -> None:
        self.bar.close()
        # After a second Ctrl-C, do not wait for an upload.
        if kind is not KeyboardInterrupt:
            self.wandb.end(self.samples)
        self.metrics.close()
        self.log.close()
