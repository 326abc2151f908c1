"""A copy of a run's metrics in Weights & Biases.

The local files are complete: a failure of W&B is one warning, and training continues.
"""

import os
import secrets
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import atomic
from terminal import first_line
from training.config import LoggerConfig


class WandbCopy:
    """Sends metrics to the W&B run of a `folder`; does nothing where W&B is disabled or fails."""

    def __init__(self, folder: Path, config: LoggerConfig, settings: dict[str, Any],
                 say: Callable[[str], None]) -> None:
        self.say = say
        self.run = self.start(folder, config, settings)

    def start(self, folder: Path, config: LoggerConfig, settings: dict[str, Any]) -> Any:
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
                # Started, perhaps offline in place of online.
                if attempt != mode:
                    upload = f"wandb sync {shlex.quote(str(folder))}/wandb/offline-run-*"
                    self.say(f"Warning: W&B cannot be used online ({problem}); "
                             f"metrics are recorded offline. To upload them: {upload}")
                return run
        self.say(f"Warning: W&B could not start ({problem}); metrics stay local.")
        return None

    def add(self, row: dict[str, float | None]) -> None:
        """Send a line of metrics."""
        self.send(lambda: self.run.log(row))

    def end(self, samples: list[tuple[int, str]]) -> None:
        """Send all samples of the run as one table, and end the W&B run."""
        def send_samples() -> None:
            if samples:
                import wandb

                table = wandb.Table(columns=["step", "sample"], data=samples)
                self.run.log({"step": samples[-1][0], "samples": table})
            self.run.finish()

        self.send(send_samples)

    def send(self, call: Callable[[], None]) -> None:
        """Call a function that sends something. After a failure, nothing more is sent."""
        if self.run is None:
            return
        try:
            call()
        except Exception as error:
            self.run = None
            self.say(f"Warning: W&B stopped taking metrics "
                     f"({type(error).__name__}: {first_line(error)}); they stay local.")


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
    atomic.write_json(id_file, {"id": run_id})
    quiet = wandb.Settings(silent=True, console="off", init_timeout=60)
    run = wandb.init(project=config.project, name=settings["name"], id=run_id, resume="allow",
                     group=config.group or None, tags=config.tags.split(), mode=mode, dir=folder,
                     config=settings, settings=quiet)
    # W&B's own step only increases, but a resumed run repeats steps after its checkpoint.
    run.define_metric("*", step_metric="step")
    return run
