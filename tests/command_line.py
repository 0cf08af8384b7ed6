"""The command line, run in this process, and the options that there are."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from typing import Any, NamedTuple

from typer.main import get_command

from mlaconvert.cli import app

# Typer's own runner would build all commands anew for every call, which takes longer than many of the calls do.
_ROOT: Any = get_command(app)
# The function behind each command.
COMMANDS = {str(info.name or getattr(info.callback, "__name__", "")): info.callback for info in app.registered_commands}


class Result(NamedTuple):
    """What a command ended with, and what it printed."""

    exit_code: int
    stdout: str
    stderr: str


def invoke(*arguments: object) -> Result:
    """`mlaconvert` with these arguments, in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    code: Any = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            _ROOT.main([str(argument) for argument in arguments], prog_name="mlaconvert")
        except SystemExit as end:
            code = end.code
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return Result(code, *texts)


def succeed(*arguments: object) -> Result:
    """The same, for a command that must end well."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


@cache
def options() -> dict[str, frozenset[str]]:
    """The options that each command's parser takes, and under "" those before a command. Help texts are no proof of
    one: they name other options too, and `--kv-rank` is the beginning of `--kv-ranks`."""
    return {
        name: frozenset(
            ("--help", *(o for parameter in command.params for o in (*parameter.opts, *parameter.secondary_opts)))
        )
        for name, command in {"": _ROOT, **_ROOT.commands}.items()
    }
