"""Serving: requests decode together, the answers are those of sample.py, and no request does harm."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import serve
from bench import serve as bench
from conf.sampling import SamplingConfig
from conf.schema import ConfigError, compose
from conf.serving import ServeSettings
from data.chat import Message, with_markers
from data.tokenizer import ByteTokenizer, CharTokenizer
from generation import open_run
from generation.chat import Conversation, next_answer
from generation.decoder import Decoder
from generation.engine import Engine
from model.gpt import GPT, GPTConfig
from serving.decoding import Batcher, DecodingThread, Generation, Sample
from serving.fields import Refused
from serving.tasks import Model
from training.device import Device

ROOT = Path(__file__).parent.parent
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ENDLESS = {"prompt": "The", "max_tokens": 8000}


@pytest.fixture(scope="module")
def engine(tiny_runs):
    return open_run(tiny_runs / "tiny", device="cpu", precision="fp32")


@contextlib.contextmanager
def decoding(*engines: Engine, rows: int = 16, max_requests: int = 64):
    """The batcher of each engine, in one running thread."""
    thread = DecodingThread(engines[0].device)
    batchers = [Batcher(thread, engine, Decoder(engine.model), rows, max_requests) for engine in engines]
    thread.start()
    try:
        yield batchers
    finally:
        thread.stop()
        thread.join(timeout=60)
        assert not thread.is_alive()


class Server:
    """A server in a thread of this process, and its clients."""

    def __init__(self, port: int, models: dict[str, Model], connections: set[object]) -> None:
        self.port, self.models, self.connections = port, models, connections

    def ask(self, path: str, body: object, **headers: str) -> tuple[int, dict]:
        """The status and the JSON that answer a body, which is JSON or bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request("POST" if body is not None else "GET", path, None if body is None else content, sent)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def openai(self):
        import openai

        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="secret", max_retries=0)


@contextlib.contextmanager
def serving(engines: dict[str, Engine], *overrides: str, max_requests: int = 64):
    pytest.importorskip("starlette", reason="needs starlette, which is optional")
    uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn, which is optional")
    from serving.app import make_app

    with contextlib.ExitStack() as stack:
        batchers = stack.enter_context(decoding(*engines.values(), max_requests=max_requests))
        models = {name: Model(name, engine, batcher) for (name, engine), batcher in zip(engines.items(), batchers, strict=True)}
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        running = serve.make_server(uvicorn, make_app(models, compose(ServeSettings, ["max_new_tokens=40", *overrides])), batchers[0].thread)
        loop = threading.Thread(target=running.run, args=([listening],))
        loop.start()
        try:
            yield Server(listening.getsockname()[1], models, running.server_state.connections)
        finally:
            running.should_exit = True
            loop.join(timeout=60)


@pytest.fixture(scope="module")
def talker():
    """A model of conversations with random weights."""
    torch.manual_seed(0)
    tokenizer = with_markers(ByteTokenizer())
    model = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16)).eval()
    return Engine(model, tokenizer, Device("cpu", "fp32"))


@pytest.fixture(scope="module")
def server(engine, talker):
    with serving({"tiny": engine, "talker": talker}) as running:
        yield running


def texts_of(engine: Engine, prompt: str, n: int = 1, **rules: object) -> list[str]:
    """The completions that sample.py prints."""
    config = SamplingConfig(**{"max_new_tokens": 40} | rules)
    return [one.text for one in engine.complete([(prompt, number) for number in range(n)], config)]


def wait_until(holds) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


# Continuous batching


async def collected(generation: Generation) -> tuple[list[str], list[int]]:
    """The texts and the numbers of tokens of a generation."""
    texts, counts = [""] * len(generation.jobs), [0] * len(generation.jobs)
    async for piece in generation.pieces():
        texts[piece.index] += piece.text
        counts[piece.index] = piece.n_tokens
    return texts, counts


