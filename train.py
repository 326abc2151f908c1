"""Train a small GPT on text, or go on with a run where its last checkpoint stands.

  python train.py                                        readable English after minutes on two CPU cores
  python train.py data=text data.path=book.txt           your own text
  python train.py model=modern-small model.n_layer=6     another shape
  python train.py -m optim.lr=1e-3,3e-3                  a sweep

Common settings (--cfg job prints all, with their values):
  name=first            the run's folder is runs/first; without it, a name is made from what you changed
  experiment=pydocs     presets that belong together: see below
  data.tokenizer=bpe    char, byte, gpt2, or bpe with data.vocab_size=2048
  model.n_layer=4       also model.n_head, model.n_embd, model.block_size, model.dropout
  optim.lr=1e-2         also optim.weight_decay, optim.grad_clip, optim.schedule, optim.warmup_steps
  training.max_steps=1e3        or training.max_seconds=120
  training.batch_size=32        sequences in a micro-step; training.tokens_per_step accumulates more
  training.eval_every=130       also training.checkpoint_every, training.keep_last
  training.device=auto          also training.precision=auto, training.compile=auto
  logger.wandb=offline          or online
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import atomic
from conf.launch import launch
from conf.schema import SampleSettings, Settings, differences
from data.loader import Loader, Validation
from data.prepare import describe, load_tokenizer, prepare
from data.shards import Tokens, read_meta
from model import GPT
from sample import complete, open_checkpoint, print_completions
from training import checkpoint
from training.device import Device, maybe_compile, seconds_per_call
from training.interrupt import Interrupt
from training.optim import Optimizers, lr_scale
from training.recorder import Recorder


def train(settings: Settings) -> int:
    """Run, or go on with, the training that `settings` describe; return the exit code."""
    limits = settings.training
    max_seconds = limits.max_seconds or math.inf
    device = Device(limits.device, limits.precision)

    # What is learned from.
    prepared = prepare(settings.data)
    tokenizer = load_tokenizer(prepared)
    settings = replace(settings, model=replace(settings.model, vocab_size=tokenizer.vocab_size))
    block_size = settings.model.block_size
    loader = Loader(Tokens.open(prepared, "train"), block_size, limits.batch_size,
                    limits.micro_steps(block_size), settings.seed)
    validation = Validation(Tokens.open(prepared, "val"), block_size, limits.batch_size, limits.eval_tokens)
    bytes_per_token = read_meta(prepared)["splits"]["val"]["bytes_per_token"]

    # What is learned, and how.
    torch.manual_seed(settings.seed)
    model = GPT(settings.model).to(device.torch)
    optimizers = Optimizers(model.parameters_by_role(), settings.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=device.precision == "fp16")

    # Where it stands: at the beginning, or at the last checkpoint of this run.
    run = Path(settings.runs_dir) / settings.name
    identity = asdict(settings)
    identity["data"]["prepared"] = prepared.name
    step, seconds = resume(run, identity, model, optimizers, scaler)
    if step >= limits.max_steps or seconds >= max_seconds:
        limit = "max_steps" if step >= limits.max_steps else "max_seconds"
        print(f"{run} is finished: {step} steps, {seconds:.0f} s. To go on, raise training.{limit}.")
        return finish(run, device)
    checkpoint.check_disk(run, model, optimizers)
    atomic.write_bytes(run / "config.yaml", yaml.safe_dump(asdict(settings), sort_keys=False).encode())

    def save(val_loss: float | None) -> int:
        """Write a checkpoint of this moment; return its step."""
        state = {"settings": identity, "model": asdict(model.config), "step": step, "seconds": seconds,
                 "val_loss": val_loss, "scaler": scaler.state_dict()}
        checkpoint.save(run / "checkpoints", model.state_dict(), optimizers.tensors(), tokenizer.to_json(), state)
        checkpoint.prune(run / "checkpoints", limits.keep_last)
        return step

    with Interrupt() as interrupt, Recorder(run, step, limits.max_steps, settings.logger, asdict(settings)) as recorder:
        introduce(recorder, run, device, model, loader, describe(prepared), step)
        step_seconds = loader.micro_steps * seconds_per_call(lambda: trial(model, loader, device), device)
        expected = min(step_seconds * (limits.max_steps - step), max_seconds - seconds)
        recorder.say(f"Time: about {expected / 60:.1f} minutes on this machine, by its first batch, and evaluation.")
        forward = maybe_compile(model, limits.compile, device, expected,
                                lambda compiled: trial(compiled, loader, device), recorder.say)
        saved = step
        while step < limits.max_steps and seconds < max_seconds and not interrupt:
            start = time.perf_counter()
            scale = lr_scale(step, settings.optim, limits.max_steps)
            optimizers.set_scale(scale)
            loss = accumulate_gradients(forward, loader, step, scaler, device, settings.seed)
            if not math.isfinite(loss):
                raise ValueError(f"The loss is {loss} at step {step} ({loader.describe(step)}); {saved} steps are "
                                 f"saved. Try a lower optim.lr, optim.grad_clip=1 or training.precision=fp32.")
            gradient_norm = optimizers.step(scaler, settings.optim.grad_clip)
            step_seconds = time.perf_counter() - start
            step, seconds = step + 1, seconds + step_seconds

            tokens_per_second = loader.tokens_per_step / step_seconds
            recorder.record(step, loss=loss, gradient_norm=gradient_norm, lr_scale=scale,
                            tokens=step * loader.tokens_per_step, step_ms=1000 * step_seconds, seconds=seconds)
            recorder.progress(step, loss=f"{loss:.3f}", speed=f"{tokens_per_second:,.0f} tokens/s",
                              **mfu(model, tokens_per_second, device))

            last = step >= limits.max_steps or seconds >= max_seconds
            val_loss = None
            if last or step % limits.eval_every == 0:
                val_loss = evaluate(model, validation, device)
                report(recorder, step, val_loss, bytes_per_token)
                if limits.sample_tokens:
                    short = SampleSettings(max_new_tokens=limits.sample_tokens)
                    recorder.say(f"  {complete(model, tokenizer, '', short, device)[0]!r}")
            if last or step % limits.checkpoint_every == 0:
                saved = save(val_loss)
        if interrupt:
            if saved < step:
                saved = save(None)
            recorder.say(f"Interrupted: {saved} of {limits.max_steps} steps are saved in {run}; "
                         f"the same command goes on from there.")
            return interrupt.exit_code
    print(f"Trained {step} steps in {seconds:.0f} s.")
    return finish(run, device)


def resume(run: Path, identity: dict[str, Any], model: GPT, optimizers: Optimizers,
           scaler: torch.amp.GradScaler) -> tuple[int, float]:
    """Load the run's last checkpoint, if it has one; return the steps and seconds trained so far.

    Raises ValueError listing the differences if the run in this folder is another one.
    """
    found = checkpoint.find(run / "checkpoints")
    if not found:
        return 0, 0.0
    last = found[-1]
    if differing := differences(last.state["settings"], identity):
        raise ValueError(f"{run} holds a run with other settings: "
                         + ", ".join(f"{key} was {old} and is now {new}" for key, (old, new) in differing.items())
                         + ". Choose another name=, or go on with the old settings.")
    model.load_state_dict(last.model_tensors())
    optimizers.load_tensors(last.optimizer_tensors())
    scaler.load_state_dict(last.state["scaler"])
    return last.step, last.state["seconds"]


def introduce(recorder: Recorder, run: Path, device: Device, model: GPT, loader: Loader, data: str, step: int) -> None:
    """Say what is about to be trained, on what, and from where."""
    parts = {role: sum(weights.numel() for weights in parameters)
             for role, parameters in model.parameters_by_role().items()}
    recorder.say(f"Run: {run}" + (f", from step {step}" if step else ""))
    recorder.say(f"Data: {data}")
    recorder.say(f"Model: {sum(parts.values()):,} parameters ("
                 + ", ".join(f"{role} {count:,}" for role, count in parts.items() if count)
                 + f"), {model.flops_per_token() / 1e6:,.1f} MFLOPs a token")
    recorder.say(f"Step: {loader.tokens_per_step:,} tokens ({loader.micro_steps} x {loader.batch_size} sequences of "
                 f"{loader.block_size}), {loader.n_windows * loader.block_size / loader.tokens_per_step:.1f} steps an epoch")
    recorder.say(f"Device: {device.describe()}")


def accumulate_gradients(forward: nn.Module, loader: Loader, step: int, scaler: torch.amp.GradScaler,
                         device: Device, seed: int) -> float:
    """Forward and backward of a step's micro-steps; return the mean loss, in nats a token."""
    loss = 0.0
    for micro_step in range(loader.micro_steps):
        inputs, targets = to(device, loader.batch(step, micro_step))
        seed_dropout(seed, step, micro_step)
        with device.autocast():
            micro_loss = forward(inputs, targets) / loader.micro_steps
        scaler.scale(micro_loss).backward()
        loss += micro_loss.item()
    return loss


