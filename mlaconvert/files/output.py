"""Where a run that may be interrupted writes, and what it does with what is there already."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TypeAlias


@dataclass(frozen=True)
class Output:
    """The new folder of a run. Functions take it where they take a path.

    Output(Path("wan-mla"), overwrite=True)
    """

    path: str | Path
    """The folder, which appears whole or not at all."""

    _: KW_ONLY

    overwrite: bool = False
    """Replace the model folder that is there; otherwise a folder that exists is refused."""

    restart: bool = False
    """Throw away what an interrupted run has finished; otherwise the run goes on from there."""


AnyOutput: TypeAlias = Output | str | Path


def as_output(output: AnyOutput) -> Output:
    """`output` itself, or the new folder of a bare path."""
    return output if isinstance(output, Output) else Output(output)
