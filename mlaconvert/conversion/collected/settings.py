"""What of a recipe a calibration from recorded windows can follow, and what it has to leave out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mlaconvert.conversion.calibration.method import CalibrationSetup
from mlaconvert.conversion.collected.record import Collected, describe_window, is_collected
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.errors import ConfigError

# What needs the whole model, and so its own code: how scalars are shared between layers by the model's velocity, the
# refit of all layers at once by it, and what conversions cost the model.
NOT_AVAILABLE = ("allocation between layers", "refit of the whole model", "losses")


def open_collected(setup: CalibrationSetup, model: str) -> Collected | None:
    """What was collected of a `model` ("" or an expert's subfolder) in the folder of moments, if it is such a folder.

    Raises CheckpointError for a damaged one, ConfigError where clips are given besides.
    """
    folder = None if setup.moments is None else setup.moments / model
    if folder is None or not is_collected(folder):
        return None
    if setup.data is not None:
        raise ConfigError(f"{folder} has windows that the model's own code ran, so no clips are read; leave --data out")
    return Collected(folder)


def collected_recipe(recipe: ConvertRecipe, collected: Collected, settings: Mapping[str, Any]) -> ConvertRecipe:
    """`recipe` for what was collected: it sees time as the recorded windows do, and nothing is asked of the model.

    Raises ConfigError for a recipe that wants what recorded windows cannot give, or that is for another window.
    """
    record, where = collected.record, collected.folder
    impossible = {
        "allocation adaptive": recipe.allocation == "adaptive",
        f"refit_steps {recipe.refit_steps}": bool(recipe.refit_steps),
        f"refit_clips {recipe.refit_clips}": recipe.refit_clips is not None,
        f"noisy_past {recipe.noisy_past}": bool(recipe.noisy_past),
        f"clips {recipe.clips}": recipe.clips is not None,
    }
    for what, asked in impossible.items():
        if asked:
            raise ConfigError(
                f"{what} needs the model itself, and {where} has windows that its own code ran; leave it out"
            )
    streaming = record.streaming
    known = dataclasses.asdict(streaming) if streaming is not None else {}
    others = {name: value for name, value in settings.items() if known.get(name) != value}
    if others or recipe.streaming not in (None, streaming) or (recipe.bidirectional and streaming is not None):
        raise ConfigError(
            f"{where} was collected with {describe_window(record.streaming)}, and the recipe or options say otherwise; "
            "leave that out, or collect again as the model is to run"
        )
    return dataclasses.replace(
        recipe,
        allocation=recipe.allocation or "uniform",
        refit_steps=0,
        streaming=streaming,
        bidirectional=streaming is None,
    )


def collected_json(collected: Collected) -> dict[str, Any]:
    """What a conversion's record says of such a calibration, in plain data."""
    record = collected.record
    return {**record.summary(), "left_out": record.left_out, "stopped": record.stopped, "without": list(NOT_AVAILABLE)}


def notes(collected: Collected) -> list[str]:
    """What a user should know of such a calibration, a line each."""
    record, found = collected.record, collected.record.summary()
    videos = f" of {found['videos']} videos" if "videos" in found else ""
    lines = [
        f"calibrated from {collected.folder}: {found['windows']} windows{videos}, drawn from {record.passes} passes of "
        f"the model's own code, with {describe_window(record.streaming)}",
        f"left out, for want of the model itself: {', '.join(NOT_AVAILABLE)}; every layer gets as many scalars",
    ]
    if record.stopped:
        lines.append(
            f"{collected.folder}: the run was stopped by {record.stopped}; what was collected until then is used"
        )
    if record.left_out:
        lines.append(f"{collected.folder}: {record.left_out} more windows were chosen and left out, cut short or odd")
    return lines
