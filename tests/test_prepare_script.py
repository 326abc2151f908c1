"""python -m scripts.prepare: inspecting and deleting prepared tokens."""

from __future__ import annotations

import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import locks
import train
from conf.schema import ConfigError, compose
from data.config import DataConfig
from data.prepare import load_tokenizer, prepare
from data.shards import open_parts, read_meta
from scripts.prepare import Contents, PrepareSettings, main
from scripts.unused_tokens import clean, n_bytes

DOCUMENTS = [f"Document {number} " + "word " * number for number in range(120)]


@pytest.fixture
def folder_of_texts(tmp_path):
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / "texts" / f"{number:03d}.txt").write_text(text)
    return tmp_path / "texts"


def run(*overrides):
    return main(compose(PrepareSettings, list(overrides)))


@pytest.mark.slow
def test_inspect_prints_statistics_and_documents(folder_of_texts, tmp_path, fresh_data, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "picture.png"
    words = ["data=text", f"data.path={folder_of_texts}", "data.tokenizer=byte", "inspect=true", f"out={out}"]
    assert run(*words) == 0
    said = capsys.readouterr().out
    everything = "".join(DOCUMENTS)
    assert f"{everything.count('o') / (len(everything) + 120):>9.2%}  'o'" in said
    assert said.count(f"{everything.count('o'):,}") >= 1 and said.count("  'o'") == 1
    train_documents, val_documents = (int(re.search(rf"{split} +(\d+) ", said)[1]) for split in ("train", "val"))
    assert train_documents + val_documents == 120
    assert re.search(r"111 +\d,\d{3} +\d+\.\d\d%  'o'", said)
    shown = re.findall(r"--- Document (\d+) of (\d+): (\d+) tokens\n(Document \d+ (?:word )*)", said)
    assert len(shown) == 3 and all(int(total) == train_documents for _, total, _, _ in shown)
    assert all(len(text) == min(int(length), 600) for _, _, length, text in shown)
    assert out.read_bytes().startswith(b"\x89PNG")
    run(*words)
    assert capsys.readouterr().out == said  # the same documents for the same seed
    run(*words, "seed=7")
    assert capsys.readouterr().out != said


def test_inspect_needs_no_matplotlib(folder_of_texts, fresh_data, capsys, monkeypatch):
    monkeypatch.setattr("scripts.prepare.find_spec", lambda name: None)
    assert run("data=text", f"data.path={folder_of_texts}", "data.tokenizer=byte", "inspect=true") == 0
    assert "needs matplotlib" in capsys.readouterr().out and not list(fresh_data.rglob("*.png"))


def test_files_that_are_skipped_later_are_counted(folder_of_texts, fresh_data, capsys):
    words = ["data=text", f"data.path={folder_of_texts}", "data.tokenizer=byte"]
    run(*words)
    assert "same as before" not in capsys.readouterr().out
    (folder_of_texts / "new.docx").touch()
    run(*words)
    assert "same as before, now in 120 files (skipped 1 .docx)." in capsys.readouterr().out


def test_a_source_of_skipped_records_says_so(tmp_path, fresh_data):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n' * 3)
    with pytest.raises(ValueError, match=r"every document is empty \(1 file, 3 records without text skipped\)"):
        run("data=text", f"data.path={tmp_path / 'a.jsonl'}", "data.on_bad_record=skip")


def test_contents_match_the_texts(folder_of_texts, fresh_data):
    folder = prepare(DataConfig("text", str(folder_of_texts), "byte", val_fraction=0.1))
    contents = Contents(folder, load_tokenizer(folder))
    everything = "".join(DOCUMENTS).encode()
    assert contents.counts[:256].tolist() == [everything.count(bytes((byte,))) for byte in range(256)]
    assert contents.counts[256] == 120
    [tokens] = open_parts(folder, "train")
    texts = [bytes(tokens.read(np.arange(start, end)).tolist()).decode() for start, end in zip(contents.starts, contents.ends, strict=True)]
    assert len(texts) == len(contents.starts) and set(texts) <= set(DOCUMENTS)
    edges, heights = contents.lengths()
    assert heights.sum() == len(texts) and np.histogram([len(text) for text in texts], edges)[0].tolist() == heights.tolist()
    assert {index for index, _, _ in contents.some_documents(1000, 0)} == set(range(len(texts)))


def test_contents_do_not_depend_on_the_chunk_size(folder_of_texts, fresh_data, monkeypatch):
    folder = prepare(DataConfig("text", str(folder_of_texts), "byte", val_fraction=0.1))
    whole = Contents(folder, load_tokenizer(folder))
    monkeypatch.setattr("data.shards.CHUNK", 100)
    pieces = Contents(folder, load_tokenizer(folder))
    assert pieces.counts.tolist() == whole.counts.tolist() and pieces.ends.tolist() == whole.ends.tolist()
    assert list(pieces.some_documents(10, 0)) == list(whole.some_documents(10, 0))


def test_the_beginning_of_a_document_is_shown(folder_of_texts, fresh_data, monkeypatch):
    monkeypatch.setattr("scripts.prepare.BEGINNING", 200)
    folder = prepare(DataConfig("text", str(folder_of_texts), "byte", val_fraction=0.1))
    shown = list(Contents(folder, load_tokenizer(folder)).some_documents(1000, 0))
    assert {len(ids) < length for _, length, ids in shown} == {True, False}
    by_length = {len(text): text for text in DOCUMENTS}
    assert [bytes(ids).decode() for _, _, ids in shown] == [by_length[length][:200] for _, length, _ in shown]


def test_documents_of_each_part_of_a_mixture_are_shown(folder_of_texts, tmp_path, fresh_data):
    (tmp_path / "digits.txt").write_text("0123456789" * 30)
    folder = prepare(DataConfig(mix=f"{folder_of_texts}:1 {tmp_path}/digits.txt:1", tokenizer="byte"))
    contents = Contents(folder, load_tokenizer(folder))
    shown = list(contents.some_documents(1000, 0))
    assert [index for index, _, _ in shown] == list(range(len(contents.starts)))
    assert [bytes(ids).decode() for _, _, ids in shown][-1] == "0123456789" * 27


@pytest.mark.slow
def test_the_picture_is_saved_beside_the_tokens(tmp_path, fresh_data, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "a.txt").write_text("abcdefghij" * 100)
    assert run("data=text", f"data.path={tmp_path / 'a.txt'}", "data.tokenizer=char", "inspect=true") == 0
    said = capsys.readouterr().out
    [folder] = fresh_data.iterdir()
    assert (folder / "inspect.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"train +1 +900 +900 +1\.00\n", said) and re.search(r"val +1 +100 +100 +1\.00\n", said)
    assert "10 of 10 tokens occur" in said and len(re.findall(r"100   10\.00%", said)) == 10


def test_only_tokens_that_occur_are_listed(tmp_path, fresh_data, capsys, monkeypatch):
    monkeypatch.setattr("scripts.prepare.draw", lambda *args: b"")
    (tmp_path / "a.txt").write_text("abab" * 100)
    run("data=text", f"data.path={tmp_path / 'a.txt'}", "data.tokenizer=byte", "inspect=true")
    said = capsys.readouterr().out
    assert "2 of 257 tokens occur" in said and len(re.findall(r"^ +\d+ +\d+ +\d+\.\d\d%  ", said, re.MULTILINE)) == 2


def test_a_single_text_is_one_document(tmp_path, fresh_data):
    (tmp_path / "a.txt").write_text("abc" * 100)
    folder = prepare(DataConfig("text", str(tmp_path / "a.txt"), "char"))
    contents = Contents(folder, load_tokenizer(folder))
    assert len(contents.starts) == 1 and [length for _, length, _ in contents.some_documents(3, 0)] == [270]


def test_control_characters_in_documents_are_escaped(tmp_path, fresh_data, capsys, monkeypatch):
    """They could set the terminal's title, fill the clipboard and clear the screen."""
    monkeypatch.setattr("scripts.prepare.draw", lambda *args: b"")
    commands = "\x1b]0;title\x07 \x1b]52;c;Zm9v\x07 \x1b[2J \x9b2J \u202e "
    (tmp_path / "a.txt").write_text(commands * 40)
    assert run("data=text", f"data.path={tmp_path / 'a.txt'}", "data.tokenizer=byte", "inspect=true") == 0
    said = capsys.readouterr().out
    assert r"\x1b]0;title\x07" in said
    assert all(letter.isprintable() or letter in "\n\t" for letter in said)


# clean=true


@pytest.fixture
def run_with(monkeypatch):
    """Make a folder that looks like a run whose checkpoint has these settings."""
    def make(folder, settings):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "settings.json").write_text(json.dumps(settings))

    def look(checkpoints):
        saved = checkpoints / "settings.json"
        return [SimpleNamespace(state={"settings": json.loads(saved.read_text())})] if saved.exists() else [], {}

    monkeypatch.setattr("scripts.unused_tokens.store.scan", look)
    return make


@pytest.fixture
def tokens(tmp_path, fresh_data):
    """Prepare the tokens of a text."""
    def make(text):
        (tmp_path / f"{text}.txt").write_text(text * 100)
        return prepare(DataConfig("text", str(tmp_path / f"{text}.txt"), "byte"))
    return make


def settings_with(folder):
    return {"data": {"prepared": read_meta(folder)["fingerprint"][:12]}}


def test_clean_removes_unused_and_unfinished_tokens(run_with, tokens, tmp_path, fresh_data, capsys):
    used, unused = tokens("a"), tokens("b")
    run_with(tmp_path / "runs" / "one", settings_with(used))
    names = [f"{kind}text-byte-{digit * 12}" for digit, kind in zip("123", (".building-", ".building-", ".partial-"), strict=True)]
    for name in names:
        (fresh_data / (name + "-0123abcd" * name.startswith(".partial"))).mkdir()
    lock = locks.Lock(fresh_data / ".lock-text-byte-222222222222", "a test")
    assert run("clean=true", "yes=true", f"runs_dir={tmp_path / 'runs'}") == 0
    said = capsys.readouterr().out
    assert f"Kept {used} (" in said and f"used by {tmp_path / 'runs' / 'one'}" in said
    assert f"Removed {unused}" in said and f"To be removed: {fresh_data / names[0]} (" in said
    assert re.search(r"Kept \S*building-text-byte-222222222222 \(\d+ \w+\), which is being prepared", said)
    assert sorted(path.name for path in fresh_data.iterdir()) == sorted([used.name, names[1], ".lock-text-byte-222222222222"])
    lock.release()


@pytest.mark.parametrize("answer, removed", [(" YES \n", True), ("\n", False), ("", False), (None, False)])
def test_clean_asks_for_a_confirmation(tokens, tmp_path, capsys, monkeypatch, answer, removed):
    folder = tokens("a")
    (tmp_path / "runs").mkdir()
    stream = io.StringIO("y\n" if answer is None else answer)
    stream.isatty = lambda: answer is not None
    monkeypatch.setattr("sys.stdin", stream)
    assert clean(tmp_path / "runs", yes=False) == 0
    said = capsys.readouterr().out
    assert f"To be removed: {folder} (" in said and ("Nothing was removed" in said) is not removed
    assert folder.exists() is not removed


@pytest.mark.parametrize("name", ["my-data-0123456789ab", "text-byte-0123456789ab", ".building-a-b", ".partial-photos-of-2024",
                                  "text-byte-0123456789abc"])
def test_clean_ignores_folders_of_other_programs(tmp_path, fresh_data, name):
    (fresh_data / name / "inner").mkdir(parents=True)
    (fresh_data / name / "inner" / "photo.jpg").write_bytes(b"x")
    (tmp_path / "runs").mkdir()
    clean(tmp_path / "runs", yes=True)
    assert (fresh_data / name / "inner" / "photo.jpg").exists()


@pytest.mark.parametrize("change, why", [
    (lambda folder: (folder / "notes.txt").write_text("mine"), "which has a file that prepared tokens do not have: notes.txt"),
    (lambda folder: (folder / "meta.json").write_text("[" * 100_000), "whose meta.json cannot be read"),
    (lambda folder: (folder / "meta.json").unlink(), "whose meta.json cannot be read"),
])
def test_a_folder_with_other_files_is_kept(tokens, tmp_path, capsys, change, why):
    change(folder := tokens("a"))
    (tmp_path / "runs").mkdir()
    clean(tmp_path / "runs", yes=True)
    assert folder.is_dir() and re.search(rf"Kept {re.escape(str(folder))} \(.*\), {why}", capsys.readouterr().out)


def test_tokens_that_a_run_starts_to_use_meanwhile_are_kept(run_with, tokens, tmp_path, monkeypatch):
    folder = tokens("a")
    (tmp_path / "runs").mkdir()

    def confirmed():
        run_with(tmp_path / "runs" / "new", settings_with(folder))
        return True

    monkeypatch.setattr("scripts.unused_tokens.confirmed", confirmed)
    assert clean(tmp_path / "runs", yes=False) == 0
    assert folder.is_dir()


def test_a_link_to_tokens_is_not_followed(tokens, tmp_path, fresh_data):
    elsewhere = tokens("a").rename(tmp_path / "elsewhere")
    link = fresh_data / "text-byte-0123456789ab"
    link.symlink_to(elsewhere)
    (tmp_path / "runs").mkdir()
    clean(tmp_path / "runs", yes=True)
    assert link.is_symlink() and (elsewhere / "meta.json").exists()


@pytest.mark.parametrize("target", ["disk/one", "disk"])
def test_runs_behind_links_keep_their_tokens(run_with, tokens, tmp_path, capsys, target):
    folder = tokens("a")
    run_with(tmp_path / "disk" / "one", settings_with(folder))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / target)
    (tmp_path / "disk" / "back").symlink_to(tmp_path / "runs")
    clean(tmp_path / "runs", yes=True)
    assert folder.is_dir() and f"used by {tmp_path / 'runs' / 'link'}" in capsys.readouterr().out


