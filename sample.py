"""Complete a prompt with a trained model, or talk to it.

  python sample.py run=pydocs prompt="Return the number of"
  python sample.py run=NAME chat=true     of a run that was trained with data=chat
"""

from __future__ import annotations

from conf.launch import launch

if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for torch.
    launch("sample:sample", "sample", __doc__)

import math
import sys
from collections.abc import Iterator
from pathlib import Path

from checkpointing.initial import find_weights
from checkpointing.run_folder import find_run
from conf.settings import SampleSettings
from data.chat import has_markers
from data.tokenizer import Tokenizer
from generation.chat import Conversation
from generation.decoder import Decoder
from generation.engine import Completion, Engine, engine_of, open_checkpoint, open_decoder
from generation.prompts import read_text
from scripts.complete import complete_file
from terminal import has_colors, output, say
from training.device import Device, configure

RED, YELLOW, GREEN = 31, 33, 32  # ANSI colors


def sample(settings: SampleSettings) -> int:
    """Open a run, print completions or write them to a file, and return the exit code."""
    device = Device(settings.device, settings.precision)
    configure(device)
    engine = open_engine(settings, device)
    decoder = make_decoder(engine, settings)
    if settings.prompts:
        complete_file(engine, settings, decoder)
    elif settings.chat:
        chat(engine, settings, decoder)
    elif settings.interactive:
        for line in typed_prompts("\nprompt> "):
            try:
                print_completions(engine, line, settings, decoder)
            except ValueError as error:
                # A character that the tokenizer lacks: the user types another prompt.
                say(f"Error: {error}")
    else:
        prompt = settings.prompt
        if settings.prompt_file:
            prompt = read_text("prompt_file", settings.prompt_file)
        if not prompt and has_markers(engine.tokenizer):
            # It has only learned what follows a question.
            say("This model was trained on conversations: chat=true talks to it.", sys.stderr)
        print_completions(engine, prompt, settings, decoder)
    return 0


def open_engine(settings: SampleSettings, device: Device) -> Engine:
    """The engine of the run, or of the weights, that the settings name."""
    if settings.init_from:
        weights = find_weights(settings.init_from, Path(settings.runs_dir))
        say(weights.describe(), sys.stderr)
        return engine_of(weights, device)
    run = find_run(Path(settings.runs_dir), settings.run)
    return open_checkpoint(run, settings.checkpoint, device)


def make_decoder(engine: Engine, settings: SampleSettings) -> Decoder | None:
    """A decoder for the whole session, or None without the cache."""
    setting = "batch_size" if settings.prompts else "num_samples"
    rows = getattr(settings, setting)
    decoder, advice = open_decoder(engine, settings, setting, rows, settings.max_new_tokens)
    for line in advice:
        say(line, sys.stderr)
    return decoder


def chat(engine: Engine, settings: SampleSettings, decoder: Decoder | None) -> None:
    """Answer each line that the user types, until the end of the input."""
    conversation = Conversation(engine, settings, decoder, settings.system)
    for line in typed_prompts("\nyou> " if sys.stdin.isatty() else ""):
        if not line.strip():
            continue
        try:
            for piece in conversation.answer(line):
                output(piece, end="")
        except ValueError as error:
            # A question that is too long, or has a character that the tokenizer lacks.
            say(f"Error: {error}")
            continue
        output("")
        if conversation.was_cut:
            say("The answer was cut: raise max_new_tokens, up to half of the context.", sys.stderr)


def typed_prompts(mark: str) -> Iterator[str]:
    """Lines that the user types, each after a `mark`, until end of input."""
    # A notebook's stream has no such method.
    if hasattr(sys.stdin, "reconfigure"):
        # Bytes that are not UTF-8 become characters that the tokenizer refuses with a message.
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input(mark)
        except EOFError:
            if mark:
                output("")
            return
        except KeyboardInterrupt:
            output("")
            raise
        yield line


def print_completions(engine: Engine, prompt: str, settings: SampleSettings,
                      decoder: Decoder | None) -> None:
    """Print one completion while it grows, or each of several when all are complete."""
    if settings.num_samples == 1 and not settings.logprobs:
        # Raises ValueError before anything is printed.
        engine.encode(prompt)
        output(prompt, end="")
        for piece in engine.stream(prompt, settings, decoder):
            output(piece, end="")
        output("")
        return
    jobs = [(prompt, number) for number in range(settings.num_samples)]
    completions = engine.complete(jobs, settings, decoder, settings.logprobs)
    for number, completion in enumerate(completions, 1):
        if settings.num_samples > 1:
            output(f"--- {number} of {settings.num_samples}")
        if settings.logprobs:
            output(prompt)
            for line in token_lines(completion, engine.tokenizer):
                print(line)
        else:
            output(f"{prompt}{completion.text}")


def token_lines(completion: Completion, tokenizer: Tokenizer) -> Iterator[str]:
    """For each token its probability and its text: on a terminal red, yellow or green."""
    for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
        probability = math.exp(logprob)
        if token == tokenizer.end_of_text:
            text = "end of text"
        else:
            text = repr(tokenizer.decode_bytes((token,)).decode(errors="backslashreplace"))
        line = f"{probability:7.2%}  {text}"
        if has_colors(sys.stdout):
            color = RED
            if probability >= 0.1:
                color = GREEN if probability >= 0.5 else YELLOW
            line = f"\x1b[{color}m{line}\x1b[0m"
        yield line
