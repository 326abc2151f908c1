"""Train to a result beside nanoGPT: seconds of training until its loss, and the loss in its seconds.

  python -m bench.bench result peer=../nanoGPT

nanoGPT trains its recipe for CPUs with its own train.py; ours are `experiment=speedrun_shakespeare` and
`experiment=modern_shakespeare`, on the same text. Both sides are judged by the whole validation split, in windows of their
context that do not overlap. Seconds are those of training: evaluation and the start of the process are not among them.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import atomic
from conf.schema import FilePath
from progress import ProgressBar, print_line
from training.device import Device

ROOT = Path(__file__).parent.parent
EVAL_INTERVAL = 250
# Its README's for CPUs; but each step is logged, with its time.
RECIPE = ("--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
          "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 "
          f"--eval_interval={EVAL_INTERVAL}").split()

# In the words of its train.py, behind whose last line this runs: the loss over the whole validation split.
JUDGE = """
raw_model.eval()
tokens = torch.from_numpy(np.fromfile(os.path.join(data_dir, "val.bin"), dtype=np.uint16).astype(np.int64))
count = (len(tokens) - 1) // block_size
inputs, targets = (tokens[first : first + count * block_size].view(count, block_size) for first in (0, 1))
with torch.inference_mode():
    total = sum(raw_model(x, y)[1].item() * len(x) for x, y in zip(inputs.split(64), targets.split(64)))
print(total / count, sum(weights.numel() for weights in raw_model.parameters()))
"""


@dataclass(frozen=True)
class ResultSettings:
    """What is trained, and how often."""

    peer: FilePath = ""  # a nanoGPT checkout, its data/shakespeare_char prepared
    rounds: int = 3
    seed: int = 1337  # of the first round; the next have the next
    out: FilePath = ""

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        yield from prepared_text(self.peer)
        if self.rounds < 1:
            yield f"rounds={self.rounds} must be at least 1."


def prepared_text(peer: str) -> Iterator[str]:
    """What is wrong with a checkout that is to train on Shakespeare's characters."""
    text = Path(peer, "data/shakespeare_char")
    if not peer:
        yield "peer= must name a nanoGPT checkout, as in peer=../nanoGPT."
    elif not all((text / name).is_file() for name in ("input.txt", "train.bin", "val.bin", "meta.pkl")):
        yield f"peer={peer} has no prepared text: run python {text / 'prepare.py'} first."


def result(settings: ResultSettings) -> int:
    """Train all three in turn, `rounds` times, each time from another seed."""
    text = f"data.path={Path(settings.peer).resolve() / 'data/shakespeare_char/input.txt'}"
    sides = {"nanoGPT": lambda seed: train_nanogpt(Path(settings.peer), seed),
             "speedrun_shakespeare": lambda seed: train_ours("experiment=speedrun_shakespeare", text, f"seed={seed}"),
             "modern_shakespeare": lambda seed: train_ours("experiment=modern_shakespeare", text, f"seed={seed}")}
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    print(f"torch {torch.__version__}, {Device().describe()}\n\n"
          "| round | side | parameters | seconds of training | seconds in all | validation loss |\n" + "|---" * 6 + "|")
    with ProgressBar(desc="Training", total=settings.rounds * len(sides), unit="runs", leave=False) as bar:
        for number in range(settings.rounds):
            for side, run in sides.items():
                start = time.perf_counter()
                one = run(settings.seed + number) | {"seconds_in_all": time.perf_counter() - start}
                found[side].append(one)
                print_line(f"| {number + 1} | {side} | {one['parameters']:,} | {one['seconds']:.1f} | "
                          f"{one['seconds_in_all']:.1f} | {one['val_loss']:.4f} |")
                bar.update()
    median = {side: {what: statistics.median(one[what] for one in runs) for what in ("seconds", "val_loss")}
              for side, runs in found.items()}
    for side, medians in median.items():
        ratio = median["nanoGPT"]["seconds"] / medians["seconds"]
        print(f"{side}: medians {medians['seconds']:.1f} s, validation loss {medians['val_loss']:.4f}"
              + (f": nanoGPT trains {ratio:.1f} times as long" if side != "nanoGPT" else ""))
    if settings.out:
        atomic.write_bytes(Path(settings.out), json.dumps({"runs": found, "medians": median}, indent=2).encode())
    return 0


def train_ours(*words: str) -> dict[str, Any]:
    """What a run of train.py with these settings came to."""
    with tempfile.TemporaryDirectory() as folder:
        succeed([sys.executable, "train.py", f"runs_dir={folder}", "name=run", "training.sample_tokens=0", *words], ROOT)
        rows = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
        log = (Path(folder) / "run/log.txt").read_text()
    return {"seconds": [row["seconds"] for row in rows if "seconds" in row][-1],
            "val_loss": [row["val_loss"] for row in rows if "val_loss" in row][-1],
            "parameters": int(re.search(r"Model: ([\d,]+) parameters", log)[1].replace(",", ""))}


def train_nanogpt(peer: Path, seed: int) -> dict[str, Any]:
    """Its own program, from another seed, and then JUDGE. A step that also evaluates counts as a median one."""
    program = (peer / "train.py").read_text().replace("torch.manual_seed(1337", f"torch.manual_seed({seed}") + JUDGE
    with tempfile.TemporaryDirectory() as folder:
        words = ["config/train_shakespeare_char.py", *RECIPE, f"--out_dir={folder}"]
        printed = succeed([sys.executable, "-c", program, *words], peer)
    steps = {int(step): float(milliseconds) / 1000
             for step, milliseconds in re.findall(r"^iter (\d+): .*time ([\d.]+)ms", printed, re.MULTILINE)}
    usual = statistics.median(steps.values())
    val_loss, parameters = printed.splitlines()[-1].split()
    return {"seconds": sum(usual if step % EVAL_INTERVAL == 0 else took for step, took in steps.items()),
            "val_loss": float(val_loss), "parameters": int(parameters)}


def succeed(command: list[str], folder: Path) -> str:
    """What the command printed. Raises ValueError with its last words if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command[1:4])[:200]}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
    return done.stdout
