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
        raise ConfigError(f"device {name!r} {_trouble(name, kind, reason_of(error))}") from None
    return device


def _trouble(name: str, kind: str, reason: str) -> str:
    """What is wrong with a device, and which to give instead: one that is there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = ["cuda:0", "cuda:0 or cuda:1", f"cuda:0 to cuda:{count - 1}"][min(count, 3) - 1] if count else ""
    there = f"give cpu or {gpus}" if gpus else "give cpu, or auto for a GPU where there is one"
    if name.split(":", maxsplit=1)[0] == "cuda" and not count:
        built = "sees no GPU" if torch.backends.cuda.is_built() else "is built without CUDA"
        return f"is not there: this torch {built}; {there}"
    try:
        torch.device(name)
    except RuntimeError:
        return f"is none that torch knows; {there}"
    return f"cannot be used for {kind} ({reason}); {there}"
