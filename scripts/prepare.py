"""Prepare tokens and do nothing else. Training does the same when they are missing.

  python -m scripts.prepare data=shakespeare
  python -m scripts.prepare data=text data.path=book.txt data.tokenizer=bpe data.vocab_size=4096

They go to data/prepared, or where NANOHYDRA_DATA says, in a folder named by what they were made from.
"""

from __future__ import annotations

from conf.launch import launch
from conf.schema import Settings
from data.prepare import describe, prepare


def main(settings: Settings) -> int:
    print(describe(prepare(settings.data)))
    return 0


if __name__ == "__main__":
    launch(main, "config", __doc__)
