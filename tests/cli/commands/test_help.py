"""--help: commands in the order of the work, options in groups, examples that exist; and the recipes that ship."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml
from command_line import invoke, options, succeed

from mlaconvert.cli.help import EXAMPLES, GROUPS
from mlaconvert.files.shipped import recipe_file, recipe_folder


def test_commands_stand_in_the_order_of_the_work() -> None:
    text = succeed("--help").stdout
    names = (
        "demo",
        "analyze",
        "encode",
        "convert",
        "evaluate",
        "heal",
        "generate",
        "push",
        "recipes",
        "sweep",
        "bench",
    )
    places = [text.index(f"│ {name} ") for name in names]
    assert places == sorted(places)
    assert set(names) == options().keys() - {""}


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_ends_with_two_examples_of_options_that_exist(command: str) -> None:
    shown = " ".join(succeed(command, "--help").stdout.split())
    assert len(EXAMPLES[command]) == 2
    assert shown.endswith("Examples: " + " ".join(EXAMPLES[command]))
    for line in EXAMPLES[command]:
        program, name, *words = shlex.split(line)
        assert (program, name) == ("mlaconvert", command)
        assert options()[command].issuperset(word for word in words if word.startswith("-") and word != "-o"), line


def test_every_option_stands_in_one_group() -> None:
    """Under a heading of its own, never under Typer's, where only --help is left."""
    named = [name for names in GROUPS.values() for name in names.split()]
    assert len(named) == len(set(named))
    for command in EXAMPLES.keys() - {"recipes"}:
        text = succeed(command, "--help").stdout
        rest = text.partition("─ Options ─")[2].partition("╰")[0]
        assert set(shlex.split(rest.replace("│", " "))) & options()[command] == {"--help"}, command
        titles = [title for title in GROUPS if f"─ {title} ─" in text]
        assert [text.index(f"─ {title} ─") for title in titles] == sorted(text.index(f"─ {t} ─") for t in titles)


def test_recipes_are_listed_shown_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = sorted(path.relative_to(recipe_folder()) for path in recipe_folder().rglob("*.yaml"))
    listed = json.loads(succeed("recipes", "list", "--json").stdout)
    commands = {"heal": "heal", "sweep": "sweep", ".": "convert"}
    assert sorted((row["name"], row["command"]) for row in listed) == sorted(
        (path.stem, commands[str(path.parent)]) for path in files
    )
    assert all(row["about"] for row in listed)
    table = succeed("recipes", "list").stdout
    assert all(row["name"] in table for row in listed)
    for name in ("tiny", "videomla-dmd", "tiny-splits"):
        text = recipe_file(name).read_text("utf-8")
        assert succeed("recipes", "show", name).stdout == text
        succeed("recipes", "copy", name)
        assert (tmp_path / f"{name}.yaml").read_text("utf-8") == text
    again = invoke("recipes", "copy", "tiny", "tiny-dmd.yaml")
    assert again.exit_code == 0
    mine = yaml.safe_load((tmp_path / "tiny-dmd.yaml").read_text("utf-8"))
    assert mine == yaml.safe_load(recipe_file("tiny").read_text("utf-8"))
    refused = invoke("recipes", "copy", "tiny")
    assert refused.exit_code == 2
    assert "tiny.yaml exists; name another file" in refused.stderr
    assert invoke("recipes", "copy", "tiny", "nowhere/tiny.yaml").exit_code == 2
