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
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import yaml

import atomic
from checkpointing import notices, store
from checkpointing.checkpoint import Checkpoint
from checkpointing.initial import initial_weights
from checkpointing.peers import Peers
from checkpointing.planned import divides_weights
from checkpointing.provenance import record_start
from checkpointing.resume import (
    limit_reached,
    open_device,
    prepared_tokens,
    settings_to_save,
    start_or_resume,
    with_initial_weights,
)
from checkpointing.rollback import answer_nonfinite
from checkpointing.run_folder import Run
from checkpointing.saver import Saver
from checkpointing.state import State
from conf.sampling import SamplingConfig
from conf.settings import Settings
from data.chat import markers_of
from data.loader import Loader, Prefetch, Validation
from data.prepare import describe, load_tokenizer, val_bytes_per_token
from data.shards import open_parts
from data.tokenizer import Tokenizer
from generation.engine import Prompt, open_checkpoint, short_sample
from model import GPT
from model.loss import loss_options
from report.page import after_training, is_current
from terminal import counted, output, say
from training.buckets import GradientBuckets
from training.clock import Clock
from training.config import TrainingConfig
from training.decision import Decision, decide
from training.device import Device, check_fused_loss, configure, maybe_compile
from training.distributed import World
from training.estimate import measure_pace
from training.fsdp import RowGradients, shard
from training.interrupt import Interrupt
from training.memory import check_memory
from training.optim import Optimizers
from training.recorder import Recorder
from training.schedule import lr_scale
from training.step import (
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
    prepared = world.first(lambda: prepared_tokens(settings))
    tokenizer = load_tokenizer(prepared)
    boundary = document_boundary(tokenizer) if settings.data.respect_documents else None
    markers = markers_of(tokenizer) if settings.data.source == "chat" else None
    model_config = replace(settings.model, vocab_size=tokenizer.vocab_size)
    settings = replace(settings, model=model_config)
    limits, block_size = settings.training, model_config.block_size
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
    # A device that this machine does not have is an error before the run's folder is touched.
    Device(limits.device, limits.precision)

    with ExitStack() as stack:
        run, settings, last = open_run(settings, prepared, world, stack)
        limits = settings.training
        if last and limit_reached(limits, last):
            return world.first(lambda: already_finished(run, settings, last, prompts))

        # Build the model and the optimizers.
        device = open_device(run, settings, last)
        stack.enter_context(configure(device))
        torch.manual_seed(settings.seed)
        model = GPT(model_config)
        model.recompute = limits.recompute
        model.loss_options = loss_options(device.torch, fused=limits.compile != "false")
        sharded = divides_weights(settings, world, device)
        sampling_device = device
        if sharded:
            shard(model, world, device)
            # The whole model may not fit on another device.
            sampling_device = Device("cpu")
        else:
            model.to(device.torch)
        optimizers = Optimizers(model.parameters_by_role(), settings.optim, world, sharded)
        scaler = torch.amp.GradScaler(device.type, enabled=device.precision == "fp16")

        # Restore the latest checkpoint, or load the weights to start from.
        state = State(model, optimizers, scaler)
        if last:
            state.restore(last)
        elif settings.init_from:
            state.load_weights(initial_weights(settings, tokenizer))

        # Check that memory and disk space suffice, before anything is written.
        first_batch = loader.batch(0)
        inputs, _ = first_batch
        if not sharded:
            check_memory(model, inputs, document_numbers(inputs, boundary), device)
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
            # Describe the run, decide whether to compile, and estimate the time it takes.
            notices.describe_run(recorder.say, run.folder, device, model, loader,
                                 describe(prepared), state.step, world.local_size)
            for line in imported:
                recorder.say(line)
            notices.describe_changes(recorder.say, settings, state, last, world.size)
            micro_step = partial(try_micro_step, batch=first_batch, device=device,
                                 boundary=boundary)
            # The floating-point operations of each process in a step.
            step_flops = model.flops_per_token() * loader.tokens_per_step / world.size
            choice = "false" if sharded else limits.compile
            forward = maybe_compile(model, choice, device, step_flops * limits.max_steps,
                                    micro_step, recorder.say)
            compiled = forward is not model
            if not compiled:
                check_fused_loss(model, micro_step, recorder.say)
            facts = {"settings": settings_to_save(settings, prepared, device.precision),
                     "max_steps": limits.max_steps, "model": asdict(model.config),
                     "environment": asdict(device.environment(compiled, world.size))}
            if world.is_first:
                record_start(run.folder, state.step, facts["environment"])
            pace = measure_pace(first_loss(forward, first_batch, device, boundary),
                                model.parameters_by_role(), settings.optim, device, limits,
                                loader.micro_steps, sum(validation.n_windows),
                                compiled or model.loss_options is not None, world)
            steps_left, _ = pace.work_left(limits, state.step, state.seconds)
            recorder.expect(pace.seconds_left(limits, state.step, state.seconds),
                            limited=steps_left < limits.max_steps - state.step)
            recorder.say(f"Time: {pace.describe(limits, state.step, state.seconds)}")

            def save(val_loss: float | None) -> None:
                scheduled = limits.saves(state.step)
                saver.save(state.snapshot(val_loss, scheduled, tokenizer.to_json(), facts))

            # Train.
            batches = Prefetch(loader, device.torch, world.rank)
            gradients = GradientBuckets(world, list(model.parameters()), optimizers.parts)
            if sharded:
                gradients = RowGradients(optimizers.parameters, optimizers.own_parts)
            val_loss, decision = None, Decision()
            if limits.on_nonfinite == "rollback" and not last:
                save(val_loss)  # a checkpoint to return to
            while not decision.ends_run:
                start = clock.seconds()
                scale = lr_scale(state.step, settings.optim, limits.max_steps)
                optimizers.set_scale(scale)
                losses = accumulate_gradients(forward, gradients, batches, boundary, state.batch,
                                              scaler, device, settings.seed, interrupt)
                if losses is None:
                    # Interrupted between two micro-steps: the step is not taken.
                    break
                norm = optimizers.gradient_norm(scaler)
                # The only values that a step reads from the device.
                loss, norm_value = read_losses(world.gather(losses), norm)
                run.check_not_moved()

                # A loss scaler passes over gradients that are not finite, and lowers its scale.
                finite = math.isfinite(loss) and (math.isfinite(norm_value)
                                                        or scaler.is_enabled())
                if finite:
                    optimizers.step(scaler, norm, settings.optim.grad_clip,
                                    overflowed=not math.isfinite(norm_value))
                step_seconds = clock.seconds() - start
                seconds, interrupted = world.agree(state.seconds + step_seconds, bool(interrupt))
                decision = decide(limits, state.step + 1, seconds, finite, state.nonfinite,
                                  interrupted)
                if not finite:
                    answer_nonfinite(decision.action, loss, loader.sequences(state.batch), state,
                                     run, limits, recorder, saver, world)
                if decision.action == "rollback":
                    continue
                state.step += 1
                state.seconds = seconds

                tokens_per_second = loader.tokens_per_step / step_seconds
                measured = {"skipped": True}
                if finite:
                    measured = {"loss": loss, "gradient_norm": norm_value}
                recorder.record(state.step, **measured, lr_scale=scale,
                                tokens=state.step * loader.tokens_per_step,
                                step_ms=1000 * step_seconds, seconds=state.seconds)
                recorder.progress(state.step, loss=f"{loss:.3f}",
                                  speed=f"{tokens_per_second:,.0f} tokens/s",
                                  **device.mfu(step_flops / step_seconds))

                val_loss = None
                if decision.evaluate:
                    val_loss = evaluate(model, validation, device, boundary, world)
                    recorder.record_validation(state.step, val_loss, bytes_per_token)
                    # One that is only due to the end of the run does not count towards patience:
                    # a longer run would not have it.
                    if limits.evaluates(state.step):
                        state.note_evaluation(val_loss)
                        decision = decision.after_evaluation(limits, state.stale_evaluations)
                if decision.limit == "patience":
                    recorder.record(state.step, stopped_early=True)
                if decision.save:
                    save(val_loss)
                if decision.evaluate and limits.sample_tokens:
                    # Whatever happens while sampling, the checkpoint is on the disk.
                    saver.finish()
                    whole = state.whole_model()
                    if world.is_first:
                        text = short_sample(whole, tokenizer, limits.sample_tokens,
                                            sampling_device, prompts[0])
                        recorder.sample(state.step, text)
                saver.check()

            # Save what an interruption or a full disk has left unsaved.
            run.check_not_moved()
            saver.finish()
            if world.first(lambda: saver.saved < state.step):
                save(val_loss)
                saver.finish()
            if world.first(lambda: saver.saved < state.step):
                world.fail(OSError(f"Only {saver.saved} of {counted(state.step, 'step')} are saved "
                                   f"in {run.folder}: free some disk space and run the command "
                                   f"again."))
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
            finish(run, limits, prompts, sampling_device)
        return 0


def open_run(settings: Settings, prepared: Path, world: World,
             stack: ExitStack) -> tuple[Run, Settings, Checkpoint | None]:
    """Lock the run's folder in the first process; tell all what settings and checkpoint it has."""
    runs = []

    def lock() -> tuple[Settings, Checkpoint | None]:
        run, resolved, last = stack.enter_context(start_or_resume(settings, prepared))
        runs.append(run)
        return resolved, last

    resolved, last = world.first(lock)
    return world.only_first(runs.pop), resolved, last


def document_boundary(tokenizer: Tokenizer) -> int:
    """The id that starts a document: the end-of-text token of the document before it."""
    if tokenizer.end_of_text is None:
        raise ValueError("data.respect_documents=true needs several documents, but this text is a "
                         "single one and its tokenizer has no end-of-text token. Leave it out, or "
                         "name several texts.")
    return tokenizer.end_of_text


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
