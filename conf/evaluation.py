"""The settings of eval.py.

They are here, below `evaluation`, since the command line checks them before it imports torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from conf.settings import ModelChoice, checkpoint_problems
from data.config import TokenType
from setting import FilePath, FilePaths, setting


@dataclass(frozen=True)
class TextConfig:
    """The text whose loss is measured."""

    path: FilePath = setting(
        "", "files of text, or of tokens (.bin, .npy); empty: each run's own validation split")
    text_field: str = setting("text", "the field of a record with its text; data.text: nested")
    on_bad_record: Literal["stop", "skip"] = setting("stop", "the reaction to records without text")
    encoding: str = setting("", "of text files without a byte order mark; empty: UTF-8")
    errors: Literal["strict", "replace"] = setting("strict", "undecodable bytes: stop, or U+FFFD")
    dtype: TokenType = setting("auto", "type of the tokens in .bin files without a header")


@dataclass(frozen=True)
class EvalSettings(ModelChoice):
    """The settings of an evaluation."""

    checkpoint: str = setting("best", "best, last, or the number of a step")
    data: TextConfig = field(default_factory=TextConfig)
    eval_tokens: int | None = setting(None, "the most tokens of the text to read; null: all", ge=1)
    tasks: FilePaths = setting(
        "", "standard tasks, as in hellaswag,piqa, or files of requests (docs/evaluation.md)")
    lm_eval: FilePaths = setting("", "tasks of lm-evaluation-harness: names or .yaml files")
    num_fewshot: int | None = setting(
        None, "examples before each question of lm_eval=; null: as each task says", ge=0)
    apply_chat_template: bool = setting(
        False, "ask the questions of lm_eval= as messages, of a model of conversations")
    limit: int | None = setting(None, "documents of each task; null: all of them", ge=1)
    batch_tokens: int = setting(8192, "tokens that are read at once", ge=1)
    out: FilePath = setting("", "the JSON file; empty: evaluation.json in each run's folder")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from checkpoint_problems(self.checkpoint)
        if self.init_from and self.measures_loss and not self.data.path:
            yield (f"init_from={self.init_from} has no validation split: name a text, as in "
                   "data.path=book.txt, or tasks=.")
        # Settings of tasks, and settings of a text.
        if self.limit and not self.has_tasks:
            yield f"limit={self.limit} is for tasks=: use eval_tokens= to read less of a text."
        for name in ("num_fewshot", "apply_chat_template"):
            value = getattr(self, name)
            if value is not None and value is not False and not self.lm_eval:
                yield (f"{name}={value} is for lm_eval=; tasks= has variants with examples, as in "
                       "arc_easy/rc_5shot.")
        if self.eval_tokens and not self.measures_loss:
            yield (f"eval_tokens={self.eval_tokens} is for a text: use limit= to read less of each "
                   "task.")
        if self.out and Path(self.out).exists() and not Path(self.out).is_file():
            yield f"out={self.out} is a folder or a device: name a file, as in out=results.json."

    @property
    def has_tasks(self) -> bool:
        return bool(self.tasks or self.lm_eval)

    @property
    def measures_loss(self) -> bool:
        """Whether the loss on a text is measured: with tasks, only if a text is named."""
        return bool(self.data.path) or not self.has_tasks
