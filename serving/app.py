"""The server's routes: the page, and OpenAI's API. Checks who asks, and answers errors as JSON."""

import asyncio
import hmac
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import atomic
from conf.serving import LOOPBACK, ServeSettings
from serving.answers import Answer, Json, error_json
from serving.fields import Fields, Refused, parse
from serving.inspect import attention, losses
from serving.pages import REPORT_POLICY, file_response, page_files, settings_json
from serving.tasks import Model, chat_task, completion_task
from serving.watch import Runs

MAX_BODY = 2**20  # bytes
BODY_SECONDS = 30
MAX_REPORT = 2**27  # bytes
FILES = page_files()
LOCAL_NAMES = [f"[{name}]" if ":" in name else name for name in LOOPBACK]
# A Host header that names this machine, with a port or without.
LOCAL_HOST = re.compile(rf"({'|'.join(map(re.escape, LOCAL_NAMES))})(:[0-9]+)?", re.IGNORECASE)

Models = dict[str, Model]
MakeTask = Callable[[Fields, Model, ServeSettings], Awaitable[Answer]]


def make_app(models: Models, settings: ServeSettings) -> Starlette:
    """The application that serves `models`, by their names. Their thread must run."""
    runs = Runs(Path(settings.runs_dir))
    # What answers the page, by the names of the routes.
    answers: dict[str, Callable[[Fields], Awaitable[Json]]] = {
        "settings": lambda fields: asyncio.to_thread(settings_json, models, settings),
        "losses": partial(look_inside, losses, models),
        "attention": partial(look_inside, attention, models),
        "list": lambda fields: asyncio.to_thread(runs.list),
        "metrics": lambda fields: asyncio.to_thread(runs.metrics, fields),
        "sweep": lambda fields: asyncio.to_thread(runs.sweep, fields),
    }
    routes = [
        # A response is an application, too.
        *[Route(path, file, methods=["GET"]) for path, file in FILES.items()],
        *[page_route(name, answer) for name, answer in answers.items()],
        Route("/v1/models", list_models),
        Route("/v1/completions", partial(complete, completion_task), methods=["POST"]),
        Route("/v1/chat/completions", partial(complete, chat_task), methods=["POST"]),
        Route("/reports/{key}", report),
    ]
    errors = (HTTPException, Refused, RecursionError, ClientDisconnect, Exception)
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(errors, on_error),
                    middleware=[Middleware(Guard, settings=settings)])
    app.state.models, app.state.settings, app.state.runs = models, settings, runs
    return app


