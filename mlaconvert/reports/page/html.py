"""The page's frame and its parts: sections, tables, tables that are folded away."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any


def document(title: str, *body: str) -> str:
    """A page of its own; `body` is HTML."""
    # Colours are Okabe and Ito's, which colour-blind readers tell apart, darker on white and lighter on black.
    style = files("mlaconvert.reports.page").joinpath("style.css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "".join(body)
        + "</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A part of the page under its own heading; `parts` are HTML."""
    anchor = re.sub(r"\W+", "-", title.lower())
    return (
        f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{escape(title)}</h2>\n'
        + "\n".join(parts)
        + "\n</section>"
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    kind: str = "figures",
    *,
    hints: Mapping[str, str] | None = None,
) -> str:
    """A table whose first column heads the rows; `hints` are shown when a row's name is pointed at."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)

    def head_of(name: str) -> str:
        title = f' title="{escape(hints[name])}"' if hints and name in hints else ""
        return f'<th scope="row"{title}>{escape(name)}</th>'

    body = "".join(
        f"<tr>{head_of(row[0])}" + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="{kind}">'
        f"<caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def details(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that is folded away."""
    return f"<details><summary>{escape(title)}, as a table</summary>{table(title, heads, rows)}</details>"


def settings(title: str, facts: Mapping[str, Any]) -> str:
    """An open table of names and values; what is not set is left out."""
    rows = [(name.replace("_", " "), _plain(value)) for name, value in facts.items() if value not in (None, "")]
    shown = table(title, ("setting", "value"), rows, "settings")
    return f"<details open><summary>{escape(title)}</summary>{shown}</details>"
