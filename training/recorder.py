"""What a run tells: the console with its progress bar, `metrics.jsonl`, `log.txt`, and a W&B mirror.

The local files are the record. W&B is a copy of it: whatever fails there is one warning and training goes on.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

import atomic


@dataclass(frozen=True)
class LoggerConfig:
    """Where metrics go beside the run's own folder."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "nanohydra"

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        if not self.project:
            yield "project is empty: name the W&B project."


class Recorder:
    """Writes a run's story into its `folder`. Use as a context manager.

    `start_step` is where training goes on from: metrics of later steps, which a kill left behind, are cut off.
    """

    def __init__(self, folder: Path, start_step: int, max_steps: int, config: LoggerConfig,
                 settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics_path = folder / "metrics.jsonl"
        cut_back(self.metrics_path, start_step)
        self.metrics = open(self.metrics_path, "a")  # noqa: SIM115 (closed in __exit__)
        self.log = open(folder / "log.txt", "a")  # noqa: SIM115
        self.bar = tqdm(total=max_steps, initial=start_step, unit="step", dynamic_ncols=True,
                        mininterval=0.1 if sys.stderr.isatty() else 10,  # into a file, a line now and then is enough
                        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]")
        self.wandb = self._start_wandb(folder, config, settings)

    def say(self, text: str) -> None:
        """A line or more for people."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        print(text, file=self.log, flush=True)

    def record(self, step: int, **values: float | str | None) -> None:
        """One line of metrics. `step` counts finished steps."""
        print(json.dumps({"step": step} | values), file=self.metrics, flush=True)
        if self.wandb is not None:
            self._mirror(lambda: self.wandb.log(values, step=step))

    def progress(self, step: int, **shown: str) -> None:
        """Move the bar to `step` finished steps."""
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def _start_wandb(self, folder: Path, config: LoggerConfig, settings: dict[str, Any]) -> Any:
        """The W&B run that this folder belongs to: its id lives in `wandb.json`, so a resumed run continues it."""
        if config.wandb == "disabled":
            return None
        try:
            import wandb

            id_file = folder / "wandb.json"
            run_id = json.loads(id_file.read_text())["id"] if id_file.exists() else secrets.token_hex(4)
            atomic.write_bytes(id_file, json.dumps({"id": run_id}).encode())
            quiet = wandb.Settings(silent=True, console="off", init_timeout=60)
            return wandb.init(project=config.project, name=settings["name"], id=run_id, resume="allow",
                              mode=config.wandb, dir=folder, config=settings, settings=quiet)
        except ImportError:
            self.say("Warning: logger.wandb needs the wandb package (pip install wandb); metrics stay local.")
        except Exception as error:  # no account, no network, no server: none of it may stop a run
            self.say(f"Warning: W&B could not start ({type(error).__name__}: {first_line(error)}); metrics stay local.")
        return None

    def _mirror(self, send: Any) -> None:
        try:
            send()
        except Exception as error:
            self.wandb = None
            self.say(f"Warning: W&B stopped taking metrics ({type(error).__name__}: {first_line(error)}); they stay local.")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *failure: object) -> None:
        self.bar.close()
        if self.wandb is not None:
            self._mirror(self.wandb.finish)
        self.metrics.close()
        self.log.close()


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def cut_back(metrics: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and a last line that was cut short."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    atomic.write_bytes(metrics, "".join(kept).encode())
