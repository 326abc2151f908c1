"""Files of other programs: folders of Hugging Face and checkpoints of nanoGPT, also damaged and hostile ones."""

from __future__ import annotations

import json
import os
import struct
import sys
import types
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sample as sampling
import train as program
from checkpointing import weights_check
from checkpointing.find_weights import find_weights
from checkpointing.initial import shape_of_weights
from checkpointing.weight_files import read_safetensors
from checkpointing.weights_check import check
from conf.schema import compose
from data.bpe import BPETokenizer
from data.hugging_face import to_hugging_face
from data.tokenizer import ByteTokenizer, CharTokenizer
from generation import open_weights
from model import GPT, GPTConfig
from model.formats import config_to
from model.pretrained import weights_to

SMALL = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)
NANOGPT = replace(SMALL, activation="gelu_erf", bias=False)


def random_model(config: GPTConfig) -> GPT:
    torch.manual_seed(0)
    return GPT(config).eval()


def save_folder(folder: Path, config: GPTConfig = SMALL, **changes: object) -> dict[str, torch.Tensor]:
    """A folder of Hugging Face with random weights; returns them under our names."""
    folder.mkdir()
    state = random_model(config).state_dict()
    tensors = {name: tensor.contiguous() for name, tensor in weights_to("gpt2", config, state).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_to("gpt2", config) | changes))
    return state


