"""How far healing brings conversions of the shipped model, and how fast; prints Markdown tables.

    python benchmarks/healing.py [--seeds 0,1,2] [--quick] [--runs DIR] [--write BENCHMARKS.md]
                                [--only caches,optimizers,teacher,long,needs,starts,stages,students,noise]
    python benchmarks/healing.py --real-size [--small]      # one step of each stage at the size of Wan2.1 T2V 1.3B

Every finished cell is kept in benchmarks/results/healing, a JSON file a table and one for what several need, with the
recipe of its run; started again, only what is missing or had another recipe is computed, and a run that was interrupted
goes on from its saved state in the folder of runs. Cells of different seeds may be computed by processes side by side.
Excess is the validation loss on held-back clips above the teacher's, in percent of it. A seed draws the conversion's
random numbers and calibration noise, the training clips and their noise, and the four draws of validation noise. The
shipped recipe is measured as it is; comparisons take fewer and smaller steps (`COMPARED`), alike in every row. Distance
by step is a run's own validation, the mean squared distance of the velocity to the teacher's on 16 held-back clips, in
percent of the teacher's loss.

The distance of few-step students: from held-back prompts, the student generates two videos each in four steps, and the
teacher two in twenty guided ones. Both sides are described by what the teacher's middle block makes of every frame
(mean and spread of its tokens). The energy distance of the two conditional distributions, prompt by prompt and then
averaged, is zero only where they agree. It is a proper measure: unlike an error against one video it does not reward
blur, and unlike a comparison of all videos at once it sees whether each fits its own prompt. It is given as a share of
how far two videos of the teacher lie apart. Two rows say what to expect: the teacher against other draws of its own
(the floor), and the teacher in four steps without training.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import functools
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from fidelity import Measured
from fidelity import compared as both_losses
from tables import put_between, step_table

from mlaconvert.clips.folder import Clips
from mlaconvert.clips.tiny.clips import held_back
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.parsing import parse
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.recipes import load_recipe, mla_config, resolve_recipe
from mlaconvert.conversion.run import convert
from mlaconvert.evaluation.bench.runner import release
from mlaconvert.evaluation.losses import validation_loss
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.shipped import TINY
from mlaconvert.healing.batches import Batch, Batches, DrawnClips, Rows, mix
from mlaconvert.healing.estimate import estimate
from mlaconvert.healing.frames import views
from mlaconvert.healing.models import trainable
from mlaconvert.healing.objective import Objective
from mlaconvert.healing.recipe import HealRecipe, load_heal_recipe
from mlaconvert.healing.run import heal, plan
from mlaconvert.healing.stages import STAGES, distill, stage_of
from mlaconvert.healing.stages.few_step import FewStep, energy_distance, reference_features
from mlaconvert.healing.stages.stage import Models
from mlaconvert.healing.state import LAST, Trained, choose_trained, fill, make_optimizer
from mlaconvert.healing.state import load as load_state
from mlaconvert.listener import Listener
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel

# Held-back clips that losses are measured on, prompts that are generated from; what every run has in common.
SIZES: dict[str, int] = {"clips": 256, "prompts": 64}
COMMON: dict[str, Any] = {"tracker": "none"}
# The recipe as it was when comparisons were made, before its loss minded clean pasts, and what they change of it.
FORMER: dict[str, Any] = {"train": "all", "batch": 64, "lr": 1.5e-3}
FORMER |= {"clean_past": 0.8, "clean_weight": 1.0, "data_share": 0.0}
COMPARED: dict[str, Any] = FORMER | {"steps": 100, "batch": 16}
# Flow matching as the teacher itself was trained, at a rate for a model that is nearly there.
FLOW: dict[str, Any] = {"stage": "teacher-forcing", "optimizer": "adamw", "lr": 1e-4}
# What long runs are made in.
LONG: dict[str, Any] = {"precision": "bf16"}
BYTES = (56, 28, 14)  # of caches in bits
OPTIMIZERS = ("soap", "adamw", "muon")
# Stage behind stage, from the calibrated start.
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "distilled, in four steps": ("tiny-distill", COMPARED),
    "and consistency": ("tiny-consistency", {"steps": 200}),
    "and dmd": ("tiny-dmd", {"steps": 50}),
}
# Dense bfloat16 peak in TFLOP/s, from the vendor's data sheets.
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0, "RTX 4090": 165.0}
Measure = Callable[["Model", int], Any]  # of a model, with a seed


@dataclasses.dataclass(frozen=True)
class Model:
    """A model folder that is made when it is first needed."""

    path: Path
    make: Callable[[Path], object]

    def folder(self) -> Path:
        """Where it lies, made if it did not."""
        if not self.path.is_dir():
            self.make(self.path)
        return self.path


@dataclasses.dataclass(frozen=True)
class Healed(Model):
    """A model that a recipe healed; made anew where another recipe's lies."""

    recipe: HealRecipe

    def folder(self) -> Path:
        healing = self.path / "healing.json"
        if healing.is_file() and not self.is_of(json.loads(healing.read_text())):
            shutil.rmtree(self.path)
            shutil.rmtree(self.state, ignore_errors=True)
        return super().folder()

    @property
    def state(self) -> Path:
        """Of its run."""
        return self.path.with_name(f"{self.path.name}.state")

    def is_of(self, record: dict[str, Any]) -> bool:
        """Whether a kept record is of a run of this recipe; what it does not name had its default."""
        return parse(HealRecipe, record["recipe"], "recipe").resolved() == self.recipe


