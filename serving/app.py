"""The server's routes: the page, and OpenAI's API. Checks who asks, and answers errors as JSON."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
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
from serving.decoding import Busy, Generation, Stopped
from serving.fields import NESTED, BadRequest, Fields, parse
from serving.inspect import attention, losses
from serving.pages import REPORT_POLICY, file_response, file_route, page_files, settings_json
from serving.tasks import Model, chat_task, completion_task
from serving.watch import Runs

MAX_BODY = 2**20  # bytes
BODY_SECONDS = 30
MAX_REPORT = 2**27  # bytes
FILES = page_files()
LOCAL_NAMES = [f"[{name}]" if ":" in name else name for name in LOOPBACK]

MakeTask = Callable[[Fields, Model, ServeSettings], Awaitable[tuple[Generation, Answer]]]


def make_app(models: dict[str, Model], settings: ServeSettings) -> Starlette:
    """The application that serves `models`, by their names. Their thread must run."""
    runs = Runs(Path(settings.runs_dir))
    routes = [
        *[file_route(path, file) for path, file in FILES.items()],
        Route("/v1/models", list_models),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/page/settings", page_settings, methods=["POST"]),
        Route("/reports/{key}", report),
        *[look_route(look) for look in (losses, attention)],
        *[watch_route(watch) for watch in (runs.list, runs.metrics, runs.sweep)],
    ]
    errors = (HTTPException, BadRequest, RecursionError, Busy, Stopped, ClientDisconnect, Exception)
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
        problem = None
        if scope["type"] == "http":
            problem = self.problem(Headers(scope=scope), scope["path"])
        await (problem or self.app)(scope, receive, send)

    def problem(self, headers: Headers, path: str) -> Response | None:
        """The answer to a request that is refused."""
        host = headers.get("host", "")
        if self.is_local and host_name(host) not in LOCAL_NAMES:
            return failure(403, f"Host {host[:100]} is not this machine: use "
                                f"{', '.join(LOCAL_NAMES)}.", code="wrong_host")
        for origin in headers.getlist("origin"):
            if origin not in (f"http://{host}", f"https://{host}"):
                return failure(403, f"Origin {origin[:100]} is another site.", code="wrong_origin")
        if "content-length" in headers and "transfer-encoding" in headers:
            # A proxy could see another request in what is the body of this one.
            refused = failure(400, "Content-Length and Transfer-Encoding exclude each other.")
            refused.headers["connection"] = "close"
            return refused
        # The names of reports cannot be guessed.
        is_open = path in FILES or path.startswith("/reports/")
        if self.api_key and not is_open:
            given = headers.get("authorization", "").encode()
            # In a time that does not depend on the first difference.
            if not hmac.compare_digest(given, b"Bearer " + self.api_key):
                return failure(401, "Authorization: Bearer API_KEY is missing or wrong.",
                               code="invalid_api_key")
        return None


def host_name(host: str) -> str:
    """A Host header without its port, in small letters."""
    name, _, port = host.rpartition(":")
    return (name if port.isdecimal() else host).lower()


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        # In ASCII: a message can quote a surrogate, which UTF-8 cannot hold.
        return json.dumps(content, allow_nan=False).encode()


def failure(status: int, message: str, param: str | None = None,
            code: str | None = None) -> JsonResponse:
    headers = {"retry-after": "1"} if status == 429 else None
    return JsonResponse(error_json(message, status, param, code), status, headers)


def on_error(request: Request, error: Exception) -> Response:
    """The response for an exception. Starlette logs those that are bugs."""
    match error:
        case HTTPException():
            return failure(error.status_code, f"{request.method} {request.url.path[:100]}: "
                                              f"{error.detail}.")
        case BadRequest():
            return failure(error.status, str(error), error.param, error.code)
        case RecursionError():
            return failure(400, NESTED)
        case Busy():
            return failure(429, str(error), code="too_many_requests")
        case Stopped():
            return failure(503, str(error), code="stopped")
        case ValueError():
            # The model's output is not finite.
            return failure(500, str(error))
        case ClientDisconnect():
            return Response(status_code=400)
    return failure(500, "An error of the server: its log has the details.")


async def page_settings(request: Request) -> Response:
    """POST /page/settings"""
    (await read_fields(request)).check_rest()
    return JsonResponse(settings_json(request.app.state.models, request.app.state.settings))


def look_route(look: Callable[[Model, Fields], Awaitable[Json]]) -> Route:
    async def post(request: Request) -> Response:
        fields = await read_fields(request)
        answer = await look(take_model(request, fields), fields)
        fields.check_rest()
        return JsonResponse(answer)

    return Route(f"/page/{look.__name__}", post, methods=["POST"])


def watch_route(watch: Callable[[Fields], Json]) -> Route:
    async def post(request: Request) -> Response:
        fields = await read_fields(request)
        answer = await asyncio.to_thread(watch, fields)
        fields.check_rest()
        return JsonResponse(answer)

    return Route(f"/page/{watch.__name__}", post, methods=["POST"])


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


async def completions(request: Request) -> Response:
    """POST /v1/completions"""
    return await answer(request, completion_task)


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions"""
    return await answer(request, chat_task)


