"""The `mla` section of config.json: what each converted layer caches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mlaconvert.config.parsing import MOST, MOST_LAYERS, STRICT, parse
from mlaconvert.errors import ConfigError

KeyNorm = Literal["latent", "token"]
RopeMode = Literal["cached", "latent", "head"]
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class MLALayer:
    """One converted self-attention layer.

    `rope_components` lists, in ascending pair order, (pair, count): how many shared rotary key components each
    complex rotary pair keeps. Pairs are numbered over the time, height and width axes in that order.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    rope_components: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        widths = (self.kv_lora_rank, self.v_head_dim, self.qk_nope_head_dim)
        if min(widths[:2]) < 1 or self.qk_nope_head_dim < 0 or max(widths) > MOST:
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
        if not isinstance(layers, list) or len(layers) > MOST_LAYERS:
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
    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    q_lora_rank: int | None
    key_norm: KeyNorm
    softmax_scale: float
    rope: RopeMode = "cached"
    calibration: dict[str, Any] | None = None
