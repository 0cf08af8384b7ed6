"""A report's file in its place."""

from __future__ import annotations

from pathlib import Path

from mlaconvert.errors import OutputError
from mlaconvert.files.whole import write_whole


def save_report(path: Path, data: bytes, what: str) -> None:
    """Replace `path` by `data`, at once and only when all is on the disk. Raises OutputError, which says `what`."""
    try:
        write_whole(path, data)
    except OSError as error:
        raise OutputError(f"{path}: cannot write {what} ({error.strerror}); choose another path") from error
