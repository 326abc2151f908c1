"""Train a small GPT on text, or resume a run from its last checkpoint.

  python train.py                                      readable English after minutes on two cores
  python train.py data=text data.path=book.txt         your own text
  python train.py model=modern-small model.n_layer=6   another shape
  python train.py -m optim.lr=1e-3,3e-3                a sweep
"""

from __future__ import annotations

from conf.launch import launch

if __name__ == "__main__":
    # Before the imports below: --help and a wrong setting need not wait for torch.
    launch("train:train", "config", __doc__, multirun="sweep.grid:run_grid")

import math
import shlex
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import yaml

import atomic
from checkpointing import notices, store
from checkpointing.checkpoint import Checkpoint
from checkpointing.initial import initial_weights
from checkpointing.peers import Peers
from checkpointing.planned import divides_weights, memory_advice
from checkpointing.provenance import record_start
from checkpointing.resume import (
    limit_reached,
    open_device,
    open_run,
    prepared_tokens,
    settings_to_save,
    with_initial_weights,
    with_vocab_size,
)
from checkpointing.rollback import answer_nonfinite
from checkpointing.run_folder import Run
from checkpointing.saver import Saver
from checkpointing.state import State, new_state
from conf.sampling import SamplingConfig
from conf.settings import Settings
from data.chat import markers_of
from data.loader import Loader, Prefetch, Validation, document_boundary
from data.prepare import describe, load_tokenizer, val_bytes_per_token
from data.shards import open_parts
from data.tokenizer import Tokenizer
from evaluation.tasks import Question, measure_slices, read_slices
from generation.engine import Engine, Prompt, open_checkpoint, short_sample
from report.page import after_training, is_current
from terminal import counted, output, say
from training.buckets import GradientBuckets
from training.clock import Clock
from training.compiling import check_fused_loss, maybe_compile
from training.config import TrainingConfig
from training.decision import Decision, decide
from training.device import Device, configure
from training.distributed import World
from training.estimate import measure_pace
from training.fsdp import RowGradients
from training.interrupt import Interrupt
from training.memory import check_memory
from training.recorder import Recorder
from training.schedule import lr_scale
from training.step import (
    Batch,
    accumulate_gradients,
    document_numbers,
    evaluate,
    first_loss,
    read_losses,
    try_micro_step,
)

SAMPLES = 3  # of the best checkpoint, printed at the end


def train(settings: Settings) -> int:
    """Start or resume the run that `settings` describe; return the exit code.

    Under torchrun, this is one of several processes that train the run together.
    """
    world = World()
    with world.joined(use_gpus=settings.training.device != "cpu"):
        return train_together(settings, world)


