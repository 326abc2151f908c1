"""The processes that share the work of one run. Today a run has one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """The number of processes, and this process's rank among them."""

    rank: int = 0
    size: int = 1
