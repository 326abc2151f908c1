"""nanoGPT, from a checkout that the user has: its model, and its training on Shakespeare."""

from __future__ import annotations

import importlib.util
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.timing import BenchSettings, run_command
from model.config import GPTConfig
from setting import FilePath, setting

SHARED_FIELDS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
NO_PEER = "peer= must name a nanoGPT checkout, as in peer=../nanoGPT."
SHAKESPEARE = "data/shakespeare_char"
EVAL_INTERVAL = 250
# The recipes of nanoGPT's README for one GPU and for CPUs, but every step is logged with its time.
RECIPE_FOR_GPUS = ["config/train_shakespeare_char.py", "--eval_iters=20", "--log_interval=1",
                   f"--eval_interval={EVAL_INTERVAL}"]
RECIPE = [*RECIPE_FOR_GPUS, "--device=cpu", "--compile=False", "--block_size=64", "--batch_size=12",
          "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000",
          "--dropout=0.0"]
# The recipe of nanoGPT's config/finetune_shakespeare.py, on a CPU and with the smallest GPT-2.
FINETUNING = ["--init_from=gpt2", "--device=cpu", "--compile=False", "--log_interval=1",
              "--eval_iters=0", f"--eval_interval={EVAL_INTERVAL}"]
# Put before the training loop: the batches are those of a file, `[micro-steps, 2, B, T]`.
LOOP = "# training loop\n"
SAME_BATCHES = """
import itertools
batches = itertools.cycle(torch.from_numpy(np.load({batches!r})))
get_batch = lambda split: next(batches)
"""

# Appended to nanoGPT's train.py, whose names it uses: the loss over the whole validation split, in
# windows that do not overlap.
EVALUATION = """
raw_model.eval()
tokens = np.fromfile(os.path.join(data_dir, "val.bin"), dtype=np.uint16)
tokens = torch.from_numpy(tokens.astype(np.int64))
count = (len(tokens) - 1) // block_size
inputs = tokens[: count * block_size].view(count, block_size)
targets = tokens[1 : 1 + count * block_size].view(count, block_size)
total = 0.0
with torch.inference_mode():
    for x, y in zip(inputs.split(64), targets.split(64)):
        total += raw_model(x.to(device), y.to(device))[1].item() * len(x)
print(total / count, sum(weights.numel() for weights in raw_model.parameters()))
"""


@dataclass(frozen=True)
class PeerSettings(BenchSettings):
    """Settings of a benchmark beside a nanoGPT checkout."""

    peer: FilePath = setting("", "a nanoGPT checkout")

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        if self.peer and not Path(self.peer, "model.py").is_file():
            yield f"peer={self.peer} is not a nanoGPT checkout: it has no model.py."
        yield from super().problems()


@dataclass(frozen=True)
class ShakespeareSettings(BenchSettings):
    """Settings of a benchmark beside a nanoGPT checkout, which is to train on its characters."""

    peer: FilePath = setting("", "a nanoGPT checkout, its data/shakespeare_char prepared")

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        text = Path(self.peer, SHAKESPEARE)
        needed = ("input.txt", "train.bin", "val.bin", "meta.pkl")
        if not self.peer:
            yield NO_PEER
        elif not all((text / name).is_file() for name in needed):
            yield f"peer={self.peer} has no prepared text: run python {text / 'prepare.py'} first."
        yield from super().problems()


def shakespeare_override(peer: str) -> str:
    """The setting with which train.py reads the same text."""
    return f"data.path={Path(peer).resolve() / SHAKESPEARE / 'input.txt'}"


def build_model(peer: Path, config: GPTConfig) -> Any:
    """nanoGPT's GPT in the shape of `config`, from `model.py` of the checkout."""
    specification = importlib.util.spec_from_file_location("nanogpt_model", peer / "model.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["nanogpt_model"] = module
    specification.loader.exec_module(module)
    shape = {name: getattr(config, name) for name in SHARED_FIELDS}
    return module.GPT(module.GPTConfig(**shape))


def train(peer: Path, seed: int, device: str) -> dict[str, Any]:
    """Run nanoGPT's train.py with another seed: seconds of training, final loss and size."""
    recipe = RECIPE if device == "cpu" else RECIPE_FOR_GPUS
    program = (peer / "train.py").read_text()
    program = program.replace("torch.manual_seed(1337", f"torch.manual_seed({seed}")
    with tempfile.TemporaryDirectory() as folder:
        return run_training(program, [*recipe, f"--out_dir={folder}"], peer)


def finetune(folder: Path, batches: Path, options: list[str]) -> dict[str, Any]:
    """The same for nanoGPT's fine-tuning on given batches; `folder` is that of a `work_folder`."""
    program = (folder / "train.py").read_text()
    if LOOP not in program:
        raise ValueError(f"{folder / 'train.py'} is not a version of nanoGPT that is known here.")
    program = program.replace(LOOP, SAME_BATCHES.format(batches=str(batches)) + LOOP)
    recipe = ["config/finetune_shakespeare.py", *FINETUNING, f"--out_dir={folder}", *options]
    return run_training(program, recipe, folder)


def work_folder(folder: Path, peer: Path, weights: Path) -> None:
    """Make `folder`, with links to a checkout and to GPT-2's weights, for data of its own."""
    folder.mkdir()
    for name in ("train.py", "sample.py", "model.py", "configurator.py", "config"):
        (folder / name).symlink_to((peer / name).resolve())
    # transformers looks for a folder of this name first.
    (folder / "gpt2").symlink_to(weights.resolve())


def run_training(program: str, arguments: list[str], folder: Path) -> dict[str, Any]:
    """Run a version of train.py in `folder`: seconds of training, final loss and size."""
    printed = run_command([sys.executable, "-c", program + EVALUATION, *arguments], folder)
    logged = re.findall(r"^iter (\d+): .*time ([\d.]+)ms", printed, re.MULTILINE)
    step_seconds = {int(step): float(step_ms) / 1000 for step, step_ms in logged}
    # A step that also evaluates counts as a median step.
    median = statistics.median(step_seconds.values())
    for step in range(0, max(step_seconds) + 1, EVAL_INTERVAL):
        step_seconds[step] = median
    val_loss, parameters = printed.splitlines()[-1].split()
    return {"seconds": sum(step_seconds.values()), "val_loss": float(val_loss),
            "parameters": int(parameters)}
