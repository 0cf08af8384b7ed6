"""mlaconvert analyze"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlaconvert.cli.options import (
    BytesPerToken,
    Checkpoint,
    ConfigFile,
    Device,
    Json,
    KvRank,
    Layers,
    Revision,
    StateKey,
    Subfolder,
    source_of,
)
from mlaconvert.cli.show import console, print_json, print_tables, progress_bar

if TYPE_CHECKING:
    from mlaconvert.families.checkpoint import Checkpoint as OpenCheckpoint
    from mlaconvert.model.memory import MemoryPlan


def analyze(
    checkpoint: Checkpoint,
    revision: Revision = None,
    subfolder: Subfolder = None,
    state_key: StateKey = None,
    config: ConfigFile = None,
    kv_rank: KvRank = None,
    bytes_per_token: BytesPerToken = None,
    threshold: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the energy, 0 to 1, that an effective rank holds.")
    ] = 0.99,
    layers: Layers = None,
    calibrated: Annotated[
        bool,
        typer.Option(
            "--calibrated",
            help="Also run clips through the model: spectra weighted by what attention makes of its inputs, and the "
            "predicted error of each latent budget.",
        ),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Clips for --calibrated: safetensors with latents and context. Default: its own rollouts.",
        ),
    ] = None,
    clips: Annotated[
        int | None,
        typer.Option(metavar="N", help="Clips that --calibrated reads or generates. Default: as for convert."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw the spectra as a PNG, 1600 pixels wide. Default: no plot."),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Video height of the memory plan and of generated clips, in pixels. Default: 480 (tiny: 24).",
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Video width of the memory plan and of generated clips, in pixels. Default: 832 (tiny: 32).",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Videos that the memory plan runs at once.")] = 1,
    window_frames: Annotated[
        int | None,
        typer.Option(metavar="N", help="Latent frames that the cache holds. Default: the model's window, else 7."),
    ] = None,
    gpu_gb: Annotated[
        float | None,
        typer.Option(metavar="GB", help="GPU memory in GiB, to plan what fits on it. Default: not planned."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Show how compressible the attention weights are, and what their cache takes in memory."""
    from mlaconvert.config.geometry import default_video
    from mlaconvert.config.parsing import parse
    from mlaconvert.config.streaming import StreamingConfig
    from mlaconvert.conversion import analyze as analysis
    from mlaconvert.conversion.from_clips import calibration_clips
    from mlaconvert.conversion.plan import plan_conversion
    from mlaconvert.conversion.recipe import ConvertRecipe, parse_layers
    from mlaconvert.conversion.recipes import mla_config, regime_of, resolve_recipe
    from mlaconvert.conversion.source import open_models
    from mlaconvert.errors import ConfigError
    from mlaconvert.families.causal import assumption_line
    from mlaconvert.families.merged import remarks
    from mlaconvert.model.device import resolve_device
    from mlaconvert.model.memory import StreamedVideo, plan_memory
    from mlaconvert.reports.tables import analysis_table, budget_table, memory_table, titled

    if not calibrated and (data is not None or clips is not None):
        raise ConfigError("--data and --clips are only read with --calibrated; add it, or leave them out")
    options: dict[str, Any] = {"kv_rank": kv_rank, "bytes_per_token": bytes_per_token, "height": height, "width": width}
    if calibrated:
        options |= {"init": "calibrated"} | ({} if clips is None else {"clips": clips})
    recipe = parse(ConvertRecipe, options, "options")

    def plan(model: OpenCheckpoint) -> MemoryPlan:
        geometry, video = model.config, default_video(model.config)
        if bytes_per_token is not None and geometry.mla is not None:
            raise ConfigError(
                f"{model.store.path} is converted already, and its own cache is shown; leave the bytes out"
            )
        wanted = dataclasses.replace(recipe, init="svd") if geometry.fixed_settings and not calibrated else recipe
        return plan_memory(
            geometry,
            geometry.mla or mla_config(resolve_recipe(wanted, geometry), geometry),
            video=StreamedVideo(
                height=height or video.height,
                width=width or video.width,
                window_frames=window_frames or (geometry.streaming or StreamingConfig()).window_frames,
                batch=batch,
                fps=video.fps,
                vae_stride=(video.frame_stride, video.vae_stride, video.vae_stride),
            ),
            gpu_gb=gpu_gb,
        )

    chosen_device, out, err = resolve_device(device), console(), console(stderr=True)
    results: dict[str, Any] = {}

    def say(line: str) -> None:
        err.print(line, markup=False, soft_wrap=True)

    source = source_of(checkpoint, revision=revision, subfolder=subfolder, state_key=state_key, config=config)
    with open_models(source) as models:
        for name, model in models.items():
            say(f"{titled(name)}{model.describe()}")
            seen = model.config.streaming
            assumed = assumption_line(model.timing, streaming=seen, few_step=model.config.few_step)
            for note in (*model.timing.remarks, *([] if assumed is None else [assumed]), *remarks(model)):
                say(note)
            memory = plan(model)
            inputs: dict[str, Any] = {}
            with progress_bar(err) as progress:
                if calibrated:
                    resolved = plan_conversion(model, recipe)
                    inputs["clips"] = calibration_clips(
                        model, resolved, data, device=chosen_device, progress=progress, say=say
                    )
                    inputs["regime"] = regime_of(resolved.recipe)
                found = analysis.analyze(
                    model,
                    kv_rank=kv_rank,
                    threshold=threshold,
                    layers=parse_layers(layers, model.config.num_layers) if layers is not None else None,
                    **inputs,
                    device=chosen_device,
                    progress=progress,
                )
            if plot is not None:
                from mlaconvert.reports.plots import plot_analysis

                path = plot.with_stem(f"{plot.stem}-{name}") if name else plot
                plot_analysis(found, path)
                err.print(f"plot written to {path}", markup=False)
            results[name] = found.to_json(singular_values=calibrated) | {"memory": memory.to_json()}
            if not as_json:
                budgets = (budget_table(found),) if calibrated else ()
                print_tables(out, analysis_table(found), *budgets, memory_table(memory))
    if as_json:
        print_json(results.get("", {"experts": results}))
