"""Complete a prompt with a trained model, or talk to it.

  python sample.py run=pydocs prompt="Return the number of"
  python sample.py run=NAME interactive=true
  python sample.py run=NAME chat=true     of a run that was trained with data=chat
"""

from conf.launch import launch

if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for torch.
    launch("sample:sample", "sample", __doc__)

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial

from conf.sampling import SamplingConfig
from conf.settings import SampleSettings
from data.chat import has_markers
from data.tokenizer import Tokenizer
from generation.chat import Conversation
from generation.decoder import Decoder
from generation.engine import Completion, Engine, open_chosen, open_decoder
from generation.prompts import TypedPrompts, read_text
from scripts.complete import complete_file
from terminal import has_colors, output, say
from training.configure import configure
from training.device import Device

RED, YELLOW, GREEN = 31, 33, 32  # ANSI colors


def sample(settings: SampleSettings) -> int:
    """Open a run, print completions or write them to a file, and return the exit code."""
    # Open the model, and pack its weights for decoding.
    device = Device(settings.device, settings.precision)
    configure(device)
    engine = open_chosen(settings, settings.checkpoint, device)
    setting = "batch_size" if settings.prompts else "num_samples"
    decoder = open_decoder(engine, settings, setting, settings.max_new_tokens)

    # Complete a file of prompts, talk to the user, or complete one prompt.
    if settings.prompts:
        complete_file(engine, settings, decoder)
    elif settings.chat:
        chat(engine, settings, decoder)
    elif settings.interactive:
        for_each_prompt("prompt> ", settings, partial(print_completions, engine, decoder))
    else:
        prompt = settings.prompt
        if settings.prompt_file:
            prompt = read_text("prompt_file", settings.prompt_file)
        if not prompt and has_markers(engine.tokenizer):
            # It has only learned what follows a question.
            say("This model was trained on conversations: chat=true talks to it.", sys.stderr)
        print_completions(engine, decoder, prompt, settings)
    return 0


def chat(engine: Engine, settings: SampleSettings, decoder: Decoder | None) -> None:
    """Answer each question that the user types."""
    conversation = Conversation(engine, settings, decoder, settings.system)

    def answer(question: str, rules: SamplingConfig) -> None:
        if not question.strip():
            return
        conversation.rules = rules
        for piece in conversation.answer(question):
            output(piece, end="")
        output("")
        if conversation.was_cut:
            say("The answer was cut: raise max_new_tokens, up to half of the context.", sys.stderr)

    for_each_prompt("you> ", settings, answer)


def for_each_prompt(mark: str, settings: SampleSettings,
                    respond: Callable[[str, SamplingConfig], None]) -> None:
    """Respond to each prompt that the user types after `mark`, until the end of the input.

    An error, or Ctrl-C in a terminal, ends a text instead of the program.
    """
    prompts = TypedPrompts(mark, settings)
    for prompt in prompts:
        try:
            respond(prompt, prompts.rules)
        except ValueError as error:
            # Such as a character that the tokenizer lacks: the user types another prompt.
            say(f"Error: {error}")
        except KeyboardInterrupt:
            if not prompts.in_terminal:
                raise
            output("")


def print_completions(engine: Engine, decoder: Decoder | None, prompt: str,
                      settings: SampleSettings) -> None:
    """Print one completion while it grows, or each of several when all are complete."""
    if settings.num_samples == 1 and not settings.logprobs:
        # Raises ValueError before anything is printed.
        engine.encode(prompt)
        output(prompt, end="")
        for piece in engine.stream(prompt, settings, decoder):
            output(piece, end="")
        output("")
        return


    # Several completions are decoded together, and printed one after the other.
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