class Cells:
    """Results by name, each kept as soon as it is known; `runs` has the models behind them.

    What stands before a name's first dash is the file of its table, which processes side by side may add to.
    """

    def __init__(self, results: Path, runs: Path) -> None:
        self.results, self.runs = results, runs
        for folder in (results, runs):
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, make: Callable[..., Any], *arguments: Any) -> Any:
        """What `make(*arguments)` gives, or gave."""
        found = self._find(name)
        return self._make(name, make, *arguments) if found is None else found

    def train(self, model: Healed, measure: Measure) -> dict[str, Any]:
        """The model's recipe, the validation during its run, and what `measure` finds."""
        found: dict[str, Any] | None = self._find(model.path.name)
        if found is None or not model.is_of(found):
            found = self._make(model.path.name, trained, model, measure)
        return found

    def _find(self, name: str) -> Any:
        path, cell = self._place(name)
        return json.loads(path.read_text()).get(cell) if path.is_file() else None

    def _make(self, name: str, make: Callable[..., Any], *arguments: Any) -> Any:
        began = time.monotonic()
        value = make(*arguments)
        path, cell = self._place(name)
        with self._alone():
            kept = (json.loads(path.read_text()) if path.is_file() else {}) | {cell: value}
            lines = (f"{json.dumps(each)}: {json.dumps(kept[each])}" for each in sorted(kept))
            partial = path.with_suffix(".partial")
            partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
            partial.replace(path)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return value

    def _place(self, name: str) -> tuple[Path, str]:
        """The file of a cell, and its name there."""
        table, cell = name.split("-", 1)
        return self.results / f"{table}.json", cell

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process writes results meanwhile."""
        folder = os.open(self.results, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def teacher(self) -> Model:
        """The shipped model as a folder that can be trained on."""
        return Model(self.runs / "teacher", copy_shipped)

    def converted(self, start: str, seed: int) -> Model:
        """The shipped model, converted as `start` says."""
        return Model(self.runs / f"{start}-{seed}", functools.partial(convert_shipped, start, seed))

    def healed(self, name: str, start: Model, seed: int, base: str = "tiny-distill", /, **options: Any) -> Healed:
        """`start`, healed by a shipped recipe with these options."""
        recipe = load_heal_recipe(base, {"seed": seed} | options | COMMON).resolved()
        return Healed(self.runs / name, functools.partial(heal_shipped, start, recipe), recipe)


# --- the shipped model -----------------------------------------------------------------------------------------------


def copy_shipped(output: Path) -> None:
    """The built-in model's files."""
    shutil.copytree(TINY, output, ignore=shutil.ignore_patterns("*.py", "__pycache__"))


