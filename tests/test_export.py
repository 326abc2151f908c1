"""Exports: the folder for transformers, and the check that it computes the same as ours."""

import json
import re
import sys
import urllib.request
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from conf.sampling import SamplingConfig
from exporting import check, gguf_file, hugging_face
from exporting.card import plain
from generation import open_run
from model.formats import CLASSES
from model.pretrained import weights_from
from scripts import export
from scripts.export import ExportSettings

BPE = ["data.tokenizer=bpe", "data.vocab_size=300"]
GPT2 = ["model=nano"]
NGRAMS = ["model=modern-nano"]
NANOCHAT = [*NGRAMS, "model.ngrams=1"]
QWEN3 = [*NANOCHAT, "model.embedding_norm=false"]
LLAMA = ["model=llama-style", "model.block_size=32", "model.n_layer=2", "model.n_embd=32"]


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    found = pytest.importorskip("transformers", "5", reason="needs transformers 5: pip install transformers")
    with pytest.MonkeyPatch.context() as patch:
        # Where trust_remote_code=True keeps copies of modules.
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield found


@pytest.fixture
def without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.fixture
def exported(compose_tiny, tmp_path, capsys):
    """Train 20 steps, export, and return the folder and the run."""
    def make(*overrides, **settings):
        chosen = compose_tiny("training.max_steps=20", "training.eval_every=20", "training.checkpoint_every=20", *overrides)
        train.train(chosen)
        out = tmp_path / ("out.gguf" if settings.get("format") == "gguf" else "out")
        export.main(ExportSettings(run="tiny", runs_dir=chosen.runs_dir, out=str(out), **settings))
        return out, open_run("tiny", runs_dir=chosen.runs_dir, device="cpu", precision="fp32")

    return make


@pytest.mark.parametrize(("overrides", "class_name"), [
    ([*GPT2, *BPE], "GPT2LMHeadModel"),
    ([*NANOCHAT, "data.tokenizer=char"], "NanoChatForCausalLM"),
    ([*QWEN3, "data.tokenizer=byte"], "Qwen3ForCausalLM"),
    ([*LLAMA, *BPE], "LlamaForCausalLM"),
    ([*NGRAMS, *BPE], "NanohydraForCausalLM"),
    ([*GPT2, "model.ngrams=3", "data.tokenizer=char"], "NanohydraForCausalLM"),
])
def test_transformers_writes_the_same_text(exported, transformers, overrides, class_name):
    out, run = exported(*overrides, remote_code=class_name.startswith("Nanohydra"))
    trust = class_name.startswith("Nanohydra")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=trust)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=trust)
    assert type(model).__name__ == class_name
    text = "The old dog sees"
    ids = tokenizer(text, return_tensors="pt")
    assert ids["input_ids"][0].tolist() == run.encode(text)
    assert sorted(ids) == ["attention_mask", "input_ids"]
    assert tokenizer.eos_token_id == run.tokenizer.end_of_text
    if "data.tokenizer=char" not in overrides:
        # In a text, the token between documents is plain text.
        assert tokenizer("a<|endoftext|>b")["input_ids"] == run.encode("a<|endoftext|>b")
    with torch.no_grad():
        logits = run.logits(text)
        assert (model(**ids).logits[0] - logits).abs().max() <= 1e-5 * logits.abs().max()
    made = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].size(1) :]
    (ours,) = run.complete([(text, 0)], SamplingConfig(12, temperature=0))
    assert made.tolist() == ours.tokens
    assert tokenizer.decode(made, skip_special_tokens=True) == ours.text


def test_ngrams_ignore_padding_and_follow_beams(exported, transformers):
    out, run = exported("model=modern-nano", "model.ngrams=4", remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    rows = [run.encode("The old dog"), run.encode("No")]
    longest = len(rows[0])
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    rules = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **rules)[:, longest:]
    for row, made in zip(rows, together, strict=True):
        (ours,) = run.complete([(run.decode(row), 0)], SamplingConfig(8, temperature=0))
        assert made.tolist() == ours.tokens
    # A cache is faster, but must not change what beams find.
    found = [model.generate(ids[:1], num_beams=3, use_cache=cache, **rules).tolist() for cache in (True, False)]
    assert found[0] == found[1]
    cache = model(ids[:1], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="need previous_ids with a cache"):
        model(ids[:1, -1:], past_key_values=cache)


