"""A stdout that never loses a byte in silence: whatever cannot be written ends the command with an exit code."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import typer

_STDOUT = 1  # its file descriptor
_CLOSED_PIPE = 141  # what a shell reports of a tool that SIGPIPE ended


class _Checked(io.FileIO):
    """The file behind stdout. Its first failure ends the command; what comes after is dropped."""

    _failed = False

    def write(self, data: Any) -> int:
        """Bytes written. Raises SystemExit when the system refuses them, with a line on stderr but for a closed pipe:
        its reader has seen enough, as `head` has.
        """
        if self._failed:
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self._failed = True
            if isinstance(error, BrokenPipeError):
                raise SystemExit(_CLOSED_PIPE) from None
            with suppress(OSError):  # stderr may lie on the same disk
                typer.echo(
                    f"error: stdout cannot be written to ({error.strerror}), so what it got is cut off; files that the "
                    "command wrote stay",
                    err=True,
                )
            raise SystemExit(1) from None


@contextmanager
def checked_stdout() -> Iterator[None]:
    """Within it, sys.stdout ends the command when it cannot be written to, or flushed at the end.

    Left to itself, Python drops what does not fit when stdout is unbuffered (PYTHONUNBUFFERED) and a full disk takes a
    part, and exits with 0; otherwise it shows a traceback. A terminal, and what somebody put in the place of stdout,
    stay as they are.
    """
    stream: TextIO | None = sys.stdout
    is_ours = stream is sys.__stdout__
    encoding = errors = None
    if stream is None:  # closed by the caller: a file opened later must not take its number
        os.dup2(os.open(os.devnull, os.O_RDONLY), _STDOUT)
    elif stream.isatty() or not is_ours:
        yield
        return
    else:
        encoding, errors = stream.encoding, stream.errors
        stream.flush()
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Checked(_STDOUT, "w", closefd=False)), encoding=encoding, errors=errors
    )
    try:
        yield
    finally:
        sys.stdout.flush()
