"""Reports: the history that is read, the pictures and the page, also in a real browser."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import replace
from html import escape
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from browser import browse, needs_chromium

import report.page as report_page
from conf.schema import ConfigError, compose
from report.colors import COLORS, color
from report.curves import (
    BOTH,
    DIAGNOSTICS,
    draw_diagnostic,
    draw_losses,
    draw_slice,
    in_unit,
    label_progress,
    smooth,
)
from report.figures import new_figure
from report.history import PRUNED, open_history
from report.importance import importance
from report.labels import number_texts
from report.metrics import CURVE_POINTS, thinned
from report.runs import choose, comparable, differing
from scripts import report as script
from terminal import escaped
from train import train


def write_run(folder: Path, steps: int = 60, planned: int = 60, end: float = 3.0, starts: int = 1, **changes: object) -> Path:
    """A run's folder as training leaves it, with losses that fall from 8 to `end`; a key as model__n_layer sets model.n_layer."""
    settings = {"name": folder.name, "seed": 1, "model": {"n_layer": 2, "bias": True}, "optim": {"lr": 0.001}, "data": {"tokenizer": "bpe"},
                "training": {"max_steps": planned, "max_seconds": None}}
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        (settings[group] if group else settings)[name] = value
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    rows = []
    for step in range(1, steps + 1):
        loss = end + (8 - end) * math.exp(-5 * (step - 1) / planned)
        rows.append({"step": step, "loss": loss, "tokens": 100 * step, "seconds": 0.5 * step, "step_ms": 500.0, "lr_scale": min(1, step / 10),
                     "gradient_norm": 1 / step})
        if step % 20 == 0:
            rows += [{"step": step, "val_loss": loss + 0.1, "bits_per_byte": loss / 2}, {"step": step, "sample": f"text of {step}"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "environment.jsonl").write_text("".join(json.dumps({"step": 0, "torch": "2.13", "host": folder.name}) + "\n" for _ in range(starts)))
    return folder


@pytest.fixture
def grid(tmp_path):
    """A sweep whose losses depend on the rate, and hardly on the depth; one job is cut off."""
    for lr in (0.001, 0.01, 0.1):
        for n_layer in (2, 4):
            name = f"lr={lr},n_layer={n_layer}"
            end = 3 + abs(math.log10(lr) + 2) - 0.01 * n_layer
            write_run(tmp_path / "runs/sweep" / name, steps=30 if (lr, n_layer) == (0.1, 4) else 60, end=end, optim__lr=lr, model__n_layer=n_layer)
    return tmp_path / "runs/sweep"


def histories(folder: Path) -> list:
    return report_page.best_first([open_history(run, name) for run, name in choose(folder.parent, folder.name)[0]])


def make(folder: Path, pictures: bool = False) -> str:
    chosen, [about] = choose(folder.parent, folder.name)
    report_page.write(chosen, about / "report.html", about.name, pictures)
    return (about / "report.html").read_text()


@pytest.fixture
def histories_of(tmp_path):
    """Makes runs that differ in one setting, `key`, each a little worse than the one before."""
    base = open_history(write_run(tmp_path / "base"), "base")
    return lambda values: [replace(base, name=f"run {number}", best_loss=3 + number / 10, settings={"key": value})
                           for number, value in enumerate(values)]


def labels_of(draw, size=(3.6, 2.7)) -> list[list]:
    """What stands at the ticks of both axes, each as text and its box in pixels, and other texts along the axes."""
    with new_figure(*size, "test") as figure:
        draw(axes := figure.subplots())
        figure.draw_without_rendering()
        axes_labels = [[label for label in [*axis.get_ticklabels(), *axis.get_minorticklabels()] if label.get_text()]
                       for axis in (axes.xaxis, axes.yaxis)]
        low, high = axes.get_window_extent().x0 - 1, axes.get_window_extent().x1 + 1
        shown = [label for label in axes_labels[0] if low <= sum(label.get_window_extent().intervalx) / 2 <= high]
        assert not axes.xaxis.get_offset_text().get_text() and not axes.yaxis.get_offset_text().get_text()
        return [[(label.get_text(), label.get_window_extent(), label) for label in labels] for labels in (shown, axes_labels[1])]


def test_a_history_has_the_content_of_the_folder(tmp_path):
    run = write_run(tmp_path / "one", steps=60, starts=2, end=3.0)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "lo')  # as a kill leaves it
    one = open_history(run, "one")
    losses = [3 + 5 * math.exp(-5 * step / 60) for step in range(60)]
    assert one.reached == (60, 6000, 30.0) and one.state == "finished" and one.environment["starts"] == 2
    assert np.allclose(one.training[:, 3], losses) and one.first_loss == 8.0 and one.train_loss == pytest.approx(np.mean(losses[-3:]))
    assert np.allclose(one.validation[:, :4], [[step, 100 * step, 0.5 * step, losses[step - 1] + 0.1] for step in (20, 40, 60)])
    assert (one.best_loss, one.best_step, one.bits_per_byte) == (losses[-1] + 0.1, 60, losses[-1] / 2)
    assert one.samples == [(20, "text of 20"), (40, "text of 40"), (60, "text of 60")]


def test_the_best_loss_need_not_be_the_last(tmp_path):
    run = write_run(tmp_path / "one")
    rows = (run / "metrics.jsonl").read_text()
    first, last = ({"step": step, "val_loss": loss, "bits_per_byte": 5.0} for step, loss in ((0, math.nan), (60, 9.0)))
    (run / "metrics.jsonl").write_text(f"{json.dumps(first)}\n{rows}{json.dumps(last)}\n")
    one = open_history(run, "one")
    assert one.last_loss == 9.0 and one.best_loss < 4 and one.bits_per_byte < 2


def test_different_tokenizers_are_compared_by_bits_per_byte(tmp_path):
    """A token of a BPE is several letters: its loss is higher where the model is better."""
    for name, end, bits in (("char", 1.5, 2.2), ("bpe", 3.5, 1.6)):
        run = write_run(tmp_path / "sweep" / name, end=end)
        settings = yaml.safe_load((run / "config.yaml").read_text()) | {"data": {"tokenizer": name}}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 60, "val_loss": end, "bits_per_byte": bits}) + "\n")
    page = make(tmp_path / "sweep")
    assert "in <code>bpe</code>, the best of 2 runs by bits per byte" in page
    assert re.findall('aria-sort="ascending".*?<button>(.*?)</button>', page) == ["bits per byte"]
    assert not find_spec("matplotlib") or (page.count("loss (bits per byte)") == 6 and "nats per token" not in page)
    assert [run.name for run in histories(tmp_path / "sweep")] == ["bpe", "char"]


