"""The page that shows attention: what is in it, and what it does in a real browser."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.schema import ConfigError, compose
from model import GPT, GPTConfig
from scripts import attention_map as story
from train import train

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "headless_shell"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--window-size=1400,1000"]
PROMPT = "The <b>fox</b> & the </script> dog."


def made(tmp_path: Path, *overrides: str) -> tuple[Path, dict]:
    """The page for a fresh model, and the data in it."""
    out = tmp_path / "page.html"
    assert story.main(compose(story.AttentionMapSettings, ["fresh=modern-nano", f"prompt={PROMPT[:32]}", f"out={out}", *overrides])) == 0
    return out, data_of(out)


def data_of(page: Path) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def weights_of(data: dict) -> np.ndarray:
    T = len(data["words"])
    return np.frombuffer(base64.b64decode(data["weights"]), "<u2").reshape(data["layers"], data["heads"], T, T) / 65535


@pytest.mark.parametrize("flags", [{}, {"position": "rotary", "norm": "rms", "qk_norm": True, "bias": False}, {"n_kv_head": 2}], ids=str)
def test_the_weights_are_those_that_led_to_the_logits(flags):
    """Recomputed by hand, layer by layer, from the residual stream; and the hooks change nothing and are gone."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=3, n_head=4, n_embd=32, **flags)).eval()
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.2)
    ids = torch.randint(50, (1, 9))
    logits, weights = story.look(model, ids)
    with torch.inference_mode():
        assert torch.equal(logits, model(ids)[0]) and weights.shape == (3, 4, 9, 9)
        x = model.wte(ids) + (model.wpe.weight[:9] if flags.get("position") != "rotary" else 0)
        rotary = model.rotary[:, :9] if flags.get("position") == "rotary" else None
        for layer, block in enumerate(model.h):
            y, expected = block.attn.explicit(block.ln_1(x), rotary)
            torch.testing.assert_close(weights[layer], expected[0], rtol=0, atol=1e-5)
            x = x + y
            x = x + block.mlp(block.ln_2(x))
    assert not any(block.attn._forward_hooks for block in model.h)


def test_the_page_holds_the_tokens_the_weights_and_the_likely_next_tokens(tmp_path):
    page, data = made(tmp_path)
    weights = weights_of(data)
    assert "".join(data["words"]) == PROMPT[:32] and weights.shape == (2, 2, 32, 32)
    assert np.allclose(weights.sum(-1), 1, atol=32 / 65535) and not np.triu(weights, 1).any()
    assert len(data["next"]) == 32 and all(len(row) == story.N_NEXT for row in data["next"])
    assert all(a[1] >= b[1] for row in data["next"] for a, b in pairwise(row))
    text = page.read_text()
    assert not re.search(r"https?://|<link|@import|src=", text) and "is replaced" not in text


def test_a_trained_run_gets_its_page_in_its_folder(compose_tiny, tmp_path, capsys):
    train(compose_tiny("training.max_steps=3", "training.sample_tokens=0"))
    assert story.main(compose(story.AttentionMapSettings, [f"runs_dir={tmp_path / 'runs'}", "prompt=The quiet dog"])) == 0
    page = tmp_path / "runs/tiny/attention.html"
    assert "".join(data_of(page)["words"]) == "The quiet dog" and str(page) in capsys.readouterr().out


def test_a_still_picture_lies_beside_it(tmp_path):
    pytest.importorskip("matplotlib")
    page, _ = made(tmp_path, "png=true")
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_128_tokens_and_144_heads_stay_under_20_megabytes():
    weights = torch.rand(12, 12, 128, 128).tril().softmax(-1)
    following = [[("word", 0.5)] * story.N_NEXT] * 128
    assert len(story.page("x", ["word"] * 128, weights, following)) < 20 * 2**20


@pytest.mark.parametrize("overrides, words", [
    (["fresh=modern-nan"], "did you mean modern-nano"), (["prompt="], "prompt is empty"), (["out=x.png"], "must end in .html"),
    (["fresh=nano", "run=x"], "exclude each other"),
])
def test_bad_settings_are_one_sentence(overrides, words):
    with pytest.raises(ConfigError, match=words):
        compose(story.AttentionMapSettings, overrides)


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(tmp_path):
    with pytest.raises(ValueError, match="33 tokens long, this model reads 32"):
        story.main(compose(story.AttentionMapSettings, ["fresh=nano", f"prompt={'x' * 33}", f"out={tmp_path / 'x.html'}"]))


