"""mlaconvert generate"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mlaconvert.cli.options import (
    Attention,
    BaseRepo,
    CacheDtype,
    Checkpoint,
    ChunkFrames,
    Compile,
    ConfigFile,
    Dtype,
    FewStep,
    Height,
    Json,
    Positions,
    Revision,
    RunDevice,
    SinkFrames,
    StateKey,
    TextDevice,
    Width,
    WindowFrames,
    among,
    source_of,
)
from mlaconvert.cli.show import console, print_json, progress_bar

if TYPE_CHECKING:
    from mlaconvert.generation.request import GenerationReport, Movie


def generate(
    model: Checkpoint,
    text: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help="What to show. Several play one after the other. The built-in model takes captions such as 'large "
            "red disc right, sky'. Default: the built-in model's own; other models need one, or "
            "--embeddings.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="Folder to write to, or a movie alone: a file that ends in .mp4 or .gif. Default: the first of video, "
            "video-2, ... that is free.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Another way to give prompts, after those above. Default: none."),
    ] = None,
    negative: Annotated[
        str,
        typer.Option(
            "--negative-prompt",
            metavar="TEXT",
            help="What --guidance leads away from. Default: the empty prompt.",
        ),
    ] = "",
    base: BaseRepo = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="safetensors with context (prompts x T x text_dim) from the text encoder and, for --guidance, "
            "null_context (1 x T x text_dim). Default: prompts are embedded by the base's text encoder.",
        ),
    ] = None,
    switch: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Seconds of video at which the next prompt begins, such as 4,10; it takes effect with the next "
            "chunk. Default: prompts share the time evenly.",
        ),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(metavar="S", help="Length in seconds of video. Default: see --frames.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(metavar="N", help="Length in latent frames. Default: 21 (tiny: 60).")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(metavar="N", help="Videos, with seeds that count up. Default: 1, with --vbench-names 5."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the first video's noise.")] = 0,
    timesteps: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Few-step schedule, before the shift. Default: 1000,750,500,250 for few-step students, else none.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Euler steps of the flow. Default: 50 (tiny: 12), none for few-step students."),
    ] = None,
    shift: Annotated[float, typer.Option(metavar="X", help="How far the schedule is warped towards noise.")] = 5.0,
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Weight of classifier-free guidance; 1 is off. Default: 1 for few-step students and where the empty "
            "prompt's embedding is missing, else 5 (tiny: 1.5).",
        ),
    ] = None,
    height: Height = None,
    width: Width = None,
    window_frames: WindowFrames = None,
    sink_frames: SinkFrames = None,
    chunk_frames: ChunkFrames = None,
    positions: Positions = None,
    cache_dtype: CacheDtype = None,
    few_step: FewStep = None,
    given: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="safetensors with latents (1 x C x F x H x W) to continue, whole chunks, or image_latents and "
            "image_features of an image-to-video model. Default: none.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text file with one prompt a line, for --vbench-names. Default: none."),
    ] = None,
    vbench_names: Annotated[
        bool,
        typer.Option(
            "--vbench-names",
            help='A video for every line of --prompts and sample, named "{prompt}-{index}.mp4" as VBench and '
            "VBench-Long read them. Rows of --embeddings, if given, go with the lines. Files that exist are kept when "
            "they were made with the same model and settings, and refused otherwise.",
        ),
    ] = False,
    movie: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="auto|mp4|gif|none",
            autocompletion=among("auto", "mp4", "gif", "none"),
            help="Movies in a folder; auto is mp4 when a base is at hand, for the built-in model gif without an MP4 "
            "encoder.",
        ),
    ] = "auto",
    attention: Attention = "auto",
    compiled: Compile = False,
    slice_size: Annotated[
        int | None,
        typer.Option("--slice", metavar="N", help="Samples that go through the model at a time. Default: all."),
    ] = None,
    device: RunDevice = "auto",
    text_device: TextDevice = None,
    dtype: Dtype = None,
    revision: Revision = None,
    subfolder: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Folder inside the checkpoint, such as one of two experts. Default: none."),
    ] = None,
    state_key: StateKey = None,
    config: ConfigFile = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the video in DIR, and drop another, unfinished one."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Generate video chunk by chunk, with constant memory; interrupted, the same command goes on."""
    from mlaconvert.errors import ConfigError
    from mlaconvert.generation import run as generation
    from mlaconvert.generation.request import DEFAULT_OUTPUT, Generation, Runtime
    from mlaconvert.generation.vbench_names import VBENCH_SAMPLES, generate_for_vbench

    request = Generation(
        frames=frames,
        seconds=seconds,
        prompts=(*(text or ()), *(prompt or ())),
        base=base,
        negative=negative,
        embeddings=embeddings,
        switch=None if switch is None else _numbers("switch", switch),
        samples=samples if samples is not None else VBENCH_SAMPLES if vbench_names else 1,
        seed=seed,
        timesteps=None if timesteps is None else _numbers("timesteps", timesteps),
        steps=steps,
        shift=shift,
        guidance=guidance,
        height=height,
        width=width,
        chunk_frames=chunk_frames,
        window_frames=window_frames,
        sink_frames=sink_frames,
        positions=cast(Any, positions),  # which Generation checks
        few_step=few_step,
        given=given,
    )
    if movie not in ("auto", "mp4", "gif", "none"):
        raise ConfigError(f"--format is {movie!r}: give auto, mp4, gif or none")
    if vbench_names != (prompts is not None):
        raise ConfigError("--vbench-names and --prompts FILE go together; give both, or --prompt TEXT for one video")
    runtime = Runtime.of(
        device=device,
        text_device=text_device,
        dtype=dtype,
        attention=attention,
        compile=compiled,
        slice_size=slice_size,
        cache_dtype=cache_dtype,
    )
    source = source_of(model, revision=revision, subfolder=subfolder, state_key=state_key, config=config)
    err = console(stderr=True)

    def say(line: str) -> None:
        err.print(line, markup=False, soft_wrap=True)

    with progress_bar(err) as progress:
        if prompts is not None:
            files = generate_for_vbench(
                source,
                output or DEFAULT_OUTPUT,
                _lines(prompts),
                request,
                runtime,
                overwrite=overwrite,
                progress=progress,
                say=say,
            )
        else:
            report = generation.generate(
                source,
                output,
                request,
                runtime,
                movie=cast("Movie", movie),
                overwrite=overwrite,
                progress=progress,
                say=say,
            )
    if prompts is not None:
        if as_json:
            print_json({"files": [str(path) for path in files]})
        err.print(f"{len(files)} videos in {output or DEFAULT_OUTPUT}", markup=False, soft_wrap=True)
        return
    if as_json:
        print_json(report.to_json())
    err.print(_summary(report), markup=False, soft_wrap=True)


