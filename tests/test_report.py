"""Reports: what is read of runs, what is on the page, and what it does in a real browser."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from browser import browse, needs_chromium

import report.page as story
from conf.schema import ConfigError, compose
from report.curves import COLORS, color, draw_slice, new_figure, smooth
from report.history import POINTS, choose, differing, open_history, thinned
from report.importance import importance
from scripts import report as script
from train import train


def write_run(folder: Path, steps: int = 60, planned: int = 60, end: float = 3.0, starts: int = 1, **changes: object) -> Path:
    """A run's folder as training leaves it, with losses that fall from 8 to `end`; a key as model__n_layer sets model.n_layer."""
    settings = {"name": folder.name, "seed": 1, "model": {"n_layer": 2, "bias": True}, "optim": {"lr": 0.001},
                "training": {"max_steps": planned, "max_seconds": None}}
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        (settings[group] if group else settings)[name] = value
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    rows = []
    for step in range(1, steps + 1):
        loss = end + (8 - end) * math.exp(-5 * (step - 1) / planned)
        rows.append({"step": step, "loss": loss, "tokens": 100 * step, "seconds": 0.5 * step})
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
    return story.best_first([open_history(run, name) for run, name in choose(folder.parent, folder.name)[0]])


def make(folder: Path, pictures: bool = False) -> str:
    chosen, about = choose(folder.parent, folder.name)
    story.write(chosen, about / "report.html", pictures)
    return (about / "report.html").read_text()


def test_a_history_is_what_the_folder_holds(tmp_path):
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
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 60, "val_loss": 9.0, "bits_per_byte": 5.0}) + "\n")
    one = open_history(run, "one")
    assert one.last_loss == 9.0 and one.best_loss < 4 and one.bits_per_byte < 2


def test_runs_of_other_tokenizers_are_compared_by_what_a_byte_takes(tmp_path):
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
    assert not find_spec("matplotlib") or "bits per byte against data.tokenizer" in page
    assert [run.name for run in histories(tmp_path / "sweep")] == ["bpe", "char"]


@pytest.mark.parametrize("changes, words", [
    ({"steps": 30}, "30 of 60 steps"), ({"steps": 60}, "finished"), ({"steps": 30, "training__max_seconds": 15}, "finished"), ({"steps": 0}, "0 of 60 steps")])
def test_how_far_a_run_came(tmp_path, changes, words):
    run = write_run(tmp_path / "one", **changes)
    assert open_history(run, "one").state == words
    (run / "nonfinite").mkdir()
    (run / "nonfinite/01-step_00000030.json").write_text("{}")
    assert open_history(run, "one").state == f"{words}, 1 not finite"


def test_a_run_that_stopped_early_is_finished_and_says_so(tmp_path):
    run = write_run(tmp_path / "one", steps=40)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "stopped_early": true}\n{"step": 40, "sample": "text"}\n')
    one = open_history(run, "one")
    assert one.finished and one.state == "stopped early, after 40 steps"


def test_curves_are_thinned_without_losing_a_loss():
    points = np.column_stack((np.arange(1, 10_001), np.arange(10_000) * 7, np.arange(10_000) / 3, np.random.default_rng(0).normal(5, 1, 10_000)))
    thin = thinned(points)
    assert len(thin) == POINTS and (thin[-1, :3] == points[-1, :3]).all()
    assert thin[:, 3].mean() == pytest.approx(points[:, 3].mean())  # stretches of equal length
    assert thin[:, 4].min() == points[:, 3].min() and thin[:, 5].max() == points[:, 3].max()
    assert np.array_equal(thinned(points[:7])[:, :4], points[:7]) and len(thinned(points[:0])) == 0


def test_smoothing_leaves_lines_straight_and_takes_noise_away():
    line, noise = np.linspace(8, 3, 250), np.random.default_rng(0).normal(0, 1, 250)
    assert np.allclose(smooth(line), line) and smooth(line + noise).std() < (line + noise).std()
    assert np.abs(smooth(noise)[20:-20]).max() < 1 and len(smooth(np.empty(0))) == 0


@pytest.mark.parametrize("values", [["corpus/of a long name/one.jsonl.gz", "corpus/of a long name/two.jsonl.gz", "b.txt"], [f"preset-{n}" for n in range(12)],
                                    [0.0, 0.001, 0.1], [0.0, 0.1, 0.22], [1e-4, 3e-4, 1e-3], ["adamw", "muon"]])
