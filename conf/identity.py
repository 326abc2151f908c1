"""What makes a run that run: each setting is of one kind, and the kind says what a change of it means.

docs/runs.md prints this table.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from terminal import escaped

MICRO_BATCHES = ("training.batch_size", "training.tokens_per_step")

# The first pattern that fits a setting's name decides.
KINDS = {
    "free": "name auto_name runs_dir restart allow_drift data.path data.val_path data.hub_revision training.sample_tokens "
            "training.recompute logger.*",
    "extendable": "training.max_steps training.max_seconds training.patience training.eval_every training.eval_tokens "
                  "training.checkpoint_every training.keep_last training.on_save_error "
                  "training.on_nonfinite training.nonfinite_limit",
    "machine": "training.device training.threads training.compile training.deterministic",
    "identity": "seed model.* data.* optim.* training.batch_size training.tokens_per_step training.precision",
}


def kind(setting: str) -> str:
    """The kind of a setting. Raises KeyError for one that the table does not have."""
    for name, patterns in KINDS.items():
        if any(fnmatchcase(setting, pattern) for pattern in patterns.split()):
            return name
    raise KeyError(setting)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"model.n_layer": 4, ...}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs, with both values; None stands for what one of the two does not have."""
    before, after = flat(old), flat(new)
    return {key: (before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)}


def identity_differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that make two runs of `old` and `new`; one that only an older version had is among them."""
    before, after = flat(old), flat(new)
    changes = {key: values for key, values in differences(before, after).items()
               if key not in after or kind(key) == "identity"}
    if tokens_per_step(before) == tokens_per_step(after) is not None:
        # A step has the same sequences, in other micro-batches.
        changes = {key: values for key, values in changes.items() if key not in MICRO_BATCHES}
    return changes


def tokens_per_step(values: dict[str, Any]) -> int | None:
    """The tokens of a step by flat settings; None where these, which we may not have written, do not say it."""
    if isinstance(values.get("training.tokens_per_step"), int):
        return values["training.tokens_per_step"]
    batch_size, block_size = values.get("training.batch_size"), values.get("model.block_size")
    if isinstance(batch_size, int) and isinstance(block_size, int):
        return batch_size * block_size
    return None


# What the text and the settings of the data decide.
OF_THE_TOKENS = ("data.prepared", "data.tokenizer_fingerprint", "model.vocab_size")


def in_short(changes: dict[str, tuple[Any, Any]]) -> list[str]:
    """Differences as a folder's name shows them, without those that follow from others."""
    follow = ("model.vocab_size", "data.tokenizer_fingerprint")
    telling = {key: values for key, values in changes.items() if key not in follow}
    return [f"{key.rpartition('.')[2]}={new}" for key, (_, new) in (telling or changes).items()]


def listed(changes: dict[str, tuple[Any, Any]]) -> str:
    """Differences in words. Fingerprints say nothing to a reader: the text, or a setting of the data, has changed."""
    words = [in_one_line(f"{key} was {old} and is now {new}") for key, (old, new) in changes.items()
             if key not in OF_THE_TOKENS]
    if len(words) < len(changes) and not any(key.startswith("data.") for key in changes if key not in OF_THE_TOKENS):
        words.insert(0, "the text is not the one that was trained on")
    return ", ".join(words[:10]) + (f", and {len(words) - 10} more" if len(words) > 10 else "")


def in_one_line(text: str) -> str:
    """The beginning of a text that we did not write, for use inside a message: without control characters."""
    return escaped(text[:200], keep="")
