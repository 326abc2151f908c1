"""A checkpoint: whole or absent, checked before anything is believed."""

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
from checkpointing.checkpoint import (
    FILES,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    TOKENIZER,
    Checkpoint,
    DamagedCheckpoint,
    Snapshot,
)


def snapshot(step, val_loss=None, scheduled=True, seed=0):
    draw = torch.Generator().manual_seed(seed + step)
    weights = {"w": torch.randn(2, 3, generator=draw), "b": torch.randn(3, generator=draw)}
    state = {"step": step, "max_steps": 9, "seconds": 1.5, "batches_skipped": 0, "nonfinite": 0, "replanned": False,
             "scheduled": scheduled,
             "val_loss": val_loss, "best_val_loss": val_loss, "stale_evaluations": 0, "settings": {"model": {"n_layer": 1}}, "model": {}, "environment": {}, "scaler": {}}
    return Snapshot(weights, {"0.0.exp_avg": weights["w"] * 2, "0.0.step": torch.tensor(float(step))}, {"kind": "byte"}, state)


def save(folder, step, *arguments, **options):
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder, snapshot(step, *arguments, **options))
    return folder / checkpoint.step_name(step)


def load_all(found, like):
    """Everything that a resumed run reads."""
    found.verify()
    return found.load_tensors(MODEL, like.model), found.load_tensors(OPTIMIZER, like.optimizer), found.tokenizer(), found.state


