"""Uploading an export, to a local stand-in for the Hugging Face Hub."""

import base64
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from scripts import export
from scripts.export import ExportSettings


class Hub(BaseHTTPRequestHandler):
    """The requests of an upload: create, ask which files are large, store those, commit."""

    files, created = {}, []
    failure = 0

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        assert self.headers["Authorization"] == "Bearer hf_test"
        if self.failure:
            return self.answer({"error": "no\nway"}, self.failure)
        if path == "/api/repos/create":
            self.created.append(json.loads(content))
            return self.answer({"url": f"{self.address}/me/model"})
        if path == "/api/validate-yaml":
            assert "pipeline_tag: text-generation" in json.loads(content)["content"]
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/models/me/model/preupload/main":
            files = json.loads(content)["files"]
            return self.answer({"files": [{"path": one["path"], "shouldIgnore": False, "uploadMode": self.mode(one)} for one in files]})
        if path == "/me/model.git/info/lfs/objects/batch":
            found = [one | {"actions": {"upload": {"href": f"{self.address}/store/{one['oid']}"}}} for one in json.loads(content)["objects"]]
            return self.answer({"transfer": "basic", "objects": found})
        assert path == "/api/models/me/model/commit/main", path
        for line in content.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                self.files[entry["value"]["path"]] = self.files.pop(entry["value"]["oid"])
        return self.answer({"success": True, "commitUrl": f"{self.address}/me/model/commit/1", "commitOid": "1" * 40, "hookOutput": ""})

    def do_PUT(self):
        self.files[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_GET(self):
        self.answer({"id": "me/model", "sha": "0" * 40, "siblings": []})

    def mode(self, file):
        return "lfs" if file["path"].endswith(".safetensors") else "regular"

    @property
    def address(self):
        return f"http://{self.headers['Host']}"

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """The stand-in, which also answers where to upload."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs huggingface_hub: pip install huggingface_hub")
    handler = type("Handler", (Hub,), {"files": {}, "created": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield handler
        running.shutdown()


def test_an_export_is_uploaded_to_a_private_model(server, tiny_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    out = tmp_path / "out"
    export.main(ExportSettings(run="tiny", runs_dir=str(tiny_runs), out=str(out), push_to="me/model"))
    assert re.search(r"Uploaded to http://127.0.0.1:\d+/me/model\n$", capsys.readouterr().out)
    (created,) = server.created
    assert created["name"] == "model" and (created.get("private") or created["visibility"] == "private")
    assert server.files == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_failed_upload_keeps_the_folder(server, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    server.failure = 403
    with pytest.raises(OSError, match=r"^push_to=me/model failed \(.*\)\. .* is complete: upload it later with hf upload me/model ") as caught:
        export.push(tmp_path, "me/model")
    assert "\n" not in str(caught.value)


def test_an_upload_needs_a_package_and_an_account(server, monkeypatch, tmp_path):
    settings = ExportSettings(run="none", out=str(tmp_path / "out"), push_to="me/model")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match=r"run hf auth login, or set HF_TOKEN\.$"):
        export.main(settings)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"push_to needs the package huggingface_hub"):
        export.main(settings)


@pytest.mark.parametrize(("settings", "problem"), [
    ({"push_to": "model"}, "push_to=model must be OWNER/NAME, as on the Hugging Face Hub."),
    ({"push_to": "../x/y"}, "push_to=../x/y must be OWNER/NAME, as on the Hugging Face Hub."),
    ({"push_to": "me/model", "format": "gguf", "out": "x.gguf"}, "push_to=me/model is only for format=hf: leave it out."),
])
def test_places_that_are_not_of_the_hub_are_refused(settings, problem):
    assert list(ExportSettings(**{"out": "x"} | settings).problems()) == [problem]