def test_losses_of_different_texts_are_in_bits_per_byte(tmp_path):
    pytest.importorskip("matplotlib")
    for name, changes in {"a": {"data__path": "a.txt"}, "b": {"data__path": "b.txt"}, "new": {"data__path": "c.txt", "steps": 5}}.items():
        write_run(tmp_path / "sweep" / name, **changes)
    page = make(tmp_path / "sweep")
    assert "loss (bits per byte)" in page and "1 run without a validation loss cannot be drawn" in page
    a, _, new = histories(tmp_path / "sweep")
    assert a.unit_factor == pytest.approx(a.bits_per_byte / a.best_loss) and new.unit_factor is None
    assert np.allclose(in_unit(a, "training")[:, 3:] / a.training[:, 3:], a.unit_factor)


@pytest.mark.parametrize("changes, words, finished", [
    ({"steps": 30}, "30 of 60 steps", False), ({"steps": 60}, "finished", True), ({"steps": 30, "training__max_seconds": 15}, "finished", True),
    ({"steps": 0}, "0 of 60 steps", False), ({"steps": 0, "planned": 1}, "0 of 1 step", False)])
def test_the_state_of_a_run_says_how_far_it_came(tmp_path, changes, words, finished):
    run = write_run(tmp_path / "one", **changes)
    assert (open_history(run, "one").state, open_history(run, "one").finished) == (words, finished)
    (run / "nonfinite").mkdir()
    (run / "nonfinite/01-step_00000030.json").write_text("{}")
    assert open_history(run, "one").state == f"{words}, 1 not finite"


def test_a_run_that_stopped_early_is_finished_with_samples(tmp_path):
    """Tasks and a sample are recorded after the end."""
    run = write_run(tmp_path / "one", steps=20, planned=40)
    last = [{"stopped_early": True}, {"tasks/piqa/accuracy": 0.5}, {"sample": "a text"}]
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"step": 20, **row}) + "\n" for row in last)
    one = open_history(run, "one")
    assert (one.state, one.finished) == ("stopped early, after 20 steps", True)


@pytest.mark.parametrize("steps, content, words", [
    (10, '{"step": 10}', "pruned after 10 of 40 steps"), (40, '{"step": 10}', "finished"), (20, '{"step": 10}', "20 of 40 steps"), (10, "damaged", "10 of 40 steps")])
def test_a_run_is_pruned_until_it_is_resumed(tmp_path, steps, content, words):
    run = write_run(tmp_path / "one", steps=steps, planned=40)
    (run / PRUNED).write_text(content)
    assert open_history(run, "one").state == words


def test_learning_rates_norms_and_speeds_are_read(tmp_path):
    run = write_run(tmp_path / "one", optim__lr=0.02)
    found = open_history(run, "one").diagnostics
    assert list(found) == ["learning rate", "gradient norm", "tokens per second"] and all(len(curve) == 60 for curve in found.values())
    assert np.allclose(found["learning rate"][:, 3], np.minimum(1, np.arange(1, 61) / 10) * 0.02)
    assert np.allclose(found["gradient norm"][:, 3], 1 / np.arange(1, 61)) and np.allclose(found["tokens per second"][:, 3], 200)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    assert open_history(run, "one").diagnostics == {}