def train_together(settings: Settings, world: World) -> int:
    """Train as one process of `world`. Only the first one writes, prints and samples."""
    # Find the weights to start from, and load the data.
    settings, imported = world.first(lambda: with_initial_weights(settings))
    data = load_data(settings, world)
    settings = with_vocab_size(settings, data.prepared)
    # A device that this machine does not have is an error before the run's folder is touched.
    Device(settings.training.device, settings.training.precision)

    with ExitStack() as stack:
        run, settings, last = open_run(settings, data.prepared, world, stack)
        limits = settings.training
        if last and limit_reached(limits, last):
            return world.first(lambda: already_finished(run, settings, last, data.prompts))

        # Build the model and the optimizers.
        device = open_device(run, settings, last)
        stack.enter_context(configure(device, settings.model.dropout))
        sharded = divides_weights(settings, world, device)
        stack.enter_context(memory_advice(settings, world, device, sharded))
        state = new_state(settings, world, device, sharded)

        # Restore the latest checkpoint, or load the weights to start from.
        if last:
            state.restore(last)
        elif settings.init_from:
            state.load_weights(initial_weights(settings, data.tokenizer))

        # Check that memory and disk space suffice, before anything is written.
        if not sharded:
            inputs, _ = data.first_batch
            check_memory(state.model, inputs, document_numbers(inputs, data.boundary), device)
        if world.is_first:
            store.check_free_space(run.checkpoints, state.nbytes())
            config = yaml.safe_dump(asdict(settings), sort_keys=False)
            atomic.write_bytes(run.folder / "config.yaml", config.encode())

        # A scheduler signals all processes, and torchrun then signals them again: these are one.
        with (Interrupt(second_ends=world.size == 1) as interrupt, Clock() as clock,
              world.only_first(lambda: Recorder(
                  run.folder, state.step, limits.max_steps, settings.logger,
                  asdict(settings))) as recorder,
              Saver(run.checkpoints, limits.keep_last, state.step,
                    partial(before_checkpoint, run, recorder), recorder.say,
                    stop_on_error=limits.on_save_error == "stop", peers=Peers(world)) as saver):
            training = Training(settings, data, state, device, world, run, recorder, saver)
            training.describe(last, imported)
            training.compile()
            training.estimate()
            if limits.on_nonfinite == "rollback" and not last:
                training.start_save()  # a checkpoint to return to
            decision = training.loop(clock, interrupt)
            training.save_last_step()
            if decision.interrupted or interrupt:
                recorder.say(f"Interrupted: {state.step} of {counted(limits.max_steps, 'step')} "
                             f"are saved in {run.folder}; the same command resumes there.")
                return interrupt.exit_code or 143
            if decision.limit == "patience":
                recorder.say(notices.early_stop(state))
            if settings.logger.report and world.is_first:
                recorder.say(after_training(run.folder))
        if world.is_first:
            say(f"Trained {counted(state.step, 'step')} in {state.seconds:.0f} s, "
                f"and waited {saver.waiting_seconds:.1f} s for saving.")
            finish(run, limits, data.prompts, training.sampling_device)
        return 0


@dataclass(frozen=True)
class Data:
    """The prepared text of a run, and the batches of it that this process trains on."""

    prepared: Path
    tokenizer: Tokenizer
    loader: Loader
    validation: Validation
    boundary: int | None  # the token between documents, if attention does not cross them
    prompts: list[Prompt]  # of the samples at the end
    bytes_per_token: float  # of the validation text
    tasks: dict[str, list[Question]]  # to measure at each evaluation

    @cached_property
    def first_batch(self) -> Batch:
        """A batch to try and to time a micro-step with."""
        return self.loader.batch(0)


def load_data(settings: Settings, world: World) -> Data:
    """Open the prepared text; the first process prepares it if necessary."""
    prepared = world.first(lambda: prepared_tokens(settings))
    tokenizer = load_tokenizer(prepared)
    boundary = document_boundary(tokenizer) if settings.data.respect_documents else None
    markers = markers_of(tokenizer) if settings.data.source == "chat" else None
    limits, block_size = settings.training, settings.model.block_size
    weights = settings.data.weights()
    loader = Loader(open_parts(prepared, "train"), block_size, limits.batch_size,
                    limits.micro_steps(block_size, world.size), settings.seed, world.size, weights,
                    markers)
    validation = Validation(open_parts(prepared, "val"), block_size, limits.batch_size,
                            limits.eval_tokens, weights, world.rank, world.size, markers)
    prompts: list[Prompt] = [""] * SAMPLES
    bytes_per_token = val_bytes_per_token(prepared, weights)
    if markers:
        prompts = validation.questions(SAMPLES)
        bytes_per_token = validation.bytes_per_target(tokenizer)
    tasks = read_slices(limits.tasks(), tokenizer)
    return Data(prepared, tokenizer, loader, validation, boundary, prompts, bytes_per_token, tasks)


@dataclass(frozen=True)
class Step:
    """A step that was taken, or skipped because its loss or gradient is not finite."""

    loss: float  # nats per token
    norm: float  # of the gradient
    lr_scale: float
    finite: bool


