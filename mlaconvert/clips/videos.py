"""Videos and their captions, found in folders and tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlaconvert.clips.footage import ENDINGS
from mlaconvert.errors import InputError
from mlaconvert.files.inputs import parse_json, read_text, reason_of
from mlaconvert.files.names import is_hidden

_CAPTIONS_LIMIT = 1 << 28  # bytes


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video to encode. `name` is its path below the folder it was found in."""

    name: str
    path: Path
    caption: str


def find_videos(sources: Sequence[Path], captions: Path | None = None) -> list[Video]:
    """The videos that `sources`, files and folders, hold, by name, with their captions.

    Captions come from `captions` (JSON lines with file and caption, or CSV with these columns; files are found from
    its folder, or by their bare name), without it from a text file beside each video with its name. Raises InputError
    when there is no video, when a caption is missing, or for two videos of one name.
    """
    paths: dict[str, Path] = {}
    for source in sources:
        for name, path in _below(source):
            if paths.setdefault(name, path) != path:
                raise InputError(f"two videos are called {name}: {paths[name]} and {path}; give the folder above both")
    if not paths:
        raise InputError(f"{', '.join(map(str, sources))}: no videos there ({', '.join(ENDINGS)})")
    table = None if captions is None else _read_captions(captions)
    return [
        Video(name=name, path=path, caption=_caption(path, table, captions)) for name, path in sorted(paths.items())
    ]


def _below(source: Path) -> Iterator[tuple[str, Path]]:
    """(name, path) of a video file, or of all in a folder."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            name = path.relative_to(source).as_posix()
            if path.suffix.lower() in ENDINGS and path.is_file() and not is_hidden(name):
                yield name, path
    elif source.is_file():
        yield source.name, source
    else:
        raise InputError(f"{source}: there is no such file or folder")


def _read_captions(path: Path) -> dict[str, str]:
    """File as it stands there -> caption."""
    text = read_text(path, limit=_CAPTIONS_LIMIT)
    rows: list[tuple[int, Any]] = []
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            if not {"file", "caption"} <= set(reader.fieldnames or ()):
                raise InputError(f"{path}: its first line must name the columns file and caption")
            rows = [(reader.line_num, row) for row in reader]
        except csv.Error as error:
            reason = f"{path}, line {reader.line_num}: not readable as CSV ({reason_of(error)})"
            raise InputError(f"{reason}; check the quotation marks before it") from None
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    rows.append((number, parse_json(line)))
                except ValueError as error:
                    raise InputError(f"{path}, line {number}: not JSON ({reason_of(error)})") from None
    captions: dict[str, str] = {}
    for number, row in rows:
        file, caption = (row.get(name) if isinstance(row, dict) else None for name in ("file", "caption"))
        if not isinstance(file, str) or not isinstance(caption, str) or not file:
            raise InputError(f"{path}, line {number}: expected file and caption, both text")
        if captions.setdefault(file, caption) != caption:
            raise InputError(f"{path}, line {number}: {file} has two captions; keep one")
    return captions


def _caption(video: Path, table: Mapping[str, str] | None, source: Path | None) -> str:
    if table is None or source is None:
        beside = video.with_suffix(".txt")
        if not beside.is_file():
            raise InputError(f"{video} has no caption: write one into {beside.name} beside it, or give --captions FILE")
        return read_text(beside).strip()
    whole, here = video.absolute(), source.absolute().parent
    inside = [whole.relative_to(here).as_posix()] if whole.is_relative_to(here) else []
    for name in (str(whole), *inside, video.as_posix(), video.name):
        if name in table:
            return table[name].strip()
    raise InputError(f"{video} has no caption in {source}; add a line with its path from there, or its bare name")
