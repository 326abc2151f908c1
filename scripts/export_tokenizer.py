"""Write a run's tokenizer in Hugging Face's format, for the packages tokenizers and transformers.

  python -m scripts.export_tokenizer run=pydocs out=tokenizer.json

It gives the same ids, except that <|endoftext|> in a text is encoded as the special token, unless
the program that loads the file sets `encode_special_tokens = True`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.launch import launch
from setting import FilePath, setting


@dataclass(frozen=True)
class ExportTokenizerSettings:
    """The settings of the export."""

    run: FilePath = setting("", "name or folder of a run; empty: the run that was trained last")
    runs_dir: FilePath = setting("runs", "the folder that the name is in")
    out: FilePath = setting("", "the file; empty: tokenizer.json in the run's folder")

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        if self.out and Path(self.out).suffix != ".json":
            yield f"out={self.out} must end in .json."


if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for torch.
    launch("scripts.export_tokenizer:main", ExportTokenizerSettings, __doc__)

import json

import atomic
from checkpointing import store
from checkpointing.find_runs import find_run
from checkpointing.weights import tokenizer_of
from data.hugging_face import to_hugging_face
from terminal import say


def main(settings: ExportTokenizerSettings) -> int:
    run = find_run(Path(settings.runs_dir), settings.run)
    out = Path(settings.out) if settings.out else run / "tokenizer.json"
    tokenizer = store.load_of_run(run, "last", tokenizer_of)
    content = json.dumps(to_hugging_face(tokenizer), ensure_ascii=False).encode()
    # The file may be one of nanohydra's own tokenizers, which have the same name.
    if out.exists() and (not out.is_file() or out.read_bytes() != content):
        raise ValueError(f"{out} exists and is not this tokenizer: remove it, or name another file "
                         f"with out=FILE.")
    atomic.write_bytes(out, content)
    say(f"Wrote {out}: {tokenizer.vocab_size:,} tokens, for tokenizers.Tokenizer.from_file.")
    return 0
