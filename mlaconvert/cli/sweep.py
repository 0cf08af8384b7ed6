"""mlaconvert sweep"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlaconvert.cli.options import (
    Checkpoint,
    ConfigFile,
    Json,
    Loras,
    LoraScales,
    Revision,
    RunDevice,
    StateKey,
    recipes,
    source_of,
)
from mlaconvert.cli.show import console, print_json, print_tables, progress_bar

if TYPE_CHECKING:
    from mlaconvert.evaluation.cells import CellResult


def sweep(
    checkpoint: Checkpoint,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder of the results; one of the same sweep goes on."),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            autocompletion=recipes("sweep"),
            help="Sweep recipe, or the name of a shipped one, such as videomla-budgets; options override it. "
            "Default: none.",
        ),
    ] = None,
    convert: Annotated[
        str | None,
        typer.Option(
            "--convert",
            metavar="FILE",
            autocompletion=recipes(),
            help="Recipe that all conversions start from, as for `mlaconvert convert`. Default: the sweep recipe's, "
            "else none.",
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="LIST",
            help="How to convert: svd, calibrated, random; separated by commas. Default: as the recipes say.",
        ),
    ] = None,
    kv_ranks: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Channels of the KV latent, such as 64,128,256. Default: as the recipes say.",
        ),
    ] = None,
    rope_dims: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Rotated channels of a head, shared by all heads, such as 16,32,64. Default: as the recipes say.",
        ),
    ] = None,
    nope_dims: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Unrotated channels of a head, one for each of --rope-dims. Default: what those leave of a head.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Clips: safetensors with latents and context; the last ones are compared on. Default: tiny draws its "
            "own, others generate some, once.",
        ),
    ] = None,
    clips: Annotated[
        int | None,
        typer.Option(metavar="N", help="Clips to calibrate on. Default: 40, fewer (but 5) above 100,000 tokens."),
    ] = None,
    validation_clips: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Clips to compare on. Default: 16 of --data (at most a quarter), 64 for tiny, 8 generated ones.",
        ),
    ] = None,
    moments: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where calibrations keep their statistics of the inputs, measured once. Default: moments in --output.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of all noise.")] = 0,
    revision: Revision = None,
    subfolder: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Folder inside the checkpoint: one of two experts. Default: the one model."),
    ] = None,
    state_key: StateKey = None,
    config: ConfigFile = None,
    lora: Loras = None,
    lora_scale: LoraScales = None,
    device: RunDevice = "auto",
    keep: Annotated[bool, typer.Option("--keep", help="Keep the converted models, in DIR/models.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw the finished cells in DIR away and begin again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint to many budgets and splits of a head, and draw quality against cache.

    Interrupted, the same command goes on; finished cells are kept.
    """
    from mlaconvert.evaluation.cells import load_sweep_recipe
    from mlaconvert.evaluation.sweep import SweepClips, SweepListener
    from mlaconvert.evaluation.sweep import sweep as run
    from mlaconvert.reports.evaluation_tables import sweep_table
    from mlaconvert.reports.plots import plot_sweep
    from mlaconvert.units import percent

    options = {
        "convert": convert,
        "inits": None if init is None else init.split(","),
        "kv_ranks": _numbers("kv-ranks", kv_ranks),
        "rope_dims": _numbers("rope-dims", rope_dims),
        "nope_dims": _numbers("nope-dims", nope_dims),
    }
    resolved = load_sweep_recipe(recipe, {name: value for name, value in options.items() if value is not None})
    out, err = console(), console(stderr=True)

    def say(result: CellResult, done: int, total: int) -> None:
        loss = f"loss {percent(result.excess)} above the dense model's"
        if result.clean_past is not None:
            loss += f" with noisy pasts, {percent(result.clean_past.excess)} behind clean ones"
        err.print(
            f"{done} of {total}  {result.name}: cache {percent(-result.cache_reduction)}, {loss}, "
            f"{result.seconds:.0f} s",
            markup=False,
            soft_wrap=True,
        )

    with progress_bar(err) as progress:
        report = run(
            source_of(
                checkpoint,
                revision=revision,
                subfolder=subfolder,
                state_key=state_key,
                config=config,
                loras=(lora, lora_scale),
            ),
            output,
            resolved,
            clips=SweepClips(data=data, calibration=clips, validation=validation_clips, moments=moments, seed=seed),
            device=device,
            keep=keep,
            restart=restart,
            listener=SweepListener(
                on_cell=say,
                progress=progress,
                say=lambda line: err.print(line, markup=False, soft_wrap=True),
            ),
        )
    plot_sweep(report, output / "sweep.png")
    if as_json:
        print_json(report.to_json())
    else:
        print_tables(out, sweep_table(report))
    err.print(f"written to {output}: results.json, sweep.png", markup=False, soft_wrap=True)


def _numbers(flag: str, text: str | None) -> list[int] | None:
    """The numbers of a list such as 8,16. Raises ConfigError naming the flag."""
    from mlaconvert.errors import ConfigError

    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ConfigError(f"--{flag} is {text!r}: give whole numbers separated by commas, such as 16,32")
    return [int(part) for part in parts]
