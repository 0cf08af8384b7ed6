"""What converting and healing Wan2.1 1.3B cost, counted: FLOPs and hours by part or stage; prints Markdown tables.

    python benchmarks/cost.py conversion|healing [--tflops 400] [--write BENCHMARKS.md]
    python benchmarks/cost.py measured [--folder DIR] [--threads 2] [--write BENCHMARKS.md]

The shipped recipes, at 480 x 832, a calibrated conversion to 224 scalars and the key norm. For the first two nothing is
run: FLOPs are those that `--dry-run` counts, hours are FLOPs at rates that a device is taken to sustain. `measured`
converts a file of 1.3B with random weights on the CPU, all 30 layers, with clips that are small enough to wait for, and
holds the time that it took against the one that `--dry-run` told. It needs 12 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scale import MLACONVERT, write_clips, write_model
from tables import put_between

from mlaconvert.config.geometry import WanConfig
from mlaconvert.conversion.calibration.method import Method
from mlaconvert.conversion.cost import ON_GPU_IN_BF16, clip_shape, conversion_work
from mlaconvert.conversion.plan import ConversionPlan
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.recipes import load_recipe, mla_config, resolve_recipe, with_refit_steps
from mlaconvert.evaluation.bench.setting import GEOMETRIES
from mlaconvert.families.known import family_of
from mlaconvert.healing.estimate import estimate
from mlaconvert.healing.frames import views
from mlaconvert.healing.recipe import load_heal_recipe

RECIPE = "self-forcing-1.3b"
FRAMES, SIZE = 21, (60, 104)  # of a healing's clip: latent frames, and latent pixels
CLIPS = (5, 16, 9, 6, 8)  # [N, C, F, H, W] of `measured`: 12 tokens a frame, where 480 x 832 has 1,560
# TFLOP/s that devices are taken to sustain: a CPU of some 16 cores, and a GPU in float32 (bfloat16 is an option).
CPU, GPU_FLOAT32 = 0.5, 50.0
STAGES = {
    "self-forcing-distill": "none: from its own checkpoint",
    "videomla-distill": "none: before its stages",
    "videomla-teacher-forcing": "1, teacher forcing",
    "videomla-consistency": "2, consistency",
    "videomla-dmd": "3, DMD",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("conversion", "healing", "measured"))
    parser.add_argument("--tflops", type=float, default=400.0, help="that a GPU sustains in bfloat16 (default 400)")
    parser.add_argument("--folder", type=Path, help="where `measured` writes; default: the temporary folder")
    parser.add_argument("--threads", type=int, default=2, help="of `measured` (default 2)")
    parser.add_argument("--write", type=Path, help="put the table between the markers of this file")
    arguments = parser.parse_args()
    if arguments.what == "measured":
        lines = measured(arguments.folder, arguments.threads)
    else:
        lines = (conversion if arguments.what == "conversion" else healing)(arguments.tflops)
    text = "\n".join(lines)
    print(text)
    if arguments.write is not None:
        put_between(arguments.write, f"cost: {arguments.what}", text)


def geometries() -> tuple[ConvertRecipe, WanConfig, WanConfig]:
    """The conversion's recipe, the teacher and the student."""
    recipe = load_recipe(RECIPE)
    teacher = replace(GEOMETRIES["1.3b"], streaming=recipe.streaming)
    recipe = resolve_recipe(recipe, teacher)
    return recipe, teacher, replace(teacher, mla=mla_config(recipe, teacher))


