"""Train a small GPT on text, or go on with a run where its last checkpoint stands.

  python train.py                                        readable English after minutes on two CPU cores
  python train.py data=text data.path=book.txt           your own text
  python train.py model=modern-small model.n_layer=6     another shape
  python train.py -m optim.lr=1e-3,3e-3                  a sweep
"""

from __future__ import annotations

from conf.launch import launch

if __name__ == "__main__":
    # Before the imports below: --help and a wrong setting need not wait for torch.
    launch("train:train", "config", __doc__, multirun="sweep.grid:run_grid")

import hashlib
import math
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import torch
import yaml
from torch import Tensor, nn

import atomic
from checkpointing import store
from checkpointing.checkpoint import Checkpoint
from checkpointing.provenance import record_start
from checkpointing.resume import limit_reached, open_device, open_run, prepared_tokens, settings_to_save
from checkpointing.run_folder import Run
from checkpointing.saver import Saver
from checkpointing.state import State
from conf.identity import flat
from conf.sampling import SamplingConfig
from conf.settings import Settings
from data.loader import Loader, Prefetch, Validation
from data.prepare import describe, load_tokenizer, val_bytes_per_token
from data.shards import open_parts
from data.tokenizer import Tokenizer
from generation.engine import Engine, open_checkpoint
from model import GPT
from report.page import after_training, is_current
from terminal import counted, output, readable_size, say
from training import nonfinite
from training.clock import Clock
from training.config import TrainingConfig
from training.device import Device, available_memory, bytes_kept, maybe_compile
from training.estimate import measure_pace
from training.interrupt import Interrupt
from training.optim import Optimizers
from training.recorder import Recorder
from training.schedule import extension, lr_scale, same_rates

KEPT_AT_MOST = 512  # bytes for each number of a layer's residual stream, by far: a tenth of it is usual


