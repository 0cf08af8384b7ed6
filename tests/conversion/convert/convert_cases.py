"""What several of these tests are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.conversion.recipe import ConvertRecipe

State = dict[str, Tensor]
SaveFolder = Callable[..., Path]
# Heads of 20 are 10 rotary pairs, split (4, 3, 3). The default budget is 7 * 60 // 48 = 8 scalars: latent 4, rotary 4.
CONFIG = WanConfig(dim=60, num_heads=3, num_layers=3, ffn_dim=44, freq_dim=14, text_dim=18, in_dim=5, out_dim=5)
NATIVE = {
    "_class_name": "WanModel",
    "model_type": "t2v",
    "dim": 60,
    "num_heads": 3,
    "num_layers": 3,
    "ffn_dim": 44,
    "freq_dim": 14,
    "text_dim": 18,
    "in_dim": 5,
    "out_dim": 5,
}
WINDOW = {"chunk_frames": 2, "window_frames": 5, "sink_frames": 1}
LOSSLESS = ConvertRecipe(init="lossless")
SVD = ConvertRecipe(init="svd")
EXACT = ConvertRecipe(init="svd", q_rank="none", key_norm="token")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