def test_a_broken_link_stops_cleaning(tokens, tmp_path):
    folder = tokens("a")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "unmounted")
    with pytest.raises(ValueError, match=r"link is a broken link.*Nothing was removed"):
        clean(tmp_path / "runs", yes=True)
    assert folder.is_dir()


@pytest.mark.parametrize("settings", [{}, {"data": {"prepared": 3}}])
def test_a_run_with_unknown_tokens_stops_cleaning(run_with, tokens, tmp_path, settings):
    folder = tokens("a")
    run_with(tmp_path / "runs" / "one", settings)
    with pytest.raises(ValueError, match=r"is unknown which tokens .*one uses.*Nothing was removed"):
        clean(tmp_path / "runs", yes=True)
    assert folder.is_dir()


def test_a_run_without_a_checkpoint_stops_cleaning(tokens, tmp_path):
    unused = tokens("a")
    with pytest.raises(ValueError, match=r"runs_dir=\S*nowhere is not a folder.*Nothing was removed"):
        clean(tmp_path / "nowhere", yes=True)
    lock = locks.Lock(tmp_path / "runs" / "live" / "lock", "a test")
    with pytest.raises(ValueError, match=r"live is being trained .*Nothing was removed"):
        clean(tmp_path / "runs", yes=True)
    assert unused.is_dir()
    lock.release()
    clean(tmp_path / "runs", yes=True)
    assert not unused.exists()