def convert_shipped(start: str, seed: int, output: Path) -> None:
    """The built-in model, converted as `start` says."""
    base, rope = load_recipe("tiny"), 8  # of the same cache, where the rotary key has scalars of its own
    weights = ConvertRecipe(init="svd", kv_rank=(base.kv_rank or 0) - rope, rope_dim=rope, q_rank="none", seed=seed)
    calibrated = dataclasses.replace(base, seed=seed)
    made = {
        "random": dataclasses.replace(weights, init="random"),
        "svd": weights,
        "calibrated": calibrated,
    } | {f"bytes_{size}": dataclasses.replace(calibrated, bytes_per_token=size) for size in BYTES}
    convert("tiny", output, dataclasses.replace(made[start], height=24, width=32, vae_stride=1))


def heal_shipped(start: Model, recipe: HealRecipe, output: Path) -> None:
    """`start` healed towards the built-in model."""
    say = functools.partial(print, " ", file=sys.stderr, flush=True)
    heal(start.folder(), output, recipe, listener=Listener(say=say), teacher="tiny")


def trained(model: Healed, measure: Measure) -> dict[str, Any]:
    """What `Cells.train` keeps; what was measured goes by the name of its function."""
    curve = json.loads((model.folder() / "healing.json").read_text())["validation"]
    recipe = dataclasses.asdict(model.recipe)
    return {"recipe": recipe, "curve": curve, measure.__name__: measure(model, model.recipe.seed)}


def loss(model: Model, seed: int) -> float:
    """Validation loss on all held-back clips, over four draws of noise."""
    return validation_loss(load_model(model.folder()), held_back(SIZES["clips"]), seeds=range(4 * seed, 4 * seed + 4))


def both(model: Model, seed: int) -> Measured:
    """Both losses and the velocity error, as `fidelity.py` measures them."""
    return both_losses(load_model("tiny"), load_model(model.folder()), seed)


def teacher_loss(cells: Cells, seed: int) -> float:
    """Of the teacher as it is."""
    return cells.get(f"unhealed-teacher-{seed}", loss, cells.teacher(), seed)


def before_loss(cells: Cells, start: str, seed: int) -> float:
    """Of a conversion that is not healed."""
    return cells.get(f"unhealed-{start}-{seed}", loss, cells.converted(start, seed), seed)


def caches(cells: Cells, seeds: list[int]) -> list[str]:
    """The recipe as it ships, by what is cached: both losses and the velocity error, before and after.

    Losses are those above the teacher's. Caches in bits, and the losses above those of a teacher that got the same
    training, are measured for the first seed alone.
    """
    lines = [
        "| cache | bytes | seed | behind clean pasts | above a teacher trained alike | velocity | with noisy pasts "
        "| above a teacher trained alike |",
        "|---" * 8 + "|",
    ]
    sides = {"calibrated": ("28 scalars", 56)} | {f"bytes_{size}": ("in bits", size) for size in BYTES}
    for (start, (words, size)), seed in product(sides.items(), seeds):
        if start != "calibrated" and seed != seeds[0]:
            continue
        model = cells.converted(start, seed)
        before = Measured(*cells.get(f"caches-before-{start}-{seed}", both, model, seed))
        after = Measured(*cells.train(cells.healed(f"caches-{start}-{seed}", model, seed, **LONG), both)["both"])
        clean, velocity, noisy = (
            f"{getattr(before, name):.2f}% -> {getattr(after, name):.2f}%" for name in ("clean", "velocity", "noisy")
        )
        above = ["", ""]
        if seed == seeds[0]:
            alike = Measured(*cells.get(f"caches-alike-{seed}", trained_alike, cells, seed))
            ratios = [(100 + getattr(after, name)) / (100 + getattr(alike, name)) for name in ("clean", "noisy")]
            above = [f"{100 * (ratio - 1):.2f}%" for ratio in ratios]
        lines.append(f"| {words} | {size} | {seed} | {clean} | {above[0]} | {velocity} | {noisy} | {above[1]} |")
    return lines


def taught_teacher(cells: Cells, seed: int) -> Healed:
    """The teacher with the training that conversions get."""
    return cells.healed(f"caches-teacher-{seed}", cells.teacher(), seed, **LONG)


def trained_alike(cells: Cells, seed: int) -> Measured:
    """Of the teacher after all steps of the recipe.

    Not at its best by its own validation, which is there from the start: most of what it learns is to stay as it is.
    """
    healed = taught_teacher(cells, seed)
    healed.folder()
    state = load_state(healed.state / LAST)["parts"]["student"]
    model = load_model("tiny")
    for name, average in zip(state["weights"], state["average"], strict=True):
        fill(model.get_parameter(name), average)
    return both_losses(load_model("tiny"), model, seed)


