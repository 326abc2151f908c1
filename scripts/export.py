"""Write a trained model for other programs, and check that it computes the same there.

  python -m scripts.export run=pydocs format=hf out=FOLDER                  # transformers
  python -m scripts.export run=pydocs format=hf out=FOLDER remote_code=true # with n-gram embeddings

docs/weights.md lists the models that each format has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from conf.launch import launch
from conf.settings import checkpoint_problems
from setting import FilePath, setting


@dataclass(frozen=True)
class ExportSettings:
    """The settings of an export."""

    run: FilePath = setting("", "name or folder of a run; empty: the run that was trained last")
    runs_dir: FilePath = setting("runs", "folder that contains the runs' folders")
    checkpoint: str = setting("best", "best, last, or the number of a step")
    format: Literal["hf"] = setting("hf", "hf: a folder for Hugging Face's transformers")
    out: FilePath = setting("", "the folder to write, which must not exist")
    remote_code: bool = setting(
        False, "n-gram embeddings: write a class that trust_remote_code=True loads")

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        if not self.out:
            yield "out is missing: name the folder to write, as in out=exported."
        yield from checkpoint_problems(self.checkpoint)


if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for torch.
    launch("scripts.export:main", ExportSettings, __doc__)

import os
import sys
from pathlib import Path
from typing import Any

import atomic
from checkpointing import store
from checkpointing.checkpoint import Checkpoint
from checkpointing.run_folder import find_run
from checkpointing.weights import Weights, own_weights
from exporting import hugging_face
from exporting.card import model_card
from exporting.check import english_text, our_logits, text_ids
from terminal import readable_size, say


def main(settings: ExportSettings) -> int:
    out = Path(settings.out)
    if os.path.lexists(out):
        raise ValueError(f"out={out} exists: choose another name, or remove it.")
    run = find_run(Path(settings.runs_dir), settings.run)
    weights, state = load(run, settings.checkpoint)
    config, tokenizer = weights.config, weights.tokenizer
    layout = hugging_face.choose_layout(config, settings.remote_code)
    name = hugging_face.class_name(config, layout)
    parameters = sum(tensor.numel() for tensor in weights.tensors.values())
    text = english_text(tokenizer)
    ids = text_ids(tokenizer, text, config)
    logits = our_logits(config, weights.tensors, ids)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic.new_folder(out) as folder:
        hugging_face.write_folder(folder, weights, layout)
        # The check loads the exported weights: one copy at a time is in memory.
        del weights
        found, program = hugging_face.check_folder(folder, config, tokenizer, layout, text, ids,
                                                   logits)
        checked = (f"The largest difference of a logit in {program} is {found:.1e} of the largest "
                   f"logit, for {ids.numel():,} tokens of text.")
        card = model_card(run.name, config, name, state, parameters, checked)
        atomic.write_file(folder / "README.md", [card.encode()])
    size = sum(path.stat().st_size for path in out.iterdir())
    say(f"{checked}\nWrote {out} ({readable_size(size)}), which {name} loads.")
    return 0


def load(run: Path, which: str) -> tuple[Weights, dict[str, Any]]:
    """The weights and the state of a checkpoint. Raises ValueError if there is none."""
    def read(found: Checkpoint) -> tuple[Weights, dict[str, Any]]:
        return own_weights(found), found.state

    if which.isdecimal():
        return store.load_step(run / "checkpoints", int(which), read)
    loaded = store.load_checkpoint(run / "checkpoints", which, read,
                                   lambda text: say(text, sys.stderr))
    if loaded is None:
        raise ValueError(f"{run} has no checkpoint.")
    return loaded
