"""Checkpoints are complete or absent, and everything in them is checked when they are read."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file

import atomic
from checkpointing import checkpoint, store
from checkpointing.checkpoint import Checkpoint, DamagedCheckpoint
from checkpointing.snapshot import Snapshot, safetensors_chunks, save_checkpoint
from checkpointing.spec import (
    DTYPES,
    FILES,
    FORMAT,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    STATE_FIELDS,
    TOKENIZER,
    checksum,
    find_problem,
    is_complete,
    step_name,
)


def snapshot(step, val_loss=None, scheduled=True, seed=0):
    draw = torch.Generator().manual_seed(seed + step)
    weights = {"w": torch.randn(2, 3, generator=draw), "b": torch.randn(3, generator=draw)}
    optimizer = {"w.exp_avg": weights["w"] * 2, "w.step": torch.tensor(float(step))}
    state = {"step": step, "max_steps": 9, "seconds": 1.5, "batches_skipped": 0, "nonfinite": 0, "replanned": False,
             "scheduled": scheduled, "val_loss": val_loss, "best_val_loss": val_loss, "stale_evaluations": 0,
             "settings": {"model": {"n_layer": 1}}, "model": {}, "environment": {}, "scaler": {}}
    return Snapshot(weights, optimizer, {"kind": "byte"}, state)


def save(folder, step, *arguments, **options):
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, snapshot(step, *arguments, **options))
    return folder / step_name(step)


def load_all(found, like):
    """Everything that a resumed run reads."""
    found.verify()
    weights, optimizer = found.load_tensors(MODEL, like.model), found.load_tensors(OPTIMIZER, like.optimizer)
    return weights, optimizer, found.tokenizer(), found.state


def write_manifest(folder, manifest):
    """Write a manifest that matches its own checksum."""
    manifest = {key: value for key, value in manifest.items() if key != "sha256"}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": checksum(manifest)}))


def reseal(folder):
    """Make the manifest match the files, as a malicious author would."""
    files = {}
    for name in FILES:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_manifest(folder, {"format": FORMAT, "files": files})


LIKE = snapshot(2)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of step 2, with the content of LIKE."""
    return save(tmp_path, 2)


def assert_refused(folder, match="step_00000002"):
    """By one sentence, whatever the content is."""
    with pytest.raises(ValueError, match=match) as refusal:
        load_all(Checkpoint.open(folder), LIKE)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 1000


@pytest.mark.parametrize(("names", "complete"), [
    (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], True),
    (["model-00001-of-00002.safetensors"], False), (["model-00001-of-00001.safetensors", MODEL], False),
    (["model-00001-of-00002.safetensors", "model-../../x"], False), ([], False)])
def test_parts_of_a_file_are_complete_or_refused(names, complete):
    assert is_complete([*names, OPTIMIZER, STATE, TOKENIZER]) is complete


# Saving


def test_a_saved_checkpoint_loads_unchanged(tmp_path):
    save(tmp_path, 7, 1.5)
    (found,) = store.list_checkpoints(tmp_path)
    like = snapshot(7)
    weights, optimizer, tokenizer, state = load_all(found, like)
    assert found.folder.name == "step_00000007" and found.step == 7 and state["val_loss"] == 1.5
    for loaded, saved in ((weights, like.model), (optimizer, like.optimizer), (load_file(found.folder / MODEL), like.model)):
        assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert tokenizer == {"kind": "byte"} and {path.name for path in found.folder.iterdir()} == {*FILES, MANIFEST}


def test_every_dtype_and_layout_loads_unchanged(tmp_path):
    tensors = {"view": torch.arange(6.0).view(2, 3).T}
    for dtype in DTYPES:
        tensors |= {f"{dtype} w": torch.arange(6).view(2, 3).to(dtype), f"{dtype} empty": torch.empty(0, 4, dtype=dtype),
                    f"{dtype} scalar": torch.tensor(3).to(dtype)}
    save_checkpoint(tmp_path, Snapshot(tensors, {}, LIKE.tokenizer, LIKE.state))
    found = store.list_checkpoints(tmp_path)[0].load_tensors(MODEL, tensors)
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_a_copy_shares_no_memory():
    one = snapshot(1)
    kept = one.copy()
    one.model["w"].zero_()
    one.optimizer["w.step"].zero_()
    assert torch.equal(kept.model["w"], snapshot(1).model["w"]) and kept.optimizer["w.step"] == 1