@dataclass
class Training:
    """The training loop of this process."""

    settings: Settings
    data: Data
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
        self.limits = self.settings.training
        # The floating-point operations of this process in a step.
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

    def describe(self, last: Checkpoint | None, imported: list[str]) -> None:
        """Say what is trained on what, and what a resumed run does differently."""
        say, world, state = self.recorder.say, self.world, self.state
        notices.describe_run(say, self.run.folder, self.device, state.model, self.data.loader,
                             describe(self.data.prepared), state.step, world.local_size)
        for line in imported:
            say(line)
        notices.describe_changes(say, self.settings, state, last, world.size)

    def compile(self) -> None:
        """Compile the model where that pays, otherwise only its loss, and record the start."""
        model, limits, say = self.state.model, self.limits, self.recorder.say
        micro_step = partial(try_micro_step, batch=self.data.first_batch, device=self.device,
                             boundary=self.data.boundary)
        choice = "false" if self.state.optimizers.sharded else limits.compile
        flops = self.step_flops * limits.max_steps
        if limits.max_seconds:
            flops = min(flops, limits.max_seconds * self.device.nominal_flops())
        self.forward = maybe_compile(model, choice, self.device, flops, micro_step, say)
        self.is_compiled = self.forward is not model
        if not self.is_compiled:
            check_fused_loss(model, micro_step, say)
        environment = asdict(self.device.environment(self.is_compiled, self.world.size))
        if self.world.is_first:
            record_start(self.run.folder, self.state.step, environment)
        # What all checkpoints of this process say.
        saved_settings = settings_to_save(self.settings, self.data.prepared, self.device.precision)
        self.facts = {"settings": saved_settings, "max_steps": limits.max_steps,
                      "model": asdict(model.config), "environment": environment}

    def estimate(self) -> None:
        """Estimate the time that training takes, for a message and the progress bar."""
        data, limits, state = self.data, self.limits, self.state
        loss = first_loss(self.forward, data.first_batch, self.device, data.boundary)
        pace = measure_pace(loss, state.model.parameters_by_role(), self.settings.optim,
                            self.device, limits, data.loader.micro_steps,
                            sum(data.validation.n_windows),
                            self.is_compiled or state.model.loss_options is not None, self.world)
        steps_left, _ = pace.work_left(limits, state.step, state.seconds)
        self.recorder.expect(pace.seconds_left(limits, state.step, state.seconds),
                             limited=steps_left < limits.max_steps - state.step)
        self.recorder.say(f"Time: {pace.describe(limits, state.step, state.seconds)}")

    def loop(self, clock: Clock, interrupt: Interrupt) -> Decision:
        """Train until a limit or an interruption ends the run."""
        limits, state, world = self.limits, self.state, self.world
        decision = Decision()
        while not decision.ends_run:
            start = clock.seconds()
            step = self.take_step(interrupt)
            if step is None:
                break
            step_seconds = clock.seconds() - start
            seconds, interrupted = world.agree(state.seconds + step_seconds, bool(interrupt))
            decision = decide(limits, state.step + 1, seconds, step.finite, state.nonfinite,
                              interrupted)
            if not step.finite:
                answer_nonfinite(decision.action, step.loss,
                                 self.data.loader.sequences(state.batch), state, self.run, limits,
                                 self.recorder, self.saver, world)
            if decision.action == "rollback":
                continue
            state.step += 1
            state.seconds = seconds
            self.record(step, step_seconds)

            self.val_loss = None
            if decision.evaluate:
                decision = self.evaluate(decision)
            if decision.save:
                self.start_save()
            if decision.evaluate:
                self.try_out()
            self.saver.check()
        return decision

    def take_step(self, interrupt: Interrupt) -> Step | None:
        """Update the weights by a batch; None if interrupted between two micro-steps of it."""
        settings, state, scaler = self.settings, self.state, self.state.scaler
        scale = lr_scale(state.step, settings.optim, self.limits.max_steps)
        state.optimizers.set_scale(scale)
        losses = accumulate_gradients(self.forward, self.gradients, self.batches,
                                      self.data.boundary, state.batch, scaler, self.device,
                                      settings.seed, interrupt)
        if losses is None:
            return None
        norm = state.optimizers.gradient_norm(scaler)
        # The only values that a step reads from the device.
        loss, norm_value = read_losses(self.world.gather(losses), norm)
        self.run.check_not_moved()

        # A loss scaler passes over gradients that are not finite, and lowers its scale.
        is_norm_finite = math.isfinite(norm_value)
        finite = math.isfinite(loss) and (is_norm_finite or scaler.is_enabled())
        if finite:
            state.optimizers.step(scaler, norm, settings.optim.grad_clip,
                                  overflowed=not is_norm_finite)
        return Step(loss, norm_value, scale, finite)

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

    def evaluate(self, decision: Decision) -> Decision:
        """Measure the validation loss; return what follows, since patience may end the run."""
        data, state = self.data, self.state
        self.val_loss = evaluate(state.model, data.validation, self.device, data.boundary,
                                 self.world)
        self.recorder.record_validation(state.step, self.val_loss, data.bytes_per_token)
        # One that is only due to the end of the run does not count towards patience: a longer run
        # would not have it.
        if self.limits.evaluates(state.step):
            state.note_evaluation(self.val_loss)
            decision = decision.after_evaluation(self.limits, state.stale_evaluations)
        if decision.limit == "patience":
            self.recorder.record(state.step, stopped_early=True)
        return decision

    def start_save(self) -> None:
        """Start to save a checkpoint, in another thread."""
        scheduled = self.limits.saves(self.state.step)
        self.saver.save(self.state.snapshot(self.val_loss, scheduled,
                                            self.data.tokenizer.to_json(), self.facts))

    def save_last_step(self) -> None:
        """Save what an interruption or a full disk has left unsaved."""
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

    def try_out(self) -> None:
        """Record numbers on standard tasks and a short text by the model, if that is asked for."""
        data, tokens, step = self.data, self.limits.sample_tokens, self.state.step
        if not (data.tasks or tokens):
            return
        # Whatever happens here, the checkpoint is on the disk.
        self.saver.finish()
        whole = self.state.whole_model()
        if not self.world.is_first:
            return
        if data.tasks:
            engine = Engine(whole, data.tokenizer, self.sampling_device)
            self.recorder.record_tasks(step, measure_slices(engine, data.tasks))
        if tokens:
            text = short_sample(whole, data.tokenizer, tokens, self.sampling_device,
                                data.prompts[0])
            self.recorder.sample(step, text)


