"""What a run tells: the console with its progress bar, `metrics.jsonl`, `log.txt`, and a W&B mirror.

The local files are the record. W&B is a copy of it: whatever fails there is one warning and training goes on.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shlex
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import atomic
from progress import ProgressBar, print_line
from setting import setting
from terminal import escaped

RECENT = 20  # losses that a report of a non-finite one shows


@dataclass(frozen=True)
class LoggerConfig:
    """The records of a run besides the metrics in its folder."""

    wandb: Literal["disabled", "offline", "online"] = setting(
        "disabled", "copy the metrics to Weights & Biases"
    )
    project: str = setting("nanohydra", "the W&B project")
    group: str = setting("", "the W&B group; in a sweep, empty: the sweep's name")
    tags: str = setting("", "W&B tags, separated by spaces")
    report: bool = setting(True, "write report.html to the run's folder at the end")

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        if not self.project:
            yield "project is empty: name the W&B project."


class Recorder:
    """Writes a run's story into its `folder`. Use as a context manager.

    `start_step` is where training goes on from: metrics of later steps, which a kill left behind, are cut off.
    """

    def __init__(self, folder: Path, start_step: int, max_steps: int, config: LoggerConfig,
                 settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics = atomic.LineFile(folder / "metrics.jsonl")
        self.log = atomic.LineFile(folder / "log.txt")
        self.recent: deque[float] = deque(maxlen=RECENT)  # the last training losses
        self.bar = ProgressBar(
            total=max_steps, initial=start_step, unit="steps",
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            plain_format="Step {n_fmt} of {total_fmt} ({percentage:.0f}%), {elapsed} elapsed, {remaining} left{postfix}")
        self.cut_back(start_step)
        self.wandb = self._start_wandb(folder, config, settings)

    def say(self, text: str) -> None:
        """A line or more for people."""
        text = escaped(text)
        self.log.add(text)
        print_line(text)

    def sample(self, step: int, text: str) -> None:
        """What the model writes after `step` steps: for people, and as a line of metrics."""
        self.say(f"  {text!r}")
        self.metrics.add(json.dumps({"step": step, "sample": text}))
        self.samples.append((step, text))

    def record(self, step: int, **values: float | bool) -> None:
        """One line of metrics. `step` counts finished steps; what is not finite becomes null."""
        values = {key: value if math.isfinite(value) else None for key, value in {"step": step, **values}.items()}
        self.metrics.add(json.dumps(values))
        if (loss := values.get("loss")) is not None:
            self.recent.append(loss)
        if self.wandb is not None:
            self._mirror(lambda: self.wandb.log(values))

    def cut_back(self, step: int) -> None:
        """Go back to `step`: drop the metrics of later steps, and lines that are damaged."""
        self.metrics.close()
        kept, self.samples = [], []
        for line in self.metrics.path.read_bytes().splitlines(keepends=True):
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                row = json.loads(line)
                if row["step"] <= step:
                    kept.append((line, float(row["loss"]) if row.get("loss") is not None else None))
                    self.samples += [(row["step"], row["sample"])] if "sample" in row else []
        atomic.truncate(self.metrics.path, b"".join(line for line, _ in kept))
        self.metrics = atomic.LineFile(self.metrics.path)
        self.recent.clear()
        self.recent.extend(loss for _, loss in kept if loss is not None)
        self.bar.n = step

    def sync(self) -> None:
        """Bring the metrics to the disk. Raises OSError if it does not take them; they are kept and offered again."""
        self.metrics.sync()

    def expect(self, seconds: float, limited: bool = False) -> None:
        """Show the time left by this estimate of it, until steps have been timed; `limited`: by training.max_seconds."""
        self.bar.expect(seconds, limited)

    def progress(self, step: int, **shown: str) -> None:
        """Move the bar to `step` finished steps."""
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def _start_wandb(self, folder: Path, config: LoggerConfig, settings: dict[str, Any]) -> Any:
        """The W&B run of this folder: its id is in `wandb.json`, so a resumed run continues it.

        A run that cannot be online is recorded offline, so that it can be uploaded later.
        """
        mode = wandb_mode(config.wandb)
        if mode == "disabled":
            return None
        problem = "no API key: see wandb login"
        for attempt in ("online", "offline") if mode == "online" else ("offline",):
            try:
                import wandb

                if attempt == "online" and not has_wandb_key(wandb):
                    continue
                run = init_wandb(wandb, folder, config, settings, attempt)
            except ImportError:
                self.say("Warning: logger.wandb needs the wandb package (pip install wandb); metrics stay local.")
                return None
            except Exception as error:  # no network, no server, a wrong key: none of it may stop a run
                problem = f"{type(error).__name__}: {first_line(error)}"
                with suppress(Exception):
                    wandb.teardown()  # else the id counts as in use
            else:
                if attempt != mode:
                    self.say(f"Warning: W&B cannot be used online ({problem}); metrics are recorded offline. "
                             f"To upload them: wandb sync {shlex.quote(str(folder))}/wandb/offline-run-*")
                return run
        self.say(f"Warning: W&B could not start ({problem}); metrics stay local.")
        return None

    def _end_wandb(self) -> None:
        """Send all samples of the run as one table, and take leave."""
        if self.samples:
            import wandb

            table = wandb.Table(columns=["step", "sample"], data=self.samples)
            self.wandb.log({"step": self.samples[-1][0], "samples": table})
        self.wandb.finish()

    def _mirror(self, send: Any) -> None:
        try:
            send()
        except Exception as error:
            self.wandb = None
            self.say(f"Warning: W&B stopped taking metrics ({type(error).__name__}: {first_line(error)}); they stay local.")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *failure: object) -> None:
        self.bar.close()
        if self.wandb is not None and kind is not KeyboardInterrupt:  # which does not wait
            self._mirror(self._end_wandb)
        self.metrics.close()
        self.log.close()


def wandb_mode(setting: str) -> str:
    """The mode of W&B: `setting`, or what WANDB_MODE asks for if that sends less."""
    modes = ["disabled", "offline", "online"]
    asked = {"dryrun": "offline"}.get(mode := os.environ.get("WANDB_MODE", "").lower(), mode)
    return min(setting, asked, key=modes.index) if asked in modes else setting


def has_wandb_key(wandb: Any) -> bool:
    """Whether W&B finds an API key in its settings, the environment or netrc. Asks neither the user nor the server."""
    wandb.setup(wandb.Settings(silent=True))
    return wandb.login(prompt=False, verify=False)


def init_wandb(wandb: Any, folder: Path, config: LoggerConfig, settings: dict[str, Any], mode: str) -> Any:
    """Start or continue the W&B run of `folder`."""
    id_file = folder / "wandb.json"
    run_id = atomic.read_json(id_file)["id"] if id_file.exists() else secrets.token_hex(4)
    atomic.write_bytes(id_file, json.dumps({"id": run_id}).encode())
    quiet = wandb.Settings(silent=True, console="off", init_timeout=60)
    run = wandb.init(project=config.project, name=settings["name"], id=run_id, resume="allow",
                     group=config.group or None, tags=config.tags.split(), mode=mode, dir=folder,
                     config=settings, settings=quiet)
    # W&B's own step only grows, ours goes back where a resumed run repeats steps that a kill cut off.
    run.define_metric("*", step_metric="step")
    return run


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
