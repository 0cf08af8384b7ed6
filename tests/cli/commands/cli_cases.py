"""What several of these tests are made of."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from mlaconvert.cli import app


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


COMMANDS = {str(info.name or getattr(info.callback, "__name__", "")): info.callback for info in app.registered_commands}
