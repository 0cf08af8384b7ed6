"""What several of these tests are made of."""

from __future__ import annotations

import command_line
import pytest

from mlaconvert.generation.movies import can_write_mp4
from mlaconvert.generation.request import Generation

CAPTIONS = ("large red disc right, sky", "small white ring up, stripes")
SHORT = Generation(frames=8, steps=2, prompts=CAPTIONS[:1])
needs_mp4 = pytest.mark.skipif(not can_write_mp4(), reason="needs imageio-ffmpeg")


def invoke(*arguments: object) -> command_line.Result:
    return command_line.invoke("generate", *arguments)


def succeed(*arguments: object) -> command_line.Result:
    return command_line.succeed("generate", *arguments)
