"""The parts of the training loop in train.py: take a step, record, evaluate, save, sample."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from checkpointing import notices, store
from checkpointing.run_folder import Run
from checkpointing.saver import Saver
from checkpointing.snapshot import Peers
from checkpointing.state import State
from conf.settings import Settings
from data.loader import Prefetch
from data.run_data import RunData
from evaluation.tasks import Question, measure_slices
from generation.engine import Engine, short_sample
from terminal import counted
from training import nonfinite
from training.buckets import GradientBuckets
from training.decision import Decision
from training.device import Device
from training.fsdp import RowGradients
from training.interrupt import Interrupt
from training.recorder import Recorder
from training.schedule import lr_scale
from training.step import BatchLoss, accumulate_gradients, evaluate, read_losses


@contextmanager
def open_trainer(settings: Settings, data: RunData, tasks: dict[str, list[Question]],
                 state: State, device: Device, run: Run) -> Iterator[Trainer]:
    """A trainer with its records, and the thread that saves its checkpoints."""
    training, world = settings.training, state.optimizers.world

    def before_checkpoint() -> None:
        # The folder must not have been moved, and the metrics reach the disk first.
        run.check_not_moved()
        recorder.sync()

    with (world.only_first(lambda: Recorder(run.folder, state.step, training.max_steps,
                                            settings.logger, asdict(settings))) as recorder,
          Saver(run.checkpoints, training.keep_last, state.step, before_checkpoint, recorder.say,
                stop_on_error=training.on_save_error == "stop", peers=Peers(world)) as saver):
        yield Trainer(settings, data, tasks, state, device, run, recorder, saver)


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
    run: Run
    recorder: Recorder
    saver: Saver

    def __post_init__(self) -> None:
        data, state = self.data, self.state
        self.training = self.settings.training
        self.world = world = state.optimizers.world
        # The floating-point operations of this process in a step, for the speed and the MFU.
        self.step_flops = state.model.flops_per_token() * data.loader.tokens_per_step / world.size
        self.batches = Prefetch(data.loader, self.device.torch, world.rank)
        # The loss to train with; startup.py may replace its model by a compiled one.
        self.loss_fn = BatchLoss(state.model, self.device, data.boundary)
        # The part of a checkpoint that training does not change, from startup.py.
        self.constants: dict[str, Any] = {}
        # The validation loss after the last step, if it was evaluated then.
        self.val_loss: float | None = None
        # How gradients are added over the processes, and where samples are generated.
        if state.optimizers.sharded:
            self.gradients = RowGradients(state.optimizers.parameters, state.optimizers.own_parts)
            # The whole model may not fit on another device.
            self.sampling_device = Device("cpu")
        else:
            self.gradients = GradientBuckets(world, list(state.model.parameters()),
                                             state.optimizers.parts)
            self.sampling_device = self.device

    def take_step(self, interrupt: Interrupt) -> Step | None:
        """Update the weights by a batch; None if interrupted between two micro-steps of it."""
        # The learning rate depends on the step alone.
        optim, state, scaler = self.settings.optim, self.state, self.state.scaler
        scale = lr_scale(state.step, optim, self.training.max_steps)
        state.optimizers.set_scale(scale)

        # Forward and backward passes of all micro-steps.
        losses = accumulate_gradients(self.loss_fn, self.batches, self.gradients, scaler,
                                      state.batch, self.settings.seed, interrupt)
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
        message = self.report_nonfinite(action, step)
        self.state.optimizers.zero_grad(self.state.scaler)
        if action == "skip":
            self.recorder.say(f"{message} Its batch is skipped.")
        elif action == "rollback":
            self.roll_back(message)
        else:
            self.stop(message)

    def report_nonfinite(self, action: str, step: Step) -> str:
        """Write a report of the batch and the gradients; return a message that names it."""
        state = self.state
        state.nonfinite += 1
        message = (f"Step {state.step + 1} had a loss of {step.loss:.4g} and a gradient that is "
                   "not finite")
        if self.world.is_first:
            batch = {"index": state.batch,
                     "sequences_start_at": self.data.loader.sequences(state.batch)}
            content = {"step": state.step, "action": action, "loss": step.loss, "batch": batch,
                       "last_losses": list(self.recorder.recent)}
            message += nonfinite.report(self.run.folder, state.nonfinite, state.optimizers, content)
        return message

    def stop(self, message: str) -> None:
        """Raise ValueError with the message, how much is saved, and advice."""
        self.saver.finish()
        if self.training.on_nonfinite != "stop":
            message += (f" It is number {self.state.nonfinite} in this run, and "
                        f"training.nonfinite_limit={self.training.nonfinite_limit}.")
        saved = self.world.first(lambda: self.saver.saved)
        self.world.fail(ValueError(
            f"{message} Saved so far: {counted(saved, 'step')}. Try optim.grad_clip=1, a lower "
            "optim.lr, training.precision=fp32, or training.on_nonfinite=skip or rollback."))

    def roll_back(self, message: str) -> None:
        """Return to the last scheduled checkpoint; remove the metrics and checkpoints after it."""
        # Find the checkpoint, once all are on the disk.
        state, world, say = self.state, self.world, self.recorder.say
        self.saver.finish()
        last = world.first(lambda: store.load_checkpoint(
            self.run.checkpoints, "scheduled", store.verified, say, rename_damaged=True))
        if last is None:
            world.fail(ValueError(f"{message} There is no checkpoint to return to."))

        # Return to it. The batches since then are skipped, since one of them may be the cause.
        state.roll_back(last)
        self.recorder.cut_back(state.step)
        if world.is_first:
            store.delete_after(self.run.checkpoints, state.step)
            self.saver.saved = state.step
        say(f"{message} Returning to step {state.step}, past the batches since then.")

    def record(self, step: Step, step_seconds: float) -> None:
        """Write the metrics of a step, and show its progress."""
        # A line of metrics.jsonl. JSON has no NaN, so a skipped step has no loss.
        tokens_per_step, done = self.data.loader.tokens_per_step, self.state.step
        measured = {"skipped": True}
        if step.finite:
            measured = {"loss": step.loss, "gradient_norm": step.norm}
        self.recorder.record(done, **measured, lr_scale=step.lr_scale,
                             tokens=done * tokens_per_step, step_ms=1000 * step_seconds,
                             seconds=self.state.seconds)

        # The progress bar.
        self.recorder.progress(done, loss=f"{step.loss:.3f}",
                               speed=f"{tokens_per_step / step_seconds:,.0f} tokens/s",
                               **self.device.mfu(self.step_flops / step_seconds))

    def evaluate(self, decision: Decision) -> Decision:
        """Measure the validation loss; return the decision, since patience may end the run."""
        data, state = self.data, self.state
        # Batches of evaluations have shapes of their own, and would be compiled for.
        loss_fn = replace(self.loss_fn, model=state.model)
        self.val_loss = evaluate(loss_fn, data.validation, self.world)
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
        # All processes gather a model that is divided, and the first one uses it.
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
                f"{self.run.folder}: free some disk space, or make it writable, "
                "and run the command again."))

    def is_unsaved(self) -> bool:
        return self.saver.saved < self.state.step
