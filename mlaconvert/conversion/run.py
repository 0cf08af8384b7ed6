"""Convert a dense checkpoint to latent attention, layer by layer; every other tensor goes from file to file.

The same input and recipe give the same bytes: nothing that is written tells a time or a path of the machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from mlaconvert.conversion.from_clips import check_clips
from mlaconvert.conversion.job import ConversionJob
from mlaconvert.conversion.journal import Journal, identity
from mlaconvert.conversion.plan import ConversionPlan, plan_conversion
from mlaconvert.conversion.ranks import Ranks, meet
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.recipes import with_settings
from mlaconvert.conversion.report import ConversionReport, ModelReport
from mlaconvert.conversion.source import open_models
from mlaconvert.conversion.verify import verify_conversion
from mlaconvert.errors import ConfigError, OutputError
from mlaconvert.families.causal import SETTINGS, assumption_line
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.lora import LoraFile
from mlaconvert.families.merged import lora_files, remarks
from mlaconvert.files.staging import Staging
from mlaconvert.files.writer import is_model
from mlaconvert.model.device import resolve_device
from mlaconvert.model.window import positions_matter
from mlaconvert.progress import Progress, silent


def convert(
    source: str | Path,
    output: str | Path | None,
    recipe: ConvertRecipe | None = None,
    *,
    streaming: Mapping[str, Any] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    state_key: str | None = None,
    config: Path | None = None,
    loras: Sequence[LoraFile] = (),
    device: str | torch.device = "cpu",
    data: Path | None = None,
    moments: Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    on_plan: Callable[[ConversionPlan], None] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> ConversionReport:
    """Convert `source` into the new model folder `output`, which appears whole or not at all.

    `source`, `revision`, `subfolder`, `state_key`, `config` and `loras` are those of `open_models`; two experts become
    two subfolders. `on_plan` sees each model's plan once all checks have passed and before work starts; a `dry_run`
    ends there and writes nothing (`output` may then be None). The maths runs on `device`. `data` is a folder of clips
    (`mlaconvert.clips.folder`) for init "calibrated"; what it measures of their inputs is kept in `moments`, by default
    beside the output (`OUTPUT.moments`), and taken from there when it was made of the same model, in the same regime,
    from as many clips of the same source. `verify` reads the output back and compares it.

    What is finished is kept in the hidden folder `.NAME.partial` beside the output until all is: an interrupted call,
    made again, goes on after the last finished layer, with the same bytes in the end; `restart` begins again instead.
    Processes that a launcher started (torchrun, accelerate launch) share the layers if init is not "calibrated", where
    a layer sees what the ones before it do; they need the output's disk in common, and only rank 0 reports models.
    Bytes are those of one process with as many threads. Copying and hashing run in threads, which call `progress` too.
    `streaming` are single settings of `StreamingConfig`, in place of the recipe's or the source's. `say` is told when
    a run goes on, of what was kept and cannot be used, and what is assumed of how the model sees time because neither
    the source nor the recipe states it, nor a LoRA its alpha.

    Raises InputError for bad input, a recipe that does not fit, an output that exists (without `overwrite`) or a disk
    without room, and MLAConvertError when verification or another rank fails; a model that fails verification stays
    for inspection. A KeyboardInterrupt says what was kept.
    """
    folder, recipe = None if output is None else Path(output), recipe or ConvertRecipe()
    for flag, path, use in (("--data", data, "read"), ("--moments", moments, "used")):
        if path is not None and recipe.init != "calibrated":
            raise ConfigError(
                f"{flag} {path} is only {use} by init calibrated; leave it out, or give --init calibrated"
            )
    if folder is None and not dry_run:
        raise ConfigError("no folder to write to; give one with -o DIR (output), or --dry-run to see the plan")
    ranks = Ranks() if dry_run else meet()
    chosen_device = resolve_device(ranks.device(str(device)))
    with (
        ranks.alive(),
        open_models(
            source, revision=revision, subfolder=subfolder, state_key=state_key, config=config, loras=loras
        ) as checkpoints,
    ):
        plans = {
            name: plan_conversion(
                checkpoint,
                with_settings(recipe, checkpoint.config, streaming or {}),
                subfolder=name or subfolder or "",
            )
            for name, checkpoint in checkpoints.items()
        }
        for checkpoint in checkpoints.values() if recipe.init == "calibrated" else ():
            check_clips(checkpoint, data)
        staging = None if folder is None else Staging(folder, "convert", overwrite=overwrite)
        if staging is not None and ranks.speaks:
            _check_output(staging, checkpoints, plans)
        for plan in plans.values():
            if on_plan is not None:
                on_plan(plan)
        if say is not None:
            notes = [_notes(checkpoints[name], plan, recipe, streaming or {}) for name, plan in plans.items()]
            for note in dict.fromkeys(chain.from_iterable(notes)):
                say(note)
        if dry_run or folder is None or staging is None:
            return ConversionReport(output=folder, models=tuple(ModelReport(plan=plan) for plan in plans.values()))
        job = ConversionJob(
            checkpoints=checkpoints,
            plans=plans,
            staging=staging,
            journal=Journal(staging, identity(checkpoints, plans, chosen_device, data)),
            ranks=ranks,
            device=chosen_device,
            data=data,
            moments=moments or folder.with_name(f"{folder.name}.moments"),
            progress=progress or silent,
        )
        models = job.run(restart=restart, say=say) if ranks.speaks else job.help()
        if verify and ranks.speaks:
            models = {
                name: dataclasses.replace(
                    model,
                    verification=verify_conversion(
                        checkpoints[name], folder / name, model.plan, device=chosen_device, progress=job.progress
                    ),
                )
                for name, model in models.items()
            }
    return ConversionReport(output=folder, models=tuple(models.values()))


def _notes(
    checkpoint: Checkpoint, plan: ConversionPlan, recipe: ConvertRecipe, settings: Mapping[str, Any]
) -> list[str]:
    """What LoRAs leave to be assumed, and how the model is taken to see time, a line each."""
    given = set(settings) | ({"few_step"} if recipe.few_step is not None else set())
    if recipe.streaming is not None or recipe.bidirectional:
        given |= {"streaming", *SETTINGS}
    streaming = plan.config.streaming
    assumed = assumption_line(
        checkpoint.timing, streaming=streaming, few_step=plan.config.few_step, given=given, how="convert"
    )
    notes = [*remarks(checkpoint), *(checkpoint.timing.remarks if streaming is not None else ())]
    notes += [] if assumed is None else [assumed]
    moves_away = streaming is not None and positions_matter(streaming) and streaming.positions == "absolute"
    if recipe.init == "calibrated" and moves_away:
        notes.append("calibrated on windows whose positions count from the sink; the model counts from the start")
    return notes


def _check_output(staging: Staging, checkpoints: Mapping[str, Checkpoint], plans: Mapping[str, ConversionPlan]) -> None:
    """Raise OutputError when the output cannot be written, or would replace what is read."""
    for checkpoint in checkpoints.values():
        for file in (*checkpoint.store.files, *lora_files(checkpoint)):
            if staging.target in (file.resolve(), *file.resolve().parents):
                raise OutputError(f"{staging.path} holds the source; choose another path")
    needed, pair = sum(plan.output_bytes for plan in plans.values()), "" not in plans
    staging.check(needed, kind="model", replaceable=partial(is_model, pair=pair))
