"""One page about runs that opens from disk, without a network: curves, leaderboard, importance, samples, settings."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import atomic
from progress import ProgressBar
from report.curves import (
    COLORS,
    DIAGNOSTICS,
    MOST_BANDS,
    both_losses_svg,
    color,
    curves_png,
    diagnostic_svg,
    losses_svg,
    number_texts,
    slice_svg,
    slices_png,
)
from report.history import AXES, BITS, LOSS, History, best_first, differing, open_history
from report.importance import FEWEST, importance
from terminal import counted, escaped

TEMPLATE = Path(__file__).with_suffix(".html")
MOST_COLUMNS = 6  # runs that stand side by side in a table
MOST_SLICES = 12
MOST_SAMPLES = 60


def after_training(run: Path) -> str:
    """Write the report of a run that has just ended; returns a sentence that says where, or why there is none."""
    try:
        write([(run, run.name)], run / "report.html", run.name, pictures=False)
        missing = "" if find_spec("matplotlib") else ", without curves: they need matplotlib (pip install matplotlib)"
        return f"Report: {run / 'report.html'}{missing}"
    except Exception as error:  # training must not fail because a report does
        return f"No report was written: {error}"


def is_current(run: Path) -> bool:
    """Whether the run's report was written after its last metrics."""
    try:
        return (run / "report.html").stat().st_mtime_ns >= (run / "metrics.jsonl").stat().st_mtime_ns
    except FileNotFoundError:
        return False


def write(chosen: list[tuple[Path, str]], out: Path, title: str, pictures: bool = True) -> list[Path]:
    """Write the page about the chosen runs, and beside it the pictures as PNG; returns their paths.

    Raises ValueError for a folder that is not a run's, and if matplotlib is not installed.
    """
    runs = open_all(chosen)
    contents = {out: page(runs, escaped(title, keep="")).encode()}
    if pictures:
        contents[out.with_name(f"{out.stem}-curves.png")] = curves_png(runs)
        compared, keys = comparable(runs)
        if worth_slices(compared) and keys:
            numbers = {run: number for number, run in enumerate(runs)}
            contents[out.with_name(f"{out.stem}-slices.png")] = slices_png(compared, keys[:MOST_SLICES], numbers)
    for path, content in contents.items():
        atomic.write_bytes(path, content)
    return list(contents)


def open_all(chosen: list[tuple[Path, str]]) -> list[History]:
    """The histories of the chosen runs, the best first."""
    few = len(chosen) < 20
    progress = ProgressBar(chosen, "Reading", unit="runs", leave=False, disable=few)
    return best_first([open_history(folder, name) for folder, name in progress])


def comparable(runs: list[History]) -> tuple[list[History], list[str]]:
    """The finished runs that can be compared, and the settings in which they differ."""
    keys = set(differing(runs))
    finished = [run for run in runs if run.finished and run.score is not None and keys <= run.settings.keys()]
    return finished, [key for key in differing(runs) if len({str(run.settings[key]) for run in finished}) > 1]


def worth_slices(compared: list[History]) -> bool:
    """Fewer dots than this show nothing that the leaderboard does not."""
    return len(compared) >= FEWEST


def page(runs: list[History], title: str) -> str:
    """The page about `runs`, the best first."""
    sections = (summary(runs, title), losses(runs), diagnostics(runs), leaderboard(runs), what_mattered(runs),
                samples(runs), comparison(runs))
    body = "\n".join(part for section in sections for part in section)
    return TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", escape(f"Report: {title}")).replace("{{body}}", body)


def summary(runs: list[History], title: str) -> Iterator[str]:
    yield f"<h1>{escape(title)}</h1>"
    best = runs[0]
    if best.best_loss is not None:
        by = f" in <code>{escape(best.name)}</code>, the best of {len(runs)} runs by {best.measure}" if len(runs) > 1 else ""
        yield (f"<p>Validation loss {best.best_loss:.4f}"
               + (f", {best.bits_per_byte:.4f} bits per byte" if best.bits_per_byte is not None else "")
               + f", at step {best.best_step:,}{by}.</p>")
    else:
        yield "<p>No validation loss yet.</p>"


