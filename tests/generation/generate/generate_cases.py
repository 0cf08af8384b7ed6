"""What several of these tests are made of."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner, Result

from mlaconvert.cli import app
from mlaconvert.generation.movies import can_write_mp4
from mlaconvert.generation.request import Generation

CAPTIONS = ("large red disc right, sky", "small white ring up, stripes")
SHORT = Generation(frames=8, steps=2, prompts=CAPTIONS[:1])
needs_mp4 = pytest.mark.skipif(not can_write_mp4(), reason="needs imageio-ffmpeg")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def succeed(*arguments: object) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return result
