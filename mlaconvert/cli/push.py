"""mlaconvert push"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlaconvert.cli.options import Json
from mlaconvert.cli.show import console, print_json, progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from mlaconvert.publishing.plan import PushPlan


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A converted model folder, healed or not.", show_default=False)
    ],
    repo: Annotated[
        str,
        typer.Argument(metavar="USER/REPO", help="The model's name on the Hugging Face Hub.", show_default=False),
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Create it visible to everybody, or update one that is.")
    ] = False,
    update: Annotated[bool, typer.Option("--update", help="Change a model that is on the Hub already.")] = False,
    license: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Licence, such as apache-2.0. Default: the base model's on the Hub."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="USER/REPO", help="Base model on the Hub. Default: the one it was converted from."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files, print the card, and change nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish a converted model on the Hugging Face Hub, with a generated model card, in one commit."""
    from mlaconvert.publishing import hub

    out, err = console(), console(stderr=True)
    show = out if dry_run and not as_json else err
    with progress_bar(err) as progress:
        report = hub.push(
            folder,
            repo,
            public=public,
            update=update,
            dry_run=dry_run,
            stated=hub.Stated(license=license, base_model=base_model),
            listener=hub.PushListener(on_plan=lambda plan: _print_plan(show, plan), progress=progress),
        )
    if as_json:
        print_json(report.plan.to_json() | {"commit_url": report.commit_url})
    if dry_run:
        if not as_json:
            typer.echo(f"\n{report.plan.card}", nl=False)
        err.print("dry run: nothing was sent")
    elif report.commit_url is None:
        err.print(f"{repo} holds all of this already: nothing to do", markup=False)
    elif not as_json:
        typer.echo(report.commit_url)


def _print_plan(console: Console, plan: PushPlan) -> None:
    """Every file with its size and what becomes of it, and the remarks."""
    from mlaconvert.units import format_bytes

    known = {None: "not logged in, so not compared with the Hub", True: "on the Hub", False: "will be created"}
    lines = [f"{plan.repo} ({'private' if plan.private else 'public'}, {known[plan.exists]})"]
    lines += [f"  {file.state:8}{format_bytes(file.size):>9}  {file.path}" for file in plan.files]
    lines += [f"  left out           {name}" for name in plan.left_out]
    lines.append(f"  to send {format_bytes(plan.upload_bytes)}")
    lines += [f"note: {note}" for note in plan.notes]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
