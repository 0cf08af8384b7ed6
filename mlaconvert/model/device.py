"""The device that a name means."""

from __future__ import annotations

import torch

from mlaconvert.errors import ConfigError
from mlaconvert.files.inputs import reason_of


def resolve_device(name: str, dtype: torch.dtype = torch.float64) -> torch.device:
    """The torch device of that name. Raises ConfigError when it is not there, or does not know `dtype`."""
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=dtype, device=device).item()
    except Exception as error:  # torch raises whatever its backends raise
        kind = str(dtype).removeprefix("torch.")
        raise ConfigError(f"device {name!r} cannot be used for {kind} ({reason_of(error)}); use cpu or cuda") from None
    return device
