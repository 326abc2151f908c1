"""Compare recipes over several seeds: is one better, or is the difference only noise?

  python -m scripts.compare optim=adamw optim=muon seeds=5           two recipes, five seeds each
  python -m scripts.compare "optim=muon optim.lr=0.02" optim=muon base="training=smoke data=stdlib"
  python -m scripts.compare optim.lr=1e-3,3e-3,1e-2 seeds=3          a sweep with seeds
  python -m scripts.compare old,old-2,old-3 new,new-2,new-3          runs, or folders of runs
  python -m scripts.compare runs/A runs/B rule=speedrun              the rule of modded-nanogpt

The same command resumes, and with more seeds trains only the new ones. Looking at the answer after
every seed is allowed: docs/evaluation.md. Needs SciPy (pip install scipy).
"""

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from conf.launch import launch
from evaluation.comparison import SMALLEST
from setting import FilePath, ScriptSettings, setting


@dataclass(frozen=True)
class CompareSettings(ScriptSettings):
    """The settings of a comparison; all other words on the command line are its arms."""

    seeds: int = setting(5, "the number of seeds of each recipe: 0, 1, ...", ge=2)
    base: str = setting("", "overrides for all recipes")
    jobs: int = setting(1, "the number of trainings at a time", ge=1)
    runs_dir: FilePath = setting("runs", "folder that contains the runs' folders")
    metric: Literal["bits_per_byte", "val_loss"] = setting(
        "bits_per_byte", "the result of a run is its lowest one")
    smallest: float = setting(SMALLEST, "the difference that matters, in the unit of metric=", gt=0)
    rule: Literal["sequential", "speedrun"] = setting(
        "sequential", "the test; speedrun is that of modded-nanogpt's track 3, for its recipe")


if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for NumPy.
    launch("scripts.compare:main", CompareSettings, __doc__)

from statistics import fmean

from checkpointing import store
from conf.identity import differences, flat
from conf.presets import groups
from conf.schema import folder_name
from conf.settings import Settings, leaves
from evaluation import comparison
from report.history import History, open_history
from report.runs import arms_of, choose, differing_settings
from sweep.grid import Plan, plan_grid, run_plan
from sweep.summary import report_failures
from terminal import counted, say

# The settings that choose tokens for a text, and those that choose only what is trained on where
# another text is named for validation.
TOKENIZER = ("data.tokenizer", "data.tokenizer_fingerprint", "data.vocab_size")
TRAINING_TEXT = ("data.path", "data.hub_name", "data.hub_config", "data.split", "data.mix",
                 "data.val_fraction", "data.deduplicate")
FINGERPRINTS = ("data.prepared", "data.tokenizer_fingerprint")
NOT_THE_TEXT = (*TOKENIZER, "data.prepared", "data.dtype", "data.respect_documents")
UNITS = {"bits_per_byte": "bits per byte", "val_loss": "nats per token"}
Arms = dict[str, dict[int, History]]  # the runs of each arm by seed


def main(settings: CompareSettings) -> int:
    comparison.import_stats()
    words = list(dict.fromkeys(settings.train))
    runs_dir = Path(settings.runs_dir)

    # Plan and train the arms that are not runs yet.
    plans = {word: plan_arm(split_overrides(word), settings)
             for word in words if is_overrides(word, runs_dir)}
    if len(words) == 1 and [plan.swept for plan in plans.values()] == [["seed"]]:
        raise too_few(words)
    refuse_equal(plans)
    folders = train_all(plans)

    # Read the results of all arms.
    arms: Arms = {}
    for word in words:
        found = read_arms(word, runs_dir, folders.get(word))
        if len(words) > 1:
            # Arms of several sweeps can have the same names.
            found = {f"{word} ({name})" if name else word: runs for name, runs in found.items()}
        arms |= found
    metric = "val_loss" if settings.rule == "speedrun" else settings.metric
    check(arms, metric)
    for name, runs in arms.items():
        mean = fmean(results_of(runs, metric).values())
        say(f"{name}: {mean:.4f} {UNITS[metric]}, {counted(len(runs), 'seed')}, {steps_of(runs)}")

    # Print a sentence for each comparison.
    if settings.rule == "speedrun":
        first, *others = arms
        for name in others:
            say(speedrun(first, name, arms))
        return 0
    # With the first arm, or with the best of one sweep, whose arms have no order.
    reference = words[0] if words[0] in arms and len(words) > 1 else ""
    results = {name: results_of(runs, metric) for name, runs in arms.items()}
    for one in comparison.compare_all(results, reference):
        say(one.sentence(UNITS[metric], settings.smallest))
    return 0


