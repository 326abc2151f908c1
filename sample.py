"""Complete a prompt with a trained model.

  python sample.py run=pydocs prompt="Return the number of"

Settings, each with its default, or with an example where there is none:
  run=NAME              the run's name or folder, or a sweep's, for its best run; without it, the run that was
                        trained last, or the best of its sweep
  prompt="To be, or"    any text, taken as it is; without it a new text is begun
  prompt_file=FILE      the prompt from a file, with its line endings, or from standard input with prompt_file=-
  prompts=FILE          a prompt a line: complete all, batch_size=16 at once, and write a JSON line each to
  out=FILE.jsonl        (prompt, text, tokens, mean log probability, how it ended); again, it goes on
  interactive=true      ask for prompts until the input ends
  max_new_tokens=200    how many tokens at most
  temperature=0.8       0 always takes the most likely token
  top_k=50  top_p=0.9   draw from the k most likely tokens; from the fewest that hold a probability of p
  num_samples=1         several completions, each printed whole
  seed=1337             the same seed gives the same text
  logprobs=true         print each token with its probability (the model's own, before temperature and such)
  stop="\\n\\n"           end where this text would come (a literal text: in bash, $'\\n\\n')
  checkpoint=best       or last, or a step such as checkpoint=300
  device=auto  precision=auto  cache=true
  int8=false            weights of 8 bits, on a CPU with gcc or clang: 2 to 3 times as fast as fp32, a little worse
"""

from __future__ import annotations

from conf.launch import launch

if __name__ == "__main__":
    # Before the imports below: --help and a wrong setting need not wait for torch.
    launch("sample:sample", "sample", __doc__)

import codecs
import hashlib
import json
import math
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from torch import Tensor

import atomic
from checkpointing import checkpoint, store
from checkpointing.checkpoint import Checkpoint
from checkpointing.run_folder import find_run
from conf.identity import flat, in_one_line
from conf.schema import SampleSettings, rebuild
from data.tokenizer import Tokenizer, fingerprint, from_json
from generation.decoder import Decoder
from generation.sampling import steps
from hardware import native
from model import GPT, GPTConfig, Undrawn
from progress import ProgressBar
from terminal import counted, has_colors, output, readable_size, say
from training.device import Device, available_memory

MAX_PROMPT_BYTES = 2**24  # of a file with one or many prompts
RULES = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "cache", "int8", "precision", "checkpoint")


def sample(settings: SampleSettings) -> int:
    """Open a run and print completions as `settings` ask, or write them; return the exit code."""
    device = Device(settings.device, settings.precision)
    run = find_run(Path(settings.runs_dir), settings.run)
    model, tokenizer = open_checkpoint(run, settings.checkpoint, device)
    decoder = prepare(model, settings, device)
    if settings.prompts:
        complete_file(model, tokenizer, settings, device, decoder)
    elif settings.interactive:
        for line in prompts():
            try:
                print_completions(model, tokenizer, line, settings, device, decoder)
            except ValueError as error:  # a character that the tokenizer lacks need not end the talk
                say(f"Error: {error}")
    else:
        print_completions(model, tokenizer, read_prompt(settings), settings, device, decoder)
    return 0


def open_checkpoint(run: Path, which: str, device: Device) -> tuple[GPT, Tokenizer]:
    """The model, on the device and ready to generate, and the tokenizer it was trained with.

    `which` is "best", "last", or the number of a step. Raises ValueError if the run has no such checkpoint, or if it
    holds anything that nanohydra does not write.
    """
    def load(found: Checkpoint) -> tuple[GPT, Tokenizer]:
        config = rebuild(GPTConfig, found.state["model"], f"{found.folder / checkpoint.STATE}, model")
        tokenizer = tokenizer_of(found)
        if tokenizer.vocab_size != config.vocab_size:
            raise ValueError(f"{found.folder} cannot be: its tokenizer has {tokenizer.vocab_size} tokens, "
                             f"its model {config.vocab_size}.")
        with Undrawn("meta"):
            shapes = GPT(config).state_dict()
        weights = found.load_tensors(checkpoint.MODEL, like=shapes)  # the model takes memory only once its weights are there
        with Undrawn():
            model = GPT(config)
        model.load_state_dict(weights)
        return model.to(device.torch).eval(), tokenizer

    if which.isdecimal():
        return store.load_step(run / "checkpoints", int(which), load)
    loaded = store.load_checkpoint(run / "checkpoints", which, load, lambda text: say(text, sys.stderr))
    if loaded is None:
        raise ValueError(f"{run} has no checkpoint.")
    return loaded


