"""Who is told what a run does while it works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlaconvert.progress import Progress, silent


def _unheard(_line: str) -> None:
    """Say nothing to anybody."""


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Who is told how far a run is, and what it has to say; nobody by default.

    Listener(say=print, progress=lambda stage, done, total, note="": print(f"{stage}: {done} of {total}"))
    """

    progress: Progress = silent
    """Told how far each stage is. Threads may call it."""

    say: Callable[[str], None] = _unheard
    """Told, a line each, what is assumed because nothing states it, what was kept, and what cannot be used."""
