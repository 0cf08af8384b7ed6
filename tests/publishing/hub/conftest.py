"""A converted golden model, a copy for each test, and waits of the Hub's client that take no time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert


@pytest.fixture(scope="module")
def converted(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "wan-mla"
    convert(golden, path, ConvertRecipe(init="svd", kv_rank=10))
    return path


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    """A converted model folder of this test's own."""
    return Path(shutil.copytree(converted, tmp_path / "wan-mla"))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client waited, without waiting them."""
    seconds: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", seconds.append)
    return seconds