def tokenizer_of(found: Checkpoint) -> Tokenizer:
    """The tokenizer that a checkpoint's model was trained with. Raises ValueError if the one beside it is another."""
    path = found.folder / checkpoint.TOKENIZER
    tokenizer = from_json(found.tokenizer(), f"{path}")
    given, trained = fingerprint(tokenizer)[:12], flat(found.state["settings"]).get("data.tokenizer_fingerprint")
    if trained not in (None, given):
        raise ValueError(f"{path} (fingerprint {given}) is not the tokenizer that the model was trained with (fingerprint "
                         f"{in_one_line(str(trained))}): put that one back.")
    return tokenizer


def prepare(model: GPT, settings: SampleSettings, device: Device) -> Decoder | None:
    """What reads texts, for as many at once as `settings` ask; None without the cache.

    Raises ValueError where even without prompts so many would take more memory than there is.
    """
    if not settings.cache:
        say_emulated(device)
        return None
    setting = "batch_size" if settings.prompts else "num_samples"
    rows = getattr(settings, setting)
    with device.autocast():
        decoder = Decoder(model, "int8" * settings.int8)
    if decoder.advice:
        say(decoder.advice, sys.stderr)
    if not decoder.has_kernels:
        say_emulated(device)
    if device.type == "cpu" and (needed := decoder.nbytes(rows, settings.max_new_tokens)) > (free := available_memory()):
        raise ValueError(f"{setting}={rows} completions at once take {readable_size(needed)} of memory, "
                         f"{readable_size(free)} are free: choose a smaller {setting}.")
    return decoder


def say_emulated(device: Device) -> None:
    """Say so where fp32 replaces a precision that the CPU would emulate, taking 10 to 30 times as long."""
    if device.type == "cpu" and not native(device.precision):
        say(f"precision={device.precision} is not native to this processor: computing in fp32.", sys.stderr)


def read_prompt(settings: SampleSettings) -> str:
    """The prompt as given, from its file, or from standard input."""
    return read_text("prompt_file", settings.prompt_file) if settings.prompt_file else settings.prompt


def read_text(name: str, path: str) -> str:
    """The text of a file, or for `-` of standard input, with its line endings as they are.

    `name` is the setting that named it. Raises ValueError for what is too large, not UTF-8, or not a file to read.
    """
    content = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1) if path == "-" else read_bytes(name, path)
    if len(content) > MAX_PROMPT_BYTES:
        raise ValueError(f"{name}={path} holds more than {readable_size(MAX_PROMPT_BYTES)}: choose a smaller file.")
    try:
        return content.decode("utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}={path} is not UTF-8 at offset {error.start}: save it as UTF-8.") from None


def read_bytes(name: str, path: str) -> bytes:
    """The first bytes of a file, one more than `MAX_PROMPT_BYTES` at most."""
    # Without O_NONBLOCK, opening a named pipe waits for a writer, perhaps for ever.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    kind = os.fstat(handle).st_mode
    if stat.S_ISDIR(kind):
        os.close(handle)
        raise ValueError(f"{name}={path} is a folder: name a file.")
    os.set_blocking(handle, True)
    with open(handle, "rb") as file:
        content = file.read(MAX_PROMPT_BYTES + 1)
    if stat.S_ISFIFO(kind) and not content:
        raise ValueError(f"{name}={path} is a pipe that nothing was written to: start its writer first.")
    return content


def prompts() -> Iterator[str]:
    """Lines that someone types, until end of input."""
    if hasattr(sys.stdin, "reconfigure"):  # a notebook's stream has no such method
        # Bytes that are not UTF-8 become characters that the tokenizer refuses, and the next line is asked for.
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input("\nprompt> ")
        except EOFError:
            output("")
            return
        except KeyboardInterrupt:
            output("")
            raise
        yield line