def train(settings: Settings) -> int:
    """Run, or go on with, the training that `settings` describe; return the exit code."""
    # Load the data.
    prepared = prepared_tokens(settings)
    tokenizer = load_tokenizer(prepared)
    boundary = boundary_of(tokenizer) if settings.data.respect_documents else None
    settings = replace(settings, model=replace(settings.model, vocab_size=tokenizer.vocab_size))
    block_size, batch_size = settings.model.block_size, settings.training.batch_size
    weights = settings.data.weights()
    loader = Loader(open_parts(prepared, "train"), block_size, batch_size, settings.training.micro_steps(block_size),
                    settings.seed, weights=weights)
    validation = Validation(open_parts(prepared, "val"), block_size, batch_size, settings.training.eval_tokens, weights)
    bytes_per_token = val_bytes_per_token(prepared, weights)
    Device(settings.training.device, settings.training.precision)  # what this machine lacks is said before a run is touched

    with open_run(settings, prepared) as (run, settings, last):
        limits = settings.training
        if last and (limit := limit_reached(limits, last)):
            say(f"{run.folder} is finished: {counted(last.step, 'step')}, {last.state['seconds']:.0f} s. "
                  + how_to_go_on(limit, settings, last))
            # A kill after the last save may have left these undone.
            store.prune(run.checkpoints, limits.keep_last)
            if settings.logger.report and not is_current(run.folder):
                say(after_training(run.folder))
            return finish(run, limits)

        # What is learned, on what, and how.
        device = open_device(run, settings, last)
        torch.manual_seed(settings.seed)
        model = GPT(settings.model).to(device.torch)
        model.recompute = limits.recompute
        optimizers = Optimizers(model.parameters_by_role(), settings.optim)
        scaler = torch.amp.GradScaler(device.type, enabled=device.precision == "fp16")

        # Where it stands: at the beginning, or at the last checkpoint of this run.
        state = State(model, optimizers, scaler)
        if last:
            state.restore(last)
        check_memory(model, loader, device, boundary)
        store.check_free_space(run.checkpoints, state.nbytes())
        atomic.write_bytes(run.folder / "config.yaml", yaml.safe_dump(asdict(settings), sort_keys=False).encode())

        with (Interrupt() as interrupt, Clock() as clock,
              Recorder(run.folder, state.step, limits.max_steps, settings.logger, asdict(settings)) as recorder,
              Saver(run.checkpoints, limits.keep_last, state.step, partial(settle, run, recorder), recorder.say,
                    stop_on_error=limits.on_save_error == "stop") as saver):
            introduce(recorder, run, device, model, loader, describe(prepared), state.step)
            for warning in settings.warnings():
                recorder.say(f"Warning: {warning}")
            if last and (planned := last.state["max_steps"]) != limits.max_steps:
                state.replanned |= not same_rates(state.step, settings.optim, planned, limits.max_steps)
                recorder.say(extension(state.step, settings.optim, planned, limits.max_steps, state.replanned))
            if last and (change := other_micro_batches(settings, last)):
                recorder.say(change)
            forward = maybe_compile(model, limits.compile, device, run_flops(model, loader, limits),
                                    lambda compiled: trial(compiled, loader, device, boundary), recorder.say)
            facts = {"settings": settings_to_save(settings, prepared, device.precision), "max_steps": limits.max_steps,
                     "model": asdict(model.config), "environment": asdict(device.environment(forward is not model))}
            record_start(run.folder, state.step, facts["environment"])
            pace = measure_pace(first_loss(forward, loader, device, boundary), model.parameters_by_role(), settings.optim,
                                device, limits, loader.micro_steps, sum(validation.n_windows), forward is not model)
            steps_left, _ = pace.work_left(limits, state.step, state.seconds)
            recorder.expect(pace.seconds_left(limits, state.step, state.seconds),
                            limited=steps_left < limits.max_steps - state.step)
            recorder.say(f"Time: {pace.describe(limits, state.step, state.seconds)}")

            def save(val_loss: float | None) -> None:
                saver.save(state.snapshot(val_loss, limits.saves(state.step), tokenizer.to_json(), facts))

            batches = Prefetch(loader, device.torch)
            val_loss, limit = None, ""
            if limits.on_nonfinite == "rollback" and not last:
                save(val_loss)  # there is always something to go back to
            while not limits.reached(state.step, state.seconds, state.stale_evaluations) and not interrupt:
                start = clock.seconds()
                scale = lr_scale(state.step, settings.optim, limits.max_steps)
                optimizers.set_scale(scale)
                loss = accumulate_gradients(forward, batches, boundary, state.batch, scaler, device, settings.seed,
                                            interrupt)
                if loss is None:
                    break  # interrupted within the step, which is not taken
                norm = optimizers.gradient_norm(scaler)
                run.check_not_moved()
                if math.isfinite(loss) and (norm.isfinite() or scaler.is_enabled()):  # a scaler answers for its gradients
                    optimizers.step(scaler, norm, settings.optim.grad_clip)
                    measured = {"loss": loss, "gradient_norm": norm.item()}
                else:
                    if answer_nonfinite(loss, state, run, limits, loader, recorder, saver) == "rollback":
                        continue
                    measured = {"skipped": True}
                step_seconds = clock.seconds() - start
                state.step, state.seconds = state.step + 1, state.seconds + step_seconds

                tokens_per_second = loader.tokens_per_step / step_seconds
                recorder.record(state.step, **measured, lr_scale=scale, tokens=state.step * loader.tokens_per_step,
                                step_ms=1000 * step_seconds, seconds=state.seconds)
                recorder.progress(state.step, loss=f"{loss:.3f}", speed=f"{tokens_per_second:,.0f} tokens/s",
                                  **mfu(model, tokens_per_second, device))

                val_loss, improved = None, False
                scheduled = limits.evaluates(state.step)
                if scheduled or limits.reached(state.step, state.seconds):
                    val_loss = evaluate(model, validation, device, boundary)
                    report(recorder, state.step, val_loss, bytes_per_token)
                if scheduled:  # another one at the end does not count: a longer run would not have it
                    state.note_evaluation(val_loss)
                    improved = limits.patience > 0 and state.stale_evaluations == 0
                limit = limits.reached(state.step, state.seconds, state.stale_evaluations)
                if limit == "patience":
                    recorder.record(state.step, stopped_early=True)
                if limit or improved or limits.saves(state.step):
                    save(val_loss)
                if val_loss is not None and limits.sample_tokens:
                    saver.finish()  # whatever happens while sampling, the checkpoint is on the disk
                    recorder.sample(state.step, short_sample(model, tokenizer, limits.sample_tokens, device))
                saver.check()
            run.check_not_moved()
            saver.finish()
            if saver.saved < state.step:  # interrupted, or the disk was full
                save(val_loss)
                saver.finish()
            if saver.saved < state.step:
                raise OSError(f"Only {saver.saved} of {counted(state.step, 'step')} are saved in {run.folder}: "
                              f"free some disk, and the same command goes on from there.")
            if interrupt:
                recorder.say(f"Interrupted: {state.step} of {counted(limits.max_steps, 'step')} are saved in {run.folder}; "
                             f"the same command goes on from there.")
                return interrupt.exit_code
            if limit == "patience":
                recorder.say(early_stop(state))
            if settings.logger.report:
                recorder.say(after_training(run.folder))
        say(f"Trained {counted(state.step, 'step')} in {state.seconds:.0f} s, "
            f"and waited {saver.waiting_seconds:.1f} s for saving.")
        return finish(run, limits)


