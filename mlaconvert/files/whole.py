"""Files that are there whole or not at all, even when the process or the machine stops while they are written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"  # ends the name of a file that is being written


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` at the end of the block, once it is on the disk.

    That is beside `path`, under a new name each time: two runs that write the same file do not write into one another.
    An error in the block leaves `path` as it was. Raises OSError.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        yield partial
        sync_file(partial)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to a file that is there whole or not at all. Raises OSError."""
    with whole_file(path) as partial, partial.open("wb") as stream:
        stream.write(data)


def remove_partial(folder: Path) -> None:
    """Delete what killed runs left half written in a folder that no other run writes to. Raises OSError."""
    for path in folder.glob(f"*{PARTIAL}"):
        if path.is_file():
            path.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk. Raises OSError."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on the disk. Raises OSError."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