def _summary(report: GenerationReport) -> str:
    resumed = f", {report.resumed_frames} of them from before" if report.resumed_frames else ""
    return (
        f"{report.frames} latent frames{resumed} ({report.video_seconds:.1f} s of video) in {report.elapsed:.1f} s, "
        f"{report.video_fps:.3g} frames/s, {_cache(report)}; "
        + (
            str(report.output)
            if report.output.name in report.files
            else f"{', '.join(report.files)} in {report.output}"
        )
    )


def _cache(report: GenerationReport) -> str:
    """The bytes of the cache; where it holds several, also those of one video, as `evaluate` shows them."""
    from mlaconvert.units import format_bytes

    settings = report.settings
    videos, halves = len(settings["seeds"]), 1 if settings["sampler"]["guidance"] == 1 else 2
    dtype = settings.get("cache_dtype") or settings["dtype"].removeprefix("torch.")
    size = f"cache {format_bytes(report.cache_bytes)}, {dtype}"
    if videos * halves == 1:
        return size
    of = f"{videos} videos" if videos > 1 else "one video"
    twice = ", with and without its prompt for guidance" if halves == 2 else ""
    return f"{size} ({of}{twice}: {videos * halves} x {format_bytes(report.cache_bytes / (videos * halves))})"


def _numbers(name: str, text: str) -> tuple[float, ...]:
    from mlaconvert.errors import ConfigError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--{name} is {text!r}: give numbers with commas between them") from None


def _lines(path: Path) -> list[str]:
    from mlaconvert.errors import InputError
    from mlaconvert.files.inputs import read_text

    lines = [line.strip() for line in read_text(path).split("\n")]
    prompts = [line for line in lines if line]
    if not prompts:
        raise InputError(f"{path} has no prompts; give one a line")
    return prompts
