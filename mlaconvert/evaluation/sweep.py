"""Many budgets on one checkpoint: convert, measure, keep the figures, forget the weights; quality against cache.

Every cell is kept as soon as it is measured, so that a sweep can be stopped anywhere and go on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlaconvert.clips.folder import ClipFolder, Clips, clip_files, load_clips, save_shard
from mlaconvert.clips.tiny.clips import held_back
from mlaconvert.config.parsing import parse
from mlaconvert.conversion.calibration.method import CalibrationSetup, Method
from mlaconvert.conversion.calibration.store import MOMENTS_VERSION
from mlaconvert.conversion.from_clips import CLIPS_NAME, calibration_clips, with_more
from mlaconvert.conversion.journal import UNTIL_BITS
from mlaconvert.conversion.plan import ConversionPlan, on_device, recipe_json
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.recipes import load_recipe
from mlaconvert.conversion.run import convert
from mlaconvert.conversion.source import open_models
from mlaconvert.errors import ConfigError, MLAConvertError, OutputError
from mlaconvert.evaluation.cells import Cell, CellResult, SweepRecipe, SweepReport, cells
from mlaconvert.evaluation.conditions import generated_clips
from mlaconvert.evaluation.losses import measure_fidelity
from mlaconvert.evaluation.timesteps import CleanPast, has_past, velocity_by_timestep
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.merged import merged
from mlaconvert.families.source import AnySource
from mlaconvert.files.inputs import file_states, read_json
from mlaconvert.files.names import public_name
from mlaconvert.files.output import Output
from mlaconvert.files.staging import claim, visible
from mlaconvert.files.whole import write_whole
from mlaconvert.listener import Listener
from mlaconvert.model.device import resolve_device
from mlaconvert.model.load import load_model
from mlaconvert.model.schedule import Sampler
from mlaconvert.progress import Progress

RECORD_NAME = "sweep.json"
VALIDATION_CLIPS, TINY_CLIPS, GENERATED_CLIPS = 16, 64, 8  # of a folder (at most a quarter of it), of `tiny`, else


@dataclass(frozen=True, kw_only=True)
class SweepClips:
    """What a sweep calibrates on and compares on. Raises ConfigError for no clips to compare on."""

    data: Path | None = None
    """A folder of clips; None has the dense model generate them, once (`tiny` draws its own)."""

    calibration: int | None = None
    """The first so many clips are calibrated on; None as `ConvertRecipe.clips`."""

    validation: int | None = None
    """The last so many clips, which no calibration sees, are compared on; None is 64 of `tiny`, else 16 or 8."""

    moments: Path | None = None
    """Folder of what is measured once for all calibrations; None is inside the output."""

    seed: int = 0
    """Seed of all noise."""

    def __post_init__(self) -> None:
        if self.validation is not None and self.validation < 1:
            raise ConfigError(f"validation_clips is {self.validation}: give 1 or more")


@dataclass(frozen=True, kw_only=True)
class SweepListener(Listener):
    """Who is told what a sweep does."""

    on_cell: Callable[[CellResult, int, int], None] | None = None
    """Told of each cell as soon as it is measured: its result, its number from 1, and how many there are."""


def sweep(
    source: AnySource,
    output: str | Path,
    recipe: SweepRecipe,
    *,
    clips: SweepClips | None = None,
    device: str | torch.device = "cpu",
    keep: bool = False,
    restart: bool = False,
    listener: Listener | None = None,
) -> SweepReport:
    """Convert `source` once for every cell of `recipe` and measure each beside the dense model, in folder `output`.

    Of two experts one is chosen with `Source.subfolder`. Inputs are measured once for all cells. Weights are deleted
    when a cell is measured, unless `keep`. A rerun takes the finished cells from `output` (`restart`: none) and adds
    new ones; it may have other axes, but must be of the same model, clips and settings. `listener.say` is told once
    what the conversions have to say.

    Raises InputError for bad input, cells that do not fit the model, or a folder of another sweep.
    """
    told, clips, folder = listener or Listener(), clips or SweepClips(), Path(output)
    progress, chosen_device = told.progress, resolve_device(str(device))
    # Every cell's conversion has the same to say of the source.
    speaking = Listener(progress=progress, say=functools.cache(told.say))
    with ExitStack() as stack:
        models = stack.enter_context(open_models(source))
        if "" not in models:
            raise ConfigError(
                f"{source} holds two experts; sweep one with --subfolder {' or --subfolder '.join(models)}"
            )
        checkpoint = models[""]
        planned = cells(recipe, checkpoint, clips=clips.calibration, seed=clips.seed)
        belongs = _belongs(checkpoint, recipe.convert, clips)
        stack.enter_context(claim(folder, "sweep"))
        _prepare(folder, belongs, restart)
        calibration, validation, clips_from = _clips(checkpoint, planned, folder, clips, chosen_device, told)
        finished = sum(_record(folder, cell).is_file() for cell, _ in planned)
        if finished:
            told.say(f"going on after {finished} of {len(planned)} conversions, kept in {folder}")
        results: list[CellResult] = []
        for number, (cell, plan) in enumerate(planned):
            progress("sweep", number, len(planned))
            record, model = _record(folder, cell), folder / "models" / cell.name
            if record.is_file():
                results.append(parse(CellResult, read_json(record), str(record)))
                continue
            started = time.monotonic()
            setup, chosen = CalibrationSetup(), cell.recipe
            if plan.recipe.init == "calibrated":
                setup = CalibrationSetup(data=calibration, moments=clips.moments or folder / "moments")
                refit_clips = on_device(plan, chosen_device).recipe.refit_clips
                if refit_clips is not None and clips.data is not None:  # none that are compared on
                    left = len(ClipFolder(clips.data, checkpoint.config)) - len(validation.latents)
                    chosen = dataclasses.replace(chosen, refit_clips=min(refit_clips, left))
            model.parent.mkdir(exist_ok=True)
            made = Output(model, overwrite=True)
            convert(source, made, chosen, data=setup, device=chosen_device, listener=speaking)
            seconds = time.monotonic() - started
            results.append(_measure(checkpoint, plan, cell, model, validation, seconds, chosen_device, progress))
            _write(record, dataclasses.asdict(results[-1]))
            if not keep:
                shutil.rmtree(model)
            if isinstance(told, SweepListener) and told.on_cell is not None:
                told.on_cell(results[-1], number + 1, len(planned))
        progress("sweep", len(planned), len(planned))
        old = [result.name for result in results if result.clean_past is None]
        if old and has_past(planned[0][1].config.streaming, validation):
            told.say(
                f"kept from an earlier version, which measured no loss behind clean pasts: {', '.join(old)}; --restart "
                "measures every cell anew"
            )
        report = SweepReport(
            source=public_name(checkpoint.store.source),
            clips_from=clips_from,
            clips=len(validation.latents),
            results=tuple(results),
            output=folder,
        )
        _write(folder / "results.json", report.to_json())
        if not keep:
            shutil.rmtree(folder / "models", ignore_errors=True)
    return report


def _record(folder: Path, cell: Cell) -> Path:
    """The file that has a cell's figures once it is measured."""
    return folder / "cells" / f"{cell.name}.json"


