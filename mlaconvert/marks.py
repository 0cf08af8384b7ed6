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
        found = json.loads(text)
        if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
            return found
    return None
