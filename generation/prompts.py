"""Prompts: from a file, and typed, with editing and history, over several lines, with commands."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from conf.convert import freeze
from conf.hints import closest
from conf.sampling import FIXED, SamplingConfig
from terminal import output, readable_size, say

MAX_BYTES = 2**24  # of a file of prompts
# The settings that can change between two prompts.
CHANGEABLE = [one.name for one in fields(SamplingConfig) if one.name not in FIXED]
BLOCK = '"""'
HELP = f"""\
/settings                    show the settings of sampling
/settings temperature=0.5    change one or several, until the end of the session
/help                        show this
{BLOCK} begins and ends a prompt of several lines. Ctrl-C stops a text, Ctrl-D ends the session."""


def read_text(name: str, path: str) -> str:
    """The text of a file, or of standard input for `-`; line endings stay as they are.

    `name` is the setting that named it. Raises ValueError if it is too large, not UTF-8, or not a
    file that can be read.
    """
    if path == "-":
        content = sys.stdin.buffer.read(MAX_BYTES + 1)
    elif Path(path).is_dir():
        raise ValueError(f"{name}={path} is a folder: name a file.")
    else:
        # Without O_NONBLOCK, opening a named pipe waits for a writer, perhaps forever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(handle, True)
        with open(handle, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    if not content and Path(path).is_fifo():
        raise ValueError(f"{name}={path} is a pipe that nothing was written to: start its writer "
                         "first.")
    if len(content) > MAX_BYTES:
        raise ValueError(f"{name}={path} holds more than {readable_size(MAX_BYTES)}: choose a "
                         "smaller file.")
    try:
        # Some editors write a byte order mark.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}={path} is not UTF-8 at offset {error.start}: save it as "
                         "UTF-8.") from None


class TypedPrompts:
    """Iterates over the prompts that a user types, each after `mark`, until the end of the input.

    In a terminal, lines can be edited and called up again, and commands change `rules`. From a
    pipe, each line is a prompt as it is.
    """

    def __init__(self, mark: str, rules: SamplingConfig) -> None:
        self.mark, self.rules = mark, rules
        self.in_terminal = sys.stdin.isatty()
        if self.in_terminal:
            # Python may have been built without readline, which edits lines and calls them up.
            with suppress(ImportError):
                import readline

                # A tabulator is a part of the prompt. Otherwise it would complete a file's name.
                readline.parse_and_bind("tab: self-insert")
        # A notebook's stream has no such method.
        if hasattr(sys.stdin, "reconfigure"):
            # Bytes that are not UTF-8 become characters that the tokenizer refuses with a message.
            sys.stdin.reconfigure(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        while True:
            try:
                typed = self.read()
            except EOFError:
                if self.in_terminal:
                    output("")
                return
            except KeyboardInterrupt:
                output("")
                raise
            if not self.in_terminal or not self.is_command(typed):
                yield typed

    def read(self) -> str:
        """A line, or the lines between two BLOCK. Raises EOFError at the end of the input."""
        if self.in_terminal:
            output("")
        # A single line, or the first of several.
        line = input(self.mark if self.in_terminal else "")
        if not self.in_terminal or not line.startswith(BLOCK):
            return line
        text = line.removeprefix(BLOCK)
        while not text.endswith(BLOCK):
            text += "\n" + input("... ")
        return text.removesuffix(BLOCK).removeprefix("\n")

    def is_command(self, typed: str) -> bool:
        """Run a command. Returns False for any other text, such as a path."""
        command, _, words = typed.strip().partition(" ")
        if command == "/help":
            say(HELP)
        elif command == "/settings":
            try:
                self.rules = changed(self.rules, shlex.split(words))
            except ValueError as error:
                say(f"Error: {error}")
            else:
                say("\n".join(f"{name}={getattr(self.rules, name)}" for name in CHANGEABLE))
        else:
            return False
        return True


def changed(rules: SamplingConfig, overrides: list[str]) -> SamplingConfig:
    """The settings with overrides such as "top_k=20". Raises ValueError if one is invalid."""
    values = {}
    for override in overrides:
        name, equals, value = override.partition("=")
        if name not in CHANGEABLE or not equals:
            raise ValueError(f"{override} does not set one of {', '.join(CHANGEABLE)}"
                             f"{closest(name, CHANGEABLE)}.")
        values[name] = value
    problems: list[str] = []
    new = freeze(type(rules), vars(rules) | values, "", problems)
    for problem in [*problems, *new.problems()]:
        raise ValueError(problem)
    return new
