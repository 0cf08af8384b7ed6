"""Conversions to a cache in bits: bytes within their budget, the teacher within rounding where all is kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_cases import CONFIG, files
from safetensors.torch import load_file

from mlaconvert.config.packing import packed_bytes
from mlaconvert.conversion.calibration.bits import NORM_BITS
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert, preview
from mlaconvert.errors import ConfigError
from mlaconvert.files.names import CONFIG_NAME, CONVERSION_NAME, README_NAME, WEIGHTS_NAME
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.load import load_model

RECIPE = ConvertRecipe(bytes_per_token=6, clips=10, height=32, width=48, refit_steps=3)


@pytest.mark.parametrize("layout", ["native", "diffusers"])
@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_the_cache_takes_the_bytes_that_were_asked_for(
    streaming: Path, data: Path, tmp_path: Path, layout: Any, allocation: Any
) -> None:
    recipe = dataclasses.replace(RECIPE, layout=layout, allocation=allocation)
    (planned,) = preview(streaming, tmp_path / "out", recipe, data=data).models
    assert planned.plan.config.cached_bytes(2) == (6,) * CONFIG.num_layers
    convert(streaming, tmp_path / "out", recipe, data=data)
    config = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())
    assert config["mla"]["format_version"] == 3
    layers = [[bits for bits, n in layer["cache_bits"] for _ in range(n)] for layer in config["mla"]["layers"]]
    sizes = [packed_bytes(bits) for bits in layers]
    assert sum(sizes) <= 6 * len(layers)
    assert min(sizes) >= 4 if allocation == "uniform" else len(set(sizes)) > 0
    assert all(bits[-1] == NORM_BITS for bits in layers)
    assert [len(bits) - 1 for bits in layers] == [layer["kv_lora_rank"] for layer in config["mla"]["layers"]]
    model = load_model(tmp_path / "out")
    cache = LatentCache(model.config, batch=3, height=4, width=6, dtype=torch.bfloat16)
    assert cache.nbytes == 3 * 5 * 6 * sum(sizes)
    record = json.loads((tmp_path / "out" / CONVERSION_NAME).read_text())
    assert record["recipe"]["bytes_per_token"] == 6
    assert [list(layer["errors"]) for layer in record["layers"]] == [["low rank", "in bits", "past refitted"]] * 3
    assert f"A token caches {sum(sizes)} bytes instead of" in (tmp_path / "out" / README_NAME).read_text()


def test_a_conversion_in_bits_is_the_same_again_and_from_plain_arguments(
    streaming: Path, data: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        convert(streaming, tmp_path / name, RECIPE, data=data)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    weights = load_file(tmp_path / "one" / WEIGHTS_NAME)
    assert sum("kv_quantizer" in name for name in weights) == 3 * CONFIG.num_layers


def test_with_bytes_for_everything_only_rounding_is_left(streaming: Path, data: Path, tmp_path: Path) -> None:
    """As many channels as the layer is wide, of twelve bits each, and the key norm's eight."""
    size = packed_bytes([12] * CONFIG.dim + [NORM_BITS])
    convert(streaming, tmp_path / "out", dataclasses.replace(RECIPE, bytes_per_token=size, refit_steps=0), data=data)
    teacher, student = load_model(streaming), load_model(tmp_path / "out")
    g = torch.Generator().manual_seed(5)
    x, context = torch.randn(2, CONFIG.out_dim, 6, 4, 6, generator=g), torch.randn(2, 3, CONFIG.text_dim, generator=g)
    t = torch.tensor([0.0, 0.0, 0.0, 0.0, 700.0, 700.0]).expand(2, 6)
    expected, found = (model(x, t, context, chunks=(2, 2, 2)) for model in (teacher, student))
    assert float((found - expected).norm() / expected.norm()) < 3e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "svd"}, "bytes_per_token needs measured errors"),
        ({"rope": "cached"}, "bytes_per_token needs measured errors"),
        ({"key_norm": "latent"}, "use key_norm token"),
        ({"bytes_per_token": 1}, "bytes_per_token is 1: give 2 or more"),
    ],
)
def test_what_bits_cannot_be_counted_for_is_refused(changes: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"bytes_per_token": 9} | changes
    with pytest.raises(ConfigError, match=message):
        ConvertRecipe(**fields)
