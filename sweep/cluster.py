"""Run the jobs of a grid on a cluster: hydra/launcher=submitit_slurm, or slurm as set in conf/.

The settings are those of Hydra's Submitit launcher (pip install hydra-submitit-launcher), but jobs
are submitted here: the launcher gives up at the first failed job, and leaves others behind after
Ctrl-C. On SLURM, squeue tells which jobs are left: submitit asks sacct, which needs accounting.
"""

import logging
import math
import os
import signal
import subprocess
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import atomic
from conf.composition import launcher_settings
from conf.presets import options
from optional import import_optional
from progress import print_line
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
# The state of all jobs until the controller of SLURM answers, and of one that it has forgotten.
UNKNOWN, FORGOTTEN = "UNKNOWN", "FORGOTTEN"
# States of SLURM's jobs that no other state follows.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
         "PREEMPTED", "TIMEOUT", FORGOTTEN}
# Seconds until the result of a job that has ended is visible on every node's disk.
RESULT_SECONDS = 15


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
        import_optional("hydra_plugins.hydra_submitit_launcher",
                        "hydra/launcher= needs the Submitit launcher", "hydra-submitit-launcher")
        import submitit

        # Find the kind of cluster, and submitit's executor for it.
        settings = launcher_settings(overrides)
        cluster = EXECUTORS.get(settings.pop("_target_").rpartition(".")[2])
        if not cluster:
            raise ValueError(f"{overrides[0]}: {KNOWN_LAUNCHERS}")
        limits = {}
        if cluster == "slurm":
            limits["slurm_max_num_timeout"] = settings.pop("max_num_timeout")
            # Since SLURM 22.05, srun may otherwise bind a task to one CPU.
            share = "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"
            settings["setup"] = [share, *(settings["setup"] or [])]
        self.queue = Queue() if cluster == "slurm" else None
        self.place = folder / "submitit" / "%j"
        try:
            self.executor = submitit.AutoExecutor(self.place, cluster=cluster, **limits)
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
        # An earlier command, which was killed, may have submitted some of them.
        new = [job for job in jobs if not self.attach(job)]
        if new:
            self.submit(new)
        self.running += jobs

    def submit(self, jobs: list[Job]) -> None:
        commands = [job.command for job in jobs]
        logs = [str(job.open_log()) for job in jobs]
        try:
            submitted = self.executor.map_array(node_task(self.processes), commands, logs)
        except (OSError, RuntimeError) as error:
            # sbatch is missing, refuses the job, or does not reach the controller.
            message = " ".join(str(error).split())
            raise ValueError(f"the cluster did not accept the jobs: {message}") from None
        for job, handle in zip(jobs, submitted, strict=True):
            job.process = Submitted(handle, job.log, self.queue)
            atomic.write_bytes(self.id_file(job), handle.job_id.encode())

    def id_file(self, job: Job) -> Path:
        """The file with the number of a job on the cluster."""
        return self.place.parent / f"{job.name}.id"

    def attach(self, job: Job) -> bool:
        """Whether the job was in SLURM's queue already; then its result is that job's."""
        file = self.id_file(job)
        if not self.queue or not file.exists():
            return False
        number = file.read_text()
        if self.queue.state(number) in ENDED | {UNKNOWN, "COMPLETING"}:
            return False
        from submitit import SlurmJob

        job.open_log()
        job.process = Submitted(SlurmJob(self.place, number), job.log, self.queue)
        return True


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


