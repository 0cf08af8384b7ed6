"""Code blocks and commands of the Markdown pages, for the tests that run them."""

from __future__ import annotations

import re
import shlex


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell_lines(text: str) -> list[list[str]]:
    """The words of every command in the page's bash blocks, in order; continued lines are one."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
    return [words for line in re.split(r"\n|&&", lines) if (words := shlex.split(line, comments=True))]
