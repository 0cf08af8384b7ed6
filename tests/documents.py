"""The Markdown pages, their code blocks and commands, for the tests that run them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What a user reads, by its path in the repository.
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "examples/*.md", "benchmarks/*.md", "comfyui/*.md")
    for path in ROOT.glob(pattern)
)


def page(name: str) -> str:
    """The text of a page, by its path in the repository."""
    return (ROOT / name).read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell_lines(text: str) -> list[list[str]]:
    """The words of every command in the page's bash blocks, in order; continued lines are one."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
    return [words for line in re.split(r"\n|&&", lines) if (words := shlex.split(line, comments=True))]


def commands(text: str) -> list[list[str]]:
    """Arguments of every `mlaconvert` call that a page shows, in code blocks and in running text."""
    inline = [shlex.split(line, comments=True) for line in re.findall(r"`(mlaconvert [^`\n]+)`", text)]
    shown = [words for words in (*shell_lines(text), *inline) if "mlaconvert" in words[:-1]]
    return [words[words.index("mlaconvert") + 1 :] for words in shown]


def anchors(text: str) -> set[str]:
    """Where links into a page may lead: its headings, as GitHub and the site name them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
