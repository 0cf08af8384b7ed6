"""Where a model came from: what the conversion.json in its folder says of its source, and where that may lie.

The one place that reads it. A record may be of another version, or edited: what is not as expected counts as unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(/.*)?")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The source of a conversion; None for what is not recorded.

    `name` is a Hub id, or of a local path its last part; `revision` the Hub's commit. `subfolder` is the expert's,
    `state_key` the key of a pickle's state dict. `sha256` is the hash of the weight files (`TensorStore.sha256`),
    `loras` the records of what was merged, unchecked (`families.merged.find_recorded`).
    """

    name: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    state_key: str | None = None
    sha256: str | None = None
    loras: Any = None

    @property
    def hub_id(self) -> str | None:
        """The Hub's name (user/repo) of the source, None for a local one, whose path is not recorded."""
        match = _HUB_ID.fullmatch(self.name or "")
        return match[1] if match else None

    @property
    def places(self) -> list[tuple[str, str | None]]:
        """Name and revision, likeliest first, by which the source may be found from here or on the Hub."""
        if self.name is None:
            return []
        return [(self.name, self.revision), (self.name, None)] if self.revision is not None else [(self.name, None)]

    def beside(self, model: str | Path) -> Path | None:
        """Where the source would lie beside a model on this disk; None for a model or a source on the Hub."""
        around = folders_around(model)
        return around[0] / self.name if around and self.name is not None and "/" not in self.name else None


def origin_of(conversion: Mapping[str, Any] | None) -> Origin:
    """What a conversion.json (None: there is none) says of its source."""
    source = (conversion or {}).get("source")
    record = source if isinstance(source, Mapping) else {}
    texts = ("name", "revision", "subfolder", "state_key", "sha256")
    known = {name: record[name] for name in texts if isinstance(record.get(name), str)}
    return Origin(**known, loras=record.get("loras"))


def folders_around(model: str | Path) -> list[Path]:
    """The folder that a model on this disk lies in, and its own; [] for one on the Hub."""
    path = Path(model).expanduser().absolute()
    folder = path.parent if path.is_file() else path
    return [folder.parent, folder] if path.exists() else []