def optimizers(cells: Cells, seeds: list[int]) -> list[str]:
    """Loss against FLOPs: the run's own validation by step for each optimizer, and both losses at its end.

    Validation is given above what the teacher itself has, whose velocity is not all that is learned.
    """
    seed = seeds[0]
    start, (_, floor) = cells.converted("calibrated", seed), cells.train(taught_teacher(cells, seed), both)["curve"][0]
    options: dict[str, Any] = {"steps": 100, "validate_every": 25} | LONG
    healed = [cells.healed(f"optimizers-{o}-{seed}", start, seed, optimizer=o, **options) for o in OPTIMIZERS]
    flops, rows, marks = plan(start.folder(), healed[0].recipe, teacher="tiny").flops, [], ""
    for model in healed:
        found = cells.train(model, both)
        (_, first), *curve = found["curve"]
        end = Measured(*found["both"])
        marks = " | ".join(f"{step} steps, {step * flops / 1e12:.0f} TFLOP" for step, _ in curve)
        values = " | ".join(f"{100 * (value - floor) / (first - floor):.0f}%" for _, value in curve)
        rows.append(f"| {model.recipe.optimizer} | {values} | {end.clean:.2f}% | {end.noisy:.2f}% |")
    head = f"| optimizer | {marks} | behind clean pasts | with noisy pasts |"
    return [head, "|---" * (head.count(" | ") + 1) + "|", *rows]


def recipe_run(cells: Cells, start: str, seed: int, **options: Any) -> dict[str, Any]:
    """All steps of the recipe as it was, but for these options."""
    model = cells.healed(f"recipe-{start}-{seed}", cells.converted(start, seed), seed, **FORMER | options)
    return cells.train(model, loss)


def trained_on(cells: Cells, seeds: list[int]) -> list[str]:
    """Against a teacher that got flow matching on the same clips for as many steps, seed by seed."""
    lines = ["| seed | a teacher that trained on | the student above that one |", "|---|---|---|"]
    for seed in seeds:
        base, after = teacher_loss(cells, seed), recipe_run(cells, "calibrated", seed)["loss"]
        more = cells.train(cells.healed(f"recipe-teacher-{seed}", cells.teacher(), seed, **FORMER | FLOW | LONG), loss)[
            "loss"
        ]
        # More training may also hurt a teacher that had enough.
        lines.append(f"| {seed} | {_excess(more, base):.2f}% | {_excess(after, min(base, more)):.2f}% |")
    return lines


def long_runs(cells: Cells) -> list[str]:
    """What the other starts need: all steps, one seed."""
    lines = []
    for start in ("random", "svd"):
        found, base = recipe_run(cells, start, 0, **LONG), teacher_loss(cells, 0)
        curve = ", ".join(f"{step}: {value:.0f}%" for step, value in _curve(found, base).items())
        lines.append(f"- {start}: {_excess(found['loss'], base):.0f}%; distance by step {curve}")
    return lines


def needs(cells: Cells) -> list[str]:
    """How a random start's excess falls with the steps of a comparison, and where that leads; one seed."""
    start, base, lines = cells.converted("random", 0), teacher_loss(cells, 0), ["| steps | excess |", "|---|---|"]
    found: dict[int, float] = {}
    for name, times in (("starts-random-0", 1), ("needs-random-0", 4)):
        model = cells.healed(name, start, 0, **COMPARED | {"steps": times * COMPARED["steps"]})
        found[times] = _excess(cells.train(model, loss)["loss"], base)
        lines.append(f"| {model.recipe.steps} | {found[times]:.0f}% |")
    power = math.log(found[1] / found[4], 4)
    at = 4 * COMPARED["steps"] * found[4] ** (1 / power) if power > 0 else math.inf
    rounded = f"{float(f'{at:.1g}'):,.0f}"  # an extrapolation has one digit
    return [*lines, "", f"It falls with the power {power:.2f} of the steps; 1% would then take about {rounded}."]


