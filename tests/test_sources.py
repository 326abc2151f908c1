"""Where documents come from: the standard library, files and folders, a download."""

import hashlib
import math
import platform
import re
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import yaml

from conf import compose
from data.config import DataConfig
from data.sources import Files, PyDocs, StdLib, data_root, fetch, open_source, open_sources


def texts(source):
    """The source's documents, each in one piece."""
    return ["".join(document.pieces()) for document in source.documents()]


PRESETS = sorted((Path(__file__).parent.parent / "conf" / "data").glob("*.yaml"))
BOM = b"\xef\xbb\xbf"


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# The standard library


@pytest.fixture
def library(tmp_path):
    """A standard library in miniature."""
    return write(tmp_path / "library", {
        "danger.py": '"""I am read and never run."""\nopen(__file__ + ".ran", "w").close()\nraise SystemExit(1)\n',
        "latin.py": "# -*- coding: latin-1 -*-\n'''Café.'''\n".encode("latin-1"),
        "json/__init__.py": (
            '"""Read and write JSON."""\n'
            'class Reader:\n    """A reader."""\n    def read(self):\n        """Read\n        it."""\n'
            'async def write():\n    """Write it."""\n'
            'def silent():\n    "  "\n    return "not a docstring"\n'),
        "pydoc_data/topics.py": '"""About topics."""\ntopics = {"if": "The if\\nstatement.", "in": "See if."}\n',
        "broken.py": '"""Never seen."""\ndef broken(:\n',
        "null.py": b'"""Never seen."""\n\0',
        "readme.txt": "Never seen.",
        "test/test_json.py": '"""Never seen."""',
        "json/tests/test_read.py": '"""Never seen."""',
        "idlelib/idle_test/mock.py": '"""Never seen."""',
        "site-packages/torch.py": '"""Never seen."""',
        "__pycache__/odd.py": '"""Never seen."""',
    })


def test_pydocs_reads_docstrings_and_help_topics(library):
    assert sorted(texts(PyDocs(library))) == [
        "A reader.", "About topics.", "Café.", "I am read and never run.", "Read\nit.", "Read and write JSON.",
        "See if.", "The if\nstatement.", "Write it."]


def test_pydocs_leaves_out_addresses_beside_the_topics(library):
    write(library, {"pydoc_data/module_docs.py": "module_docs = {'abc': 'abc#module-abc'}\n"})
    assert "abc#module-abc" not in texts(PyDocs(library))


def test_pydocs_never_imports(library):
    before = set(sys.modules)
    assert "I am read and never run." in texts(PyDocs(library))
    assert not (library / "danger.py.ran").exists()
    assert before == set(sys.modules)


def test_pydocs_gives_the_same_documents_again(library):
    source = PyDocs(library)
    assert texts(source) == texts(source) == texts(PyDocs(library))


@pytest.mark.parametrize("kind", [PyDocs, StdLib])
def test_library_fingerprint_changes_with_any_byte(kind, library):
    before = kind(library).fingerprint()
    write(library, {"latin.py": (library / "latin.py").read_bytes().replace(b"Caf", b"caf")})  # of the same size
    assert kind(library).fingerprint() != before


def test_library_fingerprint_changes_with_names_and_python_version(library, monkeypatch):
    fingerprints = [PyDocs(library).fingerprint()]
    assert PyDocs(library).fingerprint() == fingerprints[0]
    write(library, {"test/test_json.py": "# what is not read does not count"})
    assert PyDocs(library).fingerprint() == fingerprints[0]
    write(library, {"latin.py": "'''Another size.'''"})
    fingerprints.append(PyDocs(library).fingerprint())
    (library / "latin.py").rename(library / "latin_1.py")  # which leaves the order of the files as it was
    fingerprints.append(PyDocs(library).fingerprint())
    monkeypatch.setattr(platform, "python_version", lambda: "4.0.0")
    fingerprints.append(PyDocs(library).fingerprint())
    assert len(set(fingerprints)) == 4


# Files and folders


def test_a_single_file_of_any_ending_is_one_document(tmp_path):
    write(tmp_path, {"book.rst": "Once upon a time.\n"})
    assert texts(Files(str(tmp_path / "book.rst"))) == ["Once upon a time.\n"]


