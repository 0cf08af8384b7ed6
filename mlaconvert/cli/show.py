"""Consoles, progress and JSON of all commands."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from mlaconvert.progress import Progress
from mlaconvert.units import format_seconds

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, quiet=quiet)


def print_tables(console: Console, *tables: Table) -> None:
    """Print tables whose words stay whole: one that does not fit is as wide as its longest words, for all that."""
    for table in tables:
        for column in table.columns:
            texts = [column.header, column.footer, *column.cells]
            words = [word for text in texts for word in _plain(text).split()]
            column.min_width = max(map(len, words), default=1)
        console.print(table, crop=False)


def _plain(text: RenderableType) -> str:
    from rich.text import Text

    return Text.from_markup(text).plain if isinstance(text, str) else str(text)


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2))


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A progress bar for each stage on a terminal, with the time that is left; elsewhere `progress_lines`.

    The note, such as a rate, stands at the end.
    """
    if not console.is_terminal:
        yield progress_lines(lambda line: console.print(line, markup=False, soft_wrap=True))
        return
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
    with rich.progress.Progress(*columns, console=console, transient=True) as bar:

        def report(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, note="")
            elif done < bar.tasks[tasks[stage]].completed:  # the next expert
                bar.reset(tasks[stage])
            bar.update(tasks[stage], completed=done, total=total, note=note)

        yield report


EVERY = 60.0  # seconds between lines of progress in a log


def progress_lines(say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> Progress:
    """Progress for a log: a line when a stage begins, then at most one a minute, with the time that is left."""
    begun: dict[str, tuple[float, int]] = {}  # when each stage began, and at which unit
    latest: dict[str, int] = {}
    lock, said = threading.Lock(), clock()

    def report(stage: str, done: int, total: int, note: str = "") -> None:
        nonlocal said
        with lock:  # threads report too
            now = clock()
            if stage not in begun or done < latest[stage]:  # the next expert
                begun[stage], said = (now, done), now
                say(f"{stage} ...")
            elif now - said >= EVERY and done < total:
                start, first = begun[stage]
                pace = (now - start) / (done - first) if done > first else 0
                left = f", about {format_seconds(pace * (total - done))} left" if pace else ""
                said = now
                say(f"{stage}: {done} of {total}, {100 * done / total:.0f}%{left}{f', {note}' if note else ''}")
            latest[stage] = done

    return report
