"""Datasets: folders and a stand-in for the Hugging Face Hub on this machine, both read with the real `datasets` package."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest

from conf.schema import compose
from data.config import DataConfig
from data.hub import Hub
from data.prepare import prepare
from data.sources import data_root, open_source

ROOT = Path(__file__).parent.parent


class StandIn:
    """What the Hub answers to the requests that reading a dataset makes, and no more."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}  # by name, then by branch and commit: the files
        self.gated: set[str] = set()
        self.asked: list[str] = []
        self.sent = 0  # bytes of files
        self.down = False
        self.most = 10**9  # the offset in a file where the connection breaks

    def push(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """The commit's name, as Git would make it of the content."""
        commit = hashlib.sha1(repr((name, branch, sorted(files.items()))).encode()).hexdigest()
        self.repositories.setdefault(name, {}).update({branch: files, commit: files})
        return commit

    def answer(self, path: str, span: str | None) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers."""
        self.asked.append(path)
        path = unquote(urlsplit(path).path)
        asked = (re.fullmatch(r"/api/datasets/(?P<name>[^/]+/[^/]+)(/revision/(?P<at>.+))?", path)
                 or re.fullmatch(r"/api/datasets/(?P<name>[^/]+/[^/]+)/tree/(?P<at>[^/]+)/?(?P<folder>.*)", path)
                 or re.fullmatch(r"/datasets/(?P<name>[^/]+/[^/]+)/resolve/(?P<at>refs/convert/parquet|[^/]+)/(?P<file>.+)", path))
        if not asked:
            return 404, b"{}", {}
        found = {"at": None} | asked.groupdict()
        name, at = found["name"], found["at"] or "main"
        if name not in self.repositories:
            return 401, b"{}", {"X-Error-Code": "RepoNotFound"}
        commits = self.repositories[name]
        if at not in commits:
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
        files = commits[at]
        commit = next(key for key, held in commits.items() if len(key) == 40 and held is files)
        if "folder" in found:
            return 200, json.dumps(self.tree(files, found["folder"])).encode(), {}
        if "file" not in found:
            return 200, json.dumps({"id": name, "sha": commit}).encode(), {}
        if name in self.gated:
            return 401, b"{}", {"X-Error-Code": "GatedRepo"}
        if found["file"] not in files:
            return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
        content = files[found["file"]]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if not span:
            return 200, content, headers
        start, end = (int(number or len(content) - 1) for number in re.fullmatch(r"bytes=(\d+)-(\d*)", span).groups())
        if end > self.most:
            raise ConnectionResetError
        self.sent += end + 1 - start
        return 206, content[start:end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"}

    @staticmethod
    def tree(files: dict[str, bytes], folder: str) -> list[dict[str, str | int]]:
        """All below a folder: to who asks for its next level only, that is the same, as the deeper ones are left alone."""
        below = {path: content for path, content in files.items() if path.startswith(f"{folder}/" if folder else "")}
        folders = {str(parent) for path in below for parent in Path(path).parents} - {".", folder}
        return [{"type": "directory", "path": path, "oid": "0", "size": 0} for path in sorted(folders)] + [
            {"type": "file", "path": path, "oid": hashlib.sha1(below[path]).hexdigest(), "size": len(below[path])}
            for path in sorted(below)]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[StandIn]:
    """The stand-in, in the Hub's place from the first import of `datasets` on."""
    site = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if site.down:
                return self.connection.close()
            try:
                status, body, headers = site.answer(self.path, self.headers.get("Range"))
            except ConnectionResetError:
                return self.connection.close()
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

        def handle(self):
            with suppress(ValueError, OSError):  # of the connection that was closed above
                super().handle()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http, pytest.MonkeyPatch.context() as patch:
        url = f"http://127.0.0.1:{http.server_port}"
        for name, value in {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path_factory.mktemp("hf")), "no_proxy": "*",
                            "HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}.items():
            patch.setenv(name, value)
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.delenv(name, raising=False)
        # huggingface_hub reads the address when it is imported, which another test may have done.
        for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
            patch.delitem(sys.modules, name)
        config = pytest.importorskip("datasets.config", reason="needs datasets: pip install datasets")
        assert url == config.HF_ENDPOINT, "datasets was imported before this test set the Hub's address"
        Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield site
        http.shutdown()


@pytest.fixture
def hub(server, fresh_data, monkeypatch) -> StandIn:
    """The stand-in without datasets, and nothing remembered; nobody waits before another attempt."""
    server.__init__()
    import datasets.config
    for name in ("OPEN", "READ"):
        monkeypatch.setattr(datasets.config, f"STREAMING_{name}_MAX_RETRIES", 2, raising=False)
        monkeypatch.setattr(datasets.config, f"STREAMING_{name}_RETRY_INTERVAL", 0, raising=False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    return server


def source(name: str | Path, config: str = "", split: str = "train", text_field: str = "text", revision: str = "") -> Hub:
    return Hub(DataConfig("hub", hub_name=str(name), hub_config=config, split=split, text_field=text_field, hub_revision=revision))


def texts(source: Hub) -> list[str]:
    return ["".join(document.pieces()) for document in source.documents()]


def refusal(source: Hub, kind: type[Exception] = ValueError) -> str:
    """The one sentence with which it refuses to be read."""
    with pytest.raises(kind) as caught:
        source.fingerprint()
        texts(source)
    message = str(caught.value)
    assert type(caught.value) is kind and "\n" not in message and message.endswith((".", "NAME."))
    return message


def parquet(**columns: list) -> bytes:
    import pyarrow
    from pyarrow.parquet import write_table
    write_table(pyarrow.table(columns), file := io.BytesIO(), row_group_size=500, compression="NONE")
    return file.getvalue()


def noise(rows: int, length: int) -> list[str]:
    """Texts that nothing makes shorter."""
    return [random.Random(number).randbytes(length // 2).hex() for number in range(rows)]


def lines(*records: dict) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def card(**fields: object) -> bytes:
    return f"---\n{json.dumps(fields)}\n---\nAbout it.\n".encode()  # JSON is YAML


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


# A folder laid out like a dataset


@pytest.mark.parametrize("path", ["../secret.jsonl", "{outside}/secret.jsonl", "in/../../secret.jsonl", "~/secret.jsonl",
                                  "https://example.com/a.jsonl", "file://{outside}/secret.jsonl", "zip://a.jsonl::{outside}/a.zip"])
@pytest.mark.parametrize("form", [lambda path: path, lambda path: [path], lambda path: {"train": [path]},
                                  lambda path: [{"split": "train", "path": path}]], ids=["text", "list", "splits", "patterns"])
def test_a_card_cannot_name_files_outside_its_folder(hub, tmp_path, path, form):
    (tmp_path / "secret.jsonl").write_bytes(lines({"text": "secret"}))
    path = path.format(outside=tmp_path)
    card_of = card(configs=[{"config_name": "one", "data_files": form(path)}])
    folder = write(tmp_path / "set", {"README.md": card_of, "in/a.jsonl": lines({"text": "a"})})
    assert f"names {path}, which is not inside the folder" in refusal(source(folder))
    (folder / "README.md").rename(folder / ".huggingface.yaml")
    (folder / ".huggingface.yaml").write_bytes(card_of.split(b"---\n")[1])
    assert f"names {path}, which is not inside the folder" in refusal(source(folder))
    assert not hub.asked


@pytest.mark.parametrize("name", ["train.jsonl", "data/train-0.jsonl"])
def test_a_link_cannot_lead_outside_a_folder(hub, tmp_path, name):
    (tmp_path / "secret.jsonl").write_bytes(lines({"text": "secret"}))
    folder = write(tmp_path / "set", {"test.jsonl": lines({"text": "a"})})
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(tmp_path / "secret.jsonl")
    assert "is not a file inside that folder" in refusal(source(folder))
    (folder / name).unlink()
    (folder / name).symlink_to(folder / "test.jsonl")
    assert texts(source(folder)) == ["a"]


def test_a_snapshot_in_the_cache_of_the_hub_is_read(hub, tmp_path):
    cache = write(tmp_path / "datasets--a--b", {"blobs/1": lines({"text": "a"}), "blobs/2": card(license="mit")})
    (cache / "snapshots" / "abc").mkdir(parents=True)
    for name, blob in (("train.jsonl", "1"), ("README.md", "2")):
        (cache / "snapshots" / "abc" / name).symlink_to(f"../../blobs/{blob}")
    assert texts(source(cache / "snapshots" / "abc")) == ["a"]


def test_a_card_cannot_lead_outside_a_folder(hub, tmp_path):
    folder = write(tmp_path / "set", {"train.jsonl": lines({"text": "a"})})
    (folder / "README.md").symlink_to("/etc/passwd")
    assert "README.md is not a file inside the folder" in refusal(source(folder))


@pytest.mark.parametrize("content", [b"---\n[\n---\n", b"---\n" + b"[" * 2_000 + b"\n---\n",
                                     b"---\nconfigs: [{data_files: &a [x]}]\n---\n"], ids=["damaged", "deep", "no name"])
def test_a_card_that_cannot_be_read_is_one_sentence(hub, tmp_path, content):
    refusal(source(write(tmp_path / "set", {"README.md": content, "train.jsonl": lines({"text": "a"})})))


def test_a_folder_with_a_pipe_does_not_hang(hub, tmp_path):
    folder = write(tmp_path / "set", {"test.jsonl": lines({"text": "a"})})
    os.mkfifo(folder / "train.jsonl")
    refusal(source(folder))


@pytest.mark.parametrize("value, words", [(3, "it is a number"), (["x"], "it is a list"), ({"a": "x"}, "it is an object with fields")])
def test_examples_without_text_stop_or_are_counted(hub, tmp_path, value, words):
    folder = write(tmp_path / "set", {"train.jsonl": lines({"text": value}, {"text": value})})
    assert f"example 1 has no text in the field text ({words}): set data.on_bad_record=skip" in refusal(source(folder))[:-1] + "."
    skipping = Hub(DataConfig("hub", hub_name=str(folder), on_bad_record="skip"))
    assert texts(skipping) == [] and skipping.bad_records == 2
    assert skipping.description().endswith(", 2 records without text skipped")


def test_a_field_of_a_field_is_read(hub, tmp_path):
    for name, content in (("train.jsonl", lines({"data": {"text": "a"}})), ("train.parquet", parquet(data=[{"text": "a"}]))):
        assert texts(source(write(tmp_path / name, {name: content}), text_field="data.text")) == ["a"]


def test_a_folder_is_read_by_split(hub, tmp_path):
    folder = write(tmp_path / "set", {"train.jsonl": lines({"text": "a", "n": 1}, {"text": "b", "n": 2}),
                                      "test.jsonl": lines({"text": "c", "n": 3})})
    assert texts(source(folder)) == ["a", "b"]
    assert texts(source(folder, split="test")) == ["c"]
    assert texts(source(folder, split="train+test")) == ["a", "b", "c"]
    assert not hub.asked


def test_a_folder_is_read_by_the_configurations_of_its_card(hub, tmp_path):
    folder = write(tmp_path / "set", {
        "README.md": card(configs=[{"config_name": "one", "data_files": "one/*.parquet"},
                                   {"config_name": "two", "data_files": [{"split": "train", "path": "two/*.parquet"}]}]),
        "one/0.parquet": parquet(text=["a", "b"]), "one/1.parquet": parquet(text=["c"]), "two/0.parquet": parquet(body=["d"])})
    assert texts(source(folder, "one")) == ["a", "b", "c"]
    assert texts(source(folder, "two", text_field="body")) == ["d"]
    for config in ("", "three"):
        assert f"data.hub_config={config}: {folder} has the configurations one, two; choose one" in refusal(source(folder, config))


@pytest.mark.parametrize("name, content", [
    ("train.jsonl", lambda: lines({"text": "a"}, {"text": " "}, {"text": None}, {"text": "b\n"})),
    ("train.parquet", lambda: parquet(text=["a", " \n", None, "", "b\n"]))], ids=["jsonl", "parquet"])
def test_examples_without_words_are_left_out(hub, tmp_path, name, content):
    assert texts(source(write(tmp_path / "set", {name: content()}))) == ["a", "b\n"]


def test_documents_can_be_read_again_and_again(hub, tmp_path):
    folder = write(tmp_path / "set", {"train.parquet": parquet(text=[f"text {number}" for number in range(1000)])})
    read = source(folder)
    assert len(list(islice(read.documents(), 3))) == 3
    assert texts(read) == texts(read) == [f"text {number}" for number in range(1000)]


@pytest.mark.parametrize("files", [lambda: {"train.jsonl": lines({"body": "a", "id": 1})},
                                   lambda: {"train.parquet": parquet(body=["a"], id=[1])}], ids=["jsonl", "parquet"])
def test_a_missing_field_is_refused_with_the_existing_fields(hub, tmp_path, files):
    message = refusal(source(folder := write(tmp_path / "set", files())))
    assert message == f"{folder} has no field text (its fields are body, id): set data.text_field=NAME."


def test_a_field_that_holds_no_text_is_refused(hub, tmp_path):
    folder = write(tmp_path / "set", {"train.parquet": parquet(text=["a"], id=[1])})
    assert "example 1 has no text in the field id" in refusal(source(folder, text_field="id"))


@pytest.mark.parametrize("split", ["val", "train[:10%]", "train+val", ""])
def test_a_missing_split_is_refused_with_the_existing_splits(hub, tmp_path, split):
    folder = write(tmp_path / "set", {"train.jsonl": lines({"text": "a"}), "test.jsonl": lines({"text": "b"})})
    assert refusal(source(folder, split=split)) == f"data.split={split}: {folder} has the splits train, test."


@pytest.mark.parametrize("name", ["text", "json"])
def test_a_folder_named_like_a_format_of_the_package_is_read(hub, tmp_path, monkeypatch, name):
    write(tmp_path, {f"{name}/train.jsonl": lines({"text": "a"}), "train.txt": b"not me", "train.json": b'{"text": "not me"}'})
    monkeypatch.chdir(tmp_path)
    assert texts(source(name)) == ["a"]


def test_a_folder_without_data_is_refused(hub, tmp_path):
    (tmp_path / "set").mkdir()
    assert f"{tmp_path / 'set'} holds no files that can be read" in refusal(source(tmp_path / "set"))


def test_a_missing_folder_is_refused(hub, tmp_path):
    for name in ("./no/such/set", "~nobody-here/set"):
        assert f"data.hub_name={name} is neither a folder" in refusal(source(name))


@pytest.mark.parametrize("name, content", [("train-1.jsonl", b'{"text": "b"}\n{"text": oops\n'), ("train-1.parquet", b"PAR1")])
def test_a_file_that_is_damaged_is_refused_with_its_place(hub, tmp_path, name, content):
    good = {"train-0.jsonl": lines({"text": "a"})} if name.endswith("jsonl") else {"train-0.parquet": parquet(text=["a"])}
    message = refusal(source(folder := write(tmp_path / "set", good | {name: content})))
    assert message.startswith(f"{folder} cannot be read at example 2 (")
    assert "run the same command" not in message


def test_a_folders_fingerprint_changes_with_text_and_settings(hub, tmp_path):
    folder = write(tmp_path / "set", {"train.jsonl": lines({"text": "a", "body": "b"}), "test.jsonl": lines({"text": "c"})})
    before = source(folder).fingerprint()
    write(folder, {"README.md": b"About it.\n"})
    assert source(folder).fingerprint() == source(folder / ".." / "set").fingerprint() == before
    others = [source(folder, text_field="body").fingerprint(), source(folder, split="test").fingerprint()]
    write(folder, {"test.jsonl": lines({"text": "d"})})
    assert source(folder).fingerprint() == before
    others.append(source(folder, split="test").fingerprint())
    write(folder, {"train.jsonl": lines({"text": "A", "body": "b"})})
    others.append(source(folder).fingerprint())
    assert len({before, *others}) == 5


# On the Hub


def test_a_dataset_is_read_from_the_hub(hub):
    hub.push("me/set", {"README.md": b"", "data/train-0.parquet": parquet(text=["a", "b"]), "data/train-1.parquet": parquet(text=["c"]),
                        "data/test-0.parquet": parquet(text=["d"])})
    hub.push("me/lines", {"train.jsonl": lines({"text": "e"})})
    assert texts(source("me/set")) == ["a", "b", "c"]
    assert texts(source("me/set", split="test")) == ["d"]
    assert texts(source("me/lines")) == ["e"]


def test_only_the_text_of_a_parquet_file_is_downloaded(hub):
    hub.push("me/set", {"train.parquet": parquet(other=noise(1000, 40_000), text=["short"] * 1000)})
    assert texts(source("me/set")) == ["short"] * 1000
    assert hub.sent < 0.5 * 1000 * 40_000


def test_a_dataset_that_the_hub_does_not_show_is_refused(hub):
    assert "data.hub_name=me/sett is neither a folder nor a dataset" in refusal(source("me/sett"))
    hub.push("me/set", {"train.jsonl": lines({"text": "a"})})
    assert refusal(source("me/set", revision="v2")) == "data.hub_revision=v2: me/set has no such branch, tag or commit."


def test_a_gated_dataset_is_refused_with_what_opens_it(hub):
    hub.push("me/secret", {"README.md": b"", "train.jsonl": lines({"text": "a"})})
    hub.gated.add("me/secret")
    message = refusal(source("me/secret"))
    assert "https://huggingface.co/datasets/me/secret" in message and "hf auth login" in message and "HF_TOKEN" in message


def test_a_dataset_with_a_script_is_refused_and_its_copy_read(hub):
    hub.push("me/made", {"README.md": b"", "made.py": b"raise SystemExit('run!')"})
    assert "data.hub_revision=refs/convert/parquet" in refusal(source("me/made"))
    hub.push("me/made", {"plain_text/train/0000.parquet": parquet(text=["a"])}, branch="refs/convert/parquet")
    assert texts(source("me/made", revision="refs/convert/parquet")) == ["a"]


def test_a_fingerprint_follows_the_data_and_not_the_card(hub, capsys):
    old = hub.push("me/set", {"README.md": b"", "train.jsonl": lines({"text": "old"})})
    before = source("me/set").fingerprint()
    hub.push("me/set", {"README.md": b"A typo less.", "train.jsonl": lines({"text": "old"})})
    assert source("me/set").fingerprint() == before and not capsys.readouterr().out
    hub.push("me/set", {"README.md": b"", "train.jsonl": lines({"text": "new"})})
    assert (changed := source("me/set")).fingerprint() != before and texts(changed) == ["new"]
    [advice] = re.findall(r"me/set has changed .* data.hub_revision=(\w{40}) for the old version", capsys.readouterr().out)
    kept = source("me/set", revision=advice)
    assert kept.fingerprint() == before and texts(kept) == ["old"]
    assert source("me/set", revision=old).fingerprint() == before and not capsys.readouterr().out


def test_a_known_dataset_takes_one_request_and_a_commit_none(hub):
    commit = hub.push("me/set", {"README.md": b"", "train.jsonl": lines({"text": "a"})})
    first = source("me/set").fingerprint()
    hub.asked.clear()
    assert source("me/set").fingerprint() == first and len(hub.asked) == 1
    assert source("me/set", revision=commit).fingerprint() == first and len(hub.asked) == 1


def test_the_fingerprinted_commit_is_read(hub):
    hub.push("me/set", {"train.jsonl": lines({"text": "old"})})
    read = source("me/set")
    read.fingerprint()
    hub.push("me/set", {"train.jsonl": lines({"text": "new"})})
    assert texts(read) == ["old"]


def test_a_broken_connection_says_to_run_the_command_again(hub):
    hub.push("me/set", {"train-0.parquet": parquet(text=noise(100, 20_000)), "train-1.parquet": parquet(text=noise(100, 80_000))})
    hub.push("me/lines", {"train-0.jsonl": lines({"text": "a"}), "train-1.jsonl": lines(*({"text": text} for text in noise(100, 80_000)))})
    hub.most = 4_000_000
    for name, example in (("me/set", 101), ("me/lines", 2)):
        message = refusal(source(name), ConnectionError)
        assert message.startswith(f"The connection to {name} broke at example {example} (")
        assert message.endswith("): the same command resumes.")


# Without the Hub


def prepared(**settings: str) -> Path:
    return prepare(DataConfig(source="hub", hub_name="me/set", tokenizer="byte", **settings))


@pytest.mark.parametrize("way", ["broken", "told so", "no package"])
def test_prepared_tokens_need_no_network_and_no_package(hub, monkeypatch, capsys, way):
    hub.push("me/set", {"train.jsonl": lines(*({"text": f"text {number}"} for number in range(50)))})
    folder = prepared()
    if way == "no package":
        monkeypatch.setitem(sys.modules, "datasets", None)
    hub.down = way == "broken"
    if way == "told so":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.asked.clear()
    monkeypatch.setattr("data.prepare.build", lambda *args: pytest.fail("prepared again"))
    assert prepared() == folder and not hub.asked
    [said] = capsys.readouterr().out.splitlines()
    reason = {"broken": "The Hugging Face Hub does not answer (", "told so": "HF_HUB_OFFLINE", "no package": "pip install datasets"}
    assert reason[way] in said and "Using me/set as it was last seen, at commit" in said


def test_an_unseen_dataset_needs_the_hub(hub):
    hub.down = True
    assert refusal(source("me/set")).startswith("The Hugging Face Hub does not answer (")


def test_a_seen_dataset_that_is_not_prepared_needs_the_hub(hub):
    hub.push("me/set", {"train.jsonl": lines({"text": "a"})})
    source("me/set").fingerprint()
    hub.down = True
    assert refusal(source("me/set")).startswith("me/set cannot be opened: ")


def test_another_download_is_not_mistaken_for_the_commit(hub, monkeypatch):
    import datasets
    hub.push("me/kept", {"train.jsonl": lines({"text": "old"})})
    datasets.load_dataset_builder("me/kept").download_and_prepare()
    hub.push("me/kept", {"train.jsonl": lines({"text": "new"})})
    source("me/kept").fingerprint()
    hub.down = True
    assert refusal(source("me/kept")) == "me/kept cannot be opened: the Hugging Face Hub does not answer."


def test_an_invalid_setting_is_refused_for_a_known_dataset(hub):
    hub.push("me/set", {"train.jsonl": lines({"text": "a"})})
    source("me/set").fingerprint()
    for mistake in ({"split": "val"}, {"config": "no"}, {"revision": "no"}):
        assert "=no: " in (message := refusal(source("me/set", **mistake))) or "=val: " in message


def test_a_memory_that_cannot_be_kept_stops_nothing(hub, monkeypatch):
    hub.push("me/set", {"train.jsonl": lines({"text": "a"})})
    write(data_root().parent, {"prepared": b"a file where the folder would be"})
    assert texts(source("me/set")) == ["a"]


@pytest.mark.parametrize("content", ["", "[", "[" * 100_000, "[]", '{"commits": {}}', '{"commits": {"": [1]}, "files": {}}'],
                         ids=range(6))
def test_a_damaged_memory_is_forgotten(hub, content):
    hub.push("me/set", {"train.jsonl": lines({"text": "a"})})
    source("me/set").fingerprint()
    write(source("me/set").memory.parent, {source("me/set").memory.name: content.encode()})
    assert texts(source("me/set")) == ["a"]


def test_a_missing_datasets_package_is_named(fresh_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in (tmp_path, "me/set"):
        assert refusal(source(name)) == "data=hub needs the package datasets: pip install datasets."


# How far it is


def fractions(source: Hub) -> list[float]:
    return [source.fraction() for _ in source.documents()]


def test_the_fraction_grows_evenly_over_parquet_files(hub, tmp_path):
    folder = write(tmp_path / "set", {"train-0.parquet": parquet(text=["a", "b"]), "train-1.parquet": parquet(text=list("cdef"))})
    read = source(folder)
    assert read.fraction() == 0
    assert fractions(read) == fractions(read) == [0.25, 0.5, 0.625, 0.75, 0.875, 1.0]


def test_the_fraction_of_other_files_needs_a_stated_size(hub, tmp_path):
    files = {"train.jsonl": lines({"text": "a"}, {"text": "b"}), "test.jsonl": lines({"text": "c"}, {"text": "d"})}
    splits = [{"name": name, "num_examples": 2, "num_bytes": 2} for name in ("train", "test")]
    stated = write(tmp_path / "stated", files | {"README.md": card(dataset_info={"splits": splits})})
    assert fractions(source(write(tmp_path / "set", files))) == [0, 0]
    assert fractions(source(stated)) == [0.5, 1]
    assert fractions(source(stated, split="train+test")) == [0.25, 0.5, 0.75, 1]
    write(stated, {"train.jsonl": lines(*[{"text": "more than stated"}] * 4)})
    assert fractions(source(stated)) == [0.5, 1, 1, 1]


@pytest.mark.slow
def test_a_reader_that_stops_early_lets_python_end(hub, tmp_path):
    folder = write(tmp_path / "set", {f"{number}.parquet": parquet(text=noise(5000, 5000)) for number in range(2)})
    program = ("import sys; from pathlib import Path; from data.hub import Hub; from data.config import DataConfig\n"
               "next(Hub(DataConfig('hub', hub_name=sys.argv[1])).documents())")
    for _ in range(5):  # with the package's own reader, most of them abort or hang
        done = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, env=dict(os.environ), timeout=60,
                              capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


# The settings


def test_the_settings_reach_the_source(fresh_data):
    settings = compose("config", ["data=hub", "data.hub_name=me/set", "data.hub_config=small", "data.split=train+test",
                                  "data.hub_revision=v2", "data.text_field=body"])
    read = open_source(settings.data)
    config = read.config
    assert (config.hub_name, config.hub_config, config.split, config.text_field, config.hub_revision) == ("me/set", "small", "train+test", "body", "v2")
    assert read.memory.is_relative_to(fresh_data)
    assert settings.auto_name.startswith("hub-set-")


@pytest.mark.parametrize("preset, name", [("openwebtext", "Skylion007/openwebtext"), ("fineweb_edu_10b", "HuggingFaceFW/fineweb-edu")])
def test_the_presets_name_their_datasets(preset, name):
    settings = compose("config", [f"data={preset}"])
    assert (settings.data.source, settings.data.hub_name, settings.auto_name) == ("hub", name, preset)
