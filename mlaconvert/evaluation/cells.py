"""The cells of a sweep: which conversions it makes, and what is measured of each.

The axes are those of VideoMLA's Tables 5a and 5b (arXiv 2605.30351): the width of the latent, and how a head divides
into unrotated and rotated channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from mlaconvert.config.parsing import STRICT, Count, check_fields, parse
from mlaconvert.conversion.plan import ConversionPlan, plan_conversion
from mlaconvert.conversion.recipe import ConvertRecipe, Init
from mlaconvert.conversion.recipes import load_recipe, read_recipe, with_init
from mlaconvert.errors import ConfigError
from mlaconvert.evaluation.timesteps import CleanPast
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.files.shipped import recipe_folder, recipe_names


@dataclass(frozen=True, kw_only=True)
class SweepRecipe:
    """The cells of a sweep: every value of `inits` with each of `kv_ranks` and each split of a head.

    A split is that of a shared rotary key, cached as the paper does unless the recipe reads it from the latent.
    Raises ConfigError naming the field.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    convert: str | None = None
    """The recipe that all cells start from: a file or a shipped one; None is the defaults."""
    inits: tuple[Init, ...] = ()
    """Ways to make the new weights; none is the recipe's."""
    kv_ranks: tuple[Count, ...] = ()
    """Ranks of the latent; none is the recipe's."""
    rope_dims: tuple[Count, ...] = ()
    """Rotated channels of a head, shared by all heads; none is the recipe's."""
    nope_dims: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Unrotated channels of a head, one for each of `rope_dims`; by default what is left of the head."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.nope_dims and len(self.nope_dims) != len(self.rope_dims):
            raise ConfigError(
                f"nope_dims has {len(self.nope_dims)} values for {len(self.rope_dims)} rope_dims; give one for each"
            )
        if not (self.inits or self.kv_ranks or self.rope_dims):
            raise ConfigError(
                "nothing to sweep; give values of --kv-ranks, --rope-dims or --init, or a --recipe that names some"
            )


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One conversion of a sweep. `name` says what differs, and is the name of its files."""

    name: str
    recipe: ConvertRecipe


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What one cell costs and loses, on the clips of the sweep; errors are relative to the dense model's output.

    Losses and errors are those with noisy pasts; `clean_past` has them behind clean ones, None where clips have no past
    (bidirectional models) and in cells that versions before it measured. `scalars` are cached for a token over all
    layers. `seconds` is the time of the conversion.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    name: str
    init: str
    kv_rank: int
    rope_dim: int | None
    nope_dim: int | None
    scalars: int
    dense_scalars: int
    teacher_loss: float
    loss: float
    velocity_error: float
    attention_error_median: float
    attention_error_worst: float
    seconds: float
    clean_past: CleanPast | None = None

    @property
    def excess(self) -> float:
        """Loss above the dense model's, as a share of it."""
        return self.loss / self.teacher_loss - 1

    @property
    def cache_reduction(self) -> float:
        """Share of the dense cache that is saved."""
        return 1 - self.scalars / self.dense_scalars

    @property
    def series(self) -> str:
        """What a line of the plot has in common: init and split."""
        split = "" if self.rope_dim is None else f", {self.nope_dim}/{self.rope_dim}"
        return f"{self.init}{split}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        derived = {"excess": self.excess, "cache_reduction": self.cache_reduction}
        clean_past = self.clean_past.to_json() if self.clean_past is not None else None
        return dataclasses.asdict(self) | derived | {"clean_past": clean_past}


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """All cells in order; `clips_from` says what they were compared on."""

    source: str
    clips_from: str
    clips: int
    results: tuple[CellResult, ...]
    output: Path

    def to_json(self) -> dict[str, Any]:
        """Plain data: every cell."""
        return {
            "source": self.source,
            "data": {"from": self.clips_from, "clips": self.clips},
            "cells": [result.to_json() for result in self.results],
        }


def sweep_recipe_names() -> list[str]:
    """Names of the sweep recipes that ship with mlaconvert."""
    return recipe_names(recipe_folder() / "sweep")


def load_sweep_recipe(recipe: str | Path | None, options: Mapping[str, Any]) -> SweepRecipe:
    """A YAML file or a shipped recipe by its name (or nothing), with `options` on top.

    Raises ConfigError naming the file and the field.
    """
    data: dict[str, Any] = {}
    if recipe is not None:
        _, data = read_recipe(recipe, recipe_folder() / "sweep", "sweep recipes", "kv_ranks: [8, 16]")
    if "rope_dims" in options:  # another list of splits, to which the recipe's other half does not belong
        data.pop("nope_dims", None)
    return parse(SweepRecipe, data | dict(options), "options" if recipe is None else f"{recipe} and options")


def cells(recipe: SweepRecipe, checkpoint: Checkpoint, **settings: Any) -> list[tuple[Cell, ConversionPlan]]:
    """Every cell with its plan; `settings` (clips, seed) override the conversion's recipe.

    Raises ConfigError naming the first cell that does not fit the model.
    """
    base = load_recipe(recipe.convert) if recipe.convert is not None else ConvertRecipe()
    if base.bytes_per_token is not None:
        raise ConfigError(
            f"{recipe.convert}: a sweep compares numbers of scalars, and this recipe counts bytes; leave its "
            "bytes_per_token out"
        )
    fields = {name: value for name, value in settings.items() if value is not None}
    nope_dims: Sequence[int | None] = recipe.nope_dims or [None] * len(recipe.rope_dims)
    splits: list[tuple[int, int | None] | None] = [*zip(recipe.rope_dims, nope_dims, strict=True)] or [None]
    planned: dict[str, tuple[Cell, ConversionPlan]] = {}
    for init in recipe.inits or (base.init,):
        for kv_rank in recipe.kv_ranks or (base.kv_rank,):
            for split in splits:
                changes: dict[str, Any] = {"kv_rank": kv_rank} | fields
                if split is not None:
                    rope = base.rope if base.rope in ("cached", "latent") else "cached"
                    changes |= {"rope_dim": split[0], "nope_dim": split[1], "rope": rope}
                    if init == "calibrated" and rope == "cached":
                        changes["allocation"] = "fixed"  # as it is given, not as it measures best
                cell, plan = _cell(dataclasses.replace(with_init(base, init), **changes), checkpoint)
                planned[cell.name] = (cell, plan)
    return list(planned.values())


def _cell(recipe: ConvertRecipe, checkpoint: Checkpoint) -> tuple[Cell, ConversionPlan]:
    sizes = {"kv": recipe.kv_rank, "rope": recipe.rope_dim, "nope": recipe.nope_dim}
    name = "-".join((recipe.init, *(f"{what}{size}" for what, size in sizes.items() if size is not None)))
    try:
        return Cell(name=name, recipe=recipe), plan_conversion(checkpoint, recipe)
    except ConfigError as error:
        raise ConfigError(f"cell {name}: {error}") from None
