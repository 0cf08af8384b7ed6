"""The geometry of a Wan transformer and of the video that it was made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from mlaconvert.config.cache_dtype import WHOLE_GROUPS, CachedPart, CacheDtype
from mlaconvert.config.mla import MLAConfig
from mlaconvert.config.parsing import MOST, MOST_TEXT, STRICT, Size, check_fields
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError, is_plain

FPS_CHOICES = 2  # frame rates that an embedding of them has


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Geometry of a Wan-family transformer, whatever the layout of its files. Raises ConfigError naming the field."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    dim: Size
    """Channels of a token between the layers; `num_heads` heads of an even width, at least 6."""
    num_heads: Size
    """Heads of self- and cross-attention."""
    num_layers: Size
    """Transformer blocks."""
    ffn_dim: Size
    """Hidden channels of a block's feed-forward network."""
    model_type: str = "t2v"
    """What the config.json calls its task, such as t2v or i2v; at most 40 characters."""
    in_dim: Size = 16
    """Latent channels that go in; more than `out_dim` where an image is given as well."""
    out_dim: Size = 16
    """Latent channels that come out."""
    freq_dim: Annotated[int, Field(ge=1, le=MOST, multiple_of=2)] = 256
    """Width of the sinusoidal embedding of a timestep; even."""
    text_dim: Size = 4096
    """Channels of a text embedding."""
    text_len: Annotated[int, Field(ge=1, le=MOST_TEXT)] = 512
    """Tokens that a text embedding is padded to."""
    image_dim: Size | None = None
    """Channels of CLIP image features (Wan2.1 image-to-video); None without that branch."""
    patch_size: tuple[Size, Size, Size] = (1, 2, 2)
    """Latent frames, rows and columns that one token stands for."""
    eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    """What every norm adds to the mean square."""
    cross_attn_norm: bool = True
    """Whether a LayerNorm with weights stands before cross-attention."""
    streaming: StreamingConfig | None = None
    """How a causal model sees time; None for a bidirectional one."""
    mla: MLAConfig | None = None
    """The latent attention of a converted model; None for a dense one."""
    few_step: bool = False
    """Whether it is a student that was distilled to generate in a few steps."""
    fps: Literal[16, 24] | None = None
    """Frames a second that a model with a frame-rate embedding is told (SkyReels-V2); None without that embedding."""
    reference_dim: Size | None = None
    """Latent channels of the reference image that is read as a frame before the video's (Wan Fun); None without."""
    cache_dtype: CacheDtype | None = None
    """What caches are narrowed to while the model runs: a setting of a run, which no file holds. What is present is
    exact: a chunk sees itself as it is, and only the past as the cache gives it back. None: caches hold numbers of
    their own dtype, or the bits that the model was calibrated for."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ConfigError(
                f"dim {self.dim} does not split into {self.num_heads} heads of an even width; check dim and num_heads"
            )
        if self.head_dim < 6:
            raise ConfigError(f"heads are {self.head_dim} wide; a three-axis rotary embedding needs at least 6")
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
        if self.cache_dtype is not None and mla.counts_bits:
            raise ConfigError(
                f"cache_dtype is {self.cache_dtype}, but this model's cache has bits of its own; leave cache_dtype out"
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
    def fps_row(self) -> int | None:
        """The row of the frame-rate embedding that stands for `fps`: the first for 16, the second for 24."""
        return None if self.fps is None else int(self.fps != 16)

    @property
    def fixed_settings(self) -> dict[str, Any]:
        """Settings of a recipe that have only one value for such a model; none of Wan's."""
        return {}

    @property
    def past_timestep(self) -> float | None:
        """The one timestep at which all that is cached is computed; None where a past is cached at several."""
        return None

    @property
    def vae_stride(self) -> int:
        """Pixels of a latent one: 16 of Wan2.2's VAE, otherwise 8."""
        return 16 if self.has_high_compression_latents else 8

    @property
    def video_fps(self) -> int:
        """Video frames a second: what a model is told, else 24 of Wan2.2 5B, known by its VAE, and 16 of the others."""
        return self.fps or (24 if self.has_high_compression_latents else 16)

    @property
    def works_on_pixels(self) -> bool:
        """Whether its latents are RGB pixels, as the built-in model's are: there is no VAE."""
        return self.out_dim == 3

    @property
    def has_high_compression_latents(self) -> bool:
        """Whether its latents are of Wan2.2's VAE, known by its 48 channels."""
        return self.out_dim == 48

    @property
    def norms_per_key(self) -> int:
        """How many norms a token's keys have: Wan's is one, over the whole width."""
        return 1

    @property
    def dense_scalars(self) -> int:
        """Scalars that a dense layer caches for one token: keys and values of all heads."""
        return 2 * self.dim

    def cached_scalars(self) -> tuple[int, ...]:
        """Scalars that each layer caches for one token."""
        if self.mla is None:
            return (self.dense_scalars,) * self.num_layers
        return tuple(self.mla.cached_scalars(i, self.dense_scalars, self.norms_per_key) for i in range(self.num_layers))

    def cached_parts(self, layer: int) -> tuple[CachedPart, ...]:
        """The numbers that `layer` caches for a token: keys and values, or latent, rotary key and key norm."""
        mla = self.mla.layers[layer] if self.mla is not None else None
        if self.mla is None or mla is None:
            heads = (self.num_heads, self.head_dim)
            return CachedPart(heads, "tokens"), CachedPart(heads, "channels")
        parts = [CachedPart((mla.kv_lora_rank,), "channels")]
        if rope := self.mla.cached_rope(mla):
            parts.append(CachedPart((rope,), "channels"))
        if self.mla.key_norm == "token":
            parts.append(CachedPart((self.norms_per_key,), None))
        return tuple(parts)

    def frame_bytes(self, itemsize: int, tokens: int) -> tuple[int, ...]:
        """Bytes that each layer caches for a frame of `tokens` tokens, as `cached_bytes` counts them."""
        narrow = self.cache_dtype
        if narrow is None:
            return tuple(tokens * size for size in self.cached_bytes(itemsize))
        return tuple(
            sum(part.frame_bytes(narrow, tokens, itemsize) for part in self.cached_parts(i))
            for i in range(self.num_layers)
        )

    def cached_bytes(self, itemsize: int) -> tuple[int, ...]:
        """Bytes that each layer caches for one token, where a number of the cache's dtype takes `itemsize`.

        With a `cache_dtype`, one of a frame of whole groups, rounded up: `frame_bytes` counts what a frame takes.
        """
        if self.cache_dtype is not None:
            return tuple(-(-size // WHOLE_GROUPS) for size in self.frame_bytes(itemsize, WHOLE_GROUPS))
        if self.mla is None:
            return (self.dense_scalars * itemsize,) * self.num_layers
        scalars = self.cached_scalars()
        return tuple(self.mla.cached_bytes(i, count, itemsize) for i, count in enumerate(scalars))

    @property
    def cache_share(self) -> float:
        """What a token caches, as a share of dense keys and values; in bfloat16 where no bits are counted."""
        return sum(self.cached_bytes(2)) / (2 * self.dense_scalars * self.num_layers)

    @property
    def cache_words(self) -> tuple[str, str]:
        """What a token caches in all layers, and dense keys and values of them: "168 scalars" and "2,304".

        Where bits are counted, in bytes: "336 bytes" and "4,608 in bfloat16".
        """
        dense = self.dense_scalars * self.num_layers
        if self.cache_dtype is not None or (self.mla is not None and self.mla.counts_bits):
            return f"{sum(self.cached_bytes(2)):,} bytes", f"{2 * dense:,} in bfloat16"
        return f"{sum(self.cached_scalars()):,} scalars", f"{dense:,}"

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame of `height` x `width` latent pixels."""
        return (height // self.patch_size[1]) * (width // self.patch_size[2])


class Video(NamedTuple):
    """Height and width of a video in pixels, the VAE's strides (video frames and pixels per latent one), and its speed.

    `fps` counts video frames a second.
    """

    height: int
    width: int
    frame_stride: int
    vae_stride: int
    fps: int


def default_video(config: WanConfig) -> Video:
    """The video that a model is usually run at: 480 x 832, or the drawn clips of models that work on RGB pixels.

    Strides are those of `vae_stride`, `fps` that of `video_fps`.
    """
    if config.works_on_pixels:
        return Video(24, 32, 1, 1, config.video_fps)
    return Video(480, 832, 4, config.vae_stride, config.video_fps)
