"""data.tokenizer= as a path: a tokenizer.json of Hugging Face, a run, a folder of prepared tokens."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from test_tokenizer import TEXT, train_bpe

from conf.schema import ConfigError, compose
from data.config import DataConfig
from data.hugging_face import to_hugging_face
from data.prepare import load_tokenizer, prepare
from data.shards import read_meta
from data.tokenizer_json import fingerprint, open_tokenizer
from scripts.plan import describe_data
from scripts.unused_tokens import COMPLETE
from train import train


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 4)
    return str(tmp_path / "text.txt")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "their.json"
    path.write_text(json.dumps(to_hugging_face(train_bpe(300))))
    return path


def config(text, tokenizer):
    return compose("config", ["data=text", f"data.path={text}", f"data.tokenizer={tokenizer}"]).data


def test_tokens_are_those_of_the_file(text, file, fresh_data):
    folder = prepare(config(text, file))
    tokenizer = load_tokenizer(folder)
    assert fingerprint(tokenizer) == fingerprint(train_bpe(300)) and re.fullmatch(COMPLETE, folder.name)
    meta = read_meta(folder)
    ids = np.concatenate([np.load(folder / shard["file"]) for split in ("train", "val") for shard in meta["parts"][0][split]["shards"]])
    assert tokenizer.decode_bytes(ids.tolist()).decode() == TEXT * 4
    assert describe_data(config(text, file))[0] == 300


def test_a_moved_file_gives_the_same_tokens_and_a_changed_one_others(text, file, fresh_data):
    first = prepare(config(text, file))
    shutil.copy(file, moved := file.with_name("moved.json"))
    assert prepare(config(text, moved)) == first
    file.write_text(json.dumps(to_hugging_face(train_bpe(299))))
    assert prepare(config(text, file)) != first


def test_bins_can_be_of_a_tokenizer_file(tmp_path, file, fresh_data):
    for split in ("train", "val"):
        np.array(train_bpe(300).encode(TEXT), dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    folder = prepare(DataConfig("bin", str(tmp_path), str(file)))
    assert load_tokenizer(folder).vocab_size == 300 and re.fullmatch(COMPLETE, folder.name)


def test_a_run_lends_its_tokenizer(compose_tiny, text, tmp_path):
    train(compose_tiny("data.tokenizer=bpe", "data.vocab_size=290", "training.max_steps=1"))
    run = tmp_path / "runs" / "tiny"
    settings = compose_tiny(f"data.tokenizer={run}", f"data.path={text}", "name=", "model.block_size=16", "training.max_steps=1")
    train(settings)
    [other] = [folder for folder in run.parent.iterdir() if folder != run]
    tokenizer = open_tokenizer(str(other))
    assert tokenizer.vocab_size == 290 and fingerprint(tokenizer) == fingerprint(open_tokenizer(str(run)))
    # What a run was trained with is in its own folder.
    shutil.rmtree(run)
    assert open_tokenizer(str(other)).encode("best") == tokenizer.encode("best")


def test_a_path_without_a_tokenizer_is_an_error(tmp_path, text, fresh_data):
    with pytest.raises(ConfigError, match=r"data.tokenizer=gpt3 is not one of char, byte, gpt2, .*no such file or folder"):
        config(text, "gpt3")
    with pytest.raises(ValueError, match=r"data.tokenizer=.* has no tokenizer.json: name such a file"):
        prepare(config(text, tmp_path))
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x.json is not a tokenizer: give a tokenizer.json"):
        prepare(config(text, tmp_path / "x.json"))