def losses(runs: list[History]) -> Iterator[str]:
    """The losses against steps, tokens and seconds; training and validation in one picture if there is one run."""
    yield "<h2>Loss</h2>"
    if 1 < len(runs) <= len(COLORS):
        names = "".join(f'<span data-run="{number}">{swatch(number, len(runs))}{escape(run.name)}</span>'
                        for number, run in enumerate(runs))
        yield f'<p class="legend">{names}</p>'
    buttons = "".join(f'<button value="{axis}" aria-pressed="{str(axis == "steps").lower()}">{axis}</button>'
                      for axis in AXES)
    yield f'<div class="choice" role="group" aria-label="against">{buttons}</div>'
    try:
        for axis in AXES:
            pictures = both_losses_svg(runs[0], axis) if len(runs) == 1 else "".join(
                losses_svg(runs, which, axis) for which in ("validation", "training"))
            kind = "curves single" if len(runs) == 1 else "curves"
            yield f'<div class="{kind}" data-axis="{axis}"{"" if axis == "steps" else " hidden"}>{pictures}</div>'
    except ValueError as error:  # without matplotlib
        yield f"<p>{escape(str(error))}</p>"
        return
    yield f"<p>{' '.join(notes_on_losses(runs))}</p>"


def notes_on_losses(runs: list[History]) -> Iterator[str]:
    """How to read the pictures of losses."""
    yield "Training losses are smoothed over a fifteenth of the run" + (
        "; the pale line and band are the losses as they were." if len(runs) <= MOST_BANDS else ".")
    if runs[0].measure == BITS:
        yield ("The runs have different texts or tokenizers, so their losses are in bits per byte: losses per token "
               "could not be compared.")
        unknown = sum(run.unit is None and bool(len(run.training)) for run in runs)
        if unknown:
            yield f"{counted(unknown, 'run')} without a validation loss cannot be drawn."
    if len(runs) > len(COLORS):
        yield "The best run is orange, the others are paler the higher their loss."
    if len(runs) > 1:
        yield "Point at a row below to bring out its run."


def diagnostics(runs: list[History]) -> Iterator[str]:
    """Learning rate, gradient norm and speed, of those that were recorded."""
    recorded = [name for name in DIAGNOSTICS if any(name in run.diagnostics for run in runs)]
    if not recorded:
        return
    with suppress(ValueError):  # losses() has said that matplotlib is missing
        pictures = "".join(diagnostic_svg(runs, name) for name in recorded)
        yield f'<h2>{escape(", ".join(recorded).capitalize())}</h2><div class="slices">{pictures}</div>'


def leaderboard(runs: list[History]) -> Iterator[str]:
    """A table whose heads sort it; cells carry what to sort by."""
    columns: dict[str, Callable[[History], tuple[Any, str]]] = {
        "run": lambda run: (run.name, run.name),
        "state": lambda run: (run.state, run.state),
        LOSS: lambda run: shown(run.best_loss, ".4f"),
        "at step": lambda run: shown(run.best_step, ",d"),
        BITS: lambda run: shown(run.bits_per_byte, ".4f"),
    }
    for key in differing(runs) if len(runs) > 1 else []:
        texts = dict(zip(runs, number_texts([run.settings.get(key, "") for run in runs]), strict=True))
        columns[key] = lambda run, key=key, texts=texts: (run.settings.get(key, ""), texts[run])
    columns |= {
        "last validation loss": lambda run: shown(run.last_loss, ".4f"),
        "training loss": lambda run: shown(run.train_loss, ".4f"),
        "tokens": lambda run: shown(run.reached[1], ",.0f"),
        "time": lambda run: (run.reached[2], duration(run.reached[2])),
        "tokens/s": lambda run: shown(run.reached[1] / run.reached[2] if run.reached[2] else None, ",.0f"),
    }
    numeric = {name for name, cell in columns.items() if any(isinstance(cell(run)[0], int | float) for run in runs)}
    yield "<h2>Leaderboard</h2>" if len(runs) > 1 else "<h2>Result</h2>"
    rows = []
    for number, run in enumerate(runs):
        cells = []
        for name, cell in columns.items():
            value, text = cell(run)
            dot = swatch(number, len(runs)) if name == "run" and len(runs) > 1 else ""
            exact = f' title="{escape(str(value))}"' if name in run.settings and str(value) != text else ""
            kind = "name" if name == "run" else "number" if name in numeric else ""
            cells.append(f'<td class="{kind}" data-value="{escape(str(value))}"{exact}>{dot}{escape(text)}</td>')
        rows.append(f'<tr data-run="{number}">{"".join(cells)}</tr>')
    first = {runs[0].measure: ' aria-sort="ascending"'}
    heads = "".join(f"<th{first.get(name, '')}{' class=number' if name in numeric else ''}>"
                    f"<button>{escape(name)}</button></th>" for name in columns)
    yield (f'<div class="wide tall"><table id="leaderboard"><thead><tr>{heads}</tr></thead>'
           f"<tbody>{''.join(rows)}</tbody></table></div>")


