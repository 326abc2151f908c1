"""Measure trained models: the loss on a text, and the accuracy on standard tasks.

  python eval.py run=NAME                          on the run's own validation split
  python eval.py run=A,B data.path=book.txt        two runs on the same text
  python eval.py init_from=gpt2 tasks=hellaswag,lambada,piqa,arc_easy,winogrande
  python eval.py run=NAME lm_eval=blimp,wikitext   with lm-evaluation-harness

docs/evaluation.md explains the numbers.
"""

from conf.evaluation import EvalSettings
from conf.launch import launch

if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for torch.
    launch("eval:evaluate", EvalSettings, __doc__)

import json
import sys
from pathlib import Path
from typing import Any

import atomic
from checkpointing import store
from checkpointing.changes import saved_settings
from checkpointing.checkpoint import Checkpoint
from checkpointing.find_runs import find_runs
from checkpointing.find_weights import find_weights
from checkpointing.weights import Weights, own_weights
from evaluation.loss import measure_loss, named_text, own_validation_split
from evaluation.result_cache import ResultCache
from evaluation.scoring import Scorer
from evaluation.tasks import Question, find_tasks, measure_task, read_questions
from generation.engine import engine_of
from optional import import_optional
from report.history import EVALUATION
from report.page import after_training
from report.results import table
from terminal import counted, output, say
from training.configure import configure
from training.device import Device

# The suffix of the file beside the results with those so far.
CACHE = ".cache.jsonl"


def evaluate(settings: EvalSettings) -> int:
    """Measure each model, print a table, write the numbers as JSON, and return the exit code."""
    # Read the tasks first: a mistake in them is found before a model is loaded.
    device = Device(settings.device, settings.precision)
    tasks = {}
    if settings.tasks:
        for name, path in find_tasks(settings.tasks).items():
            tasks[name] = read_questions(path, settings.limit)
    # The models: several runs, or weights without a run.
    runs = []
    if not settings.init_from:
        runs = find_runs(Path(settings.runs_dir), settings.run)
    harness = open_harness(settings) if settings.lm_eval else None

    # Measure one model after the other. The results of a run are kept in its folder.
    models = []
    try:
        with configure(device):
            for run in runs or [None]:
                # Runs of several sweeps that share a name are named by their paths.
                name = settings.init_from
                if run:
                    same_name = {other for other in runs if other.name == run.name}
                    name = run.name if len(same_name) == 1 else str(run)
                models.append(measure_model(settings, run, name, device, tasks, harness))
                if run and not settings.out:
                    write(run / EVALUATION, models[-1:])
                    if (run / "report.html").exists():
                        after_training(run)
        if settings.out:
            write(Path(settings.out), models)
    finally:
        # The numbers are shown even if they cannot be written.
        if models:
            output(table(models))
    for note in notes(models):
        say(note, sys.stderr)
    return 0


def measure_model(settings: EvalSettings, run: Path | None, name: str, device: Device,
                  tasks: dict[str, list[Question]], harness: Any) -> dict[str, Any]:
    """The results of a run, or of the model in `init_from`."""
    # Open the model. An evaluation that was interrupted resumes from the results in a file.
    weights, saved, step, results = open_weights(settings, run)
    cache = ResultCache()
    if results:
        cache = ResultCache(results.with_suffix(CACHE),
                            f"{weights.fingerprint()} {device.precision}")
    scorer = Scorer(engine_of(weights, device), settings.batch_tokens, cache)
    parameters = sum(tensor.numel() for tensor in scorer.engine.model.parameters())
    model = {"name": name, "tasks": [], **step, "parameters": parameters,
             "precision": device.precision}

    # The loss on the named text, or on the validation split of the run; then the tasks.
    if settings.measures_loss:
        if settings.data.path:
            text = named_text(settings.data, saved, scorer, settings.eval_tokens)
        else:
            text = own_validation_split(saved, scorer, run, settings.eval_tokens)
        model["loss"] = measure_loss(scorer, text, f"{name}: {text.name}")
    for task, questions in tasks.items():
        try:
            model["tasks"].append(measure_task(scorer, task, questions, f"{name}: {task}"))
        except ValueError as error:
            raise ValueError(f"{name} cannot read {task}: {error}") from None
    if harness:
        model["tasks"] += harness.measure(scorer, name)
    return model


def open_weights(settings: EvalSettings,
                 run: Path | None) -> tuple[Weights, dict[str, Any], dict[str, int], Path | None]:
    """The weights of a run or of `init_from`; the run's settings, its step, and the results' file.
    """
    out = Path(settings.out) if settings.out else None
    if run is None:
        return find_weights(settings.init_from, Path(settings.runs_dir)), {}, {}, out

    def load(found: Checkpoint) -> tuple[Weights, dict[str, Any], dict[str, int]]:
        return own_weights(found), saved_settings(found), {"step": found.step}

    return *store.load_of_run(run, settings.checkpoint, load), out or run / EVALUATION


def open_harness(settings: EvalSettings) -> Any:
    """Tasks of lm-evaluation-harness. Raises ValueError for an unknown one, or without lm_eval."""
    import_optional("lm_eval", f"lm_eval={settings.lm_eval} needs the package lm_eval", "lm_eval")
    from evaluation.harness import HarnessTasks

    return HarnessTasks(settings)


def notes(models: list[dict[str, Any]]) -> list[str]:
    """Sentences about what makes the numbers harder to compare."""
    found = []
    texts = {model["loss"]["identity"] for model in models if "loss" in model}
    if len(texts) > 1:
        found.append("Note: these runs have different validation splits, so their losses cannot be "
                     "compared: name one text for all of them, as in data.path=book.txt.")
    for model in models:
        for task in model["tasks"]:
            if task.get("requests_cut"):
                found.append(f"Note: {model['name']}, {task['task']}: the beginning of "
                             f"{counted(task['requests_cut'], 'request')} was left out, which are "
                             "longer than the context of the model.")
    return found


def write(path: Path, models: list[dict[str, Any]]) -> None:
    """Write the results of `models` as JSON; numbers that are not finite become null."""
    finite = json.loads(json.dumps({"models": models}), parse_constant=lambda name: None)
    atomic.write_bytes(path, f"{json.dumps(finite, indent=2)}\n".encode())
    say(f"Wrote {path}", sys.stderr)