def conversion(tflops: float) -> list[str]:
    """A row a part of a conversion: with the model's own clips and no refit of the whole on a CPU, with it on a GPU."""
    recipe, teacher, student = geometries()
    works = []
    for device in ("cpu", "cuda"):
        plan = ConversionPlan(
            source=RECIPE,
            subfolder="",
            description="",
            recipe=with_refit_steps(recipe, teacher, torch.device(device)),
            method=Method(),
            source_config=teacher,
            config=student,
            operations=(),
            source_bytes=0,
        )
        works.append(conversion_work(plan, clip_shape(plan, None), makes_clips=True))
    on_cpu, on_gpu = works
    lines = [
        f"| part | PFLOP on a CPU | hours at {CPU} TFLOP/s | PFLOP on a GPU | minutes at {tflops:.0f} TFLOP/s, "
        f"{GPU_FLOAT32:.0f} in float32 |",
        "|---|---|---|---|---|",
    ]
    totals = [0.0] * 4
    for part, work in on_gpu.items():
        half = part in ON_GPU_IN_BF16
        rate = tflops if half else GPU_FLOAT32
        flops = on_cpu[part].flops if part in on_cpu else 0.0
        values = [flops / 1e15, flops / CPU / 1e12 / 3600, work.flops / 1e15, work.flops / rate / 1e12 / 60]
        totals = [a + b for a, b in zip(totals, values, strict=True)]
        lines.append(f"| {part}{' (bfloat16 on a GPU)' if half else ''} | {_row(values)} |")
    return [*lines, f"| all | {_row(totals)} |"]


def _row(values: list[float]) -> str:
    return " | ".join(f"{value:.1f}" if value >= 0.05 else "0" if not value else "under 0.1" for value in values)


def healing(tflops: float) -> list[str]:
    """A row a recipe."""
    _, teacher, student = geometries()
    (view,) = views(FRAMES, student.streaming)
    lines = [
        f"| recipe | the paper's stage | steps | clips a step | PFLOP a step | EFLOP | hours at {tflops:.0f} TFLOP/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, stage in STAGES.items():
        chosen = load_heal_recipe(name, {}).resolved()
        trained = list(family_of(student).expected_shapes(student).values())  # says what memory takes, not FLOPs
        step = estimate(chosen, student, teacher, trained, view, size=SIZE).flops
        total = chosen.steps * step
        lines.append(
            f"| `{name}` | {stage} | {chosen.steps:,} | {chosen.batch * chosen.accumulate} | {step / 1e15:.1f} | "
            f"{total / 1e18:.1f} | {total / tflops / 1e12 / 3600:.0f} |"
        )
    return lines


def measured(folder: Path | None, threads: int) -> list[str]:
    """What the conversion said that it would take, and what it took, by part."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="mlaconvert-") as name:
        source, clips = Path(name) / "source", Path(name) / "clips"
        write_model(source, GEOMETRIES["1.3b"], torch.float32)
        write_clips(clips, CLIPS, GEOMETRIES["1.3b"].text_dim)
        command = [*MLACONVERT, "convert", str(source), "--recipe", RECIPE, "--data", str(clips), "--json"]
        command += ["--clips", str(CLIPS[0])]
        told = _converted([*command, "--dry-run"], threads)["estimate"]
        began = time.monotonic()
        took = _converted([*command, "-o", str(Path(name) / "output")], threads)["seconds"]
        total = time.monotonic() - began
    lines = ["| | minutes |", "|---|---|"]
    for part, seconds in told["seconds"].items():
        lines.append(f"| {part}, estimated ({told['flops'][part] / 1e12:.0f} TFLOP) | {seconds / 60:.1f} |")
    lines.append(f"| all, estimated | {told['total_seconds'] / 60:.1f} |")
    lines += [f"| {part}, measured | {seconds / 60:.1f} |" for part, seconds in took.items()]
    return [*lines, f"| all, measured: parts run side by side | {total / 60:.1f} |"]


def _converted(command: list[str], threads: int) -> dict[str, Any]:
    """What `convert --json` prints of the one model."""
    run = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=subprocess.PIPE, text=True, check=False
    )
    if run.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {run.returncode}")
    (found,) = json.loads(run.stdout)["models"]
    return dict(found)


if __name__ == "__main__":
    main()
