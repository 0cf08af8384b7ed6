"""An interruption that waits for the end of a step, so that the state can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interruption:
    """Which signal asked to stop; None while none has."""

    say: Callable[[str], None]
    signal: signal.Signals | None = None

    def stop(self, kept: str) -> None:
        """End the run as that signal does, with what is `kept`. Raises KeyboardInterrupt, or SystemExit for SIGTERM."""
        if self.signal == signal.SIGTERM:
            self.say(kept)
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt(kept)


@contextmanager
def deferred(say: Callable[[str], None]) -> Iterator[Interruption]:
    """Within it, the first SIGINT or SIGTERM is only noted; a second one does at once what it would have done.

    Outside of the main thread, which alone may set handlers, signals do what they do.
    """
    found = Interruption(say)
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for which, handler in before.items():
            if handler is not None:  # one that was not set from Python
                signal.signal(which, handler)

    def note(number: int, _frame: FrameType | None) -> None:
        found.signal = signal.Signals(number)
        restore()
        say("interrupted: the state is saved after this step; interrupt again to stop at once")

    for which in before:
        signal.signal(which, note)
    try:
        yield found
    finally:
        restore()
