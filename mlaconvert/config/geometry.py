"""The geometry of a Wan transformer and of the video that it was made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from mlaconvert.config.mla import MLAConfig
from mlaconvert.config.parsing import MOST_TEXT, STRICT, check_positive
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError, is_plain


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Geometry of a Wan-family transformer, whatever the layout of its files.

    `image_dim` is the width of CLIP image features (Wan2.1 image-to-video), None without that branch.
    `streaming` is None for a bidirectional model, `mla` None for a dense one. `few_step` tells a student that was
    distilled to generate in a few steps.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    model_type: str = "t2v"
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    image_dim: int | None = None
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    cross_attn_norm: bool = True
    streaming: StreamingConfig | None = None
    mla: MLAConfig | None = None
    few_step: bool = False

    def __post_init__(self) -> None:
        check_positive(
            self,
            "dim",
            "num_heads",
            "num_layers",
            "ffn_dim",
            "in_dim",
            "out_dim",
            "freq_dim",
            "text_dim",
        )
        check_positive(self, "text_len", limit=MOST_TEXT)
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ConfigError(
                f"dim {self.dim} does not split into {self.num_heads} heads of an even width; check dim and num_heads"
            )
        if self.head_dim < 6:
            raise ConfigError(f"heads are {self.head_dim} wide; a three-axis rotary embedding needs at least 6")
        if self.freq_dim % 2:
            raise ConfigError(f"freq_dim is {self.freq_dim}: it must be even")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ConfigError(f"patch_size is {list(self.patch_size)}: give three positive numbers")
        if not 0 < self.eps < 1:
            raise ConfigError(f"eps is {self.eps}: it must lie between 0 and 1")
        if not is_plain(self.model_type) or len(self.model_type) > 40:
            raise ConfigError(f"model_type is {self.model_type!r}: give a short name, such as t2v")
        if self.mla is not None:
            self._check_mla(self.mla)

    def _check_mla(self, mla: MLAConfig) -> None:
        if len(mla.layers) != self.num_layers:
            raise ConfigError(f"mla.layers has {len(mla.layers)} entries for {self.num_layers} layers")
        for i, layer in enumerate(mla.layers):
            pairs = layer.rope_components if layer is not None else ()
            if pairs and pairs[-1][0] >= self.head_dim // 2:
                raise ConfigError(
                    f"mla.layers[{i}].rope_components has pair {pairs[-1][0]}: a head has pairs 0 to "
                    f"{self.head_dim // 2 - 1}"
                )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads

    @property
    def rope_split(self) -> tuple[int, int, int]:
        """Complex rotary pairs on the time, height and width axes (22, 21, 21 for heads of 128)."""
        pairs = self.head_dim // 2
        return (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)

    @property
    def works_on_pixels(self) -> bool:
        """Whether its latents are RGB pixels, as the built-in model's are: there is no VAE."""
        return self.out_dim == 3

    @property
    def has_wan22_latents(self) -> bool:
        """Whether its latents are of Wan2.2's VAE, known by its 48 channels."""
        return self.out_dim == 48

    @property
    def dense_scalars(self) -> int:
        """Scalars that a dense layer caches for one token: keys and values of all heads."""
        return 2 * self.dim

    def cached_scalars(self) -> tuple[int, ...]:
        """Scalars that each layer caches for one token."""
        if self.mla is None:
            return (self.dense_scalars,) * self.num_layers
        return tuple(self.mla.cached_scalars(i, self.dense_scalars) for i in range(self.num_layers))

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame of `height` x `width` latent pixels."""
        return (height // self.patch_size[1]) * (width // self.patch_size[2])


class Video(NamedTuple):
    """Height and width of a video in pixels, and the VAE's strides: video frames and pixels per latent one."""

    height: int
    width: int
    frame_stride: int
    vae_stride: int


def default_video(config: WanConfig) -> Video:
    """The video that a model is usually run at: 480 x 832, or the drawn clips of models that work on RGB pixels.

    Wan2.2's VAE has a stride of 16, the others 8.
    """
    if config.works_on_pixels:
        return Video(24, 32, 1, 1)
    return Video(480, 832, 4, 16 if config.has_wan22_latents else 8)
