"""Rollouts through small caches, one run: how far they end from the teacher's, their peak of memory, a chunk's time.

    python benchmarks/cache_rollouts.py FOLDER ... [--batch 3] [--write BENCHMARKS.md]

Folders are conversions of the shipped model. Beside them run the dense model and its cache narrowed to every
`--cache-dtype`. Rollouts are those of `evaluate`: 60 frames that continue held-back clips, in turn with the dense
model's, from the same noise. Peaks are of a rollout alone until its window is full and one more chunk, without weights.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from cache_bytes import token_bytes
from tables import put_between

from mlaconvert.config.cache_dtype import CACHE_DTYPES
from mlaconvert.evaluation.bench.memory import profiled_peak
from mlaconvert.evaluation.conditions import tiny_conditions
from mlaconvert.evaluation.drift import RolloutPlan, compare_videos, paired_rollouts
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel


class Row(NamedTuple):
    """One cache: bytes of a token and layer, and against the dense model's, over the last third of the frames."""

    name: str
    bytes: float
    difference: float
    peak: float
    speed: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", type=Path, nargs="+", help="converted models")
    parser.add_argument("--batch", type=int, default=3, help="videos at once (default 3)")
    parser.add_argument("--write", type=Path, help="put the table between the markers of this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dense = load_model("tiny")
    plan = tiny_conditions(dense.config.streaming, videos=arguments.batch).rollout
    assert plan is not None
    sides = [(f"`{folder.name}`", load_model(folder)) for folder in arguments.folders]
    sides += [(f"dense, `{dtype}`", load_model("tiny", cache_dtype=dtype)) for dtype in CACHE_DTYPES]
    base = peak(dense, plan)
    rows = []
    for name, model in [("dense", dense), *sides]:
        expected, video, speed = paired_rollouts(dense, model, plan)
        difference = compare_videos(expected, video, expected).late_difference["student"]
        rows.append(Row(name, token_bytes(model), difference, peak(model, plan) / base, speed.ratio))
        print(rows[-1], file=sys.stderr, flush=True)
    text = table(rows, plan)
    print(text)
    if arguments.write is not None:
        put_between(arguments.write, "rollouts", text)


def peak(model: WanModel, plan: RolloutPlan) -> int:
    """Of a rollout's first chunks: bytes beside the weights."""
    streaming = plan.streaming
    chunks = -(-streaming.window_frames // streaming.chunk_frames) + 1
    return profiled_peak(lambda: list(islice(plan.chunks(model), chunks)))


def table(rows: list[Row], plan: RolloutPlan) -> str:
    """The rows as Markdown."""
    lines = [
        f"| cache | bytes | difference after {plan.frames} frames | peak of memory, dense = 1 | speed, dense = 1 |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {r.name} | {r.bytes:.0f} | {100 * r.difference:.1f}% | {r.peak:.2f} | {r.speed:.2f} |" for r in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
