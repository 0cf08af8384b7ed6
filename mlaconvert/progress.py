"""One kind of progress callback for everything that takes long."""

from __future__ import annotations

from collections.abc import Callable

# progress(stage, done, total)
Progress = Callable[[str, int, int], None]


def silent(_stage: str, _done: int, _total: int) -> None:
    """Report nothing."""