def print_completions(model: GPT, tokenizer: Tokenizer, prompt: str, settings: SampleSettings, device: Device,
                      decoder: Decoder | None = None) -> None:
    """One completion is printed as it grows; of several, each is printed whole."""
    if settings.num_samples == 1 and not settings.logprobs:
        complete(model, tokenizer, prompt, settings, device, lambda piece: output(piece, end=""), decoder)
        output("")
        return
    jobs = [(prompt, number) for number in range(settings.num_samples)]
    rows = write(model, tokenizer, jobs, settings, device, decoder=decoder)
    for number, row in enumerate(rows, 1):
        if settings.num_samples > 1:
            output(f"--- {number} of {settings.num_samples}")
        if settings.logprobs:
            output(prompt)
            print(row.listing())
        else:
            output(f"{prompt}{row.text}")


class Completion:
    """The text of one row of a batch while its tokens come. Ends at the end of text, or before `stop`."""

    def __init__(self, tokenizer: Tokenizer, stop: str) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text, self.finished = "", False
        self.tokens: list[int] = []  # all that were drawn, the end of text too
        self.logprobs: list[float] = []
        self.reason = "length"

    def add(self, token: int, logprob: float = math.nan) -> None:
        if self.finished:
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token == self.tokenizer.end_of_text:
            self.finish()
            self.reason = "end_of_text"
            return
        self.text += self.decoder.decode(self.tokenizer.decode_bytes((token,)))
        if self.stop and self.stop in self.text:
            self.text, self.finished, self.reason = self.text[: self.text.index(self.stop)], True, "stop"

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

    def listing(self) -> str:
        """A line for each token: its probability, and what it stands for; on a terminal red, yellow or green as it rises."""
        lines = []
        for token, logprob in zip(self.tokens, self.logprobs, strict=True):
            p, end = math.exp(logprob), token == self.tokenizer.end_of_text
            word = "end of text" if end else repr(self.tokenizer.decode_bytes((token,)).decode(errors="backslashreplace"))
            color = 31 + (p >= 0.1) * 2 - (p >= 0.5)  # red, yellow, green
            lines.append(f"\x1b[{color}m{p:7.2%}  {word}\x1b[0m" if has_colors(sys.stdout) else f"{p:7.2%}  {word}")
        return "\n".join(lines)


def complete(model: GPT, tokenizer: Tokenizer, prompt: str, settings: SampleSettings, device: Device,
             show: Callable[[str], None] | None = None, decoder: Decoder | None = None) -> str:
    """One completion of `prompt`; all else is as `write` has it."""
    return write(model, tokenizer, [(prompt, 0)], settings, device, show, decoder)[0].text


def write(model: GPT, tokenizer: Tokenizer, jobs: list[tuple[str, int]], settings: SampleSettings, device: Device,
          show: Callable[[str], None] | None = None, decoder: Decoder | None = None) -> list[Completion]:
    """A completion for each of `jobs`, which are prompts and numbers: prompt, number and seed decide what is drawn.

    `show` gets the first prompt and then its completion, piece by piece. Raises ValueError, showing nothing, for
    a prompt that the tokenizer cannot encode.
    """
    ids = [tokenizer.encode(prompt) or first_ids(tokenizer) for prompt, _ in jobs]
    if show is not None:
        show(jobs[0][0])
    rows = [Completion(tokenizer, settings.stop) for _ in jobs]
    shown, wanted = 0, settings.logprobs or bool(settings.prompts)
    done: set[int] = set()
    with device.autocast():
        for going, tokens, logits in steps(model, ids, settings.max_new_tokens, temperature=settings.temperature,
                                           top_k=settings.top_k, top_p=settings.top_p, seed=settings.seed,
                                           numbers=[number for _, number in jobs], use_cache=settings.cache,
                                           decoder=decoder, done=done):
            logprobs = own_logprobs(logits, tokens) if wanted else [math.nan] * len(going)
            for place, token, logprob in zip(going, tokens.tolist(), logprobs, strict=True):
                rows[place].add(token, logprob)
                if rows[place].finished:
                    done.add(place)
            if show is not None:
                show(rows[0].certain()[shown:])
                shown = len(rows[0].certain())
    for row in rows:
        row.finish()
    if show is not None:
        show(rows[0].text[shown:])
    return rows


def own_logprobs(logits: Tensor, tokens: Tensor) -> list[float]:
    """What the model itself gives `tokens` `[B]` in `logits` `[B, V]`, before temperature and the other rules."""
    logits = logits.float()
    return (logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)).tolist()


