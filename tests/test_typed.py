"""Prompts that a user types: commands, several lines, and what a pipe may contain."""

from __future__ import annotations

import io
import sys

import pytest

from conf.sampling import SamplingConfig
from generation.prompts import TypedPrompts, changed
from sample import for_each_prompt


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def typed(monkeypatch):
    """The prompts in what a user types, and the prompts' object."""
    def read(text, stream=Terminal):
        monkeypatch.setattr(sys, "stdin", stream(text))
        prompts = TypedPrompts("prompt> ", SamplingConfig())
        return list(prompts), prompts
    return read


def test_settings_change_until_the_end_of_the_session(typed, capsys):
    found, prompts = typed("a\n/settings top_k=3 stop='x y'\n/settings\nb\n")
    assert found == ["a", "b"]
    assert (prompts.rules.top_k, prompts.rules.stop) == (3, "x y")
    assert capsys.readouterr().out.count("top_k=3\n") == 2


def test_a_prompt_may_have_several_lines(typed):
    assert typed('"""a\n b\n\n/settings"""\n"""one"""\n"""\nc\n"""\n')[0] == ["a\n b\n\n/settings", "one", "c\n"]


def test_only_commands_are_commands(typed):
    lines = ["/usr/bin", "/setting top_k=3", " settings", "/help me"]
    found, prompts = typed("\n".join(lines))
    assert found == lines[:3] and prompts.rules == SamplingConfig()


def test_each_line_of_a_pipe_is_a_prompt(typed, capsys):
    assert typed('/settings top_k=3\n"""a\n', io.StringIO)[0] == ["/settings top_k=3", '"""a']
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("override", "problem"), [
    ("top_p=2", "top_p=2.0 must be at most 1"), ("top_k", "top_k does not set one of"), ("cache=false", "cache=false does not set"),
    ("topk=3", r"did you mean top_k\?"), ("seed=1.5", "seed=1.5 is not a whole number"), ("seed=", "seed= is not a whole number")])
def test_a_wrong_setting_is_refused_and_changes_nothing(override, problem, typed, capsys):
    with pytest.raises(ValueError, match=problem):
        changed(SamplingConfig(), [override])
    assert typed(f"/settings {override}\n/settings '\n")[1].rules == SamplingConfig()
    assert capsys.readouterr().out.count("Error: ") == 2


def test_ctrl_c_stops_a_text_only_in_a_terminal(monkeypatch):
    def interrupt(prompt, rules):
        raise KeyboardInterrupt

    for stream, goes_on in ((Terminal, True), (io.StringIO, False)):
        stopped = False
        try:
            monkeypatch.setattr(sys, "stdin", stream("a\n"))
            for_each_prompt("> ", SamplingConfig(), interrupt)
        except KeyboardInterrupt:
            stopped = True
        assert stopped != goes_on