def trial(model: nn.Module, loader: Loader, device: Device) -> None:
    """One micro-step that changes nothing: to time it, and to see that it works."""
    inputs, targets = to(device, loader.batch(0))
    with device.autocast():
        model(inputs, targets).backward()
    model.zero_grad(set_to_none=True)


def to(device: Device, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [ids.to(device.torch) for ids in batch]


def seed_dropout(seed: int, step: int, micro_step: int) -> None:
    """Make what the next forward pass draws a function of where it is, not of what was drawn before."""
    digest = hashlib.sha256(f"{seed} {step} {micro_step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8]))


@torch.inference_mode()
def evaluate(model: GPT, validation: Validation, device: Device) -> float:
    """The mean loss over the validation windows, in nats a token."""
    model.eval()
    total = 0.0
    for batch in validation:
        inputs, targets = to(device, batch)
        with device.autocast():
            total += model(inputs, targets).item() * len(inputs)
    model.train()
    return total / validation.n_windows


def report(recorder: Recorder, step: int, val_loss: float, bytes_per_token: float) -> None:
    """Record a validation loss, and what it means where tokenizers differ: bits for each byte of text."""
    perplexity = math.exp(min(val_loss, 700))  # past that a float cannot hold it
    bits_per_byte = val_loss / math.log(2) / bytes_per_token
    recorder.record(step, val_loss=val_loss, perplexity=perplexity, bits_per_byte=bits_per_byte)
    recorder.say(f"Step {step}: validation loss {val_loss:.4f}, perplexity {perplexity:.2f}, "
                 f"{bits_per_byte:.4f} bits per byte")


def mfu(model: GPT, tokens_per_second: float, device: Device) -> dict[str, str]:
    """Model FLOPs utilisation (arXiv:2204.02311), where the device's peak is known."""
    peak = device.peak_flops()
    return {"mfu": f"{model.flops_per_token() * tokens_per_second / peak:.1%}"} if peak else {}


def finish(run: Path, device: Device) -> int:
    """Print what the best checkpoint writes, and how to see more."""
    best = checkpoint.best(checkpoint.find(run / "checkpoints"))
    model, tokenizer = open_checkpoint(best, device)
    print_completions(model, tokenizer, "", SampleSettings(num_samples=3), device)
    print(f'More: python sample.py run={run} prompt="..."')
    return 0


if __name__ == "__main__":
    launch(train, "config", __doc__)
