"""The settings of `python -m scripts.scaling`."""

from collections.abc import Iterator
from dataclasses import dataclass

from conf.settings import Settings
from setting import FilePath, FilePaths, ScriptSettings, setting


@dataclass(frozen=True)
class ScalingSettings(ScriptSettings):
    """The settings of a grid and of its law; all others are those of train.py."""

    sweep: FilePath = setting("isoflop", "the sizes: a name in conf/sweep, or a YAML file")
    name: str = setting("", "the name of the runs' folder; empty: that of the file")
    runs_dir: FilePath = setting("runs", "folder that contains the runs' folder")
    hours: float | None = setting(None, "the estimated time to train a new grid", gt=0)
    budgets: int = setting(4, "the number of budgets at which sizes are compared", ge=3)
    ratio: float = setting(2.0, "each budget divided by the one before", gt=1)
    jobs: int = setting(1, "the number of trainings at a time", ge=1)
    dry_run: bool = setting(False, "print the grid, and train nothing")
    predict: float | None = setting(None, "FLOPs: print the best size and tokens for them", gt=0)
    held_out: FilePaths = setting("", "runs, separated by commas, to compare with the law")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from Settings(name=self.name, runs_dir=self.runs_dir).problems()