def test_a_folder_without_its_class_is_not_loaded(exported, transformers):
    """Without the class, transformers must not load it as another, which would leave out the n-grams."""
    out, _ = exported(*NGRAMS, remote_code=True)
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=False)


def test_without_transformers_the_weights_are_read_back(exported, without_transformers, capsys):
    out, run = exported(*QWEN3)
    assert "in this model with the written weights (transformers is not installed) is " in capsys.readouterr().out
    config = run.model.config
    state = weights_from("qwen3", config, load_file(out / "model.safetensors"))
    assert all(torch.equal(state[name], tensor) for name, tensor in run.model.state_dict().items())
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert json.loads((out / "config.json").read_text())["architectures"] == [CLASSES["qwen3"]]
    card = (out / "README.md").read_text()
    assert "| steps | 20 of 20 |" in card and "| text | text: book.txt |" in card
    assert str(out.parent) not in card


@pytest.mark.parametrize("name", ["h.1.mlp.c_proj.weight", "wte.weight"])
def test_an_export_that_differs_leaves_nothing(exported, without_transformers, monkeypatch, tmp_path, name):
    write = hugging_face.write_folder

    def damage(folder, weights, layout):
        other = weights.tensors | {name: weights.tensors[name] * 1.001}
        write(folder, replace(weights, tensors=other), layout)

    monkeypatch.setattr(hugging_face, "write_folder", damage)
    with pytest.raises(ValueError, match=r"logits differ by .* of the largest, more than 1e-05. Nothing was written."):
        exported(*GPT2)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_bad_exports_are_refused_in_one_sentence(exported, without_transformers, tmp_path):
    with pytest.raises(ValueError, match=re.escape("No class of transformers has n-gram embeddings (model.ngrams=2): pass remote_code")):
        exported(*NGRAMS)
    settings = ExportSettings(run="tiny", runs_dir=str(tmp_path / "runs"), out=str(tmp_path / "out"))
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"out exists: choose another name, or remove it."):
        export.main(settings)
    with pytest.raises(ValueError, match="none"):
        export.main(replace(settings, run="none", out=str(tmp_path / "other")))
    assert list(ExportSettings().problems()) == ["out is missing: name the folder or file to write, as in out=exported."]
    assert not (tmp_path / "other").exists()


