"""mlaconvert convert"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlaconvert.cli.options import (
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
    among,
    recipes,
    source_of,
)
from mlaconvert.cli.show import console, print_json, progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from mlaconvert.conversion.plan import ConversionPlan
    from mlaconvert.conversion.recipe import ConvertRecipe
    from mlaconvert.conversion.report import ConversionReport


def convert(
    checkpoint: Checkpoint,
    output: OutputFolder = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            autocompletion=recipes(),
            help="Recipe file, or the name of a shipped recipe. Options override it. Default: none.",
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="calibrated|svd|random|lossless",
            autocompletion=among("calibrated", "svd", "random", "lossless"),
            help="Factorise in the metric of real inputs, or the weights alone (no data, fast), draw new ones, or keep "
            "everything (a check, saves nothing). Default: calibrated.",
        ),
    ] = None,
    kv_rank: KvRank = None,
    q_rank: Annotated[
        str | None,
        typer.Option(
            metavar="N|none",
            autocompletion=among("none"),
            help="Channels of the query latent, or none to keep queries exact. Default: none if calibrated, else half "
            "the width, 768 at 1536.",
        ),
    ] = None,
    nope_dim: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Unrotated score channels of a head; narrower heads attend faster. Default: what the rotary channels "
            "leave of a head.",
        ),
    ] = None,
    v_dim: Annotated[
        int | None, typer.Option("--v-dim", metavar="N", help="Value channels of a head. Default: the head, 128.")
    ] = None,
    rope_dim: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Rotated score channels, shared by all heads. Default: a quarter head, 32 of 128; calibrated: what "
            "measures best.",
        ),
    ] = None,
    rope: Annotated[
        str | None,
        typer.Option(
            metavar="cached|latent|head",
            autocompletion=among("cached", "latent", "head"),
            help="The rotary key: shared and cached beside the latent as in the paper, shared and read from it, or "
            "each head's own. Default: head (latent with --nope-dim) if calibrated, else cached.",
        ),
    ] = None,
    rope_selection: Annotated[
        str | None,
        typer.Option(
            "--rope-selection",
            metavar="highest|energy",
            autocompletion=among("highest", "energy"),
            help="Rotary pairs that a shared key keeps: the highest frequencies, or what costs most to lose. "
            "Default: energy if calibrated, else highest.",
        ),
    ] = None,
    present: Annotated[
        str | None,
        typer.Option(
            metavar="exact|latent",
            autocompletion=among("exact", "latent"),
            help="What a chunk sees of itself: the teacher's own keys and values, which need no cache, or latents as "
            "in the paper. Default: exact if calibrated for streaming, else latent.",
        ),
    ] = None,
    noisy_past: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of a calibration's windows with noisy pasts, for models that are trained or run with them. "
            "Default: 0, as in rollouts.",
        ),
    ] = None,
    refit_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Steps that refit all layers at once beside an exact present, by the model's velocity on the clips; 0 "
            "for none. Default: 100, but none of a large model on a CPU.",
        ),
    ] = None,
    key_norm: Annotated[
        str | None,
        typer.Option(
            metavar="latent|token",
            autocompletion=among("latent", "token"),
            help="RMSNorm on the latent, or the exact key norm for one more cached scalar. Default: token if "
            "calibrated, else latent.",
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            metavar="fixed|uniform|adaptive",
            autocompletion=among("fixed", "uniform", "adaptive"),
            help="Cached scalars as --kv-rank and --rope-dim say, alike in all layers, or where they measure best; "
            "with --init calibrated. Default: adaptive.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Clips for --init calibrated: safetensors with latents and context. Default: its own rollouts.",
        ),
    ] = None,
    moments: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where --init calibrated keeps its statistics of the inputs, float64, and finds them again. "
            "Default: DIR.moments beside the output.",
        ),
    ] = None,
    clips: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Clips that --init calibrated reads or generates. Default: 40, fewer (but 5) above 100,000 tokens.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="float32, bfloat16 or float16 for all tensors. Default: as in the source."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="native|diffusers",
            autocompletion=among("native", "diffusers"),
            help="Tensor names and config.json of the output: Wan's own, or diffusers'. Default: the source's.",
        ),
    ] = None,
    layers: Layers = None,
    chunk_frames: Annotated[
        int | None,
        typer.Option(metavar="N", help="Latent frames made at a time. Default: the source's."),
    ] = None,
    window_frames: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Latent frames that a query sees: sink, cached, own chunk. Default: the source's."
        ),
    ] = None,
    sink_frames: Annotated[
        int | None, typer.Option(metavar="N", help="First latent frames, kept for good. Default: the source's.")
    ] = None,
    positions: Positions = None,
    bidirectional: Annotated[
        bool, typer.Option("--bidirectional", help="See whole clips, whatever the source says.")
    ] = False,
    few_step: FewStep = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of random weights and of calibration noise. Default: 0.")
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    state_key: StateKey = None,
    config: ConfigFile = None,
    lora: Loras = None,
    lora_scale: LoraScales = None,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the plan; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model folder DIR.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the output back and compare it with the source.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an interrupted run has finished, and begin again.")
    ] = False,
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
    from mlaconvert.reports.tables import layer_table, loss_table

    options = {
        "init": init,
        "kv_rank": kv_rank,
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
            report = conversion.preview(source, target, resolved, **asked)
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
        err.print("dry run: nothing was written")
        return
    if not as_json:
        for model in report.models:
            out.print(layer_table(model))
            if model.losses:
                out.print(loss_table(model))
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
        console.print(tensor_table(plan))


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
