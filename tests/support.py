"""What many tests use: builders of weights, and how results are compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mlaconvert.model.cache import LatentCache
from mlaconvert.model.wan import WanModel

SaveFolder = Callable[..., Path]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference, relative to `expected`."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Random weights of a trained model's size: norms near one, biases and modulations that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (0.3 if p.ndim == 1 else 0.15))
            if "norm" in name and name.endswith("weight"):
                p.add_(1)


def drawn_weights(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, torch.Tensor]:
    """The weights of the golden models that store a seed instead: see `tests/golden/README.md`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        size = (3 / math.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.5
        drawn[name] = (2 * torch.rand(shape, generator=generator) - 1) * size
        if len(shape) == 1 and name.endswith("weight"):
            drawn[name] += 1
    return drawn


def stream(
    model: WanModel, cache: LatentCache, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, sizes: list[int]
) -> torch.Tensor:
    """Velocities of chunks of so many frames, one after the other, each run a second time over another one."""
    out, start = [], 0
    for size in sizes:
        chunk, times = x[:, :, start : start + size], t[:, start : start + size]
        model(chunk.flip(0), times, context, cache=cache, start_frame=start)  # overwritten by the next line
        out.append(model(chunk, times, context, cache=cache, start_frame=start))
        start += size
    return torch.cat(out, 2)


def count_bits(folder: Path) -> None:
    """Give a converted model's cache bits of its own: 3 for each scalar, 7 for the last of a layer."""
    config, weights = json.loads((folder / "config.json").read_text()), load_file(next(folder.glob("*.safetensors")))
    config["mla"]["format_version"] = 3
    block = "attn1" if any(".attn1." in name for name in weights) else "self_attn"
    for i, layer in enumerate(config["mla"]["layers"]):
        if layer == {"dense": True}:
            continue
        prefix = f"blocks.{i}.{block}."
        count = len(weights[prefix + "kv_a_proj_with_mqa.weight"]) + (config["mla"]["key_norm"] == "token")
        layer["cache_bits"] = [[3, count - 1], [7, 1]]
        half = torch.tensor([4.0] * (count - 1) + [64.0])
        tables = {"center": torch.linspace(-0.1, 0.1, count), "slope": torch.linspace(0.5, 1.5, count), "gain": half}
        weights |= {f"{prefix}kv_quantizer.{name}": table for name, table in tables.items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, next(folder.glob("*.safetensors")), metadata={"format": "pt"})
