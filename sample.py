"""Complete a prompt with a trained model.

  python sample.py run=pydocs prompt="Return the number of"

Settings, each with its default:
  run=NAME              the run's name or folder; without it, the run that was trained last
  prompt="To be, or"    any text, taken as it is; without it a new text is begun
  prompt_file=FILE      the prompt from a file, or from standard input with prompt_file=-
  interactive=true      ask for prompts until the input ends
  max_new_tokens=200    how many tokens at most
  temperature=0.8       0 always takes the most likely token
  top_k=50  top_p=0.9   draw from the k most likely tokens; from the fewest that hold a probability of p
  num_samples=1         several completions, each printed whole
  seed=1337             the same seed gives the same text
  stop="\\n\\n"           end where this text would come (a literal text: in bash, $'\\n\\n')
  checkpoint=best       or last
  device=auto  precision=auto  cache=true
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from conf.identity import flat, printable
from conf.launch import launch
from conf.schema import SampleSettings, rebuild
from data.tokenizer import Tokenizer, fingerprint, from_json
from model import GPT, GPTConfig, generate
from training import checkpoint
from training.checkpoint import Checkpoint
from training.device import Device
from training.run import find_run


def sample(settings: SampleSettings) -> int:
    """Open a run and print completions as `settings` ask; return the exit code."""
    device = Device(settings.device, settings.precision)
    run = find_run(Path(settings.runs_dir), settings.run)
    model, tokenizer = open_checkpoint(run, settings.checkpoint, device)
    if settings.interactive:
        for line in prompts():
            try:
                print_completions(model, tokenizer, line, settings, device)
            except ValueError as error:  # a character that the tokenizer lacks need not end the talk
                print(f"Error: {error}")
    else:
        print_completions(model, tokenizer, read_prompt(settings), settings, device)
    return 0


def open_checkpoint(run: Path, which: str, device: Device) -> tuple[GPT, Tokenizer]:
    """The model, on the device and ready to generate, and the tokenizer it was trained with.

    Raises ValueError if the run's "best" or "last" checkpoint holds anything that nanohydra does not write.
    """
    def load(found: Checkpoint) -> tuple[GPT, Tokenizer]:
        config = rebuild(GPTConfig, found.state["model"], f"{found.folder / checkpoint.STATE}, model")
        tokenizer = from_json(found.tokenizer(), f"{found.folder / checkpoint.TOKENIZER}")
        if tokenizer.vocab_size != config.vocab_size:
            raise ValueError(f"{found.folder} cannot be: its tokenizer has {tokenizer.vocab_size} tokens, "
                             f"its model {config.vocab_size}.")
        given, trained = fingerprint(tokenizer)[:12], flat(found.state["settings"]).get("data.tokenizer_fingerprint")
        if trained not in (None, given):
            raise ValueError(f"{found.folder / checkpoint.TOKENIZER} (fingerprint {given}) is not the tokenizer that the "
                             f"model was trained with (fingerprint {printable(str(trained))}): put that one back.")
        with torch.device("meta"):
            shapes = GPT(config).state_dict()
        weights = found.tensors(checkpoint.MODEL, like=shapes)  # the model takes memory only once its weights are there
        model = GPT(config)
        model.load_state_dict(weights)
        return model.to(device.torch).eval(), tokenizer

    def warn(text: str) -> None:
        print(text, file=sys.stderr)

    loaded = checkpoint.choose(run / "checkpoints", which, load, warn)
    if loaded is None:
        raise ValueError(f"{run} has no checkpoint.")
    return loaded


def read_prompt(settings: SampleSettings) -> str:
    """The prompt as given, from its file, or from standard input."""
    if not settings.prompt_file:
        return settings.prompt
    if settings.prompt_file == "-":
        return sys.stdin.read()
    try:
        return Path(settings.prompt_file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_file={settings.prompt_file} is not UTF-8 at offset {error.start}.") from None


def prompts() -> Iterator[str]:
    """Lines that someone types, until end of input."""
    while True:
        try:
            yield input("\nprompt> ")
        except EOFError:
            print()
            return


def print_completions(model: GPT, tokenizer: Tokenizer, prompt: str, settings: SampleSettings, device: Device) -> None:
    """One completion is printed as it grows; of several, each is printed whole."""
    if settings.num_samples == 1:
        def show(text: str) -> None:
            print(text, end="", flush=True)

        complete(model, tokenizer, prompt, settings, device, show)
        print()
        return
    for number, text in enumerate(complete(model, tokenizer, prompt, settings, device), 1):
        print(f"--- {number} of {settings.num_samples}\n{prompt}{text}")


class Completion:
    """The text of one row of a batch while its tokens come. Ends at the end of text, or before `stop`."""

    def __init__(self, tokenizer: Tokenizer, stop: str) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text, self.finished = "", False

    def add(self, token: int) -> None:
        if self.finished:
            return
        if token == self.tokenizer.end_of_text:
            self.finish()
            return
        self.text += self.decoder.decode(self.tokenizer.decode_bytes((token,)))
        if self.stop and self.stop in self.text:
            self.text, self.finished = self.text[: self.text.index(self.stop)], True

    def finish(self) -> None:
        """No more tokens will come: what the decoder still holds is no whole character."""
        if not self.finished:
            self.text, self.finished = self.text + self.decoder.decode(b"", final=True), True

    def certain(self) -> str:
        """The text without an end that could be the beginning of `stop`."""
        if not self.finished:
            for held in range(min(len(self.stop) - 1, len(self.text)), 0, -1):
                if self.text.endswith(self.stop[:held]):
                    return self.text[:-held]
        return self.text


def complete(model: GPT, tokenizer: Tokenizer, prompt: str, settings: SampleSettings, device: Device,
             show: Callable[[str], None] | None = None) -> list[str]:
    """`num_samples` completions of `prompt`, generated as one batch.

    `show` gets the prompt and then the first completion, piece by piece. Raises ValueError, showing nothing, for
    a prompt that the tokenizer cannot encode.
    """
    ids = tokenizer.encode(prompt) or first_ids(tokenizer)
    batch = torch.tensor([ids] * settings.num_samples, device=device.torch)
    if show is not None:
        show(prompt)
    rows = [Completion(tokenizer, settings.stop) for _ in range(settings.num_samples)]
    shown = 0
    with device.autocast():
        for tokens in generate(model, batch, settings.max_new_tokens, temperature=settings.temperature,
                               top_k=settings.top_k, top_p=settings.top_p, seed=settings.seed,
                               use_cache=settings.cache):
            for row, token in zip(rows, tokens.tolist(), strict=True):
                row.add(token)
            if show is not None:
                show(rows[0].certain()[shown:])
                shown = len(rows[0].certain())
            if all(row.finished for row in rows):
                break
    for row in rows:
        row.finish()
    if show is not None:
        show(rows[0].text[shown:])
    return [row.text for row in rows]


def first_ids(tokenizer: Tokenizer) -> list[int]:
    """What stands before a new text: the end of another, or where the tokenizer has no such token, a new line."""
    if tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    try:
        return tokenizer.encode("\n")
    except ValueError:
        return [0]


if __name__ == "__main__":
    launch(sample, "sample", __doc__)
