"""What several of these tests are made of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.publishing.plan import PushReport

REPO = "alice/wan-mla"
ALL = {".gitattributes", "README.md", CONFIG_NAME, "conversion.json", WEIGHTS_NAME}


def states(report: PushReport) -> dict[str, str]:
    return {file.path: file.state for file in report.plan.files}


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def once(pattern: str, verdict: int | str) -> Callable[[str, str], int | str | None]:
    """Do `verdict` to the first request whose "METHOD path" matches."""
    left = [verdict]

    def before(method: str, path: str) -> int | str | None:
        return left.pop() if left and re.search(pattern, f"{method} {path}") else None

    return before


EVALUATION = {
    "teacher": "wan_tiny",
    "data": {"from": "somewhere", "clips": 7, "seeds": list(range(40))},
    "conditions": {"seed": 3, "notes": ["a note"]},
    "versions": {"torch": "2.6"},
    "models": [
        {
            "path": "wan-mla",
            "teacher_loss": 0.25,
            "student_loss": 0.28,
            "excess": 0.12,
            "velocity_error": 0.0345,
            "velocity_by_timestep": [{"timestep": 1000.0}] * 40,
            "attention_errors": [0.1, 0.3, 0.2],
            "cache_bytes": {"teacher": 4096, "student": 512},
            "frames_per_second": {"teacher": 2.0, "student": 3.5, "ratio": 1.75},
            "vbench": {"scores": {"imaging_quality": 0.61}},
        }
    ],
    "teacher_vbench": {"scores": {"imaging_quality": 0.64}},
}
