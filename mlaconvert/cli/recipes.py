"""mlaconvert recipes"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlaconvert.cli.help import GroupedCommand
from mlaconvert.cli.options import Json, among
from mlaconvert.cli.show import console, print_json, print_tables
from mlaconvert.files.shipped import RECIPE_KINDS, recipe_file, recipe_folder, recipe_names

recipes = typer.Typer(no_args_is_help=True, help="List, show and copy the recipes that ship: settings in a YAML file.")


def _every_name(incomplete: str) -> list[str]:
    return among(*(name for kind in RECIPE_KINDS for name in recipe_names(recipe_folder() / kind)))(incomplete)


Name = Annotated[
    str, typer.Argument(metavar="NAME", autocompletion=_every_name, help="A shipped recipe.", show_default=False)
]


@recipes.command(name="list", cls=GroupedCommand)
def list_recipes(as_json: Json = False) -> None:
    """List the shipped recipes, with the command that each is for."""
    found = [(name, kind) for kind in RECIPE_KINDS for name in recipe_names(recipe_folder() / kind)]
    if as_json:
        print_json([{"name": name, "command": RECIPE_KINDS[kind], "about": _about(name)} for name, kind in found])
        return
    from rich.table import Table

    table = Table(title="Shipped recipes", caption="mlaconvert COMMAND ... --recipe NAME", caption_justify="left")
    table.add_column("recipe", no_wrap=True)
    table.add_column("command", no_wrap=True)
    table.add_column("what it is")
    for name, kind in found:
        table.add_row(name, RECIPE_KINDS[kind], _about(name))
    print_tables(console(), table)


@recipes.command(cls=GroupedCommand)
def show(name: Name) -> None:
    """Print a recipe as it is."""
    typer.echo(recipe_file(name).read_text("utf-8"), nl=False)


@recipes.command(cls=GroupedCommand)
def copy(
    name: Name,
    output: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="File to write, to change it. Default: NAME.yaml here.", show_default=False
        ),
    ] = None,
) -> None:
    """Copy a recipe into a file of your own; an existing one is never replaced."""
    from mlaconvert.errors import OutputError

    source, target = recipe_file(name), output or Path(f"{name}.yaml")
    try:
        with target.open("x", encoding="utf-8") as stream:
            stream.write(source.read_text("utf-8"))
    except FileExistsError:
        raise OutputError(f"{target} exists; name another file") from None
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror}); name another file") from None
    console(stderr=True).print(f"written to {target}", markup=False, soft_wrap=True)


def _about(name: str) -> str:
    """The comment that a recipe begins with, up to its first full stop."""
    lines = []
    for line in recipe_file(name).read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines).split(". ", maxsplit=1)[0].rstrip(".")
