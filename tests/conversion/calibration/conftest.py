"""Folders of two small random checkpoints, a streaming and a bidirectional one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from calibrate_cases import CONFIG, STREAMING, native
from support import SaveFolder, randomize

from mlaconvert.model.wan import WanModel


@pytest.fixture
def folder(save_folder: SaveFolder) -> Path:
    """A streaming checkpoint."""
    config = dataclasses.replace(CONFIG, streaming=STREAMING)
    model = WanModel(config)
    randomize(model)
    return save_folder(model.state_dict(), native(config))


@pytest.fixture
def both_ways(save_folder: SaveFolder) -> Path:
    """A bidirectional one."""
    model = WanModel(CONFIG)
    randomize(model, 1)
    return save_folder(model.state_dict(), native(CONFIG), "bidirectional")
