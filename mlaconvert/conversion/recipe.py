"""The recipe of a conversion: every setting of `convert`, as a YAML file or the command line gives them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mlaconvert.config.mla import KeyNorm, Present, RopeMode
from mlaconvert.config.parsing import MOST, STRICT, Frames, Pixels, Seed, Size, check_fields
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError

Init = Literal["svd", "calibrated", "random", "lossless"]
_LOSSLESS_SETS = ("kv_rank", "q_rank", "nope_dim", "rope_dim", "v_dim", "key_norm", "rope")


@dataclass(frozen=True, kw_only=True)
class ConvertRecipe:
    """What `convert` does. Widths are scalars; one that is None takes its default from the model (`default_budget`).

    ConvertRecipe(init="calibrated", kv_rank=224, allocation="uniform", layers="0-20")

    Raises ConfigError naming the field.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    init: Init = "calibrated"
    """Where the new weights come from. "svd" factorises the pretrained weights, "calibrated" does so in the metric of
    the inputs that clips bring, "random" draws the new ones, "lossless" keeps every pair of every head, so that only
    rounding changes the model; it fixes all widths."""
    kv_rank: Size | None = None
    """The latent of keys and values. A calibrated conversion divides `kv_rank` + `rope_dim` a layer by what it
    measures."""
    bytes_per_token: Annotated[int, Field(ge=2, le=MOST)] | None = None
    """What a token may take in the cache, in bytes a layer: a calibrated conversion gives each channel of the latent
    the bits that it is worth, and a channel that is worth none is not cached; that decides `kv_rank` too."""
    q_rank: Annotated[int, Field(ge=1, le=MOST)] | str | None = None
    """The query latent, or "none" for the teacher's query path as it is (the default of a calibrated conversion)."""
    nope_dim: Annotated[int, Field(ge=0, le=MOST)] | None = None
    """A head's channels of query and key that no position rotates."""
    rope_dim: Annotated[int, Field(ge=1, le=MOST, multiple_of=2)] | None = None
    """The rotary key that all heads share: an even number, two scalars a rotary pair."""
    v_dim: Size | None = None
    """A head's channels of value; by default the head's own."""
    key_norm: KeyNorm | None = None
    """As in `MLAConfig`; by default "token" of a calibrated conversion, otherwise "latent"."""
    rope: RopeMode | None = None
    """As in `MLAConfig`; by default "cached", of a calibrated conversion "head", or "latent" where `nope_dim` narrows
    heads."""
    present: Present | None = None
    """As in `MLAConfig`; by default "exact" of a calibrated conversion for streaming windows of more than a
    chunk, otherwise "latent"."""
    rope_selection: Literal["highest", "energy"] | None = None
    """Which pairs keep their rotation: the "highest" frequencies, as the paper does (the default of weights alone), or
    those whose loss costs most "energy" (of a calibrated conversion)."""
    allocation: Literal["fixed", "uniform", "adaptive"] | None = None
    """How a calibrated conversion divides its scalars: "fixed" as they are given, "uniform" by what each layer
    measures, "adaptive" (the default) the total between layers as well."""
    noisy_past: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of a calibration's windows whose past is noisy, at a level of its own for every chunk, as in diffusion
    forcing. None of a rollout's are: raise it for a model that is trained or run with noisy pasts. What is not
    calibrated is not kept."""
    refit_steps: Annotated[int, Field(ge=0, le=10_000)] | None = None
    """Steps in which a calibrated conversion with an exact present refits all layers at once, by the model's velocity;
    0 leaves it at refits layer by layer. By default 100, but none of a large model on a CPU."""
    refit_clips: Annotated[int, Field(ge=1, le=40_000)] | None = None
    """How many clips that refit takes, the measured ones among them; by default four times as many, or what there is.
    It changes more than statistics do, and follows the chance of few clips."""
    clips: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """How many clips a calibrated conversion measures; by default 5 to 40, the fewer the larger their frames."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the output; None keeps each tensor's own."""
    layout: Literal["native", "diffusers"] | None = None
    """Whose tensor names and config.json the output has; None keeps the source's."""
    layers: str | None = None
    """The layers to convert, such as "0-3,7"; the others stay dense. None converts all."""
    seed: Seed = 0
    """Of "random" weights, and of the clips that the teacher generates."""
    streaming: StreamingConfig | None = None
    """How the converted model sees time; None leaves it as the source does."""
    bidirectional: bool = False
    """Have the converted model see whole clips, whatever the source says."""
    few_step: bool | None = None
    """Whether the source was distilled to a few steps; None leaves it to its files."""
    frames: Frames = 21
    """Latent frames of a clip of a bidirectional model. With the next three it says between which positions attention
    will run: pairs that lose their rotation are set to its mean."""
    height: Pixels | None = None
    """Pixels of a video; None is what such a model is usually run at."""
    width: Pixels | None = None
    """Pixels of a video; None is what such a model is usually run at."""
    vae_stride: Pixels | None = None
    """Video pixels a latent one; None is what the VAE of such a model has."""

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.q_rank, str) and self.q_rank != "none":
            raise ConfigError(f"q_rank is {self.q_rank!r}: give a rank, or none to keep the query path exact")
        if self.layers is not None:
            parse_layers(self.layers, 10**6)
        if self.bytes_per_token is not None and (self.init != "calibrated" or self.rope == "cached"):
            raise ConfigError(
                "bytes_per_token needs measured errors, and a latent that holds the rotary key too: use init "
                "calibrated, and rope head or latent"
            )
        if self.bytes_per_token is not None and self.key_norm == "latent":
            raise ConfigError("bytes_per_token scales channels by a calibration, not by a norm; use key_norm token")
        if self.allocation is not None and self.init != "calibrated":
            raise ConfigError(f"allocation {self.allocation} needs measured errors; use init calibrated")
        fixed = [name for name in _LOSSLESS_SETS if getattr(self, name) is not None]
        if self.bidirectional and self.streaming is not None:
            raise ConfigError("bidirectional and streaming exclude each other; give one of them")
        for name in ("refit_steps", "refit_clips"):
            if getattr(self, name) and (self.init != "calibrated" or self.present == "latent"):
                raise ConfigError(f"{name} is about calibrated conversions with an exact present; leave it out")
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
