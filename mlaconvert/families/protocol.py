"""What a model family tells the rest of the house: its names, its geometry, its attention weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mlaconvert.config.geometry import WanConfig
from mlaconvert.families.causal import Timing
from mlaconvert.files.headers import TensorInfo
from mlaconvert.files.store import View

Layout = Literal["native", "diffusers"]


@dataclass(frozen=True)
class Signs:
    """By which names a transformer is found below any prefix: its patch embedding, and attention in its blocks."""

    patches: str
    attention: re.Pattern[str]

    def below(self, prefix: str, names: Iterable[str]) -> bool:
        """Whether one of `names` is of such attention below `prefix`."""
        return any(name.startswith(prefix) and self.attention.match(name, len(prefix)) for name in names)


class Family(Protocol):
    """A family of models with one canonical set of tensor names and one or more layouts of files."""

    name: str
    title: str
    """What its models are called in messages."""
    layouts: tuple[Layout, ...]
    """Those that its files come in."""
    signs: Signs
    """What its transformers are found by, whatever they are nested under."""
    relative: str | None
    """The model that is refused by name and has the same names and class; None without one."""

    def detect(self, raw_config: Mapping[str, Any] | None, names: Collection[str]) -> bool:
        """Whether a checkpoint with these unwrapped tensor names is of this family."""

    def layout(self, names: Collection[str]) -> Layout:
        """The layout that these names are in."""

    def timing(self, raw_config: Mapping[str, Any] | None) -> Timing | None:
        """How its models see time where their files never say it; None leaves it to what the files say."""

    def parse_config(self, raw_config: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]) -> WanConfig:
        """The geometry, from config.json where there is one and from the shapes of the (canonical) `tensors`.

        Raises ConfigError for an impossible value, UnsupportedModelError for a model that cannot be converted.
        """

    def reshaped(self, raw_config: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]) -> dict[str, View]:
        """Tensors that do the same in another shape, by their name in the file, as the family has them."""

    def reason_against(self, beyond: Collection[str], missing: Collection[str]) -> str | None:
        """Why a model that has tensors `beyond` the family's, or lacks some, is not converted; None when it is."""

    def check_attention(self, config: WanConfig, tensors: Mapping[str, TensorInfo]) -> None:
        """Raise UnsupportedModelError for attention that is not converted, before its shapes are compared."""

    def raw_config(self, config: WanConfig, layout: Layout = "native") -> dict[str, Any]:
        """The config.json, in the fields of `layout`, of a model of geometry `config`; without its own sections."""

    def canonical(self, name: str, layout: Layout) -> str | None:
        """The canonical name of a tensor named in `layout`; None when the family has no such tensor."""

    def source(self, name: str, layout: Layout) -> str:
        """The name in `layout` of a canonical name."""

    def expected_shapes(self, config: WanConfig) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every tensor of a model with this geometry, in module order."""