def test_thinned_curves_keep_means_and_extremes():
    points = np.column_stack((np.arange(1, 10_001), np.arange(10_000) * 7, np.arange(10_000) / 3, np.random.default_rng(0).normal(5, 1, 10_000)))
    thin = thinned(points)
    assert len(thin) == CURVE_POINTS and (thin[-1, :3] == points[-1, :3]).all()
    assert thin[:, 3].mean() == pytest.approx(points[:, 3].mean())  # stretches of equal length
    assert thin[:, 4].min() == points[:, 3].min() and thin[:, 5].max() == points[:, 3].max()
    assert np.array_equal(thinned(points[:7])[:, :4], points[:7]) and len(thinned(points[:0])) == 0


def test_smoothing_keeps_straight_lines_and_removes_noise():
    line, noise = np.linspace(8, 3, 250), np.random.default_rng(0).normal(0, 1, 250)
    assert np.allclose(smooth(line), line) and smooth(line + noise).std() < (line + noise).std()
    assert np.abs(smooth(noise)[24:-20]).max() < 1 and len(smooth(np.empty(0))) == 0


def test_a_smoothed_curve_does_not_follow_its_last_value():
    line = np.linspace(8, 3, 250)
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 1, 250)
        noise[-1] = 3.0
        end = smooth(line + noise)[-9:]
        assert abs(end[-1] - 3) < 1.5 and np.allclose(np.diff(end), np.diff(end)[0])
    assert np.allclose(smooth(np.arange(10.0)), np.arange(10.0))  # too short to be smoothed


SLICES = {
    "long texts": ["corpus/of a long name/one.jsonl.gz", "corpus/of a long name/two.jsonl.gz", "b.txt"], "12 presets": [f"preset-{n}" for n in range(12)],
    "40 presets": [f"preset-{n}" for n in range(40)], "from 0": [0.0, 0.001, 0.1], "few": [0.0, 0.1, 0.22], "three rates": [1e-4, 3e-4, 1e-3], "words": ["adamw", "muon"],
    "booleans": [True, False, True, False], "missing": [None, 3, 3.5, "auto"], "not finite": [math.inf, 1.0, 2.0], "one value": [0.01, 0.01, 0.01], "large": [4096, 131072, 1048576, 8192],
    "five decades": [10.0 ** (-6 + n / 8) for n in range(41)], "a decade": [0.01 * 10 ** (n / 49) for n in range(50)], "within a decade": [0.001 + 0.00016 * n for n in range(50)],
    "near": [0.0123451, 0.0123452, 0.0123453], "lr_width": [0.0011, 0.0047, 0.0098, 0.031, 0.0723, 0.0981], "widths": [64, 96, 128, 160, 192, 224, 256], "tiny": [1e-9, 2e-9, 7e-9, 9.5e-9, 1.1e-9, 3e-9],
    "extreme": [1e-300, 1.0, 1e300], "all floats": [5e-324, 1e-300, 1e-9, 1.0, 3.0, 1e300, 1.7e308], "both signs": [-1e300, 0.0, 1e-300, 1e300], "negative": [-1e-3, -10.0, -1e6],
    "from 0 to 1e300": [0.0, 1.0, 1e300], "large integers": [1, 10**18, 10**400]}


@pytest.mark.parametrize("values", SLICES.values(), ids=SLICES)
def test_the_labels_of_a_slice_neither_overlap_nor_repeat(histories_of, values):
    pytest.importorskip("matplotlib")
    runs = histories_of(values)
    labels, _ = labels_of(lambda axes: draw_slice(axes, runs, "key", runs))
    texts = [text for text, _, _ in labels]
    assert len(set(texts)) == len(texts) >= min(2, len(set(values))) and not [text for text in texts if "$" in text or "e+" in text or "e-0" in text]
    boxes = sorted((box for _, box, _ in labels), key=lambda box: box.x1)
    if not labels[0][2].get_rotation():
        assert all(one.x1 < two.x0 for one, two in itertools.pairwise(boxes))
    else:  # lines that rise side by side
        assert labels[0][2].get_ha() == "right" and boxes[1].x1 - boxes[0].x1 >= labels[0][2].get_fontsize()


RATES = {"one run": [0.01], "12 runs": [10 ** (-3 + n / 6) for n in range(12)], "40 runs": [10 ** (-6 + n / 8) for n in range(40)], "alike": [0.003] * 3, "none": [0.0, 0.0], "extreme": [1e-300, 1e300]}


@pytest.mark.parametrize("steps, rates", [(1, RATES["12 runs"]), *((60, rates) for rates in RATES.values())])
def test_the_axes_of_all_curves_have_plain_numbers(tmp_path, steps, rates):
    pytest.importorskip("matplotlib")
    base = open_history(write_run(tmp_path / "base", steps=steps, planned=steps), "base")
    runs = [replace(base, diagnostics=base.diagnostics | {"learning rate": base.diagnostics["learning rate"] * [1, 1, 1, *[1000 * rate] * 3]}) for rate in rates]
    draws = [functools.partial(draw_diagnostic, runs=runs, name=name) for name in DIAGNOSTICS]
    draws += [functools.partial(draw_losses, runs=runs, which=which, axis=axis) for which, axis in (("training", "tokens"), ("validation", "seconds"))]
    for draw in [*draws, functools.partial(draw_losses, runs=runs[:1], which=BOTH, axis="steps")]:
        for labels in labels_of(draw, (3.8, 2.5)):
            texts = [text for text, _, _ in labels]
            assert len(set(texts)) == len(texts) > 0 and all(re.fullmatch(r"[−-]?[\d.]+(e-?\d+)?( [kMG])?", text) for text in texts), texts


