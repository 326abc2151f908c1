"""Find weights by name: of a run, of a checkpoint, of a published model, or of another program."""

from pathlib import Path

from checkpointing import pretrained, store
from checkpointing.checkpoint import Checkpoint
from checkpointing.find_runs import find_run
from checkpointing.spec import MANIFEST
from checkpointing.weight_files import other_kind
from checkpointing.weights import Weights, own_weights


def find_weights(name: str, runs_dir: Path) -> Weights:
    """The weights that `init_from=NAME` means; docs/weights.md lists the kinds of names.

    Raises ValueError with one sentence if there are none, or if they are invalid.
    """
    path = Path(name)
    # A published model, one of our checkpoints, a folder of Hugging Face, or a file of nanoGPT.
    if name in pretrained.PUBLISHED:
        return pretrained.read_folder(pretrained.find_published(name))
    if (path / MANIFEST).exists():
        return own_weights(Checkpoint.open(path))
    if (path / pretrained.CONFIG).exists():
        return pretrained.read_folder(path)
    if (path / pretrained.NANOGPT).exists():
        return pretrained.read_nanogpt(path / pretrained.NANOGPT)
    if path.is_file():
        refuse_other_files(name, path)
        return pretrained.read_nanogpt(path)

    # The name or folder of a run.
    try:
        run = find_run(runs_dir, name)
    except ValueError as error:
        if path.is_dir():
            raise ValueError(
                f"init_from={name} is a folder without weights: it has neither the checkpoints of "
                f"a run nor {pretrained.CONFIG} nor {pretrained.NANOGPT}.") from None
        # The values of nanoGPT's init_from include scratch and resume.
        names = ", ".join(pretrained.PUBLISHED)
        raise ValueError(f"{str(error).replace(f'run={name} ', f'init_from={name} ')} Published "
                         f"models are {names}. Without init_from=, a run starts from random "
                         f"weights, or resumes.") from None
    return store.load_of_run(run, "best", own_weights)


def refuse_other_files(name: str, path: Path) -> None:
    """Raise ValueError for a file that is no checkpoint of nanoGPT."""
    kind, advice = other_kind(path), ""
    if path.suffix in (".safetensors", ".gguf", ".bin"):
        kind = "one file of a model"
    elif kind == "a text file":
        advice = f" To train on a text, pass data=text data.path={path}."
    if kind:
        raise ValueError(f"init_from={name} is {kind}: name a run, a folder with "
                         f"{pretrained.CONFIG} and {pretrained.TENSORS}, or a checkpoint of "
                         f"nanoGPT ({pretrained.NANOGPT}).{advice}")
