"""Serve trained models: a page, and an API that OpenAI's clients can use.

  python serve.py run=NAME
  python serve.py run=A,B port=8080
  python serve.py init_from=gpt2

docs/serving.md explains the API.
"""

from __future__ import annotations

from conf.launch import launch
from conf.serving import ServeSettings

if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for torch.
    launch("serve:serve", ServeSettings, __doc__)

import errno
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from checkpointing.initial import find_weights
from checkpointing.run_folder import find_runs
from generation.engine import Engine, engine_of, open_checkpoint, open_decoder
from serving.decoding import DecodingThread
from serving.tasks import Model
from terminal import say
from training.device import Device, configure

# Returns engines by their names.
OpenModels = Callable[[ServeSettings, Device], dict[str, Engine]]


def serve(settings: ServeSettings, open_models: OpenModels | None = None) -> int:
    """Open the models, and answer requests until a signal ends it."""
    try:
        import uvicorn

        from serving.app import make_app
    except ModuleNotFoundError as error:
        raise ValueError(f"serve.py needs {error.name}: pip install starlette uvicorn.") from None
    device = Device(settings.device, settings.precision)
    configure(device)
    with listen(settings) as listening:
        models = {}
        for name, engine in (open_models or open_engines)(settings, device).items():
            models[name] = Model(name, engine, start_decoding(engine, settings))
        server = make_server(uvicorn, make_app(models, settings), models)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        say(f"Serving {', '.join(models)} at http://{host}:{listening.getsockname()[1]}/")
        server.run([listening])
    # Other signals than ignored ones were raised again, and have ended the program.
    return server.exit_code


def listen(settings: ServeSettings) -> socket.socket:
    """The socket of the server's address. Raises ValueError if it cannot be used."""
    try:
        family, *_, address = socket.getaddrinfo(settings.host, settings.port,
                                                 type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        advice = ""
        if error.errno == errno.EADDRINUSE:
            advice = ": choose another port, or port=0 for any free one"
        reason = error.strerror.partition(" (")[0]
        raise ValueError(f"host={settings.host} port={settings.port} cannot be used: "
                         f"{reason}{advice}.") from None


def open_engines(settings: ServeSettings, device: Device) -> dict[str, Engine]:
    """The engines of the runs, or of the weights, by the names that requests give."""
    if settings.init_from:
        weights = find_weights(settings.init_from, Path(settings.runs_dir))
        say(weights.describe(), sys.stderr)
        return {settings.init_from: engine_of(weights, device)}
    engines: dict[str, Engine] = {}
    for run in find_runs(Path(settings.runs_dir), settings.run):
        if run.name in engines:
            raise ValueError(f"run={settings.run} has two runs with the name {run.name}: a request "
                             "could not tell them apart. Serve one of them.")
        engines[run.name] = open_checkpoint(run, settings.checkpoint, device)
    return engines


def start_decoding(engine: Engine, settings: ServeSettings) -> DecodingThread:
    """The running thread that decodes for a model."""
    decoder, advice = open_decoder(engine, settings, "batch_size", settings.batch_size,
                                   engine.model.config.block_size)
    for line in advice:
        say(line, sys.stderr)
    engine.model.eval()
    thread = DecodingThread(engine, decoder, settings.batch_size, settings.max_requests)
    thread.start()
    return thread


def make_server(uvicorn: Any, app: Any, models: dict[str, Model]) -> Any:
    """The server. A signal ends the open streams first."""

    class Server(uvicorn.Server):
        exit_code = 0

        def handle_exit(self, number: int, frame: FrameType | None) -> None:
            self.exit_code = 128 + number
            for model in models.values():
                model.thread.stop()
            super().handle_exit(number, frame)

    return Server(uvicorn.Config(app, http="h11", ws="none", lifespan="off", proxy_headers=False,
                                 server_header=False, access_log=False, log_level="error",
                                 limit_concurrency=500, timeout_graceful_shutdown=5))
