"""python -m scripts.scale: a simulated step on many GPUs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from conf.schema import compose
from model import GPT
from model.skip_init import SkipInit
from scripts import scale
from scripts.scale import ScaleSettings, newton_schulz_flops, simulate

PAGE = (Path(__file__).parent.parent / "docs/scale.md").read_text()
BLOCKS = re.findall(r"^    python -m scripts.scale (.*)\n\n((?:.+\n|\n(?=\|))+)", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("words", "printed"), [
    block if number == 0 else pytest.param(*block, marks=pytest.mark.slow)
    for number, block in enumerate(BLOCKS)], ids=range(len(BLOCKS)))
def test_the_page_shows_what_the_script_prints(capsys, words, printed):
    assert scale.main(compose(ScaleSettings, words.split())) == 0
    assert capsys.readouterr().out.strip() == printed.strip()


@pytest.fixture(scope="module")
def simulated():
    """`simulated(GPUs, overrides, **assumptions)`: a step of a small model."""
    def call(size, *overrides, **assumptions):
        words = ["model=nano", "training.batch_size=1", "training.tokens_per_step=65536",
                 *overrides]
        settings = compose("config", words)
        settings = replace(settings, model=replace(settings.model, vocab_size=2**14, n_embd=256))
        with SkipInit("meta"):
            model = GPT(settings.model)
        return simulate(model, settings, replace(ScaleSettings(), **assumptions), size), model
    return call


def test_gradients_and_weights_take_their_bytes_by_hand(simulated):
    step, model = simulated(8, "optim=adamw", latency=0.0, message=0.0)
    sent = 4 * sum(weights.numel() for weights in model.parameters()) * 7 / 8
    assert step.exchange == pytest.approx(sent / 360e9, rel=0.02)
    assert step.gather == pytest.approx(sent / 360e9, rel=0.02)
    assert step.compute == pytest.approx(model.flops_per_token() * 65536 / 8 / (0.4 * 989e12))


def test_adamws_state_falls_with_the_number_of_gpus(simulated):
    one, many = (simulated(size, "optim=adamw")[0] for size in (1, 16))
    assert many.state_bytes == pytest.approx(one.state_bytes / 16, rel=0.05)


def test_newton_schulz_is_divided_until_each_gpu_has_a_matrix(simulated):
    one, two, many, more = (simulated(size, "optim=muon")[0] for size in (1, 2, 64, 128))
    assert two.newton_schulz == pytest.approx(one.newton_schulz / 2, rel=0.2)
    assert many.newton_schulz == more.newton_schulz > 0
    assert newton_schulz_flops((30, 10)) == 5 * (4 * 10 * 10 * 30 + 2 * 10**3)


def test_two_levels_send_less_between_nodes(simulated):
    direct, levels = (simulated(64, "optim=adamw", two_levels=choice, latency=0.0, message=0.0)[0]
                      for choice in (False, True))
    assert levels.exchange < direct.exchange / 3


def test_bad_settings_are_one_sentence():
    from conf.yaml_files import ConfigError

    with pytest.raises(ConfigError, match="device=abacus is not known: choose one of a10, "):
        compose(ScaleSettings, ["device=abacus"])
