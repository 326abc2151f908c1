"""Serve trained models: a page, and an API that OpenAI's clients can use.

  python serve.py run=NAME
  python serve.py run=A,B port=8080
  python serve.py init_from=gpt2

docs/serving.md explains the page and the API.
"""

from conf.launch import launch
from conf.serving import ServeSettings

if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for torch.
    launch("serve:serve", ServeSettings, __doc__)

import errno
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from checkpointing.find_runs import find_runs
from conf.settings import SampleSettings
from generation.engine import Engine, open_checkpoint, open_chosen, open_decoder
from optional import import_optional
from serving.decoding import Batcher, DecodingThread
from serving.tasks import Model
from setting import as_word
from terminal import say
from training.configure import configure
from training.device import Device

# By the names that requests give: an engine, and the arguments of sample.py that open it.
Opened = dict[str, tuple[Engine, list[str]]]
OpenModels = Callable[[ServeSettings, Device], Opened]


def serve(settings: ServeSettings, open_models: OpenModels | None = None) -> int:
    """Open the models, and answer requests until a signal ends it."""
    for package in ("starlette", "uvicorn"):
        import_optional(package, f"serve.py needs {package}", "starlette uvicorn")
    import uvicorn

    from serving.app import make_app

    # The models are opened, and used, by one thread beside the event loop.
    device = Device(settings.device, settings.precision)
    configure(device)
    thread = DecodingThread(device)

    def make_models() -> dict[str, Model]:
        opened = (open_models or open_engines)(settings, device)
        return {name: Model(name, engine, make_batcher(thread, engine, settings), arguments)
                for name, (engine, arguments) in opened.items()}

    # Take the port first: opening models takes longer than finding that it is in use.
    with listen(settings) as listening:
        thread.start()
        try:
            models = thread.call(make_models).result()
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            say(f"Serving {', '.join(models)} at http://{host}:{listening.getsockname()[1]}/")
            make_server(uvicorn, make_app(models, settings), thread).run([listening])
        finally:
            thread.stop()
    return 0


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


def open_engines(settings: ServeSettings, device: Device) -> Opened:
    """Open the runs or the weights."""
    # Weights without a run.
    if settings.init_from:
        engine = open_chosen(settings, "", device)
        arguments = [f"init_from={settings.init_from}", f"runs_dir={settings.runs_dir}"]
        return {settings.init_from: (engine, arguments + changed_arguments(settings))}

    # Checkpoints of runs. Requests name them by run, and by checkpoint where there are several.
    opened: Opened = {}
    checkpoints = settings.checkpoint.split(",")
    for run in find_runs(Path(settings.runs_dir), settings.run):
        for which in checkpoints:
            name = run.name if len(checkpoints) == 1 else f"{run.name}@{which}"
            if name in opened:
                raise ValueError(f"run={settings.run} has two runs with the name {name}: a request "
                                 "could not tell them apart. Serve one of them.")
            arguments = [f"run={run}", f"checkpoint={which}", *changed_arguments(settings)]
            opened[name] = open_checkpoint(run, which, device), arguments
    return opened


def changed_arguments(settings: ServeSettings) -> list[str]:
    """The arguments of sample.py for how a model is computed, where it is not the default."""
    arguments = []
    for name in ("cache", "int8", "device", "precision"):
        value = getattr(settings, name)
        if value != getattr(SampleSettings, name):
            arguments.append(f"{name}={as_word(value)}")
    return arguments


def make_batcher(thread: DecodingThread, engine: Engine, settings: ServeSettings) -> Batcher:
    """What decodes the requests for a model. Called by the thread."""
    decoder = open_decoder(engine, settings, "batch_size", engine.model.config.block_size)
    engine.model.eval()
    return Batcher(thread, engine, decoder, settings.batch_size, settings.max_requests)


def make_server(uvicorn: Any, app: Any, thread: DecodingThread) -> Any:
    """The server. A signal ends the open streams first."""
    from serving.connection import Connection

    # It warns of each stream whose client has gone, which is nothing to worry about.
    logging.getLogger("asyncio").setLevel(logging.ERROR)

    class Server(uvicorn.Server):
        def handle_exit(self, number: int, frame: FrameType | None) -> None:
            thread.stop()
            super().handle_exit(number, frame)

    return Server(uvicorn.Config(app, http=Connection, ws="none", lifespan="off",
                                 proxy_headers=False, server_header=False, access_log=False,
                                 log_level="error", limit_concurrency=500,
                                 timeout_graceful_shutdown=5))
