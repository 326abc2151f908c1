"""GPT-2 124M in and out beside nanoGPT: the first token, fine-tuning on Shakespeare, export.

  python -m bench pretrained peer=../nanoGPT text=shakespeare.txt

All sides read the same folder of transformers, which is needed, and train on the same batches
without dropout. The loss after the last step is that of the same windows.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from bench import peer as nanogpt
from bench import timing
from bench.result import train_in
from bench.timing import measure_command, print_header, print_row, with_seconds
from data.bpe import BPETokenizer
from data.loader import Loader
from data.shards import Tokens
from setting import FilePath, setting

PROMPT = "The king"
DATA, BATCHES = Path("data/shakespeare"), "batches.npy"
# The shortest program with transformers that does the same.
WITH_TRANSFORMERS = f"""
import sys, torch
from tiktoken import get_encoding
from transformers import GPT2LMHeadModel
model = GPT2LMHeadModel.from_pretrained(sys.argv[1]).eval()
encoding = get_encoding("gpt2")
ids = torch.tensor([encoding.encode({PROMPT!r})])
print(encoding.decode(model.generate(ids, max_new_tokens=1, do_sample=True)[0].tolist()))
"""
# Writes weights of the same shapes.
RANDOM_WEIGHTS = """
import sys, torch
from transformers import GPT2Config, GPT2LMHeadModel
torch.manual_seed(0)
GPT2LMHeadModel(GPT2Config()).save_pretrained(sys.argv[1])
"""


@dataclass(frozen=True)
class PretrainedSettings(nanogpt.PeerSettings):
    """Settings of the benchmark of published weights."""

    text: FilePath = setting("", "Tiny Shakespeare, such as nanoGPT's data/shakespeare/input.txt")
    weights: FilePath = setting("", "a folder with GPT-2 124M; empty: random weights")
    steps: int = setting(20, "of fine-tuning", ge=1)
    batch_size: int = setting(1, "sequences in a micro-step", ge=1)
    block_size: int = setting(256, "tokens in a sequence", ge=1, le=1024)
    micro_steps: int = setting(2, "in a step", ge=1)
    eval_windows: int = setting(32, "sequences of the validation loss", ge=1)
    seed: int = setting(1337, "of the batches", ge=0)

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        if not self.peer:
            yield nanogpt.NO_PEER
        if not Path(self.text).is_file():
            yield f"text={self.text} is not a file: name one with Tiny Shakespeare."
        if not find_spec("transformers"):
            yield "bench pretrained needs transformers: pip install transformers."
        yield from super().problems()


Measured = dict[tuple[str, str], dict[str, float]]


def main(settings: PretrainedSettings) -> int:
    rounds: list[Measured] = []
    with tempfile.TemporaryDirectory() as place:
        work = Path(place, "nanoGPT")
        weights = Path(settings.weights or Path(place, "weights")).resolve()
        if not settings.weights:
            measure_command([sys.executable, "-c", RANDOM_WEIGHTS, str(weights)])
        nanogpt.work_folder(work, Path(settings.peer), weights)
        write_data(settings, work)
        for _ in range(settings.rounds):
            with tempfile.TemporaryDirectory(dir=place) as folder:
                rounds.append(measure_round(settings, work, weights, Path(folder)))

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print_header("what", "side", "s", "x", "memory", "validation loss")
    for what, side in rounds[0]:
        runs = [measured[what, side] for measured in rounds]
        # Compared with the first side that did the same.
        first = next(key for key in rounds[0] if key[0] == what)
        ratio = timing.median_ratio(runs, [measured[first] for measured in rounds], "seconds")
        median = timing.medians(runs)
        memory = f"{median['peak_bytes'] / 2**20:,.0f} MB" if "peak_bytes" in median else ""
        loss = f"{median['val_loss']:.5f}" if "val_loss" in median else ""
        print_row(what, side, f"{median['seconds']:.2f}", f"{ratio:.2f}", memory, loss)
    timing.write_json(settings.out, [{": ".join(key): run for key, run in measured.items()}
                                     for measured in rounds])
    return 0


def write_data(settings: PretrainedSettings, work: Path) -> None:
    """Write the tokens of both splits, as nanoGPT divides the text, and the batches of all steps.
    """
    text = Path(settings.text).read_text()
    tokenizer = BPETokenizer.published("gpt2")
    start = int(0.9 * len(text))
    train, val = (np.array(tokenizer.encode(part), dtype=np.uint16)
                  for part in (text[:start], text[start:]))
    (work / DATA).mkdir(parents=True)
    train.tofile(work / DATA / "train.bin")
    val[: settings.eval_windows * settings.block_size + 1].tofile(work / DATA / "val.bin")
    loader = Loader([Tokens([train])], settings.block_size, settings.batch_size,
                    settings.micro_steps, settings.seed)
    batches = [torch.stack(loader.batch(step, micro_step)) for step in range(settings.steps)
               for micro_step in range(settings.micro_steps)]
    np.save(work / BATCHES, torch.stack(batches).numpy())


def measure_round(settings: PretrainedSettings, work: Path, weights: Path,
                  folder: Path) -> Measured:
    """Measure each side of each part once. `folder` gets our run."""
    python, run, out = sys.executable, folder / "run", folder / "exported"
    measured: Measured = {}
    measured["first token", "nanoGPT"] = measure_command([
        python, "sample.py", "--init_from=gpt2", f"--start={PROMPT}", "--num_samples=1",
        "--max_new_tokens=1", "--device=cpu", "--dtype=float32"], work)
    measured["first token", "transformers"] = measure_command([
        python, "-c", WITH_TRANSFORMERS, str(weights)], work)
    measured["first token", "ours"] = measure_command([
        python, "sample.py", f"init_from={weights}", f"prompt={PROMPT}", "max_new_tokens=1"])

    theirs = with_seconds(nanogpt.finetune, work, work / BATCHES, [
        # Its loop also takes the step of this number, from 0.
        f"--max_iters={settings.steps - 1}", f"--batch_size={settings.batch_size}",
        f"--block_size={settings.block_size}", "--dtype=float32",
        f"--gradient_accumulation_steps={settings.micro_steps}"])
    step_sequences = settings.micro_steps * settings.batch_size
    ours = with_seconds(
        train_in, run, "experiment=finetune_shakespeare", f"init_from={weights}", "data=bin",
        f"data.path={work / DATA}", f"seed={settings.seed}",
        f"model.block_size={settings.block_size}", f"training.max_steps={settings.steps}",
        f"training.batch_size={settings.batch_size}", "training.eval_every=0",
        f"training.eval_tokens={settings.eval_windows * settings.block_size}",
        f"training.tokens_per_step={step_sequences * settings.block_size}",
        "training.checkpoint_every=0", "training.device=cpu", "training.precision=fp32")
    sides = {"nanoGPT": theirs, "ours": ours}
    for side, found in sides.items():
        measured["fine-tuning, steps", side] = {
            "seconds": found["seconds"], "val_loss": found["val_loss"]}
    for side, found in sides.items():
        measured["fine-tuning, in all", side] = {"seconds": found["seconds_in_all"]}

    measured["export", "ours"] = measure_command([
        python, "-m", "scripts.export", f"run={run}", f"out={out}"])
    return measured
