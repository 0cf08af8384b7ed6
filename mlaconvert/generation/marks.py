"""What a generated file says of its making: a digest of each setting, in the file itself, so that it cannot be mislaid.

Digests tell settings apart and give nothing away, so a video may be published with them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.model.wan import WanModel

_SAMPLES = 16  # values of a matrix that stand for it


def raw_bytes(tensor: Tensor) -> bytes:
    """A tensor's values in float32, as bytes."""
    return tensor.detach().float().cpu().contiguous().numpy().tobytes()


def fingerprint_of(checkpoint: Checkpoint) -> str:
    """Tells weights apart without reading all: whole biases and norms, and a few values of every larger tensor."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.names):
        tensor = checkpoint.read(name).reshape(-1)
        step = 1 if len(checkpoint.info(name).shape) < 2 else max(1, len(tensor) // _SAMPLES)
        digest.update(f"{name} {list(checkpoint.info(name).shape)} ".encode() + raw_bytes(tensor[::step]))
    return digest.hexdigest()


def fingerprint(model: WanModel) -> str:
    """Tells weights apart by their biases and norms, which every training and conversion changes."""
    return hashlib.sha256(b"".join(raw_bytes(p) for p in model.parameters() if p.ndim == 1)).hexdigest()


MARK = "mlaconvert"  # begins a movie's comment, and names the entry of a safetensors header
_TAIL = 1 << 16  # bytes at the end of a movie, where our encoder puts its comment


def digests(settings: Mapping[str, Any]) -> dict[str, str]:
    """A digest of each setting, which must be plain data."""
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
        for name, value in settings.items()
    }


def read_mark(path: Path) -> dict[str, str] | None:
    """The digests in a movie's comment ("mlaconvert" and JSON) or a safetensors header; None for a file without."""
    with suppress(OSError, SafetensorError, ValueError):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(MARK, "")
        else:
            with path.open("rb") as stream:
                stream.seek(-min(_TAIL, path.stat().st_size), os.SEEK_END)
                text = stream.read().decode("utf-8", "replace").rpartition(f"{MARK} {{")[2]
                text = "{" + text.partition("}")[0] + "}"
        mark = json.loads(text)
        if isinstance(mark, dict) and all(isinstance(value, str) for value in mark.values()):
            return mark
    return None
