"""What several of these tests are made of."""

from __future__ import annotations

from pathlib import Path

import command_line
import torch
from torch import Tensor

from mlaconvert.clips.encode import Encoding
from mlaconvert.clips.footage import Footage, to_pixels
from mlaconvert.generation.movies import save_movie

SMALL = Encoding(height=32, width=48, frames=3)  # 9 video frames a clip


def movie(path: Path, frames: int, *, size: tuple[int, int] = (36, 60), fps: int = 16, seed: int = 0) -> Path:
    """A video of smooth noise that changes from frame to frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(frames, 3, 3, 5, generator=generator) * 2 - 1
    save_movie(torch.nn.functional.interpolate(coarse, size=size, mode="bilinear"), path, fps=fps, scale=1)
    return path


def invoke(*arguments: object) -> command_line.Result:
    return command_line.invoke("encode", *arguments)


def decoded(path: Path, height: int = 32, width: int = 48, fps: float = 16) -> list[Tensor]:
    with Footage(path, height=height, width=width, fps=fps) as footage:
        return [to_pixels(frame) for frame in footage]


def scramble(path: Path, first: float, last: float) -> None:
    """Change bytes between two parts of the pictures' data."""
    data = bytearray(path.read_bytes())
    begin, size = data.find(b"mdat") + 4, data.find(b"moov") - data.find(b"mdat") - 4
    for i in range(begin + int(first * size), begin + int(last * size), 7):
        data[i] ^= 0x55
    path.write_bytes(data)
