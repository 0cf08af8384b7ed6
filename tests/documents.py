"""Code blocks and commands of the Markdown pages, and the options that there are, for the tests that hold them."""

from __future__ import annotations

import re
import shlex
from functools import cache

from typer.main import get_command

from mlaconvert.cli import app


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell_lines(text: str) -> list[list[str]]:
    """The words of every command in the page's bash blocks, in order; continued lines are one."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
    return [words for line in re.split(r"\n|&&", lines) if (words := shlex.split(line, comments=True))]


@cache
def options() -> dict[str, frozenset[str]]:
    """The options that each command's parser takes, and under "" those before a command. Help texts are no proof of
    one: they name other options too, and `--kv-rank` is the beginning of `--kv-ranks`."""
    root = get_command(app)
    commands = {"": root, **root.commands}  # type: ignore[attr-defined]
    return {
        name: frozenset(
            ("--help", *(o for parameter in command.params for o in (*parameter.opts, *parameter.secondary_opts)))
        )
        for name, command in commands.items()
    }