def _measure(
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    cell: Cell,
    model: Path,
    clips: Clips,
    seconds: float,
    device: torch.device,
    progress: Progress,
) -> CellResult:
    """The converted `model` beside the dense one; both are in memory only here."""
    student = load_model(model, device=device)
    teacher = _dense(checkpoint, plan, student.dtype, device)
    seed, clean_past = plan.recipe.seed, None
    fidelity = measure_fidelity(teacher, student, clips, seed=seed, progress=progress)
    if has_past(teacher.config.streaming, clips):
        clean_past = CleanPast.of(velocity_by_timestep(teacher, student, clips, seed=seed, progress=progress))
    return CellResult(
        name=cell.name,
        init=plan.recipe.init,
        kv_rank=plan.recipe.kv_rank or plan.source_config.dim,
        rope_dim=plan.recipe.rope_dim,
        nope_dim=plan.recipe.nope_dim if plan.recipe.rope_dim is not None else None,
        scalars=sum(student.config.cached_scalars()),
        dense_scalars=plan.dense_scalars,
        teacher_loss=fidelity.teacher_loss,
        loss=fidelity.student_loss,
        velocity_error=fidelity.velocity_error,
        attention_error_median=statistics.median(fidelity.attention_errors),
        attention_error_worst=max(fidelity.attention_errors),
        seconds=round(seconds, 1),
        clean_past=clean_past,
    )


def _dense(checkpoint: Checkpoint, plan: ConversionPlan, dtype: torch.dtype | None, device: torch.device) -> Any:
    return load_model(checkpoint, dtype=dtype, device=device, streaming=plan.recipe.streaming)