def test_a_text_does_not_depend_on_its_company(engine):
    """More sequences than places, of other lengths and rules; they come while others are decoded."""
    cases = [("The", 1, {}), ("A", 3, {"temperature": 0}), ("every", 2, {"seed": 4, "top_k": 3}), ("No", 4, {"top_p": 0.5, "stop": "e"}),
             ("its", 1, {"max_new_tokens": 90}), ("The old", 2, {"temperature": 1.5, "top_k": 0, "max_new_tokens": 7})]

    async def together(batcher):
        async def one(delay, prompt, n, rules):
            await asyncio.sleep(0.004 * delay)
            rules = SamplingConfig(**{"max_new_tokens": 40} | rules)
            jobs = [(engine.encode(prompt), number) for number in range(n)]
            generation = Generation(jobs, rules, [rules.stop], streams=delay % 2 == 0)
            batcher.submit(generation)
            return (await collected(generation))[0]
        return await asyncio.gather(*(one(number, *case) for number, case in enumerate(cases)))

    with decoding(engine, rows=5) as [batcher]:
        step, sizes = batcher.step, []
        batcher.step = lambda: sizes.append(len(batcher.batch.rows)) or step()
        texts = asyncio.run(together(batcher))
    assert texts == [texts_of(engine, prompt, n, **rules) for prompt, n, rules in cases]
    assert 1 < max(sizes) <= 5 and len(sizes) < sum(sizes)


def test_a_client_that_goes_frees_its_place(server):
    """Of a stream, and of a request that would be answered whole."""
    batcher = server.models["tiny"].batcher
    for body in (ENDLESS | {"model": "tiny", "stream": True}, ENDLESS | {"model": "tiny"}):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", COMPLETIONS, json.dumps(body), {"Content-Type": "application/json"})
        wait_until(lambda: batcher.batch.rows)
        connection.close()
        wait_until(lambda: not batcher.open and not batcher.batch.rows)


def test_a_client_that_does_nothing_is_cut_off(server, monkeypatch, caplog):
    """It reads no answer, sends no request, or sends one letter by letter. Another one, which reads for longer, is not."""
    monkeypatch.setattr("serving.connection.CHECK_SECONDS", 0.2)
    logging.getLogger("uvicorn.error").addHandler(caplog.handler)

    def connected(sent: bytes) -> socket.socket:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**13)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(sent)
        return connection

    def request(**fields: object) -> bytes:
        body = json.dumps({"model": "tiny"} | fields)
        return f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()

    # The echo of a long prompt fills what the system buffers.
    long = {"prompt": "a" * 2**19, "truncate_prompt": True, "n": 15, "echo": True, "max_tokens": 5, "stream": True}
    idle = [connected(sent) for sent in (b"", b"GET /v1/mod", request(**long))]
    slow, reading = connected(b"GET /v1/models HTTP/1.1\r\nX: "), connected(request(**ENDLESS, stream=True))
    # Once the last one is answered, all have been accepted.
    assert reading.recv(2**16)
    end = time.monotonic() + 60
    while len(server.connections) > 1:
        assert reading.recv(2**16) and time.monotonic() < end
        with contextlib.suppress(OSError):
            slow.sendall(b"a")
    assert reading.recv(2**16) and caplog.records == []
    for connection in (*idle, slow, reading):
        connection.close()
    wait_until(lambda: not server.models["tiny"].batcher.open)


