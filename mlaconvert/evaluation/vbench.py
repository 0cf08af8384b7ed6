"""Scores that VBench wrote (Huang et al., arXiv 2311.17982; VBench-Long likewise): `*_eval_results.json`.

Each file maps a dimension to a list that begins with the score of all videos, 0 to 1, and the scores of each video.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlaconvert.errors import InputError
from mlaconvert.files.inputs import is_file, is_folder, read_json

RESULTS = "*_eval_results.json"

# What both VBench and VBench-Long compute for one's own prompts; VideoMLA reports their mean.
SIX = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)


@dataclass(frozen=True, kw_only=True)
class VBenchScores:
    """Scores by dimension, 0 to 1, more is better; `videos` is how many videos or clips each was taken over."""

    scores: dict[str, float]
    videos: dict[str, int]

    @property
    def mean_of_six(self) -> float | None:
        """The plain mean of `SIX`, None unless all are there."""
        if not self.scores.keys() >= set(SIX):
            return None
        return sum(self.scores[name] for name in SIX) / len(SIX)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"scores": self.scores, "videos": self.videos, "mean_of_six": self.mean_of_six}


def load_vbench(path: Path) -> VBenchScores:
    """The scores in one result file, or in all result files of a folder and of the folders in it.

    Raises InputError when there are none, for a file that is no result, or for two scores of one dimension.
    """
    files = [path] if is_file(path) else sorted(path.rglob(RESULTS)) if is_folder(path) else []
    if not files:
        raise InputError(f"{path}: no {RESULTS} there; give the folder that VBench's --output_path named")
    found: dict[str, tuple[float, int, Path]] = {}
    for file in files:
        for name, score, videos in _read(file):
            if name in found:
                raise InputError(f"{name} is scored in {found[name][2]} and in {file}; keep the results of one run")
            found[name] = (score, videos, file)
    if not found:
        raise InputError(f"{files[0]}: it holds no scores; run VBench again")
    return VBenchScores(
        scores={name: score for name, (score, _, _) in found.items()},
        videos={name: videos for name, (_, videos, _) in found.items()},
    )


def _read(file: Path) -> Iterator[tuple[str, float, int]]:
    """(dimension, score, number of videos) of one file."""
    for name, entry in read_json(file).items():
        score = entry[0] if isinstance(entry, list) and entry else None
        if isinstance(score, bool) or not isinstance(score, int | float) or not -math.inf < score < math.inf:
            raise InputError(f"{file}: {name!r} has no score; expected VBench's [score, [a result for each video]]")
        if name == "imaging_quality" and score > 1:
            score /= 100  # early versions leave it in percent
        if not 0 <= score <= 1:
            raise InputError(f"{file}: {name!r} has the score {score}, expected 0 to 1; run VBench again")
        videos = entry[1] if len(entry) > 1 and isinstance(entry[1], list) else []
        yield name, float(score), len(videos)