@pytest.mark.slow
def test_tokens_of_nested_runs_are_kept_with_all_users(compose_tiny, tmp_path, fresh_data, capsys):
    train.train(settings := compose_tiny("training.max_steps=1", "name=sweep/one"))
    shutil.copytree(tmp_path / "runs/sweep/one", tmp_path / "runs/two")
    capsys.readouterr()
    clean(tmp_path / "runs", yes=True)
    said = capsys.readouterr().out
    assert prepare(settings.data).is_dir() and "Removed" not in said
    assert all(f"{tmp_path / 'runs'}/{name}" in said for name in ("sweep/one", "two"))


def test_tokens_are_kept_while_they_are_being_prepared(tokens, tmp_path, fresh_data, capsys):
    folder = tokens("a")
    (folder / "inspect.png").write_bytes(bytes(3 * 2**20))
    (building := folder.with_name(f".building-{folder.name}")).mkdir()
    shutil.copytree(folder, building, dirs_exist_ok=True)
    lock = locks.Lock(fresh_data / f".lock-{folder.name}", "a test")
    (tmp_path / "runs").mkdir()
    clean(tmp_path / "runs", yes=True)
    said = capsys.readouterr().out
    assert building.is_dir() and not folder.exists()
    assert f"To be removed: {folder} (3 MB), not used by a run in" in said and "\n3 MB removed." in said
    lock.release()


