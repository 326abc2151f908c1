"""What a run tells: metrics on disk, W&B as a copy that may fail."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import atomic
from training.config import LoggerConfig
from training.recorder import Recorder
from training.wandb_copy import wandb_mode

ROOT = Path(__file__).parent.parent


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_and_messages_go_to_the_runs_folder(tmp_path, capsys):
    with Recorder(tmp_path, 0, 3, LoggerConfig(), {"name": "x"}) as recorder:
        recorder.say("hello")
        recorder.record(1, loss=2.5)
        recorder.progress(1, loss="2.5")
        assert rows(tmp_path) == [{"step": 1, "loss": 2.5}]  # at once, not when the run ends
    assert "hello" in capsys.readouterr().out and (tmp_path / "log.txt").read_text() == "hello\n"


def test_resuming_removes_metrics_after_the_checkpoint(tmp_path):
    with Recorder(tmp_path, 0, 9, LoggerConfig(), {}) as recorder:
        for step in range(1, 6):
            recorder.record(step, loss=step)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # a line that a kill cut short
    with Recorder(tmp_path, 3, 9, LoggerConfig(), {}) as recorder:
        recorder.record(4, loss=40)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_cutting_back_drops_damaged_lines_and_keeps_losses(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 3.0}\n{"loss": 1}\n\xff\n[1]\n"step"\n{"step": 2, "loss": 2.0}\n{"step": 3}\n'
                                           b'{"step": 1, "loss": {"a": 1}}\n{"step": 1, "loss": 1' + b"0" * 400 + b"}\n" + b"[" * 100_000 + b"\n")
    with Recorder(tmp_path, 2, 9, LoggerConfig(), {}) as recorder:
        assert list(recorder.recent) == [3.0, 2.0]
        recorder.cut_back(1)
        assert list(recorder.recent) == [3.0] and recorder.bar.n == 1
    assert rows(tmp_path) == [{"step": 1, "loss": 3.0}]
    assert (tmp_path / "log.txt").read_text() == f"{tmp_path}/metrics.jsonl had 7 damaged lines, removed now.\n"


def test_a_closed_terminal_does_not_stop_a_run(tmp_path, monkeypatch):
    class Closed:
        def __getattr__(self, name):
            raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))

    with Recorder(tmp_path, 0, 9, LoggerConfig(), {}) as recorder:
        monkeypatch.setattr(sys, "stdout", Closed())
        recorder.say("words")
        monkeypatch.undo()
    assert (tmp_path / "log.txt").read_text() == "words\n"


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_links_in_a_run_do_not_overwrite_other_files(tmp_path, name):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        Recorder(tmp_path / "run", 0, 9, LoggerConfig(), {})
    assert (tmp_path / "precious").read_text() == "mine"


def test_samples_are_printed_and_cut_back_with_the_metrics(tmp_path, capsys):
    with Recorder(tmp_path, 0, 9, LoggerConfig(), {}) as recorder:
        for step in (2, 4):
            recorder.record(step, loss=1.0)
            recorder.sample(step, f"text\nof {step}")
    assert "  'text\\nof 4'" in capsys.readouterr().out and rows(tmp_path)[3] == {"step": 4, "sample": "text\nof 4"}
    with Recorder(tmp_path, 3, 9, LoggerConfig(), {}) as recorder:
        assert recorder.samples == [(2, "text\nof 2")] and list(recorder.recent) == [1.0]
    assert [row["step"] for row in rows(tmp_path)] == [2, 2]


@pytest.mark.parametrize("loss, shown", [(4.3085, "74.33"), (39334.4539, "1.01e+304")])
def test_a_perplexity_has_few_digits(tmp_path, capsys, loss, shown):
    with Recorder(tmp_path, 0, 9, LoggerConfig(), {}) as recorder:
        recorder.record_validation(1, loss, 4.0)
    assert f"perplexity {shown}, " in capsys.readouterr().out


def test_nan_and_infinity_are_null_in_json(tmp_path):
    with Recorder(tmp_path, 0, 9, LoggerConfig(), {}) as recorder:
        recorder.record(1, loss=float("inf"), gradient_norm=float("nan"), skipped=True)
    assert rows(tmp_path) == [{"step": 1, "loss": None, "gradient_norm": None, "skipped": True}]


def test_metrics_are_written_in_order_after_a_full_disk(tmp_path, monkeypatch):
    class Full:
        def __getattr__(self, name):
            return getattr(os, name)

        def write(self, handle, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Recorder(tmp_path, 0, 9, LoggerConfig(), {}) as recorder:
        recorder.record(1, loss=1.0)
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "os", Full())
            recorder.record(2, loss=2.0)
            recorder.say("words")
            with pytest.raises(OSError, match=r"metrics.jsonl takes no more lines \(No space left"):
                recorder.sync()
        recorder.sync()
        assert [row["step"] for row in rows(tmp_path)] == [1, 2]
        recorder.record(3, loss=3.0)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


class FakeWandb(types.ModuleType):
    """The part of wandb that the recorder uses; `broken` names the call that raises, or the mode that cannot start."""

    def __init__(self, broken="", key=True):
        super().__init__("wandb")
        self.broken, self.key, self.inits, self.logged = broken, key, [], []
        self.Settings = lambda **settings: settings
        self.setup = lambda settings: None
        self.teardown = lambda: None

    def login(self, prompt, verify):
        assert not prompt and not verify
        return self.key

    def init(self, **arguments):
        self.inits.append(arguments)
        self._break("init")
        self._break(arguments["mode"])
        return self

    def define_metric(self, *names, **how):
        self.defined = (names, how)

    def log(self, values):
        self._break("log")
        self.logged.append(values)

    def finish(self):
        self._break("finish")

    def _break(self, call):
        if call == self.broken:
            raise ConnectionError("the server\nis down")


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_wandb_failure_is_one_warning_and_the_run_goes_on(tmp_path, monkeypatch, capsys, broken):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(broken))
    with Recorder(tmp_path, 0, 3, LoggerConfig(wandb="online"), {"name": "x"}) as recorder:
        recorder.record(1, loss=1.0)
        recorder.record(2, loss=1.0)
    said = capsys.readouterr().out
    assert said.count("Warning") == 1 and "the server" in said and "Traceback" not in said
    assert len(rows(tmp_path)) == 2


@pytest.mark.parametrize(("fake", "reason", "inits"), [
    (FakeWandb(key=False), "no API key", 1), (FakeWandb(broken="online"), "ConnectionError: the server", 2)], ids=["no key", "no server"])
def test_wandb_that_cannot_be_online_is_recorded_offline(tmp_path, monkeypatch, capsys, fake, reason, inits):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with Recorder(tmp_path / "a run", 0, 3, LoggerConfig(wandb="online"), {"name": "x"}) as recorder:
        recorder.record(1, loss=1.0)
    [said] = capsys.readouterr().out.splitlines()
    assert reason in said and said.endswith(f"wandb sync '{tmp_path}/a run'/wandb/offline-run-*")
    assert [start["mode"] for start in fake.inits] == ["online", "offline"][-inits:] and fake.logged == [{"step": 1, "loss": 1.0}]
    assert len({start["id"] for start in fake.inits}) == 1


@pytest.mark.parametrize(("asked", "setting", "mode"), [
    ("offline", "online", "offline"), ("disabled", "online", "disabled"), ("disabled", "offline", "disabled"), ("online", "offline", "offline"),
    ("online", "disabled", "disabled"), ("dryrun", "online", "offline"), ("OFFLINE", "online", "offline"), ("", "online", "online"), ("strange", "online", "online")])
def test_the_environment_can_make_wandb_send_less(monkeypatch, asked, setting, mode):
    monkeypatch.setenv("WANDB_MODE", asked)
    assert wandb_mode(setting) == mode


def test_a_missing_wandb_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Recorder(tmp_path, 0, 3, LoggerConfig(wandb="offline"), {"name": "x"}) as recorder:
        recorder.record(1, loss=1.0)
    assert "pip install wandb" in capsys.readouterr().out and len(rows(tmp_path)) == 1


def test_a_resumed_run_continues_the_same_wandb_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (0, 1):
        with Recorder(tmp_path, step, 3, LoggerConfig(wandb="offline"), {"name": "x"}) as recorder:
            recorder.record(step + 1, loss=1.0)
    first, second = (arguments["id"] for arguments in fake.inits)
    assert first == second
    assert [values["step"] for values in fake.logged] == [1, 2] and fake.defined == (("*",), {"step_metric": "step"})


def records(path):
    """What a .wandb file holds: a header of 7 bytes, then LevelDB's log format (blocks of 32 KiB) around protobuf."""
    from wandb.proto import wandb_internal_pb2

    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place:place + 7])
        whole += content[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


OFFLINE_START = """
import sys
from pathlib import Path
from training.config import LoggerConfig
from training.recorder import Recorder

folder, start = Path(sys.argv[1]), int(sys.argv[2])
logger = LoggerConfig(wandb="offline", group="lrs", tags="sweep small")
with Recorder(folder, start, 9, logger, {"name": "x", "seed": 5}) as recorder:
    assert recorder.wandb.run is not None
    for step in (start + 1, start + 2, start + 3):  # the third was not saved: the resumed run repeats it
        recorder.record(step, loss=float(step), tokens=10 * step)
    recorder.sample(start + 2, f"text of {start + 2}")
"""


@pytest.mark.slow
def test_offline_wandb_continues_a_resumed_run(tmp_path):
    """Read back from what W&B wrote, which is what `wandb sync` sends: one id, each step, the settings."""
    pytest.importorskip("wandb")
    for start in (0, 2):  # each in a process of its own, with whose end W&B's writer is done
        time.sleep(1.1)  # W&B names its folders by the second; no two processes of a run begin in the same one
        subprocess.run([sys.executable, "-c", OFFLINE_START, str(tmp_path), str(start)], cwd=ROOT, check=True)
    run_id = json.loads((tmp_path / "wandb.json").read_text())["id"]
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    found = [record for path in files for record in records(path)]
    assert {(record.run.run_group, *record.run.tags) for record in found if record.run.run_id} == {("lrs", "sweep", "small")}
    assert len(files) == 2 and {record.run.run_id for record in found if record.run.run_id} == {run_id}
    rows = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for record in found if record.history.item]
    tables = [json.loads(path.read_text()) for path in sorted((tmp_path / "wandb").glob("offline-run-*/files/media/table/*.json"))]
    assert [table["columns"] for table in tables] == [["step", "sample"]] * 2
    assert [table["data"] for table in tables] == [[[2, "text of 2"]], [[2, "text of 2"], [4, "text of 4"]]]  # the second start sends all
    rows = [row for row in rows if "loss" in row]
    assert [(row["step"], row["loss"], row["tokens"]) for row in rows] == [(s, s, 10 * s) for s in (1, 2, 3, 3, 4, 5)]
    assert any(item.key == "seed" and item.value_json == "5" for record in found for item in record.run.config.update)
    metrics = [record.metric for record in found if record.HasField("metric")]
    assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in metrics)
