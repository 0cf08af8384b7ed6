"""What a model's KV cache and weights take in memory, dense and as MLA, in exact integers of bytes.

Activations are not counted anywhere here: the largest batch and the longest window are upper bounds.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mlaconvert.config.budget import default_budget
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.errors import ConfigError
from mlaconvert.families.known import family_of

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class StreamedVideo:
    """The videos that a cache is planned for. Raises ConfigError for a size that is not positive."""

    height: int
    """Video pixels."""

    width: int
    """Video pixels."""

    window_frames: int
    """Latent frames that the cache holds."""

    batch: int = 1
    """Videos at once."""

    fps: int = 16
    """Video frames a second."""

    vae_stride: tuple[int, int, int] = (4, 8, 8)
    """Video frames and pixels per latent one (time, height, width)."""

    def __post_init__(self) -> None:
        _check_sizes(
            height=self.height,
            width=self.width,
            batch=self.batch,
            window_frames=self.window_frames,
            fps=self.fps,
            vae_stride=min(self.vae_stride),
        )


@dataclass(frozen=True, kw_only=True)
class ModelMemory:
    """What one model takes, dense or MLA. All in bytes over all layers, except where said.

    `scalars_per_token` lists each layer's cached scalars. `largest_batch` (videos at this window) and
    `longest_window` (latent frames at this batch) fit beside the weights with activations not counted, so
    they are upper bounds; None when no GPU was given. With a `cache_dtype`, whose groups tokens share, a token's bytes
    are rounded up.
    """

    scalars_per_token: tuple[int, ...]
    bytes_per_token: int
    bytes_per_window: int
    bytes_per_minute: int
    weight_bytes: int
    largest_batch: int | None
    longest_window: int | None


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The memory of one setting, dense and MLA side by side.

    `height` and `width` are video pixels, `window_frames` latent frames, `gpu_bytes` bytes; `itemsize` is the
    cache's, in bytes per scalar. `frame_tokens` and `minute_frames` are the tokens of a latent frame and the
    latent frames of a minute of video. Windows and minutes are those of the whole batch.
    """

    height: int
    width: int
    batch: int
    window_frames: int
    fps: int
    frame_stride: int
    itemsize: int
    frame_tokens: int
    minute_frames: int
    gpu_bytes: int | None
    dense: ModelMemory
    mla: ModelMemory

    @property
    def ratio(self) -> float:
        """How many times smaller the MLA cache is."""
        return self.dense.bytes_per_token / self.mla.bytes_per_token

    @property
    def reduction_percent(self) -> float:
        """How much smaller the MLA cache is, in percent of the dense one."""
        return 100 * (1 - self.mla.bytes_per_token / self.dense.bytes_per_token)

    def seconds(self, latent_frames: int) -> float:
        """Seconds of video that `latent_frames` stand for."""
        return latent_frames * self.frame_stride / self.fps

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the derived figures."""
        return {**dataclasses.asdict(self), "ratio": self.ratio, "reduction_percent": self.reduction_percent}


def parameter_count(config: WanConfig) -> int:
    """Number of weights and biases of a transformer, with the MLA layers that `config.mla` says."""
    return sum(math.prod(shape) for shape in family_of(config).expected_shapes(config).values())


def plan_memory(
    config: WanConfig,
    mla: MLAConfig | None = None,
    *,
    video: StreamedVideo,
    cache_itemsize: int = 2,
    weight_itemsize: int = 2,
    gpu_gb: float | None = None,
    weight_bytes: int | None = None,
) -> MemoryPlan:
    """Memory of the dense model and of its conversion.

    The conversion is `mla`, else the model's own `config.mla`, else VideoMLA's default budget in every layer.
    Itemsizes are bytes per scalar. `weight_bytes` is what the dense model
    keeps on the GPU; by default its parameters, counted from the geometry, times `weight_itemsize`. `gpu_gb`
    is the GPU's memory as vendors count it: 2**30 bytes each.

    Activations are not counted: the largest batch and the longest window are upper bounds. A minute is the
    latent frames that a minute adds to a running video, `60 * video.fps / video.vae_stride[0]`.

    Raises ConfigError for a size that is not positive, or that patches and VAE cannot split, and for an `mla` of
    another number of layers.
    """
    _check_sizes(cache_itemsize=cache_itemsize, weight_itemsize=weight_itemsize)
    height, width, batch, window_frames = video.height, video.width, video.batch, video.window_frames
    fps, vae_stride = video.fps, video.vae_stride
    if gpu_gb is not None and not 0 < gpu_gb < math.inf:
        raise ConfigError(f"gpu_gb is {gpu_gb}: give the GPU's memory in GiB, such as 24 or 80")
    for name, pixels, step in (
        ("height", height, vae_stride[1] * config.patch_size[1]),
        ("width", width, vae_stride[2] * config.patch_size[2]),
    ):
        if pixels % step:
            raise ConfigError(f"{name} is {pixels} pixels: give a multiple of {step}, VAE stride times patch")

    dense = dataclasses.replace(config, mla=None)
    converted = dataclasses.replace(config, mla=mla or config.mla or _default_mla(config))
    frame_tokens = config.tokens_per_frame(height // vae_stride[1], width // vae_stride[2])
    minute_frames = -(-60 * fps // vae_stride[0])
    gpu_bytes = None if gpu_gb is None else int(gpu_gb * _GIB)
    dense_weights = parameter_count(dense) * weight_itemsize if weight_bytes is None else weight_bytes
    change = (parameter_count(converted) - parameter_count(dense)) * weight_itemsize
    if min(dense_weights, dense_weights + change) < 1:
        raise ConfigError(f"weight_bytes is {weight_bytes}, too few for this model: leave it out to count them")

    def side(model: WanConfig, weights: int) -> ModelMemory:
        scalars = model.cached_scalars()
        frame = sum(model.frame_bytes(cache_itemsize, frame_tokens))
        free = None if gpu_bytes is None else max(0, gpu_bytes - weights)
        return ModelMemory(
            scalars_per_token=scalars,
            bytes_per_token=-(-frame // frame_tokens),
            bytes_per_window=frame * window_frames * batch,
            bytes_per_minute=frame * minute_frames * batch,
            weight_bytes=weights,
            largest_batch=None if free is None else free // (frame * window_frames),
            longest_window=None if free is None else free // (frame * batch),
        )

    return MemoryPlan(
        height=height,
        width=width,
        batch=batch,
        window_frames=window_frames,
        fps=fps,
        frame_stride=vae_stride[0],
        itemsize=cache_itemsize,
        frame_tokens=frame_tokens,
        minute_frames=minute_frames,
        gpu_bytes=gpu_bytes,
        dense=side(dense, dense_weights),
        mla=side(converted, dense_weights + change),
    )


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}: it must be a positive number")


def _default_mla(config: WanConfig) -> MLAConfig:
    budget = default_budget(config)
    layer = MLALayer(
        kv_lora_rank=budget.kv_lora_rank,
        qk_nope_head_dim=budget.qk_nope_head_dim,
        v_head_dim=config.head_dim,
        # Only their number counts here, not which pairs rotate.
        rope_components=tuple((pair, 1) for pair in range(budget.qk_rope_head_dim // 2)),
    )
    return MLAConfig(
        q_lora_rank=budget.q_lora_rank,
        key_norm="latent",
        softmax_scale=config.head_dim**-0.5,
        layers=(layer,) * config.num_layers,
    )