def test_both_losses_of_one_run_share_an_axis(tmp_path):
    pytest.importorskip("matplotlib")
    with new_figure(6, 4, "test") as figure:
        draw_losses(axes := figure.subplots(), [open_history(write_run(tmp_path / "one"), "one")], BOTH, "tokens")
    lines, names = axes.get_legend_handles_labels()
    assert names == ["training, smoothed", "validation"] and lines[0].get_color() != lines[1].get_color()
    assert list(lines[1].get_xdata()) == [2000, 4000, 6000] and len(lines[0].get_xdata()) == 60
    without = replace(open_history(tmp_path / "one", "one"), validation=np.empty((0, 6)))
    with new_figure(6, 4, "test") as figure:
        draw_losses(axes := figure.subplots(), [without], BOTH, "tokens")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training, smoothed"]
    page = make(tmp_path / "one")
    assert page.count("<svg ") == 6 and page.count('aria-label="training and validation loss against') == 3
    assert "Learning rate, gradient norm, tokens per second" in page


@pytest.mark.slow
@pytest.mark.parametrize("runs, slices", [(2, False), (3, False), (4, True)])
def test_slices_are_drawn_for_four_or_more_runs(tmp_path, runs, slices):
    pytest.importorskip("matplotlib")
    for number in range(runs):
        write_run(tmp_path / f"runs/{number}", end=3 + number, optim__lr=0.01 * (1 + number))
    page = make(tmp_path / "runs", pictures=True)
    assert ("against optim.lr" in page, "Importance of settings" in page, (tmp_path / "runs/report-slices.png").exists()) == (slices,) * 3


def test_a_slice_marks_medians_and_runs_that_diverged(histories_of):
    pytest.importorskip("matplotlib")
    runs = histories_of([True, True, True, False])
    runs[-1] = replace(runs[-1], best_loss=1e6)
    with new_figure(4, 3, "test") as figure:
        draw_slice(axes := figure.subplots(), runs, "key", runs)
    drawn = {(line.get_marker(), float(line.get_ydata()[0])) for line in axes.get_lines()}
    assert drawn == {("o", 3.0), ("o", 3.1), ("o", 3.2), ("^", 8.0), ("_", 3.1)}


