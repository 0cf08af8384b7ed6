"""Convert a dense checkpoint to latent attention, layer by layer; every other tensor goes from file to file.

The same input and recipe give the same bytes: nothing that is written tells a time or a path of the machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from mlaconvert.conversion.calibration.method import AnySetup, CalibrationSetup, as_setup
from mlaconvert.conversion.collected import settings as collecting
from mlaconvert.conversion.cost import ConversionCost, clip_shape, conversion_cost, conversion_work, window_tokens
from mlaconvert.conversion.from_clips import check_clips, makes_clips
from mlaconvert.conversion.job import ConversionJob
from mlaconvert.conversion.journal import Journal, identity
from mlaconvert.conversion.plan import ConversionPlan, on_device, plan_conversion
from mlaconvert.conversion.ranks import meet
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.recipes import with_settings
from mlaconvert.conversion.report import ConversionReport, ModelReport
from mlaconvert.conversion.source import open_models
from mlaconvert.conversion.verify import verify_conversion
from mlaconvert.errors import OutputError
from mlaconvert.families.causal import SETTINGS, assumption_line
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.merged import lora_files, remarks
from mlaconvert.families.source import AnySource, as_source
from mlaconvert.files.output import AnyOutput, as_output
from mlaconvert.files.staging import Staging
from mlaconvert.files.writer import is_model
from mlaconvert.listener import Listener
from mlaconvert.model.device import resolve_device
from mlaconvert.model.flops import NOTHING
from mlaconvert.model.rates import warning
from mlaconvert.model.window import positions_matter


@dataclass(frozen=True, kw_only=True)
class ConversionListener(Listener):
    """Who is told what a conversion does."""

    on_plan: Callable[[ConversionPlan], None] | None = None
    """Sees each model's plan once all checks have passed and before work starts."""


def convert(
    source: AnySource,
    output: AnyOutput,
    recipe: ConvertRecipe | None = None,
    *,
    streaming: Mapping[str, Any] | None = None,
    data: AnySetup = None,
    device: str | torch.device = "cpu",
    verify: bool = False,
    listener: Listener | None = None,
) -> ConversionReport:
    """Convert `source` into the new model folder `output`, which appears whole or not at all.

    convert("Wan-AI/Wan2.1-T2V-1.3B", "wan-mla", ConvertRecipe(kv_rank=224), data="clips", device="cuda")
    convert(Source("longlive_base.pt", loras=(lora,)), Output("longlive-mla", overwrite=True))

    Two experts become two subfolders. The maths runs on `device`. `data` is a folder of clips (`clips.folder`) for init
    "calibrated", or a `CalibrationSetup`; what is measured of the clips' inputs is kept, by default beside the output
    (`OUTPUT.moments`), and taken from there when it was made of the same model, in the same regime, from as many clips
    of the same source. `verify` reads the output back and compares it. `streaming` are single settings of
    `StreamingConfig`, in place of the recipe's or the source's.

    What is finished is kept in the hidden folder `.NAME.partial` beside the output until all is: an interrupted call,
    made again, goes on after the last finished layer, with the same bytes in the end. Processes that a launcher started
    (torchrun, accelerate launch) share the layers if init is not "calibrated", where a layer sees what the ones before
    it do; they need the output's disk in common, and only rank 0 reports models. Bytes are those of one process with as
    many threads. Copying and hashing run in threads, which call `listener.progress` too. `listener.say` is told when a
    run goes on, of what was kept and cannot be used, and what is assumed of how the model sees time because neither the
    source nor the recipe states it, nor a LoRA its alpha. `preview` checks and plans without converting.

    Raises InputError for bad input, a recipe that does not fit, an output that exists (and may not be overwritten) or a
    disk without room, and MLAConvertError when verification or another rank fails; a model that fails verification
    stays for inspection. A KeyboardInterrupt says what was kept.
    """
    output, recipe, setup = as_output(output), recipe or ConvertRecipe(), as_setup(data)
    told, folder = listener or Listener(), Path(output.path)
    setup.check(recipe.init)
    ranks = meet()
    chosen_device = resolve_device(ranks.device(str(device)))
    with ranks.alive(), open_models(source) as checkpoints:
        plans = _plans(checkpoints, recipe, streaming or {}, setup, as_source(source).subfolder, chosen_device)
        staging = Staging(folder, "convert", overwrite=output.overwrite)
        if ranks.speaks:
            _check_output(staging, checkpoints, plans)
        _announce(checkpoints, plans, recipe, streaming or {}, told)
        if ranks.speaks:
            _warn(checkpoints, plans, setup.data, chosen_device, told)
        job = ConversionJob(
            checkpoints=checkpoints,
            plans=plans,
            staging=staging,
            journal=Journal(staging, identity(checkpoints, plans, chosen_device, setup.data)),
            ranks=ranks,
            device=chosen_device,
            data=setup.data,
            moments=_moments(folder, setup, plans),
            listener=told,
        )
        models = job.run(restart=output.restart) if ranks.speaks else job.help()
        if verify and ranks.speaks:
            models = {
                name: dataclasses.replace(
                    model,
                    verification=verify_conversion(
                        checkpoints[name], folder / name, model.plan, device=chosen_device, progress=told.progress
                    ),
                )
                for name, model in models.items()
            }
    return ConversionReport(output=folder, models=tuple(models.values()))


