"""Compare the best learning rates of narrow and wide models, from the runs of a grid.

  python -m scripts.transfer runs=lr-adamw,lr-muon
  python -m scripts.transfer runs=lr-adamw,lr-muon out=transfer.png

docs/transfer.md has the commands of such grids. Runs that differ in their seeds are averaged.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.launch import launch
from report.figures import picture_problems
from setting import FilePath, FilePaths, setting


@dataclass(frozen=True)
class TransferSettings:
    """The settings of a comparison of learning rates."""

    runs: FilePaths = setting("", "names or folders of grids, separated by commas")
    runs_dir: FilePath = setting("runs", "the folder that the names are in")
    out: FilePath = setting("", "also draw a picture: .png, .svg or .pdf; needs matplotlib")

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        yield from picture_problems(self.out)


if __name__ == "__main__":
    launch("scripts.transfer:main", TransferSettings, __doc__)

import math
from collections import defaultdict
from itertools import cycle
from statistics import fmean

from report.colors import COLORS
from report.figures import as_image, new_figure, write_picture
from report.history import History, open_history
from report.labels import label_numbers, number_text
from report.runs import are_numbers, choose
from terminal import say

# Mean losses by rate, by width, and by optimizer and parametrization.
Losses = dict[tuple[str, str], dict[int, dict[float, float]]]
RATES = {"adamw": "optim.lr", "muon": "optim.muon_lr"}


def main(settings: TransferSettings) -> int:
    chosen, _ = choose(Path(settings.runs_dir), settings.runs)
    losses = mean_losses([open_history(folder, name) for folder, name in chosen])
    for line in describe(losses):
        say(line)
    if settings.out:
        write_picture(settings.out, lambda kind: draw(losses, kind))
    return 0


def mean_losses(runs: list[History]) -> Losses:
    """Raises ValueError if fewer than two widths or two rates are finished."""
    # Collect the losses of runs that differ only in their seeds.
    found: dict[tuple[tuple[str, str], int, float], list[float]] = defaultdict(list)
    for run in runs:
        if run.finished and run.last_loss is not None:
            optimizer = str(run.settings.get("optim.optimizer"))
            group = optimizer, str(run.settings.get("model.parametrization", "standard"))
            width = run.settings.get("model.n_embd")
            rate = run.settings.get(RATES.get(optimizer))
            if not are_numbers([width, rate]):
                raise ValueError(f"{run.name} has no learning rate of {' or '.join(RATES)}, or no "
                                 "width: leave it out.")
            # No number is less than NaN, so that it could stay the lowest loss.
            diverged = math.isnan(run.last_loss)
            found[group, width, rate].append(math.inf if diverged else run.last_loss)

    # Average them, by width and rate in ascending order.
    losses: Losses = defaultdict(lambda: defaultdict(dict))
    for (group, width, rate), of_seeds in sorted(found.items()):
        losses[group][width][rate] = fmean(of_seeds)

    # A minimum needs several rates, and a comparison several widths.
    for group, by_width in losses.items():
        if len(by_width) < 2 or min(map(len, by_width.values())) < 2:
            raise ValueError(f"The finished runs of {' and '.join(group)} do not have two widths "
                             "with two rates each: finish the grid.")
    if not losses:
        raise ValueError("None of the runs is finished: finish the grid.")
    return losses


def describe(losses: Losses) -> Iterator[str]:
    """The best rate of each width, and how well the narrowest model's suits the widest."""
    for (optimizer, parametrization), by_width in losses.items():
        # The best rate of each width, and how far apart these are in the grid.
        rates = rates_of(by_width)
        best = {width: min(of_width, key=of_width.get) for width, of_width in by_width.items()}
        parts = [f"{number_text(rate, 3)} at width {width} (loss {by_width[width][rate]:.3f})"
                 for width, rate in best.items()]
        positions = [rates.index(rate) for rate in best.values()]
        yield (f"{optimizer}, {parametrization}: best rate {', '.join(parts)}; "
               f"{max(positions) - min(positions)} of {len(rates) - 1} steps of the grid apart")

        # The loss of the widest model with the best rate of the narrowest.
        narrow, wide = min(by_width), max(by_width)
        if best[narrow] in by_width[wide]:
            loss = by_width[wide][best[narrow]]
            yield (f"  With {number_text(best[narrow], 3)}, width {wide} has a loss of {loss:.3f}, "
                   f"{loss - by_width[wide][best[wide]]:.3f} above its lowest.")


def rates_of(by_width: dict[int, dict[float, float]]) -> list[float]:
    return sorted({rate for of_width in by_width.values() for rate in of_width})


def draw(losses: Losses, kind: str) -> bytes:
    """A picture: the loss by rate, a line for each width, a panel for each group."""
    with new_figure(3 * len(losses), 3, "learning rate transfer") as figure:
        panels = figure.subplots(1, len(losses), sharey=True, squeeze=False)[0]
        for axes, (group, by_width) in zip(panels, losses.items(), strict=True):
            for color, (width, of_width) in zip(cycle(COLORS), by_width.items(), strict=False):
                axes.plot(list(of_width), list(of_width.values()), color=color, marker="o",
                          markersize=3, label=f"width {width}")
                # A star marks the best rate.
                best = min(of_width, key=of_width.get)
                axes.plot(best, of_width[best], "*", color=color, markersize=11)
            label_numbers(axes, rates_of(by_width))
            axes.set_title(", ".join(group))
            axes.set_xlabel("learning rate")
        panels[0].set_ylabel("validation loss (nats per token)")
        panels[0].legend()
        return as_image(figure, kind)