def test_the_values_below_a_slice_neither_overlap_nor_look_alike(tmp_path, values):
    pytest.importorskip("matplotlib")
    runs = [replace(open_history(write_run(tmp_path / str(number)), str(number)), settings={"key": value}) for number, value in enumerate(values)]
    figure, style = new_figure(3.6, 2.7, "test")
    with style:
        draw_slice(axes := figure.subplots(), runs, "key", {run: number for number, run in enumerate(runs)})
        figure.draw_without_rendering()
        labels = [label for label in axes.get_xticklabels() if label.get_text()]
        bounds = [label.get_window_extent() for label in labels]
    assert len({label.get_text() for label in labels}) == len(labels) >= 2
    if not labels[0].get_rotation():
        assert all(one.x1 < two.x0 for one, two in itertools.pairwise(bounds))
    else:  # lines that rise side by side
        assert labels[0].get_ha() == "right" and bounds[1].x1 - bounds[0].x1 >= labels[0].get_fontsize()


def test_names_may_hold_commas_and_folders_stand_for_their_runs(grid):
    runs = grid.parent
    write_run(runs / "other")
    write_run(grid / "lr=0.1,n_layer=4.old")  # moved aside
    (grid / "lr=0.1,n_layer=2/wandb").mkdir()
    (grid / "lr=0.1,n_layer=2/wandb/config.yaml").write_text("{}")  # a run's inside is not looked into
    chosen, about = choose(runs, "sweep")
    assert about == grid and [name for _, name in chosen] == sorted(f"lr={lr},n_layer={n}" for lr in (0.001, 0.01, 0.1) for n in (2, 4))
    chosen, about = choose(runs, f"sweep/lr=0.1,n_layer=2,other,{grid / 'lr=0.01,n_layer=4'}")
    assert [folder.name for folder, _ in chosen] == ["lr=0.1,n_layer=2", "other", "lr=0.01,n_layer=4"] and about == runs
    assert choose(runs, "other") == ([(runs / "other", "other")], runs / "other")


@pytest.mark.parametrize("words, complaint", [
    ("nothing", "runs=nothing is neither a folder in .*runs nor a path"), ("empty", "empty is not a run and holds none: a run's folder has a config.yaml"),
    ("sweep,,", "runs= is neither"), ("strange", "strange is not a run that nanohydra wrote"), ("numbers", "numbers is not a run that nanohydra wrote")])
def test_what_is_not_a_run_is_one_sentence(grid, words, complaint):
    (grid.parent / "empty").mkdir()
    (write_run(grid.parent / "strange") / "config.yaml").write_text("- a\n- b: [")
    (write_run(grid.parent / "numbers") / "metrics.jsonl").write_text('{"step": 1, "loss": "low", "tokens": 1, "seconds": 1}\n')
    with pytest.raises(ValueError, match=complaint) as raised:
        script.main(compose(script.ReportSettings, [f"runs_dir={grid.parent}", f"runs={words}"]))
    assert "\n" not in str(raised.value) and not (grid.parent / "report.html").exists()


BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 50))  # 2**49 settings


@pytest.mark.parametrize("settings, row", [
    ("training: {max_steps: lots}", ""), ("training: {max_steps: [1]}", ""), ("a: &a {b: *a}", ""), (BOMB, ""), ("seed: 1", '{"step": 1%s, "loss": 1}' % ("0" * 400)),
    ("seed: 1", '{"step": 1, "val_loss": 1.0, "bits_per_byte": "few"}')])
def test_what_no_training_writes_is_one_sentence(tmp_path, settings, row):
    run = write_run(tmp_path / "one")
    (run / "config.yaml").write_text(settings)
    (run / "metrics.jsonl").write_text(row)
    with pytest.raises(ValueError, match="one is not a run that nanohydra wrote"):
        open_history(run, "one")


def test_a_page_must_be_called_html():
    with pytest.raises(ConfigError, match=r"out=x\.pdf must end in \.html"):
        compose(script.ReportSettings, ["out=x.pdf"])


def test_settings_that_differ_are_found_and_what_follows_is_left_out(grid):
    assert differing(histories(grid)) == ["model.n_layer", "optim.lr"]


def test_a_run_that_went_on_is_no_other_for_saying_what_auto_came_to(tmp_path):
    chosen = {"training__device": "cpu", "training__precision": "bf16", "training__compile": "false"}
    for name, settings in {"straight": dict.fromkeys(chosen, "auto"), "went_on": chosen, "other": chosen | {"training__precision": "fp32"}}.items():
        run = write_run(tmp_path / "runs" / name, **settings)
        start = {"step": 0, "device": "cpu", "precision": settings["training__precision"].replace("auto", "bf16"), "compiled": False}
        (run / "environment.jsonl").write_text(json.dumps(start) + "\n")
    straight, went_on, other = (open_history(tmp_path / "runs" / name, name) for name in ("straight", "went_on", "other"))
    assert differing([straight, went_on]) == [] and differing([straight, other]) == ["training.precision"]
    (tmp_path / "runs/straight/environment.jsonl").unlink()  # nobody knows what it came to
    assert open_history(tmp_path / "runs/straight", "straight").settings["training.precision"] == "auto"