def preview(
    source: AnySource,
    output: AnyOutput | None = None,
    recipe: ConvertRecipe | None = None,
    *,
    streaming: Mapping[str, Any] | None = None,
    data: AnySetup = None,
    device: str | torch.device = "cpu",
    listener: Listener | None = None,
    estimate: bool = False,
) -> ConversionReport:
    """What `convert` would do: all of its checks, and the plan of each model; nothing is written.

    With `estimate`, the device is probed for a few seconds, and each model's report has its cost.

    The arguments are those of `convert`; without an `output` it is not checked that one could be written. Raises
    InputError as `convert` does.
    """
    recipe, setup = recipe or ConvertRecipe(), as_setup(data)
    folder = None if output is None else Path(as_output(output).path)
    setup.check(recipe.init)
    chosen_device = resolve_device(str(device))
    with open_models(source) as checkpoints:
        plans = _plans(checkpoints, recipe, streaming or {}, setup, as_source(source).subfolder, chosen_device)
        if output is not None and folder is not None:
            _check_output(Staging(folder, "convert", overwrite=as_output(output).overwrite), checkpoints, plans)
        _announce(checkpoints, plans, recipe, streaming or {}, listener or Listener())
        costs: dict[str, ConversionCost] = {}
        if estimate:
            costs = {
                name: _cost(checkpoints[name], plan, setup.data, chosen_device)
                for name, plan in plans.items()
                if plan.collected is None  # no clips go through the model, which is what takes long
            }
    models = tuple(ModelReport(plan=plan, cost=costs.get(name)) for name, plan in plans.items())
    return ConversionReport(output=folder, models=models)


def _cost(checkpoint: Checkpoint, plan: ConversionPlan, data: Path | None, device: torch.device) -> ConversionCost:
    return conversion_cost(plan, data, device, makes_clips=makes_clips(checkpoint, data))


def _plans(
    checkpoints: Mapping[str, Checkpoint],
    recipe: ConvertRecipe,
    settings: Mapping[str, Any],
    setup: CalibrationSetup,
    subfolder: str | None,
    device: torch.device,
) -> dict[str, ConversionPlan]:
    """Each model's plan. Raises InputError for a recipe that does not fit, or clips that are missing."""
    plans = {}
    for name, checkpoint in checkpoints.items():
        collected = collecting.open_collected(setup, name) if recipe.init == "calibrated" else None
        if recipe.init == "calibrated" and collected is None:
            checkpoint.check_runs()
        if collected is None:
            chosen = with_settings(recipe, checkpoint.config, settings)
        else:
            chosen = collecting.collected_recipe(recipe, collected, settings)
        plan = plan_conversion(
            checkpoint, chosen, subfolder=name or subfolder or "", method=setup.method, collected=collected
        )
        plans[name] = on_device(plan, device)
        if collected is not None:
            collected.check(checkpoint, list(plans[name].layers))
    for name, checkpoint in checkpoints.items() if recipe.init == "calibrated" else ():
        if plans[name].collected is None:
            check_clips(checkpoint, setup.data, plans[name])
    return plans


def _moments(folder: Path, setup: CalibrationSetup, plans: Mapping[str, ConversionPlan]) -> Path:
    """Where moments are kept: what was collected is only read, so then it is the default folder beside the output."""
    collected = any(plan.collected is not None for plan in plans.values())
    return setup.moments if setup.moments is not None and not collected else folder.with_name(f"{folder.name}.moments")


def _announce(
    checkpoints: Mapping[str, Checkpoint],
    plans: Mapping[str, ConversionPlan],
    recipe: ConvertRecipe,
    settings: Mapping[str, Any],
    listener: Listener,
) -> None:
    """Show each model's plan, and say what is assumed."""
    if isinstance(listener, ConversionListener) and listener.on_plan is not None:
        for plan in plans.values():
            listener.on_plan(plan)
    notes = [_notes(checkpoints[name], plan, recipe, settings) for name, plan in plans.items()]
    for note in dict.fromkeys(chain.from_iterable(notes)):
        listener.say(note)


def _warn(
    checkpoints: Mapping[str, Checkpoint],
    plans: Mapping[str, ConversionPlan],
    data: Path | None,
    device: torch.device,
    listener: Listener,
) -> None:
    """Say how long calibrated conversions will take a CPU, if that is long."""
    plan = next(iter(plans.values()))  # of two experts one, of the same geometry
    if plan.recipe.init != "calibrated" or plan.collected is not None or device.type != "cpu":
        return
    shape, work = clip_shape(plan, data), NOTHING
    for name, each in plans.items():
        work += sum(conversion_work(each, shape, makes_clips=makes_clips(checkpoints[name], data)).values(), NOTHING)
    tokens = window_tokens(plan, shape)
    line = warning("the conversion", work, plan.source_config, device, torch.float32, tokens=tokens)
    if line is not None:
        listener.say(f"{line}; --dry-run says what takes it")


def _notes(
    checkpoint: Checkpoint, plan: ConversionPlan, recipe: ConvertRecipe, settings: Mapping[str, Any]
) -> list[str]:
    """What LoRAs leave to be assumed, and how the model is taken to see time, a line each."""
    given = set(settings) | ({"few_step"} if recipe.few_step is not None else set())
    collected = plan.collected
    if recipe.streaming is not None or recipe.bidirectional or collected is not None:
        given |= {"streaming", *SETTINGS}
    streaming = plan.config.streaming
    assumed = assumption_line(
        checkpoint.timing, streaming=streaming, few_step=plan.config.few_step, given=given, how="convert"
    )
    notes = [*remarks(checkpoint), *(checkpoint.timing.remarks if streaming is not None else ())]
    notes += [] if assumed is None else [assumed]
    moves_away = streaming is not None and positions_matter(streaming) and streaming.positions == "absolute"
    if collected is not None:
        notes += collecting.notes(collected)
    elif recipe.init == "calibrated" and moves_away:
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
