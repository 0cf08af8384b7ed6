"""Workers that compute alone."""

from __future__ import annotations

import threading

import torch

from mlaconvert.latent.threads import SideBySide


def test_workers_compute_with_one_thread_each_and_leave_the_others_alone() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with SideBySide(2) as pool:
            meet = threading.Barrier(2, timeout=60)

            def work() -> int:
                meet.wait()  # both at once, so in two workers
                return torch.get_num_threads()

            assert [found.result() for found in [pool.submit(work), pool.submit(work)]] == [1, 1]
            assert torch.get_num_threads() == 3
        after = []
        later = threading.Thread(target=lambda: after.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert after == [3]
    finally:
        torch.set_num_threads(before)
