"""One page about runs that opens from disk without a network: curves, tables, samples.

The functions of its sections take the runs sorted, the best first, and give nothing where there is
nothing to show. The tables are in tables.py.
"""

from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import atomic
from evaluation.comparison import SMALLEST, compare_all
from progress import ProgressBar
from report.attention import BASE_STYLE
from report.colors import COLORS
from report.curves import MAX_BANDS
from report.history import AXES, BITS, History, open_history
from report.importance import MIN_RUNS, importance
from report.pictures import curves_png, diagnostic_svg, losses_svg, slice_svg, slices_png
from report.runs import arms_of, best_first, comparable, tokens_of
from report.tables import escape, evaluations, leaderboard, side_by_side, swatch
from terminal import counted, escaped

TEMPLATE = Path(__file__).with_suffix(".html")
FEW = 20  # runs that are read without a progress bar
NEEDS_MATPLOTLIB = ", without curves: they need matplotlib (pip install matplotlib)"
MAX_SLICES = 12
MAX_ARMS = 20  # settings that are compared over seeds: all pairs are tested
MAX_SAMPLES = 60  # runs whose samples are shown
CHOICE_OF_AXIS = """<div class="choice" role="group" aria-label="against">
<button value="steps" aria-pressed="true">steps</button>
<button value="tokens" aria-pressed="false">tokens</button>
<button value="seconds" aria-pressed="false">seconds</button></div>"""


def after_training(run: Path) -> str:
    """Write the report of a run that has just ended; return the sentence to tell the user."""
    try:
        write([(run, run.name)], run / "report.html", run.name, pictures=False)
    except Exception as error:
        # Training must not fail because a report does.
        return f"No report was written: {error}"
    missing = "" if find_spec("matplotlib") else NEEDS_MATPLOTLIB
    return f"Report: {run / 'report.html'}{missing}"


def is_current(run: Path) -> bool:
    """Whether the run's report was written after its last metrics."""
    try:
        written = (run / "report.html").stat().st_mtime_ns
        return written >= (run / "metrics.jsonl").stat().st_mtime_ns
    except FileNotFoundError:
        return False


def write(chosen: list[tuple[Path, str]], out: Path, title: str,
          pictures: bool = True) -> list[Path]:
    """Write the page about the chosen runs, and beside it pictures as PNG; return their paths.

    Raises ValueError for a folder that is not a run, and if matplotlib is missing for pictures.
    """
    runs = open_runs(chosen)
    # Nothing is written before all of it has been drawn.
    contents = {out: page(runs, escaped(title, keep="")).encode()}
    if pictures:
        contents[out.with_name(f"{out.stem}-curves.png")] = curves_png(runs)
        compared, keys = comparable(runs)
        if len(compared) >= MIN_RUNS and keys:
            slices = slices_png(compared, keys[:MAX_SLICES], runs)
            contents[out.with_name(f"{out.stem}-slices.png")] = slices
    for path, content in contents.items():
        atomic.write_bytes(path, content)
    return list(contents)


def open_runs(chosen: list[tuple[Path, str]]) -> list[History]:
    """The histories of the chosen runs, the best first."""
    progress = ProgressBar(chosen, "Reading", unit="runs", leave=False, disable=len(chosen) < FEW)
    return best_first([open_history(folder, name) for folder, name in progress])


def page(runs: list[History], title: str) -> str:
    """The page about `runs`, the best first."""
    parts = [
        *summary(runs, title), *losses(runs), *diagnostics(runs), *leaderboard(runs),
        *evaluations(runs), *comparisons(runs), *importance_of_settings(runs), *samples(runs),
        *side_by_side("Settings", [run.settings for run in runs], runs),
        *side_by_side("Environment", [run.environment for run in runs], runs)]
    template = TEMPLATE.read_text(encoding="utf-8")
    template = template.replace("{{base}}", BASE_STYLE.read_text(encoding="utf-8"))
    template = template.replace("{{title}}", escape(f"Report: {title}"))
    return template.replace("{{body}}", "\n".join(parts))


def summary(runs: list[History], title: str) -> Iterator[str]:
    yield f"<h1>{escape(title)}</h1>"
    best = runs[0]
    if best.best_loss is None:
        yield "<p>No validation loss yet.</p>"
        return
    text = f"Validation loss {best.best_loss:.4f}"
    if best.bits_per_byte is not None:
        text += f", {best.bits_per_byte:.4f} bits per byte"
    text += f", at step {best.best_step:,}"
    if len(runs) > 1:
        name = f"<code>{escape(best.name)}</code>"
        text += f" in {name}, the best of {len(runs)} runs by {best.measure}"
    yield f"<p>{text}.</p>"


def losses(runs: list[History]) -> Iterator[str]:
    """The losses against steps, tokens and seconds, with buttons that choose between them."""
    yield "<h2>Loss</h2>"
    # A legend, unless there are more runs than colors.
    if 1 < len(runs) <= len(COLORS):
        yield '<p class="legend">'
        for rank, run in enumerate(runs):
            if len(run.training) or len(run.validation):
                yield f'<span data-run="{rank}">{swatch(rank, len(runs))}{escape(run.name)}</span>'
        yield "</p>"
    # Pictures against each axis, of which the page shows one at a time.
    yield CHOICE_OF_AXIS
    kind = "curves single" if len(runs) == 1 else "curves"
    try:
        for axis in AXES:
            hidden = "" if axis == "steps" else " hidden"
            svg = losses_svg(runs, axis)
            yield f'<div class="{kind}" data-axis="{axis}"{hidden}>{svg}</div>'
        yield f"<p>{' '.join(notes_on_losses(runs))}</p>"
    except ValueError as error:
        # matplotlib is missing.
        yield f"<p>{escape(str(error))}</p>"


