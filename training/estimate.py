"""How long training takes, estimated before the first step.

Times part of a micro-step and of an optimizer step, without training anything. Knows no model and
no data: it is given a function that returns a loss.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from terminal import counted, readable_time
from training.config import OptimConfig, TrainingConfig
from training.device import Device
from training.distributed import World
from training.optim import Optimizers

MOST_SECONDS = 5.0  # for the timing of a micro-step
LEAST_SECONDS = 0.1  # shorter timings are repeated,
MOST_TIMINGS = 5  # up to this number
# So is one that takes at most this fraction of the run: the first of a size also includes the time
# to obtain memory from the operating system.
RUN_FRACTION = 0.01
# The numbers in the tensors of one role and shape whose update is timed.
SAMPLE_NUMBERS = 2**17


@dataclass(frozen=True)
class Pace:
    """The seconds that a step and an evaluation take."""

    step: float
    evaluation: float

    def work_left(self, training: TrainingConfig, step: int, seconds: float) -> tuple[int, int]:
        """The number of steps and evaluations left after `step` steps and `seconds`."""
        steps = training.max_steps - step
        if training.max_seconds:
            seconds_left = max(0.0, training.max_seconds - seconds)
            steps = min(steps, math.ceil(seconds_left / self.step))
        return steps, training.evaluations(step, steps)

    def seconds_left(self, training: TrainingConfig, step: int = 0, seconds: float = 0.0) -> float:
        """The duration of the rest of the run, evaluations included."""
        steps, evaluations = self.work_left(training, step, seconds)
        return steps * self.step + evaluations * self.evaluation

    def describe(self, training: TrainingConfig, step: int = 0, seconds: float = 0.0) -> str:
        """Such as "about 2.9 minutes on this machine: 260 steps of 0.65 s, ..."."""
        steps, evaluations = self.work_left(training, step, seconds)
        duration = readable_time(self.seconds_left(training, step, seconds))
        return (f"about {duration} on this machine: {counted(steps, 'step')} of {self.step:.3g} s, "
                f"{counted(evaluations, 'evaluation')} of {self.evaluation:.2g} s")


@dataclass(frozen=True)
class Workload:
    """What a step and an evaluation of a run compute."""

    training: TrainingConfig
    optim: OptimConfig
    roles: dict[str, dict[str, Tensor]]  # the parameters, as `GPT.parameters_by_role`
    micro_steps: int  # of a step, in each process
    eval_sequences: int  # in all processes
    compiled: bool = False  # whether another batch size would compile the model again

    @property
    def step_sequences(self) -> int:
        """The sequences of a step in each process."""
        return self.micro_steps * self.training.batch_size


def measure_pace(loss: Callable[[int], Tensor], work: Workload, device: Device,
                 world: World | None = None) -> Pace:
    """The pace of training; `loss(n)` returns the loss of n sequences, at most `batch_size`.

    Several processes share the update and the evaluation equally. Their communication is not
    counted.
    """
    size = world.size if world else 1

    def time_pass(sequences: int) -> float:
        """The seconds that the forward and backward passes of this number of sequences take."""
        start = now(device)
        loss(sequences).backward()
        seconds = now(device) - start
        if world:
            # By the first process's clock, so that all repeat a timing equally often.
            seconds, _ = world.agree(seconds, False)
        for role in work.roles.values():
            for weights in role.values():
                weights.grad = None
        return seconds

    per_sequence = seconds_per_sequence(time_pass, work)
    update = update_seconds(work.roles, work.optim, device) / size
    # A backward pass takes about twice as long as the forward pass, which `recompute` repeats.
    forward_passes = 4 if work.training.recompute else 3
    return Pace(work.step_sequences * per_sequence + update,
                work.eval_sequences * per_sequence / forward_passes / size)


def seconds_per_sequence(time_pass: Callable[[int], float], work: Workload) -> float:
    """The seconds that a sequence takes in a step, forward and backward.

    `time_pass(n)` times n sequences.
    """
    training = work.training

    def delays_run(seconds: float, sequences: int) -> bool:
        """Whether these seconds, the time of some sequences, are long beside the whole run."""
        run_seconds = training.max_steps * work.step_sequences * seconds / sequences
        if training.max_seconds:
            run_seconds = min(run_seconds, training.max_seconds)
        return seconds > RUN_FRACTION * run_seconds

    # Half a micro-step is timed: a sequence takes as long in it as in a whole one.
    sequences = training.batch_size
    # Another batch size would compile a model again.
    if not work.compiled:
        # This first timing includes the set-up of the device, so it only limits the next one. Of a
        # short run of single sequences, it is the only one.
        first = time_pass(1)
        sequences = min(math.ceil(training.batch_size / 2), int(MOST_SECONDS / first))
        is_long = first >= LEAST_SECONDS and delays_run(first, 1)
        if sequences == 0 or (sequences == 1 and is_long):
            return first

    # Repeat it until the sum is long enough, but do not delay a short run.
    timings: list[float] = []
    while len(timings) < MOST_TIMINGS:
        timings.append(time_pass(sequences))
        is_long = sum(timings) >= LEAST_SECONDS
        if is_long and (len(timings) > 1 or delays_run(timings[0], sequences)):
            break
    # Other programs only ever make a timing longer, so the shortest is the best estimate.
    return min(timings) / sequences


def update_seconds(roles: dict[str, dict[str, Tensor]], optim: OptimConfig,
                   device: Device) -> float:
    """The seconds of an optimizer step.

    Updates new tensors of the same shapes, but fewer of them, and extrapolates.
    """
    # Tensors of one role and shape take equally long.
    shapes = Counter((role, weights.shape) for role, named in roles.items()
                     for weights in named.values())
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    seconds = 0.0
    for (role, shape), count in shapes.items():
        # A sample of the tensors of this role and shape.
        numbers = shape.numel() * count
        tensors = max(1, min(count, SAMPLE_NUMBERS // shape.numel()))
        # AdamW updates each number alone, but Muon only whole matrices.
        if shape.numel() > SAMPLE_NUMBERS and role not in ("attention", "mlp"):
            shape = torch.Size((max(1, SAMPLE_NUMBERS // shape[1:].numel()), *shape[1:]))
        sample = {str(number): torch.zeros(shape, device=device.torch, requires_grad=True)
                  for number in range(tensors)}
        optimizers = Optimizers({name: {} for name in roles} | {role: sample}, optim)

        # The first of two updates includes the set-up of the device.
        timings = []
        for _ in range(2):
            for weights in sample.values():
                weights.grad = torch.zeros_like(weights)
            start = now(device)
            optimizers.step(scaler, optimizers.gradient_norm(scaler), optim.grad_clip)
            timings.append(now(device) - start)
        seconds += min(timings) * numbers / (shape.numel() * tensors)
    return seconds


def now(device: Device) -> float:
    """The time in seconds, once the device has finished its work."""
    device.synchronize()
    return time.perf_counter()
