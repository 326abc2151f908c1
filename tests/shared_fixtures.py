"""What tests share: folders for prepared data that are thrown away, and files that not every machine has."""

import copy
import functools
import hashlib
import os
import random
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import settings

import hardware
import startup
import train
import trainer
from checkpointing import provenance
from conf import presets, schema
from conf.convert import is_text
from conf.schema import compose
from conf.settings import leaves
from data.bpe import PUBLISHED
from training.estimate import Pace

settings.register_profile("nanohydra", deadline=None, max_examples=50)  # no deadline: the machine may be busy
settings.load_profile("nanohydra")
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a script that starts the tests in the background has ignored
for kind in (torch.cuda, torch.xpu, torch.mtia):
    if not kind.is_available():
        kind.manual_seed_all = lambda seed: None  # torch would format the stack, which is deep in tests, for each seed
torch.set_num_threads(1)  # in models this small, threads wait for each other; the tests of whole programs use all


@pytest.fixture(scope="session", autouse=True)
def prepared_data(tmp_path_factory):
    """Prepared data goes to a folder of this session, never to the user's; so the pydocs corpus is made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOHYDRA_DATA", str(folder := tmp_path_factory.mktemp("prepared")))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk():
    """A disk takes milliseconds for each file, and a run writes dozens. Programs that tests start do wait.

    Gives out the function that waits, for tests of writing.
    """
    fsync = os.fsync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which finds a closed file, too
        yield fsync


compose_with_hydra, conf = schema.compose_with_hydra, presets.CONF


@functools.cache
def composed(root, settings, words):
    return compose_with_hydra(root, settings, list(words))


def compose_or_remember(root, settings, words):
    """Hydra takes a fifth of a second for a composition, and many tests ask for the same one."""
    if conf != presets.CONF:
        return compose_with_hydra(root, settings, words)
    return copy.deepcopy(composed(root, settings, tuple(words)))


@functools.cache
def parsed_value(word):
    return OverridesParser.create().parse_override(word).value()


def compose_or_set(root, settings, words):
    """As `compose_or_remember`, but the numbers and words among the values are set afterwards, read by Hydra's parser.

    Thus tests whose runs differ in such settings share a composition.
    """
    known = leaves(settings)
    later = [word for word in words if re.fullmatch(r"[a-z_.0-9]+=[\w.+-]+", word)]
    later = [word for word in later if not is_text(known.get(word.partition("=")[0], str))]
    before = [word for word in words if word not in later]
    if any(word.endswith((".yaml", ".yml")) for word in before):  # the file may change
        return compose_or_remember(root, settings, words)
    values, experiment, origins = compose_or_remember(root, settings, before)
    for word in later:
        *groups, key = word.partition("=")[0].split(".")
        place = values
        for group in groups:
            place = place[group]
        place[key] = parsed_value(word)
    return values, experiment, origins


@pytest.fixture(scope="session", autouse=True)
def composed_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "compose_with_hydra", compose_or_set)
        yield


@pytest.fixture
def composed_by_hydra(monkeypatch):
    """For tests of compositions."""
    monkeypatch.setattr(schema, "compose_with_hydra", compose_or_remember)


@pytest.fixture
def fresh_data(tmp_path, monkeypatch):
    """An empty folder for prepared data and downloads, of one test alone."""
    monkeypatch.setenv("NANOHYDRA_DATA", str(folder := tmp_path / "prepared"))
    return folder


@pytest.fixture(scope="session")
def shakespeare():
    """The path of a copy of Tiny Shakespeare."""
    path = Path(os.environ.get("NANOHYDRA_SHAKESPEARE", "")).resolve()
    if not path.is_file():
        pytest.skip("needs Tiny Shakespeare: set NANOHYDRA_SHAKESPEARE to a copy of it")
    return path


@pytest.fixture(scope="session")
def gpt2_files():
    """The folder where tiktoken keeps GPT-2's vocabulary, made absolute for tests that run elsewhere."""
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or "unset").resolve()
    if not all((folder / hashlib.sha1(url.encode()).hexdigest()).is_file() for url in PUBLISHED["gpt2"]):  # tiktoken's names
        pytest.skip("needs GPT-2's vocabulary: set TIKTOKEN_CACHE_DIR to a folder where tiktoken has kept it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    """The path of a small text of made-up sentences, 30 KB, the same in every session."""
    draw = random.Random(0)
    words = [["a", "the", "every", "no"], ["small", "green", "old", "quiet"], ["dog", "house", "river", "model"],
             ["sees", "keeps", "finds", "follows"], ["its", "another", "some"], ["shadow", "token", "path", "end"]]
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("\n".join(" ".join(map(draw.choice, words)).capitalize() + "." for _ in range(1000)))
    return path


git_state = functools.cache(provenance.git_state)


def measure_nothing(patch):
    """At its start, a run measures the machine for a third of a second, which other tests are about."""
    patch.setattr(startup, "measure_pace", lambda *_: Pace(1.0, 1.0))
    patch.setattr("training.slow_cpu.busy_cpus", lambda: 0.0)
    patch.setattr(hardware, "cgroups", lambda *_: [])
    patch.setattr(provenance, "git_state", git_state)


@pytest.fixture
def compose_tiny(book, tmp_path, monkeypatch):
    """Settings of a run that takes a second: `compose_tiny("training.max_steps=3", ...)`.

    Names and paths are put in after the composition, so that tests share compositions.
    """
    measure_nothing(monkeypatch)
    small = ["model=nano", "data=text", f"data.path={book}", "data.tokenizer=char", "training=smoke", "name=tiny", "training.device=cpu",
             "training.precision=fp32", "training.eval_tokens=512", "optim.lr=3e-3", "logger.report=false", "training.sample_tokens=0"]

    def compose_small(*overrides):
        runs_dir, name, path, words = str(tmp_path / "runs"), None, None, []
        paths = [word for word in overrides if word.startswith("data.path=")]
        for word in overrides:
            if word in paths[:-1]:  # a later one replaces it
                continue
            key, _, value = word.partition("=")
            if key == "runs_dir":
                runs_dir = value
            elif key == "name" and value.isidentifier():
                name = value
            elif key == "data.path" and "name=" not in overrides and Path(value).is_file():
                path = value
            else:
                words.append(word)
        settings = compose("config", [*small, *words])
        data = replace(settings.data, path=path or settings.data.path)
        return replace(settings, runs_dir=runs_dir, name=name or settings.name, data=data)

    return compose_small


@pytest.fixture(scope="session")
def tiny_runs(book, tmp_path_factory):
    """A folder with one finished run by characters, `tiny`, for tests that do not change it."""
    folder = tmp_path_factory.mktemp("runs")
    train.train(compose("config", ["model=nano", "data=text", f"data.path={book}", "data.tokenizer=char", "training=smoke", "name=tiny",
                                   "training.max_steps=60", "training.precision=fp32", f"runs_dir={folder}", "optim.lr=1e-2",
                                   "training.eval_every=20", "training.checkpoint_every=20", "training.sample_tokens=0", "logger.report=false"]))
    return folder


@pytest.fixture
def interrupt_at(monkeypatch):
    """Send this process a signal at the beginning of step `step`, once, when it comes for the `time`-th time."""
    def plan(step, number=signal.SIGINT, time=1):
        def at_step(now, *arguments):
            if now == step:
                seen.append(now)
                if len(seen) == time:
                    os.kill(os.getpid(), number)
            return lr_scale(now, *arguments)

        seen = []
        lr_scale = trainer.lr_scale
        monkeypatch.setattr(trainer, "lr_scale", at_step)
    return plan