def test_a_folder_is_read_in_the_order_of_file_names(tmp_path):
    write(tmp_path, {"b.txt": "b", "a.md": "a", "c/d/deep.TXT": "deep", "c/e.md": "e", "code.py": "no", "data.xml": "no",
                     "txt": "no"})
    (tmp_path / "folder.txt").mkdir()
    assert texts(Files(str(tmp_path))) == ["a", "b", "deep", "e"]


def test_a_folder_without_text_is_an_error_that_names_it(tmp_path):
    write(tmp_path, {"code.py": "no"})
    with pytest.raises(ValueError, match=re.escape(str(tmp_path)) + r".*\.txt"):
        Files(str(tmp_path))


@pytest.mark.parametrize(("content", "byte", "offset"), [
    (b"abc\xffdef", "0xff", 3),
    (b"caf\xe9 latin", "0xe9", 3),
    ("é".encode() * 5 + b"\x80", "0x80", 10),
    (b"cut \xe2\x82", "0xe2", 4),
    (BOM + b"abc\xffdef", "0xff", 6),
])
def test_a_bad_byte_is_reported_with_file_offset_and_value(tmp_path, content, byte, offset):
    write(tmp_path, {"good.txt": "fine", "worse.txt": content})
    with pytest.raises(ValueError) as caught:
        texts(Files(str(tmp_path)))
    assert not isinstance(caught.value, UnicodeDecodeError)
    assert str(tmp_path / "worse.txt") in str(caught.value)
    assert f"byte {byte} at offset {offset} (line 1);" in str(caught.value)


def test_a_byte_order_mark_is_stripped_and_line_ends_are_kept(tmp_path):
    write(tmp_path, {"windows.txt": BOM + b"one\r\ntwo\rthree\n"})
    assert texts(Files(str(tmp_path))) == ["one\r\ntwo\rthree\n"]


def test_files_without_words_are_skipped(tmp_path):
    write(tmp_path, {"a.txt": "", "b.txt": " \n\t\r\n", "c.txt": "c", "d.txt": BOM})
    assert texts(Files(str(tmp_path))) == ["c"]


def test_text_fingerprint_changes_with_any_byte_of_any_file(tmp_path):
    write(tmp_path, {"a.txt": "one", "b.txt": "two"})
    before = Files(str(tmp_path)).fingerprint()
    write(tmp_path, {"not_read.py": "x"})
    assert Files(str(tmp_path)).fingerprint() == before
    write(tmp_path, {"b.txt": "twO"})
    changed = Files(str(tmp_path)).fingerprint()
    write(tmp_path, {"c.txt": "three"})
    assert len({before, changed, Files(str(tmp_path)).fingerprint()}) == 3


@pytest.mark.parametrize("path, read", [
    ("", ["a", "b"]), ("*", ["a"]), ("**/*.txt", ["a", "b"]), (".trash", ["trash"]), (".trash/*.txt", ["trash"]), (".*.txt", ["mac", "dot"]),
    (".dot.txt", ["dot"]), ("c/.*/*.md", ["deep"]), ("*~", ["copy"]),
])
def test_hidden_files_are_skipped_unless_they_are_named(tmp_path, path, read):
    write(tmp_path / "here", {"a.txt": "a", "c/b.txt": "b", ".trash/x.txt": "trash", "._a.txt": "mac", ".dot.txt": "dot",
                              "c/.deep/y.md": "deep", "a.txt~": "copy", "#b.txt#": "copy"})
    assert texts(Files(str(tmp_path / "here" / path))) == read


def test_files_in_a_hidden_folder_that_is_named_are_read(tmp_path):
    write(tmp_path / ".cache", {"a.txt": "a", ".b.txt": "b"})
    assert texts(Files(str(tmp_path / ".cache"))) == ["a"]
    assert texts(Files(str(tmp_path / ".cache/*.txt"))) == ["a"]


def test_a_folder_of_only_hidden_files_says_so(tmp_path):
    write(tmp_path, {".a.txt": "a", "b.py": "b"})
    with pytest.raises(ValueError, match=r"holds no file to read \(skipped 1 hidden, 1 \.py\)"):
        Files(str(tmp_path))


def test_a_tilde_stands_for_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, {"a.txt": "a"})
    for path in ("~/a.txt", "~", "~/*.txt"):
        config = compose(["data=text", f"data.path={path}", f"data.val_path={path}"]).data
        assert texts(open_source(config)) == ["a"] and config.val_path == config.path
    config = DataConfig(mix="~/a.txt:1 pydocs:1")
    assert list(config.problems()) == [] and texts(open_source(config.part("~/a.txt"))) == ["a"]
    monkeypatch.setenv("NANOHYDRA_DATA", "~/prepared")
    assert data_root() == tmp_path / "prepared"


