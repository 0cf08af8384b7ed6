"""Small files that somebody else wrote: text, JSON and YAML, read with limits.

Nothing here trusts a size, a depth or a name. A file is read only when it is a regular one: a pipe or a device in its
place would block or never end.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import yaml

from mlaconvert.errors import CheckpointError, ConfigError, InputError, OutputError
from mlaconvert.files.contents import stand_in

MAX_TEXT = 1 << 24  # bytes of a JSON or text file; conversion.json of the largest models has two million
MAX_RECIPE = 1 << 17  # bytes of a YAML file; the parser is slow
MAX_DEPTH = 32  # lists and mappings inside each other
MAX_PARTS = 1 << 19  # lists and objects of a JSON file; healing.json has one a step
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)  # of JSON, closed or not: brackets in it are none


def file_size(path: Path, error: type[InputError] = CheckpointError) -> int:
    """Bytes of a regular file. Raises `error` when there is none, or something else has its name."""
    try:
        state = path.stat()
    except FileNotFoundError:
        reason = "is a link to nowhere" if path.is_symlink() else "there is no such file"
        raise error(f"{path}: {reason}; check the path") from None
    except (OSError, ValueError) as failure:  # a loop of links, a name that is too long, a NUL
        raise error(f"{path}: it cannot be read ({reason_of(failure)}); check the path") from None
    if not stat.S_ISREG(state.st_mode):
        what = "a folder" if stat.S_ISDIR(state.st_mode) else "a pipe, socket or device"
        raise error(f"{path}: it is {what}; give a regular file")
    return state.st_size


def file_states(files: Sequence[Path]) -> list[list[str | int]]:
    """Name, size in bytes and time of change (ns) of each file, which tell a changed file without reading it."""
    return [[file.name, file_size(file), file.stat().st_mtime_ns] for file in files]


def is_file(path: Path) -> bool:
    """Whether a regular file has this name; False for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether a folder has this name; False for a name that none can have."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def open_inside(folder: Path, name: str) -> BinaryIO:
    """Open the regular file `name` ("/" between folders) of `folder`, through no link but one to the folder itself.

    What is opened is what was looked at, whatever changes meanwhile. Raises InputError naming the link, or the
    file that cannot be read.
    """
    path, parts = folder / name, PurePosixPath(name).parts
    try:
        stream = _open_at(folder, parts)
    except OSError as failure:
        link = next((at for at in [*reversed(path.parents), path][-len(parts) :] if at.is_symlink()), None)
        if link is None:
            raise InputError(f"{path}: it cannot be read ({reason_of(failure)}); check the path") from None
        raise InputError(
            f"{link} is a link, and only files of the folder itself are taken; put a copy of what it leads to in its "
            "place (cp -L), or delete it"
        ) from None
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise InputError(f"{path}: it is no regular file; delete it")
    return stream


def _open_at(folder: Path, parts: Sequence[str]) -> BinaryIO:
    """Open `parts` below `folder` one after the other. Raises OSError for a link among them."""
    if os.open not in os.supports_dir_fd:  # Windows
        for count in range(1, len(parts) + 1):
            if folder.joinpath(*parts[:count]).is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        return folder.joinpath(*parts).open("rb")
    handle = os.open(folder, os.O_RDONLY)
    for part in parts:
        try:  # a pipe would block
            inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=handle)
        finally:
            os.close(handle)
        handle = inner
    return os.fdopen(handle, "rb")


def read_text(path: Path, error: type[InputError] = InputError, *, limit: int = MAX_TEXT) -> str:
    """A UTF-8 text file of at most `limit` bytes, with a byte order mark or without. Raises `error` naming the file."""
    size = file_size(path, error)
    if size > limit:
        raise error(f"{path}: it has {size:,} bytes, expected at most {limit:,}; check that it is the right file")
    try:
        data = path.read_bytes()
        if _is_utf16(data[:64]):
            raise error(f"{path}: not UTF-8 text but UTF-16; save it as UTF-8 (in a spreadsheet: CSV UTF-8)")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(f"{path}: not UTF-8 text ({failure.reason} at byte {failure.start}); save it as UTF-8") from None
    except OSError as failure:
        raise error(f"{path}: it cannot be read ({reason_of(failure)})") from None


