"""mlaconvert convert"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlaconvert.cli.convert_options import (
    Allocation,
    Bidirectional,
    ChunkFrames,
    Clips,
    Data,
    DryRun,
    Dtype,
    Init,
    KeyNorm,
    Layout,
    Moments,
    NoisyPast,
    NopeDim,
    Overwrite,
    Present,
    QRank,
    Recipe,
    RefitClips,
    RefitSteps,
    Restart,
    Rope,
    RopeDim,
    RopeSelection,
    Seed,
    SinkFrames,
    VDim,
    Verify,
    WindowFrames,
)
from mlaconvert.cli.options import (
    BytesPerToken,
    Checkpoint,
    ConfigFile,
    Device,
    FewStep,
    Json,
    KvRank,
    Layers,
    Loras,
    LoraScales,
    OutputFolder,
    Positions,
    Revision,
    StateKey,
    Subfolder,
    source_of,
)
from mlaconvert.cli.show import console, print_json, print_tables, progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from mlaconvert.conversion.plan import ConversionPlan
    from mlaconvert.conversion.recipe import ConvertRecipe
    from mlaconvert.conversion.report import ConversionReport


def convert(
    checkpoint: Checkpoint,
    output: OutputFolder = None,
    recipe: Recipe = None,
    init: Init = None,
    kv_rank: KvRank = None,
    bytes_per_token: BytesPerToken = None,
    q_rank: QRank = None,
    nope_dim: NopeDim = None,
    v_dim: VDim = None,
    rope_dim: RopeDim = None,
    rope: Rope = None,
    rope_selection: RopeSelection = None,
    present: Present = None,
    noisy_past: NoisyPast = None,
    refit_steps: RefitSteps = None,
    refit_clips: RefitClips = None,
    key_norm: KeyNorm = None,
    allocation: Allocation = None,
    data: Data = None,
    moments: Moments = None,
    clips: Clips = None,
    dtype: Dtype = None,
    layout: Layout = None,
    layers: Layers = None,
    chunk_frames: ChunkFrames = None,
    window_frames: WindowFrames = None,
    sink_frames: SinkFrames = None,
    positions: Positions = None,
    bidirectional: Bidirectional = False,
    few_step: FewStep = None,
    seed: Seed = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    state_key: StateKey = None,
    config: ConfigFile = None,
    lora: Loras = None,
    lora_scale: LoraScales = None,
    device: Device = "auto",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    verify: Verify = False,
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint to latent attention, into a new model folder. Interrupted, the same command goes on.

    Under torchrun or accelerate launch (-m mlaconvert convert ...), processes with a shared disk divide the layers;
    not those of --init calibrated, where a layer sees what the layers before it do.
    """
    from mlaconvert.conversion import run as conversion
    from mlaconvert.conversion.calibration.method import CalibrationSetup
    from mlaconvert.errors import ConfigError
    from mlaconvert.files.output import Output
    from mlaconvert.reports.plan import cost_lines
    from mlaconvert.reports.tables import layer_table, loss_table

    options = {
        "init": init,
        "kv_rank": kv_rank,
        "bytes_per_token": bytes_per_token,
        "q_rank": int(q_rank) if q_rank is not None and q_rank.isdecimal() else q_rank,
        "nope_dim": nope_dim,
        "rope_dim": rope_dim,
        "v_dim": v_dim,
        "rope": rope,
        "rope_selection": rope_selection,
        "key_norm": key_norm,
        "present": present,
        "noisy_past": noisy_past,
        "refit_steps": refit_steps,
        "refit_clips": refit_clips,
        "allocation": allocation,
        "clips": clips,
        "dtype": dtype,
        "layout": layout,
        "layers": layers,
        "bidirectional": bidirectional or None,
        "few_step": few_step,
        "seed": seed,
    }
    window = {
        "chunk_frames": chunk_frames,
        "window_frames": window_frames,
        "sink_frames": sink_frames,
        "positions": positions,
    }
    resolved = _override(recipe, {name: value for name, value in options.items() if value is not None})
    speaks = os.environ.get("RANK", "0") == "0"
    out, err = console(quiet=not speaks), console(stderr=True, quiet=not speaks)
    plans = out if dry_run and not as_json else err
    source = source_of(
        checkpoint,
        revision=revision,
        subfolder=subfolder,
        state_key=state_key,
        config=config,
        loras=(lora, lora_scale),
    )
    target = None if output is None else Output(output, overwrite=overwrite, restart=restart)
    started = time.monotonic()
    with progress_bar(err) as progress:
        asked: dict[str, Any] = {
            "streaming": {name: value for name, value in window.items() if value is not None},
            "data": CalibrationSetup(data=data, moments=moments),
            "device": device,
            "listener": conversion.ConversionListener(
                on_plan=lambda plan: _print_plan(plans, plan, data, details=dry_run),
                progress=progress,
                say=lambda line: err.print(line, markup=False, soft_wrap=True),
            ),
        }
        asked["data"].check(resolved.init)
        if dry_run:
            report = conversion.preview(source, target, resolved, **asked, estimate=speaks)
        elif target is None:
            raise ConfigError("no folder to write to; give one with -o DIR (output), or --dry-run to see the plan")
        else:
            report = conversion.convert(source, target, resolved, **asked, verify=verify)
    if not speaks:
        return
    if as_json:
        print_json(
            {"output": report.output and str(report.output), "models": [model.to_json() for model in report.models]}
        )
    if dry_run:
        for model in report.models if not as_json else ():
            out.print("\n".join(cost_lines(model, device)), markup=False, soft_wrap=True)
        err.print("dry run: nothing was written")
        return
    if not as_json:
        for model in report.models:
            print_tables(out, layer_table(model))
            if model.losses:
                print_tables(out, loss_table(model))
    whose = "those of source and LoRA" if lora else "the source's"
    err.print(_summary(report, time.monotonic() - started, whose), markup=False)


def _override(recipe: str | None, options: dict[str, Any]) -> ConvertRecipe:
    """The recipe of that name (or the defaults) with the given options on top."""
    from typing import get_args

    from mlaconvert.config.parsing import parse
    from mlaconvert.conversion.recipe import ConvertRecipe, Init
    from mlaconvert.conversion.recipes import load_recipe, with_init

    base = load_recipe(recipe) if recipe is not None else ConvertRecipe()
    if options.get("init") in get_args(Init):
        base = with_init(base, options["init"])
    if options.get("bidirectional"):
        base = dataclasses.replace(base, streaming=None)
    return parse(ConvertRecipe, dataclasses.asdict(base) | options, "options")


def _print_plan(console: Console, plan: ConversionPlan, data: Path | None, *, details: bool) -> None:
    """What will be done; with details, every new tensor of a converted layer."""
    from mlaconvert.reports.plan import plan_lines
    from mlaconvert.reports.tables import tensor_table

    console.print("\n".join(plan_lines(plan, data)), markup=False, soft_wrap=True)
    if details:
        print_tables(console, tensor_table(plan))


def _summary(report: ConversionReport, seconds: float, whose: str) -> str:
    checked = [model.verification for model in report.models if model.verification is not None]
    lines = [f"written to {report.output} in {seconds:.1f} s"]
    spent: dict[str, float] = {}
    for model in report.models:
        for kind, part in model.seconds.items():
            spent[kind] = spent.get(kind, 0.0) + part
    lines.append("side by side: " + ", ".join(f"{kind} {part:.1f} s" for kind, part in sorted(spent.items())))
    if checked:
        count = sum(verification.passed_through for verification in checked)
        lines.append(f"verified: {count} tensors are {whose} bit for bit, every attention output is finite")
    return "\n".join(lines)
