"""The tasks of lm-evaluation-harness, by our engine: import this only if lm_eval is installed.

The harness reads the data, makes the requests and computes the metrics; here they are answered.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import jinja2
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows

from conf.evaluation import EvalSettings
from conf.hints import closest
from conf.sampling import SamplingConfig
from data import chat
from evaluation.scoring import Request, Scorer, request_of
from progress import ProgressBar
from terminal import first_line

# Our names of metrics, as in the tasks of this package.
METRICS = {"acc": "accuracy", "acc_norm": "accuracy_normalised"}
# The harness estimates some standard errors by this number of random samples.
BOOTSTRAP = 1000


class Harness(TemplateLM):
    """The interface of lm-evaluation-harness to a model."""

    def __init__(self, scorer: Scorer, title: str, is_chat: bool = False) -> None:
        super().__init__()
        self.is_chat = is_chat
        self.scorer, self.engine, self.title = scorer, scorer.engine, title
        self.block_size = scorer.engine.model.config.block_size

    @property
    def eot_token_id(self) -> int:
        return self.engine.prompt_ids("")[0]

    # The names of a cache of requests, which is not used.
    tokenizer_name = "nanohydra"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return chat.JINJA

    def apply_chat_template(self, chat_history: list[dict[str, str]],
                            add_generation_prompt: bool = True) -> str:
        """The text of messages; without `add_generation_prompt`, the last one is not ended."""
        end_of_text = chat.markers_of(self.engine.tokenizer).end_of_text
        names = {token: name for name, token in self.engine.tokenizer.special.items()}
        text = jinja2.Template(chat.JINJA).render(
            messages=chat_history, bos_token=names[end_of_text],
            add_generation_prompt=add_generation_prompt)
        return text if add_generation_prompt else text.removesuffix(chat.END)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None,
                   **unused: Any) -> list[int]:
        if not self.is_chat:
            return self.engine.encode(string)
        # The markers of messages are tokens of their own.
        special = self.engine.tokenizer.special
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, special))})", string):
            ids += [special[part]] if part in special else self.engine.encode(part)
        return ids

    def loglikelihood(self, requests: list[Instance],
                      disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[tuple[tuple[str, str], list[int], list[int]]],
                              **unused: Any) -> list[tuple[float, bool]]:
        encoded = [request_of(self.engine, context + continuation, len(context))
                   for _, context, continuation in requests]
        return [(one.logprob, one.is_greedy) for one in self.scorer.score(encoded, self.title)]

    def loglikelihood_rolling(self, requests: list[Instance],
                              disable_tqdm: bool = False) -> list[float]:
        # Cut each text into windows of a context, in which each token is scored once.
        windows: list[Request] = []
        text_of: list[int] = []
        for number, instance in enumerate(requests):
            ids = self.tok_encode(instance.args[0])
            for inputs, targets in get_rolling_token_windows(ids, self.eot_token_id,
                                                             self.block_size, context_len=1):
                windows.append(Request(tuple(inputs), tuple(targets)))
                text_of.append(number)

        # Add up the windows of each text.
        sums = [0.0] * len(requests)
        for number, scored in zip(text_of, self.scorer.score(windows, self.title), strict=True):
            sums[number] += scored.logprob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        # A sample has the random numbers of its place among the requests.
        cache = self.scorer.cache
        keys = [cache.key(number, one.args) for number, one in enumerate(requests)]
        left = [(number, *one.args) for number, one in enumerate(requests)
                if keys[number] not in cache.results]
        # Those with the same sampling settings and similar lengths are generated together.
        collator = Collator(left, lambda job: -len(job[1]), lambda job: job[2], "gen_kwargs")
        with ProgressBar(total=len(requests), initial=len(requests) - len(left), desc=self.title,
                         unit="texts", leave=False) as bar:
            for batch in collator.get_batched(n=self.scorer.batch_size):
                until, rules = sampling_rules(batch[0][2])
                jobs = [(self.prompt(text, rules.max_new_tokens), number)
                        for number, text, _ in batch]
                completions = self.engine.complete(jobs, rules)
                for (_, number), completion in zip(jobs, completions, strict=True):
                    cache.add(keys[number], cut(completion.text, until))
                bar.update(len(batch))
        return [cache.results[key] for key in keys]

    def prompt(self, text: str, new_tokens: int) -> list[int]:
        """The end of a text that leaves space in the context for the new tokens."""
        room = self.block_size - new_tokens
        if room < 1:
            raise ValueError(f"a task generates {new_tokens} tokens, which needs a longer context "
                             f"than the model's of {self.block_size}.")
        return (self.tok_encode(text) or [self.eot_token_id])[-room:]


def sampling_rules(arguments: dict[str, Any]) -> tuple[list[str], SamplingConfig]:
    """The texts that end a generation, and how to sample, by the arguments of a task."""
    given = normalize_gen_kwargs(arguments)
    until = given.get("until") or []
    until = [until] if isinstance(until, str) else until
    temperature = given.get("temperature", 1.0) if given["do_sample"] else 0.0
    return until, SamplingConfig(
        max_new_tokens=given["max_gen_toks"], temperature=temperature,
        top_k=given.get("top_k", 0), top_p=given.get("top_p", 1.0), stop=until[0] if until else "")


def cut(text: str, until: list[str]) -> str:
    """The text before the first of some texts."""
    for end in until:
        if end:
            text = text.partition(end)[0]
    return text


class HarnessTasks:
    """Tasks of the harness, or its .yaml files, as the settings of an evaluation name them.

    Raises ValueError for a name that it does not know.
    """

    def __init__(self, settings: EvalSettings) -> None:
        self.manager = TaskManager()
        self.settings = settings
        self.names = settings.lm_eval.split(",")
        known = self.manager.all_tasks
        for name in self.names:
            is_file = name.endswith((".yaml", ".yml")) and Path(name).is_file()
            if name not in known and not is_file:
                raise ValueError(f"lm_eval={name}: no such task{closest(name, known)}. The command "
                                 "lm-eval ls tasks lists them.")

    def measure(self, scorer: Scorer, title: str) -> list[dict[str, Any]]:
        """The metrics of the tasks, and those of groups of tasks.

        Raises ValueError for data that cannot be loaded.
        """
        is_chat = self.settings.apply_chat_template
        loaded = [task for name in self.names for task in self.load(name)]
        model = Harness(scorer, f"{title}: lm_eval", is_chat)
        try:
            found = simple_evaluate(model, tasks=loaded, num_fewshot=self.settings.num_fewshot,
                                    limit=self.settings.limit, apply_chat_template=is_chat,
                                    log_samples=False, task_manager=self.manager,
                                    bootstrap_iters=BOOTSTRAP)
        except ValueError as error:
            raise ValueError(f"{title}, lm_eval={','.join(self.names)}: {error}") from None
        return [entry(name, values) for name, values in found["results"].items()]

    def load(self, name: str) -> list[Any]:
        """The tasks of a name, with their data."""
        try:
            found = self.manager.load([name])
        except Exception as error:
            # Whatever the library of datasets raises without a network, or for a damaged file.
            raise ValueError(
                f"lm_eval={name}: its data could not be loaded ({type(error).__name__}: "
                f"{first_line(error)}). It is a dataset of the Hugging Face Hub: run the command "
                "once with a network, or set HF_HOME to a folder where it has been downloaded."
            ) from None
        return list(found["groups"].values() or found["tasks"].values())


def entry(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The entry of a task in the results, by the harness's own entry."""
    made = {"task": name, "documents": values["sample_len"]}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        own_name = METRICS.get(metric, metric)
        if filtered != "none":
            own_name += f",{filtered}"
        error = values.get(f"{metric}_stderr,{filtered}")
        made |= {own_name: value, f"{own_name}_se": error if isinstance(error, float) else math.nan}
    return made
