"""Puts what a benchmark measured into a page, between the two markers of its name."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def put_between(page: Path, name: str, text: str) -> None:
    """Replace what stands between the lines `<!-- name -->` and `<!-- end of name -->`; ends the program without."""
    old = page.read_text()
    marked = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
    if not marked.search(old):
        sys.exit(f"{page} has no lines <!-- {name} --> and <!-- end of {name} -->")
    page.write_text(marked.sub(lambda _: f"{text}\n", old))
