"""Jobs on a cluster: a grid with hydra/launcher=submitit_slurm, or slurm with the settings in conf/.

The settings are those of Hydra's Submitit launcher (pip install hydra-submitit-launcher). The jobs are handed to submitit
here: the launcher itself gives up at the first job that fails, and leaves the others behind at Ctrl-C.
"""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atomic
from conf.presets import options
from conf.schema import launcher_settings
from sweep.jobs import Job, LocalRunner, log_of
from training.interrupt import CHILD

COMMON = ("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name", "stderr_to_stdout")
OTHERS = ("choose slurm, submitit_slurm or submitit_local; without a launcher, the jobs run here, "
          "several at a time with jobs=2.")
EXECUTORS = {"SlurmLauncher": "slurm", "LocalLauncher": "local"}


class ClusterRunner(LocalRunner):
    """Submits all jobs at once, as an array; the cluster says which run when. Raises ValueError for wrong settings."""

    poll_seconds = 1.0

    def __init__(self, overrides: list[str], folder: Path) -> None:
        known = (*options("hydra/launcher"), "submitit_slurm", "submitit_local")
        for word in overrides:
            if word.startswith("hydra/launcher=") and word.partition("=")[2] not in known:
                raise ValueError(f"{word}: {OTHERS}")
        try:
            import hydra_plugins.hydra_submitit_launcher  # noqa: F401
            import submitit
        except ImportError:
            raise ValueError("hydra/launcher= needs the Submitit launcher: pip install hydra-submitit-launcher.") from None
        self.running, self.count = [], math.inf
        settings = launcher_settings(overrides)
        executor = EXECUTORS.get(settings.pop("_target_").rpartition(".")[2])
        if not executor:
            raise ValueError(f"{overrides[0]}: {OTHERS}")
        timeouts = {f"{executor}_max_num_timeout": settings.pop("max_num_timeout")} if executor == "slurm" else {}
        try:
            self.executor = submitit.AutoExecutor(folder / "submitit" / "%j", cluster=executor, **timeouts)
        except RuntimeError as error:  # such as no SLURM here
            raise ValueError(f"{overrides[0]} cannot be used here: {error}") from None
        del settings["submitit_folder"]
        settings["name"] = folder.name
        self.executor.update_parameters(**{key if key in COMMON else f"{executor}_{key}": value
                                           for key, value in settings.items()})

    def start(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        submitted = self.executor.map_array(on_the_node(), [job.command for job in jobs], [str(log_of(job)) for job in jobs])
        for job, handle in zip(jobs, submitted, strict=True):
            job.process = Submitted(handle, job.log)
        self.running += jobs


class Submitted:
    """A job on the cluster, in the words of a process."""

    def __init__(self, job: Any, log: Path) -> None:
        self.job, self.log, self.cancelled = job, log, False

    def poll(self) -> int | None:
        """Its exit code, if it is over; what else went wrong is written to its log."""
        if not self.job.done():
            return None
        try:
            return self.job.result()
        except Exception as error:  # lost, out of time, cancelled: whatever a cluster does
            if self.cancelled:
                return 143
            lines = atomic.LineFile(self.log)
            lines.add(f"Error: no result came back from the cluster: {' '.join(str(error).split())[:300]}")
            lines.close()
            return 1

    def terminate(self) -> None:
        self.cancelled = True
        self.job.cancel(check=False)

    kill = terminate


def on_the_node() -> Callable[[list[str], str], int]:
    """What a node does for a job. Made here, so that it is sent whole: a node need not find this module."""
    mark = {CHILD: "1"}

    def run(command: list[str], log: str) -> int:
        with open(log, "ab") as output:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=os.environ | mark)
            try:
                return process.wait()
            finally:
                process.terminate()
                process.wait()

    return run