@pytest.mark.slow
def test_a_damaged_run_stops_cleaning(compose_tiny, tmp_path, fresh_data):
    train.train(settings := compose_tiny("training.max_steps=1"))
    used = prepare(settings.data)
    for state in (tmp_path / "runs").rglob("state.json"):
        state.write_text("{}")
    with pytest.raises(ValueError, match=r"is unknown which tokens .*tiny uses.*Nothing was removed"):
        clean(tmp_path / "runs", yes=True)
    assert used.is_dir()


def test_a_file_that_disappears_while_it_is_measured(tokens, monkeypatch):
    monkeypatch.setattr("pathlib.Path.rglob", lambda folder, pattern: iter([folder / "meta.json", folder / ".partial-gone"]))
    folder = tokens("abc")
    assert n_bytes(folder) > (folder / "meta.json").stat().st_size


@pytest.mark.parametrize("words, problem", [(["clean=true", "inspect=true"], "exclude each other"), (["yes=true"], "confirms clean=true"), (["out=a.png"], "picture of inspect=true"), (["inspect=true", "out=a.txt"], "out=a.txt must"),
                                            (["data.pth=x"], "did you mean data.path")])
def test_invalid_settings_are_explained(words, problem):
    with pytest.raises(ConfigError, match=problem):
        main(compose(PrepareSettings, words))
