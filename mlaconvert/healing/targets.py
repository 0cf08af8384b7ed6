"""What a teacher makes of batches that come again: computed once, and kept in files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlaconvert.files.whole import whole_file

_NAME = "target"


@dataclass(frozen=True)
class Targets:
    """One tensor a batch, in a folder that belongs to one run's clips, noise and teacher."""

    folder: Path

    def get(self, batch: str, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """What `make` gave when the batch of that name first came, or gives now. Raises OSError."""
        path = self.folder / f"{batch}.safetensors"
        try:
            return load_file(path, device=str(device))[_NAME]
        except (FileNotFoundError, KeyError, SafetensorError):  # not there yet, or damaged
            made = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            save_file({_NAME: made.contiguous()}, partial)
        return made
