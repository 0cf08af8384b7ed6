"""mlaconvert demo"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlaconvert.cli.options import Json
from mlaconvert.cli.show import console, print_json, print_tables, progress_bar

if TYPE_CHECKING:
    from mlaconvert.conversion.report import ConversionReport
    from mlaconvert.conversion.spectra import Analysis


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the converted model and the pictures.")
    ] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Do the whole job on the small trained model that ships: analyze, convert, compare, show frames. Takes minutes."""
    from mlaconvert.conversion.spectra import Analysis
    from mlaconvert.demo import DemoListener, make_folder, next_commands, run_demo
    from mlaconvert.files.staging import claim
    from mlaconvert.reports.evaluation_tables import evaluation_table, verdict_lines
    from mlaconvert.reports.page.sections import save
    from mlaconvert.reports.tables import analysis_table, layer_table

    out, err = console(quiet=as_json), console(stderr=True)

    def say(line: str) -> None:
        err.print(line, markup=False)

    def show(result: Analysis | ConversionReport) -> None:
        if isinstance(result, Analysis):
            print_tables(out, analysis_table(result))
        else:
            print_tables(out, *map(layer_table, result.models))

    started = time.monotonic()
    make_folder(output.parent)  # the folder itself only once no other command has it
    with claim(output, "demo") as interrupted:
        with progress_bar(err) as progress:
            told = DemoListener(progress=progress, say=say, on_result=show)
            found = run_demo(output, told, overwrite=interrupted)
        page = save(found.evaluation, found.model)
    if as_json:
        print_json(found.to_json())
    print_tables(out, evaluation_table(found.evaluation))
    out.print("\n".join(verdict_lines(found.evaluation)), markup=False)
    err.print(
        f"done in {time.monotonic() - started:.0f} s; look at {found.sheet} (teacher above, converted below) "
        f"and {found.movie} (teacher left, converted right); the model is {found.model}, the report {page}",
        markup=False,
        soft_wrap=True,
    )
    for command, purpose in next_commands(found):
        err.print(f"  {command}  # {purpose}", markup=False, soft_wrap=True)