def _is_utf16(head: bytes) -> bool:
    """Whether a text that begins so is UTF-16: by its mark, or as one byte of two is mostly zero, the other never."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return True
    halves = (head[::2], head[1::2])
    return len(head) > 3 and any(a.count(0) * 2 > len(a) and 0 not in b for a, b in (halves, halves[::-1]))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file with an object in it. Raises CheckpointError naming the file."""
    text = read_text(path, CheckpointError)
    try:
        data = parse_json(text)
    except ValueError as failure:
        if instead := stand_in(text[:256].encode()):
            raise CheckpointError(f"{path}: {instead}") from None
        raise CheckpointError(f"{path}: it is not readable JSON ({reason_of(failure)}); mend it") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: it must hold a JSON object, not a {type(data).__name__}")
    return data


def parse_json(text: str) -> Any:
    """Plain data from JSON. Raises ValueError; also for a key that comes twice, and beyond MAX_DEPTH or MAX_PARTS."""
    if _brackets(text) > MAX_PARTS and _brackets(_STRING.sub("", text)) > MAX_PARTS:
        raise ValueError(f"more than {MAX_PARTS:,} lists and objects")
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    level = _inside([[data]])
    for _ in range(MAX_DEPTH):
        level = _inside(level)
    if level:
        raise ValueError("lists or objects are nested too deeply")
    return data


def _brackets(text: str) -> int:
    return text.count("[") + text.count("{")


def _inside(level: list[Any]) -> list[Any]:
    """The lists and objects in those of `level`."""
    parts = (part for item in level for part in (item.values() if isinstance(item, dict) else item))
    return [part for part in parts if isinstance(part, dict | list)]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} is in it twice")
    return data


class _PlainLoader(yaml.SafeLoader):
    """YAML without what makes it more than JSON with comments: a key may come only once, and 1e-5 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            raise ValueError("a key is a list or a mapping")
        _no_duplicates([(key.value, None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


# YAML 1.1 takes it for a text unless it has a point and a sign, as 1.0e-5 has; 1.2 does not.
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), [*"-+0123456789"]
)


def read_yaml(path: Path) -> Any:
    """Plain data from a YAML file. Raises ConfigError naming the file; also for anchors, aliases, tags, a key twice."""
    text = read_text(path, ConfigError, limit=MAX_RECIPE)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError("lists or mappings are nested too deeply")
            if getattr(event, "anchor", None) or getattr(event, "tag", None):
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise ValueError(f"it has an anchor, an alias or a tag in line {line}")
        return yaml.load(text, Loader=_PlainLoader)
    except (ValueError, OverflowError, RecursionError, yaml.YAMLError) as failure:
        raise ConfigError(f"{path}: not a readable YAML file ({reason_of(failure)}); write plain fields") from None


def refuse_links(folder: Path) -> None:
    """Raise OutputError when a folder that will be written to has a link in it, which may lead anywhere."""
    link = next((path for path in folder.iterdir() if path.is_symlink()), None) if is_folder(folder) else None
    if link is not None:
        raise OutputError(f"{link} is a link, and nothing is written through links; delete it, or choose another path")


def refuse_foreign_links(folder: Path, names: Sequence[str]) -> None:
    """Raise InputError for a link among the files `names` of `folder`, whose text will be passed on.

    In the Hub's cache every file is a link, to the repository's blobs; those are its own.
    """
    home = Path(os.path.realpath(folder))
    blobs = next((parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"), None)
    for link in (folder / name for name in names):
        if link.is_symlink() and Path(os.path.realpath(link)).parent != blobs:
            raise InputError(
                f"{link} is a link, and what it leads to would be copied; put a copy in its place (cp -L), or delete it"
            )


def reason_of(failure: BaseException) -> str:
    """What a library says about a failure, in a few words."""
    said = failure.strerror if isinstance(failure, OSError) and failure.strerror else str(failure)
    return " ".join(said.split())[:200] or type(failure).__name__