def _clips(
    checkpoint: Checkpoint,
    planned: Sequence[tuple[Cell, ConversionPlan]],
    folder: Path,
    asked: SweepClips,
    device: torch.device,
    told: Listener,
) -> tuple[Path | None, Clips, str]:
    """The folder that calibrations read (None: `tiny` draws its own), the clips to compare on, and what those are."""
    data, count = asked.data, asked.validation
    plan = next((plan for _, plan in planned if plan.recipe.init == "calibrated"), None)
    if data is not None:
        stored = ClipFolder(data, checkpoint.config)
        held = count or min(VALIDATION_CLIPS, max(1, len(stored) // 4))
        fitted = (plan.recipe.clips or 1) if plan is not None else 0
        left, last = stored.split(held)
        if fitted > len(left):
            raise ConfigError(
                f"{data} has {len(stored)} clips, too few for {fitted} to calibrate on and {held} to compare on; give "
                "more, or ask for fewer with --clips and --validation-clips"
            )
        return data, stored.some(last), f"the last clips of the folder {data.resolve().name}"
    if checkpoint.is_tiny:
        return None, held_back(count or TINY_CLIPS), "clips of the built-in model that training never drew"
    first = plan or planned[0][1]
    sampler = Sampler.usual(few_step=first.config.few_step)

    def compared() -> Clips:
        teacher = _dense(checkpoint, first, None, device)
        fields = dataclasses.asdict(first.recipe)
        return generated_clips(
            teacher,
            count or GENERATED_CLIPS,
            fields,
            sampler=sampler,
            seed=asked.seed,
            progress=told.progress,
            say=told.say,
        )

    if plan is not None:
        options: dict[str, Any] = {"device": device, "progress": told.progress, "say": told.say}
        wanted = on_device(plan, device)

        def calibrated() -> Clips:
            measured = calibration_clips(checkpoint, wanted, None, **options)
            return with_more(measured, checkpoint, wanted, None, **options)

        _kept(folder / "clips", calibrated)
    _kept(folder / "validation", compared)
    validation = load_clips(folder / "validation", checkpoint.config, count or GENERATED_CLIPS)
    return folder / "clips", validation, "rollouts of the dense model from an empty caption that no calibration sees"


def _kept(folder: Path, make: Callable[[], Clips]) -> None:
    """Clips in `folder`, made only when they are not there yet."""
    path = folder / CLIPS_NAME
    if not path.is_file():
        folder.mkdir(exist_ok=True)
        save_shard(path, make()._asdict())


def _belongs(checkpoint: Checkpoint, convert_recipe: str | None, clips: SweepClips) -> dict[str, Any]:
    """Everything but the axes that a cell's figures depend on."""
    base = load_recipe(convert_recipe) if convert_recipe is not None else ConvertRecipe()
    settings = {
        "recipe": recipe_json(base, Method()),
        "source": file_states(checkpoint.store.files),
        "state_key": checkpoint.state_key,
        "loras": merged(checkpoint),
        "data": None if clips.data is None else file_states(clip_files(clips.data)),
        "clips": clips.calibration,
        "validation_clips": clips.validation,
        "seed": clips.seed,
        "method": MOMENTS_VERSION,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _prepare(folder: Path, belongs: Mapping[str, Any], restart: bool) -> None:
    """Make `folder` ready for this sweep. Raises OutputError when it holds anything else, or another sweep."""
    record = folder / RECORD_NAME
    try:
        folder.mkdir(exist_ok=True)
        if visible(folder) and not record.is_file():
            raise OutputError(f"{folder} is not a folder of a sweep; choose another path with -o")
        if record.is_file() and restart:
            for name in ("cells", "models", "moments", "clips", "validation"):
                shutil.rmtree(folder / name, ignore_errors=True)
        elif record.is_file():
            before = {"method": 1} | read_json(record)  # older records do not say
            if isinstance(before.get("recipe"), dict):
                before["recipe"] = UNTIL_BITS | before["recipe"]
            changed = [name for name in belongs if before.get(name) != belongs[name]]
            if changed:
                raise OutputError(
                    f"{folder} holds a sweep with another {' and '.join(changed)}; choose another folder with -o, or "
                    "--restart to begin again in this one"
                )
        (folder / "cells").mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: the sweep cannot be kept there ({error}); choose another path with -o") from None
    _write(record, belongs)


def _write(path: Path, data: Mapping[str, Any]) -> None:
    """Replace `path` by JSON, at once and only when all of it is on the disk."""
    try:
        write_whole(path, (json.dumps(data, indent=2) + "\n").encode())
    except OSError as error:
        raise MLAConvertError(f"{path}: cannot be written ({error.strerror or error}); make room and go on") from None