@pytest.mark.parametrize("suffix, start", [("png", b"\x89PNG"), ("SVG", b"<?xml"), ("pdf", b"%PDF")])
def test_losses_are_drawn_as_one_picture_file(tmp_path, capsys, suffix, start):
    pytest.importorskip("matplotlib")
    with open(write_run(tmp_path / "one") / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "lo')  # as a kill leaves it
    write_run(tmp_path / "two")
    out = tmp_path / f"loss.{suffix}"
    for runs in ("one", "one,two") if suffix == "png" else ("one",):
        assert script.main(compose(script.ReportSettings, [f"runs_dir={tmp_path}", f"runs={runs}", f"out={out}"])) == 0
        assert out.read_bytes().startswith(start) and capsys.readouterr().out == f"Drew {out}\n"
        out.unlink()
    assert not list(tmp_path.glob("**/report*"))


@pytest.mark.parametrize("values, texts", [
    ([0.0031728918], ["0.00317"]), ([3.1728e-05, 1e-3], ["3.17e-5", "0.001"]), ([0.12345, 0.12349], ["0.12345", "0.12349"]), ([1337, 131072], ["1337", "131072"]),
    ([1.0, 0.1 + 0.2], ["1", "0.3"]), (["muon", None, True, [1, 2]], ["muon", "null", "true", "1 2"]), ([1234.5678], ["1235"]), ([math.nan, 2e30], ["nan", "2e30"])])
def test_settings_are_shown_with_three_digits(values, texts):
    assert number_texts(values) == texts


def test_learning_rates_are_short_with_the_exact_value_as_title(tmp_path):
    for number, rate in enumerate((0.0031728918, 0.012)):
        write_run(tmp_path / f"runs/{number}", optim__lr=rate)
    page = make(tmp_path / "runs")
    assert '<td class="number" data-value="0.0031728918" title="0.0031728918">0.00317</td>' in page and "<td>0.00317</td>" in page


def test_names_may_have_commas_and_folders_mean_their_runs(grid):
    runs = grid.parent
    write_run(runs / "other")
    write_run(grid / "lr=0.1,n_layer=4.old")  # moved aside
    (grid / "lr=0.1,n_layer=2/wandb").mkdir()
    (grid / "lr=0.1,n_layer=2/wandb/config.yaml").write_text("{}")  # a run's inside is not looked into
    chosen, about = choose(runs, "sweep")
    assert about == [grid] and [name for _, name in chosen] == sorted(f"lr={lr},n_layer={n}" for lr in (0.001, 0.01, 0.1) for n in (2, 4))
    chosen, about = choose(runs, f"sweep/lr=0.1,n_layer=2,other,{grid / 'lr=0.01,n_layer=4'}")
    assert [folder.name for folder, _ in chosen] == ["lr=0.1,n_layer=2", "other", "lr=0.01,n_layer=4"] and len(about) == 3
    assert choose(runs, "other,other") == ([(runs / "other", "other")], [runs / "other"])


def test_without_names_the_last_run_or_its_whole_sweep(grid):
    runs = grid.parent
    (write_run(runs / "other") / "checkpoints/step_00000001").mkdir(parents=True)
    assert choose(runs, "") == ([(runs / "other", "other")], [runs / "other"])
    (grid / "logs").mkdir()  # only sweeps have it
    (grid / "lr=0.1,n_layer=2/checkpoints/step_00000001").mkdir(parents=True)
    os.utime(grid / "lr=0.1,n_layer=2/checkpoints", (2e9, 2e9))
    assert choose(runs, "") == choose(runs, grid.name)


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    for folder in ("a/trial_0", "b/trial_0", "c/x", "d/x"):
        write_run(tmp_path / folder)
    assert [name for _, name in choose(tmp_path, "a,b")[0]] == ["a/trial_0", "b/trial_0"]
    assert [name for _, name in choose(tmp_path, "c/x,d/x")[0]] == [str(tmp_path / "c/x"), str(tmp_path / "d/x")]


@pytest.mark.parametrize("first, second, same", [
    ("a,b", "b,a", True), ("a,b", "a,c", False), ("a,b", "a,b,c", False), ("a,b", "sub/a,b", False), ("a,b", "'a,b',c", False), ("a b,c", "a_b,c", False)])
def test_each_comparison_has_a_page_of_its_own(tmp_path, first, second, same):
    pages = []
    for names in (first, second):
        folders = [tmp_path / name.strip("'") for name in re.findall(r"'[^']*'|[^,]+", names)]
        page = script.default_page(folders, tmp_path)
        assert page.parent == tmp_path and re.fullmatch(r"report-[\w.=+,-]+\.html", page.name)
        pages.append(page)
    assert (pages[0] == pages[1]) == same


@pytest.mark.parametrize("names, page, title", [
    ("first,second", "report-first,second.html", "first, second"), ("first", "first/report.html", "first"),
    ("fourth,third,second,first", "report-first,fourth,second,third.html", "fourth, third and 2 more"), (".", "report.html", "")])
def test_a_page_is_named_and_titled_by_what_it_compares(tmp_path, monkeypatch, names, page, title):
    for name in ("first", "second", "third", "fourth"):
        write_run(tmp_path / name)
    monkeypatch.setattr(script, "write", lambda chosen, out, title: asked.append((out.relative_to(tmp_path), title)) or [Path(__file__)])
    asked = []
    script.main(compose(script.ReportSettings, [f"runs_dir={tmp_path}", f"runs={names}"]))
    assert asked == [(Path(page), title or tmp_path.name)]


def test_the_name_of_a_page_has_a_limit(tmp_path):
    assert len(script.default_page([tmp_path / f"{letter * 50}" for letter in "abcdef"], tmp_path).name) < 100


@pytest.mark.slow
def test_runs_of_any_name_are_drawn_and_printed_safely(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    names = ["\x1b[2J<b>", "_hidden", "$x^2$", "中文", "a" * 200, "x\ny"]
    for name in names:
        run = write_run(tmp_path / "\x9btitle" / name, **{"\x1b[2J": name})
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 60, "tasks/<b>\x1b": 0.5}) + "\n")
    assert script.main(compose(script.ReportSettings, [f"runs_dir={tmp_path}", f"runs={tmp_path / 'title'}".replace("title", "\x9btitle")])) == 0
    page, said = (tmp_path / "\x9btitle/report.html").read_text(), capsys.readouterr()
    assert not re.search("[\x1b\x9b]", page + said.out) and said.err == "" and "<b>" not in page
    assert all(escape(escaped(name, keep="")) in page for name in names)


def test_a_run_of_a_text_whose_name_is_not_utf8_is_reported(tmp_path):
    run = write_run(tmp_path / "one", data__path="b\udcff.txt")
    (run / "environment.jsonl").write_text(json.dumps({"command": "train.py data.path=b\udcff.txt"}) + "\n")
    assert "b\ufffd.txt" in report_page.page([open_history(run, "one")], "one").encode().decode()


@pytest.mark.parametrize("words, complaint", [
    ("nothing", "^nothing is neither a folder in .*runs nor a path"), ("empty", "empty is not a run and holds none: a run's folder has a config.yaml"),
    ("sweep,,", "An empty name is neither"), ("strange", "strange is not a run that nanohydra wrote"), ("numbers", "numbers is not a run that nanohydra wrote")])