def what_mattered(runs: list[History]) -> Iterator[str]:
    """Importance and slices of the settings that differ."""
    if not worth_slices(runs):
        return
    whole, keys = comparable(runs)
    if not keys:
        return
    yield "<h2>What mattered</h2>"
    try:
        shares = importance(whole, keys)
        rows = "".join(f'<tr><td><code>{escape(key)}</code></td><td class="number">{share:.0%}</td>'
                       f'<td><span class="bar" style="width: {16 * share:.2f}rem"></span></td></tr>'
                       for key, share in shares.items())
        yield (f"<p>The share of each setting in how the {whole[0].measure} of {len(whole)} finished runs differs "
               f'(fANOVA, by Optuna): an estimate, a rough one for few runs.</p><table id="importance">{rows}</table>')
        keys = list(shares)
    except ValueError as error:
        yield f"<p>{escape(str(error))}</p>"
    numbers = {run: number for number, run in enumerate(runs)}
    if not worth_slices(whole):
        return
    with suppress(ValueError):  # losses() has said that matplotlib is missing
        pictures = "".join(slice_svg(whole, key, numbers) for key in keys[:MOST_SLICES])
        yield f'<div class="slices">{pictures}</div>'
    if len(keys) > MOST_SLICES:
        yield f"<p>And {len(keys) - MOST_SLICES} more settings, which are not drawn.</p>"


def samples(runs: list[History]) -> Iterator[str]:
    """What the runs wrote last, side by side, the best first, and before, folded away; of a single run all of it."""
    wrote = [(number, run) for number, run in enumerate(runs) if run.samples]
    if not wrote:
        return
    yield "<h2>Samples</h2>" + ("<p>Of the best runs.</p>" if len(wrote) > MOST_SAMPLES else "")
    cards = []
    for number, run in wrote[:MOST_SAMPLES]:
        texts = [f"<p>step {step:,}</p><blockquote>{escape(text)}</blockquote>"
                 for step, text in reversed(run.samples[-10:])]
        if len(runs) == 1:
            cards = [f'<div class="card">{text}</div>' for text in texts]
            break
        earlier = f"<details><summary>earlier</summary>{''.join(texts[1:])}</details>" if len(texts) > 1 else ""
        cards.append(f'<div class="card" data-run="{number}"><h3>{swatch(number, len(runs))}{escape(run.name)}</h3>'
                     f"{texts[0]}{earlier}</div>")
    yield f'<div class="cards">{"".join(cards)}</div>'


def comparison(runs: list[History]) -> Iterator[str]:
    """Settings and environments, what differs marked; of many runs, each value with how many have it."""
    if len(runs) > 1:
        yield '<p id="which"><label><input type="checkbox" id="only-differences"> only what differs</label></p>'
    for title, of in (("Settings", [run.settings for run in runs]), ("Environment", [run.environment for run in runs])):
        keys = [key for key in dict.fromkeys(key for values in of for key in values) if key not in ("name", "auto_name")]
        yield f"<h2>{title}</h2>"
        if not keys:
            yield "<p>Not recorded: these runs are older than the record of it.</p>"
            continue
        side_by_side = len(runs) <= MOST_COLUMNS
        heads = [run.name for run in runs] if side_by_side else ["value (runs)"]
        rows = []
        for key in keys:
            texts = number_texts([values.get(key, "-") for values in of])
            cells = texts if side_by_side else [", ".join(
                text if count == len(runs) else f"{text} ({count})" for text, count in Counter(texts).most_common(20))]
            kind = ' class="differs"' if len(set(texts)) > 1 else ""
            rows.append(f"<tr{kind}><th>{escape(key)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
        first = "".join(f"<th>{escape(head)}</th>" for head in heads)
        yield (f'<div class="wide"><table class="settings"><thead><tr><th></th>{first}</tr></thead>'
               f"<tbody>{''.join(rows)}</tbody></table></div>")


def escape(text: str) -> str:
    """Text as HTML, with control characters written out."""
    return html.escape(escaped(text))


def swatch(number: int, count: int) -> str:
    """A dot in the colour of a run's curves."""
    return f'<span class="swatch" style="background: {color(number, count)}"></span>'


def shown(value: float | None, how: str) -> tuple[Any, str]:
    """What to sort by and what to show; nothing where there is no value."""
    return ("", "") if value is None else (value, format(value, how))


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