def how_to_go_on(limit: str, settings: Settings, last: Checkpoint) -> str:
    """What to type when a run is finished, and what that will mean."""
    if limit == "max_seconds":
        return "To go on, raise training.max_seconds."
    if limit == "patience":
        more = last.state["stale_evaluations"] + settings.training.patience
        return f"It stopped early. To go on, raise training.patience, as in training.patience={more}."
    more = 2 * last.step
    return (f"To go on, raise training.max_steps, as in training.max_steps={more}. "
            + extension(last.step, settings.optim, last.state["max_steps"], more, last.state["replanned"]))


def early_stop(state: State) -> str:
    """Why the run ended before `max_steps`, and which checkpoint is left."""
    evaluations = counted(state.stale_evaluations, "evaluation")
    if state.best_val_loss is None:
        return f"Stopped early: the validation loss of the last {evaluations} was not finite."
    return (f"Stopped early: the validation loss was lowest, {state.best_val_loss:.4f}, {evaluations} ago. The checkpoint "
            f"from then is kept (checkpoint=best), and the last one.")


def other_micro_batches(settings: Settings, last: Checkpoint) -> str:
    """What it means that a run resumes with another micro-batch; empty if it does not."""
    now, before = settings.training.batch_size, flat(last.state["settings"]).get("training.batch_size")
    if before in (None, now):
        return ""
    dropout = " and dropout draws other numbers" if settings.model.dropout > 0 else ""
    return (f"Micro-batches of {now} sequences instead of {before}: each step trains on the same sequences as before, but "
            f"sums are rounded in another order{dropout}, so the result is not bit-identical.")


def settle(run: Run, recorder: Recorder) -> None:
    """What comes before a checkpoint: the folder is still the run's, and the metrics are on the disk."""
    run.check_not_moved()
    recorder.sync()


def introduce(recorder: Recorder, run: Run, device: Device, model: GPT, loader: Loader, data: str, step: int) -> None:
    """Say what is about to be trained, on what, and from where."""
    parts = {role: sum(weights.numel() for weights in parameters.values())
             for role, parameters in model.parameters_by_role().items()}
    recorder.say(f"Run: {run.folder}" + (f", from step {step}" if step else ""))
    recorder.say(f"Data: {data}")
    recorder.say(f"Model: {sum(parts.values()):,} parameters ("
                 + ", ".join(f"{role} {count:,}" for role, count in parts.items() if count)
                 + f"), {model.flops_per_token() / 1e6:,.1f} MFLOPs a token")
    epochs = " and ".join(f"{steps:,.1f}" for steps in loader.steps_an_epoch())
    recorder.say(f"Step: {loader.tokens_per_step:,} tokens ({loader.micro_steps} x {loader.batch_size} sequences of "
                 f"{loader.block_size}), {epochs} steps an epoch")
    recorder.say(f"Device: {device.describe()}")
    for warning in device.warnings():
        recorder.say(f"Warning: {warning}")


