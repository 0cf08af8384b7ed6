"""Good inputs and a model folder to spoil, and a Hub that cannot be reached."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hostile import Shelf, make_shelf
from huggingface_hub import constants


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return make_shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, shelf: Shelf) -> Path:
    """A model folder to spoil again and again."""
    folder = tmp_path_factory.mktemp("anything") / "model"
    shutil.copytree(shelf.converted, folder)
    return folder
