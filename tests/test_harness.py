"""lm-evaluation-harness on our engine: its results are those of its own backend for transformers."""

from __future__ import annotations

import json

import jinja2
import pytest

import eval
import train
from conf.evaluation import EvalSettings
from conf.schema import compose
from data.chat import Message, message_ids, with_markers
from data.tokenizer import ByteTokenizer
from evaluation import scoring
from evaluation.scoring import Scorer
from generation.engine import Engine, open_run
from model import GPT, GPTConfig
from scripts import export
from training.device import Device

# Importing lm_eval and finding its tasks takes seconds.
pytestmark = pytest.mark.slow
HEADER = "task: own_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {data}}}\ntest_split: train\n"
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: gold\n"
              "num_fewshot: 1\nfewshot_split: train\n"
              "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
               "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
    "generate": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
                "generation_kwargs: {until: ['zz', '.'], max_gen_toks: 5}\nmetric_list: [{metric: exact_match}]\n",
}


@pytest.fixture
def lm_eval():
    pytest.importorskip("transformers", "5", reason="needs transformers 5: pip install transformers")
    return pytest.importorskip("lm_eval", reason="needs lm_eval: pip install lm_eval")


def documents(book, run):
    """Made-up documents whose answers the model gives to half of the questions."""
    lines = book.read_text().splitlines()
    for number in range(80):
        question = lines[number][:25].rstrip()
        answer = run.generate(question, temperature=0, max_new_tokens=5) if number % 2 else "other"
        choices = [f" {line[3 + number % 4 : 9 + 3 * index]}" for index, line in enumerate(lines[number : number + 2 + number % 3])]
        yield {"question": question, "choices": choices, "gold": number % 2, "answer": answer, "text": "\n".join(lines[number : number + 3])}


def test_results_are_those_of_the_backend_for_transformers(lm_eval, compose_tiny, book, tmp_path, monkeypatch):
    settings = compose_tiny("model=nano", "data.tokenizer=bpe", "data.vocab_size=300", "training.max_steps=20")
    train.train(settings)
    run = open_run("tiny", runs_dir=settings.runs_dir, device="cpu", precision="fp32")
    export.main(export.ExportSettings(run="tiny", runs_dir=settings.runs_dir, out=str(tmp_path / "exported")))
    (tmp_path / "own.json").write_text("\n".join(map(json.dumps, documents(book, run))))
    paths = []
    for name, text in TASKS.items():
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(HEADER.format(name=name, data=tmp_path / "own.json") + text)
    theirs = lm_eval.simple_evaluate("hf", model_args=f"pretrained={tmp_path / 'exported'},dtype=float32", tasks=list(map(str, paths)),
                                     device="cpu", batch_size=8, bootstrap_iters=1000)["results"]
    names = ",".join(map(str, paths))
    words = [f"lm_eval={names}", f"runs_dir={settings.runs_dir}", "device=cpu", "precision=fp32"]
    assert eval.evaluate(compose(EvalSettings, words)) == 0
    (model,) = json.loads((tmp_path / "runs" / "tiny" / "evaluation.json").read_text())["models"]
    # The same command takes all results from the file of those so far.
    monkeypatch.setattr(Engine, "complete", None)
    monkeypatch.setattr(scoring, "score_batch", None)
    assert eval.evaluate(compose(EvalSettings, words)) == 0
    assert json.loads((tmp_path / "runs" / "tiny" / "evaluation.json").read_text())["models"] == [model]
    ours = {task["task"]: task for task in model["tasks"]}
    choice, generated = theirs["own_choice"], theirs["own_generate"]["exact_match,none"]
    assert 0.1 < choice["acc,none"] < 0.9 and 0.1 < generated < 0.9  # else the test shows nothing
    for name, metric in (("accuracy", "acc"), ("accuracy_normalised", "acc_norm")):
        assert (ours["own_choice"][name], ours["own_choice"][f"{name}_se"]) == (choice[f"{metric},none"], choice[f"{metric}_stderr,none"])
    assert ours["own_generate"]["exact_match"] == generated
    for metric in ("word_perplexity", "bits_per_byte"):
        assert ours["own_rolling"][metric] == pytest.approx(theirs["own_rolling"][f"{metric},none"], rel=1e-5)


def test_a_chat_template_is_that_of_training(lm_eval):
    from evaluation.harness import Harness

    tokenizer = with_markers(ByteTokenizer())
    engine = Engine(GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8)), tokenizer, Device("cpu", "fp32"))
    harness = Harness(Scorer(engine, 100), "", is_chat=True)
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}, {"role": "user", "content": "A|B<"}]
    text = harness.apply_chat_template(messages)
    assert text == jinja2.Template(harness.chat_template()).render(messages=messages, bos_token="<|endoftext|>", add_generation_prompt=True)
    ids = [token for one in messages for token in message_ids(tokenizer, Message(one["role"], one["content"]))]
    assert harness.tok_encode(text) == [tokenizer.end_of_text, *ids, tokenizer.special["<|assistant|>"]]
    assert harness.apply_chat_template(messages[:2], add_generation_prompt=False).endswith("<|assistant|>So.")


def test_a_model_without_conversations_has_no_template(lm_eval, tiny_runs, tmp_path):
    task = tmp_path / "own.yaml"
    task.write_text(HEADER.format(name="choice", data=tmp_path / "own.json") + TASKS["choice"])
    documents = [{"question": "The small" * number, "choices": [" dog", " river"], "gold": 0} for number in range(1, 10)]
    (tmp_path / "own.json").write_text("\n".join(map(json.dumps, documents)))
    words = [f"lm_eval={task}", f"runs_dir={tiny_runs}", "device=cpu", "precision=fp32", f"out={tmp_path / 'out.json'}"]
    assert eval.evaluate(compose(EvalSettings, [*words, "num_fewshot=2"])) == 0
    with pytest.raises(ValueError, match=r"tiny, lm_eval=.*own.yaml: The tokenizer has no <.system.>: the model was not trained on conv"):
        eval.evaluate(compose(EvalSettings, [*words, "apply_chat_template=true"]))


def test_an_unknown_task_of_the_harness_is_refused(lm_eval, tiny_runs):
    with pytest.raises(ValueError, match=r"lm_eval=blimpp: no such task .did you mean blimp"):
        eval.evaluate(compose(EvalSettings, ["lm_eval=blimpp", f"runs_dir={tiny_runs}"]))