class Queue:
    """SLURM's queue, which also lists jobs that have ended in the last minutes."""

    poll_seconds = 10.0

    def __init__(self) -> None:
        # submitit warns where sacct does not answer, which is not needed here.
        logging.getLogger("submitit").setLevel(logging.ERROR)
        self.own: set[str] = set()  # numbers of the jobs of this sweep
        self.states: dict[str, str] | None = None
        self.reasons = {"None"}  # for which jobs wait, and which were printed
        self.read_at = -math.inf

    def add(self, number: str) -> None:
        """Watch a job of this sweep. It waits, unless the next answer says otherwise."""
        self.own.add(number)
        self.expire()
        if self.states is not None:
            self.states.setdefault(number, "PENDING")

    def expire(self) -> None:
        """Ask again for the next state."""
        self.read_at = -math.inf

    def update(self) -> None:
        """Ask squeue. While the controller does not answer, its last answer holds."""
        # "--all" shows jobs in hidden partitions, too.
        command = ["squeue", "--noheader", "--all", "--array", "--states=all",
                   f"--user={os.getuid()}", "--format=%i %T %r"]
        self.read_at = time.monotonic()
        try:
            listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            return
        self.states = {}
        for line in listed.stdout.splitlines():
            number, state, *reasons = line.split(maxsplit=2)
            reason = " ".join(reasons)
            self.states[number] = state
            # Some reasons never go away, such as more CPUs than a node has.
            if state == "PENDING" and number in self.own and reason not in self.reasons:
                self.reasons.add(reason)
                print_line(f"Jobs are waiting in SLURM's queue. Its reason: {reason}")

    def state(self, number: str) -> str:
        if time.monotonic() - self.read_at >= self.poll_seconds:
            self.update()
        return UNKNOWN if self.states is None else self.states.get(number, FORGOTTEN)


class Submitted:
    """A job on the cluster, with the methods of a Popen. `queue` is SLURM's."""

    def __init__(self, job: Any, log: Path, queue: Queue | None) -> None:
        self.job, self.log, self.queue = job, log, queue
        self.cancelled = False
        self.ended_at = math.inf
        if queue:
            queue.add(job.job_id)

    def poll(self) -> int | None:
        """The exit code, or None while it runs. Errors of the cluster are written to the log."""
        if self.queue and not self.job.paths.result_pickle.exists():
            return self.poll_queue(self.queue)
        if not self.job.done():
            return None
        try:
            code = self.job.result()
        except Exception as error:
            # The job was lost or was cancelled; each cluster has its own exceptions.
            return self.no_result(str(error))
        # A job that was stopped may be one that SLURM runs again.
        if code and self.queue and not self.cancelled:
            return code if self.queue.state(self.job.job_id) in ENDED else None
        return code

    def poll_queue(self, queue: Queue) -> int | None:
        """The exit code of a job without a result, or None while it runs."""
        state = queue.state(self.job.job_id)
        if state not in ENDED:
            # SLURM may run a job again.
            self.ended_at = math.inf
            return None
        self.ended_at = min(self.ended_at, time.monotonic())
        if not self.cancelled and time.monotonic() < self.ended_at + RESULT_SECONDS:
            return None
        last_error = (self.job.stderr() or "").strip().rpartition("\n")[2]
        return self.no_result(f"its state is {state}. {last_error}")

    def no_result(self, reason: str) -> int:
        if self.cancelled:
            return 143
        message = " ".join(reason.split())[:300]
        with closing(atomic.LineFile(self.log)) as lines:
            lines.add(f"Error: the cluster returned no result: {message}")
        return 1

    def terminate(self) -> None:
        self.cancelled = True
        self.job.cancel(check=False)
        if self.queue:
            self.queue.expire()

    kill = terminate


def node_task(processes: int) -> Any:
    """The function that a node calls with a command and a log.

    Its class is local so that it is pickled by value: the node cannot import this module.
    """
    environment = {CHILD: "1"}
    # The warning before the time limit, which would kill torchrun.
    warnings = (signal.SIGUSR1, signal.SIGUSR2)

    class NodeTask:
        def __call__(self, command: list[str], log: str) -> int:
            def ignore_warnings() -> None:
                for number in warnings:
                    signal.signal(number, signal.SIG_IGN)

            # Several processes share the CPUs of the job.
            share = {}
            if processes > 1:
                share["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
            with open(log, "ab") as output:
                self.process = process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=output, stderr=output,
                    env=os.environ | environment | share, preexec_fn=ignore_warnings)
                try:
                    # Submitit's signal handler raises an error at the time limit.
                    with suppress(Exception):
                        process.wait()
                finally:
                    # The training saves and ends, as it does at the end of its standard input.
                    process.stdin.close()
                    process.wait()
            return process.returncode

        def checkpoint(self, command: list[str], log: str) -> Any:
            """Submitit calls this at the time limit, before it has SLURM run the job again."""
            from submitit.helpers import DelayedSubmission

            self.process.stdin.close()
            # Its `wait` cannot be called again, because a signal has interrupted it.
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
            del self.process
            return DelayedSubmission(self, command, log)

    return NodeTask()