def test_an_unknown_user_has_no_home_folder():
    [problem] = DataConfig(mix="~nobody-here/a.txt:1").problems()
    assert problem.startswith("mix=~nobody-here/a.txt:1: ~nobody-here/a.txt names no home folder")


def test_the_fraction_read_takes_constant_time(tmp_path):
    write(tmp_path, {f"{number:03d}.txt": "text" for number in range(100)})
    source = Files(str(tmp_path))
    documents = source.documents()
    next(documents)
    source.sizes = source.files = None  # so that no list of all files is needed
    fractions = [source.fraction() for document in documents]
    assert fractions == sorted(fractions) and fractions[-1] > 0.98


# A download


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine: the pages it has, the paths it was asked for, how many bytes it withholds."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            site.asked.append(self.path)
            if self.path not in site.pages:
                return self.send_error(404)
            content = site.pages[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:len(content) - site.withheld])

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        site = SimpleNamespace(url=f"http://127.0.0.1:{http.server_port}", pages={}, asked=[], withheld=0)
        Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield site
        http.shutdown()


CONTENT = b"First Citizen:\r\nBefore we proceed any further, hear me speak.\n"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def refused_fetch(url: str) -> tuple[str, Path]:
    """The one sentence that a failing fetch gives, and the path it names; nothing is kept."""
    with pytest.raises(ValueError) as caught:
        fetch(url, SHA256)
    message = str(caught.value)
    assert url in message and "data.path=" in message and "\n" not in message
    path = Path(re.search(r"put it at (\S+),", message)[1])
    assert path.is_relative_to(data_root())
    assert not [found for found in data_root().rglob("*") if found.is_file()]
    return message, path


def test_fetch_downloads_once(server, fresh_data):
    server.pages["/input.txt"] = CONTENT
    path = fetch(f"{server.url}/input.txt", SHA256)
    assert path.read_bytes() == CONTENT and path.is_relative_to(fresh_data)
    assert fetch(f"{server.url}/input.txt", SHA256) == path
    assert server.asked == ["/input.txt"]
    assert list(path.parent.iterdir()) == [path]


def test_fetch_refuses_another_file_than_the_one_meant(server, fresh_data):
    server.pages["/input.txt"] = CONTENT.replace(b"First", b"Worst")
    message, _ = refused_fetch(f"{server.url}/input.txt")
    assert SHA256[:12] in message


def test_fetch_says_where_to_put_the_file_when_it_is_not_found(server, fresh_data):
    message, _ = refused_fetch(f"{server.url}/gone.txt")
    assert "Not Found" in message


def test_fetch_offline_reads_a_file_that_was_put_there(server, fresh_data):
    with socket.socket() as unused:  # bound but not listening: a connection is refused
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/input.txt"
        message, path = refused_fetch(url)
        assert "refused" in message
        path.parent.mkdir(parents=True)
        path.write_bytes(CONTENT)
        assert fetch(url, SHA256) == path


def test_fetch_keeps_nothing_of_a_connection_that_breaks_off(server, fresh_data):
    server.pages["/input.txt"], server.withheld = CONTENT, 10
    refused_fetch(f"{server.url}/input.txt")


def test_fetch_names_a_kept_copy_that_is_damaged(server, fresh_data):
    server.pages["/input.txt"] = CONTENT
    path = fetch(f"{server.url}/input.txt", SHA256)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged.*delete it"):
        fetch(f"{server.url}/input.txt", SHA256)
    path.unlink()
    assert fetch(f"{server.url}/input.txt", SHA256).read_bytes() == CONTENT


def test_shakespeare_from_a_local_copy_asks_no_network(tmp_path, monkeypatch):
    write(tmp_path, {"mine.txt": "Speak, speak."})
    monkeypatch.setattr("data.sources.fetch", lambda *args: pytest.fail("fetched though a path is given"))
    source = open_source(DataConfig(source="shakespeare", path=str(tmp_path / "mine.txt")))
    assert texts(source) == ["Speak, speak."]


# The settings


