"""What `evaluate` is asked to do, and what the models' files say before their weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from mlaconvert.config.cache_dtype import CacheDtype
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.parsing import Count, check_fields
from mlaconvert.conversion.records import read_record
from mlaconvert.families.source import AnySource, Source
from mlaconvert.files.find import find_beside
from mlaconvert.files.origin import Origin, origin_of
from mlaconvert.files.store import TensorStore


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `evaluate` may be asked for. Raises ConfigError naming the field."""

    teacher: AnySource | None = None
    """The dense model; None is what the first model was converted from, as its conversion.json says."""
    data: Path | None = None
    """A folder of clips; None has the teacher make them, or draws the built-in model's."""
    clips: Count | None = None
    """Clips that losses are measured on; by default 64 of the built-in model's, else 8."""
    frames: Annotated[int, Field(ge=0)] = 60
    """Latent frames of the rollouts; 0 for none."""
    videos: Count = 3
    """Rollouts of each model."""
    steps: Count | None = None
    """Euler steps; by default 12 for the built-in model, the few-step schedule for streaming checkpoints, 20 for
    others."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of noise, in losses and rollouts."""
    device: torch.device | str = "cpu"
    """Where models run: torch's name."""
    dtype: torch.dtype | None = None
    """Of both models; None is the first converted one's."""
    cache_dtype: CacheDtype | None = None
    """What the caches of the models are narrowed to, but not the teacher's; None keeps their own."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """What a model's files say before its weights are read; `config` has the cache that it is evaluated with."""

    source: Source
    name: str
    config: WanConfig
    dtype: torch.dtype
    conversion: dict[str, Any] | None
    healing: dict[str, Any] | None

    @property
    def origin(self) -> Origin:
        """What it was made from, as its conversion.json says."""
        return origin_of(self.conversion)


def read_record_of(store: TensorStore, name: str) -> dict[str, Any] | None:
    """A JSON file beside a model's weights, here or on the Hub; None without one."""
    path = find_beside(store, name)
    return None if path is None else read_record(path)