class Guard:
    """Refuses what another web page or another user could ask for, before anything is read.

    A page of an attacker whose name resolves to this machine (DNS rebinding) has another Host; one
    that sends requests to another site has another Origin.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self.app = app
        self.is_local = settings.host in LOOPBACK
        self.api_key = settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http":
            try:
                self.check(Headers(scope=scope), scope["path"])
            except Refused as error:
                # What follows may be another request in the body of this one.
                app = failure(error, {"connection": "close"})
        await app(scope, receive, send)

    def check(self, headers: Headers, path: str) -> None:
        """Raise Refused for a request that is not to be answered."""
        host = headers.get("host", "")
        if self.is_local and not LOCAL_HOST.fullmatch(host):
            raise Refused(f"Host {host[:100]} is not this machine: use {', '.join(LOCAL_NAMES)}.",
                          code="wrong_host", status=403)
        for origin in headers.getlist("origin"):
            if origin not in (f"http://{host}", f"https://{host}"):
                raise Refused(f"Origin {origin[:100]} is another site.", code="wrong_origin",
                              status=403)
        if "content-length" in headers and "transfer-encoding" in headers:
            # A proxy could see another request in what is the body of this one.
            raise Refused("Content-Length and Transfer-Encoding exclude each other.")
        # The names of reports cannot be guessed.
        is_open = path in FILES or path.startswith("/reports/")
        given = headers.get("authorization", "").encode()
        # In a time that does not depend on the first difference.
        has_key = not self.api_key or hmac.compare_digest(given, b"Bearer " + self.api_key)
        if not is_open and not has_key:
            raise Refused("Authorization: Bearer API_KEY is missing or wrong.",
                          code="invalid_api_key", status=401)


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        # In ASCII: a message can quote a surrogate, which UTF-8 cannot hold.
        return json.dumps(content, allow_nan=False).encode()


def failure(error: Refused, headers: dict[str, str] | None = None) -> JsonResponse:
    if error.status == 429:
        headers = {"retry-after": "1"}
    return JsonResponse(error_json(error), error.status, headers)


def on_error(request: Request, error: Exception) -> Response:
    """The response for an exception. Starlette logs those that are bugs."""
    match error:
        case Refused():
            return failure(error)
        case HTTPException():
            address = f"{request.method} {request.url.path[:100]}"
            return failure(Refused(f"{address}: {error.detail}.", status=error.status_code))
        case RecursionError():
            return failure(Refused("The body is nested too deeply."))
        case ClientDisconnect():
            return Response(status_code=400)
        case ValueError():
            # The model's output is not finite.
            return failure(Refused(str(error), status=500))
    return failure(Refused("An error of the server: its log has the details.", status=500))


def page_route(name: str, answer: Callable[[Fields], Awaitable[Json]]) -> Route:
    async def post(request: Request) -> Response:
        fields = await read_fields(request)
        content = await answer(fields)
        fields.check_rest()
        return JsonResponse(content)

    return Route(f"/page/{name}", post, methods=["POST"])


async def look_inside(look: Callable[[Model, Fields], Json], models: Models,
                      fields: Fields) -> Json:
    model = take_model(models, fields)
    return await model.batcher.call(partial(look, model, fields))


async def report(request: Request) -> Response:
    """GET /reports/KEY"""
    path = request.app.state.runs.reports.get(request.path_params["key"])
    if path is None:
        raise HTTPException(404)
    content = await asyncio.to_thread(atomic.read_regular, path, MAX_REPORT)
    return file_response(content, "text/html", REPORT_POLICY)


async def list_models(request: Request) -> Response:
    """GET /v1/models"""
    listed = [{"id": model.name, "object": "model", "created": model.created,
               "owned_by": "nanohydra"} for model in request.app.state.models.values()]
    return JsonResponse({"object": "list", "data": listed})


async def read_fields(request: Request) -> Fields:
    """The fields of a request's JSON object. Raises Refused."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Refused("Content-Type must be application/json.", status=415)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise Refused(f"The body is larger than {MAX_BODY:,} bytes.", status=413)
    except TimeoutError:
        raise Refused(f"The body did not arrive within {BODY_SECONDS} seconds.",
                      status=408) from None
    return Fields(parse(bytes(body)))


def take_model(models: Models, fields: Fields) -> Model:
    """The model that `model` names; where there is only one, it need not be named."""
    default = next(iter(models)) if len(models) == 1 else ""
    name = fields.take("model", default)
    if not name:
        raise Refused(f"model is missing: choose one of {', '.join(models)}.", "model")
    if name not in models:
        raise Refused(f"model={name[:100]} is not one of {', '.join(models)}.", "model",
                      "model_not_found", 404)
    return models[name]


async def complete(make_task: MakeTask, request: Request) -> Response:
    """Decode what a request asks for, and answer it: whole, or piece by piece."""
    fields = await read_fields(request)
    model = take_model(request.app.state.models, fields)
    streams = fields.take("stream", False)
    options = Fields(fields.take("stream_options", {}))
    has_usage = options.take("include_usage", False)
    answer = await make_task(fields, model, request.app.state.settings)
    fields.check_rest()
    answer.generation.streams = streams
    # An echo alone needs no decoding.
    if answer.generation.rules.max_new_tokens:
        model.batcher.submit(answer.generation)
    return EventStream(answer, has_usage) if streams else await whole(request, answer)


async def whole(request: Request, answer: Answer) -> Response:
    """The response with all sequences, unless the client goes away."""
    async def collect() -> None:
        async for piece in answer.generation.pieces():
            answer.add(piece)

    work = asyncio.ensure_future(collect())
    # After the body, nothing but the end of the connection is received.
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        work.result()
    finally:
        answer.generation.cancelled = True
        work.cancel()
        gone.cancel()
    return JsonResponse(answer.to_json())


class EventStream(StreamingResponse):
    """A response of server-sent events. If the client goes away, its sequences end."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, has_usage: bool) -> None:
        self.generation = answer.generation
        super().__init__(events(answer, has_usage), headers={"cache-control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.generation.cancelled = True


async def events(answer: Answer, has_usage: bool) -> AsyncIterator[str]:
    """The events of a stream; an error is one of them, since the status is sent already."""
    for chunk in answer.first_chunks():
        yield event(chunk)
    try:
        async for piece in answer.generation.pieces():
            yield event(answer.chunk_of(piece))
    except Exception as error:
        refused = error if isinstance(error, Refused) else Refused(str(error), status=500)
        yield event(error_json(refused))
        return
    if has_usage:
        yield event(answer.last_chunk())
    yield "data: [DONE]\n\n"


def event(content: Any) -> str:
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"