@pytest.mark.slow
def test_importance_finds_what_mattered(grid):
    pytest.importorskip("optuna")
    pytest.importorskip("sklearn")
    whole, keys = story.comparable(histories(grid))
    assert len(whole) == 5 and keys == ["model.n_layer", "optim.lr"]  # without the one that was cut off
    shares = importance(whole, keys)
    assert list(shares) == ["optim.lr", "model.n_layer"] and shares["optim.lr"] > 0.7 and sum(shares.values()) == pytest.approx(1)


@pytest.mark.slow
def test_importance_takes_words_and_refuses_to_guess(tmp_path):
    pytest.importorskip("optuna")
    pytest.importorskip("sklearn")
    for number in range(8):
        write_run(tmp_path / f"sweep/{number}", end=3 + (number % 2), model__bias=bool(number % 2), optim__lr=0.01 * (1 + number // 4))
    whole, keys = story.comparable(histories(tmp_path / "sweep"))
    assert next(iter(importance(whole, keys))) == "model.bias"
    with pytest.raises(ValueError, match="needs 4 finished runs with all these settings, and there are 3"):
        importance(whole[:3], keys)


@pytest.mark.slow
def test_a_missing_optuna_is_a_sentence_on_the_page(grid, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "optuna", None)
    page = make(grid)
    assert "pip install optuna scikit-learn" in page and 'class="slices"><svg' in page


@pytest.mark.slow
def test_a_missing_matplotlib_stops_a_command_and_no_training(grid, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        make(grid, pictures=True)
    assert not (grid / "report.html").exists()
    monkeypatch.setattr(story, "find_spec", lambda name: None)
    run = grid / "lr=0.1,n_layer=2"
    assert story.after_training(run) == f"Report: {run / 'report.html'}, without curves: they need matplotlib (pip install matplotlib)"
    page = (run / "report.html").read_text()
    assert "<svg" not in page and "pip install matplotlib" in page and "text of 60" in page and "finished" in page


def test_what_goes_wrong_after_training_is_a_sentence(tmp_path):
    assert story.after_training(tmp_path) == f"No report was written: {tmp_path} is not a run: it has no config.yaml."


@pytest.mark.slow
def test_the_page_needs_no_network_and_nothing_in_it_is_obeyed(tmp_path):
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
def test_axes_are_written_in_plain_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    for number in range(7):  # more values than have a tick each
        write_run(tmp_path / f"runs/{number}", steps=6000, planned=6000, optim__lr=10.0 ** -number)
    page = make(tmp_path / "runs")
    assert "all losses are the same" in page
    assert "mathdefault" not in page and ">0.001</text>" in page and ">2 k</text>" in page


@pytest.mark.slow
def test_pictures_lie_beside_the_page(grid, capsys):
    pytest.importorskip("matplotlib")
    assert script.main(compose(script.ReportSettings, [f"runs_dir={grid.parent}", "runs=sweep"])) == 0
    assert all((grid / f"report-{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("curves", "slices"))
    assert str(grid / "report.html") in capsys.readouterr().out


def test_every_run_has_a_colour_of_its_own_until_there_are_too_many():
    assert len({color(number, 8) for number in range(8)}) == 8 == len(COLORS)
    assert color(0, 200) == "#d9702b" and color(199, 200) == "#9aa8b8"


@pytest.mark.slow
def test_runs_without_a_loss_are_no_obstacle(tmp_path):
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
def test_it_opens_sorts_and_shows_all_curves(grid, tmp_path):
    pytest.importorskip("matplotlib")
    make(grid)
    found, console = browse(grid / "report.html", tmp_path, """
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
        (run / "metrics.jsonl").symlink_to(rows[number % 3])
    start = time.perf_counter()
    page = make(tmp_path / "runs", pictures=True)
    with capsys.disabled():
        print(f"\n{len(page) / 2**20:.1f} MB in {time.perf_counter() - start:.1f} s")
    found, console = browse(tmp_path / "runs/report.html", tmp_path, "done(document.querySelectorAll('[data-axis=steps] svg:first-child .run').length)")
    assert len(page) < 10 * 2**20 and console == "" and found == 200


@pytest.mark.slow
def test_a_training_ends_with_its_report_and_its_samples_and_environment_are_kept(compose_tiny, tmp_path, capsys):
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
