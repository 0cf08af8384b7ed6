"""What healing Wan2.1 1.3B costs, counted: FLOPs and hours of one GPU by stage; prints a Markdown table.

    python benchmarks/healing_cost.py [--tflops 400] [--write BENCHMARKS.md]

The shipped recipes, at 480 x 832 and 21 latent frames, a calibrated conversion to 224 scalars and the key norm. Nothing
is run: FLOPs are those that `heal --dry-run` counts, hours are FLOPs at a rate that a GPU is taken to sustain.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from tables import put_between

from mlaconvert.conversion.recipes import load_recipe, mla_config, resolve_recipe
from mlaconvert.evaluation.bench.setting import GEOMETRIES
from mlaconvert.families.known import family_of
from mlaconvert.healing.estimate import estimate
from mlaconvert.healing.frames import views
from mlaconvert.healing.recipe import load_heal_recipe

FRAMES, SIZE = 21, (60, 104)  # latent frames of a clip, and its latent pixels
STAGES = {
    "self-forcing-distill": "none: from its own checkpoint",
    "videomla-distill": "none: before its stages",
    "videomla-teacher-forcing": "1, teacher forcing",
    "videomla-consistency": "2, consistency",
    "videomla-dmd": "3, DMD",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tflops", type=float, default=400.0, help="that a GPU sustains (default 400)")
    parser.add_argument("--write", type=Path, help="put the table between the markers of this file")
    arguments = parser.parse_args()
    text = table(arguments.tflops)
    print(text)
    if arguments.write is not None:
        put_between(arguments.write, "healing cost", text)


def table(tflops: float) -> str:
    """A row a recipe."""
    recipe = load_recipe("self-forcing-1.3b")
    teacher = replace(GEOMETRIES["1.3b"], streaming=recipe.streaming)
    student = replace(teacher, mla=mla_config(resolve_recipe(recipe, teacher), teacher))
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
    return "\n".join(lines)


if __name__ == "__main__":
    main()
