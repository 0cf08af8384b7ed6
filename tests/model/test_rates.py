"""How long work takes at given rates, what is warned of, and what does not fit; no test is timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_flops import DENSE

from mlaconvert.model import rates
from mlaconvert.model.flops import Work
from mlaconvert.model.rates import LONG, SHORT, Rates, does_not_fit, probe, warning

GIVEN = Rates(products=4e9, attention=2e9, double=1e9, moved=8e9)
CPU = torch.device("cpu")


def test_seconds_are_those_of_each_kind_one_after_the_other() -> None:
    """What a mask hides takes time too."""
    work = Work(products=8e9, attention=6e9, masked=5e9, double=5e8, moved=4e9)
    assert GIVEN.seconds(work) == 2 + 3 + 0.5 + 0.5


def test_a_probe_measures_every_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """And never runs what is larger than a part of a second."""
    monkeypatch.setitem(rates._PROBE, "cpu", 1e7)
    for masked in (False, True):
        found = probe(DENSE, CPU, torch.float32, queries=10**9, keys=10**9, masked=masked)
        assert all(rate > 0 for rate in vars(found).values())


def test_only_long_work_on_a_cpu_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def probed(*_: Any, **__: Any) -> Rates:
        return GIVEN

    monkeypatch.setattr(rates, "probe", probed)
    sizes: dict[str, Any] = {"config": DENSE, "dtype": torch.float32, "tokens": 12}
    long = Work(products=4e9 * 3 * LONG)
    line = "40 clips will take about 30 min on cpu (7.2e+12 FLOPs); a GPU takes a small part of that (--device cuda)"
    assert warning("40 clips", long, device=CPU, **sizes) == line
    assert warning("40 clips", Work(products=SHORT, moved=1), device=CPU, **sizes) == (
        "40 clips will take about 21 min on cpu (5e+12 FLOPs); a GPU takes a small part of that (--device cuda)"
    )
    assert warning("40 clips", long, device=torch.device("cuda"), **sizes) is None
    monkeypatch.setattr(rates, "probe", lambda *_, **__: Rates(products=1e13, attention=1, double=1, moved=1))
    assert warning("40 clips", long, device=CPU, **sizes) is None
    monkeypatch.setattr(rates, "probe", lambda *_, **__: pytest.fail("there is little to do"))
    assert warning("40 clips", Work(products=0.9 * SHORT), device=CPU, **sizes) is None


def test_what_does_not_fit_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * 2**30, 24 * 2**30))
    gpu = torch.device("cuda", 1)
    assert does_not_fit(5 * 2**30, gpu, "take less") is None
    assert does_not_fit(99 * 2**40, CPU, "take less") is None
    line = "does not fit: about 6 GiB are needed on cuda:1, 5 GiB are free; take less"
    assert does_not_fit(6 * 2**30, gpu, "take less") == line
