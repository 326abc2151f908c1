"""Tables of runs as HTML: the leaderboard, results of evaluations, settings side by side."""

import html
from collections import Counter
from collections.abc import Iterator
from typing import Any

from progress import ProgressBar
from report.colors import color
from report.history import BITS, LOSS, History
from report.labels import number_texts
from report.results import cells
from report.runs import differing
from setting import as_word
from terminal import escaped

MAX_COLUMNS = 6  # runs side by side in a table of settings


def leaderboard(runs: list[History]) -> Iterator[str]:
    """A table that is sorted by clicking on its heads."""
    several = len(runs) > 1
    rows = leaderboard_rows(runs)
    # Columns with a number in any row are aligned to the right.
    cells = [cell for row in rows for cell in row.items()]
    numeric = {name for name, (value, _) in cells if isinstance(value, int | float)}

    # A row for each run, whose cells have the value to sort by.
    body = ""
    for rank, row in enumerate(rows):
        body += f'<tr data-run="{rank}">'
        for name, (value, text) in row.items():
            attributes = 'class="number" ' if name in numeric else ""
            attributes += f'data-value="{escape(str(value))}"'
            # A setting that was shortened is shown in full under the mouse.
            if name in runs[rank].settings and as_word(value) != text:
                attributes += f' title="{escape(str(value))}"'
            dot = swatch(rank, len(runs)) if name == "run" and several else ""
            body += f"<td {attributes}>{dot}{escape(text)}</td>"
        body += "</tr>"

    # The heads, which are buttons; the table is sorted by the measure.
    heads = ""
    for name in rows[0]:
        sorting = ' aria-sort="ascending"' if name == runs[0].measure else ""
        kind = ' class="number"' if name in numeric else ""
        heads += f"<th{sorting}{kind}><button>{escape(name)}</button></th>"
    yield f"<h2>{'Leaderboard' if several else 'Result'}</h2>"
    yield f'<div class="wide tall">{table(heads, body, "id", "leaderboard")}</div>'


def leaderboard_rows(runs: list[History]) -> list[dict[str, tuple[Any, str]]]:
    """For each run and column the value to sort by and the text."""
    # A column for each setting that differs, with the same number of digits in all rows.
    settings = {}
    for key in differing(runs):
        values = [run.settings.get(key, "") for run in runs]
        settings[key] = list(zip(values, number_texts(values), strict=True))

    # The columns, from left to right.
    rows = []
    for rank, run in enumerate(runs):
        _, tokens, seconds = run.reached
        # The result at the best step, the settings that differ, and then the end of the run.
        row = {"run": (run.name, run.name), "state": (run.state, run.state)}
        row[LOSS] = formatted(run.best_loss, ".4f")
        row["at step"] = formatted(run.best_step, ",d")
        row[BITS] = formatted(run.bits_per_byte, ".4f")
        row |= {key: column[rank] for key, column in settings.items()}
        row["last validation loss"] = formatted(run.last_loss, ".4f")
        row["training loss"] = formatted(run.train_loss, ".4f")
        row["tokens"] = formatted(tokens, ",.0f")
        row["time"] = (seconds, ProgressBar.format_interval(seconds))
        row["tokens/s"] = formatted(tokens / seconds if seconds else None, ",.0f")
        rows.append(row)
    return rows


def evaluations(runs: list[History]) -> Iterator[str]:
    """The results of python eval.py."""
    titles, *rows = cells([model for run in runs for model in run.evaluated])
    if rows:
        heads = "".join(f"<th>{escape(title)}</th>" for title in titles)
        body = "".join(f"<tr>{data(row)}</tr>" for row in rows)
        yield "<h2>Evaluation</h2>"
        yield f'<div class="wide">{table(heads, body, "id", "evaluation")}</div>'


def side_by_side(title: str, values: list[dict[str, Any]], runs: list[History]) -> Iterator[str]:
    """The `values` of each of the runs in a column, differences marked.

    For many runs there is one column, with each value and the number of runs that have it.
    """
    # A box that hides the settings that do not differ.
    if title == "Settings" and len(runs) > 1:
        box = '<input type="checkbox" id="only-differences">'
        yield f'<p id="which"><label>{box} only differences</label></p>'
    yield f"<h2>{title}</h2>"

    # Names differ between all runs, and are in the head.
    keys = dict.fromkeys(key for each in values for key in each)
    keys = [key for key in keys if key not in ("name", "auto_name")]
    if not keys:
        yield "<p>Not recorded: these runs are older than the record of it.</p>"
        return

    # A row for each key.
    has_columns = len(runs) <= MAX_COLUMNS
    names = [run.name for run in runs] if has_columns else ["value (runs)"]
    body = ""
    for key in keys:
        texts = number_texts([each.get(key, "-") for each in values])
        differs = ' class="differs"' if len(set(texts)) > 1 else ""
        cells = texts if has_columns else [counts_of(texts)]
        body += f"<tr{differs}><th>{escape(key)}</th>{data(cells)}</tr>"
    heads = "<th></th>" + "".join(f"<th>{escape(name)}</th>" for name in names)
    yield f'<div class="wide">{table(heads, body, "class", "settings")}</div>'


def counts_of(texts: list[str]) -> str:
    """The most frequent texts, each with how often it occurs, unless it is the only one."""
    counts = Counter(texts).most_common(20)
    several = ", ".join(f"{text} ({count})" for text, count in counts)
    return several if len(counts) > 1 else texts[0]


def data(cells: list[str]) -> str:
    return "".join(f"<td>{escape(cell)}</td>" for cell in cells)


def table(heads: str, body: str, attribute: str, name: str) -> str:
    start = f'<table {attribute}="{name}"><thead><tr>{heads}</tr></thead>'
    return f"{start}<tbody>{body}</tbody></table>"


def escape(text: str) -> str:
    """Text as HTML, with control characters written out."""
    return html.escape(escaped(text))


def swatch(rank: int, count: int) -> str:
    """A dot in the color of a run's curves."""
    return f'<span class="swatch" style="background: {color(rank, count)}"></span>'


def formatted(value: float | None, how: str) -> tuple[Any, str]:
    """The value to sort by and its text; both are empty for None."""
    return ("", "") if value is None else (value, format(value, how))
