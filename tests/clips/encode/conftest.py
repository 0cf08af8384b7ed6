"""A base repository with random weights, and a folder of short videos with captions."""

from __future__ import annotations

from pathlib import Path

import pytest
import wan_base
from encode_cases import movie


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_base.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Videos of 3, 1 and 2 clips' length."""
    for i, (name, frames) in enumerate((("a", 30), ("deep/a", 10), ("deep/b c", 18))):
        path = movie(tmp_path / "videos" / f"{name}.mp4", frames, seed=i)
        path.with_suffix(".txt").write_text(f"a cat {'and dog ' * i}\n")
    return tmp_path / "videos"
