"""The page of serve.py: real clicks in a headless Chromium, on a server in this process."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import urllib.error
import urllib.request

import pytest
import torch
from browser import needs_chromium

from conf.sampling import SamplingConfig
from conf.schema import compose
from conf.serving import ServeSettings
from conf.settings import SampleSettings
from data.chat import with_markers
from data.tokenizer import ByteTokenizer
from generation import Engine, open_run
from generation.decoder import Decoder
from generation.inspection import predictions
from model import GPT, GPTConfig
from scripts.chromium import Chromium
from serving.decoding import Batcher, DecodingThread
from serving.tasks import Model
from training.device import Device

SCRIPT = "<script>hacked = 1</script><img src=x onerror='hacked = 1'>"
PROMPT = "it's <b>$HOME</b> `\"\\\n\té"


class HostileTokenizer(ByteTokenizer):
    def decode_bytes(self, ids):
        return b"".join(SCRIPT.encode() for _ in ids)


@pytest.fixture(scope="module")
def engines(tiny_runs):
    torch.manual_seed(0)
    tokenizer = HostileTokenizer()
    model = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=16)).eval()
    tiny = open_run(tiny_runs / "tiny", device="cpu", precision="fp32")
    return {"tiny": tiny, "hostile": Engine(model, tokenizer, Device("cpu", "fp32")), "talker": talker()}


def talker() -> Engine:
    """A model of conversations that does not end by itself."""
    tokenizer = with_markers(HostileTokenizer())
    model = GPT(GPTConfig(block_size=4096, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=16)).eval()
    model.wte.weight.data[256:] = 0
    return Engine(model, tokenizer, Device("cpu", "fp32"))


@pytest.fixture(scope="module")
def runs_dir(tiny_runs, tmp_path_factory):
    """A run that this test may add to, and a sweep of two."""
    folder = tmp_path_factory.mktemp("watched")
    for name in ("growing", "sweep/lr=1", "sweep/lr=2"):
        shutil.copytree(tiny_runs / "tiny", folder / name)
    (folder / "sweep/logs").mkdir()
    (folder / "growing/report.html").write_text(f"<h1>Report</h1>{SCRIPT}")
    return folder


@pytest.fixture(scope="module")
def address(engines, runs_dir):
    """The address of a server in a thread of this process."""
    pytest.importorskip("starlette", reason="needs starlette, which is optional")
    uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn, which is optional")
    from serving.app import make_app

    settings = compose(ServeSettings, [f"runs_dir={runs_dir}", "max_new_tokens=60"])
    thread = DecodingThread(Device("cpu", "fp32"))
    models = {}
    for name, engine in engines.items():
        models[name] = Model(name, engine, Batcher(thread, engine, Decoder(engine.model), 4, 8), [f"run=runs/{name}"])
    thread.start()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        running = uvicorn.Server(uvicorn.Config(make_app(models, settings), http="h11", ws="none", lifespan="off", log_level="error"))
        loop = threading.Thread(target=running.run, args=([listening],))
        loop.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        running.should_exit = True
        loop.join(timeout=60)
    thread.stop()


def post(address: str, path: str, **body: object) -> dict:
    request = urllib.request.Request(f"{address}/page/{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_losses_beyond_the_context_use_half_of_it(engines):
    engine = engines["hostile"]
    ids = torch.randint(256, (150,)).tolist()
    found = list(predictions(engine.model, ids, 3))
    with torch.no_grad():
        # Positions 64 to 95 are in the second sequence, which begins at 32.
        for place, start, end in ((40, 0, 64), (64, 32, 96), (95, 32, 96), (96, 64, 128)):
            logprobs = engine.model(torch.tensor([ids[start:end]]))[0, place - start].log_softmax(-1)
            assert found[place].logprob == pytest.approx(logprobs[ids[place + 1]].item(), abs=1e-4)
            assert list(found[place].top) == logprobs.topk(3).indices.tolist()
    assert len(found) == 150 and found[-1].logprob is None


def test_a_request_names_only_what_was_listed(address, runs_dir):
    listed = post(address, "list")
    assert [run["name"] for run in listed["runs"]] == ["growing", "sweep/lr=1", "sweep/lr=2"] and listed["sweeps"] == ["sweep"]
    rows = post(address, "sweep", sweep="sweep")["rows"]
    assert {row["run"][1] for row in rows} == {"lr=1", "lr=2"}
    first = post(address, "metrics", run="growing")
    assert first["rows"][0]["step"] == 1 and post(address, "metrics", run="growing", offset=first["end"])["rows"] == []
    for path, body in (("metrics", {"run": "../watched/growing"}), ("metrics", {"run": str(runs_dir / "growing")}), ("sweep", {"sweep": ".."}), ("sweep", {"sweep": "."})):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            post(address, path, **body)
    report = listed["runs"][0]["report"]
    with urllib.request.urlopen(f"{address}/{report}") as answer:
        assert "sandbox allow-scripts; default-src 'none'" in answer.headers["content-security-policy"]
        assert SCRIPT in answer.read().decode()
    for path in ("reports/growing", "reports/..%2fgrowing%2freport.html", "../growing/report.html"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/{path}")


def test_a_run_that_is_cut_back_is_read_again(runs_dir, tmp_path):
    from report.metrics import read_new_rows

    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert read_new_rows(path, 0, 100) == ([{"step": 1}, {"step": 2}], 0, 24)
    assert read_new_rows(path, 24, 100) == ([], 24, 24)
    path.write_bytes(b'{"step": 1}\n')
    assert read_new_rows(path, 24, 100) == ([{"step": 1}], 0, 12)


@contextlib.contextmanager
def opened(address: str):
    with Chromium(1000, 800) as browser:
        browser.open(address)
        browser.wait("document.querySelector('#settings input')")
        yield browser
        assert browser.console == []


@needs_chromium
def test_a_click_waits_until_its_element_is_shown():
    with Chromium(400, 400) as browser:
        browser.value("document.body.innerHTML = `<button hidden onclick='clicked = 1'>Late</button>`")
        browser.value("void setTimeout(() => { document.querySelector('button').hidden = false; }, 200)")
        browser.click("button")
        browser.wait("window.clicked === 1")


WROTE = "document.getElementById('written').textContent.startsWith('Wrote')"
TEXTS = "[...document.querySelectorAll('#panels .text')].map((text) => text.textContent)"


@needs_chromium
def test_the_page_writes_looks_and_watches(address, engines, runs_dir):
    with opened(address) as browser:
        write_and_branch(browser, engines["tiny"])
        show_hostile_text(browser)
        chat(browser)
        look_inside(browser, engines["tiny"])
        watch(browser, runs_dir)
        fit_and_have_names(browser)


def write_and_branch(browser: Chromium, engine: Engine) -> None:
    limits = browser.value("[...document.querySelectorAll('#settings input[type=number]')].map(({id, value, min, max}) => [id, value, min, max])")
    assert [f"setting-{name}" for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")] == [row[0] for row in limits]
    assert limits[0] == ["setting-max_new_tokens", "60", "1", ""] and limits[3] == ["setting-top_p", "0.9", "0", "1"]
    browser.click("#prompt")
    browser.type("The ")
    browser.value("document.getElementById('model-1').value = 'tiny'")
    browser.click("#ask .primary")
    browser.wait(WROTE)
    expected = engine.complete([("The ", 0)], SamplingConfig(max_new_tokens=60))[0].text
    assert browser.value(TEXTS) == ["The " + expected] * 2
    # Another token in place of one beyond the context.
    place = next(place for place in range(engine.model.config.block_size, 60) if expected[place].isalpha())
    browser.click(f"document.querySelectorAll('#panels .token')[{place}]")
    other = browser.value("document.querySelectorAll('.popover .word')[2].textContent").replace("·", " ").replace("⏎", "\n")
    browser.click(".popover li:nth-child(2) button")
    browser.wait(WROTE)
    prompt = "The " + expected[:place] + other
    assert browser.value(TEXTS)[0] == prompt + engine.complete([(prompt, 0)], SamplingConfig(max_new_tokens=60))[0].text
    browser.click("document.querySelector('.tree button')")
    assert browser.value(TEXTS)[0] == "The " + expected
    # By keyboard: to the next token, its alternatives, and back.
    browser.value("document.querySelector('#panels .token').focus()")
    browser.press("ArrowRight")
    browser.press("Enter")
    assert browser.value("document.activeElement.closest('.popover') !== null")
    browser.press("Escape")
    assert browser.value("document.activeElement === document.querySelectorAll('#panels .token')[1]")


def show_hostile_text(browser: Chromium) -> None:
    browser.value(f"document.getElementById('prompt').value = {json.dumps(PROMPT)}")
    browser.value("document.getElementById('model-0').value = 'hostile'; document.getElementById('model-1').value = ''")
    browser.click("#ask .primary")
    browser.wait(WROTE)
    assert browser.value(TEXTS)[0] == PROMPT + 60 * SCRIPT
    assert browser.value("document.querySelectorAll('script').length + document.images.length === 1 && !('hacked' in window)")
    browser.click("#panels [value=command]")
    browser.wait("document.querySelector('.copied code')")
    words = shlex_bash(browser.value("document.querySelector('.copied code').textContent"))
    settings = compose(SampleSettings, words[2:])
    assert words[:2] == ["python", "sample.py"] and (settings.run, settings.prompt, settings.max_new_tokens) == ("runs/hostile", PROMPT, 60)
    # Long enough to be stopped.
    browser.value("document.getElementById('setting-max_new_tokens').value = 8000")
    browser.click("#ask .primary")
    browser.wait("document.querySelectorAll('#panels .token').length > 20")
    browser.click("#stop-writing")
    browser.wait("document.querySelector('.ending').textContent === 'Stopped.'")
    assert 20 < browser.value("document.querySelectorAll('#panels .token').length") < 8000


KEEP_REQUESTS = """asked = []; const send = fetch;
fetch = (path, options) => { asked.push(JSON.parse(options.body)); return send(path, options); }"""
ANSWERED = "document.getElementById('chatted').textContent.startsWith('Wrote')"


def chat(browser: Chromium) -> None:
    browser.click("nav a[href='#chat']")
    browser.value(KEEP_REQUESTS)
    browser.value("document.getElementById('setting-max_new_tokens').value = 5; document.getElementById('system').value = 'S'")

    def shown(selector: str) -> list[str]:
        return browser.value(f"[...document.querySelectorAll('#turns {selector}')].map((one) => one.textContent)")

    def answered(messages: list[tuple[str, str]], seed: int, texts: list[str]) -> dict:
        browser.wait(ANSWERED)
        body = browser.value("asked.pop()")
        assert [(one["role"], one["content"]) for one in body["messages"]] == [("system", "S"), *messages]
        assert (body["seed"], body["max_tokens"]) == (seed, 5) and shown(".text") == texts
        return body

    browser.click("#question")
    browser.type("<b>a?")
    browser.press("Enter")
    asked = [("user", "<b>a?")]
    answered(asked, 1337, ["<b>a?", 5 * SCRIPT])
    browser.click(".assistant [value=again]")
    answered(asked, 1338, ["<b>a?", 5 * SCRIPT])
    assert browser.value("document.activeElement.value") == "again" and shown(".place")[1] == "2 of 2"
    browser.click(".assistant [value=previous]")
    assert browser.value("document.activeElement.value") == "following" and shown(".place")[1] == "1 of 2"
    # Another token in place of the third one, by keyboard.
    browser.value("document.querySelector('#turns .token').focus()")
    for key in ("ArrowRight", "ArrowRight", "Enter", "Enter"):
        browser.press(key)
    assert browser.value("document.activeElement === document.querySelectorAll('#turns .token')[2]")
    body = answered([*asked, ("assistant", 3 * SCRIPT)], 1337, ["<b>a?", 8 * SCRIPT])
    assert body["continue_final_message"] and shown(".place")[1] == "3 of 3" and shown(".chosen") == [SCRIPT]
    browser.click(".user [value=edit]")
    browser.type("!")
    browser.click(".user .primary")
    answered([("user", "<b>a?!")], 1337, ["<b>a?!", 5 * SCRIPT])
    assert shown(".place") == ["2 of 2", "1 of 1"]
    browser.value("document.getElementById('setting-max_new_tokens').value = 3000")
    browser.click("#question")
    browser.type("b?")
    browser.press("Enter")
    browser.wait("document.querySelectorAll('#turns .token').length > 20")
    # A click would miss it: the page scrolls as the text grows.
    browser.value("document.getElementById('stop-answering').focus()")
    browser.press("Enter")
    browser.wait("[...document.querySelectorAll('#turns .ending')].pop().textContent.startsWith('Stopped.')")
    assert browser.value("document.activeElement.id") == "question"
    assert [one["role"] for one in browser.value("asked.pop()")["messages"]] == ["system", "user", "assistant", "user"]
    assert len(shown(".panel")) == 4 and browser.value("document.images.length === 0 && !('hacked' in window)")


def shlex_bash(command: str) -> list[str]:
    """The words that bash passes."""
    import subprocess

    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True).stdout
    return printed.decode().split("\0")[:-1]


def look_inside(browser: Chromium, engine: Engine) -> None:
    browser.click("nav a[href='#look']")
    browser.click("#text")
    browser.type("The small dog")
    browser.click("#inspect .primary")
    frame = "document.getElementById('attention').contentDocument"
    browser.wait(f"{frame}?.querySelectorAll('#words button').length === 13")
    assert not browser.value("document.getElementById('found').hidden")
    *before, last = predictions(engine.model, engine.encode("The small dog"), 1)
    loss = -sum(one.logprob for one in before) / len(before)
    assert browser.value("document.getElementById('loss').textContent").startswith(f"{loss:.3f} nats per token")
    [(most_likely, _)] = last.top.items()
    assert browser.value("document.querySelector('#next .word').textContent") == engine.decode([most_likely]).replace(" ", "·")
    assert browser.value(f"{frame}.querySelectorAll('#grid button').length") == engine.model.config.n_layer * engine.model.config.n_head


def watch(browser: Chromium, runs_dir) -> None:
    browser.click("nav a[href='#watch']")
    browser.wait("document.querySelectorAll('#curves path').length === 2")
    assert browser.value("document.querySelectorAll('#runs tbody tr').length") == 3
    with (runs_dir / "growing/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 61, "sample": SCRIPT}) + "\n" + json.dumps({"step": 61, "val_loss": 1.5}) + "\n")
    browser.value("document.querySelector('#runs input:checked')?.value === 'growing' || document.querySelector('#runs input').click()")
    browser.wait("document.querySelector('#samples blockquote')")
    assert browser.value("document.querySelector('#samples blockquote').textContent") == SCRIPT
    assert browser.value("document.querySelector('#curves svg').ariaLabel").find("growing: validation loss 1.5000") > 0
    assert browser.value("document.querySelectorAll('#leaderboard tbody tr').length") == 2


def fit_and_have_names(browser: Chromium) -> None:
    browser.resize(360, 800)
    for view in ("write", "chat", "look", "watch"):
        browser.value(f"location.hash = '{view}'")
        browser.wait(f"!document.querySelector('[data-view={view}]').hidden")
        assert browser.value("document.documentElement.scrollWidth") <= 360
        if view == "look":
            browser.wait("document.getElementById('attention').contentDocument.documentElement.scrollWidth === document.getElementById('attention').clientWidth")
        nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
        roles = ("button", "link", "textbox", "combobox", "spinbutton", "slider", "checkbox", "img", "Iframe")
        unnamed = [node["role"]["value"] for node in nodes if node.get("role", {}).get("value") in roles and not node["name"]["value"]]
        assert unnamed == [], view
