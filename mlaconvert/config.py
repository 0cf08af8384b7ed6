"""Configurations: the geometry of a Wan transformer, its streaming window, its MLA layers, and recipes.

All are frozen keyword-only dataclasses. `parse` reads one from plain data (JSON, YAML) and is strict: an unknown
field or a wrong type is a `ConfigError` that names it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from mlaconvert.errors import ConfigError, is_plain

T = TypeVar("T")
_STRICT = {"extra": "forbid", "strict": True}

KeyNorm = Literal["latent", "token"]
RopeMode = Literal["cached", "latent", "head"]
FORMAT_VERSION = 1
# What no real model or run comes near; above it, sizes would only fill the memory.
_MOST = 2**31 - 1
_MOST_LAYERS = 1000
_MOST_FRAMES = 10_000  # latent
_MOST_TEXT = 1 << 14  # tokens
_MOST_PIXELS = 1 << 14
_MOST_CLIPS = 10_000
# How published few-step students are sampled: timesteps, and how far they are warped towards noise.
FEW_STEPS = (1000.0, 750.0, 500.0, 250.0)
SHIFT = 5.0


@dataclass(frozen=True, kw_only=True)
class StreamingConfig:
    """How a causal model sees time. Frames are latent frames.

    `window_frames` counts every frame that a query can see: sink, cached, and those of its own chunk. In a
    window, frame positions are counted from the sink (`window`), so that rotary phases stay in the trained
    range; `absolute` counts from the start of the video, as Self-Forcing does.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    chunk_frames: int = 3
    window_frames: int = 7
    sink_frames: int = 1
    positions: Literal["window", "absolute"] = "window"

    def __post_init__(self) -> None:
        _positive(self, "chunk_frames", "window_frames", limit=_MOST_FRAMES)
        if self.sink_frames < 0:
            raise ConfigError(f"sink_frames is {self.sink_frames}: give 0 or more")
        if self.window_frames < self.sink_frames + self.chunk_frames:
            raise ConfigError(
                f"window_frames is {self.window_frames}: it must hold the sink ({self.sink_frames}) and one chunk "
                f"({self.chunk_frames}), so give at least {self.sink_frames + self.chunk_frames}"
            )


