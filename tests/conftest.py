"""Fixtures shared by the tests: the golden checkpoint, and builders of small checkpoints in real layouts."""

from __future__ import annotations

import gc
import json
import os

# OpenMP threads that spin while they wait make small matrices crawl when another process needs a core; read at import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# OpenBLAS's threads spin in any case, and as many processes run side by side; the program itself does the same.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Test processes side by side share the cores. The one that starts them sets nothing: they would inherit it.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hub_server
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import SaveFolder

from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME


def pytest_collection() -> None:
    """Until all tests are collected there are mostly imports: no garbage to search what they load for."""
    gc.disable()


@pytest.fixture(scope="module", autouse=True)
def _loaded_modules_are_not_searched() -> None:
    """The programs collect garbage after every model; that takes half a second each while all of torch, diffusers and
    transformers is searched for cycles. What is loaded by now stays loaded."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def golden() -> Path:
    """A native Wan2.1 checkpoint with the reference implementations' outputs."""
    return Path(__file__).parent / "golden" / "wan_tiny"


@pytest.fixture(scope="session")
def golden_config(golden: Path) -> dict[str, Any]:
    """Its config.json, as the published models write it."""
    data: dict[str, Any] = json.loads((golden / CONFIG_NAME).read_text())
    return data


@pytest.fixture
def golden_state(golden: Path) -> dict[str, torch.Tensor]:
    """Its state dict, in native names."""
    return dict(load_file(golden / WEIGHTS_NAME))


@pytest.fixture
def save_folder(tmp_path: Path) -> SaveFolder:
    """save_folder(state, config=None, name="model") writes a model folder with the safetensors library."""

    def save(state: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None, name: str = "model") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        save_file(dict(state), folder / WEIGHTS_NAME)
        if config is not None:
            (folder / CONFIG_NAME).write_text(json.dumps(config))
        return folder

    return save


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    """A Hub of its own for each test, with alice logged in and an empty cache. The client reads these at import."""
    from huggingface_hub import constants

    home = tmp_path / "hf"
    with hub_server.serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / "harnesses.json"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        yield server