def notes_on_losses(runs: list[History]) -> Iterator[str]:
    """How to read the pictures of losses."""
    smoothed = "Training losses are smoothed over a fifteenth of the run"
    if len(runs) <= MAX_BANDS:
        smoothed += "; the pale line and band show the losses before smoothing"
    yield f"{smoothed}."
    if runs[0].measure == BITS:
        yield ("The runs have different texts or tokenizers, so their losses are in bits per byte: "
               "losses per token cannot be compared.")
        unknown = sum(run.unit_factor is None and len(run.training) > 0 for run in runs)
        if unknown:
            yield f"{counted(unknown, 'run')} without a validation loss cannot be drawn."
    if len(runs) > len(COLORS):
        yield "The best run is orange; the higher the loss of another, the paler it is."
    if len(runs) > 1:
        yield "Point at a row of the leaderboard to highlight its run."


def diagnostics(runs: list[History]) -> Iterator[str]:
    """Learning rate, gradient norm, speed and tasks, of those that were recorded."""
    recorded = list(dict.fromkeys(name for run in runs for name in run.diagnostics))
    if recorded:
        # Without matplotlib, the section about losses says so.
        with suppress(ValueError):
            svg = "".join(diagnostic_svg(runs, name) for name in recorded)
            yield f"<h2>{escape(', '.join(recorded).capitalize())}</h2>"
            yield f'<div class="slices">{svg}</div>'


def comparisons(runs: list[History]) -> Iterator[str]:
    """The best settings against each of the others, of those that were run with several seeds."""
    # Group the runs that differ in nothing but their seed.
    finished = [run for run in comparable(runs)[0] if isinstance(run.settings.get("seed"), int)]
    try:
        arms = arms_of(finished)
    except ValueError:
        # Copies of a run say nothing about the noise.
        return
    results = {}
    for name, of_arm in arms.items():
        if len(of_arm) > 1:
            results[name] = {seed: run.score for seed, run in of_arm.items()}
    if not 1 < len(results) <= MAX_ARMS or len({tokens_of(run) for run in finished}) > 1:
        return

    # Test the differences between the groups.
    unit = "bits per byte" if finished[0].measure == BITS else "nats per token"
    yield "<h2>Beyond the noise between seeds?</h2>"
    try:
        for one in compare_all(results):
            yield f"<p>{escape(one.sentence(unit, SMALLEST))}</p>"
    except ValueError as error:
        yield f"<p>{escape(str(error))}</p>"


def importance_of_settings(runs: list[History]) -> Iterator[str]:
    """The importance of the settings that differ, and the scores against their values."""
    # Few runs say nothing about a setting.
    finished, keys = comparable(runs)
    if len(runs) < MIN_RUNS or not keys:
        return
    yield "<h2>Importance of settings</h2>"
    # A bar for each setting.
    try:
        shares = importance(finished, keys)
        yield (f"<p>The share of each setting in the differences of the {finished[0].measure} of "
               f"{len(finished)} finished runs (fANOVA, by Optuna): an estimate, rough for few "
               "runs.</p>")
        yield '<div class="wide"><table id="importance">'
        for key, share in shares.items():
            bar = f'<span class="bar" style="width: {16 * share:.2f}rem"></span>'
            yield f"<tr><td><code>{escape(key)}</code></td>"
            yield f'<td class="number">{share:.0%}</td><td>{bar}</td></tr>'
        yield "</table></div>"
        # The slices follow in the order of importance.
        keys = list(shares)
    except ValueError as error:
        # Optuna is missing, or all scores are equal: the slices can still be drawn.
        yield f"<p>{escape(str(error))}</p>"
    if len(finished) < MIN_RUNS:
        return
    # Without matplotlib, the section about losses says so.
    with suppress(ValueError):
        svg = "".join(slice_svg(finished, key, runs) for key in keys[:MAX_SLICES])
        yield f'<div class="slices">{svg}</div>'
    if len(keys) > MAX_SLICES:
        yield f"<p>{len(keys) - MAX_SLICES} more settings are not drawn.</p>"


def samples(runs: list[History]) -> Iterator[str]:
    """The last sample of each run, the best run first, with earlier ones folded; of one run all."""
    with_samples = [(rank, run) for rank, run in enumerate(runs) if run.samples]
    if not with_samples:
        return
    yield "<h2>Samples</h2>"
    if len(with_samples) > MAX_SAMPLES:
        yield f"<p>Of the best {MAX_SAMPLES} runs.</p>"
    # A card for each run, or of a single run for each sample.
    yield '<div class="cards">'
    for rank, run in with_samples[:MAX_SAMPLES]:
        # The newest ten, the last one first.
        last, *earlier = [f"<p>step {step:,}</p><blockquote>{escape(text)}</blockquote>"
                          for step, text in reversed(run.samples[-10:])]
        if len(runs) == 1:
            yield "".join(f'<div class="card">{text}</div>' for text in (last, *earlier))
        else:
            yield f'<div class="card" data-run="{rank}">'
            yield f"<h3>{swatch(rank, len(runs))}{escape(run.name)}</h3>{last}"
            if earlier:
                yield f"<details><summary>earlier</summary>{''.join(earlier)}</details>"
            yield "</div>"
    yield "</div>"