def accumulate_gradients(forward: nn.Module, batches: Prefetch, boundary: int | None, step: int,
                         scaler: torch.amp.GradScaler, device: Device, seed: int, interrupt: Interrupt) -> float | None:
    """Forward and backward of a step's micro-steps; the mean loss, in nats a token, or None if interrupted between two."""
    loss = 0.0
    for micro_step in range(batches.micro_steps):
        if interrupt:
            return None
        batch = batches.batch(step, micro_step)
        seed_dropout(seed, step, micro_step)
        micro_loss = loss_of(forward, batch, device, boundary) / batches.micro_steps
        scaler.scale(micro_loss).backward()
        loss += micro_loss.item()
    return loss


def answer_nonfinite(loss: float, state: State, run: Run, limits: TrainingConfig, loader: Loader, recorder: Recorder,
                     saver: Saver) -> str:
    """Write down a loss or gradient that is NaN or infinite, and do what `on_nonfinite` says, which is returned.

    "skip" leaves the weights as they are; "rollback" goes back to the last scheduled checkpoint, to step over all
    batches since. Raises ValueError to stop: when asked to, and when it has happened too often.
    """
    state.nonfinite += 1
    answer = limits.on_nonfinite if state.nonfinite <= limits.nonfinite_limit else "stop"
    batch = {"index": state.batch, "sequences_start_at": loader.sequences(state.batch)}
    said = f"Step {state.step + 1} came to a loss of {loss:.4g} and a gradient that cannot be used"
    try:
        path = nonfinite.report(run.folder, state.nonfinite, state.step, batch, loss, state.model, recorder.recent, answer)
        said += f": see {path}."
    except OSError as error:
        said += f"; no report of it could be written ({error.strerror})."
    state.optimizers.zero_grad(state.scaler)
    if answer == "stop":
        saver.finish()
        if state.nonfinite > 1:
            said += f" That was time {state.nonfinite}, and training.nonfinite_limit={limits.nonfinite_limit}."
        raise ValueError(f"{said} Saved so far: {counted(saver.saved, 'step')}. Try a lower optim.lr, optim.grad_clip=1, "
                         f"training.precision=fp32, or training.on_nonfinite=skip or rollback.")
    if answer == "rollback":
        saver.finish()
        back = store.load_checkpoint(run.checkpoints, "scheduled", store.verified, recorder.say, rename_damaged=True)
        if back is None:
            raise ValueError(f"{said} There is no checkpoint to go back to.")
        state.roll_back(back)
        store.delete_after(run.checkpoints, state.step)
        recorder.cut_back(state.step)
        saver.saved = state.step
        recorder.say(f"{said} Back to step {state.step}, past the batches since then.")
    else:
        recorder.say(f"{said} Its batch is skipped.")
    return answer


def check_memory(model: GPT, loader: Loader, device: Device, boundary: int | None) -> None:
    """Raise ValueError where a micro-step keeps more than there is memory: the system would kill us without a word."""
    config, free = model.config, available_memory()
    numbers = loader.batch_size * config.block_size * config.n_embd * config.n_layer  # of the residual stream
    if device.type != "cpu" or numbers * KEPT_AT_MOST < free:
        return
    inputs, _ = loader.batch(0)

    def kept(rows: int) -> int:  # without the loss, which takes its share of a batch in chunks
        with device.autocast():
            return bytes_kept(lambda: model.features(inputs[:rows], documents=documents_of(inputs[:rows], boundary)))

    if loader.batch_size * kept(1) > free and (needed := loader.batch_size * (kept(2) - kept(1))) > free:
        raise ValueError(f"training.batch_size={loader.batch_size} sequences at once take {readable_size(needed)} of "
                         f"memory, {readable_size(free)} are free: choose a smaller one "
                         f"(training.tokens_per_step makes it up)"
                         + (", or training.recompute=true." if not model.recompute else "."))


def run_flops(model: GPT, loader: Loader, limits: TrainingConfig) -> float:
    """The floating-point operations of the whole run, from its first step to its last."""
    return model.flops_per_token() * loader.tokens_per_step * limits.max_steps