def test_a_folder_that_is_no_run_is_one_sentence(grid, words, complaint):
    (grid.parent / "empty").mkdir()
    (write_run(grid.parent / "strange") / "config.yaml").write_text("- a\n- b: [")
    (write_run(grid.parent / "numbers") / "metrics.jsonl").write_text('{"step": 1, "loss": "low", "tokens": 1, "seconds": 1}\n')
    with pytest.raises(ValueError, match=complaint) as raised:
        script.main(compose(script.ReportSettings, [f"runs_dir={grid.parent}", f"runs={words}"]))
    assert "\n" not in str(raised.value) and not (grid.parent / "report.html").exists()


BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 50))  # 2**49 settings


@pytest.mark.parametrize("settings, row", [
    ("training: {max_steps: lots}", ""), ("training: {max_steps: [1]}", ""), ("a: &a {b: *a}", ""), (BOMB, ""), ("seed: 1", '{"step": 1%s, "loss": 1}' % ("0" * 400)),
    ("seed: 1", '{"step": 1, "val_loss": 1.0, "bits_per_byte": "few"}'), ("seed: 1", '{"step": 1, "loss": 1.0, "seconds": Infinity}')])
def test_content_that_no_training_wrote_is_one_sentence(tmp_path, settings, row):
    run = write_run(tmp_path / "one")
    (run / "config.yaml").write_text(settings)
    (run / "metrics.jsonl").write_text(row)
    with pytest.raises(ValueError, match="one is not a run that nanohydra wrote"):
        open_history(run, "one")


@pytest.mark.parametrize("task", [{}, {"task": [1], "documents": 2}, {"task": "x", "documents": "two"}])
def test_an_evaluation_of_any_content_is_shown_or_left_out(tmp_path, task, capsys):
    run = write_run(tmp_path / "one")
    (run / "evaluation.json").write_text(json.dumps({"models": [{"name": "x", "tasks": [task]}]}))
    assert "one" in report_page.page([open_history(run, "one")], "title")
    (run / "evaluation.json").write_text("damaged")
    assert open_history(run, "one").evaluated == ()
    assert capsys.readouterr().err.endswith("one/evaluation.json is damaged and left out: run eval.py again.\n")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "environment.jsonl"])
def test_files_that_are_too_large_are_not_read(tmp_path, name):
    run = write_run(tmp_path / "one")
    os.truncate(run / name, 2**31)
    with pytest.raises(ValueError, match="one is not a run that nanohydra wrote"):
        open_history(run, "one")


def test_a_report_is_a_page_or_a_picture():
    with pytest.raises(ConfigError, match=r"out=x\.txt must end in \.html, \.png, \.svg or \.pdf\."):
        compose(script.ReportSettings, ["out=x.txt"])


def test_settings_that_differ_are_found(grid):
    assert differing(histories(grid)) == ["model.n_layer", "optim.lr"]


def test_auto_does_not_differ_from_the_value_it_resolved_to(tmp_path):
    chosen = {"training__device": "cpu", "training__precision": "bf16", "training__compile": "false"}
    for name, settings in {"straight": dict.fromkeys(chosen, "auto"), "went_on": chosen, "other": chosen | {"training__precision": "fp32"}}.items():
        run = write_run(tmp_path / "runs" / name, **settings)
        start = {"step": 0, "device": "cpu", "precision": settings["training__precision"].replace("auto", "bf16"), "compiled": False}
        (run / "environment.jsonl").write_text(json.dumps(start) + "\n")
    straight, went_on, other = (open_history(tmp_path / "runs" / name, name) for name in ("straight", "went_on", "other"))
    assert differing([straight, went_on]) == [] and differing([straight, other]) == ["training.precision"]
    (tmp_path / "runs/straight/environment.jsonl").unlink()  # nobody knows what it came to
    assert open_history(tmp_path / "runs/straight", "straight").settings["training.precision"] == "auto"


