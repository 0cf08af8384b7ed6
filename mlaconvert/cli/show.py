"""Consoles, progress and JSON of all commands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from mlaconvert.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, quiet=quiet)


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2))


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A progress bar for each stage on a terminal, with the time that is left; nothing elsewhere.

    The note, such as a rate, stands at the end.
    """
    import rich.progress
    from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    tasks: dict[str, TaskID] = {}
    with rich.progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def report(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, note="")
            elif done < bar.tasks[tasks[stage]].completed:  # the next expert
                bar.reset(tasks[stage])
            bar.update(tasks[stage], completed=done, total=total, note=note)

        yield report
