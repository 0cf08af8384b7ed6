"""mlaconvert bench"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mlaconvert.cli.options import (
    Attention,
    ChunkFrames,
    Compile,
    Height,
    Json,
    RunDevice,
    SinkFrames,
    Width,
    WindowFrames,
    among,
)
from mlaconvert.cli.show import console, print_json, print_tables, progress_bar
from mlaconvert.config.cache_dtype import CACHE_DTYPES

if TYPE_CHECKING:
    from rich.table import Table

    from mlaconvert.evaluation.bench.setting import BenchReport, Side


def bench(
    geometry: Annotated[
        str,
        typer.Argument(
            metavar="GEOMETRY",
            help="1.3b, 14b, tiny, or a checkpoint of which only the geometry is taken: weights are random.",
        ),
    ] = "1.3b",
    height: Height = None,
    width: Width = None,
    window_frames: WindowFrames = None,
    sink_frames: SinkFrames = None,
    chunk_frames: ChunkFrames = None,
    steps: Annotated[
        int, typer.Option(metavar="N", help="Denoising passes of a chunk; a clean one is added to them.")
    ] = 4,
    batch: Annotated[int, typer.Option(metavar="N", help="Videos at once.")] = 1,
    slice_size: Annotated[
        int | None,
        typer.Option("--slice", metavar="N", help="Videos that go through a model at a time. Default: all."),
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", help="Chunks of each side that are timed, in turn.")] = 5,
    kv_rank: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Latent channels, one side each, such as 64,128,192. Default: the paper's."),
    ] = None,
    nope_dim: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Unrotated score channels of a head, one side each. Default: a head less --rope-dim."
        ),
    ] = None,
    v_dim: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Value channels of a head, for each of --nope-dim. Default: a whole head."),
    ] = None,
    rope_dim: Annotated[
        int | None, typer.Option(metavar="N", help="Rotated score channels. Default: a quarter head, 32 of 128.")
    ] = None,
    rope: Annotated[
        str | None,
        typer.Option(
            metavar="cached|latent|head",
            autocompletion=among("cached", "latent", "head"),
            help="Where rotary keys come from: cached beside the latent, read from it, or each head's own. "
            "Default: cached.",
        ),
    ] = None,
    q_rank: Annotated[
        str | None,
        typer.Option(
            metavar="N|none",
            autocompletion=among("none"),
            help="Channels of the query latent, or none. Default: half the width.",
        ),
    ] = None,
    key_norm: Annotated[
        str | None,
        typer.Option(
            metavar="latent|token",
            autocompletion=among("latent", "token"),
            help="RMSNorm on the latent, or exact. Default: latent.",
        ),
    ] = None,
    present: Annotated[
        str | None,
        typer.Option(
            metavar="exact|latent",
            autocompletion=among("exact", "latent"),
            help="What a chunk sees of itself: the teacher's own keys and values, or latents. Default: latent.",
        ),
    ] = None,
    cache_dtypes: Annotated[
        str | None,
        typer.Option(
            "--cache-dtype",
            metavar="LIST",
            autocompletion=among(*CACHE_DTYPES),
            help=f"Measure every side with its cache narrowed, too, such as int8,int4: {', '.join(CACHE_DTYPES)}. "
            "The newest chunk stays exact. Default: none.",
        ),
    ] = None,
    no_text_cache: Annotated[
        bool,
        typer.Option("--no-text-cache", help="Project the prompt in each pass: less memory a video, more work."),
    ] = False,
    no_batch_search: Annotated[
        bool, typer.Option("--no-batch-search", help="Leave out the largest batch that fits (GPU only).")
    ] = False,
    attention: Attention = "auto",
    compiled: Compile = False,
    device: RunDevice = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="float32, bfloat16 or float16. Default: float32 on a CPU, bfloat16 elsewhere."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure dense against latent attention in one run: speed, latency, memory, and where the time goes."""
    import dataclasses

    from mlaconvert.config.streaming import StreamingConfig
    from mlaconvert.evaluation.bench.run import bench as measure
    from mlaconvert.evaluation.bench.setting import BenchSetting, base_geometry
    from mlaconvert.generation.request import Runtime

    runtime = Runtime.of(device=device, dtype=dtype, attention=attention, compile=compiled, slice_size=slice_size)
    choices: dict[str, Any] = {"rope": rope, "key_norm": key_norm, "present": present}  # which BenchSetting checks
    given = {"window_frames": window_frames, "sink_frames": sink_frames, "chunk_frames": chunk_frames}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    streaming = base_geometry(geometry).streaming or StreamingConfig()
    setting = BenchSetting(
        geometry=geometry,
        height=height,
        width=width,
        batch=batch,
        streaming=dataclasses.replace(streaming, **changes),
        steps=steps,
        rounds=rounds,
        device=runtime.device,
        dtype=runtime.dtype,
        attention=runtime.attention,
        compile=runtime.compile,
        slice_size=runtime.slice_size,
        keeps_text=not no_text_cache,
        kv_ranks=_integers("kv-rank", kv_rank),
        heads=_heads(_integers("nope-dim", nope_dim), _integers("v-dim", v_dim)),
        rope_dim=rope_dim,
        q_rank=int(q_rank) if q_rank is not None and q_rank.isdecimal() else q_rank,
        cache_dtypes=() if cache_dtypes is None else cast(Any, tuple(cache_dtypes.split(","))),  # checked there
        **choices,
        search_batch=not no_batch_search,
    )
    out, err = console(), console(stderr=True)
    with progress_bar(err) as progress:
        report = measure(setting, progress)
    if as_json:
        print_json(report.to_json())
    else:
        print_tables(out, _speed_table(report), _parts_table(report))


