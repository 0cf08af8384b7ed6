"""mlaconvert evaluate"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mlaconvert.cli.options import CacheDtype, Json, Revision, RunDevice, source_of
from mlaconvert.cli.show import console, print_json, print_tables, progress_bar

if TYPE_CHECKING:
    from mlaconvert.evaluation.report import EvaluationReport


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...", help="Converted models: folders, checkpoints or Hub ids (user/repo).", show_default=False
        ),
    ],
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="SRC", help="The model they were converted from. Default: the one that conversion.json records."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Clips: safetensors with latents and context. Default: held-back clips for `tiny`, else the teacher's "
            "own rollouts.",
        ),
    ] = None,
    clips: Annotated[
        int | None, typer.Option(metavar="N", help="Clips that are read or generated. Default: 64 for `tiny`, else 8.")
    ] = None,
    frames: Annotated[
        int, typer.Option(metavar="N", help="Length of the rollouts in latent frames; 0 for no rollouts, no speed.")
    ] = 60,
    videos: Annotated[int, typer.Option(metavar="N", help="Videos that are rolled out at once.")] = 3,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Euler steps of the rollouts. Default: the four-step schedule for few-step students, 12 for `tiny`, "
            "20 for others.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of all noise.")] = 0,
    vbench: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH", help="VBench results of a model (file or folder); once for each DIR. Default: none."
        ),
    ] = None,
    vbench_teacher: Annotated[
        Path | None, typer.Option(metavar="PATH", help="VBench results of the teacher. Default: none.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write everything as one HTML page. Default: no page."),
    ] = None,
    save: Annotated[
        bool,
        typer.Option("--save", help="Put evaluation.json, which the model card quotes, and report.html into each DIR."),
    ] = False,
    revision: Revision = None,
    subfolder: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Folder inside each DIR, such as one of two experts. Default: none."),
    ] = None,
    device: RunDevice = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="float32, bfloat16 or float16 for all models. Default: the first DIR's own."),
    ] = None,
    cache_dtype: CacheDtype = None,
    as_json: Json = False,
) -> None:
    """Measure converted models beside their teacher: fidelity, drift, cache and speed."""
    from contextlib import ExitStack

    import torch

    from mlaconvert.errors import ConfigError, OutputError
    from mlaconvert.evaluation.request import Request
    from mlaconvert.evaluation.run import evaluate as run
    from mlaconvert.evaluation.vbench import load_vbench
    from mlaconvert.files.staging import claim
    from mlaconvert.model.device import resolve_device
    from mlaconvert.reports.evaluation_tables import error_table, evaluation_table, verdict_lines
    from mlaconvert.reports.page.sections import save as save_evaluation
    from mlaconvert.reports.page.sections import write_page

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype is {dtype!r}: give float32, bfloat16 or float16")
    if save and cache_dtype is not None:
        raise ConfigError(
            "--save keeps what the card quotes, the model with its own cache; with --cache-dtype give --html or --json"
        )
    for source in models if save else ():
        if not Path(source).is_dir():
            raise OutputError(f"{source} is no folder on this disk to save into; use --html FILE and --json instead")
    if html is not None and not html.parent.is_dir():
        raise OutputError(f"{html.parent} does not exist; create it first")
    request = Request(
        teacher=teacher,
        data=data,
        clips=clips,
        frames=frames,
        videos=videos,
        steps=steps,
        seed=seed,
        device=resolve_device(device),
        dtype=getattr(torch, dtype) if dtype is not None else None,
        cache_dtype=cast(Any, cache_dtype),  # which Request checks
    )
    out, err = console(), console(stderr=True)

    def keep(index: int, report: EvaluationReport) -> None:
        """Each model's results are on the disk before the next one is begun."""
        folder = Path(models[index]) / (subfolder or "")
        err.print(f"written to {save_evaluation(report, folder)}", markup=False, soft_wrap=True)

    scores = [load_vbench(path) for path in vbench or ()]
    teacher_scores = load_vbench(vbench_teacher) if vbench_teacher is not None else None
    with ExitStack() as stack:
        for folder in dict.fromkeys(Path(source).resolve() for source in models) if save else ():
            stack.enter_context(claim(folder, "evaluate"))
        progress = stack.enter_context(progress_bar(err))
        report = run(
            [source_of(source, revision=revision, subfolder=subfolder) for source in models],
            request,
            vbench=scores,
            teacher_vbench=teacher_scores,
            progress=progress,
            on_model=keep if save else None,
            say=lambda line: err.print(line, markup=False, soft_wrap=True),
        )
    if html is not None:
        write_page(report, html)
        err.print(f"written to {html}", markup=False, soft_wrap=True)
    if as_json:
        print_json(report.to_json())
    else:
        print_tables(out, evaluation_table(report), error_table(report))
        out.print("\n".join(verdict_lines(report)), markup=False)
