"""Which settings identify a run, and which may change when it resumes.

Each setting is of one kind. docs/runs.md explains the kinds with the same table.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from setting import as_word
from terminal import escaped

# The first pattern that matches a setting's name decides. `free` settings may change at any time,
# `extendable` ones when the run resumes, `machine` ones only by the user's wish; `identity` makes
# another run. `world_size` is the number of processes that torchrun starts.
KINDS = {
    "free": "name auto_name runs_dir restart allow_drift init_from init_source model_given "
    "data.path data.val_path data.hub_revision training.sample_tokens training.recompute logger.*",
    "extendable": "training.max_steps training.max_seconds training.patience training.eval_every "
    "training.eval_tokens training.eval_tasks training.checkpoint_every training.keep_last "
    "training.on_save_error training.on_nonfinite training.nonfinite_limit",
    "machine": "training.device training.threads training.compile training.deterministic "
    "training.shard world_size",
    "identity": "seed init_fingerprint model.* data.* optim.* training.batch_size "
    "training.tokens_per_step training.precision",
}
MICRO_BATCHES = ("training.batch_size", "training.tokens_per_step")
# The text and the settings of the data decide these.
OF_THE_TOKENS = ("data.prepared", "data.tokenizer_fingerprint", "model.vocab_size")
# The old and the new value of each setting that has changed.
Changes = dict[str, tuple[Any, Any]]


def kind(setting: str) -> str:
    """The kind of a setting. Raises KeyError for a name that matches no pattern."""
    for name, patterns in KINDS.items():
        if any(fnmatchcase(setting, pattern) for pattern in patterns.split()):
            return name
    raise KeyError(setting)


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """Nested settings as {"model.n_layer": 4, ...}."""
    return dict(flat_pairs(values))


def flat_pairs(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The full name and the value of each of nested settings."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat_pairs(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def differences(old: dict[str, Any], new: dict[str, Any]) -> Changes:
    """The settings that differ, with both values; None for a missing one."""
    before, after = flat(old), flat(new)
    pairs = {key: (before.get(key), after.get(key)) for key in before | after}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def identity_differences(old: dict[str, Any], new: dict[str, Any]) -> Changes:
    """The differences that make `old` and `new` two runs.

    A setting that only an older version had is one of them.
    """
    before, after = flat(old), flat(new)
    # A step on the same sequences, in other micro-batches, is the same step.
    same_tokens = tokens_per_step(before) == tokens_per_step(after) is not None
    ignored = MICRO_BATCHES if same_tokens else ()
    return {key: pair for key, pair in differences(before, after).items()
            if key not in ignored and (key not in after or kind(key) == "identity")}


def tokens_per_step(values: dict[str, Any]) -> int | None:
    """The tokens of a step by flat settings; None where they, perhaps damaged, do not tell."""
    tokens = values.get("training.tokens_per_step")
    if isinstance(tokens, int):
        return tokens
    batch_size, block_size = values.get("training.batch_size"), values.get("model.block_size")
    if isinstance(batch_size, int) and isinstance(block_size, int):
        return batch_size * block_size
    return None


def in_short(changes: Changes) -> list[str]:
    """Differences as a folder's name has them, without those that follow from others."""
    follow = ("model.vocab_size", "data.tokenizer_fingerprint")
    independent = {key: pair for key, pair in changes.items() if key not in follow}
    changes = independent or changes
    return [f"{key.rpartition('.')[2]}={new}" for key, (_, new) in changes.items()]


def listed(changes: Changes) -> str:
    """Differences in a sentence.

    Fingerprints are left out: a reader learns instead that the text or a setting of it has changed.
    """
    hidden = (*OF_THE_TOKENS, "init_fingerprint")
    shown = {key: pair for key, pair in changes.items() if key not in hidden}
    parts = [in_one_line(f"{key} was {as_word(old) or 'empty'}, now {as_word(new) or 'empty'}")
             for key, (old, new) in shown.items()]
    # A changed setting of the text explains the changed fingerprint.
    if changes.keys() & set(OF_THE_TOKENS) and not any(key.startswith("data.") for key in shown):
        parts.insert(0, "the training text has changed")
    if "init_fingerprint" in changes:
        parts.insert(0, "the weights of init_from have changed")
    more = [f"and {len(parts) - 10} more"] if len(parts) > 10 else []
    return "; ".join(parts[:10] + more)


def in_one_line(text: str) -> str:
    """The beginning of a text from a file, for a message: in one line, no control characters."""
    return escaped(text[:200], keep="")
