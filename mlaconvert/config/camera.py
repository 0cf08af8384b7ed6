"""The geometry of a transformer of two streams, video and text, whose attention turns by cameras too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from mlaconvert.config.cache_dtype import CachedPart
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig
from mlaconvert.config.parsing import Size
from mlaconvert.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CameraConfig(WanConfig):
    """Geometry of a transformer that makes video chunk by chunk along a camera's path.

    Video tokens attend to the text, the past and their own chunk twice: turned by their positions (RoPE), and by their
    cameras (PRoPE, arXiv 2507.10496), which turns values as well. Text tokens see only each other. Queries and keys are
    normed head by head. Raises ConfigError naming the field.
    """

    rope_dims: tuple[Size, Size, Size]
    """Channels of a head that turn along time, height and width: even numbers, a head's width together."""
    rope_theta: Annotated[float, Field(gt=0, le=1e9)] = 256.0
    """Base of the rotary frequencies."""
    refiner_layers: Size = 2
    """Blocks that the text goes through before the others."""
    refiner_dim: Size
    """Hidden channels of their feed-forward networks."""
    glyph_dims: tuple[Size, Size, Size] | None = None
    """Channels of the embedding of letters (ByT5) and of the two hidden layers that map it; None without one."""
    token_types: bool = True
    """Whether text, letters and image tokens get an embedding of what they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(dims % 2 for dims in self.rope_dims) or sum(self.rope_dims) != self.head_dim:
            raise ConfigError(
                f"rope_dims is {list(self.rope_dims)}: give three even numbers that are {self.head_dim} together, as "
                "wide as a head"
            )
        if self.patch_size[0] != 1:
            raise ConfigError(
                f"patch_size is {list(self.patch_size)}; a camera is of one latent frame, so give 1 first"
            )
        if self.head_dim % 4:
            raise ConfigError(f"heads are {self.head_dim} wide; cameras turn four channels at a time")

    def _check_mla(self, mla: MLAConfig) -> None:
        super()._check_mla(mla)
        heads = {"rope": "head", "key_norm": "token", "present": "exact", "q_lora_rank": None}
        for name, value in heads.items():
            if getattr(mla, name) != value:
                raise ConfigError(f"mla.{name} is {getattr(mla, name)!r}; where keys turn by cameras it is {value!r}")
        for i, layer in enumerate(mla.layers):
            if layer is None:
                continue
            if {layer.qk_nope_head_dim, layer.v_head_dim} != {self.head_dim} or layer.cache_bits:
                raise ConfigError(
                    f"mla.layers[{i}]: where keys turn by cameras, heads stay {self.head_dim} wide, and nothing is "
                    "cached in bits"
                )

    @property
    def rope_split(self) -> tuple[int, int, int]:
        """Complex rotary pairs on the time, height and width axes."""
        time, height, width = self.rope_dims
        return time // 2, height // 2, width // 2

    @property
    def fixed_settings(self) -> dict[str, Any]:
        """Heads that turn in two ways keep their width; what is made of latents is the past alone."""
        return {"rope": "head", "key_norm": "token", "present": "exact", "q_rank": "none", "v_dim": self.head_dim}

    @property
    def past_timestep(self) -> float:
        """That of past frames, clean ones but for what keeps a rollout stable: level 15 of 1000 in its pipeline."""
        return 14.0

    @property
    def vae_stride(self) -> int:
        """Pixels of a latent one."""
        return 16

    @property
    def video_fps(self) -> int:
        """Video frames a second, as its own code writes them."""
        return 24

    @property
    def norms_per_key(self) -> int:
        """Each head has one of its own."""
        return self.num_heads

    @property
    def dense_scalars(self) -> int:
        """Keys and values of all heads, once turned by position and once by camera."""
        return 2 * super().dense_scalars

    def cached_parts(self, layer: int) -> tuple[CachedPart, ...]:
        """Keys and values turned by position, then by camera; or the latent and the heads' key norms."""
        parts = super().cached_parts(layer)
        return parts if self.mla is not None and self.mla.layers[layer] is not None else 2 * parts
