"""Convert weights from the tensors of other programs, and to them, by the tables in layouts.py.

Knows tensors only: opens no file.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from model.config import GPTConfig
from model.formats import shown
from model.layouts import Entry, table

# Prefixes that torch.compile and the class with the head put before the names.
PREFIX = re.compile(r"(_orig_mod\.)?(transformer\.)?")
# Masks and tables, which some versions store.
BUFFER = re.compile(r"(^|\.)h\.\d+\.attn\.(bias|masked_bias)$|rotary_emb\.inv_freq$")


def weights_from(layout: str, config: GPTConfig,
                 tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `GPT(config)` from published tensors, in fp32.

    Raises ValueError for a tensor that is missing, unknown, or of another shape or type.
    """
    # The table of the layout's tensors, and the given names of these.
    entries = table(layout, config)
    names = match_names(layout, entries, list(tensors))

    # The parts of each of our tensors, by their first row.
    parts: dict[str, dict[int, Tensor]] = {}
    for entry in entries:
        if entry.published not in names:
            continue
        name = names[entry.published]
        check_tensor(layout, entry, name, tensors[name])
        restored = entry.restore(tensors[name])
        if not entry.ours:
            if not (restored == entry.fill).all():
                raise ValueError(f"The weights have {shown(name)} with values other than "
                                 f"{entry.fill:g}, which this configuration does not support.")
            continue
        # Two published tensors can hold the same part: a tied head, and the gate of squared relu.
        start = entry.rows.start if entry.rows else 0
        known = parts.setdefault(entry.ours, {}).setdefault(start, restored)
        if known is not restored and not torch.equal(known, restored):
            raise ValueError(f"The weights have {shown(name)} with other values than those of "
                             f"{entry.ours}, which must be equal.")

    # Only the stacked queries, keys and values have several parts.
    state = {}
    for ours, by_start in parts.items():
        rows = [by_start[start] for start in sorted(by_start)]
        state[ours] = rows[0] if len(rows) == 1 else torch.cat(rows)
    return state


def match_names(layout: str, entries: list[Entry], given: list[str]) -> dict[str, str]:
    """The given name of each published tensor. Raises ValueError for missing and unknown ones."""
    # The given names without a prefix.
    plain: dict[str, str] = {}
    for name in given:
        if BUFFER.search(name):
            continue
        short = PREFIX.sub("", name, count=1)
        if short in plain:
            raise ValueError(f"The weights have {shown(short)} twice, as {shown(plain[short])} and "
                             f"{shown(name)}.")
        plain[short] = name

    # Take those of the table, which leaves the unknown ones.
    names: dict[str, str] = {}
    missing: list[str] = []
    for entry in entries:
        name = plain.pop(PREFIX.sub("", entry.published, count=1), None)
        if name is not None:
            names[entry.published] = name
        elif not entry.optional:
            missing.append(entry.published)
    unknown = sorted(plain.values())

    # Nothing may be missing or left.
    if missing:
        other = f" They have {shown(unknown[0])}, which {layout} does not have." if unknown else ""
        raise ValueError(f"The weights lack {listed(missing)} that this configuration of {layout} "
                         f"has.{other}")
    if unknown:
        raise ValueError(f"The weights have {listed(unknown)} that this configuration of {layout} "
                         "does not have.")
    return names


def check_tensor(layout: str, entry: Entry, name: str, tensor: Tensor) -> None:
    """Raise ValueError if a tensor, in the file under `name`, has another shape or type."""
    if tuple(tensor.shape) != entry.shape:
        raise ValueError(f"The weights have {shown(name)} of the shape {list(tensor.shape)}; "
                         f"this configuration of {layout} has {list(entry.shape)}.")
    if not tensor.is_floating_point():
        raise ValueError(f"The weights have {shown(name)} of the type {tensor.dtype}; "
                         "supported are floating-point types.")


class Published(Mapping[str, Tensor]):
    """Tensors of ours in a layout. Each is made when it is asked for, and shares memory if it can.

    So a file can be written without a second copy of all weights.
    """

    def __init__(self, entries: list[Entry], state: Mapping[str, Tensor]) -> None:
        self.entries = {entry.published: entry for entry in entries if not entry.optional}
        self.state = state

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].publish(self.state)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def weights_to(layout: str, config: GPTConfig, state: Mapping[str, Tensor]) -> Published:
    """The published tensors of a state dict of `GPT(config)`."""
    return Published(table(layout, config), state)


def listed(names: list[str]) -> str:
    """The first of some tensors, and the number of the others."""
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{shown(names[0])}{rest}"
