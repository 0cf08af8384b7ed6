"""The `mla` section of config.json: what each converted layer caches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mlaconvert.config.packing import run_bytes
from mlaconvert.config.parsing import MOST, MOST_LAYERS, STRICT, Count, Positive, Size, check_fields, parse
from mlaconvert.errors import ConfigError

KeyNorm = Literal["latent", "token"]
RopeMode = Literal["cached", "latent", "head"]
Present = Literal["exact", "latent"]
# The newest format. Version 1 knows no exact present, 2 no bits; models without them are still written as those.
FORMAT_VERSION = 3
MOST_BITS = 12


@dataclass(frozen=True, kw_only=True)
class MLALayer:
    """One converted self-attention layer. Widths are scalars. Raises ConfigError naming the field."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    kv_lora_rank: Size
    """The latent that a token caches, of which keys and values are made."""
    qk_nope_head_dim: Annotated[int, Field(ge=0, le=MOST)]
    """A head's channels of query and key that no position rotates."""
    v_head_dim: Size
    """A head's channels of value."""
    rope_components: tuple[tuple[Annotated[int, Field(ge=0)], Count], ...]
    """(pair, count) in ascending order of pairs: how many shared rotary key components each complex rotary pair keeps.
    Pairs are numbered over the time, height and width axes in that order."""
    cache_bits: tuple[tuple[Annotated[int, Field(ge=1, le=MOST_BITS)], Count], ...] = ()
    """(bits, count) of the cached scalars in their order: how many bits each takes. Empty: they are cached as numbers
    of the cache's dtype."""

    def __post_init__(self) -> None:
        check_fields(self)
        pairs = [pair for pair, _ in self.rope_components]
        if pairs != sorted(set(pairs)):
            raise ConfigError(f"rope_components must ascend by pair, not {pairs}")

    @property
    def qk_rope_head_dim(self) -> int:
        """Rotary scalars of a query head and of the one shared key: two per component."""
        return 2 * sum(count for _, count in self.rope_components)

    @property
    def scalar_bits(self) -> tuple[int, ...]:
        """The bits of each cached scalar; () where they are cached as numbers."""
        return tuple(bits for bits, count in self.cache_bits for _ in range(count))

    @property
    def component_pairs(self) -> tuple[int, ...]:
        """The rotary pair of each component, in cache order."""
        return tuple(pair for pair, count in self.rope_components for _ in range(count))


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """The `mla` section of a converted model's config.json. Raises ConfigError naming the field."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    q_lora_rank: Count | None
    """Scalars of the query latent; None means the exact query path: the teacher's own projection and norm."""
    key_norm: KeyNorm
    """What of a key is normalised: "latent" is the paper's RMSNorm on the latent; "token" keeps the teacher's key norm
    exactly, for one more cached scalar (or one a head, where the teacher norms each head)."""
    softmax_scale: Positive
    """What scores are multiplied by before the softmax."""
    layers: tuple[MLALayer | None, ...]
    """Every layer of the model, in order; one that is None stays dense."""
    rope: RopeMode = "cached"
    """Where rotary keys come from: "cached" is DeepSeek's and the paper's shared rotary key, cached beside the latent.
    Keys are cached unrotated and turned when they are used, so it can as well be read from the latent (k_rope_proj):
    "latent"; every cached scalar then serves rotary keys, content keys and values. "head" turns each head's own content
    keys by all its pairs, as the teacher does; nothing is shared, and there is no absorbed form."""
    present: Present = "latent"
    """What the chunk in work sees of itself: "exact" is the teacher's own keys and values, which are made anew in every
    pass and need no cache; "latent" is the paper's, what the latent keeps of them. The past is read from latents in
    both."""
    calibration: Mapping[str, Any] | None = None
    """What a calibrated conversion notes of itself; None for the others. Nothing is computed from it."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rope == "head" and any(layer is not None and layer.rope_components for layer in self.layers):
            raise ConfigError("mla.rope head shares no rotary key; leave rope_components of all layers empty")
        if self.present == "exact" and self.q_lora_rank is not None:
            raise ConfigError(
                "mla.present exact needs the teacher's queries; leave q_lora_rank null, or present latent"
            )
        for index, layer in enumerate(self.layers):
            if layer is not None and layer.cache_bits:
                bits, scalars = sum(count for _, count in layer.cache_bits), self.cached_scalars(index, 0)
                if bits != scalars:
                    raise ConfigError(f"mla.layers[{index}].cache_bits is of {bits} scalars, but {scalars} are cached")

    @property
    def past_queries(self) -> bool:
        """Whether the past is read with queries of its own: not where whole heads turn beside an exact present."""
        return self.present == "latent" or self.rope != "head"

    def cached_rope(self, layer: MLALayer) -> int:
        """Rotary scalars that a token caches beside its latent."""
        return layer.qk_rope_head_dim if self.rope == "cached" else 0

    def cached_scalars(self, layer: int, dense_scalars: int, norms: int = 1) -> int:
        """Scalars that `layer` caches for one token: `dense_scalars` if it is dense, `norms` for its key norm."""
        mla = self.layers[layer]
        if mla is None:
            return dense_scalars
        return mla.kv_lora_rank + self.cached_rope(mla) + (norms if self.key_norm == "token" else 0)

    def cached_bytes(self, layer: int, scalars: int, itemsize: int) -> int:
        """Bytes that `layer` caches for one token, of `scalars` scalars that take `itemsize` if they have no bits."""
        mla = self.layers[layer]
        if mla is not None and mla.cache_bits:
            return run_bytes(mla.cache_bits)
        return scalars * itemsize

    @property
    def counts_bits(self) -> bool:
        """Whether some layer's cached scalars take bits of their own."""
        return any(layer is not None and layer.cache_bits for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain data for config.json; `from_json` reads it back."""
        layers = [{"dense": True} if layer is None else _layer_json(layer) for layer in self.layers]
        data: dict[str, Any] = {
            "format_version": 3 if self.counts_bits else 1 if self.present == "latent" else 2,
            "q_lora_rank": self.q_lora_rank,
            "key_norm": self.key_norm,
            "softmax_scale": self.softmax_scale,
            "layers": layers,
        }
        if self.rope != "cached":
            data["rope"] = self.rope
        if self.present != "latent":
            data["present"] = self.present
        if self.calibration is not None:
            data["calibration"] = dict(self.calibration)
        return data

    @classmethod
    def from_json(cls, data: Any, where: str) -> MLAConfig:
        """Read the `mla` section. Raises ConfigError naming `where` and the field."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: mla must be a mapping, not {type(data).__name__}")
        version = data.get("format_version")
        if type(version) is not int or version not in range(1, FORMAT_VERSION + 1):
            raise ConfigError(
                f"{where}: mla.format_version is {version!r}; this mlaconvert reads 1 to {FORMAT_VERSION}"
            )
        if version == 1 and "present" in data:
            raise ConfigError(f"{where}: mla.present is of format_version 2, and this says 1; correct the version")
        layers = data.get("layers")
        if not isinstance(layers, list) or len(layers) > MOST_LAYERS:
            raise ConfigError(f"{where}: mla.layers must be a list with one entry per layer")
        if version < 3 and any(isinstance(layer, Mapping) and "cache_bits" in layer for layer in layers):
            raise ConfigError(
                f"{where}: mla.layers have cache_bits, of format_version 3, and this says {version}; correct it"
            )
        parsed = tuple(
            None if layer == {"dense": True} else parse(MLALayer, layer, f"{where}: mla.layers[{i}]")
            for i, layer in enumerate(layers)
        )
        rest = {k: v for k, v in data.items() if k not in ("format_version", "layers")}
        return dataclasses.replace(parse(cls, rest | {"layers": []}, f"{where}: mla"), layers=parsed)


def _layer_json(layer: MLALayer) -> dict[str, Any]:
    data = dataclasses.asdict(layer)
    if not layer.cache_bits:
        del data["cache_bits"]
    return data
