"""Threads that work side by side instead of each starting more of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


class SideBySide(ThreadPoolExecutor):
    """A pool of `workers` threads, in each of which torch computes with that thread alone.

    Shutting it down gives torch back the number of threads that it had.
    """

    def __init__(self, workers: int) -> None:
        self._computing = torch.get_num_threads()
        super().__init__(workers, initializer=torch.set_num_threads, initargs=(1,))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """`ThreadPoolExecutor.shutdown`."""
        super().shutdown(wait, cancel_futures=cancel_futures)
        torch.set_num_threads(self._computing)  # what the workers set holds for threads to come
