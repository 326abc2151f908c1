"""The files of the page, the settings that it shows, and the reports of runs."""

import base64
import hashlib
from dataclasses import fields
from pathlib import Path

from starlette.responses import Response

from conf.sampling import FIXED, SamplingConfig
from conf.serving import ServeSettings
from data.chat import has_markers
from report.attention import BASE_STYLE, PLACEHOLDER, template
from serving.answers import Json
from serving.tasks import Model

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# All that the page loads is from this server, and no other page shows it in a frame.
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
          "frame-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; ")
# A report is a file of a run, perhaps a stranger's: its scripts can reach neither the page nor the
# server.
REPORT_POLICY = ("sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; "
                 "style-src 'unsafe-inline'; img-src data:")


def page_files() -> dict[str, Response]:
    """The files of the page by their routes, read now."""
    files = {}
    for path in [*Path(__file__).with_name("page").iterdir(), BASE_STYLE]:
        route = "/" if path.name == "page.html" else f"/{path.name}"
        files[route] = file_response(path.read_bytes(), TYPES[path.suffix],
                                     f"{POLICY}frame-ancestors 'none'")
    content = template().replace(PLACEHOLDER, "null")
    files["/attention.html"] = file_response(content.encode(), "text/html", inline_policy(content))
    return files


def inline_policy(page: str) -> str:
    """A policy that allows the script and the style of `page`, and only a frame of our own page."""
    hashes = {}
    for tag in ("script", "style"):
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes[tag] = f"'sha256-{digest}'"
    return (f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
            "base-uri 'none'; frame-ancestors 'self'")


def file_response(content: bytes, media_type: str, policy: str) -> Response:
    return Response(content, media_type=media_type,
                    headers={"content-security-policy": policy, "cache-control": "no-cache",
                             "x-content-type-options": "nosniff"})


def settings_json(models: dict[str, Model], settings: ServeSettings) -> Json:
    """The settings of a request, and what the page needs to know of the models."""
    rows = []
    for one in fields(SamplingConfig):
        if one.name not in FIXED:
            rows.append({"name": one.name, "kind": type(one.default).__name__,
                         "value": getattr(settings, one.name), "default": one.default,
                         **one.metadata})
    listed = []
    for model in models.values():
        tokenizer = model.engine.tokenizer
        listed.append({"name": model.name, "arguments": model.arguments,
                       "special": list(tokenizer.special), "is_chat": has_markers(tokenizer)})
    return {"settings": rows, "models": listed}
