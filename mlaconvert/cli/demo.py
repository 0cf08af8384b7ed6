"""mlaconvert demo"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from mlaconvert.cli.options import Json
from mlaconvert.cli.show import console, print_json, progress_bar


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the converted model and the pictures.")
    ] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Do the whole job on the small trained model that ships: analyze, convert, compare, show frames. Takes minutes."""
    from mlaconvert.demo import make_folder, run_demo
    from mlaconvert.files.staging import claim
    from mlaconvert.reports.evaluation_tables import evaluation_table
    from mlaconvert.reports.page.sections import save
    from mlaconvert.reports.tables import analysis_table, layer_table

    out, err = console(), console(stderr=True)
    started = time.monotonic()
    make_folder(output.parent)  # the folder itself only once no other command has it
    with claim(output, "demo") as interrupted:
        with progress_bar(err) as progress:
            found = run_demo(output, progress, overwrite=interrupted)
        page = save(found.evaluation, found.model)
    if as_json:
        print_json(found.to_json())
    else:
        converted = map(layer_table, found.report.models)
        out.print(analysis_table(found.analysis), *converted, evaluation_table(found.evaluation))
    err.print(
        f"done in {time.monotonic() - started:.0f} s; look at {found.sheet} (teacher above, converted below) "
        f"and {found.movie} (teacher left, converted right); the model is {found.model}, the report {page}",
        markup=False,
        soft_wrap=True,
    )
