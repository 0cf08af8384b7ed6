"""Every page that a user reads: links lead somewhere, commands are the program's, and the site has all of them."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from command_line import options
from documents import PAGES, ROOT, anchors, commands, page

from mlaconvert.evaluation import verdict
from mlaconvert.evaluation.drift import STATISTICS
from mlaconvert.evaluation.figures import FIGURES

BUILD = runpy.run_path(str(ROOT / "docs" / "build.py"), run_name="build")
FOREIGN = {"--mode"}  # VBench's
SITE = [name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")]


@pytest.mark.parametrize("name", PAGES)
def test_local_links_resolve(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        path, _, anchor = target.partition("#")
        if "://" not in target:
            found = ((ROOT / name).parent / path).resolve() if path else ROOT / name
            assert found.exists(), target
            if found.parent == ROOT / "docs":  # a page whose text lies elsewhere
                found = ROOT / BUILD["ELSEWHERE"].get(found.name, found.relative_to(ROOT))
            assert not anchor or anchor in anchors(found.read_text("utf-8")), target


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_their_options_exist(name: str) -> None:
    for command, *words in commands(page(name)):
        if not command.startswith("-"):
            found = {word.split("=")[0] for word in words if word.startswith("--")}
            assert options()[command].issuperset(found), (command, words)


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{name}" for name in SITE)])
def test_options_named_in_the_text_exist(name: str) -> None:
    """But those of other programs, whose names have underscores as a rule."""
    named = set(re.findall(r"`(--[a-z-]+)(?![a-z_-])", page(name)))
    assert not named.difference(FOREIGN, *options().values())


def leaves(nav: object) -> list[str]:
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    return [leaf for part in (nav.values() if isinstance(nav, dict) else nav) for leaf in leaves(part)]  # type: ignore[attr-defined]


def test_the_site_has_every_page_once() -> None:
    found = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(found) == sorted(SITE)


def test_the_reference_has_every_room() -> None:
    rooms = {path.parent.name for path in (ROOT / "mlaconvert").glob("*/__init__.py")} - {"cli"}
    assert {Path(name).stem for name in SITE if name.startswith("api/")} == rooms | {"index"}
    for room in rooms:
        assert f"\n::: mlaconvert.{room}\n" in page(f"docs/api/{room}.md")


def test_the_reading_guide_has_the_limits_of_the_verdict() -> None:
    row = next(line for line in page("docs/evaluation.md").splitlines() if line.startswith("| close |"))
    assert re.findall(r"[\d.]+", row) == [
        f"{100 * verdict.CLOSE_VELOCITY:g}",
        f"{100 * verdict.CLOSE_EXCESS:g}",
        f"{verdict.NEAR_DISTANCE:g}",
        f"{100 * verdict.NEAR_STATISTIC:g}",
    ]


def test_the_evaluations_figures_are_all_explained() -> None:
    """Each row of the table that `evaluate` prints is named in the guide."""
    lines = [line for figure in FIGURES for line in figure.lines if line.summary]
    names = {line.summary for line in lines if "{" not in line.summary}
    names |= {f"rollout, {name}" for name in STATISTICS}
    assert len(names) > 10
    assert {name for name in names if name not in page("docs/evaluation.md")} == set()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("zensical") is None or find_spec("mkdocstrings") is None, reason="the extra docs")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "docs" / "build.py", tmp_path / "site"], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert "No issues found" in made.stdout + made.stderr
    pages = {
        path.relative_to(tmp_path / "site").as_posix(): path.read_text() for path in (tmp_path / "site").rglob("*.html")
    }
    assert set(pages) >= {name.replace(".md", ".html") for name in SITE}
    assert "--kv-ranks" in pages["cli.html"]
    assert "Peak of anonymous memory" in pages["benchmarks.html"]
    assert 'id="mlaconvert.healing.run.heal"' in pages["api/healing.html"]
    for name, text in pages.items():  # nothing is loaded from elsewhere
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="?(https?://[^" >]+)', text)
        loaded += re.findall(r'<link[^>]*rel="?stylesheet"?[^>]*href="?(https?://[^" >]+)', text)
        assert loaded == [], name


def test_links_of_pages_from_elsewhere_lead_to_the_site() -> None:
    moved = BUILD["moved"]
    text = "[a](docs/files.md#x) [b](benchmarks/README.md) [c](LICENSE) [d](https://a.b/c) [e](#f)"
    assert moved(text, "BENCHMARKS.md") == "[a](files.md#x) [b](measuring.md) c [d](https://a.b/c) [e](#f)"
    assert moved("[a](../docs/files.md) [b](../BENCHMARKS.md#x)", "benchmarks/README.md") == (
        "[a](files.md) [b](benchmarks.md#x)"
    )
