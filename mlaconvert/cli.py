"""The command line: thin wiring.

Data goes to stdout, everything else to stderr. torch and all that needs it are imported inside the commands, so that
--help answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from mlaconvert import __version__
from mlaconvert.errors import MLAConvertError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mlaconvert.config import ConvertRecipe
    from mlaconvert.convert import ConversionPlan, ConversionReport, ModelReport
    from mlaconvert.families import Checkpoint
    from mlaconvert.memory import MemoryPlan

# The root of Typer's own errors (usage, bad values), which it prints itself and does not export.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


class _Group(TyperGroup):
    """Turns exceptions of every command into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, _UsageError, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            if isinstance(error, MLAConvertError):
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(error.exit_code) from None
            first = (str(error).strip().splitlines() or [""])[0][:300]
            typer.echo(f"error: unexpected {type(error).__name__}: {first} (--debug shows where)", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Group,
    name="mlaconvert",
    help="Convert Wan-family video diffusion transformers to Multi-Head Latent Attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the `mlaconvert` command."""
    # OpenMP threads that spin while they wait make linear algebra far slower when another process needs a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A polite kill cleans up like Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mlaconvert {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


Source = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A .safetensors or .pt file, a model folder, a Hub id (user/repo), or the built-in model `tiny`.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a Hub id. Default: its main branch.")
]
Subfolder = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Folder inside the checkpoint, such as one of two experts. Default: both experts, or the one model.",
    ),
]
StateKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="State dict of a .pt file. Default: generator_ema, generator, model, or none, whichever comes first.",
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="config.json to use. Default: the one beside the weights."),
]
KvRank = Annotated[
    int | None,
    typer.Option(
        "--kv-rank", metavar="N", help="Channels of the KV latent. Default: the paper's, 192 at width 1536, scaled."
    ),
]
Layers = Annotated[str | None, typer.Option(metavar="LIST", help="Layers to take, such as 0-3,7. Default: all.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="Device of the float64 maths: cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]


@app.command()
def analyze(
    checkpoint: Source,
    revision: Revision = None,
    subfolder: Subfolder = None,
    state_key: StateKey = None,
    config: ConfigFile = None,
    kv_rank: KvRank = None,
    threshold: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the energy, 0 to 1, that an effective rank holds.")
    ] = 0.99,
    layers: Layers = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw the spectra as a PNG of 1600 x 750 pixels. Default: no plot."),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(metavar="N", help="Video height of the memory plan, in pixels. Default: 480 (tiny: 24)."),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(metavar="N", help="Video width of the memory plan, in pixels. Default: 832 (tiny: 32)."),
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
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Show how compressible the attention weights are, and what their cache takes in memory."""
    from mlaconvert import analyze as analysis
    from mlaconvert.config import ConvertRecipe, StreamingConfig, default_video, parse_layers
    from mlaconvert.convert import mla_config, open_models, resolve_device, resolve_recipe
    from mlaconvert.memory import plan_memory
    from mlaconvert.report import analysis_table, memory_table, plot_analysis

    def plan(model: Checkpoint) -> MemoryPlan:
        geometry, video = model.config, default_video(model.config)
        recipe = ConvertRecipe(kv_rank=kv_rank, height=height, width=width)
        return plan_memory(
            geometry,
            geometry.mla or mla_config(resolve_recipe(recipe, geometry), geometry),
            height=height or video.height,
            width=width or video.width,
            window_frames=window_frames or (geometry.streaming or StreamingConfig()).window_frames,
            batch=batch,
            vae_stride=(video.frame_stride, video.vae_stride, video.vae_stride),
            gpu_gb=gpu_gb,
        )

    chosen_device, out, err = resolve_device(device), _console(), _console(stderr=True)
    data: dict[str, Any] = {}
    with open_models(checkpoint, revision=revision, subfolder=subfolder, state_key=state_key, config=config) as models:
        for name, model in models.items():
            err.print(f"{_titled(name)}{model.describe()}", markup=False)
            memory = plan(model)
            with _progress(err) as progress:
                found = analysis.analyze(
                    model,
                    kv_rank=kv_rank,
                    threshold=threshold,
                    layers=parse_layers(layers, model.config.num_layers) if layers is not None else None,
                    device=chosen_device,
                    progress=partial(progress, "analyze"),
                )
            if plot is not None:
                path = plot.with_stem(f"{plot.stem}-{name}") if name else plot
                plot_analysis(found, path)
                err.print(f"plot written to {path}", markup=False)
            data[name] = found.to_json() | {"memory": memory.to_json()}
            if not as_json:
                out.print(analysis_table(found), memory_table(memory))
    if as_json:
        _print_json(data.get("", {"experts": data}))


@app.command()
def convert(
    checkpoint: Source,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder to write; it must not exist yet. Default: none, for --dry-run.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Recipe file, or the name of a shipped recipe. Options override it. Default: none."
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="svd|calibrated|random|lossless",
            help="Factorise the weights, or in the metric of real inputs (needs clips), draw new ones, or keep "
            "everything (a check, saves nothing). Default: svd.",
        ),
    ] = None,
    kv_rank: KvRank = None,
    q_rank: Annotated[
        str | None,
        typer.Option(
            metavar="N|none",
            help="Channels of the query latent, or none to keep queries exact. Default: half the width, 768 at 1536.",
        ),
    ] = None,
    nope_dim: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Unrotated score channels of a head. Default: a head less --rope-dim, 96 of 128."
        ),
    ] = None,
    rope_dim: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Rotated score channels, shared by all heads. Default: a quarter head, 32 of 128."
        ),
    ] = None,
    key_norm: Annotated[
        str | None,
        typer.Option(
            metavar="latent|token",
            help="RMSNorm on the latent, or the exact key norm for one more cached scalar. Default: latent.",
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            metavar="uniform|adaptive",
            help="Cached scalars alike in all layers, or where they measure best. With --init calibrated. "
            "Default: adaptive.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Clips for --init calibrated: safetensors with latents and context. Default: its own rollouts.",
        ),
    ] = None,
    clips: Annotated[
        int | None, typer.Option(metavar="N", help="Clips that --init calibrated reads or generates. Default: 40.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="float32, bfloat16 or float16 for all tensors. Default: as in the source."),
    ] = None,
    layers: Layers = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of --init random. Default: 0.")] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    state_key: StateKey = None,
    config: ConfigFile = None,
    device: Device = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the plan; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model folder DIR.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the output back and compare it with the source.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint to latent attention, into a new model folder."""
    from mlaconvert import convert as conversion

    options = {
        "init": init,
        "kv_rank": kv_rank,
        "q_rank": int(q_rank) if q_rank is not None and q_rank.isdecimal() else q_rank,
        "nope_dim": nope_dim,
        "rope_dim": rope_dim,
        "key_norm": key_norm,
        "allocation": allocation,
        "clips": clips,
        "dtype": dtype,
        "layers": layers,
        "seed": seed,
    }
    resolved = _override(recipe, {name: value for name, value in options.items() if value is not None})
    out, err = _console(), _console(stderr=True)
    plans = out if dry_run and not as_json else err
    started = time.monotonic()
    with _progress(err) as progress:
        report = conversion.convert(
            checkpoint,
            output,
            resolved,
            revision=revision,
            subfolder=subfolder,
            state_key=state_key,
            config=config,
            device=device,
            data=data,
            overwrite=overwrite,
            verify=verify,
            dry_run=dry_run,
            on_plan=lambda plan: _print_plan(plans, plan, details=dry_run),
            progress=progress,
        )
    if as_json:
        _print_json(
            {"output": report.output and str(report.output), "models": [model.to_json() for model in report.models]}
        )
    if dry_run:
        err.print("dry run: nothing was written")
        return
    if not as_json:
        for model in report.models:
            out.print(_layer_table(model))
    err.print(_summary(report, time.monotonic() - started), markup=False)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the converted model and the pictures.")
    ] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Do the whole job on the small trained model that ships: analyze, convert, compare, show frames. Takes minutes."""
    from mlaconvert.demo import run_demo
    from mlaconvert.report import analysis_table, demo_table

    out, err = _console(), _console(stderr=True)
    started = time.monotonic()
    with _progress(err) as progress:
        found = run_demo(output, progress)
    if as_json:
        _print_json(found.to_json())
    else:
        out.print(analysis_table(found.analysis), *map(_layer_table, found.report.models), demo_table(found))
    err.print(
        f"done in {time.monotonic() - started:.0f} s; look at {found.sheet} (teacher above, converted below) "
        f"and {found.movie} (teacher left, converted right); the model is {found.report.output}",
        markup=False,
        soft_wrap=True,
    )


def _override(recipe: str | None, options: dict[str, Any]) -> ConvertRecipe:
    """The recipe of that name (or the defaults) with the given options on top."""
    from mlaconvert.config import ConvertRecipe, parse
    from mlaconvert.convert import load_recipe

    base = load_recipe(recipe) if recipe is not None else ConvertRecipe()
    return parse(ConvertRecipe, dataclasses.asdict(base) | options, "options")


# --- what is shown -----------------------------------------------------------------------------------------------


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2))


def _titled(name: str) -> str:
    return f"{name}: " if name else ""


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each stage on a terminal, with the time that is left; nothing elsewhere."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            elif done < bar.tasks[tasks[stage]].completed:  # the next expert
                bar.reset(tasks[stage])
            bar.update(tasks[stage], completed=done, total=total)

        yield report


def _print_plan(console: Console, plan: ConversionPlan, *, details: bool) -> None:
    """What will be done; with details, every new tensor of a converted layer."""
    from mlaconvert.report import format_bytes

    recipe, less = plan.recipe, 100 * (1 - plan.mla_scalars / plan.dense_scalars)
    layer = next(iter(plan.layers.values()))
    queries = "exact" if recipe.q_rank in (None, "none") else f"rank {recipe.q_rank}"
    norm = plan.config.mla.key_norm if plan.config.mla is not None else ""
    streaming = plan.config.streaming
    sees = f"streaming, window of {streaming.window_frames} latent frames" if streaming else "bidirectional"
    lines = (
        f"{_titled(plan.subfolder)}{plan.source}",
        f"  model    {plan.description}",
        f"  convert  layers {recipe.layers}, init {recipe.init}, {sees}",
        f"  widths   latent {layer.kv_lora_rank}, rotary {layer.qk_rope_head_dim}, unrotated "
        f"{layer.qk_nope_head_dim}, value {layer.v_head_dim}, queries {queries}, key norm {norm}",
        f"  cache    {plan.dense_scalars:,} -> {plan.mla_scalars:,} scalars a token ({-less:+.1f}%)",
        f"  weights  {format_bytes(plan.source_bytes)} -> {format_bytes(plan.output_bytes)}",
    )
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    if details:
        console.print(_tensor_table(plan))


def _tensor_table(plan: ConversionPlan) -> Table:
    """The new tensors of the first converted layer, which stand for all, and what passes through."""
    from rich.table import Table

    from mlaconvert.report import format_bytes

    first = min(plan.layers)
    table = Table(title=f"Tensors of each converted layer (here layer {first})")
    table.add_column("tensor")
    for name in ("shape", "dtype", "size"):
        table.add_column(name, justify="right")
    for operation in plan.operations:
        if operation.layer == first:
            spec = operation.spec
            shape, dtype = " x ".join(map(str, spec.shape)), str(spec.dtype).removeprefix("torch.")
            table.add_row(spec.name, shape, dtype, format_bytes(spec.nbytes))
    passed = [operation.spec.nbytes for operation in plan.operations if operation.layer is None]
    table.add_section()
    table.add_row(f"{len(passed)} tensors that pass through", "", "", format_bytes(sum(passed)))
    return table


def _layer_table(model: ModelReport) -> Table:
    """One row a converted layer: how compressible it was, and what the factors miss."""
    from rich.table import Table

    table = Table(title=f"{_titled(model.plan.subfolder)}converted layers")
    rows = [layer.to_json() for layer in model.layers]
    stages = list(rows[0]["errors"]) if rows else []
    calibrated = model.plan.recipe.init == "calibrated"  # random inputs say nothing of it, and it has real ones
    checked = model.verification.attention_errors if model.verification is not None and not calibrated else {}
    for name in ("layer", "r_0.99\n\\[K;V]", "energy at\nkv rank", *(f"error\n{stage}" for stage in stages)):
        table.add_column(name, justify="right")
    if checked:
        table.add_column("attention\noutput", justify="right")
    for row in rows:
        cells = [str(row["layer"]), str(row["effective_rank"]), f"{100 * row['energy_at_kv_rank']:.1f}%"]
        cells += [f"{row['errors'][stage]:.3g}" for stage in stages]
        cells += [f"{checked[row['layer']]:.3g}"] if checked else []
        table.add_row(*cells)
    table.caption_justify = "left"
    if stages:
        table.caption = (
            "Relative errors of the attention output on the calibration clips, after each step."
            if calibrated
            else "Relative errors on inputs guessed from the modulation: a proxy, no data was seen."
        )
    return table


def _summary(report: ConversionReport, seconds: float) -> str:
    checked = [model.verification for model in report.models if model.verification is not None]
    lines = [f"written to {report.output} in {seconds:.1f} s"]
    if checked:
        count = sum(verification.passed_through for verification in checked)
        lines.append(f"verified: {count} tensors are the source's bit for bit, every attention output is finite")
    return "\n".join(lines)
