"""What a healing run leaves: a model folder like any other, with how it came about."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mlaconvert import __version__
from mlaconvert.conversion.analyze import analyze
from mlaconvert.conversion.readme import UNTRAINED
from mlaconvert.conversion.records import read_record
from mlaconvert.conversion.spectra import LatentSpectrum
from mlaconvert.families.changed import with_tensors
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.classes import converted_config
from mlaconvert.files.names import CONFIG_NAME, CONVERSION_NAME, HEALING_NAME, README_NAME
from mlaconvert.files.staging import Staging
from mlaconvert.files.store import check_finite
from mlaconvert.files.writer import ModelWriter, TensorSpec
from mlaconvert.healing.loop import Curves
from mlaconvert.healing.readme import CURVES_NAME, HEALED
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.stages import stage_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealReport:
    """What came of a run. `occupancy` is the share of each converted layer's latent that its effective rank takes,
    before and after; `validation` the (step, value) pairs, `best` the one that was written."""

    output: Path
    recipe: HealRecipe
    teacher: str
    curves: Curves
    best: tuple[int, float]
    occupancy: Mapping[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        """Plain data for healing.json, without paths or times."""
        return {
            "mlaconvert": __version__,
            "recipe": dataclasses.asdict(self.recipe),
            "teacher": self.teacher,
            "written": {"step": self.best[0], "validation": self.best[1]},
            "rank_budget_occupancy": dict(self.occupancy),
            "validation": [[int(step), value] for step, value in self.curves.validation],
            "losses": {
                "columns": ["step", "loss", "learning rate", "gradient norm"],
                "rows": [[int(row[0]), *(float(f"{x:.6g}") for x in row[1:])] for row in self.curves.losses],
            },
            "critic": [[int(step), float(f"{loss:.6g}")] for step, loss in self.curves.critic],
        }


def specs_of(student: Checkpoint) -> list[TensorSpec]:
    """The tensors of the output: the student's own, in its order, names and dtypes."""
    infos = [student.info(name) for name in student.names]
    return [TensorSpec(info.name, info.shape, info.dtype) for info in infos]


def occupancy(checkpoint: Checkpoint) -> list[float]:
    """Share of each converted layer's latent that the effective rank takes."""
    if checkpoint.config.mla is None:
        return []
    layers = [i for i, layer in enumerate(checkpoint.config.mla.layers) if layer is not None]
    found = analyze(checkpoint, layers=layers).layers
    return [round(layer.occupancy, 6) for layer in found if isinstance(layer, LatentSpectrum)]


def write_model(student: Checkpoint, report: HealReport, weights: Mapping[str, Tensor], staging: Staging) -> None:
    """Write the healed model folder, whole or not at all, in the open `staging`.

    Raises OutputError, or CheckpointError for a NaN.
    """
    healed, folder = with_tensors(student, weights), student.store.path
    folder = folder if folder.is_dir() else folder.parent
    writer = ModelWriter(report.output, specs_of(student), metadata={"format": "pt"}, staging=staging)
    few_step = {"few_step": True} if stage_of(report.recipe.stage).few_step else {}
    with writer:
        for canonical in student.names:
            tensor = healed.read(canonical)
            check_finite(tensor, canonical, report.output)
            writer.write(student.info(canonical).name, tensor)
        writer.write_text(CONFIG_NAME, json.dumps(converted_config(student.raw_config) | few_step, indent=2) + "\n")
        if (folder / CONVERSION_NAME).is_file():
            writer.write_bytes(CONVERSION_NAME, (folder / CONVERSION_NAME).read_bytes())
        history = _history(folder)
        writer.write_text(HEALING_NAME, _compact(report.to_json() | {"before": history}))
        writer.write_text(README_NAME, _readme(folder, report))
        writer.write_bytes(CURVES_NAME, plot_curves(report.curves, report.recipe))
        writer.commit()


def _history(folder: Path) -> list[Any]:
    """Earlier stages of a model that was healed before, oldest first, without their curves."""
    data = read_record(folder / HEALING_NAME)
    if data is None:
        return []
    return [*(data.pop("before", None) or []), {k: data[k] for k in ("recipe", "teacher", "written") if k in data}]


def _compact(data: dict[str, Any]) -> str:
    """JSON with one line for each row of numbers."""
    rows = data["losses"].pop("rows")
    text = json.dumps(data | {"losses": data["losses"] | {"rows": "@rows"}}, indent=2)
    return text.replace('"@rows"', "[\n" + ",\n".join(f"      {json.dumps(row)}" for row in rows) + "\n    ]") + "\n"


def _readme(folder: Path, report: HealReport) -> str:
    path = folder / README_NAME
    text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else f"# {report.output.name}\n"
    recipe = report.recipe
    healed = HEALED.write(
        version=__version__,
        stage=recipe.stage,
        steps=recipe.steps,
        batch=recipe.batch * recipe.accumulate,
        teacher=report.teacher,
        step=report.best[0],
    )
    return f"{text.replace(UNTRAINED, '').rstrip()}{healed}\n"


def plot_curves(curves: Curves, recipe: HealRecipe) -> bytes:
    """The loss of every step, its running mean, and the validation beside it: a PNG of 1200 x 500 pixels."""
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(f"{recipe.stage}, {recipe.steps} steps")
    steps, losses = [row[0] for row in curves.losses], torch.tensor([row[1] for row in curves.losses])
    left.plot(steps, losses, linewidth=0.6, alpha=0.5, label="loss")
    width = max(1, len(losses) // 20)
    if len(losses) > width:
        mean = losses.unfold(0, width, 1).mean(1)
        left.plot(steps[width - 1 :], mean, linewidth=2, label=f"mean of {width} steps")
    if bool((losses > 0).all()):
        left.set_yscale("log")
    left.set(title="training loss", xlabel="step")
    left.legend()
    right.plot(*zip(*curves.validation, strict=True), marker="o", markersize=4)
    right.set(title="validation", xlabel="step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
