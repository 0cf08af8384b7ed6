"""Published models, as small as their golden vectors, in their own layouts."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from support import drawn_weights
from torch import Tensor

from mlaconvert.config.camera import CameraConfig
from mlaconvert.config.geometry import WanConfig
from mlaconvert.families.wan import WanFamily
from mlaconvert.families.worldplay import WorldPlayFamily
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME

GOLDEN = Path(__file__).parent / "golden"
BASE = {"dim": 72, "num_heads": 3, "num_layers": 2, "ffn_dim": 52, "freq_dim": 20, "text_dim": 14, "text_len": 11}
# Wan Fun's: seed of the weights, and what they have beyond Wan's.
FUN: dict[str, tuple[int, dict[str, object]]] = {
    "inp": (44, {"image_dim": 1280}),
    "control": (45, {"image_dim": 1280, "reference_dim": 5}),
    "control22": (46, {"reference_dim": 5}),
}


def make(tmp_path: Path, name: str, seed: int, prefix: str = "", **geometry: object) -> Path:
    """A model folder with their own config.json and the weights that their class was given."""
    shapes = WanFamily().expected_shapes(WanConfig(**(BASE | geometry)))  # type: ignore[arg-type]
    folder = tmp_path / name.replace("/", "-")
    folder.mkdir()
    (folder / CONFIG_NAME).write_bytes((GOLDEN / name / CONFIG_NAME).read_bytes())
    save_file({prefix + key: tensor for key, tensor in drawn_weights(shapes, seed).items()}, folder / WEIGHTS_NAME)
    return folder


CAMERAS = {
    **{"dim": 48, "num_heads": 3, "num_layers": 2, "ffn_dim": 120, "in_dim": 11, "out_dim": 5, "text_dim": 28},
    **{"image_dim": 20, "rope_dims": (4, 8, 4), "refiner_dim": 192},
}
GLYPHS = (1472, 2048, 2048)  # fixed in their class


def make_worldplay(tmp_path: Path, name: str = "worldplay", glyphs: bool = False, **geometry: object) -> Path:
    """HY-WorldPlay's model folder in its own names; without `glyphs`, whose weights are large, not the golden one."""
    parts = CAMERAS | {"glyph_dims": GLYPHS if glyphs else None} | geometry
    family, config = WorldPlayFamily(), CameraConfig(**parts)  # type: ignore[arg-type]
    shapes = {family.source(key, "native"): shape for key, shape in family.expected_shapes(config).items()}
    folder = tmp_path / name
    folder.mkdir()
    raw = json.loads((GOLDEN / "worldplay_tiny" / CONFIG_NAME).read_text()) | {"glyph_byT5_v2": glyphs}
    (folder / CONFIG_NAME).write_text(json.dumps(raw))
    save_file(drawn_weights(shapes, 51), folder / WEIGHTS_NAME)
    return folder


def vectors(name: str) -> dict[str, Tensor]:
    """Inputs and outputs."""
    return dict(load_file(GOLDEN / name / "golden.safetensors"))
