"""A teacher's velocities for batches that come again: computed once, and kept in files."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mlaconvert.files.whole import write_whole
from mlaconvert.healing.batches import mix
from mlaconvert.healing.recipe import CHANGEABLE, HealRecipe

FOLDER, _NAME = "targets", "target"


class Targets:
    """One tensor a batch, in a folder below a run's state that belongs to its clips, noise and teacher.

    What runs with others kept there is deleted if this is the process that `writes` for all.
    """

    def __init__(
        self, state: Path, recipe: HealRecipe, identity: Mapping[str, str], processes: int, *, writes: bool
    ) -> None:
        settings = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in CHANGEABLE}
        self.folder = state / FOLDER / f"{mix(repr(settings), repr(sorted(identity.items())), processes):x}"
        for other in (state / FOLDER).glob("*") if writes else ():
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)

    def get(self, batch: str, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """What `make` gave when the batch of that name first came, or gives now. Raises OSError."""
        path = self.folder / f"{batch}.safetensors"
        try:
            return load_file(path, device=str(device))[_NAME]
        except (FileNotFoundError, KeyError, SafetensorError):  # not there yet, or damaged
            made = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, save({_NAME: made.contiguous()}))
        return made

    def forget(self) -> None:
        """Delete what this run kept."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)