@dataclass(frozen=True, kw_only=True)
class MLALayer:
    """One converted self-attention layer.

    `rope_components` lists, in ascending pair order, (pair, count): how many shared rotary key components each
    complex rotary pair keeps. Pairs are numbered over the time, height and width axes in that order.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    rope_components: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        widths = (self.kv_lora_rank, self.v_head_dim, self.qk_nope_head_dim)
        if min(widths[:2]) < 1 or self.qk_nope_head_dim < 0 or max(widths) > _MOST:
            raise ConfigError(f"an MLA layer needs positive widths, not {self}")
        pairs = [pair for pair, _ in self.rope_components]
        if pairs != sorted(set(pairs)) or any(p < 0 or c < 1 for p, c in self.rope_components):
            raise ConfigError(f"rope_components must ascend by pair with positive counts, not {pairs}")

    @property
    def qk_rope_head_dim(self) -> int:
        """Rotary scalars of a query head and of the one shared key: two per component."""
        return 2 * sum(count for _, count in self.rope_components)

    @property
    def component_pairs(self) -> tuple[int, ...]:
        """The rotary pair of each component, in cache order."""
        return tuple(pair for pair, count in self.rope_components for _ in range(count))


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """The `mla` section of a converted model's config.json. A layer that is None stays dense.

    `q_lora_rank` None means the exact query path: the teacher's own projection and norm. `key_norm` "latent" is
    the paper's RMSNorm on the latent; "token" keeps the teacher's key norm exactly, for one more cached scalar.
    `rope`: "cached" is DeepSeek's and the paper's shared rotary key, cached beside the latent. Keys are cached
    unrotated and turned when they are used, so it can as well be read from the latent (k_rope_proj): "latent"; every
    cached scalar then serves rotary keys, content keys and values. "head" turns each head's own content keys by all
    its pairs, as the teacher does; nothing is shared, and there is no absorbed form.
    """

    q_lora_rank: int | None
    key_norm: KeyNorm
    softmax_scale: float
    layers: tuple[MLALayer | None, ...]
    rope: RopeMode = "cached"
    calibration: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ConfigError(f"mla.q_lora_rank is {self.q_lora_rank}: give a positive rank, or null to keep it exact")
        if not self.softmax_scale > 0 or not math.isfinite(self.softmax_scale):
            raise ConfigError(f"mla.softmax_scale is {self.softmax_scale}: it must be positive")
        if self.key_norm not in ("latent", "token"):
            raise ConfigError(f"mla.key_norm is {self.key_norm!r}: give latent or token")
        if self.rope == "head" and any(layer is not None and layer.rope_components for layer in self.layers):
            raise ConfigError("mla.rope head shares no rotary key; leave rope_components of all layers empty")

    def cached_rope(self, layer: MLALayer) -> int:
        """Rotary scalars that a token caches beside its latent."""
        return layer.qk_rope_head_dim if self.rope == "cached" else 0

    def cached_scalars(self, layer: int, dense_scalars: int) -> int:
        """Scalars that `layer` caches for one token; `dense_scalars` is what a dense layer caches."""
        mla = self.layers[layer]
        if mla is None:
            return dense_scalars
        return mla.kv_lora_rank + self.cached_rope(mla) + (self.key_norm == "token")

    def to_json(self) -> dict[str, Any]:
        """Plain data for config.json; `from_json` reads it back."""
        layers = [{"dense": True} if layer is None else dataclasses.asdict(layer) for layer in self.layers]
        data: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "q_lora_rank": self.q_lora_rank,
            "key_norm": self.key_norm,
            "softmax_scale": self.softmax_scale,
            "layers": layers,
        }
        if self.rope != "cached":
            data["rope"] = self.rope
        if self.calibration is not None:
            data["calibration"] = dict(self.calibration)
        return data

    @classmethod
    def from_json(cls, data: Any, where: str) -> MLAConfig:
        """Read the `mla` section. Raises ConfigError naming `where` and the field."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: mla must be a mapping, not {type(data).__name__}")
        if data.get("format_version") is True or data.get("format_version") != FORMAT_VERSION:
            raise ConfigError(
                f"{where}: mla.format_version is {data.get('format_version')!r}; this mlaconvert reads {FORMAT_VERSION}"
            )
        layers = data.get("layers")
        if not isinstance(layers, list) or len(layers) > _MOST_LAYERS:
            raise ConfigError(f"{where}: mla.layers must be a list with one entry per layer")
        parsed = tuple(
            None if layer == {"dense": True} else parse(MLALayer, layer, f"{where}: mla.layers[{i}]")
            for i, layer in enumerate(layers)
        )
        rest = {k: v for k, v in data.items() if k not in ("format_version", "layers")}
        head = parse(_MLAHead, rest, f"{where}: mla")
        return cls(
            q_lora_rank=head.q_lora_rank,
            key_norm=head.key_norm,
            softmax_scale=head.softmax_scale,
            layers=parsed,
            rope=head.rope,
            calibration=head.calibration,
        )


