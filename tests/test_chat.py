"""Conversations: from JSON lines to batches whose only targets are the answers."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from terminal_input import type_into

import sample
from conf.sampling import SamplingConfig
from conf.schema import ConfigError, compose
from data.bpe import BPETokenizer
from data.chat import JINJA, MARKERS, Message, markers_of, message_ids, with_markers
from data.config import DataConfig
from data.examples import MASKED, Examples
from data.loader import Loader, Validation
from data.prepare import load_tokenizer, prepare
from data.shards import Tokens, open_parts, read_meta
from data.tokenizer import ByteTokenizer, ExtendedTokenizer
from generation import Engine, chat, open_run
from generation.chat import Conversation, next_answer
from model import GPT, GPTConfig
from model import loss as model_loss
from train import train
from training.device import Device
from training.interrupt import Interrupt
from training.step import BatchLoss, accumulate_gradients, evaluate

ROOT = Path(__file__).parent.parent


@pytest.fixture
def chats(tmp_path, fresh_data):
    """Prepare conversations: `chats(records, **settings)` gives the folder. All are for training, one for validation."""
    def make(records, name="chats.jsonl", **settings):
        (tmp_path / name).write_text("".join(f"{json.dumps(record)}\n" for record in records))
        (tmp_path / "val.jsonl").write_text(json.dumps({"prompt": "Validate?", "completion": "Valid."}))
        own = {"path": str(tmp_path / name), "val_path": str(tmp_path / "val.jsonl"), "tokenizer": "byte"} | settings
        return prepare(DataConfig("chat", **own))
    return make


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def loader_of(folder, block_size, batch_size=1, **more):
    return Loader(open_parts(folder, "train"), block_size, batch_size, markers=markers_of(load_tokenizer(folder)), **more)


def shown(tokenizer, ids):
    return tokenizer.decode_bytes(ids).decode().replace("<|endoftext|>", "~")


def an_epoch(folder, block_size):
    """The sequences of an epoch: the text of the inputs, and that of the targets with _ where masked; sorted."""
    tokenizer, loader = load_tokenizer(folder), loader_of(folder, block_size)
    found = []
    for step in range(loader.parts[0].count):
        [inputs], [targets] = loader.batch(step)
        learned = "".join("_" if token == MASKED else shown(tokenizer, [token]) for token in targets.tolist())
        found.append((shown(tokenizer, inputs.tolist()), learned))
    return sorted(found)


def test_only_answers_and_their_ends_are_targets(chats):
    [(text, learned)] = an_epoch(chats([{"messages": [
        {"role": "system", "content": "S"}, {"role": "user", "content": "Hi <|end|>"}, {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "?"}, {"role": "assistant", "content": "<|user|>"}]}]), 40)
    # The markers in a text are plain text: nine bytes, and not one token.
    assert text == "~<|system|>S<|end|><|user|>Hi <|end|><|end|><|assistant|>Yo<|end|><|user|>?<|end|><|assistant|><|user|><|end|>" + 7 * "~"
    assert learned == "_" * 16 + "Yo<|end|>" + "_" * 4 + "<|user|><|end|>" + "_" * 8


def test_a_message_with_markers_is_no_duplicate_of_two(chats):
    folder = chats([pair("a", "1"), pair("a<|end|><|assistant|>1<|end|><|user|>b", "2"),
                    {"messages": [*pair_messages("a", "1"), *pair_messages("b", "2")]}, pair("a", "1")])
    assert read_meta(folder)["splits"]["train"]["documents"] == 3


def pair_messages(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_prompt_and_completion_are_a_conversation(chats):
    one = chats([pair("Hi", "Yo")])
    other = chats([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}], name="other.jsonl")
    assert read_meta(one)["fingerprint"] == read_meta(other)["fingerprint"]


def test_consecutive_conversations_share_a_sequence_while_they_fit(chats):
    folder = chats([pair("a", "1"), pair("b", "2"), pair("c", "3"), pair("d", "4444")])
    # Each of the first three has 7 tokens, with the end of text before it.
    assert [text for text, _ in an_epoch(folder, 20)] == [
        "~<|user|>a<|end|><|assistant|>1<|end|>~<|user|>b<|end|><|assistant|>2<|end|>~<|user|>c<|end|><|assistant|>3",
        "~<|user|>d<|end|><|assistant|>4444<|end|>" + "~" * 10]
    assert [text.count("<|user|>") for text, _ in an_epoch(folder, 19)] == [2, 2]
    assert len(an_epoch(folder, 6)) == 4


def test_a_long_answer_is_cut_and_an_unreached_one_left_out(chats):
    folder = chats([pair("a", "1"), pair("b", "2" * 2000), pair("c" * 50, "3"), pair("d", "4")])
    assert [learned.strip("_") for _, learned in an_epoch(folder, 16)] == ["1<|end|>", "2" * 12, "4<|end|>"]
    assert loader_of(folder, 16).notes().startswith("4 conversations in 3 sequences, ")
    assert loader_of(folder, 16).notes().endswith("; 2 cut at 16 tokens, 1 of them left out, as no answer begins before that")
    [(_, learned)] = [row for row in an_epoch(folder, 2100) if "2222" in row[1]]
    assert learned.count("2") == 2000 and learned.count("<|end|>") == 4  # all of them in one sequence


def test_no_answer_within_the_context_is_an_error(chats):
    folder = chats([pair("a" * 50, "1")])
    with pytest.raises(ValueError, match="training split has no conversation with an answer within a context of 16 tokens: use a larger"):
        loader_of(folder, 16)


@pytest.mark.parametrize("block_size", [6, 9, 16, 33, 64])
def test_the_numbers_of_targets_are_those_of_the_batches(chats, block_size):
    draw = np.random.default_rng(0)
    records = [pair("q" * int(draw.integers(1, 12)), "a" * int(draw.integers(1, 40))) for _ in range(40)]
    loader = loader_of(chats(records), block_size, 3, micro_steps=2, world_size=2)
    for step in range(4):
        counted = [(loader.batch(step, micro_step, rank)[1] != MASKED).sum().item() for rank in range(2) for micro_step in range(2)]
        assert loader.n_targets(step) == counted and min(counted) >= 3


def test_an_epoch_has_each_answer_once_in_any_order(chats):
    folder = chats([pair(f"q{number}", f"answer {number}") for number in range(50)])
    loader = loader_of(folder, 32, seed=7)
    count = loader.parts[0].count
    epochs = [[loader.batch(step)[1].tolist() for step in range(start, start + count)] for start in (0, count)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    answers = [token for [row] in epochs[0] for token in row if token != MASKED]
    assert sum(token == markers_of(load_tokenizer(folder)).end for token in answers) == 50


# Records


@pytest.mark.parametrize(("record", "problem"), [
    ({"text": "x"}, r"line 2 has neither messages nor prompt and completion \(its fields: text\)"),
    ("x", r"line 2 is not a record with fields"),
    ({"messages": "x"}, r"line 2: messages is not a list"),
    ({"messages": []}, r"line 2 has no message of the assistant"),
    ({"messages": [{"role": "user", "content": "x"}]}, r"line 2 has no message of the assistant"),
    ({"messages": ["x"]}, r"line 2, message 1 has no role and content \(it is text\)"),
    ({"messages": [{"role": "tool", "content": "x"}]}, r"line 2, message 1 has the role 'tool', which is none of system, user, assistant"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"line 2, message 1 has no text in its content \(it is a list\)"),
    (pair("x", None), r"line 2, message 2 has no text in its content \(it is null\)"),
    (pair("x", " \n"), r"line 2 has an empty answer"),
    ({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, r"line 2, message 1 has weight 0, which is not supported: data=chat learns"),
    ({"messages": [{"role": "assistant", "content": "x", "train": False}]}, r"line 2, message 1 has train false, .* remove train to learn this one"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}]}, r"line 2, message 1 has tool_calls \[\{\"id\": 1\}\], which"),
    (pair("x", "y") | {"messages": []}, r"line 2 has both messages and prompt with completion: leave one of them out"),
])
def test_a_bad_record_is_refused_or_skipped(chats, record, problem):
    records = [pair("a", "1"), record, pair("b", "2")]
    with pytest.raises(ValueError, match=rf"chats.jsonl, {problem}.*(:|, or) set data.on_bad_record=skip"):
        chats(records)
    folder = chats(records, on_bad_record="skip")
    assert read_meta(folder)["splits"]["train"]["documents"] == 2
    assert "1 record without text skipped" in read_meta(folder)["parts"][0]["read"]


def test_other_files_of_a_folder_are_skipped(chats, tmp_path, fresh_data):
    (tmp_path / "README.md").write_text("Read me")
    folder = chats([pair("a", "1")], path=str(tmp_path))
    # Of the two conversations in the folder, one is also that of the validation split.
    assert read_meta(folder)["splits"]["train"]["documents"] == 1
    with pytest.raises(ValueError, match=r"README.md has no .jsonl, .jsonlines, .ndjson, .json files, which data=chat reads"):
        chats([pair("a", "1")], path=str(tmp_path / "README.md"))


def test_settings_that_do_not_fit_conversations_are_refused():
    with pytest.raises(ConfigError, match=r"data.path is missing: name a .jsonl file of conversations"):
        compose("config", ["data=chat"])
    with pytest.raises(ConfigError, match=r"chat has conversations, and a mixture is made of text"):
        compose("config", ["data=mix", "data.mix=chat:1 pydocs:1"])


# Splits and tokenizers


def test_whole_conversations_are_held_out(chats, tmp_path):
    records = [pair(f"question {number}" * 200, f"answer {number}") for number in range(30)]
    folder = chats(records, val_path="", val_fraction=0.2)
    tokenizer = load_tokenizer(folder)
    texts = {split: shown(tokenizer, tokens.read(np.arange(len(tokens))).tolist()) for split in ("train", "val") for tokens in open_parts(folder, split)}
    documents = {split: text.split("~")[:-1] for split, text in texts.items()}
    assert len(documents["train"]) + len(documents["val"]) == 30 and 2 <= len(documents["val"]) <= 12
    assert all(one.startswith("<|user|>") and one.endswith("<|end|>") for many in documents.values() for one in many)


def test_of_two_conversations_one_is_held_out(chats):
    folder = chats([pair("a", "1"), pair("b", "2")], val_path="")
    assert [read_meta(folder)["splits"][split]["documents"] for split in ("train", "val")] == [1, 1]


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
def test_markers_are_new_tokens_after_the_last_id(chats, tokenizer):
    folder = chats([pair("aab", "12")] if tokenizer == "char" else [pair("la la la " * 30, "le le le " * 30)],
                   tokenizer=tokenizer, vocab_size=259)
    made = load_tokenizer(folder)
    assert isinstance(made, ExtendedTokenizer) and made.vocab_size - len(MARKERS) == made.base.vocab_size
    assert [made.special[word] for word in MARKERS] == list(range(made.base.vocab_size, made.vocab_size))


def test_gpt2_gets_four_ids_after_its_own(gpt2_files):
    made = with_markers(BPETokenizer.published("gpt2"))
    assert made.vocab_size == 50261 and made.special["<|system|>"] == 50257 and made.end_of_text == 50256
    assert with_markers(made) is made


def test_a_tokenizers_own_markers_are_used():
    ranks = ByteTokenizer().vocab_size
    special = {"<|endoftext|>": ranks, "<|user|>": ranks + 1, "<|end|>": ranks + 2}
    own = BPETokenizer.from_ranks([bytes((value,)) for value in range(256)], special=special)
    made = with_markers(own)
    assert made.special["<|user|>"] == ranks + 1 and made.added == ("<|system|>", "<|assistant|>")
    found = BPETokenizer.from_ranks([bytes((value,)) for value in range(256)], special=special, in_text=["<|end|>"])
    with pytest.raises(ValueError, match="finds the markers of data=chat inside a text"):
        markers_of(with_markers(found))
    with pytest.raises(ValueError, match=r"has no <\|system\|>: the model was not trained on conversations"):
        markers_of(ByteTokenizer())


def test_the_template_of_hugging_face_is_the_same():
    tokenizer = with_markers(ByteTokenizer())
    messages = [Message("system", "S"), Message("user", "Hi"), Message("assistant", "Yo")]
    ids = [token for message in messages for token in message_ids(tokenizer, message)]
    dicts = [{"role": message.role, "content": message.text} for message in messages]
    rendered = jinja2.Template(JINJA).render(messages=dicts, add_generation_prompt=True, bos_token="<|endoftext|>")
    assert tokenizer.decode_bytes([tokenizer.end_of_text, *ids, tokenizer.special["<|assistant|>"]]).decode() == rendered


# Talking


ANSWERS = {"ab": "BA", "cd": "DC"}


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """The folder of a run that has learned to answer "ab" with "BA" and "cd" with "DC", and what training printed."""
    folder = tmp_path_factory.mktemp("parrot")

    def line(*questions):
        messages = [Message(role, text) for question in questions for role, text in (("user", question), ("assistant", ANSWERS[question]))]
        return json.dumps({"messages": [{"role": message.role, "content": message.text} for message in messages]}) + "\n"

    lines = [line("ab"), line("cd"), line("ab", "cd"), line("cd", "ab"), line("cd", "cd"), line("ab", "ab")]
    (folder / "chats.jsonl").write_text("".join(lines * 4))
    (folder / "val.jsonl").write_text(line("ab", "cd", "cd"))
    settings = compose("config", [
        "data=chat", f"data.path={folder / 'chats.jsonl'}", f"data.val_path={folder / 'val.jsonl'}", "data.deduplicate=false",
        "data.tokenizer=char", "model=nano", "training=smoke", "name=parrot", f"runs_dir={folder}", "training.max_steps=60",
        "training.batch_size=8", "training.precision=fp32", "training.device=cpu", "training.eval_every=30", "optim.lr=1e-2",
        "training.sample_tokens=20", "logger.report=false"])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert train(settings) == 0
    return folder, printed.getvalue()


@pytest.fixture
def talk(parrot, capsys, monkeypatch):
    """What `python sample.py chat=true` prints for lines on standard input."""
    def talk(typed, *overrides):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
        words = [f"runs_dir={parrot[0]}", "chat=true", "temperature=0", "max_new_tokens=4", "precision=fp32", *overrides]
        assert sample.sample(compose("sample", words)) == 0
        return capsys.readouterr()
    return talk


def test_training_says_what_it_trains_and_samples_answers(parrot):
    _, printed = parrot
    assert "Conversations: 24 conversations in " in printed and "answers\n" in printed
    assert "--- 1 of 1\n<|user|>ab<|end|><|assistant|>BA\n" in printed
    assert "parrot chat=true" in printed and "<|user|>ab<|end|><|assistant|>" in printed
    loss = float(re.findall(r"validation loss ([\d.]+)", printed)[-1])
    assert loss < 0.1
    # A byte of text costs all of the loss of the two targets after it, a letter and an end for two letters.
    bits = float(re.findall(r"([\d.]+) bits per byte", printed)[-1])
    assert bits == pytest.approx(loss / math.log(2) * 9 / 6, abs=0.01)


def test_a_conversation_is_answered_line_by_line(talk):
    said = talk("ab\n\ncd\nab")
    assert said.out == "BA\nDC\nBA\n" and not said.err


def test_only_turns_that_fit_are_the_context(parrot, monkeypatch):
    engine = open_run("parrot", runs_dir=parrot[0], device="cpu", precision="fp32")
    rules = SamplingConfig(max_new_tokens=4, temperature=0)
    conversation = Conversation(engine, rules)
    prompts = []
    stream = Engine.stream
    monkeypatch.setattr(Engine, "stream", lambda engine, prompt, *rest: prompts.append(prompt) or stream(engine, prompt, *rest))
    for number in range(12):
        question = ["ab", "cd"][number % 2]
        assert "".join(conversation.answer(question)) == ANSWERS[question] and not conversation.was_cut
    texts = [engine.decode(ids) for ids in prompts]
    start, turn = "<|endoftext|>", "<|user|>ab<|end|><|assistant|>BA<|end|>"
    assert texts[0] == f"{start}<|user|>ab<|end|><|assistant|>"
    assert texts[1] == f"{start}{turn}<|user|>cd<|end|><|assistant|>"
    # A turn has 8 tokens, and 32 - 4 are left for 1, 5 and two turns.
    assert [text.count("<|user|>") for text in texts] == [1, 2] + [3] * 10
    assert all(len(ids) <= 28 and text.startswith(start) for ids, text in zip(prompts, texts, strict=True))


def test_many_turns_are_dropped_in_linear_time(parrot, monkeypatch):
    lengths_read = []

    class Ids(list):
        def __len__(self):
            lengths_read.append(1)
            return super().__len__()

    encoded = []
    monkeypatch.setattr(chat, "message_ids", lambda *message: encoded.append(1) or Ids(message_ids(*message)))
    engine = open_run("parrot", runs_dir=parrot[0], device="cpu", precision="fp32")
    messages = [Message("user", "ab"), Message("assistant", "BA")] * 2_000
    prompt, *_ = next_answer(engine, [Message("system", "ab"), *messages, Message("user", "cd")], SamplingConfig(max_new_tokens=4))
    turn = "<|user|>ab<|end|><|assistant|>BA<|end|>"
    assert engine.decode(prompt) == f"<|endoftext|><|system|>ab<|end|>{turn}{turn}<|user|>cd<|end|><|assistant|>"
    # Each message is encoded once, and the turns that do not fit are not counted again and again.
    assert len(encoded) == len(messages) + 2 and len(lengths_read) < len(messages)


def test_a_question_that_is_too_long_is_an_error(talk):
    said = talk("ab" * 20 + "\nab\nax\n")
    assert said.out.startswith("Error: The question has 40 tokens, and the context of 32 has room for 24: shorten it")
    assert "\nBA\nError: The tokenizer has no character 'x'" in said.out


def test_an_answer_without_an_end_is_said_to_be_cut(talk):
    said = talk("ab", "max_new_tokens=1")
    assert said.out == "B\n" and "The answer was cut: raise max_new_tokens" in said.err


def test_without_a_question_chat_is_advised(parrot, capsys):
    assert sample.sample(compose("sample", [f"runs_dir={parrot[0]}", "max_new_tokens=4", "precision=fp32"])) == 0
    assert "trained on conversations: chat=true talks to it" in capsys.readouterr().err


def test_a_model_of_plain_text_has_no_conversations(tiny_runs, monkeypatch):
    with pytest.raises(ValueError, match=r"has no <\|system\|>: the model was not trained on conversations"):
        sample.sample(compose("sample", [f"runs_dir={tiny_runs}", "chat=true", "precision=fp32"]))


@pytest.mark.parametrize(("words", "problem"), [
    (["chat=true", "prompt=x"], "exclude each other"), (["chat=true", "num_samples=2"], "chat=true gives one answer"),
    (["system=x"], "system=x is for chat=true")])
def test_settings_that_contradict_a_conversation(words, problem):
    with pytest.raises(ConfigError, match=problem):
        compose("sample", words)


@pytest.mark.slow
@pytest.mark.parametrize("last", [b"\x03", b"\x04"])
def test_a_conversation_in_a_terminal_ends_cleanly(parrot, last):
    words = ["sample.py", f"runs_dir={parrot[0]}", "chat=true", "temperature=0", "precision=fp32"]
    said, code = type_into(words, b"you> ", [b"ab\n", last])
    assert code == (130 if last == b"\x03" else 0)
    assert b"BA" in said and b"Traceback" not in said


def test_an_export_talks_alike_in_transformers(parrot, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    from scripts.export import ExportSettings, main

    out = tmp_path / "exported"
    main(compose(ExportSettings, ["run=parrot", f"runs_dir={parrot[0]}", "format=hf", f"out={out}"]))
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(out), transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "cd"}], add_generation_prompt=True, return_tensors="pt", return_dict=False)
    own = open_run("parrot", runs_dir=parrot[0], device="cpu", precision="fp32")
    assert ids[0].tolist() == next_answer(own, [Message("user", "cd")], SamplingConfig())[0]
    [answer] = model.generate(ids, do_sample=False, max_new_tokens=9)
    assert tokenizer.decode(answer[ids.shape[1] :]) == "DC<|end|>"


# Training


@pytest.fixture
def counted():
    """A model, and a split of conversations with answers of very different lengths."""
    tokenizer = with_markers(ByteTokenizer())
    draw = np.random.default_rng(0)
    ids = []
    for _ in range(60):
        ids += message_ids(tokenizer, Message("user", "?" * int(draw.integers(1, 9))))
        ids += message_ids(tokenizer, Message("assistant", "a!" * int(draw.integers(1, 9)) ** 2))
        ids.append(tokenizer.end_of_text)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16))
    return model, Tokens([np.array(ids, dtype=np.uint32)]), markers_of(tokenizer)


class OneProcess:
    """What `accumulate_gradients` needs of a loader and of the buckets of one rank."""

    def __init__(self, model, loader, rank=0):
        self.loader, self.rank, self.world_size, self.micro_steps = loader, rank, loader.world_size, loader.micro_steps
        self.parameters, self.n_targets = list(model.parameters()), loader.n_targets

    def batch(self, step, micro_step):
        return self.loader.batch(step, micro_step, self.rank)

    def start(self, put_total):
        pass

    def finish(self):
        pass


@pytest.mark.parametrize(("micro_steps", "world_size"), [(1, 1), (4, 1), (2, 2), (1, 4)])
def test_a_step_is_the_mean_over_its_targets(counted, micro_steps, world_size):
    """However many micro-steps and processes it is divided among, whose counts of targets differ."""
    model, tokens, markers = counted
    whole = Loader([tokens], 32, 8, markers=markers).batch(0)
    loss = model(*whole)
    loss.backward()
    expected = [weights.grad.clone() for weights in model.parameters()]
    model.zero_grad()
    loader = Loader([tokens], 32, 8 // (micro_steps * world_size), micro_steps, world_size=world_size, markers=markers)
    assert micro_steps * world_size == 1 or len(set(loader.n_targets(0))) > 1
    device, scaler = Device("cpu", "fp32"), torch.amp.GradScaler("cpu", enabled=False)
    total, sums = 0.0, [torch.zeros_like(weights) for weights in model.parameters()]
    for rank in range(world_size):
        model.zero_grad()
        batches = OneProcess(model, loader, rank)
        total += accumulate_gradients(BatchLoss(model, device), batches, batches, scaler, 0, 0, Interrupt()).sum().item()
        sums = [one + weights.grad for one, weights in zip(sums, model.parameters(), strict=True)]
    assert total == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-6)


def test_validation_is_the_mean_over_the_targets(counted):
    from training.distributed import World

    model, tokens, markers = counted
    values = [evaluate(BatchLoss(model, Device("cpu", "fp32")), Validation([tokens], 32, batch_size, 10**6, markers=markers), World({}))
              for batch_size in (1, 5, 1000)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)
    # All of the split, although sequences have padding.
    [(inputs, targets, weight)] = Validation([tokens], 32, 1000, len(tokens), markers=markers)
    assert Validation([tokens], 32, 1000, 1, markers=markers).n_windows == [1]
    assert weight == 1 and model(inputs, targets).item() == pytest.approx(values[0], rel=1e-5)
    assert model_loss.MASKED == MASKED


def test_bits_per_byte_are_those_of_the_answers(counted):
    _, tokens, markers = counted
    examples = Examples(tokens, 32, markers, "training", np.zeros(1, dtype=np.uint64))
    _, targets = examples.read(np.arange(examples.count))
    learned = targets[targets != MASKED]
    ratio = examples.bytes_per_target(examples.count, with_markers(ByteTokenizer()))
    assert ratio == pytest.approx((learned < 256).sum() / len(learned)) and ratio < 1
