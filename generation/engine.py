"""Open a trained model and complete text with it.

Prints only which weights are used, what makes decoding slow, and which checkpoints are damaged.
Changes no global state.
"""

import codecs
import math
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpointing import store
from checkpointing.find_runs import find_run
from checkpointing.find_weights import find_weights
from checkpointing.weights import Weights, own_weights
from conf.sampling import SamplingConfig
from conf.settings import ModelChoice
from data.chat import MARKERS
from data.tokenizer import Tokenizer
from generation.decoder import Decoder, native_autocast
from generation.sampling import generate
from hardware import available_memory, native
from model import GPT
from terminal import readable_size, say
from training.device import Device

# A text, or token ids.
Prompt = str | Sequence[int]
# A prompt, and the number of its sample: each number is another random stream.
Job = tuple[Prompt, int]


class Completion:
    """The text of one sequence while its tokens arrive: ends at an end token, or before a stop.

    `stops` are texts; empty ones are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, *stops: str) -> None:
        self.tokenizer, self.ends = tokenizer, end_tokens(tokenizer)
        self.stops = [stop for stop in stops if stop]
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text = ""
        self.finished = False
        # Every generated token, with the end and with those of a text that `stop` cut off.
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.reason = "length"

    def add(self, token: int, logprob: float = math.nan) -> None:
        if self.finished:
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        # A token that ends the text has none of its own.
        if token in self.ends:
            self.finish()
            self.reason = "end_of_text"
            return
        # A token can end within a character, whose first bytes then wait for the next token.
        self.text += self.utf8.decode(self.tokenizer.decode_bytes((token,)))
        # The text ends before the first stop in it.
        found = [self.text.index(stop) for stop in self.stops if stop in self.text]
        if found:
            self.text = self.text[: min(found)]
            self.finished, self.reason = True, "stop"

    def finish(self) -> None:
        """No more tokens will come: bytes of an incomplete character become U+FFFD."""
        if not self.finished:
            self.text += self.utf8.decode(b"", final=True)
            self.finished = True

    def printable(self) -> str:
        """The text without a trailing part that could still become a stop."""
        if self.finished:
            return self.text
        # The longest end of the text that is the beginning of a stop.
        longest = max(map(len, self.stops), default=0)
        for length in range(min(longest - 1, len(self.text)), 0, -1):
            end = self.text[-length:]
            if any(stop.startswith(end) for stop in self.stops):
                return self.text[:-length]
        return self.text


@dataclass(frozen=True)
class Engine:
    """A model, its tokenizer and its device, to generate text and to read logits."""

    model: GPT
    tokenizer: Tokenizer
    device: Device

    def encode(self, text: str) -> list[int]:
        """The token ids of a text. Raises ValueError if the tokenizer cannot encode it."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.tokenizer.decode_bytes(ids).decode(errors="replace")

    def logits(self, text: str) -> Tensor:
        """Logits `[T, V]` in fp32 for each of the T tokens of a text: row t predicts token t + 1.

        An empty text is the beginning of a document, one token. Raises ValueError if the text is
        longer than the model's context.
        """
        ids = torch.tensor([self.prompt_ids(text)], device=self.device.torch)  # [1, T]
        with torch.no_grad(), self.device.autocast(), native_autocast(self.model):
            return self.model(ids)[0].float()

    def generate(self, prompt: str = "", **rules: object) -> str:
        """The text that follows `prompt`. `rules` are the fields of `SamplingConfig`."""
        config = SamplingConfig(**rules)
        problems = list(config.problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self.complete([(prompt, 0)], config)[0].text

    def complete(self, jobs: Sequence[Job], rules: SamplingConfig, decoder: Decoder | None = None,
                 logprobs: bool = False) -> list[Completion]:
        """Complete all `jobs` in one batch; the arguments are those of `steps`."""
        *_, completions = self.steps(jobs, rules, decoder, logprobs)
        return completions

    def stream(self, prompt: Prompt, rules: SamplingConfig, decoder: Decoder | None = None,
               number: int = 0) -> Generator[str, None, Completion]:
        """The text of one completion, piece by piece; the generator returns the completion."""
        # The text grows, and a new piece is what has not been shown yet.
        shown = 0
        for (completion,) in self.steps([(prompt, number)], rules, decoder):
            text = completion.printable()
            yield text[shown:]
            shown = len(text)
        return completion

    def steps(self, jobs: Sequence[Job], rules: SamplingConfig, decoder: Decoder | None = None,
              logprobs: bool = False) -> Iterator[list[Completion]]:
        """Complete `jobs` together; yields their completions so far after each token.

        A job's prompt and number, and the seed, decide its text. `decoder` saves making one;
        `logprobs` records the log probability of each token. Raises ValueError for a prompt that
        the tokenizer cannot encode.
        """
        # Start to generate from all prompts at once.
        prompts = [self.prompt_ids(prompt) for prompt, _ in jobs]
        numbers = [number for _, number in jobs]
        completions = [Completion(self.tokenizer, rules.stop) for _ in jobs]
        # `generate` drops the prompts whose indices are added to it.
        done: set[int] = set()
        generated = generate(self.model, prompts, rules, numbers, decoder, done)

        # Add each new token to its completion, until all have ended.
        while True:
            # Autocast is off again while the caller has control.
            with self.device.autocast():
                step = next(generated, None)
            if step is None:
                break
            indices, tokens, logits = step
            found = own_logprobs(logits, tokens) if logprobs else [math.nan] * len(indices)
            for index, token, logprob in zip(indices, tokens.tolist(), found, strict=True):
                completions[index].add(token, logprob)
                if completions[index].finished:
                    done.add(index)
            yield completions
        for completion in completions:
            completion.finish()
        yield completions

    def prompt_text(self, prompt: Prompt) -> str:
        """A prompt as text, without an end of text before it."""
        if isinstance(prompt, str):
            return prompt
        return self.decode([token for token in prompt if token != self.tokenizer.end_of_text])

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt. An empty text becomes end of text, which precedes each document.

        Tokenizers without that token start with a newline.
        """
        if not isinstance(prompt, str):
            return list(prompt)
        if prompt:
            return self.encode(prompt)
        if self.tokenizer.end_of_text is not None:
            return [self.tokenizer.end_of_text]
        try:
            return self.encode("\n")
        except ValueError:
            return [0]


def open_run(run: str | Path = "", checkpoint: str = "best", runs_dir: str | Path = "runs",
             device: str = "auto", precision: str = "auto") -> Engine:
    """Open a run, given by its name or its folder; without one, the run that was trained last.

    The arguments mean the same as the settings of sample.py. Raises ValueError for a run, a
    checkpoint or a device that does not exist.
    """
    found = find_run(Path(runs_dir), str(run))
    return open_checkpoint(found, str(checkpoint), Device(device, precision))


def open_weights(init_from: str | Path, runs_dir: str | Path = "runs", device: str = "auto",
                 precision: str = "auto") -> Engine:
    """Open the weights that `init_from=` of train.py names: also published ones, without a run.

    Raises ValueError if they do not exist, are invalid, or have no tokenizer.
    """
    return engine_of(find_weights(str(init_from), Path(runs_dir)), Device(device, precision))


def open_chosen(settings: ModelChoice, checkpoint: str, device: Device) -> Engine:
    """The engine of the run, or of the weights in `init_from`, that a program's settings name.

    Says on standard error which weights these are.
    """
    if not settings.init_from:
        return open_checkpoint(find_run(Path(settings.runs_dir), settings.run), checkpoint, device)
    weights = find_weights(settings.init_from, Path(settings.runs_dir))
    say(weights.describe(), sys.stderr)
    return engine_of(weights, device)


def engine_of(weights: Weights, device: Device) -> Engine:
    """An engine on `device`. Raises ValueError if the tokenizer of the weights is not known."""
    if weights.tokenizer is None:
        raise ValueError(f"{weights.place} has no tokenizer that is known here, for its vocabulary "
                         f"of {weights.config.vocab_size:,} tokens: start a run from it with the "
                         "text whose tokens it has (python train.py init_from=), and sample that.")
    return Engine(weights.model().to(device.torch), weights.tokenizer, device)


def open_checkpoint(run: Path, which: str, device: Device) -> Engine:
    """Load a checkpoint of a run's folder to the device, ready to generate.

    `which` is "best", "last", or the number of a step. Raises ValueError if the run has no such
    checkpoint, or if its content is invalid.
    """
    return store.load_of_run(run, which, lambda found: engine_of(own_weights(found), device))


def open_decoder(engine: Engine, rules: SamplingConfig, setting: str,
                 positions: int) -> Decoder | None:
    """A decoder of sequences of `positions` tokens, or None without the cache.

    `setting` is the name of the setting that has their number. Says on standard error what makes
    decoding slow. Raises ValueError if decoding all at once takes more than the free memory.
    """
    device, rows = engine.device, getattr(rules, setting)
    decoder = None
    if rules.cache:
        with device.autocast():
            decoder = Decoder(engine.model, rules.decoder_precision)
        if decoder.advice:
            say(decoder.advice, sys.stderr)
    has_kernels = decoder is not None and decoder.has_kernels
    if device.type == "cpu" and not native(device.precision) and not has_kernels:
        # fp32 is 10 to 30 times as fast as a precision that this CPU emulates.
        say(f"precision={device.precision} is not native to this processor: computing in fp32.",
            sys.stderr)
    # A GPU that runs out of memory says so itself.
    if decoder and device.type == "cpu":
        needed, free = decoder.nbytes(rows, positions), available_memory()
        if needed > free:
            raise ValueError(f"{setting}={rows} completions at once take {readable_size(needed)} "
                             f"of memory, {readable_size(free)} are free: choose a smaller "
                             f"{setting}.")
    return decoder


def own_logprobs(logits: Tensor, tokens: Tensor) -> list[float]:
    """Log probabilities of `tokens` `[B]` by `logits` `[B, V]`, before any sampling rule."""
    # log softmax of the chosen logits alone, without that of all others.
    logits = logits.float()
    return (logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)).tolist()


def end_tokens(tokenizer: Tokenizer) -> set[int]:
    """The tokens that end a completion: end of text, and the markers of conversations."""
    return {token for word, token in tokenizer.special.items()
            if token == tokenizer.end_of_text or word in MARKERS}


def short_sample(model: GPT, tokenizer: Tokenizer, length: int, device: Device,
                 prompt: Prompt = "") -> str:
    """A sample of the model, or the reason why there is none."""
    try:
        engine, rules = Engine(model, tokenizer, device), SamplingConfig(max_new_tokens=length)
        return engine.prompt_text(prompt) + engine.complete([(prompt, 0)], rules)[0].text
    except ValueError as error:
        # A model that has diverged: the next loss decides what to do about it.
        return str(error)