def browse(page: Path, tmp_path: Path, script: str) -> tuple[object, str]:
    """Open a copy of the page that also runs `script`, which calls done(value); return that value and the console."""
    tried = tmp_path / "tried.html"
    tried.write_text(page.read_text().replace("</body>", f"""<pre id="result"></pre><script>
      window.addEventListener("error", (event) => console.error("uncaught", event.message));
      const done = (value) => {{ document.getElementById("result").textContent = JSON.stringify(value); }};
      const hover = (element) => element.dispatchEvent(new MouseEvent("mouseenter"));
      {{ {script} }}</script></body>"""))
    ran = subprocess.run([CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom",
                          tried.as_uri()], capture_output=True, text=True, timeout=120)
    result = re.search(r'<pre id="result">(.*?)</pre>', ran.stdout, re.DOTALL)[1]
    return json.loads(html.unescape(result)), "\n".join(line for line in ran.stderr.splitlines() if "CONSOLE" in line)


@needs_chromium
def test_it_opens_without_errors_and_all_heads_are_there(tmp_path):
    page, _ = made(tmp_path)
    found, console = browse(page, tmp_path, """
      const buttons = [...document.querySelectorAll("#grid button")];
      done({words: document.querySelectorAll("#words button").length, heads: buttons.length, title: document.title,
            sizes: buttons.map((button) => button.firstChild.width), large: document.getElementById("large-title").textContent,
            reachable: [...document.querySelectorAll("#grid button, #words button")].every((button) => button.tabIndex === 0),
            named: buttons.every((button) => button.getAttribute("aria-label"))});""")
    assert console == ""
    assert found == {"words": 32, "heads": 4, "title": "Attention of modern-nano, random weights", "sizes": [32] * 4,
                     "large": "Mean of all heads", "reachable": True, "named": True}


@needs_chromium
def test_a_click_enlarges_and_a_hover_shows_what_the_tensor_says(tmp_path):
    page, data = made(tmp_path)
    weights = weights_of(data)
    found, console = browse(page, tmp_path, """
      const words = [...document.querySelectorAll("#words button")], large = document.getElementById("large");
      const shown = () => words.map((word) => Number(word.dataset.weight));
      hover(words[20]);
      const mean = shown();
      document.querySelector('#grid button[data-layer="1"][data-head="0"]').click();
      hover(words[12]);
      const pixels = large.getContext("2d").getImageData(0, 0, 32, 32).data;
      const bright = [...Array(32 * 32).keys()].map((index) => pixels[4 * index]);
      const head = shown(), title = document.getElementById("large-title").textContent;
      const chosen = words.findIndex((word) => word.classList.contains("chosen"));
      const row = document.getElementById("row").style.top;
      const next = [...document.querySelectorAll("#next tr")].map((line) => Number(line.cells[1].textContent));
      words[12].focus();
      document.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
      const focused = words.indexOf(document.activeElement);
      document.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
      done({mean, head, title, chosen, row, next, focused, bright, after: document.getElementById("large-title").textContent,
            colours: [words[3].style.background, words[25].style.background]});""")
    assert console == ""
    assert found["title"] == "Layer 1, head 0" and found["chosen"] == 12 and found["after"] == "Mean of all heads"
    for values, token, shown in ((weights.mean((0, 1)), 20, found["mean"]), (weights[1, 0], 12, found["head"])):
        expected = [values[token, other] if other <= token else values[other, token] for other in range(32)]
        assert np.allclose(shown, expected, atol=6e-5)
    assert found["row"] == "37.5%" and found["focused"] == 13
    assert np.allclose(found["next"], [p for _, p in data["next"][12]], atol=6e-4)
    assert "--back" in found["colours"][0] and "--ahead" in found["colours"][1]
    red = np.array(found["bright"])[np.argsort(weights[1, 0].ravel(), kind="stable")]
    assert (np.diff(red) >= 0).all() and red[0] == 0 and red[-1] > 200  # more weight, more light


@needs_chromium
@pytest.mark.slow
def test_a_large_page_answers_at_once(tmp_path):
    """144 heads over 128 tokens: to point at a token takes less than a frame or two, and no error comes up."""
    torch.manual_seed(0)
    weights = (4 * torch.randn(12, 12, 128, 128)).masked_fill(torch.ones(128, 128).triu(1).bool(), -torch.inf).softmax(-1)
    page = tmp_path / "large.html"
    page.write_text(story.page("large", [f"w{i} " for i in range(128)], weights, [[("a", 0.5)]] * 128))
    start = time.perf_counter()
    found, console = browse(page, tmp_path, """
      const words = [...document.querySelectorAll("#words button")];
      words.forEach(hover);
      done(document.querySelectorAll("#grid button").length);""")
    print(f"{time.perf_counter() - start:.1f} s for everything, 128 tokens pointed at")
    assert console == "" and found == 144
