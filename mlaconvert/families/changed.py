"""A checkpoint some of whose tensors are not as its files hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mlaconvert.families.checkpoint import Checkpoint

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ChangedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are read with `changes`, by canonical name; names, shapes and dtypes are its own."""

    changes: Mapping[str, Change]

    def read(self, canonical: str) -> Tensor:
        """One tensor, changed. Raises what `Checkpoint.read` raises, and what the change does."""
        change, tensor = self.changes.get(canonical), super().read(canonical)
        return tensor if change is None else change(tensor)

    def is_stored(self, canonical: str) -> bool:
        """False for what is changed."""
        return super().is_stored(canonical) and canonical not in self.changes


def with_tensors(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """A view of `checkpoint` with `tensors`, by canonical name, in place of its own, in its own dtypes."""
    return ChangedCheckpoint(**fields_of(checkpoint), changes={name: _give(value) for name, value in tensors.items()})


def fields_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a view of another class is made from."""
    return {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}


def _give(value: Tensor) -> Change:
    return lambda own: value.to(own.dtype)
