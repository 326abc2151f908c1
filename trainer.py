"""The parts of the training loop in train.py: take a step, record, evaluate, save, sample."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

from checkpointing import notices, store
from checkpointing.checkpoint import Checkpoint
from checkpointing.peers import Peers
from checkpointing.provenance import record_start
from checkpointing.resume import settings_to_save
from checkpointing.run_folder import Run
from checkpointing.saver import Saver
from checkpointing.state import State
from conf.settings import Settings
from data.loader import Prefetch
from data.run_data import RunData
from evaluation.tasks import Question, measure_slices
from generation.engine import Engine, short_sample
from terminal import counted
from training import nonfinite
from training.buckets import GradientBuckets
from training.compiling import check_fused_loss, maybe_compile
from training.decision import Decision
from training.device import Device
from training.distributed import World
from training.estimate import measure_pace
from training.fsdp import RowGradients
from training.interrupt import Interrupt
from training.recorder import Recorder
from training.schedule import lr_scale
from training.step import (
    accumulate_gradients,
    evaluate,
    first_loss,
    read_losses,
    try_micro_step,
)


@contextmanager
def open_trainer(settings: Settings, data: RunData, tasks: dict[str, list[Question]],
                 state: State, device: Device, world: World, run: Run) -> Iterator[Trainer]:
    """A trainer with its records, and the thread that saves its checkpoints."""
    training = settings.training

    def before_checkpoint() -> None:
        # The folder must not have been moved, and the metrics reach the disk first.
        run.check_not_moved()
        recorder.sync()

    def open_recorder() -> Recorder:
        return Recorder(run.folder, state.step, training.max_steps, settings.logger,
                        asdict(settings))

    with (world.only_first(open_recorder) as recorder,
          Saver(run.checkpoints, training.keep_last, state.step, before_checkpoint, recorder.say,
                stop_on_error=training.on_save_error == "stop", peers=Peers(world)) as saver):
        yield Trainer(settings, data, tasks, state, device, world, run, recorder, saver)


@dataclass(frozen=True)
class Step:
    """A step that was taken, or skipped because its loss or gradient is not finite."""

    loss: float  # nats per token
    norm: float  # of the gradient
    lr_scale: float
    finite: bool


@dataclass
class Trainer:
    """Trains the model in this process. All processes of a run call the same methods."""

    settings: Settings
    data: RunData
    tasks: dict[str, list[Question]]  # to measure at each evaluation
    state: State
    device: Device
    world: World
    run: Run
    recorder: Recorder
    saver: Saver
    # The validation loss after the last step, where it was evaluated.
    val_loss: float | None = None

    def __post_init__(self) -> None:
        data, state, world = self.data, self.state, self.world
        self.training = self.settings.training
        # The floating-point operations of this process in a step, for the speed and the MFU.
        tokens = data.loader.tokens_per_step / world.size
        self.step_flops = state.model.flops_per_token() * tokens
        self.batches = Prefetch(data.loader, self.device.torch, world.rank)
        if state.optimizers.sharded:
            self.gradients = RowGradients(state.optimizers.parameters, state.optimizers.own_parts)
            # The whole model may not fit on another device.
            self.sampling_device = Device("cpu")
        else:
            self.gradients = GradientBuckets(world, list(state.model.parameters()),
                                             state.optimizers.parts)
            self.sampling_device = self.device

    # Before the first step

    def start(self, last: Checkpoint | None, imported: list[str]) -> None:
        """Describe the run, compile the model, and estimate the time that training takes.

        `last` is the checkpoint that was restored, `imported` are messages about the weights of
        init_from=.
        """
        self.describe(last, imported)
        self.compile()
        self.record_environment()
        self.estimate()
        if self.training.on_nonfinite == "rollback" and not last:
            # A checkpoint to return to.
            self.start_save()

    def describe(self, last: Checkpoint | None, imported: list[str]) -> None:
        """Describe the run, its data and device, and the changes since it was started."""
        say, world, state = self.recorder.say, self.world, self.state
        notices.describe_run(say, self.run.folder, self.device, state, self.data,
                             world.local_size)
        for line in imported:
            say(line)
        notices.describe_changes(say, self.settings, state, last, world.size)

    def compile(self) -> None:
        """Compile the model where that pays, otherwise only its loss."""
        # A micro-step without effect will show whether the compiled model works.
        model, training, say = self.state.model, self.training, self.recorder.say
        micro_step = partial(try_micro_step, batch=self.data.first_batch, device=self.device,
                             boundary=self.data.boundary)
        choice = "false" if self.state.optimizers.sharded else training.compile
        # Compiling takes minutes: the length of the run decides whether that pays.
        flops = self.step_flops * training.max_steps
        if training.max_seconds:
            flops = min(flops, training.max_seconds * self.device.nominal_flops())
        self.forward = maybe_compile(model, choice, self.device, flops, micro_step, say)
        self.is_compiled = self.forward is not model
        if not self.is_compiled:
            check_fused_loss(model, micro_step, say)

    def record_environment(self) -> None:
        """Record the machine and the versions, on which the last bits of the result depend."""
        environment = asdict(self.device.environment(self.is_compiled, self.world.size))
        if self.world.is_first:
            record_start(self.run.folder, self.state.step, environment)
        # The part of a checkpoint that training does not change.
        saved_settings = settings_to_save(self.settings, self.data.prepared, self.device.precision)
        self.constants = {"settings": saved_settings, "max_steps": self.training.max_steps,
                          "model": asdict(self.state.model.config), "environment": environment}

    def estimate(self) -> None:
        """Estimate the time that training takes, for a message and the progress bar."""
        data, training, state = self.data, self.training, self.state
        loss = first_loss(self.forward, data.first_batch, self.device, data.boundary)
        pace = measure_pace(loss, state.model.parameters_by_role(), self.settings.optim,
                            self.device, training, data.loader.micro_steps,
                            sum(data.validation.n_windows),
                            self.is_compiled or state.model.loss_options is not None, self.world)
        steps_left, _ = pace.work_left(training, state.step, state.seconds)
        self.recorder.expect(pace.seconds_left(training, state.step, state.seconds),
                             limited=steps_left < training.max_steps - state.step)
        self.recorder.say(f"Time: {pace.describe(training, state.step, state.seconds)}")

    # A step

    def take_step(self, interrupt: Interrupt) -> Step | None:
        """Update the weights by a batch; None if interrupted between two micro-steps of it."""
        # The learning rate depends on the step alone.
        optim, state, scaler = self.settings.optim, self.state, self.state.scaler
        scale = lr_scale(state.step, optim, self.training.max_steps)
        state.optimizers.set_scale(scale)

        # Forward and backward passes of all micro-steps.
        losses = accumulate_gradients(self.forward, self.gradients, self.batches,
                                      self.data.boundary, state.batch, scaler, self.device,
                                      self.settings.seed, interrupt)
        if losses is None:
            return None

        # The step reads only these two values from the device, at once.
        norm = state.optimizers.gradient_norm(scaler)
        loss, norm_value = read_losses(self.world.gather(losses), norm)
        self.run.check_not_moved()

        # A loss scaler passes over gradients that are not finite, and lowers its scale.
        is_norm_finite = math.isfinite(norm_value)
        finite = math.isfinite(loss) and (is_norm_finite or scaler.is_enabled())
        if finite:
            state.optimizers.step(scaler, norm, optim.grad_clip, overflowed=not is_norm_finite)
        return Step(loss, norm_value, scale, finite)

    def handle_nonfinite(self, action: str, step: Step) -> None:
        """Report a loss or gradient that is NaN or infinite, and do what `action` says.

        "skip" leaves the weights as they are. "rollback" returns to the last scheduled checkpoint
        and steps over all batches since. "stop" raises ValueError.
        """
        state, world, say = self.state, self.world, self.recorder.say
        # Write a report of the batch and the gradients, and drop them.
        state.nonfinite += 1
        message = (f"Step {state.step + 1} had a loss of {step.loss:.4g} and a gradient that is "
                   "not finite")
        if world.is_first:
            batch = {"index": state.batch,
                     "sequences_start_at": self.data.loader.sequences(state.batch)}
            content = {"step": state.step, "action": action, "loss": step.loss, "batch": batch,
                       "last_losses": list(self.recorder.recent)}
            message += nonfinite.report(self.run.folder, state.nonfinite, state.optimizers, content)
        state.optimizers.zero_grad(state.scaler)
        if action == "skip":
            say(f"{message} Its batch is skipped.")
            return

        # Stop, and say how much is saved.
        self.saver.finish()
        if action == "stop":
            if state.nonfinite > 1:
                message += (f" It is number {state.nonfinite} in this run, and "
                            f"training.nonfinite_limit={self.training.nonfinite_limit}.")
            saved = world.first(lambda: self.saver.saved)
            world.fail(ValueError(
                f"{message} Saved so far: {counted(saved, 'step')}. Try a lower optim.lr, "
                "optim.grad_clip=1, training.precision=fp32, or training.on_nonfinite=skip or "
                "rollback."))

        # Return to the checkpoint, and remove the metrics and checkpoints after it.
        last = world.first(lambda: store.load_checkpoint(
            self.run.checkpoints, "scheduled", store.verified, say, rename_damaged=True))
        if last is None:
            world.fail(ValueError(f"{message} There is no checkpoint to return to."))
        state.roll_back(last)
        self.recorder.cut_back(state.step)
        if world.is_first:
            store.delete_after(self.run.checkpoints, state.step)
            self.saver.saved = state.step
        say(f"{message} Returning to step {state.step}, past the batches since then.")

    def record(self, step: Step, step_seconds: float) -> None:
        """Write the metrics of a step, and show its progress."""
        tokens_per_step = self.data.loader.tokens_per_step
        measured = {"skipped": True}
        if step.finite:
            measured = {"loss": step.loss, "gradient_norm": step.norm}
        done = self.state.step
        self.recorder.record(done, **measured, lr_scale=step.lr_scale,
                             tokens=done * tokens_per_step, step_ms=1000 * step_seconds,
                             seconds=self.state.seconds)
        self.recorder.progress(done, loss=f"{step.loss:.3f}",
                               speed=f"{tokens_per_step / step_seconds:,.0f} tokens/s",
                               **self.device.mfu(self.step_flops / step_seconds))

    # After a step

    def evaluate(self, decision: Decision) -> Decision:
        """Measure the validation loss; return the decision, since patience may end the run."""
        data, state = self.data, self.state
        self.val_loss = evaluate(state.model, data.validation, self.device, data.boundary,
                                 self.world)
        self.recorder.record_validation(state.step, self.val_loss, data.bytes_per_token)
        # An evaluation that is only due to the end of the run does not count towards patience: a
        # longer run would not have it.
        if self.training.evaluates(state.step):
            state.note_evaluation(self.val_loss)
            decision = decision.after_evaluation(self.training, state.stale_evaluations)
        if decision.limit == "patience":
            self.recorder.record(state.step, stopped_early=True)
        return decision

    def sample(self) -> None:
        """Measure standard tasks and write a short text with the model, if that is asked for."""
        data, tokens, step = self.data, self.training.sample_tokens, self.state.step
        if not (self.tasks or tokens):
            return
        # Whatever happens here, the checkpoint is on the disk.
        self.saver.finish()
        model = self.state.whole_model()
        if not self.world.is_first:
            return
        if self.tasks:
            engine = Engine(model, data.tokenizer, self.sampling_device)
            self.recorder.record_tasks(step, measure_slices(engine, self.tasks))
        if tokens:
            text = short_sample(model, data.tokenizer, tokens, self.sampling_device,
                                data.prompts[0])
            self.recorder.sample(step, text)

    def start_save(self) -> None:
        """Start to save a checkpoint, in another thread."""
        scheduled = self.training.saves(self.state.step)
        self.saver.save(self.state.snapshot(self.val_loss, scheduled,
                                            self.data.tokenizer.to_json(), self.constants))

    # After the last step

    def end(self, decision: Decision, interrupt: Interrupt) -> int:
        """Save the last step if necessary, say why training ends, and return the exit code."""
        self.save_last_step()
        say, state = self.recorder.say, self.state
        if decision.interrupted or interrupt:
            planned = counted(self.training.max_steps, "step")
            say(f"Interrupted: {state.step} of {planned} are saved in {self.run.folder}; "
                "the same command resumes there.")
            # Of several processes, this one may not have received the signal, SIGTERM.
            return interrupt.exit_code or 143
        if decision.limit == "patience":
            say(notices.early_stop(state))
        return 0

    def save_last_step(self) -> None:
        """Save the last step if it is not saved, as after an interruption or a write error."""
        self.run.check_not_moved()
        self.saver.finish()
        if self.world.first(self.is_unsaved):
            self.start_save()
            self.saver.finish()
        if self.world.first(self.is_unsaved):
            self.world.fail(OSError(
                f"Only {self.saver.saved} of {counted(self.state.step, 'step')} are saved in "
                f"{self.run.folder}: free some disk space and run the command again."))

    def is_unsaved(self) -> bool:
        return self.saver.saved < self.state.step
