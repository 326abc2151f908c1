"""Serving: requests decode together, the answers are those of sample.py, and no request does harm."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest

from conf.sampling import SamplingConfig
from conf.schema import compose
from conf.serving import ServeSettings
from generation import open_run
from generation.engine import Engine
from serving.decoding import DecodingThread
from serving.tasks import Model

RULES = SamplingConfig(max_new_tokens=40)


@pytest.fixture(scope="module")
def engine(tiny_runs):
    return open_run(tiny_runs / "tiny", device="cpu", precision="fp32")


@contextlib.contextmanager
def decoding(engine: Engine, rows: int = 16, max_requests: int = 64):
    """The running thread of an engine."""
    from generation.decoder import Decoder

    thread = DecodingThread(engine, Decoder(engine.model), rows, max_requests)
    thread.start()
    try:
        yield thread
    finally:
        thread.stop()
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(engine):
    """A client of a server in a thread of this process."""
    pytest.importorskip("starlette", reason="needs starlette, which is optional")
    uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn, which is optional")
    openai = pytest.importorskip("openai", reason="needs openai, which is optional")
    from serving.app import make_app

    settings = compose(ServeSettings, ["max_new_tokens=40"])
    with decoding(engine) as thread, socket.create_server(("127.0.0.1", 0)) as listening:
        app = make_app({"tiny": Model("tiny", engine, thread)}, settings)
        running = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_level="error"))
        loop = threading.Thread(target=running.run, args=([listening],))
        loop.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client
        running.should_exit = True
        loop.join(timeout=10)


def texts_of(engine: Engine, prompt: str, n: int = 1, **rules: object) -> list[str]:
    """The completions that sample.py prints."""
    config = SamplingConfig(**{"max_new_tokens": 40} | rules)
    return [one.text for one in engine.complete([(prompt, number) for number in range(n)], config)]


def test_the_openai_client_gets_the_texts_of_sample_py(server, engine):
    assert [model.id for model in server.models.list()] == ["tiny"]
    made = server.completions.create(model="tiny", prompt="The", n=3, seed=5, max_tokens=30, top_p=0.8, extra_body={"top_k": 9})
    assert [one.text for one in made.choices] == texts_of(engine, "The", 3, seed=5, max_new_tokens=30, top_p=0.8, top_k=9)
    pieces = list(server.completions.create(model="tiny", prompt="The", seed=2, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == texts_of(engine, "The", seed=2)[0]
    assert len(pieces) > 10 and pieces[-1].usage.total_tokens == 43