def test_a_model_without_a_class_is_refused(exported, without_transformers):
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel, the nearest, does not have model.n_kv_head=1"):
        exported(*GPT2, "model.n_kv_head=1")


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, mapped files included."""

    alive, peak = {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves((arguments, result)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return result


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_an_export_holds_its_weights_once(exported, format, tmp_path):
    if format == "gguf":
        pytest.importorskip("gguf", reason="needs gguf: pip install gguf")
    _, run = exported(*GPT2, *BPE, "model.n_embd=128", "training.max_steps=1")
    nbytes = sum(weights.nbytes for weights in run.model.parameters())
    run = None
    with LiveBytes() as live:
        export.main(ExportSettings(run="tiny", runs_dir=str(tmp_path / "runs"), out=str(tmp_path / "other.gguf"), format=format))
    assert 1 <= live.peak / nbytes < 1.5


# GGUF


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf", reason="needs gguf: pip install gguf")


@pytest.mark.parametrize(("overrides", "architecture"), [(GPT2, "gpt2"), (LLAMA, "llama"), ([*LLAMA, "model.qk_norm=true"], "qwen3")])
def test_a_gguf_file_has_the_models_sizes(exported, gguf, capsys, overrides, architecture):
    out, run = exported(*overrides, *BPE, format="gguf")
    assert f"for llama.cpp (architecture {architecture})." in capsys.readouterr().out
    reader, config = gguf.GGUFReader(out), run.model.config
    found = {name: field.contents() for name, field in reader.fields.items()}
    assert found["general.architecture"] == architecture and found["general.name"] == "tiny"
    assert found[f"{architecture}.context_length"] == config.block_size
    assert found[f"{architecture}.feed_forward_length"] == config.mlp_width
    assert found.get(f"{architecture}.attention.head_count_kv", config.n_head) == config.kv_heads
    assert len(found["tokenizer.ggml.tokens"]) == config.vocab_size == 300
    assert found["tokenizer.ggml.token_type"][299] == gguf.TokenType.CONTROL
    assert not [path for path in out.parent.iterdir() if path.name not in ("runs", "out.gguf")]


@pytest.mark.parametrize("overrides", [GPT2, LLAMA, [*LLAMA, "model.qk_norm=true"]], ids=["gpt2", "llama", "qwen3"])
def test_llama_cpp_writes_the_same_text(exported, gguf, overrides):
    llama = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    out, run = exported(*overrides, *BPE, format="gguf")
    settings = llama.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(out), 32, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.warmup = settings.fit_params = False
    settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    server = llama.Server(settings)

    text = "The old dog's shadow sees 12345 tokens.\n\n  Straße, 你好 <|endoftext|>"
    request = urllib.request.Request(f"{server.listening_address}/tokenize", json.dumps({"content": text, "parse_special": False}).encode())
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["tokens"] == run.encode(text)
    prompt = run.encode("The old dog")
    request = {"prompt": prompt, "n_predict": 12, "temperature": 0, "n_probs": 1}
    found = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
    (ours,) = run.complete([("The old dog", 0)], SamplingConfig(12, temperature=0), logprobs=True)
    assert [token["id"] for token in found] == ours.tokens
    assert [token["logprob"] for token in found] == pytest.approx(ours.logprobs, abs=1e-3)


def test_a_damaged_gguf_file_is_not_kept(exported, gguf, monkeypatch, tmp_path):
    read = gguf_file.read_back
    monkeypatch.setattr(gguf_file, "read_back", lambda *arguments: read(*arguments) * 1.001)
    with pytest.raises(ValueError, match=r"Nothing was written"):
        exported(*GPT2, *BPE, format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    # NumPy's error of a full disk has only numbers.
    monkeypatch.setattr(gguf_file, "write_file", lambda *arguments: (_ for _ in ()).throw(OSError("9600 requested and 8672 written")))
    with pytest.raises(OSError, match=r"out\.gguf could not be written .*is the disk full"):
        export.main(ExportSettings(run="tiny", runs_dir=str(tmp_path / "runs"), out=str(tmp_path / "out.gguf"), format="gguf"))


@pytest.mark.parametrize(("overrides", "message"), [
    ([*NGRAMS, *BPE], "GGUF files have no n-gram embeddings (model.ngrams=2): train with model=llama-style or a GPT-2 preset."),
    ([*GPT2, "model.activation=gelu_erf", *BPE], "gpt2, the nearest, does not have model.activation=gelu_erf (only gelu)"),
    ([*GPT2, "data.tokenizer=char"], "GGUF files have no tokenizer of characters or bytes"),
    ([*GPT2, "data.tokenizer=byte"], "GGUF files have no tokenizer of characters or bytes"),
])
def test_what_gguf_files_lack_is_refused(exported, monkeypatch, tmp_path, overrides, message):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=re.escape(message)):
        exported(*overrides, format="gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_without_gguf_it_says_what_to_install(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"^format=gguf needs the package gguf: pip install gguf.$"):
        exported(*GPT2, *BPE, format="gguf")
    settings = ExportSettings(out="model", format="gguf", remote_code=True)
    assert list(settings.problems()) == ["out=model must end in .gguf.", "remote_code=true is only for format=hf: leave it out."]


def test_logits_that_are_not_finite_are_no_export():
    good = torch.ones(1, 2, 3)
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        check.compare(good * torch.nan, good, "here", 2)
    with pytest.raises(ValueError, match="more than 1e-05"):
        check.compare(good, good * torch.nan, "here", 2)
    assert check.compare(good, good, "here", 5) == "The largest difference of a logit in here is 0.0e+00 of the largest logit, at 2 of 5 positions of a text."


def test_names_of_runs_are_plain_text_in_a_card():
    assert plain("a|b\n`<x>`\x1b[2J") == r"a\|b\\n\`\<x\>\`\\x1b\[2J"
