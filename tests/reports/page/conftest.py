"""A page of two models."""

from __future__ import annotations

import pytest
from page_cases import model, report

from mlaconvert.reports.page.sections import render


@pytest.fixture(scope="module")
def text() -> str:
    return render(report(model("one", 1), model("<two>", 2)))
