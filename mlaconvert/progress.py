"""One kind of progress callback for everything that takes long, and one counter that calls it.

def show(stage: str, done: int, total: int, note: str = "") -> None: ...

count = Counter(show, "convert", total=30)
count.step()  # show("convert", 1, 30, "")
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Is told how far work is: `done` of `total` units of a `stage`, with a note at times, such as a rate.

    A unit is what the stage counts: layers, passes through the model, bytes. Whoever reports may do so from a thread.
    A stage that begins again, for the next of several models, counts from its start again.
    """

    def __call__(self, stage: str, done: int, total: int, note: str = "", /) -> None:
        """Take note of it."""


def silent(_stage: str, _done: int, _total: int, _note: str = "") -> None:
    """Report nothing."""


class Counter:
    """Counts the units of one stage of which it knows the `total`."""

    def __init__(self, progress: Progress, stage: str, total: int) -> None:
        self.progress, self.stage, self.done, self.total = progress, stage, 0, total

    def step(self, units: int = 1, *, note: str = "") -> None:
        """Count `units` more, and report."""
        self.done += units
        self.show(note)

    def show(self, note: str = "") -> None:
        """Report what is counted so far."""
        self.progress(self.stage, self.done, self.total, note)