def starts(cells: Cells, seeds: list[int]) -> list[str]:
    """Excess before and after the steps of a comparison, and the run's own validation by step, for each start."""
    lines: list[str] = []
    for start in ("random", "svd", "calibrated"):
        bases = [teacher_loss(cells, seed) for seed in seeds]
        found = [compared(cells, start, seed) for seed in seeds]
        before = [_excess(before_loss(cells, start, seed), base) for seed, base in zip(seeds, bases, strict=True)]
        after = [_excess(run["loss"], base) for run, base in zip(found, bases, strict=True)]
        curves = [_curve(run, base) for run, base in zip(found, bases, strict=True)]
        distance_at = {step: statistics.mean(curve[step] for curve in curves) for step in curves[0]}
        if not lines:
            steps = " | ".join(f"distance at {step}" for step in distance_at)
            lines = [f"| start | before | after | lowest to highest | {steps} |", "|---" * (4 + len(distance_at)) + "|"]
        distances = " | ".join(f"{value:.1f}%" for value in distance_at.values())
        lines.append(f"| {start} | {statistics.mean(before):.1f}% | {_mean(after, '.1f', '%')} | {distances} |")
    return lines


def compared(cells: Cells, start: str, seed: int) -> dict[str, Any]:
    """A run of a comparison as every row has it, but for its start."""
    return cells.train(cells.healed(f"starts-{start}-{seed}", cells.converted(start, seed), seed, **COMPARED), loss)


