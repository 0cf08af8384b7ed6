"""The recipe of a conversion: every setting of `convert`, as a YAML file or the command line gives them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mlaconvert.config.mla import KeyNorm, RopeMode
from mlaconvert.config.parsing import MOST, MOST_FRAMES, MOST_PIXELS, STRICT, check_positive
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError

_MOST_CLIPS = 10_000

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

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
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
            (MOST, ("kv_rank", "q_rank", "rope_dim", "v_dim")),
            (_MOST_CLIPS, ("clips",)),
            (MOST_FRAMES, ("frames",)),
            (MOST_PIXELS, ("height", "width", "vae_stride")),
        ):
            check_positive(self, *(name for name in names if isinstance(getattr(self, name), int)), limit=limit)
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
