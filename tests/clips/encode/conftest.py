"""A base repository with random weights, and a folder of short videos with captions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import wan_base
from encode_cases import movie


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_base.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 3, 1 and 2 clips' length, with captions."""
    folder = tmp_path_factory.mktemp("videos")
    for i, (name, frames) in enumerate((("a", 30), ("deep/a", 10), ("deep/b c", 18))):
        path = movie(folder / f"{name}.mp4", frames, seed=i)
        path.with_suffix(".txt").write_text(f"a cat {'and dog ' * i}\n")
    return folder


@pytest.fixture
def folder(videos: Path, tmp_path: Path) -> Path:
    """A copy of them that a test may change."""
    return Path(shutil.copytree(videos, tmp_path / "videos"))