def already_finished(run: Run, settings: Settings, last: Checkpoint,
                     prompts: list[Prompt]) -> int:
    """Say that there is nothing left to train, and complete what a kill may have left undone."""
    limits = settings.training
    advice = notices.how_to_continue(limit_reached(limits, last), settings, last)
    say(f"{run.folder} is finished: {counted(last.step, 'step')}, "
        f"{last.state['seconds']:.0f} s. {advice}")
    store.prune(run.checkpoints, limits.keep_last)
    if settings.logger.report and not is_current(run.folder):
        say(after_training(run.folder))
    return finish(run, limits, prompts, Device(limits.device, limits.precision))


def before_checkpoint(run: Run, recorder: Recorder) -> None:
    """Check that the folder is still the run's, and bring its metrics to the disk."""
    run.check_not_moved()
    recorder.sync()


def finish(run: Run, limits: TrainingConfig, prompts: list[Prompt], device: Device) -> int:
    """Print samples of the best checkpoint, and the command for more."""
    if limits.sample_tokens:
        with configure(device):
            engine = open_checkpoint(run.folder, "best", device)
            jobs = [(prompt, number) for number, prompt in enumerate(prompts)]
            for number, completion in enumerate(engine.complete(jobs, SamplingConfig())):
                output(f"--- {number + 1} of {len(jobs)}\n"
                       f"{engine.shown(prompts[number])}{completion.text}")
    argument = shlex.quote(f"run={run.folder}")
    more = 'prompt="..."' if "" in prompts else "chat=true"
    say(f"More: python sample.py {argument} {more}")
    return 0
