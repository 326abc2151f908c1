"""The output of a run: console, progress bar, `metrics.jsonl`, `log.txt`, and a copy in W&B.

The local files are complete. A failure of W&B is one warning, and training continues.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shlex
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import atomic
from progress import ProgressBar, print_line
from setting import setting
from terminal import escaped, first_line

RECENT = 20  # losses in a report of a non-finite one


@dataclass(frozen=True)
class LoggerConfig:
    """The records of a run besides the metrics in its folder."""

    wandb: Literal["disabled", "offline", "online"] = setting(
        "disabled", "copy the metrics to Weights & Biases")
    project: str = setting("nanohydra", "the W&B project")
    group: str = setting("", "the W&B group; in a sweep, empty: the sweep's name")
    tags: str = setting("", "W&B tags, separated by spaces")
    report: bool = setting(True, "write report.html to the run's folder at the end")

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        if not self.project:
            yield "project is empty: name the W&B project."


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
        self.wandb = self._start_wandb(folder, config, settings)

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
        if self.wandb is not None:
            self._send(lambda: self.wandb.log(row))

    def record_validation(self, step: int, val_loss: float, bytes_per_token: float) -> None:
        """Record a validation loss, with perplexity and bits per byte.

        Bits per byte can be compared between tokenizers.
        """
        # A float cannot hold the exponential of more.
        perplexity = math.exp(min(val_loss, 700))
        bits_per_byte = val_loss / math.log(2) / bytes_per_token
        self.record(step, val_loss=val_loss, perplexity=perplexity, bits_per_byte=bits_per_byte)
        self.say(f"Step {step}: validation loss {val_loss:.4f}, perplexity {perplexity:.2f}, "
                 f"{bits_per_byte:.4f} bits per byte")

    def record_tasks(self, step: int, measured: dict[str, float]) -> None:
        """Record numbers on standard tasks, by names such as tasks/piqa/accuracy."""
        self.record(step, **measured)
        shown = [f"{name.removeprefix('tasks/')} {value:.3f}" for name, value in measured.items()]
        self.say(f"Step {step}: {', '.join(shown)}")

    def cut_back(self, step: int) -> None:
        """Remove the metrics after `step`, and damaged lines."""
        self.metrics.close()
        kept, losses = [], []
        self.samples = []
        for line in self.metrics.path.read_bytes().splitlines(keepends=True):
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                row = json.loads(line)
                if row["step"] > step:
                    continue
                if row.get("loss") is not None:
                    losses.append(float(row["loss"]))
                if "sample" in row:
                    self.samples.append((row["step"], row["sample"]))
                kept.append(line)
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

    def _start_wandb(self, folder: Path, config: LoggerConfig, settings: dict[str, Any]) -> Any:
        """Start or resume the W&B run of this folder, offline if it cannot be online."""
        mode = wandb_mode(config.wandb)
        if mode == "disabled":
            return None
        problem = "no API key: see wandb login"
        attempts = ("online", "offline") if mode == "online" else ("offline",)
        for attempt in attempts:
            try:
                import wandb

                if attempt == "online" and not has_wandb_key(wandb):
                    continue
                run = init_wandb(wandb, folder, config, settings, attempt)
            except ImportError:
                self.say("Warning: logger.wandb needs the wandb package (pip install wandb); "
                         "metrics stay local.")
                return None
            except Exception as error:
                # No network, no server or a wrong key must not stop the run.
                problem = f"{type(error).__name__}: {first_line(error)}"
                with suppress(Exception):
                    # Otherwise W&B regards the id as in use.
                    wandb.teardown()
            else:
                if attempt != mode:
                    upload = f"wandb sync {shlex.quote(str(folder))}/wandb/offline-run-*"
                    self.say(f"Warning: W&B cannot be used online ({problem}); "
                             f"metrics are recorded offline. To upload them: {upload}")
                return run
        self.say(f"Warning: W&B could not start ({problem}); metrics stay local.")
        return None

    def _end_wandb(self) -> None:
        """Send all samples of the run as one table, and end the W&B run."""
        if self.samples:
            import wandb

            table = wandb.Table(columns=["step", "sample"], data=self.samples)
            self.wandb.log({"step": self.samples[-1][0], "samples": table})
        self.wandb.finish()

    def _send(self, send: Callable[[], None]) -> None:
        try:
            send()
        except Exception as error:
            self.wandb = None
            self.say(f"Warning: W&B stopped taking metrics "
                     f"({type(error).__name__}: {first_line(error)}); they stay local.")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *failure: object) -> None:
        self.bar.close()
        # After a second Ctrl-C, do not wait for an upload.
        if self.wandb is not None and kind is not KeyboardInterrupt:
            self._send(self._end_wandb)
        self.metrics.close()
        self.log.close()


def wandb_mode(setting: str) -> str:
    """The mode of W&B: `setting`, or WANDB_MODE of the environment if that sends less."""
    modes = ["disabled", "offline", "online"]
    asked = os.environ.get("WANDB_MODE", "").lower()
    if asked == "dryrun":
        asked = "offline"
    if asked not in modes:
        return setting
    return min(setting, asked, key=modes.index)


def has_wandb_key(wandb: Any) -> bool:
    """Whether W&B finds an API key, without asking the user or the server."""
    wandb.setup(wandb.Settings(silent=True))
    return wandb.login(prompt=False, verify=False)


def init_wandb(wandb: Any, folder: Path, config: LoggerConfig, settings: dict[str, Any],
               mode: str) -> Any:
    """Start or resume the W&B run whose id is in `wandb.json`."""
    id_file = folder / "wandb.json"
    run_id = atomic.read_json(id_file)["id"] if id_file.exists() else secrets.token_hex(4)
    atomic.write_bytes(id_file, json.dumps({"id": run_id}).encode())
    quiet = wandb.Settings(silent=True, console="off", init_timeout=60)
    run = wandb.init(project=config.project, name=settings["name"], id=run_id, resume="allow",
                     group=config.group or None, tags=config.tags.split(), mode=mode, dir=folder,
                     config=settings, settings=quiet)
    # W&B's own step only increases, but a resumed run repeats steps after its checkpoint.
    run.define_metric("*", step_metric="step")
    return run
