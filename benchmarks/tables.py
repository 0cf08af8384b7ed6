"""Puts what a benchmark measured into a page, between the two markers of its name."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def put_between(page: Path, name: str, text: str) -> None:
    """Replace what stands between the lines `<!-- name -->` and `<!-- end of name -->`; ends the program without."""
    old = page.read_text()
    marked = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
    if not marked.search(old):
        sys.exit(f"{page} has no lines <!-- {name} --> and <!-- end of {name} -->")
    page.write_text(marked.sub(lambda _: f"{text}\n", old))


def step_table(steps: Iterable[Mapping[str, Any]]) -> list[str]:
    """A row for each step of healing, of the fields of `healing.RealStep`."""
    lines = [
        "| stage | tokens | FLOPs | s a step | tokens/s | peak memory | of bf16 peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for step in steps:
        share = "-" if step["of_peak"] is None else f"{step['of_peak']:.0%}"
        lines.append(
            f"| {step['stage']} | {step['tokens']:,} | {step['flops']:.3g} | {step['seconds']:.2f} | "
            f"{step['tokens'] / step['seconds']:,.0f} | {_gib(step['peak_bytes'])} | {share} |"
        )
    return lines


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.1f} GiB"