@pytest.mark.parametrize(("settings", "field", "value"), [
    ({"source": "text"}, "path", "missing"),
    ({"source": "text", "path": "no/such/book.txt"}, "path", "no/such/book.txt"),
    ({"source": "shakespeare", "path": "no/such/book.txt"}, "path", "no/such/book.txt"),
    ({"source": "hub"}, "hub_name", "missing"),
    ({"vocab_size": 256}, "vocab_size", "256"),
    ({"vocab_size": 100_001}, "vocab_size", "100001"),
    ({"val_fraction": 0.0}, "val_fraction", "0.0"),
    ({"val_fraction": 1.0}, "val_fraction", "1.0"),
    ({"val_fraction": -0.5}, "val_fraction", "-0.5"),
    ({"val_fraction": math.nan}, "val_fraction", "nan"),
    ({"val_path": "no/such.txt"}, "val_path", "no/such.txt"),
    ({"val_split": "validation"}, "val_split", "validation"),
    ({"mix": "pydocs:1 stdlib:1", "val_path": __file__}, "val_path", "mixture"),
    ({"source": "bin", "path": __file__, "val_path": __file__}, "val_path", "not used by data=bin"),
    ({"source": "hub", "hub_name": "a/b", "val_path": __file__, "val_split": "test"}, "val_path", "excludes val_split"),
])
def test_an_invalid_setting_is_one_problem_with_its_value(settings, field, value):
    config = DataConfig(**settings)
    [problem] = [*config.problems(), *config.missing_files()]
    assert problem.startswith(field) and value in problem


def test_all_problems_come_together():
    assert len(list(DataConfig(source="text", vocab_size=0, val_fraction=2.0).problems())) == 3


@pytest.mark.parametrize("settings", [{}, {"vocab_size": 257}, {"vocab_size": 100_000}, {"val_fraction": 0.001},
                                      {"source": "text", "path": __file__}], ids=str)
def test_settings_that_work_give_no_problem(settings):
    assert list(DataConfig(**settings).problems()) == []


@pytest.mark.parametrize("source", ["text", "shakespeare"])
def test_a_text_field_that_no_file_uses_is_an_error(tmp_path, source):
    write(tmp_path, {"a.txt": "text", "b.md": "text"})
    for config in (DataConfig(source, str(tmp_path), text_field="body"), DataConfig(mix=f"pydocs:1 {tmp_path}:1", text_field="body")):
        with pytest.raises(ValueError, match=r"data.text_field=body names a field of records, and .* holds only plain text"):
            open_sources(config)
    write(tmp_path, {"c.jsonl": '{"body": "record"}'})
    assert texts(open_source(DataConfig(source, str(tmp_path), text_field="body"))) == ["text", "text", "record"]


@pytest.mark.parametrize("settings, name", [
    ({"source": "pydocs", "text_field": "body"}, "text_field"), ({"source": "bin", "path": __file__, "encoding": "latin-1"}, "encoding"),
    ({"source": "hub", "hub_name": "x", "errors": "replace"}, "errors"), ({"on_bad_record": "skip"}, "on_bad_record"),
    ({"path": __file__}, "path"), ({"hub_name": "a/b"}, "hub_name"), ({"separator": "x"}, "separator"), ({"dtype": "uint32"}, "dtype")])
def test_a_setting_that_a_source_does_not_use_is_a_problem(settings, name):
    [problem] = DataConfig(**settings).problems()
    assert problem.startswith(f"{name}={settings[name]} is not used by data={settings.get('source', 'pydocs')}, only by data=")


def test_a_link_to_itself_is_a_problem(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    [problem] = DataConfig("text", str(tmp_path / "a")).missing_files()
    assert "is a symbolic link to itself or to nothing" in problem


def test_how_records_are_read_changes_the_fingerprint(tmp_path):
    write(tmp_path, {"a.jsonl": '{"text": "a"}\n{"text": null}\n'})
    path = str(tmp_path)
    different = [Files(path), Files(path, DataConfig(encoding="latin-1")), Files(path, DataConfig(on_bad_record="skip"))]
    assert len({source.fingerprint() for source in different}) == 3
    assert texts(different[2]) == ["a"] and different[2].description() == "1 file, 1 record without text skipped"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.stem)
def test_each_preset_is_valid_once_it_has_a_path_or_name(preset):
    config = DataConfig(**(yaml.safe_load(preset.read_text()) or {}))
    assert all(problem.startswith(("path is missing", "hub_name is missing")) for problem in config.problems())


def test_data_root_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOHYDRA_DATA", str(tmp_path))
    assert data_root() == tmp_path
    monkeypatch.delenv("NANOHYDRA_DATA")
    assert data_root() == Path(sys.modules["data.sources"].__file__).parent / "prepared"