@dataclass(frozen=True, kw_only=True)
class _MLAHead:
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    q_lora_rank: int | None
    key_norm: KeyNorm
    softmax_scale: float
    rope: RopeMode = "cached"
    calibration: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Geometry of a Wan-family transformer, whatever the layout of its files.

    `image_dim` is the width of CLIP image features (Wan2.1 image-to-video), None without that branch.
    `streaming` is None for a bidirectional model, `mla` None for a dense one. `few_step` tells a student that was
    distilled to generate in a few steps.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
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
        _positive(
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
        _positive(self, "text_len", limit=_MOST_TEXT)
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


def _positive(config: Any, *names: str, limit: int = _MOST) -> None:
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise ConfigError(f"{name} is {value}: it must be a positive number")
        if value > limit:
            raise ConfigError(f"{name} is {value}: give at most {limit}")


def parse(cls: type[T], data: Any, where: str) -> T:
    """Build dataclass `cls` from plain data, strictly.

    Raises ConfigError, which names `where`, the field, and what is expected.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        # Through JSON: strict JSON mode takes a list for a tuple, and nothing but plain data survives.
        return TypeAdapter(cls).validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            known = ", ".join(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
            hint = f"; known fields: {known}" if len(first["loc"]) == 1 else ""
            raise ConfigError(f"{where}: unknown field {name!r}{hint}") from None
        raise ConfigError(f"{where}: {name or 'value'}: {first['msg']}") from None
    except ConfigError as error:  # an impossible value, found by the class itself
        raise ConfigError(f"{where}: {error}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not plain data ({error})") from None


class Budget(NamedTuple):
    """Widths of one MLA layer; `q_lora_rank` is the paper's compressed query path."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    q_lora_rank: int


def default_budget(config: WanConfig) -> Budget:
    """VideoMLA's cache budget (arXiv 2605.30351) at any width: (192, 32, 96, 768) at width 1536, 12 heads.

    Latent and shared rotary key together take 7/48 of the width, rounded down, so that a token's cache shrinks
    by 92.7% at least. The rotary key is a quarter of a head, rounded to an even number (two scalars a complex
    pair, at least one pair); the latent takes the rest, at least one channel. Scores stay as wide as the
    teacher's heads, and the query latent is half the width.
    """
    rope = max(2, 2 * ((config.head_dim + 3) // 8))
    latent = max(1, 7 * config.dim // 48 - rope)
    return Budget(latent, rope, config.head_dim - rope, config.dim // 2)


class Video(NamedTuple):
    """Height and width of a video in pixels, and the VAE's strides: video frames and pixels per latent one."""

    height: int
    width: int
    frame_stride: int
    vae_stride: int


def default_video(config: WanConfig) -> Video:
    """The video that a model is usually run at: 480 x 832, or the drawn clips of models that work on RGB pixels.

    Wan2.2's VAE, known by its 48 channels, has a stride of 16, the others 8.
    """
    if config.out_dim == 3:
        return Video(24, 32, 1, 1)
    return Video(480, 832, 4, 16 if config.out_dim == 48 else 8)


Init = Literal["svd", "calibrated", "random", "lossless"]
Part = Literal["centring", "rho", "components", "weights", "sensitivity", "refit"]
_LOSSLESS_SETS = ("kv_rank", "q_rank", "nope_dim", "rope_dim", "v_dim", "key_norm", "rope")


@dataclass(frozen=True, kw_only=True)
class ConvertRecipe:
    """What `convert` does. A field that is None takes its default from the model (`default_budget`).

    `init`: "svd" factorises the pretrained weights, "calibrated" does so in the metric of the inputs that `clips`
    clips bring (queries exact and `key_norm` "token" by default), "random" draws the new ones from `seed`, "lossless"
    keeps every pair of every head, so that only rounding changes the model; it fixes all widths. A calibrated
    conversion divides `kv_rank` + `rope_dim` scalars a layer by what it measures (`allocation` "fixed": as they are
    given), and with `allocation` "adaptive" the total between layers as well. `rope` as in `MLAConfig` (calibrated:
    "head", or "latent" where `nope_dim` narrows heads; otherwise "cached"). `kv_rank`, `nope_dim` and `rope_dim`
    (scalars), `v_dim` and `q_rank` are the widths of the latent attention; `q_rank` "none" keeps the teacher's query
    path. `rope_selection` chooses the pairs that keep their rotation: the "highest" frequencies, as the paper does
    (the default of weights alone), or by the "energy" that losing it costs (of a calibrated conversion). `without`
    switches parts of a calibrated conversion off, to see what each is worth: "centring" of the inputs, the mean
    rotation "rho", several shared "components" of one pair, the "weights" of heads by their queries and outputs, the
    "sensitivity" of the output to each direction of the inputs, the "refit" of output and queries. `key_norm` as in
    `MLAConfig` ("latent" by default). `dtype` is that of the output, by default each tensor's own, and `layout` says
    whose tensor names and config.json it has, by default the source's. `layers` ("0-3,7") are converted, the others
    stay dense.

    `streaming` is how the converted model sees time, by default as its source does; `bidirectional` has it see whole
    clips whatever the source says. `few_step` tells that the source was distilled to a few steps, or that it was not;
    None leaves it to the source. With `height` and `width`
    (video pixels), `vae_stride` and, for a bidirectional model, `frames` (latent), it says between which positions
    attention will run: pairs that lose their rotation are set to its mean. Raises ConfigError naming the field.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    init: Init = "calibrated"
    kv_rank: int | None = None
    q_rank: int | str | None = None
    nope_dim: int | None = None
    rope_dim: int | None = None
    v_dim: int | None = None
    key_norm: KeyNorm | None = None
    rope: RopeMode | None = None
    rope_selection: Literal["highest", "energy"] | None = None
    allocation: Literal["fixed", "uniform", "adaptive"] | None = None
    without: tuple[Part, ...] = ()
    clips: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    layout: Literal["native", "diffusers"] | None = None
    layers: str | None = None
    seed: int = 0
    streaming: StreamingConfig | None = None
    bidirectional: bool = False
    few_step: bool | None = None
    frames: int = 21
    height: int | None = None
    width: int | None = None
    vae_stride: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.q_rank, str) and self.q_rank != "none":
            raise ConfigError(f"q_rank is {self.q_rank!r}: give a rank, or none to keep the query path exact")
        for limit, names in (
            (_MOST, ("kv_rank", "q_rank", "rope_dim", "v_dim")),
            (_MOST_CLIPS, ("clips",)),
            (_MOST_FRAMES, ("frames",)),
            (_MOST_PIXELS, ("height", "width", "vae_stride")),
        ):
            _positive(self, *(name for name in names if isinstance(getattr(self, name), int)), limit=limit)
        if self.nope_dim is not None and self.nope_dim < 0:
            raise ConfigError(f"nope_dim is {self.nope_dim}: give 0 or more")
        if self.rope_dim is not None and self.rope_dim % 2:
            raise ConfigError(f"rope_dim is {self.rope_dim}: give an even number, two scalars a rotary pair")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}: give 0 to {2**32 - 1}")
        if self.layers is not None:
            parse_layers(self.layers, 10**6)
        if self.allocation is not None and self.init != "calibrated":
            raise ConfigError(f"allocation {self.allocation} needs measured errors; use init calibrated")
        if self.without and self.init != "calibrated":
            raise ConfigError(f"without {', '.join(self.without)} is about calibrated conversions; use init calibrated")
        fixed = [name for name in _LOSSLESS_SETS if getattr(self, name) is not None]
        if self.bidirectional and self.streaming is not None:
            raise ConfigError("bidirectional and streaming exclude each other; give one of them")
        if self.init == "lossless" and fixed:
            raise ConfigError(f"init lossless keeps everything, so it fixes {fixed[0]}; leave {fixed[0]} out")


_RANGE = r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*"
_LAYERS = re.compile(rf"{_RANGE}(?:,{_RANGE})*")


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layers that `text`, such as "0-3,7", means in a model of `num_layers`, ascending.

    Raises ConfigError for anything else, and for a layer that the model has not.
    """
    if not _LAYERS.fullmatch(text):
        raise ConfigError(f"layers is {text!r}: give layer numbers and ranges, such as 0-3,7")
    chosen: set[int] = set()
    for first, last in re.findall(_RANGE, text):
        low, high = int(first), int(last or first)
        if low > high:
            raise ConfigError(f"layers is {text!r}: the range {low}-{high} runs backwards")
        if high >= num_layers:
            raise ConfigError(f"layers is {text!r}: layer {high} does not exist, the model has 0 to {num_layers - 1}")
        chosen.update(range(low, high + 1))
    return tuple(sorted(chosen))
