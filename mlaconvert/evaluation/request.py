"""What `evaluate` is asked to do, and what the models' files say before their weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.parsing import check_fields
from mlaconvert.conversion.records import read_record
from mlaconvert.files.find import find_beside
from mlaconvert.files.origin import Origin, origin_of
from mlaconvert.files.store import TensorStore


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `evaluate_models` may be asked for; None takes the default.

    `data` is a folder of clips, `clips` how many (by default 64 of the built-in model's, else 8). `frames` is the
    length of the rollouts in latent frames (0 for none), `videos` their number. `steps` are Euler steps (by default 12
    for the built-in model, the few-step schedule for streaming checkpoints, 20 for others). `dtype` is that of both
    models, by default the first converted one's.
    """

    teacher: str | None = None
    data: Path | None = None
    clips: Annotated[int, Field(ge=1)] | None = None
    frames: Annotated[int, Field(ge=0)] = 60
    videos: Annotated[int, Field(ge=1)] = 3
    steps: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    revision: str | None = None  # of the models, not of the teacher
    subfolder: str | None = None
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """What a model's files say before its weights are read."""

    source: str
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