def stages(cells: Cells, seeds: list[int]) -> list[str]:
    """From the calibrated start: what is matched, attention first or not, and what is trained."""
    half = {"steps": COMPARED["steps"] // 2}
    rows: dict[str, list[dict[str, Any]]] = {
        "distill, velocity only, train all": [{}],
        "attention first (a fifth)": [{"attention_steps": COMPARED["steps"] // 5}],
        "flow matching only (teacher forcing, AdamW at 1e-4)": [FLOW],
        "distill first, then flow matching (half each)": [half, FLOW | half],
        "train latent": [{"train": "latent"}],
        "train attention": [{"train": "attention"}],
    }
    lines = ["| from the calibrated start | excess | lowest to highest |", "|---|---|---|"]
    for name, legs in rows.items():
        found = []
        for seed in seeds:
            model, run = cells.converted("calibrated", seed), compared(cells, "calibrated", seed)
            for left, options in zip(reversed(range(len(legs))), legs, strict=True):
                if options:
                    cell = f"stages-{_slug(name)}-{seed}" + "-before" * left
                    model = cells.healed(cell, model, seed, **COMPARED | options)
                    run = cells.train(model, loss)
            found.append(_excess(run["loss"], teacher_loss(cells, seed)))
        lines.append(f"| {name} | {_mean(found, '.1f', '%')} |")
    return lines


def students(cells: Cells, seeds: list[int]) -> list[str]:
    """Distance of four-step students to the teacher of twenty steps, stage by stage."""
    found: dict[str, list[float]] = {}
    for seed in seeds:
        model, teacher = cells.converted("calibrated", seed), cells.teacher()
        values = {
            "teacher, twenty steps, other noise (floor)": cells.get(f"students-floor-{seed}", floor, seed),
            "teacher in four steps": cells.get(f"students-teacher-{seed}", distance, teacher, seed),
            "calibrated, untrained, in four steps": cells.get(f"students-calibrated-{seed}", distance, model, seed),
        }
        for name, (base, options) in STUDENTS.items():
            model = cells.healed(f"students-{base}-{seed}", model, seed, base, **options)
            values[name] = cells.train(model, distance)["distance"]
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    lines = ["| rollouts | distance | lowest to highest |", "|---|---|---|"]
    return lines + [f"| {name} | {_mean(values, '.2f')} |" for name, values in found.items()]


def noise(cells: Cells, seeds: list[int]) -> list[str]:
    """Gradient noise scale (McCandlish et al., arXiv 1812.06162) of distillation, by how its levels are drawn."""
    rows = {"the schedule": 0.0, f"{distill.SPREAD:.0%} of them log-uniform, weighted": distill.SPREAD}
    lines = ["| noise levels drawn from | noise scale, clips | lowest to highest |", "|---|---|---|"]
    for name, spread in rows.items():
        found = [
            cells.get(f"noise-{_slug(name)}-{seed}", noise_scale, cells.converted("calibrated", seed), seed, spread)
            for seed in seeds
        ]
        lines.append(f"| {name} | {_mean(found, '.0f')} |")
    return lines


def noise_scale(model: Model, seed: int, spread: float, batches: int = 48) -> float:
    """Clips at which the gradient's variance equals its square, from steps of 8 clips each."""
    recipe = load_heal_recipe("tiny-distill", FORMER | {"seed": seed, "batch": 8} | COMMON).resolved()
    student = trainable(open_checkpoint(model.folder()))
    choose_trained(student, "all")
    objective = distill.Distill(student, load_model("tiny"), recipe, student.config.streaming)
    source = Batches(DrawnClips(), recipe, student.config.streaming)
    kept, distill.SPREAD = distill.SPREAD, spread
    gradients = []
    for step in range(batches):
        objective.zero_grad()
        objective.loss(source.batch(step), step).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    distill.SPREAD = kept
    stacked = torch.stack(gradients)
    variance = float(stacked.var(0).sum())
    squared = float(stacked.mean(0).square().sum()) - variance / batches
    return recipe.batch * variance / squared


def distance(model: Model, seed: int) -> float:
    """Of a model's four steps to the teacher's twenty."""
    student, recipe = load_model(model.folder()), HealRecipe(stage="consistency").resolved()
    return FewStep(student, load_model("tiny"), recipe, generated(10 * seed)).distance(_prompts())


def floor(seed: int) -> float:
    """Of the teacher's twenty steps to themselves, from other noise."""
    return energy_distance(generated(1000 + seed), generated(10 * seed))


@functools.cache
def generated(first: int) -> list[torch.Tensor]:
    """Features of what the teacher generates, drawn from `first` on."""
    return reference_features(load_model("tiny"), _prompts(), DrawnClips().null, 3.0, first=first)


def _prompts() -> Clips:
    return held_back(SIZES["prompts"], frames=6)


def _curve(found: dict[str, Any], base: float) -> dict[int, float]:
    """Distillation's validation by step, in percent of the teacher's loss."""
    return {int(step): 100 * value / base for step, value in found["curve"]}


def _mean(values: list[float], form: str, unit: str = "") -> str:
    """Mean, lowest and highest as two columns."""
    return f"{statistics.mean(values):{form}}{unit} | {min(values):{form}} to {max(values):{form}}{unit}"


def _excess(loss: float, base: float) -> float:
    return 100 * (loss / base - 1)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


# --- real size -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealStep:
    """One step of a stage: tokens that are trained on, counted FLOPs, seconds, and on a GPU the peak of memory in bytes
    and the share of its bfloat16 peak, where that is known.
    """

    stage: str
    tokens: int
    flops: float
    seconds: float
    peak_bytes: int | None
    of_peak: float | None


def real_size(small: bool) -> list[str]:
    """One step of each stage: time, tokens a second, peak memory and share of the device's bfloat16 peak."""
    device = _device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return [
        f"Device: {name}. Batch 1, bf16, gradient checkpointing, everything trained; the second step is timed.",
        "",
        *step_table([dataclasses.asdict(real_step(stage, small)) for stage in STAGES]),
    ]


def real_step(stage: str, small: bool) -> RealStep:
    """The second of two steps with random weights; `small` is a model that a CPU can train."""
    device = _device()
    config = WanConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960, streaming=StreamingConfig())
    size = (60, 104)
    if small:
        config = dataclasses.replace(
            config, dim=96, num_heads=2, num_layers=2, ffn_dim=128, text_dim=32, text_len=8, freq_dim=32
        )
        size = (8, 12)
    conversion = resolve_recipe(ConvertRecipe(init="random"), config)
    student = dataclasses.replace(config, mla=mla_config(conversion, config))
    recipe = HealRecipe(
        stage=stage,
        train="all",
        batch=1,
        precision="bf16",
        gradient_checkpointing=True,
        attention_steps=0,
    ).resolved()
    found = _measure(recipe, student, config, size, device)
    release()
    return found


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _measure(
    recipe: HealRecipe, student_config: WanConfig, config: WanConfig, size: tuple[int, int], device: torch.device
) -> RealStep:
    student, teacher = _random_model(student_config, device), _random_model(config, device)
    choose_trained(student, "all")
    teacher = teacher.to(torch.bfloat16)
    stage = stage_of(recipe.stage)
    models = Models(student=student, teacher=teacher, copy_teacher=lambda: _random_model(config, device))
    objective = stage.objective(models, recipe, config.streaming)
    optimizers = [make_optimizer(one, recipe, 1e-6) for one in (objective, objective.critic) if one is not None]
    frames = 6 if stage.whole_clips else 9
    view = views(frames, config.streaming)[-1]
    count = len(view.frames)
    found = estimate(recipe, student_config, config, [], view, size=size)
    seconds = 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(2):
        g = torch.Generator().manual_seed(step)
        batch = Batch(
            latents=torch.randn(1, config.out_dim, count, *size, generator=g).to(device),
            context=torch.randn(1, config.text_len, config.text_dim, generator=g).to(device),
            null=torch.zeros(1, config.text_len, config.text_dim, device=device),
            view=view,
            rows=Rows([mix(step)]),
            shared=0.6,
        )
        _wait(device)
        began = time.monotonic()
        _one_step(recipe, objective, optimizers, batch, device)
        _wait(device)
        seconds = time.monotonic() - began
    name, memory = "", None
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    peak = next((rate for part, rate in PEAKS.items() if part in name), None)
    return RealStep(
        stage=recipe.stage,
        tokens=found.tokens,
        flops=found.flops,
        seconds=seconds,
        peak_bytes=memory,
        of_peak=None if peak is None else found.flops / seconds / peak / 1e12,
    )


def _one_step(
    recipe: HealRecipe,
    objective: Objective,
    optimizers: list[torch.optim.Optimizer],
    batch: Batch,
    device: torch.device,
) -> None:
    with torch.autocast(device.type, torch.bfloat16):
        for _ in range(recipe.critic_steps if objective.critic is not None else 0):
            objective.critic_loss(batch, 0).backward()
            optimizers[1].step()
            optimizers[1].zero_grad()
        loss = objective.train_loss(batch, 0, Trained(objective, optimizers[0], 0.0))
    loss.backward()
    optimizers[0].step()
    optimizers[0].zero_grad()


def _random_model(config: WanConfig, device: torch.device) -> WanModel:
    with torch.device(device):
        model = WanModel(config)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.02, generator=generator)
    return model.requires_grad_(False)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the tables (default 0,1,2)")
    results = Path(__file__).parent / "results" / "healing"
    parser.add_argument(
        "--results", type=Path, default=results, help="finished cells (default benchmarks/results/healing)"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, 6 steps, 4 clips: to see that it runs")
    names = "caches,optimizers,teacher,long,needs,starts,stages,students,noise"
    parser.add_argument("--only", default=names, help=f"tables to make (default {names})")
    parser.add_argument("--runs", type=Path, default=Path("runs/healing"), help="folder of runs (default runs/healing)")
    parser.add_argument("--write", type=Path, help="put each table between its markers in this file")
    parser.add_argument(
        "--real-size", action="store_true", help="one step of each stage at the size of Wan2.1 T2V 1.3B"
    )
    parser.add_argument("--small", action="store_true", help="with --real-size: a small model, to see that it runs")
    arguments = parser.parse_args()
    if arguments.real_size:
        print("\n".join(real_size(arguments.small)))
        return
    if arguments.quick:
        arguments.seeds = "0"
        SIZES.update(clips=4, prompts=2)
        COMPARED.update(steps=6)
        COMMON.update(steps=6, batch=2, validation_clips=2)
        arguments.runs = arguments.runs.with_name(f"{arguments.runs.name}-quick")
        arguments.results = arguments.runs
    cells = Cells(arguments.results, arguments.runs)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    tables: dict[str, Callable[[], list[str]]] = {
        "caches": lambda: caches(cells, seeds),
        "optimizers": lambda: optimizers(cells, seeds),
        "teacher": lambda: trained_on(cells, seeds),
        "long": lambda: long_runs(cells),
        "needs": lambda: needs(cells),
        "starts": lambda: starts(cells, seeds),
        "stages": lambda: stages(cells, seeds),
        "students": lambda: students(cells, seeds),
        "noise": lambda: noise(cells, seeds),
    }
    for name in arguments.only.split(","):
        text = "\n".join(tables[name]())
        print(f"{text}\n", flush=True)
        if arguments.write is not None:
            put_between(arguments.write, f"healing: {name}", text)


if __name__ == "__main__":
    main()