def test_a_disk_that_fills_up_keeps_the_old_checkpoints(tmp_path, monkeypatch):
    save(tmp_path, 1)

    class Filling:
        room = 500

        def __getattr__(self, name):
            return getattr(os, name)

        def write(self, handle, content):
            if len(content) > self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= len(content)
            return os.write(handle, content)

    monkeypatch.setattr(atomic, "os", Filling())
    with pytest.raises(OSError, match=r"2 could not be written \(No space left on device\). It needs 1 MB of free disk"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(atomic, "write_file", pytest.fail)
    with pytest.raises(OSError, match=r"the disk is full\). It needs 1 MB"):
        save(tmp_path, 2)
    assert not any(tmp_path.iterdir())


def test_an_invalid_state_is_not_written(tmp_path):
    for key, value in (("step", 2**63), ("val_loss", math.inf), ("seconds", -1.0)):
        with pytest.raises(AssertionError, match=key):
            save_checkpoint(tmp_path, Snapshot({}, {}, {}, LIKE.state | {key: value}))
    save_checkpoint(tmp_path, Snapshot({}, {}, {}, LIKE.state | {"max_steps": 2**62, "val_loss": 1e300}))
    assert len(store.list_checkpoints(tmp_path)) == 1


@pytest.mark.parametrize("failing", [1, 2])
def test_before_write_can_prevent_a_checkpoint(tmp_path, failing):
    """It is called before the files are written, and before the folder gets its final name."""
    calls = []

    def before_write():
        calls.append(list(tmp_path.iterdir()))
        if len(calls) == failing:
            raise ValueError("the run was moved")

    with pytest.raises(ValueError, match="the run was moved"):
        save_checkpoint(tmp_path, LIKE, before_write)
    assert [len(found) for found in calls] == [0, 1][:failing] and not any(tmp_path.iterdir())


# Damage by accident


def test_damage_in_a_file_that_is_not_read_does_not_matter(folder):
    path = folder / OPTIMIZER
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    found = Checkpoint.open(folder)
    found.verify([MODEL, TOKENIZER])
    with pytest.raises(DamagedCheckpoint, match=r"optimizer\.safetensors does not match its checksum"):
        found.verify()


def test_files_are_hashed_once(folder, monkeypatch):
    found = Checkpoint.open(folder)
    found.verify([MODEL])
    monkeypatch.setattr("hashlib.file_digest", lambda *words: pytest.fail("hashed again"))
    assert found.load_tensors(MODEL, LIKE.model).keys() == LIKE.model.keys()


@pytest.mark.parametrize("version", [2, 99])
def test_another_format_is_named(folder, version):
    write_manifest(folder, {"format": version, "files": {}})
    with pytest.raises(ValueError, match=rf"format {version}; this version of nanohydra reads format 3. Use the version that wrote it"):
        store.list_checkpoints(folder.parent)


@pytest.mark.parametrize("own", ["0" * 64, "", None, 3, ...], ids=str)
def test_a_manifest_must_match_its_own_checksum(folder, own):
    manifest = json.loads((folder / MANIFEST).read_text()) | {"sha256": own}
    if own is ...:
        del manifest["sha256"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert_refused(folder, "does not match its own checksum")


def test_files_of_two_checkpoints_do_not_mix(folder):
    other = save(folder.parent, 1)
    for name in (MODEL, OPTIMIZER, STATE):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes((other / name).read_bytes())
        assert_refused(folder)
        (folder / name).write_bytes(kept)
    load_all(Checkpoint.open(folder), LIKE)


def test_a_folder_of_another_step_is_refused(folder):
    assert_refused(folder.rename(folder.with_name("step_00000003")), "is of step 2")


# Damage on purpose, with a matching manifest


def safetensors(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


CHUNKS = [bytes(chunk) for chunk in safetensors_chunks(LIKE.model)]
HEADER, BODY = json.loads(CHUNKS[0][8:]), b"".join(CHUNKS[1:])


def changed(key, **values):
    return safetensors(HEADER | {key: HEADER[key] | values}, BODY)


HOSTILE_TENSORS = [
    b"", b"\0" * 7, struct.pack("<Q", 2**63), struct.pack("<Q", 2**40) + b"{}", pickle.dumps({"w": [1.0]}) + b"\0" * 400,
    safetensors({}, BODY), safetensors(b"[]", BODY), safetensors(b"{" * 300, BODY), safetensors(b"\xff" * 200, BODY),
    changed("w", shape=[2**40, 2**40]), changed("w", shape=[6]), changed("w", shape=[-2, -3]), changed("w", shape=[2.0, 3]),
    changed("w", dtype="I32"), changed("w", dtype="F64"), changed("w", data_offsets=[0, 2**62]),
    changed("w", data_offsets=[12, 36]), changed("w", data_offsets=[24, 0]), changed("b", data_offsets=[0, 12]),
    safetensors({"x": HEADER["w"], "b": HEADER["b"]}, BODY), safetensors({"w": HEADER["w"]}, BODY[:24]),
    safetensors(HEADER | {"more": {"dtype": "F32", "shape": [1], "data_offsets": [36, 40]}}, BODY + b"\0" * 4),
]


def test_a_hostile_tensor_file_is_refused(folder):
    for content in HOSTILE_TENSORS:
        (folder / MODEL).write_bytes(content)
        reseal(folder)
        assert_refused(folder)


def test_a_tensor_file_larger_than_the_model_is_not_read(folder, monkeypatch):
    """A sparse file of a terabyte: neither is its checksum computed nor memory allocated."""
    (folder / MODEL).write_bytes(safetensors({"w": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}))
    os.truncate(folder / MODEL, 2**40 + 1000)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][MODEL]["bytes"] = 2**40 + 1000
    write_manifest(folder, manifest)
    monkeypatch.setattr(checkpoint, "safe_open", pytest.fail)
    monkeypatch.setattr(hashlib, "file_digest", pytest.fail)
    with pytest.raises(DamagedCheckpoint, match="larger than the settings ask for"):
        Checkpoint.open(folder).load_tensors(MODEL, LIKE.model)
    with pytest.raises(DamagedCheckpoint, match="larger than these settings allow"):
        Checkpoint.open(folder).verify(max_bytes=10_000)


def test_a_model_larger_than_the_free_memory_is_refused(folder, monkeypatch):
    monkeypatch.setattr("hardware.available_memory", lambda: 30.0)
    with pytest.raises(ValueError, match=r"needs 36 bytes of memory, 30 bytes are free"):
        Checkpoint.open(folder).load_tensors(MODEL, LIKE.model)


HOSTILE_JSON = [b"", b"null", b"[]", b"3", b'"x"', b"{", b'{"a": ' + b"9" * 5000 + b"}", b"\xff\xfe",
                b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' * 500 + b"1" + b"}" * 500]


@pytest.mark.parametrize("name", [STATE, TOKENIZER, MANIFEST])
def test_hostile_json_is_refused(folder, name):
    for content in HOSTILE_JSON:
        (folder / name).write_bytes(content)
        if name != MANIFEST:
            reseal(folder)
        assert_refused(folder)


@pytest.mark.parametrize("name", [STATE, MANIFEST, TOKENIZER])
def test_large_json_is_not_read(folder, monkeypatch, name):
    if name != MANIFEST:
        os.truncate(folder / name, 2**25)
    reseal(folder)
    os.truncate(folder / name, 2**25)
    parse = checkpoint.parse_json
    monkeypatch.setattr(checkpoint, "parse_json",
                        lambda path, content: pytest.fail("was read") if path.name == name else parse(path, content))
    assert_refused(folder, "is larger than")


@pytest.mark.parametrize("key", STATE_FIELDS)
def test_a_state_with_an_invalid_value_is_refused(key):
    kind, *bounds = STATE_FIELDS[key]
    values = ["x", [1], "\ud800"]
    if kind is not dict:
        values.append({"a": 1})
    if kind is not bool:
        values += [True, False]
    if bounds:
        values += [bounds[0] - 1, -0.5, -1e308, -(2**63), 2**64, 10**300, math.inf, math.nan]
    if bounds and bounds[1] < 2**63 - 1:
        values += [bounds[1] + 1, 2.0**60]
    assert not find_problem(LIKE.state)
    for value in values:
        assert f"has {key}=" in find_problem(LIKE.state | {key: value}), value
    assert "exactly" in find_problem({name: LIKE.state[name] for name in LIKE.state if name != key})


@pytest.mark.parametrize("change", [{"step": -1}, {"more": [{}] * 10}, {"settings": {"a": {"b": {"c": {"d": 1}}}}}], ids=str)
def test_a_file_with_an_invalid_state_is_refused(folder, change):
    (folder / STATE).write_text(json.dumps(LIKE.state | change))
    reseal(folder)
    assert_refused(folder, "state.json (has|must|is not a JSON file)")


def test_a_link_to_a_checkpoint_is_refused(folder):
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(elsewhere)
    assert_refused(folder, "is a link")


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_links_and_pipes_are_refused(folder, tmp_path, name):
    """A FIFO would wait for a writer for ever."""
    elsewhere = tmp_path / "elsewhere"
    (folder / name).rename(elsewhere)
    for make in (lambda: (folder / name).symlink_to(elsewhere), lambda: os.mkfifo(folder / name)):
        make()
        assert_refused(folder, "is not a regular file")
        (folder / name).unlink()
    (folder / name).mkdir()
    assert_refused(folder)


@pytest.mark.parametrize("files", [
    {}, {"../../x": {}}, {name: {} for name in FILES}, dict.fromkeys(FILES), [], None,
    {name: {"bytes": "x", "sha256": 1} for name in FILES}, {**{name: {} for name in FILES}, "/etc/passwd": {}}], ids=range(8))
def test_a_manifest_of_other_files_is_refused(folder, files):
    write_manifest(folder, {"format": FORMAT, "files": files})
    assert_refused(folder)


@pytest.mark.parametrize("sealed", [False, True], ids=["as damaged", "resealed"])
@pytest.mark.slow
def test_mutations_are_refused_or_change_only_values(folder, sealed):
    """Cuts, bit flips, growth, swaps, absurd numbers and deep nests: 600 at random, in every file.

    Whoever can write a matching manifest may change the values of tensors and the words in the JSON; all else is refused.
    """
    draw = random.Random(0)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    for _ in range(600):
        name = draw.choice([*FILES, MANIFEST])
        (folder / name).write_bytes(mutated(draw, good, name))
        content = (folder / name).read_bytes()
        if sealed and name != MANIFEST:
            reseal(folder)
        if content != good[name]:
            try:
                found = load_all(Checkpoint.open(folder), LIKE)
                assert sealed and name != MANIFEST
                assert not find_problem(found[3])
                for tensors, like in zip(found[:2], (LIKE.model, LIKE.optimizer), strict=True):
                    assert {key: (t.shape, t.dtype) for key, t in tensors.items()} == {key: (t.shape, t.dtype) for key, t in like.items()}
            except ValueError as error:
                assert re.search(r"step_00000002", str(error)) and "\n" not in str(error)
        for one, kept in good.items():
            (folder / one).write_bytes(kept)


def mutated(draw, good, name):
    content = bytearray(good[name])
    kind = draw.choice(["flip", "cut", "insert", "swap", "zero", "number", "nest"])
    place = draw.randrange(min(len(content), draw.choice([16, 200, len(content)])))
    if kind == "flip":
        content[place] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "insert":
        content[place:place] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
    elif kind == "swap":
        content = good[draw.choice([one for one in [*FILES, MANIFEST] if one != name])]
    elif kind == "zero":
        content[place:place + 8] = bytes(len(content[place:place + 8]))
    else:
        inside = [b"9" * draw.randrange(1, 400), b"-1e999", b"NaN", b"true", b"1e400", b"9223372036854775807"]
        depth = draw.choice([5, 1000, 100_000])
        value = draw.choice(inside) if kind == "number" else b"[" * depth + b"]" * depth
        numbers = list(re.finditer(rb"\b\d+(\.\d+)?\b", bytes(content)))
        start, end = draw.choice(numbers).span() if numbers else (place, place + 1)
        content[start:end] = value
    return bytes(content)


def test_reading_never_unpickles(folder, tmp_path):
    class Boom:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    zipped = io.BytesIO()
    torch.save(Boom(), zipped)
    for payload in (pickle.dumps(Boom()), zipped.getvalue()):
        (folder / MODEL).write_bytes(payload)
        reseal(folder)
        assert_refused(folder)
    assert not (tmp_path / "harm").exists()