async def read_fields(request: Request) -> Fields:
    """The fields of a request's JSON object. Raises BadRequest."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise BadRequest("Content-Type must be application/json.", status=415)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise BadRequest(f"The body is larger than {MAX_BODY:,} bytes.", status=413)
    except TimeoutError:
        raise BadRequest(f"The body did not arrive within {BODY_SECONDS} seconds.",
                         status=408) from None
    return Fields(parse(bytes(body)))


def take_model(request: Request, fields: Fields) -> Model:
    """The model that `model` names; where there is only one, it need not be named."""
    models: dict[str, Model] = request.app.state.models
    default = next(iter(models)) if len(models) == 1 else ""
    name = fields.take("model", default)
    if not name:
        raise BadRequest(f"model is missing: choose one of {', '.join(models)}.", "model")
    if name not in models:
        raise BadRequest(f"model={name[:100]} is not one of {', '.join(models)}.", "model",
                         "model_not_found", 404)
    return models[name]


async def answer(request: Request, make_task: MakeTask) -> Response:
    """Decode what a request asks for, and answer it: whole, or piece by piece."""
    fields = await read_fields(request)
    model = take_model(request, fields)
    streams = fields.take("stream", False)
    options = Fields(fields.take("stream_options", {}))
    has_usage = options.take("include_usage", False)
    generation, answer = await make_task(fields, model, request.app.state.settings)
    fields.check_rest()
    generation.streams = streams
    # An echo alone needs no decoding.
    if generation.rules.max_new_tokens:
        model.batcher.submit(generation)
    try:
        if streams:
            return EventStream(generation, answer, has_usage)
        return await whole(request, generation, answer)
    except BaseException:
        generation.cancelled = True
        raise


async def whole(request: Request, generation: Generation, answer: Answer) -> Response:
    """The response with all sequences, unless the client goes away."""
    async def collect() -> None:
        async for piece in generation.pieces():
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
        work.cancel()
        gone.cancel()
    return JsonResponse(answer.to_json(generation.top is not None))


class EventStream(StreamingResponse):
    """A response of server-sent events. If the client goes away, its sequences end."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, answer: Answer, has_usage: bool) -> None:
        self.generation = generation
        super().__init__(events(generation, answer, has_usage),
                         headers={"cache-control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.generation.cancelled = True


async def events(generation: Generation, answer: Answer, has_usage: bool) -> AsyncIterator[str]:
    """The events of a stream; an error is one of them, since the status is sent already."""
    for chunk in answer.first_chunks():
        yield event(chunk)
    try:
        async for piece in generation.pieces():
            yield event(answer.chunk_of(piece, generation.top is not None))
    except Stopped as error:
        yield event(error_json(str(error), 503, code="stopped"))
        return
    except Exception as error:
        yield event(error_json(str(error), 500))
        return
    if has_usage:
        yield event(answer.last_chunk())
    yield "data: [DONE]\n\n"


def event(content: Any) -> str:
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"
