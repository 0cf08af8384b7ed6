"""Videos and their captions, found in folders and tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlaconvert.clips.captions import read_captions
from mlaconvert.clips.footage import ENDINGS
from mlaconvert.errors import InputError
from mlaconvert.files.inputs import read_text
from mlaconvert.files.names import is_hidden


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video to encode. `name` is its path below the folder it was found in."""

    name: str
    path: Path
    caption: str


def find_videos(sources: Sequence[Path], captions: Path | None = None) -> list[Video]:
    """The videos that `sources`, files and folders, hold, by name, with their captions.

    Captions come from the table `captions` (see `captions.read_captions`; files are found from its folder, or by their
    bare name), without it from a text file beside each video with its name. Raises InputError
    when there is no video, when a caption is missing, or for two videos of one name.
    """
    paths: dict[str, Path] = {}
    for source in sources:
        for name, path in _below(source):
            if paths.setdefault(name, path) != path:
                raise InputError(f"two videos are called {name}: {paths[name]} and {path}; give the folder above both")
    if not paths:
        raise InputError(f"{', '.join(map(str, sources))}: no videos there ({', '.join(ENDINGS)})")
    table = None if captions is None else read_captions(captions)
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
