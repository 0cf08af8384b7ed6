"""Models in ComfyUI's hands: where they lie, and how they are loaded, moved and let go."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import comfy.latent_formats
import folder_paths
from comfy import model_management
from comfy.model_patcher import ModelPatcher

from mlaconvert.config.geometry import WanConfig
from mlaconvert.errors import InputError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.open import open_checkpoint
from mlaconvert.generation.request import Runtime
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel

BUILT_IN = "tiny"
FOLDER = "mlaconvert"  # below ComfyUI's models
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


class Pixels(comfy.latent_formats.LatentFormat):  # type: ignore[misc]
    """Of models that work on RGB pixels in [-1, 1], as the built-in one does."""

    latent_channels = 3
    latent_dimensions = 3
    latent_rgb_factors = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that ComfyUI moves and unloads; `checkpoint` is closed, and says what its files do and do not say."""

    patcher: ModelPatcher
    checkpoint: Checkpoint

    @property
    def model(self) -> WanModel:
        """The transformer, on whatever device it is now."""
        found: WanModel = self.patcher.model
        return found

    @property
    def latent_format(self) -> comfy.latent_formats.LatentFormat:
        """How ComfyUI's LATENT, which has the VAE's own values, differs from the normalised one of the transformer."""
        return latent_format(self.model.config)


def latent_format(config: WanConfig) -> comfy.latent_formats.LatentFormat:
    """ComfyUI's format of the latents of a model."""
    if config.works_on_pixels:
        return Pixels()
    return comfy.latent_formats.Wan22() if config.has_high_compression_latents else comfy.latent_formats.Wan21()


def folders() -> dict[str, Path]:
    """Model folders by name: below models/mlaconvert and models/diffusion_models, wherever ComfyUI has these."""
    found: dict[str, Path] = {}
    for kind in (FOLDER, "diffusion_models"):
        for base in folder_paths.get_folder_paths(kind):
            for config in sorted(Path(base).glob("*/config.json")):
                found.setdefault(config.parent.name, config.parent)
    return found


def find(name: str, hub_id: str) -> Path | str:
    """What to open: the repository `hub_id`, if that is given, else the folder `name`. Raises InputError."""
    if hub_id.strip():
        if not _HUB_ID.fullmatch(hub_id.strip()):
            raise InputError(f"{hub_id!r} is no repository on the Hub; give owner/name, or leave it empty")
        return hub_id.strip()
    path = folders().get(name)
    if path is None and name != BUILT_IN:
        raise InputError(
            f"there is no folder {name!r} with a config.json below models/{FOLDER} or models/diffusion_models; "
            "choose another, or put it there"
        )
    return path or BUILT_IN


def load(source: Path | str, *, dtype: str | None, attention: str, cache_dtype: str | None) -> LoadedModel:
    """Load a model to where ComfyUI keeps what is not in use. Raises what `load_model` raises."""
    device, offload = model_management.get_torch_device(), model_management.unet_offload_device()
    runtime = Runtime.of(
        device=str(device), dtype=dtype, attention=attention, compile=False, slice_size=None, cache_dtype=cache_dtype
    )
    with open_checkpoint(source) as checkpoint:
        model = load_model(checkpoint, dtype=runtime.chosen_dtype(), device=offload, cache_dtype=runtime.cache_dtype)
        logging.info("mlaconvert: %s, computed in %s", checkpoint.describe(), model.dtype)
    model.attention_mode = runtime.attention
    return LoadedModel(ModelPatcher(model, load_device=device, offload_device=offload), checkpoint)
