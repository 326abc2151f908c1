"""python -m scripts.transfer: the best learning rates of narrow and wide models."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from conf.schema import compose
from scripts import transfer
from scripts.transfer import TransferSettings


@pytest.fixture
def grid(tmp_path):
    """Grids of AdamW and Muon, with two seeds; the best rate falls with the width without muP."""
    number = 0
    for optimizer, name in (("adamw", "lr"), ("muon", "muon_lr")):
        for parametrization, best in (("standard", {64: 0.04, 256: 0.01}), ("mup", {64: 0.04, 256: 0.02})):
            for width in (64, 256):
                for rate in (0.01, 0.02, 0.04):
                    for seed in (1, 2):
                        number += 1
                        folder = tmp_path / optimizer / f"run{number}"
                        folder.mkdir(parents=True)
                        settings = {"model": {"n_embd": width, "parametrization": parametrization}, "seed": seed,
                                    "optim": {"optimizer": optimizer, name: rate}, "training": {"max_steps": 2}}
                        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
                        # One seed alone has its best rate elsewhere.
                        loss = 2 + abs(rate - best[width]) * 10 + (0.5 if seed == 1 else 50 * rate)
                        if rate == best[width]:
                            loss -= 3
                        rows = [{"step": 2, "loss": loss, "tokens": 8, "seconds": 1}, {"step": 2, "val_loss": loss}]
                        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(grid, *overrides):
    return transfer.main(compose(TransferSettings, [f"runs_dir={grid}", *overrides]))


def test_best_rates_and_their_distance_are_printed(grid, capsys):
    assert run(grid, "runs=adamw,muon") == 0
    lines = capsys.readouterr().out.splitlines()
    for optimizer in ("adamw", "muon"):
        standard = next(line for line in lines if line.startswith(f"{optimizer}, standard"))
        assert "best rate 0.04 at width 64" in standard and "0.01 at width 256" in standard
        assert standard.endswith("2 of 2 steps of the grid apart")
        after = lines[lines.index(standard) + 1]
        assert re.search(r"With 0.04, width 256 has a loss of [\d.]+, 4.050 above its lowest", after)
        mup = next(line for line in lines if line.startswith(f"{optimizer}, mup"))
        assert mup.endswith("1 of 2 steps of the grid apart")


def test_a_rate_whose_loss_is_nan_is_not_the_best(grid, capsys):
    for number in (1, 2):
        path = grid / f"adamw/run{number}/metrics.jsonl"
        path.write_text(re.sub(r'"val_loss": \S+}', '"val_loss": NaN}', path.read_text()))
    assert run(grid, "runs=adamw") == 0
    assert "adamw, standard: best rate 0.04 at width 64 (loss " in capsys.readouterr().out


def test_losses_are_drawn(grid):
    pytest.importorskip("matplotlib")
    assert run(grid, "runs=adamw,muon", f"out={grid / 'transfer.png'}") == 0
    assert (grid / "transfer.png").read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_grid_is_refused(grid):
    for folder in sorted((grid / "adamw").iterdir())[1:]:
        (folder / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="do not have two widths with two rates each"):
        run(grid, "runs=adamw")


def test_a_run_without_a_known_learning_rate_is_named(grid):
    path = sorted((grid / "adamw").iterdir())[0] / "config.yaml"
    path.write_text(path.read_text().replace("adamw", "lion"))
    with pytest.raises(ValueError, match=r"run1 has no learning rate of adamw or muon"):
        run(grid, "runs=adamw")