def save_nanogpt(path: Path, config: GPTConfig = NANOGPT, **changes: object) -> dict[str, torch.Tensor]:
    """A checkpoint as nanoGPT's train.py writes it for a compiled model."""
    state = random_model(config).state_dict()
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in weights_to("nanogpt", config, state).items()}
    arguments = {name: asdict(config)[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")}
    content = {"model": tensors, "model_args": arguments, "iter_num": 5, "best_val_loss": torch.tensor(1.5),
               "optimizer": {"state": {}, "param_groups": []}, "config": {"out_dir": "out"}}
    torch.save(content | changes, path)
    return state


def assert_same(weights, state, config) -> None:
    assert weights.config == config and weights.tensors.keys() == state.keys()
    assert all(torch.equal(weights.tensors[name], state[name]) for name in state)


def refusal(place: Path) -> str:
    """The sentence that refuses weights."""
    with pytest.raises(ValueError) as refused:
        find_weights(str(place), place.parent)
    said = str(refused.value)
    assert "\n" not in said and len(said) < 500 and said.isprintable()
    return said


# Reading


def test_a_folder_of_hugging_face_is_read(tmp_path):
    state = save_folder(tmp_path / "small")
    assert_same(find_weights(str(tmp_path / "small"), tmp_path), state, SMALL)


def test_a_folder_of_several_files_or_a_pickle_is_read(tmp_path):
    state = save_folder(tmp_path / "small")
    whole = tmp_path / "small/model.safetensors"
    tensors = read_safetensors(whole)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    whole.unlink()
    torch.save(tensors, tmp_path / "small/pytorch_model.bin")
    assert_same(find_weights(str(tmp_path / "small"), tmp_path), state, SMALL)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / "small" / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "small/model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "small/pytorch_model.bin").write_bytes(b"not read")
    assert_same(find_weights(str(tmp_path / "small"), tmp_path), state, SMALL)


def test_a_folder_of_several_pickles_is_read(tmp_path):
    state = save_folder(tmp_path / "small")
    whole = tmp_path / "small/model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(whole).items()}
    whole.unlink()
    files = {name: f"part-{number % 2}.bin" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in tensors if files[name] == file}, tmp_path / "small" / file)
    (tmp_path / "small/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert_same(find_weights(str(tmp_path / "small"), tmp_path), state, SMALL)


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt_is_read(tmp_path, bias):
    """By its file or its folder."""
    config = replace(NANOGPT, bias=bias)
    state = save_nanogpt(tmp_path / "ckpt.pt", config)
    assert_same(find_weights(str(tmp_path / "ckpt.pt"), tmp_path), state, config)
    assert_same(find_weights(str(tmp_path), tmp_path), state, config)


def test_rows_that_pad_nanogpts_vocabulary_are_left_out(tmp_path, gpt2_files):
    config = replace(NANOGPT, vocab_size=50304, n_layer=1, n_embd=8)
    state = save_nanogpt(tmp_path / "ckpt.pt", config)
    weights = find_weights(str(tmp_path / "ckpt.pt"), tmp_path)
    assert weights.config.vocab_size == weights.tokenizer.vocab_size == 50257
    assert torch.equal(weights.tensors["wte.weight"], state["wte.weight"][:50257]) and "47 rows" in weights.describe()


# Use


def test_a_run_starts_from_gpt2_weights(tmp_path, gpt2_files, compose_tiny, capsys):
    """Fine-tuned for 2 steps, it samples in GPT-2's tokens; the weights' shape and tokenizer are GPT-2's."""
    config = replace(SMALL, vocab_size=50257)
    save_folder(tmp_path / "small", config, attn_pdrop=0.1)
    words = [f"init_from={tmp_path / 'small'}", "model=nano", "model.n_layer=2", "data.tokenizer=gpt2", "training.max_steps=2"]
    assert program.train(compose_tiny(*words)) == 0
    said = capsys.readouterr().out
    assert "Check of the weights: " in said and "fingerprint" in said
    engine = open_weights(tmp_path / "runs/tiny", precision="fp32", device="cpu")
    assert (engine.model.config.dropout, engine.model.config.block_size, engine.tokenizer.vocab_size) == (0, 16, 50257)


def test_weights_are_compared_once(tmp_path, gpt2_files, monkeypatch):
    """With transformers; again after a difference, for other weights, and for another config.json."""
    save_folder(tmp_path / "small", replace(SMALL, vocab_size=50257))
    weights = find_weights(str(tmp_path / "small"), tmp_path)
    factors = [1.001, 1, 1, 1]
    monkeypatch.setenv("NANOHYDRA_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(weights_check, "is_comparable", lambda weights: True)
    monkeypatch.setattr(weights_check, "logits_of_transformers", lambda weights, ids: weights.model()(ids) * factors.pop(0))
    with pytest.raises(ValueError, match=r"small is not used: the logits of a sentence differ"):
        check(weights, "one")
    said = [check(weights, "one"), check(weights, "one"), check(weights, "two")]
    with (tmp_path / "small/config.json").open("a") as file:
        file.write(" ")
    said.append(check(weights, "two"))
    assert [line.endswith("(compared before)") for line in said] == [False, True, False, False] and not factors


def test_weights_of_gpt2_need_its_tokenizer(tmp_path, gpt2_files, compose_tiny):
    save_folder(tmp_path / "small", replace(SMALL, vocab_size=50257))
    with pytest.raises(ValueError, match=r"init_from=.* has a vocabulary of 50,257 tokens, data.tokenizer=byte one of 257: set data.tokenizer=gpt2"):
        program.train(compose_tiny(f"init_from={tmp_path / 'small'}", "data.tokenizer=byte", "model.n_layer=2"))
    assert not (tmp_path / "runs").exists()


def test_gpt2_weights_are_sampled_without_a_run(tmp_path, gpt2_files, capsys):
    config = replace(SMALL, vocab_size=50257)
    save_folder(tmp_path / "small", config)
    words = [f"init_from={tmp_path / 'small'}", "prompt=Hello", "max_new_tokens=5", "precision=fp32"]
    assert sampling.sample(compose("sample", words)) == 0
    found = capsys.readouterr()
    assert found.out.startswith("Hello") and "Weights: " in found.err


def test_weights_without_a_tokenizer_are_not_sampled(tmp_path):
    save_nanogpt(tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"ckpt.pt has no tokenizer .* 64 tokens: start a run from it"):
        open_weights(tmp_path / "ckpt.pt")


def test_a_folder_of_other_tokens_is_refused(tmp_path, compose_tiny, tiny_runs):
    """Also if they are as many: the folder's tokenizer.json tells."""
    config = replace(SMALL, vocab_size=28)
    save_folder(tmp_path / "small", config)
    content = to_hugging_face(open_weights(tiny_runs / "tiny").tokenizer)
    words = [f"init_from={tmp_path / 'small'}", "model.block_size=16", "training.max_steps=1"]
    (tmp_path / "small/tokenizer.json").write_text(json.dumps(content))
    assert program.train(compose_tiny(*words)) == 0
    other = CharTokenizer("".join(map(chr, range(50, 78))), with_end_of_text=False)
    (tmp_path / "small/tokenizer.json").write_text(json.dumps(to_hugging_face(other)))
    with pytest.raises(ValueError, match="trained with other tokens than the training text has, although both have 28"):
        program.train(compose_tiny(*words, "name=other"))
    assert not (tmp_path / "runs/other").exists()


# Published names


def test_experiments_finetune_as_nanogpt_does(tmp_path):
    settings = compose("config", ["experiment=finetune_shakespeare"])
    assert shape_of_weights(settings) == GPTConfig(n_layer=48, n_head=25, n_embd=1600)
    rates, limits = settings.optim, settings.training
    assert (rates.lr, rates.schedule, rates.warmup_steps, rates.weight_decay, rates.grad_clip) == (3e-5, "constant", 0, 0.1, 1)
    assert (limits.max_steps, limits.batch_size, limits.micro_steps(1024)) == (20, 1, 32)
    assert (settings.data.tokenizer, settings.auto_name) == ("gpt2", "finetune_shakespeare")
    small = compose("config", ["experiment=finetune_gpt2", f"data.path={tmp_path}", "model.block_size=256"])
    assert shape_of_weights(small) == GPTConfig(block_size=256) and small.training.micro_steps(256) == 32


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for huggingface_hub: its cache, the files to download, and the calls."""
    calls = []

    def download(repository, file, local_files_only=False):
        calls.append((repository, file, local_files_only))
        place = tmp_path / ("cached" if local_files_only else "remote") / repository / file
        if not place.exists():
            raise ConnectionError("no network")
        return str(place)

    monkeypatch.setattr("socket.getaddrinfo", lambda *words: [])
    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize("place", ["cached/openai-community", "cached", "remote/openai-community"])
def test_published_weights_come_from_the_hub(hub, tmp_path, place):
    (tmp_path / place).mkdir(parents=True)
    state = save_folder(tmp_path / place / "gpt2")
    weights = find_weights("gpt2", tmp_path)
    assert_same(weights, state, SMALL)
    assert weights.place == tmp_path / place / "gpt2"
    assert any(not is_cached for *_, is_cached in hub) == (place == "remote/openai-community")


def test_nothing_is_downloaded_without_a_network(hub, tmp_path, monkeypatch):
    def fail(*words):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", fail)
    monkeypatch.setattr("checkpointing.pretrained.getproxies", dict)
    assert "could not be downloaded" in refusal(Path("gpt2"))
    assert all(is_cached for *_, is_cached in hub)


def test_a_folder_of_a_published_name_is_used(hub, tmp_path):
    state = save_folder(tmp_path / "gpt2-xl")
    assert_same(find_weights("gpt2-xl", tmp_path), state, SMALL)
    assert not hub


@pytest.mark.parametrize("installed", [True, False])
def test_without_a_network_the_needed_files_are_named(hub, tmp_path, monkeypatch, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = refusal(Path("gpt2-medium"))
    assert "put config.json and model.safetensors from https://huggingface.co/openai-community/gpt2-medium into a folder" in said
    assert ("pip install huggingface_hub" in said) == (not installed)


# Hostile and damaged files


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_nanogpt(tmp_path / "ckpt.pt", optimizer=Evil())
    assert "could run code" in refusal(tmp_path / "ckpt.pt")
    save_folder(tmp_path / "small")
    (tmp_path / "small/model.safetensors").unlink()
    torch.save({"wte.weight": Evil()}, tmp_path / "small/pytorch_model.bin")
    assert "could run code" in refusal(tmp_path / "small")
    assert not (tmp_path / "hacked").exists()


def lie(length: int, header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length < 0 else length) + text


@pytest.mark.parametrize("content", [
    b"", b"\xff" * 4, b"\xff" * 100, lie(2**40, b"{}"), lie(-1, b"[" * 10_000), lie(-1, b"{}"),
    lie(-1, {"transformer.wte.weight": {"dtype": "F32", "shape": [64, 32], "data_offsets": [0, 8192]}}),
    lie(-1, {"transformer.wte.weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}) + b"1234",
    lie(-1, {"transformer.wte.weight": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}) + b"1234",
    lie(-1, {"transformer.wte.weight": {"dtype": "F4\n", "shape": [1], "data_offsets": [0, 4]}}) + b"1234",
])
def test_a_false_header_is_refused(tmp_path, content):
    save_folder(tmp_path / "small")
    (tmp_path / "small/model.safetensors").write_bytes(content)
    assert "small" in refusal(tmp_path / "small")


@pytest.mark.parametrize(("changes", "said"), [
    ({"model_type": "bert"}, "config.json has model_type=bert, which is not supported: supported are gpt2, nanochat"),
    ({"model_type": "evil\x1b[2J"}, "model_type=evil\\x1b[2J"),
    ({"model_type": []}, "model_type=[]"),
    ({"n_layer": 3}, "lack transformer.h.2."),
    ({"n_layer": 1}, "h.1."),
    ({"n_embd": 64}, "of the shape"),
    ({"n_layer": 10**9}, "n_layer"),
    ({"n_head": 0}, "n_head"),
    ({"n_positions": 2**17, "n_embd": 2**16, "vocab_size": 2**24}, "of memory"),
])
def test_another_configuration_is_refused(tmp_path, changes, said):
    save_folder(tmp_path / "small", **changes)
    assert said in refusal(tmp_path / "small")


@pytest.mark.parametrize(("file", "content"), [
    ("config.json", "[]"), ("config.json", "{"), ("config.json", "[" * 100_000), ("config.json", None),
    ("model.safetensors", None),
    ("model.safetensors.index.json", "{}"), ("model.safetensors.index.json", '{"weight_map": {"a": "../a.safetensors"}}'),
    ("model.safetensors.index.json", '{"weight_map": {"a": "missing.safetensors"}}'),
    ("model.safetensors.index.json", '{"weight_map": {"a": "a\\u0000.safetensors"}}'),
    ("pytorch_model.bin", "not a pickle"), ("pytorch_model.bin", ""),
])
def test_damaged_and_missing_files_are_named(tmp_path, file, content):
    save_folder(tmp_path / "small")
    if file != "config.json":
        (tmp_path / "small/model.safetensors").unlink()
    path = tmp_path / "small" / file
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(content)
    assert "small" in refusal(tmp_path / "small")


@pytest.mark.parametrize("content", [{}, [1], {"model": {}, "model_args": {}}, {"model": 1, "model_args": 2},
                                     {"model": {"a": 1}, "model_args": asdict(NANOGPT)},
                                     {"model": {"a": torch.ones(2, 2).to_sparse()}, "model_args": asdict(NANOGPT)},
                                     {"model": {1: torch.ones(2)}, "model_args": asdict(NANOGPT) | {"bias": 7}}])
def test_another_torch_file_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "ckpt.pt")
    assert "ckpt.pt" in refusal(tmp_path / "ckpt.pt")


def test_a_compressed_or_nested_pickle_is_refused(tmp_path):
    """Both would fill the memory, unpacked or printed."""
    save_nanogpt(tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "ckpt.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    assert "is not a complete file of torch.save" in refusal(tmp_path / "ckpt.pt")
    nested = ()
    for _ in range(60):
        nested = (nested, nested)
    save_nanogpt(tmp_path / "ckpt.pt", model_args=asdict(NANOGPT) | {"n_layer": nested})
    assert "model_args lacks n_layer" in refusal(tmp_path / "ckpt.pt")
    save_nanogpt(tmp_path / "ckpt.pt", model={"a": nested})
    assert "ckpt.pt" in refusal(tmp_path / "ckpt.pt")


def test_a_fifo_is_refused(tmp_path):
    save_folder(tmp_path / "small")
    (tmp_path / "small/model.safetensors").unlink()
    os.mkfifo(tmp_path / "small/model.safetensors")
    assert "model.safetensors is not a regular file" in refusal(tmp_path / "small")
    (tmp_path / "small/config.json").unlink()
    (tmp_path / "small/config.json").symlink_to("/proc/version")
    assert sys.platform != "linux" or "config.json is not a regular file" in refusal(tmp_path / "small")


@pytest.mark.slow
def test_the_tokenizer_of_a_folder_must_belong_to_it(tmp_path, gpt2_files):
    save_folder(tmp_path / "small", replace(SMALL, vocab_size=50257, n_embd=8, n_layer=1))
    gpt2 = to_hugging_face(BPETokenizer.published("gpt2"))
    vocab = gpt2["model"]["vocab"]
    for name, content in [("vocab.json", vocab), ("tokenizer.json", gpt2)]:
        (tmp_path / "small" / name).write_text(json.dumps(content))
        assert find_weights(str(tmp_path / "small"), tmp_path).tokenizer.vocab_size == 50257
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "small/vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "small/tokenizer.json").write_text(json.dumps(gpt2))
    tokenizer = find_weights(str(tmp_path / "small"), tmp_path).tokenizer
    assert tokenizer.encode("a") == BPETokenizer.published("gpt2").encode("b")
    (tmp_path / "small/tokenizer.json").unlink()
    assert "vocab.json does not have the tokens of GPT-2, and there is no tokenizer.json" in refusal(tmp_path / "small")
    smaller = to_hugging_face(ByteTokenizer())
    (tmp_path / "small/tokenizer.json").write_text(json.dumps(smaller))
    assert "tokenizer.json has 257 tokens, the weights beside it have 50,257" in refusal(tmp_path / "small")


def test_a_folder_without_weights_is_refused(tmp_path):
    assert "is a folder without weights" in refusal(tmp_path)
    save_folder(tmp_path / "small")
    assert "is one file of a model: name a run, a folder" in refusal(tmp_path / "small/model.safetensors")


@pytest.mark.parametrize(("content", "said"), [
    ("Call me Ishmaël.".encode(), "book.txt is a text file: name a run, a folder with config.json and model.safetensors, or a checkpoint of nanoGPT"),
    (b"", "book.txt is an empty file: name a run"),
    (b"\x93NUMPY\0", "book.txt is not a file of torch.save: name a run"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "book.txt is a pointer of Git LFS"),
])
def test_a_file_that_is_no_weights_is_named(tmp_path, content, said):
    (tmp_path / "book.txt").write_bytes(content)
    refused = refusal(tmp_path / "book.txt")
    assert said in refused and ("data=text data.path=" in refused) == ("text file" in said)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/ckpt.pt").write_bytes(content)
    assert said.partition(":")[0].replace("book.txt", "out/ckpt.pt") in refusal(tmp_path / "out")
