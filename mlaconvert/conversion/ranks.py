"""Several processes of a launcher (torchrun, accelerate launch) that share the layers of one conversion.

They meet in the launcher's key-value store, and on the disk that all of them see. Rank 0 speaks; a rank that fails or
falls silent ends the run of all.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from threading import Event, Thread
from typing import Any

from mlaconvert.errors import InputError, MLAConvertError, OutputError

BEAT = 1.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without one until a rank counts as dead
REPORT = 2.0  # seconds that rank 0 has to report an error before another rank does
START = 600.0  # seconds that ranks wait for each other at the start

_meetings = count()  # each has its own keys in the store


class RankError(MLAConvertError):
    """Another rank failed."""


class Ranks:
    """This process among `size`; `rank` 0 is the one that speaks. Alone when no launcher started it."""

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._seen: dict[int, tuple[int, float]] = {}  # of each rank, its latest sign of life and when it came
        self._lost = ""  # why the store is gone

    @property
    def speaks(self) -> bool:
        """Whether this process reports and assembles."""
        return self.rank == 0

    def share(self, items: Sequence[int]) -> list[int]:
        """This rank's part of what all of them have to do."""
        return list(items)[self.rank :: self.size]

    def device(self, name: str) -> str:
        """The device of that name; of several ranks on one machine, each has its own GPU."""
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" and self.size > 1 else name

    def tell(self, key: str, data: Any) -> None:
        """Let the other ranks know."""
        if self._store is not None:
            self._store.set(key, json.dumps(data))

    def hear(self, key: str, sender: int) -> Any:
        """Wait for what the rank `sender` tells. Raises RankError when it fails, or nothing is heard of it."""
        while not self._told(key):
            self.check(sender)
            time.sleep(0.05)
        return json.loads(self._store.get(key))

    def check(self, sender: int) -> None:
        """Raise RankError when the rank `sender` has failed or fallen silent."""
        if self._store is None:
            return
        if self._told(f"failed/{sender}"):
            failure = json.loads(self._store.get(f"failed/{sender}"))
            kind = InputError if failure["input"] else RankError
            raise kind(f"rank {sender}: {failure['message']}")
        if self._lost:
            raise RankError(f"rank {self.rank} lost the other ranks ({self._lost}); run the same command again")
        beats, now = self._call(lambda: self._store.add(f"alive/{sender}", 0)), time.monotonic()
        known, since = self._seen.get(sender, (-1, now))
        self._seen[sender] = (beats, since if beats == known else now)
        if now - self._seen[sender][1] > PATIENCE:
            raise RankError(
                f"rank {sender} has given no sign of life for {PATIENCE:g} s; run the same command again, it goes on "
                "from the finished layers"
            )

    def _rank_0_reports(self) -> bool:
        end = time.monotonic() + REPORT
        while not (told := self._told("failed/0")) and time.monotonic() < end:
            time.sleep(0.05)
        return told

    def _told(self, key: str) -> bool:
        return bool(self._call(lambda: self._store.check([key])))

    def _call(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except RuntimeError as error:  # the process that held the store is gone
            reason = (str(error).strip().splitlines() or ["closed"])[0][:100]
            raise RankError(f"rank {self.rank} lost the other ranks ({reason}); run the same command again") from None

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Give signs of life inside the block, and tell the others of an error that ends it.

        An error that rank 0 reports leaves the others quietly, with SystemExit.
        """
        if self._store is None:
            yield
            return
        over = Event()
        beating = Thread(target=self._beat, args=(over,), daemon=True)
        beating.start()
        try:
            yield
        except BaseException as error:
            with suppress(RuntimeError):  # nobody is left to be told
                bad_input = isinstance(error, InputError) and not isinstance(error, OutputError)
                self.tell(f"failed/{self.rank}", {"message": str(error) or type(error).__name__, "input": bad_input})
                if self.rank and self._rank_0_reports():
                    raise SystemExit(getattr(error, "exit_code", 1)) from None
            raise
        finally:
            over.set()
            beating.join()

    def _beat(self, over: Event) -> None:
        while not over.wait(BEAT):
            try:
                self._store.add(f"alive/{self.rank}", 1)
            except RuntimeError as error:
                self._lost = (str(error).strip().splitlines() or ["closed"])[0][:100]
                return


def meet() -> Ranks:
    """The ranks that the environment tells of. Raises RankError when they do not find each other."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    from torch.distributed import distributed_c10d as c10d  # slow to import, and mostly not needed
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=START)))
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise RankError(
            f"rank {rank} of {size} does not find the others ({reason}); start them with torchrun"
        ) from None
    return Ranks(rank, size, c10d.PrefixStore(f"mlaconvert/{next(_meetings)}", store))