def _integers(name: str, text: str | None) -> tuple[int, ...]:
    from mlaconvert.errors import ConfigError

    try:
        return () if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--{name} is {text!r}: give whole numbers with commas between them") from None


def _heads(nope: tuple[int, ...], value: tuple[int, ...]) -> tuple[tuple[int | None, int | None], ...]:
    """Pairs of widths; a list that is not there leaves its width to the default."""
    from mlaconvert.errors import ConfigError

    if nope and value and len(nope) != len(value):
        raise ConfigError(f"--nope-dim has {len(nope)} widths, --v-dim {len(value)}; give each head both")
    count = max(len(nope), len(value))
    return tuple(zip(nope or (None,) * count, value or (None,) * count, strict=True))


def _speed_table(report: BenchReport) -> Table:
    from rich.table import Table

    from mlaconvert.units import format_bytes

    setting, dense = report.setting, report.sides[0]
    pixels = "x".join(map(str, setting["pixels"]))
    table = Table(
        title=f"{setting['geometry']} at {pixels}, window {setting['window_frames']}, batch {setting['batch']}, "
        f"{setting['steps']}+1 passes, {report.dtype}, {report.device}"
    )
    table.add_column("")
    for side in report.sides:
        table.add_column(side.name, justify="right")

    def row(name: str, *cells: str) -> None:
        table.add_row(name, *cells)

    def counted(number: int | None) -> str:
        return "not searched" if number is None else str(number)

    sides = report.sides
    row("attention", *(s.mode for s in sides))
    row("video frames/s", *(f"{s.frames_per_second:.3g}" for s in sides))
    row("speed, dense = 1", *(f"{s.speedup:.2f}" for s in sides))
    row("first chunk", *(f"{1000 * s.first_chunk:.0f} ms" for s in sides))
    row("next chunk, median", *(f"{1000 * s.next_chunk:.0f} ms" for s in sides))
    row("fastest to slowest", *("{:.0f} to {:.0f} ms".format(*(1000 * t for t in s.next_chunk_spread)) for s in sides))
    row("cache", *(f"{format_bytes(s.cache_bytes)} ({dense.cache_bytes / s.cache_bytes:.1f}x)" for s in sides))
    row("prompt's keys and values", *(format_bytes(s.text_bytes) for s in sides))
    row("weights", *(format_bytes(s.weight_bytes) for s in sides))
    row("cache, off the plan", *(_off(s.cache_bytes, s.plan_cache_bytes) for s in sides))
    row("weights, off the plan", *(_off(s.weight_bytes, s.plan_weight_bytes) for s in sides))
    row("peak memory", *(format_bytes(s.peak_bytes) for s in sides))
    row("largest batch, one pass", *(counted(s.largest_batch) for s in sides))
    row("largest batch, video by video", *(counted(s.largest_batch_sliced) for s in sides))
    if dense.largest_batch is None:
        table.caption = "Largest batches are measured on a GPU only."
    table.caption_justify = "left"
    return table


def _parts_table(report: BenchReport) -> Table:
    from rich.table import Table

    table = Table(title="A chunk with a full window: work, time, and rate against the ceiling")
    for name in ("part", *(side.name for side in report.sides)):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part in report.sides[0].flops:
        table.add_row(f"{part}, GFLOP", *(f"{side.flops[part] / 1e9:.4g}" for side in report.sides))
    table.add_row("all, GFLOP", *(f"{sum(side.flops.values()) / 1e9:.4g}" for side in report.sides))
    table.add_section()
    for part in report.sides[0].profile:
        table.add_row(f"{part}, ms", *(f"{1000 * side.profile[part]:.1f}" for side in report.sides))
    table.add_section()
    for part, ceiling in (("attention", report.attention_rate), ("projections", report.matmul_rate)):
        table.add_row(f"{part}, of the ceiling", *(_rate(side, part, ceiling) for side in report.sides))
    table.caption = (
        f"Ceilings: matrix products {report.matmul_rate / 1e12:.3g} TFLOP/s, "
        f"attention {report.attention_rate / 1e12:.3g} TFLOP/s. Times: attention is self- and cross-attention, "
        "projections are all matrix products (projections, latent, ffn)."
    )
    table.caption_justify = "left"
    return table


def _rate(side: Side, part: str, ceiling: float) -> str:
    """Share of the ceiling that a part of the profile reaches."""
    names = ("attention", "cross-attention") if part == "attention" else ("latent", "projections", "ffn")
    flops = sum(side.flops[name] for name in names)
    return f"{100 * flops / side.profile[part] / ceiling:.0f}%" if side.profile[part] else "-"


def _off(measured: int, planned: int) -> str:
    return f"{100 * (measured / planned - 1):+.2f}%"
