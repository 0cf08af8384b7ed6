"""Build the documentation as a site.

    pip install -e '.[docs]'
    python docs/build.py            # into the folder `site`; python docs/build.py DIR into another

Three pages are made while it is built: the command line's help, and two that lie elsewhere in the repository. All is
done on a copy of docs/, so the working tree stays as it is. A broken link fails the build.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

from mlaconvert.cli import app

ROOT = Path(__file__).parents[1]
# Pages of the site that stand elsewhere in the repository; in docs/ they are a line with a link.
ELSEWHERE = {"benchmarks.md": "BENCHMARKS.md", "measuring.md": "benchmarks/README.md"}
PAGES = {file: page for page, file in ELSEWHERE.items()}


def command_line() -> str:
    """Every command with its options, as Markdown."""
    root: Any = get_command(app)
    text = get_docs_for_click(obj=root, ctx=typer.Context(root), name="mlaconvert")
    # Its title is the page's, and its list of commands is cut short; examples are code.
    text = text.replace("# `mlaconvert`\n", "", 1)
    text = re.sub(r"^\*\*Commands\*\*:\n\n(?:\* .*\n)+", "", text, flags=re.MULTILINE)
    return re.sub(
        r"^Examples:((?:\n\nmlaconvert .*)+)",
        lambda match: "**Examples**:\n\n```bash\n" + re.sub(r"\n\n", "\n", match[1]).strip() + "\n```",
        text,
        flags=re.MULTILINE,
    )


def moved(text: str, file: str) -> str:
    """The text of a `file` of the repository with links that lead to pages of the site; others become their words."""

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match.group()
        path, mark, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
        page = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        return words if page is None else f"[{words}]({page}{mark}{anchor})"

    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", link, text)


def build(site: Path) -> int:
    """Write the site into the folder `site`; the exit code of what builds it."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        shutil.copytree(ROOT / "docs", place / "docs", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        shutil.copy(ROOT / "mkdocs.yml", place)
        with (place / "docs" / "cli.md").open("a", encoding="utf-8") as page:
            page.write(command_line())
        for name, file in ELSEWHERE.items():
            (place / "docs" / name).write_text(moved((ROOT / file).read_text("utf-8"), file), "utf-8")
        code = subprocess.run(
            [sys.executable, "-m", "zensical", "build", "--strict"], cwd=place, check=False
        ).returncode
        if code == 0:
            shutil.copytree(place / "site", site, dirs_exist_ok=True)
        return code


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1] if len(sys.argv) > 1 else "site")))
