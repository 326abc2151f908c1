"""Run the jobs of a grid on a cluster: hydra/launcher=submitit_slurm, or slurm as set in conf/.

The settings are those of Hydra's Submitit launcher (pip install hydra-submitit-launcher), but jobs
are submitted here: the launcher gives up at the first failed job, and leaves others behind after
Ctrl-C.
"""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import atomic
from conf.composition import launcher_settings
from conf.presets import options
from sweep.jobs import Job
from sweep.runner import Runner
from training.parent import CHILD

# Settings that submitit knows for every kind of cluster; others get the name of the cluster.
COMMON = ("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes",
          "name", "stderr_to_stdout")
EXECUTORS = {"SlurmLauncher": "slurm", "LocalLauncher": "local"}
KNOWN_LAUNCHERS = (
    "use slurm, submitit_slurm or submitit_local; without a launcher, jobs run on this machine, "
    "several at a time with jobs=2.")


class ClusterRunner(Runner):
    """Submits all jobs at once, as an array; the cluster decides when each runs.

    A job is one task, on one node, in which torchrun starts the processes. Raises ValueError for
    invalid settings.
    """

    poll_seconds = 1.0

    def __init__(self, overrides: list[str], folder: Path, processes: int = 1) -> None:
        super().__init__(max_jobs=math.inf)
        self.processes = processes
        known = (*options("hydra/launcher"), "submitit_slurm", "submitit_local")
        for override in overrides:
            key, _, value = override.partition("=")
            if key == "hydra/launcher" and value not in known:
                raise ValueError(f"{override}: {KNOWN_LAUNCHERS}")
        try:
            import hydra_plugins.hydra_submitit_launcher  # noqa: F401
            import submitit
        except ImportError:
            raise ValueError("hydra/launcher= needs the Submitit launcher: "
                             "pip install hydra-submitit-launcher.") from None

        # Find the kind of cluster, and submitit's executor for it.
        settings = launcher_settings(overrides)
        cluster = EXECUTORS.get(settings.pop("_target_").rpartition(".")[2])
        if not cluster:
            raise ValueError(f"{overrides[0]}: {KNOWN_LAUNCHERS}")
        limits = {}
        if cluster == "slurm":
            limits["slurm_max_num_timeout"] = settings.pop("max_num_timeout")
        try:
            place = folder / "submitit" / "%j"
            self.executor = submitit.AutoExecutor(place, cluster=cluster, **limits)
        except RuntimeError as error:
            # For example where SLURM is not installed.
            raise ValueError(f"{overrides[0]} is not available here: {error}") from None

        # Give it the other settings, with the prefix of the cluster where it needs one.
        check_size(settings, processes)
        del settings["submitit_folder"]
        settings["name"] = folder.name
        self.executor.update_parameters(**{
            key if key in COMMON else f"{cluster}_{key}": value for key, value in settings.items()
        })

    def start(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        commands = [job.command for job in jobs]
        logs = [str(job.open_log()) for job in jobs]
        submitted = self.executor.map_array(run_on_node(self.processes), commands, logs)
        for job, handle in zip(jobs, submitted, strict=True):
            job.process = Submitted(handle, job.log)
        self.running += jobs


def check_size(settings: dict[str, Any], processes: int) -> None:
    """Raise ValueError if the launcher's settings do not suit jobs of this many processes."""
    for key in ("nodes", "tasks_per_node"):
        if settings.get(key) not in (None, 1):
            raise ValueError(f"hydra.launcher.{key}={settings[key]}: a job of a sweep is one task "
                             "on one node. Leave it out; processes_per_job= sets the number of "
                             "processes.")
    gpus = settings.get("gpus_per_node")
    if gpus and gpus != processes:
        raise ValueError(f"hydra.launcher.gpus_per_node={gpus} and processes_per_job={processes} "
                         "differ, but each process trains on one GPU: set both to the same "
                         "number.")


class Submitted:
    """A job on the cluster, with the methods of a Popen."""

    def __init__(self, job: Any, log: Path) -> None:
        self.job, self.log, self.cancelled = job, log, False

    def poll(self) -> int | None:
        """The exit code, or None while it runs. Errors of the cluster are written to the log."""
        if not self.job.done():
            return None
        try:
            return self.job.result()
        except Exception as error:
            # The job was lost, timed out or was cancelled; each cluster has its own exceptions.
            if self.cancelled:
                return 143
            message = " ".join(str(error).split())[:300]
            with closing(atomic.LineFile(self.log)) as lines:
                lines.add(f"Error: the cluster returned no result: {message}")
            return 1

    def terminate(self) -> None:
        self.cancelled = True
        self.job.cancel(check=False)

    kill = terminate


def run_on_node(processes: int) -> Callable[[list[str], str], int]:
    """The function that a node calls with a command and a log.

    It is a closure so that it is pickled by value: the node cannot import this module.
    """
    child = {CHILD: "1"}

    def run(command: list[str], log: str) -> int:
        # Several processes share the CPUs of the job.
        share = {}
        if processes > 1:
            share["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
        with open(log, "ab") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output,
                env=os.environ | child | share)
            try:
                return process.wait()
            finally:
                # The cluster cancels the job: the training saves and ends.
                process.terminate()
                process.wait()

    return run