def first_loss(model: nn.Module, loader: Loader, device: Device, boundary: int | None) -> Callable[[int], Tensor]:
    """The loss of the first so many sequences of the first batch."""
    inputs, targets = loader.batch(0)
    return lambda sequences: loss_of(model, (inputs[:sequences], targets[:sequences]), device, boundary)


def trial(model: nn.Module, loader: Loader, device: Device, boundary: int | None) -> None:
    """A micro-step that changes nothing, to see that the model works."""
    first_loss(model, loader, device, boundary)(loader.batch_size).backward()
    model.zero_grad(set_to_none=True)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor], device: Device, boundary: int | None) -> Tensor:
    """The mean loss of inputs and targets, in nats a token; with a `boundary`, no document sees another of its row."""
    inputs, targets = (ids.to(device.torch) for ids in batch)
    with device.autocast():
        return model(inputs, targets, documents=documents_of(inputs, boundary))


def documents_of(inputs: Tensor, boundary: int | None) -> Tensor | None:
    """The number of the document that each of the inputs is in, `[B, T]`, if documents are to be told apart."""
    return None if boundary is None else (inputs == boundary).cumsum(dim=1)


def boundary_of(tokenizer: Tokenizer) -> int:
    """The id that a document begins with: the one that ended the text before it, as in sampling."""
    if tokenizer.end_of_text is None:
        raise ValueError("data.respect_documents=true has no documents to respect: the text is a single one, and its "
                         "tokenizer has no token that ends it. Leave it out, or name several texts.")
    return tokenizer.end_of_text


def seed_dropout(seed: int, step: int, micro_step: int) -> None:
    """Make what the next forward pass draws a function of where it is, not of what was drawn before."""
    digest = hashlib.sha256(f"{seed} {step} {micro_step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8]))


@torch.inference_mode()
def evaluate(model: GPT, validation: Validation, device: Device, boundary: int | None = None) -> float:
    """The mean loss over the validation windows, in nats a token."""
    model.eval()
    total = 0.0
    for *batch, weight in validation:
        total += loss_of(model, batch, device, boundary).item() * weight
    model.train()
    return total


def report(recorder: Recorder, step: int, val_loss: float, bytes_per_token: float) -> None:
    """Record a validation loss, and what it means where tokenizers differ: bits for each byte of text."""
    perplexity = math.exp(min(val_loss, 700))  # past that a float cannot hold it
    bits_per_byte = val_loss / math.log(2) / bytes_per_token
    recorder.record(step, val_loss=val_loss, perplexity=perplexity, bits_per_byte=bits_per_byte)
    recorder.say(f"Step {step}: validation loss {val_loss:.4f}, perplexity {perplexity:.2f}, "
                 f"{bits_per_byte:.4f} bits per byte")


def short_sample(model: GPT, tokenizer: Tokenizer, length: int, device: Device) -> str:
    """What the model writes at this point, or why it cannot."""
    try:
        engine, rules = Engine(model, tokenizer, device), SamplingConfig(max_new_tokens=length)
        return engine.complete([("", 0)], rules)[0].text
    except ValueError as error:  # as for a model that has diverged, which is for the next loss to judge
        return str(error)


def mfu(model: GPT, tokens_per_second: float, device: Device) -> dict[str, str]:
    """Model FLOPs utilisation (arXiv:2204.02311), where the device's peak is known."""
    peak = device.peak_flops()
    return {"mfu": f"{model.flops_per_token() * tokens_per_second / peak:.1%}"} if peak else {}


def finish(run: Run, limits: TrainingConfig) -> int:
    """Print what the best checkpoint writes, and how to see more."""
    if limits.sample_tokens:
        device = Device(limits.device, limits.precision)
        engine = open_checkpoint(run.folder, "best", device)
        completions = engine.complete([("", number) for number in range(3)], SamplingConfig())
        for number, completion in enumerate(completions, 1):
            output(f"--- {number} of 3\n{completion.text}")
    say(f'More: python sample.py {shlex.quote(f"run={run.folder}")} prompt="..."')
    return 0
