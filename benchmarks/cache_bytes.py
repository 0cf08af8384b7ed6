"""Loss against bytes: caches in bits, plain latents, and dense caches that are quantised without any training.

    python benchmarks/fidelity.py --only '^[0-9]+$|the default[*]|twice the cache' --json > found.json
    python benchmarks/cache_bytes.py found.json [--write BENCHMARKS.md] [--plot docs/images/bytes.png]

Dense caches are measured here: the shipped model as its own student, its cache narrowed (`--cache-dtype`), the newest
chunk exact as everywhere. Bytes are those of a token and layer, on average over layers; plain latents are in bfloat16.
Quant-VideoGen is measured a second time with its clusters over a whole chunk, as its authors have it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from fidelity import TOTAL, compared
from tables import put_between
from torch import Tensor

from mlaconvert.config.cache_dtype import CACHE_DTYPES, CODINGS, CacheDtype
from mlaconvert.model.attention.dense import DenseAttention
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.group_quantizer import GroupQuantizer
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel

CLUSTERED = [dtype for dtype, coding in CODINGS.items() if coding.stages]
PLAIN = {"and the whole model refitted: **the default**": TOTAL + 1, "the default at twice the cache": 2 * TOTAL + 1}


class Point(NamedTuple):
    """A cache: its bytes, and three figures in percent, each with a value for every seed."""

    kind: str
    name: str
    bytes: float
    clean: list[float]
    velocity: list[float]
    noisy: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("found", type=Path, help="what fidelity.py printed with --json")
    parser.add_argument("--write", type=Path, help="put the table between the markers of this file")
    parser.add_argument("--plot", type=Path, help="draw loss against bytes")
    arguments = parser.parse_args()
    converted = _converted(json.loads(arguments.found.read_text()))
    points = [*converted, *map(_rival, CACHE_DTYPES), *map(_chunkwise, CLUSTERED)]
    text = _table(points)
    print(text)
    if arguments.write is not None:
        put_between(arguments.write, "bytes", text)
    if arguments.plot is not None:
        _plot(points, arguments.plot)


def _converted(found: dict[str, dict[str, dict[str, float]]]) -> list[Point]:
    points = []
    for row, by_seed in found.items():
        values = {name: [one[name] for one in by_seed.values()] for name in ("clean", "velocity", "noisy")}
        if row in PLAIN:
            points.append(Point("latents in bfloat16", f"{PLAIN[row]} scalars", 2 * PLAIN[row], **values))
        elif row.isdecimal():
            points.append(Point("latents in bits", f"--bytes-per-token {row}", int(row), **values))
    return sorted(points, key=lambda point: (point.kind, -point.bytes))


def _rival(dtype: CacheDtype) -> Point:
    """The dense model with its cache narrowed, against itself."""
    narrowed = load_model("tiny", cache_dtype=dtype)
    found = compared(load_model("tiny"), narrowed)
    values = ([found.clean], [found.velocity], [found.noisy])
    kind = "dense, Quant-VideoGen" if dtype in CLUSTERED else "dense, quantised"
    return Point(kind, f"--cache-dtype {dtype}", token_bytes(narrowed), *values)


def token_bytes(model: WanModel) -> float:
    """Bytes of a token and layer, on average over layers, as a bfloat16 model has it: so is what is not narrowed."""
    cache = LatentCache(model.config, batch=1, height=24, width=32, dtype=torch.bfloat16, device="meta")
    return cache.nbytes / (cache.streaming.window_frames * cache.tokens_per_frame * model.config.num_layers)


class ChunkQuantizer(GroupQuantizer):
    """Clusters over a chunk's tokens: right in a masked pass over whole chunks, where every chunk is in sight whole."""

    frames: int

    def round_trip(self, tokens: int, cached: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """As it is, for the tokens of a chunk."""
        return super().round_trip(self.frames * tokens, cached)


def _chunkwise(dtype: CacheDtype) -> Point:
    """`_rival` with clusters over a chunk: by masked passes alone."""
    narrowed = load_model("tiny", cache_dtype=dtype)
    config = narrowed.config
    assert config.streaming is not None
    tokens = config.streaming.chunk_frames * config.tokens_per_frame(24, 32)
    for index, attention in enumerate(m for m in narrowed.modules() if isinstance(m, DenseAttention)):
        attention.group_quantizer = ChunkQuantizer(dtype, config.cached_parts(index))
        attention.group_quantizer.frames = config.streaming.chunk_frames
    found = compared(load_model("tiny"), narrowed)
    size = statistics.mean(config.frame_bytes(2, tokens)) / tokens
    values = ([found.clean], [found.velocity], [found.noisy])
    return Point("Quant-VideoGen, over a chunk", dtype, size, *values)


def _table(points: list[Point]) -> str:
    dense = 2 * 2 * load_model("tiny").config.dim
    lines = [
        "| cache | | bytes | of dense | behind clean pasts | velocity | with noisy pasts |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in points:
        cells = " | ".join(_spread(values) for values in (point.clean, point.velocity, point.noisy))
        share = f"{100 * (point.bytes / dense - 1):.1f}%"
        lines.append(f"| {point.kind} | `{point.name}` | {point.bytes:.0f} | {share} | {cells} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    digits = 1 if max(values) >= 5 else 2
    text = f"{statistics.mean(values):.{digits}f}%"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _plot(points: list[Point], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4))
    styles = {
        "latents in bits": "o-",
        "latents in bfloat16": "s--",
        "dense, quantised": "^:",
        "dense, Quant-VideoGen": "v:",
        "Quant-VideoGen, over a chunk": "x",
    }
    for kind, style in styles.items():
        some = [point for point in points if point.kind == kind]
        least = [max(statistics.mean(point.clean), 0.01) for point in some]
        axes.plot([point.bytes for point in some], least, style, label=kind)
        for point, value in zip(some, least, strict=True):
            short = point.name.removeprefix("--cache-dtype ").removeprefix("--bytes-per-token ")
            place, side = ((-5, -11), "right") if style == "x" else ((5, 4), "left")
            axes.annotate(short, (point.bytes, value), xytext=place, textcoords="offset points", ha=side, fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="bytes a token and layer (dense in bfloat16: 768)")
    axes.set_ylabel("loss behind clean pasts above the teacher's, %")
    ticks = [14, 28, 56, 112, 224, 448]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
