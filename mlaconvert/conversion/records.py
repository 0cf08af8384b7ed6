"""What a model's folder records about itself, checked as far as its readers rely on it.

Files of other versions may hold more, or less: unknown fields are let through, and every field may be missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, FiniteFloat, ValidationError

from mlaconvert.config.parsing import adapter
from mlaconvert.errors import CheckpointError
from mlaconvert.files.inputs import is_file, read_json
from mlaconvert.files.names import CONVERSION_NAME, HEALING_NAME

_Pixels = Annotated[int, Field(ge=1, le=1 << 14)]
_OPEN: dict[str, Any] = {"extra": "ignore", "strict": True}


@dataclass(frozen=True, kw_only=True)
class _Source:
    __pydantic_config__: ClassVar[dict[str, Any]] = _OPEN
    name: str | None = None
    subfolder: str | None = None
    state_key: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    __pydantic_config__: ClassVar[dict[str, Any]] = _OPEN
    height: _Pixels | None = None
    width: _Pixels | None = None
    vae_stride: _Pixels | None = None
    stage: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Layer:
    __pydantic_config__: ClassVar[dict[str, Any]] = _OPEN
    layer: int
    effective_rank: int
    energy_at_kv_rank: FiniteFloat
    singular_values: list[FiniteFloat]


@dataclass(frozen=True, kw_only=True)
class _Conversion:
    __pydantic_config__: ClassVar[dict[str, Any]] = _OPEN
    source: _Source | None = None
    recipe: _Recipe | None = None
    layers: list[_Layer] | None = None


@dataclass(frozen=True, kw_only=True)
class _Stage:
    __pydantic_config__: ClassVar[dict[str, Any]] = _OPEN
    recipe: _Recipe | None = None
    written: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class _Healing(_Stage):
    before: list[_Stage] | None = None


_KINDS: dict[str, type[_Conversion] | type[_Healing]] = {CONVERSION_NAME: _Conversion, HEALING_NAME: _Healing}


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON record of a model folder, None where there is none. Raises CheckpointError naming the file and field."""
    if not is_file(path):
        return None
    data = read_json(path)
    kind = _KINDS.get(path.name)
    if kind is not None:
        try:
            adapter(kind).validate_json(json.dumps(data))  # type: ignore[arg-type]  # classes are hashable
        except (ValidationError, ValueError) as failure:
            reason = "not plain data"
            if isinstance(failure, ValidationError):
                first = failure.errors()[0]
                reason = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
            raise CheckpointError(f"{path}: {reason}; get an intact copy, or delete the file") from None
    return data