def read_rest(connection: socket.socket) -> bytes:
    """What arrives until the other side ends the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(2**16):
            received += part
    return received


def test_open_requests_are_limited(engine):
    async def flood(batcher):
        for _ in range(2):
            batcher.submit(Generation([([1], 0)], SamplingConfig(5000)))
        with pytest.raises(Refused, match="2 requests are open, which is the limit"):
            batcher.submit(Generation([([1], 0)], SamplingConfig(5000)))

    with decoding(engine, max_requests=2) as [batcher]:
        asyncio.run(flood(batcher))


def test_a_failure_ends_the_requests_and_not_the_thread(engine, monkeypatch):
    def broken_step():
        raise ValueError("NaN")

    async def fail_and_go_on(batcher):
        generations = [Generation([([1], 0)], SamplingConfig(3)) for _ in range(2)]
        with monkeypatch.context() as broken:
            broken.setattr(batcher.batch, "step", broken_step)
            batcher.submit(generations[0])
            with pytest.raises(ValueError, match="NaN"):
                await collected(generations[0])
        batcher.submit(generations[1])
        assert (await collected(generations[1]))[1] == [3] and await batcher.call(lambda: 5) == 5
        with pytest.raises(ZeroDivisionError):
            await batcher.call(lambda: 1 / 0)

    with decoding(engine) as [batcher]:
        asyncio.run(fail_and_go_on(batcher))


def test_a_text_that_ends_in_a_step_that_fails_is_given(engine, monkeypatch):
    add, ready = Sample.add, threading.Event()

    def fail_at_second_token(sample, token, logits):
        if sample.completion.tokens:
            raise KeyError(token)
        return add(sample, token, logits)

    async def submit_two(batcher):
        long, short = (Generation([([1], 0)], SamplingConfig(n)) for n in (3, 1))
        batcher.thread.call(ready.wait)
        batcher.submit(long)
        batcher.submit(short)
        ready.set()
        with pytest.raises(KeyError):
            await collected(long)
        assert (await asyncio.wait_for(collected(short), 5))[1] == [1]

    monkeypatch.setattr(Sample, "add", fail_at_second_token)
    with decoding(engine) as [batcher]:
        asyncio.run(submit_two(batcher))


def test_a_vocabulary_may_be_smaller_than_the_alternatives():
    """Such as that of DNA."""
    async def alternatives(batcher):
        generation = Generation([([0], 0)], SamplingConfig(3), top=20)
        batcher.submit(generation)
        return [len(token.top) async for piece in generation.pieces() for token in piece.tokens]

    model = GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=1, n_embd=8)).eval()
    with decoding(Engine(model, CharTokenizer("ACGT", with_end_of_text=False), Device("cpu", "fp32"))) as [batcher]:
        assert asyncio.run(alternatives(batcher)) == [4, 4, 4]


def test_stopping_ends_what_is_open(engine):
    async def stop(batcher):
        running, waiting = Generation([([1], 0)], SamplingConfig(5000)), Generation([([1], 0)] * 16, SamplingConfig(5000))
        batcher.submit(running)
        batcher.submit(waiting)
        batcher.thread.stop()
        for generation in (running, waiting):
            with pytest.raises(Refused, match="The server was stopped"):
                await collected(generation)
        with pytest.raises(Refused, match="The server was stopped"):
            batcher.submit(running)

    with decoding(engine) as [batcher]:
        asyncio.run(stop(batcher))


# OpenAI's API


def test_the_openai_client_gets_the_texts_of_sample_py(server, engine):
    pytest.importorskip("openai", reason="needs openai, which is optional")
    with server.openai() as client:
        assert [model.id for model in client.models.list()] == ["tiny", "talker"]
        made = client.completions.create(model="tiny", prompt="The", n=3, seed=5, max_tokens=30, top_p=0.8, extra_body={"top_k": 9})
        assert [one.text for one in made.choices] == texts_of(engine, "The", 3, seed=5, max_new_tokens=30, top_p=0.8, top_k=9)
        pieces = list(client.completions.create(model="tiny", prompt="The", seed=2, stream=True, stream_options={"include_usage": True}))
        assert "".join(piece.choices[0].text for piece in pieces[:-1]) == texts_of(engine, "The", seed=2)[0]
        assert len(pieces) > 10 and pieces[-1].usage.total_tokens == 43
        echo, *rest = client.completions.create(model="tiny", prompt="The", echo=True, logprobs=0, max_tokens=2, stream=True)
        assert echo.choices[0].text == "The" and echo.choices[0].logprobs.text_offset == [0, 1, 2]
        assert [offset for piece in rest for offset in piece.choices[0].logprobs.text_offset] == [3, 4]


def test_prompts_can_be_texts_tokens_or_several(server, engine):
    for prompt in (["The", "A"], [engine.encode("The"), engine.encode("A")]):
        status, answer = server.ask(COMPLETIONS, {"model": "tiny", "prompt": prompt, "n": 2, "echo": True})
        expected = [prompt + text for prompt in ("The", "A") for text in texts_of(engine, prompt, 2)]
        assert status == 200 and [choice["text"] for choice in answer["choices"]] == expected
        assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 160, "total_tokens": 164}
    assert server.ask(COMPLETIONS, {"model": "tiny"})[1]["choices"][0]["text"] == texts_of(engine, "")[0]


def test_a_completion_ends_at_the_first_of_several_stops(server, engine):
    text = texts_of(engine, "The")[0]
    stops = [text[20:22], text[9:12], "zzz"]
    choice = server.ask(COMPLETIONS, {"model": "tiny", "prompt": "The", "stop": stops})[1]["choices"][0]
    assert choice["text"] == text[: min(text.index(stop) for stop in stops[:2])] and choice["finish_reason"] == "stop"
    assert server.ask(COMPLETIONS, {"model": "tiny", "prompt": "The"})[1]["choices"][0]["finish_reason"] == "length"


def test_log_probabilities_are_the_models(server, engine):
    body = {"model": "tiny", "prompt": "The ", "max_tokens": 9, "logprobs": 3, "stop": "\n"}
    choice = server.ask(COMPLETIONS, body)[1]["choices"][0]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"] and found["text_offset"] == list(range(len(choice["text"])))
    exact = engine.logits("The " + choice["text"]).log_softmax(-1)[3:-1]
    for row, token, logprob, top in zip(exact, found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert logprob == pytest.approx(row[engine.encode(token)[0]].item(), abs=1e-4)
        assert list(top.values()) == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_an_echo_has_the_log_probabilities_of_the_prompt(server, talker):
    """Alone, and before a completion, as the local-completions of lm-evaluation-harness asks for it."""
    ids = [talker.tokenizer.end_of_text, *talker.encode("é old")]
    exact = talker.model(torch.tensor([ids]))[0].log_softmax(-1)
    body = {"model": "talker", "prompt": [ids], "echo": True, "logprobs": 1, "temperature": 0}
    status, alone = server.ask(COMPLETIONS, body | {"max_tokens": 0, "n": 2})
    for choice in alone["choices"]:
        found = choice["logprobs"]
        assert status == 200 and choice["text"] == "é old" and choice["finish_reason"] == "length"
        assert found["tokens"] == ["<|endoftext|>", "\\xc3", "\\xa9", *" old"] and found["text_offset"] == [0, 0, 0, 1, 2, 3, 4]
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        assert found["token_logprobs"][1:] == pytest.approx([row[id].item() for row, id in zip(exact, ids[1:], strict=False)], abs=1e-4)
        assert [max(top.values()) for top in found["top_logprobs"][1:]] == pytest.approx(exact.max(-1).values[:-1].tolist(), abs=1e-4)
    assert alone["usage"] == {"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7}
    one = server.ask(COMPLETIONS, body | {"max_tokens": 1})[1]["choices"][0]["logprobs"]
    assert one["token_logprobs"][:-1] == found["token_logprobs"] and one["text_offset"] == [*found["text_offset"], 5]
    assert one["token_logprobs"][-1] == pytest.approx(exact[-1].max().item(), abs=1e-4)
    status, answer = server.ask(COMPLETIONS, body | {"prompt": "a" * 65, "truncate_prompt": True})
    assert status == 400 and "echo with logprobs reads up to 64, the context" in answer["error"]["message"]


def test_a_chat_is_that_of_sample_py(server, talker):
    """A first question and a second one; whole and as a stream."""
    rules = SamplingConfig(max_new_tokens=9)
    conversation = Conversation(talker, rules, system="S")
    conversation.answer = lambda question: "".join(Conversation.answer(conversation, question))
    messages = [{"role": "system", "content": "S"}]
    for question in ("a?", "b?"):
        messages.append({"role": "user", "content": question})
        body = {"model": "talker", "messages": messages, "max_tokens": 9, "logprobs": True, "top_logprobs": 2}
        choice = server.ask(CHAT, body)[1]["choices"][0]
        expected = conversation.answer(question)
        assert choice["message"] == {"role": "assistant", "content": expected}
        assert all(len(token["top_logprobs"]) == 2 for token in choice["logprobs"]["content"])
        messages.append({"role": "assistant", "content": expected})


def test_a_message_can_be_parts_of_text(server):
    def answer(content):
        return server.ask(CHAT, {"model": "talker", "messages": [{"role": "user", "content": content}], "max_tokens": 9})

    whole, parts = answer("ab?"), answer([{"type": "text", "text": "a"}, {"type": "text", "text": "b?"}])
    assert parts[0] == 200 and parts[1]["choices"] == whole[1]["choices"]
    for content in ([{"type": "image_url", "image_url": {"url": "a"}}], [{"type": "text", "text": 5}], ["a"], [[]]):
        assert answer(content)[0] == 400


def test_an_answer_that_has_begun_is_continued(server, talker):
    question, *_ = next_answer(talker, [Message("user", "a?")], SamplingConfig())
    for begun in ("", "so", "a" * 50):
        messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": begun}]
        choice = server.ask(CHAT, {"model": "talker", "messages": messages, "continue_final_message": True, "max_tokens": 5})[1]["choices"][0]
        [expected] = talker.complete([([*question, *talker.encode(begun)], 0)], SamplingConfig(5))
        assert choice["message"]["content"] == expected.text


def test_the_benchmark_counts_tokens_and_times_the_first(engine):
    settings = replace(bench.ServeSettings(), prompt=5, tokens=9, requests=6)
    with serving({"tiny": engine}) as running:
        side = bench.measure(running.port, settings, 3, 6)
    assert len(side["firsts"]) == 6 and min(side["firsts"]) > 0 and side["rate"] > 9 / max(side["firsts"]) / 6


# Limits and errors


BAD = {
    "not JSON": b"{", "not UTF-8": b'{"prompt": "\xff"}', "not an object": [1], "a deep nest": b'{"prompt": ' + b"[" * 100_000,
    "a nest that json reads": b'{"model": "tiny", "messages": [{"role": ' + b"[" * 900 + b"]" * 900 + b"}]}",
    "NaN": b'{"temperature": NaN}', "infinite": b'{"temperature": 1e999}', "a huge integer": b'{"seed": ' + b"9" * 5000 + b"}",
    "a large integer": {"seed": 10**30}, "a boolean for a number": {"n": True}, "a text for a number": {"max_tokens": "5"},
    "a fraction": {"max_tokens": 1.5}, "no tokens": {"max_tokens": 0}, "a negative number": {"temperature": -1},
    "too many samples": {"n": 17}, "no samples": {"n": 0}, "too many prompts": {"prompt": [[]] * 100_000},
    "too many tokens": {"max_tokens": 5000, "n": 2}, "a number as prompt": {"prompt": 5}, "mixed prompts": {"prompt": ["a", 5]},
    "an unknown token": {"prompt": [10**6]}, "a boolean token": {"prompt": [True]}, "no prompts": {"prompt": []},
    "an unknown character": {"prompt": "\u20ac"}, "a surrogate": b'{"prompt": "\\ud800"}', "a long prompt": {"prompt": "a" * 500},
    "a stop that is empty": {"stop": [""]}, "a stop that is a number": {"stop": 5}, "many stops": {"stop": ["a"] * 99},
    "an unknown model": {"model": "../tiny"}, "a penalty": {"presence_penalty": 1}, "tools": {"tools": [{}]}, "a list as model": {"model": []},
    "no boolean": {"stream": "yes"}, "bad options": {"stream_options": 5}, "too many logprobs": {"logprobs": 99},
    "a stream of nothing": {"stream": True, "prompt": "\u20ac"},
}


def test_a_missing_model_is_said(server):
    status, answer = server.ask(COMPLETIONS, {"prompt": "a"})
    assert status == 400 and answer["error"]["message"].startswith("model is missing: choose one of tiny")


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_a_bad_body_is_an_error_of_openais_shape(server, body):
    if isinstance(body, dict):
        body = {"model": "tiny"} | body
    for path in (COMPLETIONS, CHAT):
        status, answer = server.ask(path, body)
        assert 400 <= status < 500 and answer["error"].keys() == {"message", "type", "param", "code"}
        assert answer["error"]["message"] and len(answer["error"]["message"]) < 600


def test_the_deepest_nest_that_is_read_is_an_error(server):
    """Writing it into a message needs a deeper stack than reading it."""
    def is_read(depth: int) -> bool:
        status, answer = server.ask(COMPLETIONS, b'{"model": "tiny", "seed": ' + b"[" * depth + b"]" * depth + b"}")
        assert status == 400
        return "nested too deeply" not in answer["error"]["message"]

    deepest, too_deep = 100, 200_000
    while too_deep - deepest > 1:
        depth = (deepest + too_deep) // 2
        if is_read(depth):
            deepest = depth
        else:
            too_deep = depth
    assert is_read(deepest) and not is_read(too_deep)


@pytest.mark.parametrize("messages", [
    [], "hi", [{}], [{"role": "assistant", "content": "a"}], [{"role": "tool", "content": "a"}], [{"role": "user", "content": 5}],
    [{"role": "user", "content": "a"}] * 2, [{"role": "user", "content": "a" * 100}], [{"role": "system", "content": "a"}]])
def test_bad_messages_are_an_error(server, messages):
    status, answer = server.ask(CHAT, {"model": "talker", "messages": messages})
    assert status == 400 and answer["error"]["param"] == "messages"
    assert server.ask(CHAT, {"model": "talker", "messages": messages, "continue_final_message": True})[0] == 400


def test_http_mistakes_have_their_status(server):
    for status, path, body, headers in (
            (404, "/../etc/passwd", None, {}), (404, "/v1/files", None, {}), (405, COMPLETIONS, None, {}), (415, COMPLETIONS, {}, {"Content_Type": "text/plain"}),
            (413, COMPLETIONS, b" " * 2**21, {}), (403, "/v1/models", None, {"Host": "evil.example:8000"}), (403, "/", None, {"Host": "[::"}),
            (403, COMPLETIONS, {}, {"Origin": "http://evil.example"}), (403, COMPLETIONS, {}, {"Origin": "null"}),
            *[(403, "/", None, {"Host": host}) for host in ("evil@localhost", "localhost/evil", "localhost#", "[::1]evil", "localhost:a", "")],
            (403, "/", None, {"Host": "localhost", "Origin": "evil://localhost"})):
        found, answer = server.ask(path, body, **headers)
        assert found == status and answer["error"]["message"]
    for host in ("LOCALHOST:1", "[::1]:80", "[::1]", "127.0.0.1"):
        assert server.ask("/v1/models", None, Host=host, Origin=f"http://{host}")[0] == 200


def test_a_request_cannot_hide_another_one(server):
    """Of two lengths of a body, a proxy could believe another one than the server."""
    hidden = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 52\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden)
        received = read_rest(connection)
    assert received.startswith(b"HTTP/1.1 400 ") and received.count(b"HTTP/1.1") == 1


def test_an_error_names_the_field_that_was_sent(server):
    for name in ("max_tokens", "max_completion_tokens"):
        error = server.ask(COMPLETIONS, {"model": "tiny", name: -5})[1]["error"]
        assert error["param"] == name and error["message"].startswith(f"{name}=-5 must be at least 1")


def test_an_api_key_is_needed_where_one_is_set(engine):
    with serving({"tiny": engine}, "api_key=secret", "host=0.0.0.0") as running:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer secr\u00e9t"}, {"Authorization": "secret"}):
            assert running.ask("/v1/models", None, **header)[0] == 401
        assert running.ask("/v1/models", None, Authorization="Bearer secret", Host="server.example")[0] == 200


# The program


@pytest.mark.parametrize(("words", "problem"), [
    (["host=0.0.0.0"], "host=0.0.0.0 lets other machines in: set a secret with api_key="),
    (["port=65536"], "port=65536 must be at most 65535"),
    (["run=a", "init_from=gpt2"], "exclude each other")])
def test_settings_that_are_refused(words, problem):
    with pytest.raises(ConfigError, match=problem):
        compose(ServeSettings, words)


@pytest.mark.parametrize(("missing", "there"), [("starlette", "uvicorn"), ("uvicorn", "starlette")])
def test_a_missing_package_is_one_sentence(monkeypatch, tiny_runs, missing, there):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setitem(sys.modules, there, types.ModuleType(there))
    with pytest.raises(ValueError, match=f"serve.py needs {missing}: pip install starlette uvicorn"):
        serve.serve(compose(ServeSettings, [f"runs_dir={tiny_runs}"]))


def test_a_port_in_use_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port={port} cannot be used: Address already in use: choose another port"):
            serve.listen(compose(ServeSettings, [f"port={port}"]))


def test_two_runs_of_one_name_are_refused(tiny_runs):
    with pytest.raises(ValueError, match="run=tiny,tiny has two runs with the name tiny"):
        serve.open_engines(compose(ServeSettings, [f"runs_dir={tiny_runs}", "run=tiny,tiny"]), Device("cpu", "fp32"))


def test_the_decoding_thread_opens_the_models(engine, monkeypatch):
    """Decoding is 2.5 times as slow if another thread has computed with a team of OpenMP's."""
    pytest.importorskip("uvicorn", reason="needs uvicorn, which is optional")
    opened_by, server = [], types.SimpleNamespace(run=lambda sockets: None)
    monkeypatch.setattr(serve, "make_server", lambda uvicorn, app, thread: opened_by.append(thread) or server)

    def open_models(settings, device):
        opened_by.append(threading.current_thread())
        return {"tiny": (engine, [])}

    assert serve.serve(compose(ServeSettings, ["port=0"]), open_models) == 0
    assert opened_by[0] is opened_by[1] is not threading.current_thread()
    with pytest.raises(ValueError, match="does not exist"):
        serve.serve(compose(ServeSettings, ["port=0", "init_from=missing/"]))


@pytest.mark.slow
def test_a_signal_ends_streams_and_the_program(tiny_runs):
    pytest.importorskip("uvicorn", reason="needs uvicorn, which is optional")
    command = [sys.executable, "serve.py", f"runs_dir={tiny_runs}", "run=tiny", "port=0", "device=cpu", "precision=fp32"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as program:
        said = program.stdout.readline()
        assert said.startswith("Serving tiny at http://127.0.0.1:")
        connection = http.client.HTTPConnection("127.0.0.1", int(said.strip("/\n").rpartition(":")[2]))
        connection.request("POST", COMPLETIONS, json.dumps(ENDLESS | {"stream": True}), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.readline()
        program.send_signal(signal.SIGINT)
        assert b'"code": "stopped"' in answer.read().splitlines()[-2]
        assert program.stdout.read() == "" and program.wait(timeout=60) == 130