def complete_file(model: GPT, tokenizer: Tokenizer, settings: SampleSettings, device: Device,
                  decoder: Decoder | None) -> None:
    """Complete each line of `prompts` `num_samples` times into `out`, in order, going on behind the lines that are there.

    Empty lines are passed over. Raises ValueError, changing nothing, if what is there is of other prompts or settings.
    """
    lines = [line.removesuffix("\r") for line in read_text("prompts", settings.prompts).split("\n")]
    jobs = [(line, number) for line in lines if line for number in range(settings.num_samples)]
    if not jobs:
        raise ValueError(f"prompts={settings.prompts} holds no prompts: write one a line.")
    rules = {name: getattr(settings, name) for name in RULES} | {"weights": weights_id(model)}
    if settings.int8 or device.precision != "fp32":
        rules["batch_size"] = settings.batch_size  # by which some ways to multiply are chosen: last digits differ
    settings_id = hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:12]
    for prompt, _ in jobs:
        tokenizer.encode(prompt)  # what cannot be encoded is said before anything is written
    path = Path(settings.out)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"out={path} is not a plain file: choose another.")
    with atomic.exclusive_lock(path):
        done = already_done(path, jobs, settings_id)
        with closing(atomic.LineFile(path)) as out, ProgressBar(total=len(jobs), initial=done, unit="completions") as bar:
            for start in range(0, len(jobs), settings.batch_size):
                batch = jobs[start : start + settings.batch_size]
                if start + len(batch) <= done:
                    continue
                # A batch that a kill cut is made again as a whole: some ways to multiply give a row other digits then.
                rows = write(model, tokenizer, batch, settings, device, decoder=decoder)
                for (prompt, number), row in list(zip(batch, rows, strict=True))[max(done - start, 0) :]:
                    out.add(json.dumps({"prompt": prompt, "sample": number, "text": row.text, "tokens": len(row.tokens),
                                        "mean_logprob": sum(row.logprobs) / len(row.logprobs),
                                        "finish_reason": row.reason, "settings": settings_id}, ensure_ascii=False))
                    bar.update()
                out.sync()
    say(f"{settings.out}: {counted(len(jobs), 'completion')}")


def weights_id(model: GPT) -> float:
    """A number that other weights do not have, but by chance."""
    return math.fsum(weights.double().square().sum().item() for weights in model.parameters())


def already_done(path: Path, jobs: list[tuple[str, int]], settings_id: str) -> int:
    """How many of `jobs` the file holds lines of. Raises ValueError if it holds anything else."""
    done, cut = lines_of(path)
    for number, (line, (prompt, sample)) in enumerate(zip(done, jobs, strict=False), 1):
        if (line.get("prompt"), line.get("sample")) != (prompt, sample):
            raise ValueError(f"out={path}, line {number}, is not of the prompt {prompt[:40]!r}: choose another file.")
        if line.get("settings") != settings_id:
            raise ValueError(f"out={path}, line {number}, is of another model or of other settings: choose another file.")
    if (found := len(done) + bool(cut)) > len(jobs):
        raise ValueError(f"out={path} has {counted(found, 'line')}, and {len(jobs)} are asked for: choose another file.")
    if cut:
        prompt, sample = jobs[len(done)]
        begun = json.dumps({"prompt": prompt, "sample": sample}, ensure_ascii=False)[:-1].encode()
        if cut[: len(begun)] != begun[: len(cut)]:
            raise something_else(path)
    return len(done)


def lines_of(path: Path) -> tuple[list[dict[str, object]], bytes]:
    """The lines of a file of completions, if it is there, and the beginning of a last one that a kill cut short.

    Raises ValueError for what cannot be such a file.
    """
    *whole, cut = path.read_bytes().split(b"\n")
    try:
        lines = [json.loads(line) for line in whole]
    except (ValueError, RecursionError):
        raise something_else(path) from None
    if not all(isinstance(line, dict) for line in lines):
        raise something_else(path)
    return lines, cut


def something_else(path: Path) -> ValueError:
    return ValueError(f"out={path} holds something else than completions: choose another file.")


def first_ids(tokenizer: Tokenizer) -> list[int]:
    """What stands before a new text: the end of another, or where the tokenizer has no such token, a new line."""
    if tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    try:
        return tokenizer.encode("\n")
    except ValueError:
        return [0]