def reseal(folder):
    """Make the manifest agree with what lies there now, as someone would who means harm."""
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
             for name in FILES if (folder / name).is_file()}
    manifest = {"format": checkpoint.FORMAT, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": checkpoint.checksum(manifest)}))


def test_what_was_saved_comes_back(tmp_path):
    save(tmp_path, 7, 1.5)
    (found,) = store.list_checkpoints(tmp_path)
    like = snapshot(7)
    weights, optimizer, tokenizer, state = load_all(found, like)
    assert found.folder.name == "step_00000007" and found.step == 7 and state["val_loss"] == 1.5
    assert all(torch.equal(weights[name], tensor) for name, tensor in like.model.items())
    assert all(torch.equal(optimizer[name], tensor) for name, tensor in like.optimizer.items())
    assert tokenizer == {"kind": "byte"} and {path.name for path in found.folder.iterdir()} == {*FILES, MANIFEST}


def test_the_files_are_safetensors_as_others_read_them(tmp_path):
    folder = save(tmp_path, 1)
    theirs = load_file(folder / MODEL)
    assert theirs.keys() == snapshot(1).model.keys() and torch.equal(theirs["w"], snapshot(1).model["w"])


@pytest.mark.parametrize("dtype", checkpoint.DTYPES)
def test_every_type_of_number_comes_back(tmp_path, dtype):
    tensors = {"w": torch.arange(6).view(2, 3).to(dtype), "empty": torch.empty(0, 4, dtype=dtype), "scalar": torch.tensor(3).to(dtype)}
    one = snapshot(1)
    checkpoint.save(tmp_path, Snapshot(tensors, {}, one.tokenizer, one.state))
    found = store.list_checkpoints(tmp_path)[0].load_tensors(MODEL, tensors)
    assert all(torch.equal(found[name], tensor) and found[name].dtype == dtype for name, tensor in tensors.items())


def test_tensors_that_are_views_are_saved_as_they_look(tmp_path):
    one = snapshot(1)
    turned = {"w": torch.arange(6.0).view(2, 3).T}
    checkpoint.save(tmp_path, Snapshot(turned, {}, one.tokenizer, one.state))
    assert torch.equal(store.list_checkpoints(tmp_path)[0].load_tensors(MODEL, turned)["w"], turned["w"])


def test_a_copy_does_not_change_with_what_it_was_copied_from():
    one = snapshot(1)
    kept = one.copy()
    one.model["w"].zero_()
    one.optimizer["0.0.step"].zero_()
    assert torch.equal(kept.model["w"], snapshot(1).model["w"]) and kept.optimizer["0.0.step"] == 1


def test_a_disk_that_fills_midway_leaves_the_old_checkpoints_and_no_half_one(tmp_path, monkeypatch):
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
    with pytest.raises(OSError, match=r"step_00000002 could not be written \(No space left on device\): it needs 1 MB of free disk"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_disk_too_full_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(atomic, "write_file", pytest.fail)
    with pytest.raises(OSError, match=r"the disk is full\): it needs 1 MB"):
        save(tmp_path, 2)
    assert not any(tmp_path.iterdir())


# Damage by accident


def test_what_sampling_does_not_read_may_be_damaged(tmp_path):
    path = save(tmp_path, 1) / OPTIMIZER
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert store.load_checkpoint(tmp_path, "last", lambda one: one.verify([MODEL, TOKENIZER]) or one, pytest.fail).step == 1


def test_a_checkpoint_of_another_format_is_named_as_such(tmp_path):
    folder = save(tmp_path, 1)
    manifest = {"format": 99, "files": {}}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": checkpoint.checksum(manifest)}))
    with pytest.raises(ValueError, match=r"format 99, this nanohydra reads 3: use the version that wrote it"):
        store.list_checkpoints(tmp_path)


# Damage on purpose: the manifest agrees


def assert_refused(folder, like):
    """One sentence, whatever is in there."""
    with pytest.raises(ValueError) as refusal:
        load_all(Checkpoint.open(folder), like)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 1000


def header_of(tensors):
    return next(checkpoint.pieces(tensors))[8:]


def safetensors(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


LIKE = snapshot(2)
BODY = b"".join(bytes(piece) for piece in list(checkpoint.pieces(LIKE.model))[1:])
HEADER = json.loads(header_of(LIKE.model))


def changed(key, **values):
    return HEADER | {key: HEADER[key] | values}


@pytest.mark.parametrize("content", [
    b"", b"\0" * 7, struct.pack("<Q", 2**63), struct.pack("<Q", 2**40) + b"{}", pickle.dumps({"w": [1.0]}) + b"\0" * 400,
    safetensors({}, BODY), safetensors(b"[]", BODY), safetensors(b"{" * 300, BODY), safetensors(b"\xff" * 200, BODY),
    safetensors(changed("w", shape=[2**40, 2**40]), BODY), safetensors(changed("w", shape=[6]), BODY),
    safetensors(changed("w", shape=[-2, -3]), BODY), safetensors(changed("w", shape=[2.0, 3]), BODY),
    safetensors(changed("w", dtype="I32"), BODY), safetensors(changed("w", dtype="F64"), BODY),
    safetensors(changed("w", data_offsets=[0, 2**62]), BODY), safetensors(changed("w", data_offsets=[12, 36]), BODY),
    safetensors(changed("w", data_offsets=[24, 0]), BODY), safetensors(changed("b", data_offsets=[0, 12]), BODY),
    safetensors({"x": HEADER["w"], "b": HEADER["b"]}, BODY), safetensors({"w": HEADER["w"]}, BODY[:24]),
    safetensors(HEADER | {"more": {"dtype": "F32", "shape": [1], "data_offsets": [36, 40]}}, BODY + b"\0" * 4),
], ids=range(22))
def test_a_hostile_tensor_file_is_refused(tmp_path, content):
    folder = save(tmp_path, 2)
    (folder / MODEL).write_bytes(content)
    reseal(folder)
    assert_refused(folder, LIKE)


def test_a_tensor_file_that_asks_for_more_than_the_settings_is_refused_unread(tmp_path, monkeypatch):
    """A sparse file of a terabyte: neither its sum is taken nor memory for it asked."""
    folder = save(tmp_path, 2)
    huge = {"w": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}
    (folder / MODEL).write_bytes(safetensors(huge))
    os.truncate(folder / MODEL, 2**40 + 1000)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][MODEL]["bytes"] = 2**40 + 1000
    del manifest["sha256"]
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": checkpoint.checksum(manifest)}))
    monkeypatch.setattr(checkpoint, "safe_open", pytest.fail)
    with pytest.raises(DamagedCheckpoint, match="not of the size that the settings ask for"):
        Checkpoint.open(folder).load_tensors(MODEL, LIKE.model)


HOSTILE_JSON = [b"", b"null", b"[]", b"3", b'"x"', b"{", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": ' + b"9" * 5000 + b"}", b"\xff\xfe",
                b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' * 500 + b"1" + b"}" * 500]


@pytest.mark.parametrize("name", [STATE, TOKENIZER, MANIFEST])
@pytest.mark.parametrize("content", HOSTILE_JSON, ids=range(len(HOSTILE_JSON)))
def test_hostile_json_is_refused(tmp_path, name, content):
    folder = save(tmp_path, 2)
    (folder / name).write_bytes(content)
    if name != MANIFEST:
        reseal(folder)
    assert_refused(folder, LIKE)


@pytest.mark.parametrize("key", checkpoint.STATE_TYPES)
@pytest.mark.parametrize("value", ["x", -1, 1e999, 2**70, True, [1], "\ud800", {"a": {"b": {"c": 1}}}, ...], ids=str)
def test_a_state_with_a_value_that_cannot_be_is_refused(tmp_path, key, value):
    if (key in ("scheduled", "replanned") and value is True) or (isinstance(value, dict) and checkpoint.STATE_TYPES[key] is dict):
        pytest.skip("is a value that can be")
    if key in checkpoint.NEW_FIELDS and value is ...:
        pytest.skip("was not there in earlier versions")
    folder = save(tmp_path, 2)
    state = json.loads((folder / STATE).read_text()) | {key: value}
    if value is ...:
        del state[key]
    (folder / STATE).write_text(json.dumps(state))
    reseal(folder)
    assert_refused(folder, LIKE)


@pytest.mark.parametrize("key", checkpoint.RANGES)
def test_a_state_with_a_number_out_of_range_is_refused(tmp_path, key):
    folder = save(tmp_path, 2)
    state = json.loads((folder / STATE).read_text())
    lowest, highest = checkpoint.RANGES[key]
    above = [2**63, 2**64, 10**300, math.inf, math.nan, *([highest + 1, 2.0**60] if highest < 2**63 - 1 else [])]
    for value in (lowest - 1, -0.5, -1e308, -2**63, "1", [2], {"a": 2}, False, *above):
        (folder / STATE).write_text(json.dumps(state | {key: value}))
        reseal(folder)
        assert_refused(folder, LIKE)


def test_a_state_that_holds_more_is_refused(tmp_path):
    folder = save(tmp_path, 2)
    (folder / STATE).write_text(json.dumps(json.loads((folder / STATE).read_text()) | {"more": [{}] * 10}))
    reseal(folder)
    assert_refused(folder, LIKE)


@pytest.mark.parametrize("name", [STATE, MANIFEST, TOKENIZER])
def test_json_that_is_large_is_refused_unread(tmp_path, monkeypatch, name):
    folder = save(tmp_path, 2)
    if name != MANIFEST:
        os.truncate(folder / name, 2**25)
    reseal(folder)
    os.truncate(folder / name, 2**25)
    parse = checkpoint.parse_json
    monkeypatch.setattr(checkpoint, "parse_json", lambda path, content: pytest.fail("was read") if path.name == name else parse(path, content))
    assert_refused(folder, LIKE)


def test_what_cannot_be_read_is_not_written(tmp_path):
    one = snapshot(1)
    for key, value in (("step", 2**63), ("val_loss", math.inf), ("seconds", -1.0)):
        with pytest.raises(AssertionError, match=key):
            checkpoint.save(tmp_path, Snapshot(one.model, one.optimizer, one.tokenizer, one.state | {key: value}))
    checkpoint.save(tmp_path, Snapshot(one.model, one.optimizer, one.tokenizer, one.state | {"max_steps": 2**62, "val_loss": 1e300}))
    assert len(store.list_checkpoints(tmp_path)) == 1


def test_a_model_that_takes_more_memory_than_there_is_is_refused(tmp_path, monkeypatch):
    folder = save(tmp_path, 2)
    monkeypatch.setattr(checkpoint, "available_memory", lambda: 30.0)
    with pytest.raises(ValueError, match=r"takes 36 bytes of memory, 30 bytes are free"):
        Checkpoint.open(folder).load_tensors(MODEL, LIKE.model)


def test_a_file_larger_than_the_settings_allow_is_not_read(tmp_path):
    folder = save(tmp_path, 2)
    Checkpoint.open(folder).verify(most_bytes=10_000)
    with pytest.raises(DamagedCheckpoint, match="larger than any of these settings"):
        Checkpoint.open(folder).verify(most_bytes=100)


def test_a_checkpoint_that_is_pruned_while_it_is_chosen_is_no_damage(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)

    def load(one):
        if one.step == 2:
            shutil.rmtree(one.folder)
        one.verify()
        return one

    assert store.load_checkpoint(tmp_path, "last", load, pytest.fail).step == 1


def test_a_checkpoint_folder_that_is_a_link_is_refused(tmp_path):
    elsewhere = save(tmp_path / "elsewhere", 2)
    (tmp_path / "step_00000002").symlink_to(elsewhere)
    assert_refused(tmp_path / "step_00000002", LIKE)


def test_a_folder_that_is_of_another_step_is_refused(tmp_path):
    assert_refused(save(tmp_path, 2).rename(tmp_path / "step_00000003"), LIKE)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_links_and_what_is_no_file_are_refused(tmp_path, name):
    folder = save(tmp_path, 2)
    elsewhere = tmp_path / "elsewhere"
    shutil.copy(folder / name, elsewhere)
    (folder / name).unlink()
    (folder / name).symlink_to(elsewhere)
    assert_refused(folder, LIKE)
    (folder / name).unlink()
    (folder / name).mkdir()
    assert_refused(folder, LIKE)
    (folder / name).rmdir()
    os.mkfifo(folder / name)  # which would wait for ever for someone to write
    assert_refused(folder, LIKE)


@pytest.mark.parametrize("files", [{}, {"../../x": {}}, {name: {} for name in FILES}, dict.fromkeys(FILES), [], None,
                                   {name: {"bytes": "x", "sha256": 1} for name in FILES}, {**{name: {} for name in FILES}, "/etc/passwd": {}}],
                         ids=range(8))
def test_a_manifest_that_lists_anything_else_is_refused(tmp_path, files):
    folder = save(tmp_path, 2)
    manifest = {"format": checkpoint.FORMAT, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": checkpoint.checksum(manifest)}))
    assert_refused(folder, LIKE)


@pytest.mark.parametrize("own", ["0" * 64, "", None, 3, ...], ids=str)
def test_a_manifest_that_does_not_agree_with_itself_is_refused(tmp_path, own):
    """Though each file is as it says."""
    folder = save(tmp_path, 2)
    manifest = json.loads((folder / MANIFEST).read_text()) | {"sha256": own}
    if own is ...:
        del manifest["sha256"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match="does not match its own checksum"):
        Checkpoint.open(folder)


def test_files_of_two_checkpoints_do_not_mix(tmp_path):
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    for name in FILES:
        kept = (two / name).read_bytes()
        (two / name).write_bytes((one / name).read_bytes())
        if (two / name).read_bytes() != kept:
            assert_refused(two, LIKE)
        (two / name).write_bytes(kept)
    load_all(Checkpoint.open(two), LIKE)


@pytest.mark.parametrize("sealed", [False, True], ids=["as damaged", "sealed again"])
@pytest.mark.slow
def test_mutated_checkpoints_are_refused_or_change_only_what_their_author_may(tmp_path, sealed):
    """Cuts, bit flips in header and body, growth, swaps, absurd numbers and deep nests: 600 at random, in every file.

    With a manifest made to agree, whoever can write weights may change them: then the values of the tensors
    and the words in the JSON are the author's, and all else is refused.
    """
    draw = random.Random(0)
    folder = save(tmp_path, 2)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    for _ in range(600):
        name = draw.choice([*FILES, MANIFEST])
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
            content = bytearray(good[draw.choice([one for one in [*FILES, MANIFEST] if one != name])])
        elif kind in ("number", "nest"):
            inside = [b"9" * draw.randrange(1, 400), b"-1e999", b"NaN", b"true", b"1e400", b"9223372036854775807"]
            depth = draw.choice([5, 1000, 100_000])
            value = draw.choice(inside) if kind == "number" else b"[" * depth + b"]" * depth
            numbers = list(re.finditer(rb"\b\d+(\.\d+)?\b", bytes(content)))
            start, end = draw.choice(numbers).span() if numbers else (place, place + 1)
            content[start:end] = value
        else:
            content[place:place + 8] = bytes(len(content[place:place + 8]))
        (folder / name).write_bytes(content)
        if sealed and name != MANIFEST:
            reseal(folder)
        if bytes(content) != good[name]:
            try:
                found = load_all(Checkpoint.open(folder), LIKE)
                assert sealed and name != MANIFEST
                assert not checkpoint.find_problem(found[3])
                for tensors, like in zip(found[:2], (LIKE.model, LIKE.optimizer), strict=True):
                    assert {key: (t.shape, t.dtype) for key, t in tensors.items()} == {key: (t.shape, t.dtype) for key, t in like.items()}
            except ValueError as error:
                assert re.search(r"step_00000002", str(error)) and "\n" not in str(error)
        for one, kept in good.items():
            (folder / one).write_bytes(kept)


def test_reading_never_unpickles(tmp_path, monkeypatch):
    class Boom:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    folder = save(tmp_path, 2)
    for payload in (pickle.dumps(Boom()), zipped(Boom())):
        (folder / MODEL).write_bytes(payload)
        reseal(folder)
        assert_refused(folder, LIKE)
    assert not (tmp_path / "harm").exists()


def zipped(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()
