"""Write a trained model for other programs, and check that it computes the same there.

  python -m scripts.export run=first out=FOLDER                      # for transformers
  python -m scripts.export run=pydocs out=FOLDER remote_code=true    # with n-gram embeddings
  python -m scripts.export run=first out=FOLDER push_to=OWNER/NAME   # and the Hugging Face Hub
  python -m scripts.export run=first format=gguf out=FILE.gguf       # for llama.cpp

docs/weights.md lists the models that each format has.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conf.launch import launch
from conf.settings import checkpoint_problems
from optional import import_optional
from setting import FilePath, setting

# OWNER/NAME of the Hugging Face Hub.
REPOSITORY = r"[\w-][\w.-]*/[\w-][\w.-]*"


@dataclass(frozen=True)
class ExportSettings:
    """The settings of an export."""

    run: FilePath = setting("", "name or folder of a run; empty: the run that was trained last")
    runs_dir: FilePath = setting("runs", "folder that contains the runs' folders")
    checkpoint: str = setting("best", "best, last, or the number of a step")
    format: Literal["hf", "gguf"] = setting(
        "hf", "hf: a folder for Hugging Face's transformers; gguf: a file for llama.cpp")
    out: FilePath = setting("", "the folder or file to write, which must not exist")
    remote_code: bool = setting(
        False, "n-gram embeddings: write a class that trust_remote_code=True loads")
    push_to: str = setting(
        "", "also upload the folder to this model of the Hugging Face Hub, OWNER/NAME; a new one "
            "is private")

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        if not self.out:
            yield "out is missing: name the folder or file to write, as in out=exported."
        elif self.format == "gguf" and Path(self.out).suffix != ".gguf":
            yield f"out={self.out} must end in .gguf."
        if self.format == "gguf" and self.remote_code:
            yield "remote_code=true is only for format=hf: leave it out."
        if self.push_to and self.format != "hf":
            yield f"push_to={self.push_to} is only for format=hf: leave it out."
        elif self.push_to and not re.fullmatch(REPOSITORY, self.push_to, re.ASCII):
            yield f"push_to={self.push_to} must be OWNER/NAME, as on the Hugging Face Hub."
        yield from checkpoint_problems(self.checkpoint)


if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for torch.
    launch("scripts.export:main", ExportSettings, __doc__)

import os
from types import ModuleType
from typing import Any

import atomic
from checkpointing import store
from checkpointing.find_runs import find_run
from checkpointing.weights import Weights, own_weights
from exporting import gguf_file, hugging_face
from exporting.card import model_card
from exporting.check import compare, reference
from terminal import first_line, readable_size, say


def main(settings: ExportSettings) -> int:
    # Find what is missing before anything is read.
    out = Path(settings.out)
    if os.path.lexists(out):
        raise ValueError(f"out={out} exists: choose another name, or remove it.")
    if settings.push_to:
        import_hub()

    # Read the checkpoint, and write it in the other format.
    run = find_run(Path(settings.runs_dir), settings.run)
    weights, state = store.load_of_run(run, settings.checkpoint,
                                       lambda found: (own_weights(found), found.state))
    out.parent.mkdir(parents=True, exist_ok=True)
    if settings.format == "gguf":
        program = export_gguf(out, weights, run.name)
    else:
        program = export_hugging_face(out, weights, run.name, state, settings.remote_code)

    # Say what was written, and upload it if that is asked for.
    files = [out] if out.is_file() else list(out.iterdir())
    size = sum(path.stat().st_size for path in files)
    say(f"Wrote {out} ({readable_size(size)}), for {program}.")
    if settings.push_to:
        say(f"Uploaded to {push(out, settings.push_to)}")
    return 0


def export_hugging_face(out: Path, weights: Weights, name: str, state: dict[str, Any],
                        remote_code: bool) -> str:
    """Write and check a folder; return the class that loads it."""
    config = weights.config
    layout = hugging_face.choose_layout(config, remote_code)
    class_name = hugging_face.class_name(config, layout)
    parameters = sum(tensor.numel() for tensor in weights.tensors.values())
    text, ids, logits = reference(weights)
    with atomic.new_folder(out) as folder:
        hugging_face.write_folder(folder, weights, layout)
        # The check loads the written weights: one copy at a time is in memory.
        weights.tensors.clear()
        theirs, program = hugging_face.check_folder(folder, weights, layout, text, ids)
        checked = compare(logits, theirs, program, ids.size(1))
        card = model_card(name, config, class_name, state, parameters, checked)
        atomic.write_file(folder / "README.md", [card.encode()])
    say(checked)
    return class_name


def export_gguf(out: Path, weights: Weights, name: str) -> str:
    """Write and check a file; return the program that runs it, and its architecture there."""
    # First raise ValueError for a model that GGUF files lack: the package would not help it.
    layout = gguf_file.choose_layout(weights.config)
    gguf_file.splitter(weights.tokenizer)
    gguf_file.import_gguf()
    _, ids, logits = reference(weights)
    with atomic.NewFile(out) as file:
        try:
            gguf_file.write_file(file.partial, weights, layout, name)
        except OSError as error:
            # The errors of the package and of NumPy name no file.
            raise OSError(f"{out} could not be written ({error.strerror or error}): is the disk "
                          "full?") from None
        weights.tensors.clear()
        theirs = gguf_file.read_back(file.partial, weights, layout, ids)
        say(compare(logits, theirs, "this model with the tensors of the file", ids.size(1)))
    return f"llama.cpp (architecture {layout.removeprefix('gguf-')})"


def import_hub() -> ModuleType:
    """The package. Raises ValueError if it is missing, or if there is no account to upload with."""
    hub = import_optional("huggingface_hub", "push_to needs the package huggingface_hub",
                          "huggingface_hub")
    if not hub.get_token():
        raise ValueError("push_to needs an account of the Hugging Face Hub: run hf auth login, or "
                         "set HF_TOKEN.")
    return hub


def push(folder: Path, name: str) -> str:
    """Upload a folder to the model OWNER/NAME, which is created private; return its address.

    Raises OSError with one sentence if that fails.
    """
    hub = import_hub()
    hub.utils.disable_progress_bars()
    api = hub.HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by nanohydra")
    except Exception as error:
        # Errors of the connection and of the server have no common class.
        raise OSError(f"push_to={name} failed ({first_line(error)[:300]}). {folder} is complete: "
                      f"upload it later with hf upload {name} {folder}") from None
    return str(address)
