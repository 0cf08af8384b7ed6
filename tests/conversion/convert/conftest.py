"""A random model of odd sizes: its tensors, its folder, two of them as experts, and its lossless conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from convert_cases import CONFIG, LOSSLESS, NATIVE, WINDOW, SaveFolder, State
from safetensors.torch import save_file

from mlaconvert.conversion.report import ConversionReport
from mlaconvert.conversion.run import convert
from mlaconvert.families.wan import WanFamily


@pytest.fixture(scope="module")
def state() -> State:
    """A random model in native names, with gains near one and biases that matter."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, shape in WanFamily().expected_shapes(CONFIG).items():
        tensors[name] = torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
        if "norm" in name and name.endswith("weight"):
            tensors[name] += 1
    return tensors


@pytest.fixture
def source(state: State, save_folder: SaveFolder) -> Path:
    return save_folder(state, NATIVE)


@pytest.fixture
def pair(state: State, save_folder: SaveFolder, tmp_path: Path) -> Path:
    save_folder(state, NATIVE, "pair/high_noise_model")
    return save_folder({n: t * 1.25 for n, t in state.items()}, NATIVE, "pair/low_noise_model").parent


@pytest.fixture
def converted(source: Path, tmp_path: Path) -> ConversionReport:
    return convert(source, tmp_path / "out", LOSSLESS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten clips of noise, of three chunks each."""
    folder = tmp_path_factory.mktemp("clips")
    g = torch.Generator().manual_seed(3)
    tensors = {"latents": torch.randn(10, CONFIG.out_dim, 6, 4, 6, generator=g)}
    save_file(tensors | {"context": torch.randn(10, 2, CONFIG.text_dim, generator=g)}, folder / "a.safetensors")
    return folder


@pytest.fixture
def streaming(state: State, save_folder: SaveFolder) -> Path:
    """The same model, causal."""
    return save_folder(state, NATIVE | {"streaming": WINDOW}, "streaming")
