"""The page that shows attention: what is in it, and what it does in a real browser."""

from __future__ import annotations

import base64
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import browse, needs_chromium

from conf.schema import ConfigError, compose
from generation import inspection
from model import GPT, GPTConfig
from report import attention
from scripts import attention_map
from train import train

PROMPT = "The <b>fox</b> & the </script> dog."


def made(tmp_path: Path, *overrides: str) -> tuple[Path, dict]:
    """The page for a fresh model, and the data in it."""
    out = tmp_path / "page.html"
    assert attention_map.main(compose(attention_map.AttentionMapSettings, ["fresh=nano", f"prompt={PROMPT[:32]}", f"out={out}", *overrides])) == 0
    return out, data_of(out)


def data_of(page: Path) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def weights_of(data: dict) -> np.ndarray:
    T = len(data["words"])
    return np.frombuffer(base64.b64decode(data["weights"]), "<u2").reshape(data["layers"], data["heads"], T, T) / 65535


@pytest.mark.parametrize("flags", [{}, {"position": "rotary", "norm": "rms", "qk_norm": True, "bias": False}, {"n_kv_head": 2}], ids=str)
def test_the_weights_are_those_behind_the_logits(flags):
    """Recomputed by hand, layer by layer, from the residual stream; and the hooks change nothing and are gone."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=3, n_head=4, n_embd=32, **flags)).eval()
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.2)
    ids = torch.randint(50, (1, 9))
    logits, weights = inspection.attention_weights(model, ids)
    with torch.inference_mode():
        assert torch.equal(logits, model(ids)[0]) and weights.shape == (3, 4, 9, 9)
        x = model.wte(ids) + (model.wpe.weight[:9] if flags.get("position") != "rotary" else 0)
        rotary = model.rotary[:, :9] if flags.get("position") == "rotary" else None
        for layer, block in enumerate(model.h):
            y, expected = block.attn.forward_with_weights(block.ln_1(x), rotary)
            torch.testing.assert_close(weights[layer], expected[0], rtol=0, atol=1e-5)
            x = x + y
            x = x + block.mlp(block.ln_2(x))
    assert not any(block.attn._forward_hooks for block in model.h)


def test_the_page_holds_tokens_weights_and_next_tokens(tmp_path):
    page, data = made(tmp_path)
    weights = weights_of(data)
    assert "".join(data["words"]) == PROMPT[:32].replace(" ", "·") and weights.shape == (2, 2, 32, 32)
    assert np.allclose(weights.sum(-1), 1, atol=32 / 65535) and not np.triu(weights, 1).any()
    model, tokenizer, name, _ = attention_map.open_model(compose(attention_map.AttentionMapSettings, ["fresh=nano"]))
    assert not model.training and name == "nano, random weights"
    with torch.inference_mode():
        logits, expected = inspection.attention_weights(model, torch.tensor([tokenizer.encode(PROMPT[:32])]))
    assert np.allclose(weights, expected.numpy(), atol=0.51 / 65535)
    top = logits.softmax(-1).topk(inspection.N_NEXT)
    assert top.values[:, 0].std() > 1e-4  # they differ from position to position
    for position, row in enumerate(data["next"]):
        assert [word for word, _ in row] == [inspection.token_label(tokenizer, token) for token in top.indices[position].tolist()]
        assert np.allclose([p for _, p in row], top.values[position], atol=1e-5)
    assert not re.search(r"https?:|<link|@import|src=|url\(|[\"']//", attention.TEMPLATE.read_text()) and "is replaced" not in page.read_text()


def test_the_seed_decides_the_random_weights(tmp_path):
    first, again, other = (made(tmp_path, f"seed={seed}")[1]["weights"] for seed in (1, 1, 2))
    assert first == again != other


def test_tokens_cannot_end_the_script_they_are_in():
    page = attention.page("</script><b>", ["</script>", "<!--"], np.eye(2).reshape(1, 1, 2, 2), [[("</script>", 1.0)]] * 2)
    assert page.lower().count("</script>") == attention.TEMPLATE.read_text().lower().count("</script>")
    content = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert content["words"] == ["</script>", "<!--"] and content["name"] == "</script><b>"


def test_an_output_that_is_not_finite_is_one_sentence(tmp_path, monkeypatch):
    settings = compose(attention_map.AttentionMapSettings, ["fresh=nano", f"out={tmp_path / 'x.html'}"])
    monkeypatch.setattr(inspection, "attention_weights", lambda model, ids: (torch.full((26, 257), torch.nan), torch.zeros(2, 2, 26, 26)))
    with pytest.raises(ValueError, match="NaN or infinite"):
        attention_map.main(settings)
    assert not (tmp_path / "x.html").exists()


def test_a_run_gets_a_page_of_the_chosen_checkpoint(compose_tiny, tmp_path, capsys, monkeypatch):
    train(compose_tiny("training.max_steps=2"))
    opened, asked = attention_map.open_checkpoint, []
    monkeypatch.setattr(attention_map, "open_checkpoint", lambda run, which, device: asked.append(which) or opened(run, which, device))
    page = tmp_path / "runs/tiny/attention.html"
    for which in ("best", "last"):
        attention_map.main(compose(attention_map.AttentionMapSettings, [f"runs_dir={tmp_path / 'runs'}", "prompt=The quiet dog", f"checkpoint={which}"]))
        assert str(page) in capsys.readouterr().out and "".join(data_of(page)["words"]) == "The·quiet·dog"
        page.unlink()
    assert asked == ["best", "last"]


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        attention.draw("x", ["a", "b"], np.zeros((1, 1, 2, 2)))


@pytest.mark.slow
def test_png_writes_a_picture_beside_the_page(tmp_path):
    pytest.importorskip("matplotlib")
    page, _ = made(tmp_path, "png=true")
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_128_tokens_and_144_heads_stay_under_20_megabytes():
    weights = torch.rand(12, 12, 128, 128).tril().softmax(-1).numpy()
    following = [[("word", 0.5)] * inspection.N_NEXT] * 128
    assert len(attention.page("x", ["word"] * 128, weights, following)) < 20 * 2**20


@pytest.mark.parametrize("overrides, words", [
    (["fresh=modern-nan"], "did you mean modern-nano"), (["prompt="], "prompt is empty"), (["out=x.png"], "must end in .html"),
    (["fresh=nano", "run=x"], "exclude each other"),
])
def test_bad_settings_are_one_sentence(overrides, words):
    with pytest.raises(ConfigError, match=words):
        compose(attention_map.AttentionMapSettings, overrides)


def test_a_prompt_beyond_the_context_keeps_its_last_tokens(tmp_path, capsys):
    _, data = made(tmp_path, f"prompt={'x' * 20}{'y' * 32}")
    assert data["words"] == ["y"] * 32 and weights_of(data).shape[-1] == 32
    assert capsys.readouterr().out.splitlines()[0] == "The prompt has 52 tokens: the map shows the last 32, as many as the model reads and a page holds."


def test_a_prompt_too_large_for_a_page_keeps_its_last_tokens(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attention, "MAX_WEIGHTS", 4 * 7**2 + 3)
    _, data = made(tmp_path, "prompt=abcdefghijk")
    assert data["words"] == list("efghijk")
    assert "11 tokens: the map shows the last 7, as many as the model reads and a page holds." in capsys.readouterr().out


@pytest.mark.parametrize("text, label", [
    (b" the", "·the"), (b"\n\t", "⏎⇥"), (b"\r\n", "\\r⏎"), (b"", "∅"), (b"\xff", "\\xff"), ("\u0301".encode(), "◌\u0301"), ("\u00a0\u3000".encode(), "\\xa0\\u3000"),
    (b"\x1b[2J", "\\x1b[2J"), ("\u202e".encode(), "\\u202e"), ("中文".encode(), "中文"), (b"<b>&", "<b>&"), (b"x" * 12_000_000, "x" * 40 + "…")], ids=lambda value: repr(value)[:20])
def test_every_character_of_a_label_is_visible(text, label):
    class Tokenizer:
        def decode_bytes(self, tokens):
            return text

    assert inspection.token_label(Tokenizer(), 0) == label


@pytest.mark.parametrize("tokens", [1, 24, 128])
def test_the_labels_of_a_picture_do_not_overlap(monkeypatch, tokens):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(attention, "as_image", lambda figure, *_, **__: figure.draw_without_rendering() or drawn.append(figure) or b"")
    labels = [f"·t{number}$x$" for number in range(tokens)]
    attention.draw("x", labels, np.ones((2, 3, tokens, tokens)))
    axes = drawn[0].axes
    for cell, axis in ((axes[0], "yaxis"), (axes[3], "yaxis"), (axes[3], "xaxis"), (axes[5], "xaxis")):
        texts = [text for text in getattr(cell, axis).get_ticklabels() if text.get_text() and text.get_visible()]
        assert [text.get_text() for text in texts] == labels[:: max(1, labels.index(texts[1].get_text()) if tokens > 1 else 1)]
        low, high = ("y0", "y1") if axis == "yaxis" else ("x0", "x1")
        spans = sorted((getattr(text.get_window_extent(), low), getattr(text.get_window_extent(), high)) for text in texts)
        assert all(one[1] <= two[0] + 2 for one, two in itertools.pairwise(spans)), spans


@pytest.mark.slow
@needs_chromium
def test_the_page_opens_and_shows_all_heads(tmp_path):
    page, _ = made(tmp_path)
    found, console = browse(page, """
      const buttons = [...document.querySelectorAll("#grid button")];
      done({words: document.querySelectorAll("#words button").length, heads: buttons.length, title: document.title,
            sizes: buttons.map((button) => button.firstChild.width),
            different: new Set(buttons.map((button) => button.firstChild.toDataURL())).size, large: document.getElementById("large-title").textContent,
            reachable: [...document.querySelectorAll("#grid button, #words button")].every((button) => button.tabIndex === 0),
            labels: ["row-labels", "column-labels"].map((id) => [...document.querySelectorAll(`#${id} span`)].map((span) => span.textContent)),
            marked: [...document.querySelectorAll("#map .chosen")].map((span) => span.textContent), dark: getComputedStyle(document.body).colorScheme,
            apart: [...document.querySelectorAll("#row-labels span:not([hidden])")].every((span, number, all) =>
              !number || span.getBoundingClientRect().top >= all[number - 1].getBoundingClientRect().top + 10),
            named: buttons.map((button) => button.getAttribute("aria-label"))});""")
    assert console == ""
    words = data_of(page)["words"]
    assert found.pop("labels") == [words, words] and found.pop("marked") == [words[-1]] * 2 and found.pop("apart") and found.pop("dark") == "light dark"
    assert found == {"words": 32, "heads": 4, "title": "Attention of nano, random weights", "sizes": [32] * 4, "different": 4,
                     "large": "Mean of all heads", "reachable": True, "named": ["layer 0, head 0", "layer 0, head 1", "layer 1, head 0", "layer 1, head 1"]}


@pytest.mark.slow
@needs_chromium
def test_clicks_and_hovers_show_the_weights_of_the_tensor(tmp_path):
    page, data = made(tmp_path)
    weights = weights_of(data)
    found, console = browse(page, """
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
      const nextWords = [...document.querySelectorAll("#next tr")].map((line) => line.cells[0].textContent);
      const pressed = [...document.querySelectorAll("#grid button")].map((button) => button.getAttribute("aria-pressed"));
      const said = document.getElementById("cell").textContent;
      const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", {key}));
      words[5].focus();
      const byFocus = words.findIndex((word) => word.classList.contains("chosen"));
      hover(words[20]);
      press("ArrowRight"); press("ArrowRight"); press("ArrowLeft");
      const focused = words.indexOf(document.activeElement);
      const box = large.getBoundingClientRect();
      large.dispatchEvent(new MouseEvent("mousemove", {clientX: box.left + box.width * 3.5 / 32, clientY: box.top + box.height * 9.5 / 32}));
      const cell = document.getElementById("cell").textContent, column = document.getElementById("column").style.left;
      press("Escape");
      const reset = document.getElementById("cell").textContent;
      done({nextWords, pressed, said, byFocus, cell, column, reset, chosenCount: words.filter((word) => word.classList.contains("chosen")).length, mean, head, title, chosen, row, next, focused, bright, after: document.getElementById("large-title").textContent,
            colours: [words[3].style.background, words[25].style.background]});""")
    assert console == ""
    assert found["title"] == "Layer 1, head 0" and found["chosen"] == 12 and found["after"] == "Mean of all heads"
    for values, token, shown in ((weights.mean((0, 1)), 20, found["mean"]), (weights[1, 0], 12, found["head"])):
        expected = [values[token, other] if other <= token else values[other, token] for other in range(32)]
        assert np.allclose(shown, expected, atol=6e-5)
    assert found["row"] == "37.5%" and found["byFocus"] == 5 and found["focused"] == 6 and found["chosenCount"] == 1
    assert found["pressed"] == ["false", "false", "true", "false"]
    assert found["nextWords"] == [word for word, _ in data["next"][12]]
    head = weights[1, 0]
    for token, weight in sorted(enumerate(head[12, :13]), key=lambda pair: -pair[1])[:3]:
        assert f"({token}) {weight:.4f}" in found["said"]
    assert f"by {head[9, 3]:.4f}" in found["cell"] and found["column"] == "9.375%"
    assert found["reset"] != found["cell"] and f"{weights.mean((0, 1))[9, :10].max():.4f}" in found["reset"]
    assert np.allclose(found["next"], [p for _, p in data["next"][12]], atol=6e-4)
    assert "--back" in found["colours"][0] and "--ahead" in found["colours"][1]
    red = np.array(found["bright"])[np.argsort(weights[1, 0].ravel(), kind="stable")]
    assert (np.diff(red) >= 0).all() and red[0] == 0 and red[-1] == 255  # more weight, more light, up to cividis' yellow


@needs_chromium
@pytest.mark.slow
def test_a_large_page_answers_at_once(tmp_path):
    """144 heads over 128 tokens: everything can be pointed at and clicked; how long that takes is printed."""
    torch.manual_seed(0)
    weights = (4 * torch.randn(12, 12, 128, 128)).masked_fill(torch.ones(128, 128).triu(1).bool(), -torch.inf).softmax(-1).numpy()
    page = tmp_path / "large.html"
    page.write_text(attention.page("large", [f"w{i} " for i in range(128)], weights, [[("a", 0.5)]] * 128))
    found, console = browse(page, """
      const words = [...document.querySelectorAll("#words button")];
      const heads = [...document.querySelectorAll("#grid button")], times = [performance.now()];
      for (const act of [() => words.forEach(hover), () => heads.forEach((head) => head.click())]) {
        act();
        times.push(performance.now());
      }
      done({heads: heads.length, load: times[0], hover: (times[1] - times[0]) / 128, click: (times[2] - times[1]) / 144});""")
    print("milliseconds:", found)
    assert console == "" and found["heads"] == 144
