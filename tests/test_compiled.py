"""Compiled code is kept for the next process, and nothing else is ever loaded in its place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch  # noqa: F401  loads the OpenMP library that compiled code calls

from generation import kernels

SOURCE = str(Path(kernels.__file__).with_suffix(".c"))
pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no kernels here: {kernels.library()}")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A source that compiles fast, with an empty folder for what is compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "small.c"
    source.write_text("int answer(void) { return 42; }")
    return source


@pytest.fixture
def compilations(monkeypatch):
    """The compiler's commands, as they are run."""
    commands, run = [], kernels.run_compiler
    monkeypatch.setattr(kernels, "run_compiler", lambda command: (commands.append(command), run(command)))
    return commands


def kept(tmp_path):
    return list((tmp_path / "cache/nanohydra").iterdir())


def test_the_next_process_loads_what_was_compiled(small, compilations, tmp_path):
    assert kernels.load_library(small).answer() == 42
    assert len(compilations) == 2
    assert kernels.load_library(small).answer() == 42
    assert len(compilations) == 2 and len(kept(tmp_path)) == 1


@pytest.mark.parametrize("change", ["source", "flags", "processor"])
def test_other_code_is_compiled_anew(small, compilations, change, monkeypatch, tmp_path):
    kernels.load_library(small)
    if change == "source":
        small.write_text("int answer(void) { return 43; }")
    elif change == "flags":
        monkeypatch.setenv("NANOHYDRA_CFLAGS", "-DANSWER")
    else:
        monkeypatch.setattr(kernels, "processor", lambda: "another")
    assert kernels.load_library(small).answer() == (43 if change == "source" else 42)
    assert len(compilations) == 4 and len(kept(tmp_path)) == 2


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]


DAMAGES = {
    "empty": lambda content: b"", "cut in its checksum": lambda content: content[:20],
    "cut": lambda content: content[:5000], "a page short": lambda content: content[:-4096],
    "longer": lambda content: content + b"0", "zeros": lambda content: bytes(len(content)),
    "another checksum": lambda content: flip(content, 3)}


@pytest.mark.parametrize("damage", [*DAMAGES, *range(40, 15000, 997)])
def test_a_damaged_library_is_compiled_anew(small, compilations, damage, tmp_path):
    kernels.load_library(small)
    (path,) = kept(tmp_path)
    whole = path.read_bytes()
    if isinstance(damage, int):
        path.write_bytes(flip(whole, damage % len(whole)))
    else:
        path.write_bytes(DAMAGES[damage](whole))
    assert kernels.load_library(small).answer() == 42
    assert len(compilations) == 4
    kernels.load_library(small)
    assert len(compilations) == 4, "it was not repaired"


def test_a_whole_library_that_cannot_be_loaded_is_compiled_anew(small, tmp_path):
    kernels.load_library(small)
    (path,) = kept(tmp_path)
    kernels.write_cached(path, b"no library")
    assert kernels.load_library(small).answer() == 42


def test_damage_after_loading_changes_nothing(small, tmp_path):
    """A library that is mapped from a file crashes the process when that file is cut."""
    library = kernels.load_library(small)
    (path,) = kept(tmp_path)
    os.truncate(path, 0)
    assert library.answer() == 42


@pytest.mark.parametrize("planted", ["file", "link", "fifo", "folder"])
def test_a_planted_library_is_not_loaded(small, planted, tmp_path, monkeypatch):
    kernels.load_library(small)
    (path,) = kept(tmp_path)
    evil = tmp_path / "evil.c"
    evil.write_text("int answer(void) { return 666; }")
    content = kernels.compile_source(evil, ["gcc"], [])
    path.unlink()
    if planted == "link":
        kernels.write_cached(tmp_path / "elsewhere/evil", content)
        path.symlink_to(tmp_path / "elsewhere/evil")
    elif planted == "fifo":
        os.mkfifo(path)
    elif planted == "folder":
        path.mkdir()
    else:
        kernels.write_cached(path, content)
        another_user(monkeypatch, path)
    assert kernels.load_library(small).answer() == 42


def another_user(monkeypatch, path):
    """Let `path` belong to another user than this process."""
    if os.getuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr("os.getuid", lambda: 12345)


def test_a_folder_of_another_user_is_not_used(small, compilations, monkeypatch, tmp_path):
    kernels.load_library(small)
    another_user(monkeypatch, tmp_path / "cache/nanohydra")
    before = kept(tmp_path)[0].stat()
    assert len(compilations) == 2
    assert kernels.load_library(small).answer() == 42
    assert len(compilations) == 4 and kept(tmp_path)[0].stat() == before


def test_a_folder_that_is_a_link_is_not_used(small, compilations, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/nanohydra").symlink_to(tmp_path / "elsewhere")
    assert kernels.load_library(small).answer() == 42
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_folder_is_closed_to_other_users(small, tmp_path):
    kernels.load_library(small)
    folder = tmp_path / "cache/nanohydra"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    kernels.load_library(small)
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("home", ["/proc/nobody", "", "relative"])
def test_without_a_folder_it_compiles_each_time(small, home, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert kernels.load_library(small).answer() == 42
    assert list(tmp_path.iterdir()) == [small]


def test_without_memory_files_it_loads_a_private_copy(small, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    assert kernels.load_library(small).answer() == 42


def test_several_libraries_can_be_loaded(small):
    found = []
    for answer in range(5):
        small.write_text(f"int answer(void) {{ return {answer}; }}")
        found.append(kernels.load_library(small))
    assert [library.answer() for library in found] == list(range(5))


@pytest.mark.parametrize(("compiler", "source", "problem"), [
    ("no-such-compiler", "int x;", "no C compiler here .no-such-compiler.: install gcc"),
    ("/", "int x;", "no C compiler here"), ("gcc", "int x", "gcc .*some.c.* failed: ")])
def test_code_that_cannot_be_compiled_says_why(compiler, source, problem, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "some.c"
    path.write_text(source)
    with pytest.raises(OSError, match=problem):
        kernels.load_library(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("there", ["gcc", "clang", "cc"])
def test_any_common_compiler_is_found(there, small, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: name if name == there else None)
    monkeypatch.setattr(kernels, "compile_source", lambda source, compiler, flags: compiler[0].encode())
    monkeypatch.setattr(kernels, "load", bytes.decode)
    assert kernels.load_library(small) == there
