"""A small model, what its conversion writes when nothing interrupts it, and a copy that may be changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from resume_cases import CONFIG, SVD, kill

from mlaconvert.conversion.run import convert
from mlaconvert.files.names import WEIGHTS_NAME


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("source") / "model"
    kill.write_model(folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted conversion writes."""
    output = tmp_path_factory.mktemp("expected") / "out"
    convert(source, output, SVD)
    found: dict[str, bytes] = kill.snapshot(output)
    assert set(found) == {"config.json", "conversion.json", "README.md", WEIGHTS_NAME}
    return found


@pytest.fixture
def own_source(source: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(source, tmp_path / "model"))