def is_overrides(word: str, runs_dir: Path) -> bool:
    """Whether an arm is to be trained. Raises ValueError for runs that do not exist."""
    key = word.partition("=")[0].strip()
    if key in groups() or key in leaves(Settings):
        return True
    try:
        choose(runs_dir, word)
        return False
    except ValueError:
        # A setting that does not exist, rather than a run.
        if "=" in word:
            return True
        raise


def split_overrides(text: str) -> list[str]:
    """The overrides in a text. Raises ValueError for a quotation mark that is not closed."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{text} cannot be split into overrides: {error}.") from None


def plan_arm(arm: list[str], settings: CompareSettings) -> Plan:
    """The runs of an arm: a sweep over seeds, in a folder that is named by its overrides."""
    base = split_overrides(settings.base)
    for word in (*base, *arm):
        if word.startswith(("seed=", "name=", "runs_dir=")):
            raise ValueError(f"{word} is set for all arms: by seeds= and runs_dir=; the overrides "
                             f"of an arm name its folder. Leave it out.")
    seeds = ",".join(map(str, range(settings.seeds)))
    name = folder_name(" ".join([*arm, *base]))
    return plan_grid([*base, *arm, f"seed={seeds}", f"name={name}",
                      f"runs_dir={settings.runs_dir}", f"jobs={settings.jobs}"])


def refuse_equal(plans: dict[str, Plan]) -> None:
    """Raise ValueError, before anything is trained, for arms with the same settings."""
    seen: dict[str, dict[str, object]] = {}
    for word, plan in plans.items():
        _, settings = next(iter(plan.composed.values()))
        values = flat(asdict(settings))
        for other, of_other in seen.items():
            if len(plan.swept) == 1 and not differing_settings([values, of_other]):
                raise identical(other, word)
        seen[word] = values


def identical(first: str, second: str) -> ValueError:
    return ValueError(f"{first} and {second} are the same settings with the same seeds: there is "
                      f"nothing to compare. Change a setting of one of them.")


def train_all(plans: dict[str, Plan]) -> dict[str, Path]:
    """Train what is missing; return the folder of each arm. Exits if a run failed or stopped."""
    for plan in plans.values():
        code, _ = run_plan(plan)
        code = code or report_failures(plan.failures)
        if code:
            raise SystemExit(code)
    return {word: plan.folder for word, plan in plans.items()}


def read_arms(word: str, runs_dir: Path, folder: Path | None = None) -> Arms:
    """The runs that a word names or that were trained for it: one arm for each of their settings.

    A single arm has no name. Raises ValueError for a run that is unfinished.
    """
    chosen, _ = choose(runs_dir, str(folder) if folder else word)
    return arms_of([open_finished(path, name) for path, name in chosen])


def open_finished(folder: Path, name: str) -> History:
    """A finished run, with the fingerprints of its tokens among its settings."""
    run = open_history(folder, name)
    if not run.finished or run.bits_per_byte is None:
        raise ValueError(f"{folder} is not finished ({run.state}): resume it by the command that "
                         f"started it, or name other runs.")
    saved = store.list_checkpoints(folder / "checkpoints")
    if saved:
        fingerprints = flat(saved[-1].state["settings"])
        run.settings.update((key, fingerprints.get(key)) for key in FINGERPRINTS)
    return run


def check(arms: Arms, metric: str) -> None:
    """Raise ValueError for arms that cannot be compared; say what else differs."""
    if len(arms) < 2:
        raise too_few([*arms])
    # The first arm against each of the others: comparable texts, tokens and seeds?
    (first, runs), *others = arms.items()
    one = next(iter(runs.values())).settings
    for name, of_name in others:
        other = next(iter(of_name.values())).settings
        # The same validation text, and for losses per token the same tokens.
        differing = text_differences(one, other)
        if differing:
            raise ValueError(f"{first} and {name} were validated on different texts "
                             f"({', '.join(differing)}): their results cannot be compared. "
                             f"python eval.py run=A,B data.path=FILE measures both on one text.")
        same_tokenizer = all(one.get(key) == other.get(key) for key in TOKENIZER)
        if metric == "val_loss" and not same_tokenizer:
            raise ValueError(f"{first} and {name} have different tokenizers, so losses per token "
                             f"cannot be compared: use metric=bits_per_byte, without "
                             f"rule=speedrun.")
        # Something besides the seed must differ, or the seeds themselves.
        if not differing_settings([one | {"seed": 0}, other | {"seed": 0}]):
            if runs.keys() & of_name.keys():
                raise identical(first, name)
            say(f"{first} and {name} have the same settings, with other seeds.")
    # More steps alone give a lower loss.
    if len({steps_of(runs) for runs in arms.values()}) > 1:
        steps = ", ".join(f"{name} {steps_of(runs)}" for name, runs in arms.items())
        say(f"The arms were trained for different numbers of steps: {steps}.")


def too_few(names: list[str]) -> ValueError:
    return ValueError(f"Two arms are needed, not {len(names)}: name recipes, such as optim=adamw "
                      f"optim=muon, or runs.")


def text_differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """How the validation texts of two runs differ, from their flat settings."""
    differing = {key for key in differences(one, other)
                 if key.startswith("data.") or key == "training.eval_tokens"}
    # Equal fingerprints of the tokens mean the same text, which can have several paths; different
    # ones with equal settings mean another content.
    if differing == {"data.prepared"}:
        return ["the content of the text"]
    if one.get("data.prepared") and "data.prepared" not in differing:
        return sorted(differing & {"training.eval_tokens"})
    if one.get("data.val_path"):
        differing -= set(TRAINING_TEXT)
    return sorted(differing - set(NOT_THE_TEXT))


def steps_of(runs: dict[int, History]) -> str:
    """The number of steps of the runs of an arm, or its range."""
    steps = sorted({run.reached[0] for run in runs.values()})
    if len(steps) == 1:
        return counted(steps[0], "step")
    return f"{steps[0]:,} to {steps[-1]:,} steps"


def results_of(runs: dict[int, History], metric: str) -> comparison.Results:
    """The lowest validation result of each seed."""
    attribute = "best_loss" if metric == "val_loss" else "bits_per_byte"
    return {seed: getattr(run, attribute) for seed, run in runs.items()}


def speedrun(first: str, second: str, arms: Arms) -> str:
    """The answer by the rule of modded-nanogpt's track 3."""
    losses, steps, seeds = [], [], []
    for name in (first, second):
        results = results_of(arms[name], "val_loss")
        comparison.refuse_diverged(name, results)
        losses.append(fmean(results.values()))
        steps.append(fmean(run.reached[0] for run in arms[name].values()))
        seeds.append(len(results))
    score = comparison.speedrun_score(losses, steps, seeds)
    needed = comparison.SPEEDRUN_SCORE
    verdict = "is better than" if score >= needed else "is not shown to be better than"
    return (f"{second} {verdict} {first} by the rule of modded-nanogpt's track 3: its score is "
            f"{score:.4f}, and {needed} is needed.")