def test_settings_with_several_seeds_are_compared(tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    for lr, seed in itertools.product((0.01, 0.1, 1.0), range(4)):
        write_run(tmp_path / f"sweep/lr={lr},seed={seed}", end=3 + lr + seed % 3 / 10 + lr * seed / 40, seed=seed, optim__lr=lr)
    page = make(tmp_path / "sweep")
    assert page.count("3 comparisons") == 2 and "optim.lr=0.01 is better than optim.lr=1.0 by 1.0" in page
    write_run(tmp_path / "sweep/copy", seed=1, optim__lr=0.1)
    assert "Beyond the noise" not in make(tmp_path / "sweep")
    shutil.rmtree(tmp_path / "sweep/copy")
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert "Comparing runs needs SciPy: pip install scipy." in make(tmp_path / "sweep")


@pytest.mark.slow
def test_importance_finds_the_setting_that_decides(grid):
    pytest.importorskip("optuna")
    pytest.importorskip("sklearn")
    whole, keys = comparable(histories(grid))
    assert len(whole) == 5 and keys == ["model.n_layer", "optim.lr"]  # without the one that was cut off
    shares = importance(whole, keys)
    assert list(shares) == ["optim.lr", "model.n_layer"] and shares["optim.lr"] > 0.7 and sum(shares.values()) == pytest.approx(1)


@pytest.mark.slow
def test_importance_takes_texts_and_needs_four_runs(tmp_path):
    pytest.importorskip("optuna")
    pytest.importorskip("sklearn")
    for number in range(8):
        write_run(tmp_path / f"sweep/{number}", end=3 + (number % 2), model__bias=bool(number % 2), optim__lr=0.01 * (1 + number // 4))
    whole, keys = comparable(histories(tmp_path / "sweep"))
    assert next(iter(importance(whole, keys))) == "model.bias"
    with pytest.raises(ValueError, match="needs 4 finished runs with all these settings; there are 3"):
        importance(whole[:3], keys)


@pytest.mark.slow
def test_a_missing_optuna_is_a_sentence_on_the_page(grid, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "optuna", None)
    page = make(grid)
    assert "pip install optuna scikit-learn" in page and 'class="slices"><svg' in page


@pytest.mark.slow
def test_without_matplotlib_a_training_still_gets_its_page(grid, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        make(grid, pictures=True)
    assert not (grid / "report.html").exists()
    monkeypatch.setattr(report_page, "find_spec", lambda name: None)
    run = grid / "lr=0.1,n_layer=2"
    assert report_page.after_training(run) == f"Report: {run / 'report.html'}, without curves: they need matplotlib (pip install matplotlib)"
    page = (run / "report.html").read_text()
    assert "<svg" not in page and "pip install matplotlib" in page and "text of 60" in page and "finished" in page


def test_an_error_after_training_is_a_sentence(tmp_path):
    assert report_page.after_training(tmp_path) == f"No report was written: {tmp_path} is not a run: it has no config.yaml."


@pytest.mark.slow
def test_the_page_needs_no_network_and_escapes_everything(tmp_path):
    pytest.importorskip("matplotlib")
    bad = "<script>alert(1)</script>"
    for number in range(4):
        run = write_run(tmp_path / f"runs/{number}<b>$x_$", end=3 + number, optim__lr=0.1 * (number + 1), **{"seed": f'{bad}"{number}'})
        (run / "environment.jsonl").write_text(json.dumps({"step": 0, "host": bad}))
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 60, "sample": bad}) + "\n")
    page = make(tmp_path / "runs", pictures=True)
    assert bad not in page and "&lt;script&gt;alert(1)" in page and "0&lt;b&gt;$x_$" in page and "<b>" not in page
    without_names = page.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xlink", "")
    assert not [word for word in ("http:", "https:", "<link", "@import", "src=", "url(http") if word in without_names.split("<metadata>")[0]]


@pytest.mark.slow
def test_axes_on_the_page_have_plain_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    for number in range(6):
        write_run(tmp_path / f"runs/{number}", steps=6000, planned=6000, optim__lr=10.0 ** -number)
    page = make(tmp_path / "runs")
    assert "all losses are the same" in page
    assert "mathdefault" not in page and ">0.001</text>" in page and ">2 k</text>" in page


@pytest.mark.slow
def test_pictures_are_written_beside_the_page(grid, capsys):
    pytest.importorskip("matplotlib")
    assert script.main(compose(script.ReportSettings, [f"runs_dir={grid.parent}", "runs=sweep"])) == 0
    assert all((grid / f"report-{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("curves", "slices"))
    assert str(grid / "report.html") in capsys.readouterr().out


def test_up_to_eight_runs_have_a_color_each():
    assert len({color(number, 8) for number in range(8)}) == 8 == len(COLORS)
    assert color(0, 200) == "#d9702b" and color(199, 200) == "#9aa8b8"


@pytest.mark.slow
def test_a_run_whose_loss_is_nan_is_reported_last(histories_of):
    first, *others = histories_of([1, 2, 3])
    first = replace(first, best_loss=math.nan)
    assert report_page.best_first([others[0], first, others[1]]) == [*others, first]


def test_values_that_are_not_finite_are_left_out(tmp_path):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "one")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"gradient_norm": 0.025', '"gradient_norm": Infinity').replace('"val_loss": 3.', '"val_loss": NaN, "x": 3.'))
    page = make(tmp_path / "one", pictures=True)
    assert "gradient norm against steps" in page and (tmp_path / "one/report-curves.png").exists()


def test_runs_without_a_loss_are_reported_last(tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "runs/empty", steps=0)
    write_run(tmp_path / "runs/short", steps=5)
    (write_run(tmp_path / "runs/old") / "environment.jsonl").unlink()
    assert "earlier" not in make(tmp_path / "runs/old") and "text of 20" in make(tmp_path / "runs/old")
    page = make(tmp_path / "runs", pictures=True)
    assert page.index("old") < page.index("empty") and "5 of 60 steps" in page
    assert "No validation loss yet" in make(tmp_path / "runs/empty")


@needs_chromium
@pytest.mark.slow
def test_the_page_opens_sorts_and_shows_all_curves(grid, tmp_path):
    pytest.importorskip("matplotlib")
    make(grid)
    found, console = browse(grid / "report.html", """
      const names = () => [...document.querySelectorAll("#leaderboard tbody tr")].map((row) => row.cells[0].textContent);
      const heads = [...document.querySelectorAll("#leaderboard th")], head = (name) => heads.find((one) => one.textContent === name);
      const sorted = (name) => { head(name).firstElementChild.click(); return names(); };
      const drawn = (which) => [...document.querySelectorAll(`[data-axis="${which}"] svg`)].map((svg) =>
        [...svg.querySelectorAll(".run")].filter((run) => run.getBBox().width > 50 && run.getBBox().height > 20).length);
      const first = names(), steps = drawn("steps"), hidden = document.querySelector('[data-axis="tokens"]').getBoundingClientRect().height;
      const byRate = sorted("optim.lr"), ascending = head("optim.lr").getAttribute("aria-sort"), byRateDown = sorted("optim.lr");
      const byName = sorted("run"), byTime = sorted("time");
      document.querySelector('.choice button[value="tokens"]').click();
      const tokens = drawn("tokens"), gone = drawn("steps");
      const row = document.querySelector("#leaderboard tbody tr");
      row.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
      const opacity = [...document.querySelectorAll('[data-axis="tokens"] svg:first-child .run')].map((run) => getComputedStyle(run).opacity);
      document.querySelector("h1").dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
      const settings = () => [...document.querySelectorAll(".settings tbody tr")].filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
      const all = settings().length, box = document.getElementById("only-differences");
      box.click();
      done({first, steps, hidden, byRate, byRateDown, ascending, byName, byTime, tokens, gone, opacity, all, different: settings(), after: document.querySelectorAll(".focused").length,
            titles: new Set([...document.querySelectorAll("svg .run title")].map((title) => title.textContent)).size,
            samples: document.querySelectorAll(".card").length, wide: document.documentElement.scrollWidth <= innerWidth});""")
    assert console == ""
    order = [run.name for run in histories(grid)]  # the one that was cut off has one validation loss, which is no line
    assert found["first"] == order and found["steps"] == [5, 6] and found["hidden"] == 0
    rates = [float(name.split(",")[0][3:]) for name in found["byRate"]]
    assert rates == sorted(rates) and found["ascending"] == "ascending"
    assert [float(name.split(",")[0][3:]) for name in found["byRateDown"]] == rates[::-1]
    assert found["byName"] == sorted(order) and found["byTime"][0] == "lr=0.1,n_layer=4"
    assert found["tokens"] == [5, 6] and found["gone"] == [0, 0]
    assert sorted(found["opacity"]) == ["0.12"] * 5 + ["1"] and found["after"] == 0
    assert found["all"] > 5 and found["different"] == ["model.n_layer", "optim.lr", "host"]
    assert found["titles"] == 6 == found["samples"] and found["wide"]


@needs_chromium
@pytest.mark.slow
def test_200_runs_of_10_000_points_fit_on_a_page(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = [write_run(tmp_path / f"rows/{end}", steps=10_000, planned=10_000, end=end) / "metrics.jsonl" for end in (3.0, 3.5, 4.0)]
    for number in range(200):
        run = write_run(tmp_path / f"runs/{number:03}", steps=0, planned=10_000, optim__lr=0.001 * (1 + number), model__n_layer=number % 5)
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").hardlink_to(rows[number % 3])
    start = time.perf_counter()
    page = make(tmp_path / "runs", pictures=True)
    with capsys.disabled():
        print(f"\n{len(page) / 2**20:.1f} MB in {time.perf_counter() - start:.1f} s")
    found, console = browse(tmp_path / "runs/report.html", "done(document.querySelectorAll('[data-axis=steps] svg:first-child .run').length)")
    assert len(page) < 10 * 2**20 and console == "" and found == 200


@pytest.mark.slow
def test_a_training_ends_with_its_report(compose_tiny, tmp_path, capsys):
    settings = ["training.max_steps=4", "training.eval_every=2", "training.sample_tokens=4", "logger.report=true"]
    assert train(compose_tiny(*settings)) == 0
    run = tmp_path / "runs/tiny"
    one = open_history(run, "tiny")
    assert [step for step, _ in one.samples] == [2, 4] and all(text and repr(text) in (run / "log.txt").read_text() for _, text in one.samples)
    assert one.environment["torch"] and one.environment["python"] and one.environment["device"] == "cpu" and one.environment["step"] == 0
    page = (run / "report.html").read_text()
    assert "<h1>tiny</h1>" in page and "finished" in page and one.samples[1][1].strip()[:1] in page
    assert f"Report: {run / 'report.html'}" in (run / "log.txt").read_text() and str(run / "report.html") in capsys.readouterr().out
    train(compose_tiny(*settings, "training.max_steps=6"))
    again = open_history(run, "tiny")
    assert [step for step, _ in again.samples] == [2, 4, 6] and again.environment["starts"] == 2 and again.environment["step"] == 4


def test_a_run_of_one_step_has_one_tick():
    pytest.importorskip("matplotlib")
    with new_figure(4, 3, "one") as figure:
        axes = figure.subplots()
        axes.plot([1], [3.0])
        label_progress(axes, "steps")
        assert [tick for tick in axes.get_xticks() if 0.9 < tick < 1.1] == [1]
