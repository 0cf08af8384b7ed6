"""Clips for the tiny model, drawn on the fly: two moving shapes before a texture, and a caption.

The RGB pixels in [-1, 1] are themselves the latents. Everything about a clip follows from its seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mlaconvert.data import Clips

HEIGHT, WIDTH = 24, 32
SHAPES = ("disc", "square", "triangle", "ring")
COLORS = ("red", "green", "blue", "yellow", "magenta", "cyan", "white", "black")
TEXTURES = ("stripes", "waves", "checks", "haze")
SPEEDS = ("slow", "fast")
VOCABULARY = ("nothing", *SHAPES, *COLORS, *TEXTURES, *SPEEDS)
CAPTION_LEN = 7  # color shape speed, color shape speed, texture
HELD_BACK = 2_000_000_000  # training takes its seeds from 1,000,000 on
EMBEDDINGS = Path(__file__).with_name("captions.safetensors")

_RGB = torch.tensor(
    [[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [1, -1, 1], [-1, 1, 1], [1, 1, 1], [-1, -1, -1]]
).float()


@dataclass(frozen=True)
class Scenes:
    """N random scenes; `draw` shows them at any times."""

    shape: Tensor  # [N, 2]
    color: Tensor  # [N, 2]
    speed: Tensor  # [N, 2]
    texture: Tensor  # [N]
    size: Tensor  # [N, 2] pixels
    start: Tensor  # [N, 2, 2] pixels (row, column)
    velocity: Tensor  # [N, 2, 2] pixels per frame
    wave: Tensor  # [N, 2, 4] row and column frequency (radians per pixel), phase, drift (radians per frame)
    tint: Tensor  # [N, 2, 3] the two colors that the texture mixes
    edge: float

    def tokens(self) -> Tensor:
        """Caption tokens, int64 [N, CAPTION_LEN]: indices into VOCABULARY."""
        color, speed = 1 + len(SHAPES), 1 + len(SHAPES) + len(COLORS) + len(TEXTURES)
        things = torch.stack((color + self.color, 1 + self.shape, speed + self.speed), -1).flatten(1)
        return torch.cat((things, (1 + len(SHAPES) + len(COLORS) + self.texture)[:, None]), 1)

    def draw(self, times: Tensor) -> Tensor:
        """Frames [N, 3, F, HEIGHT, WIDTH] in [-1, 1] at `times` [N, F] or [F] (frames, from 0)."""
        times = times.expand(len(self.shape), -1).float()
        rows = torch.arange(HEIGHT).float()[:, None]
        columns = torch.arange(WIDTH).float()
        frame = self._texture(times[:, :, None, None], rows, columns)  # [N, F, H, W, 3]
        for i in range(2):
            center = self.start[:, i, None] + self.velocity[:, i, None] * times[..., None]  # [N, F, 2]
            margin = self.size[:, i, None, None]
            span = torch.tensor([HEIGHT - 1.0, WIDTH - 1.0]) - 2 * margin
            center = margin + span - (center.remainder(2 * span) - span).abs()  # bounces off the borders
            dy, dx = rows - center[..., 0, None, None], columns - center[..., 1, None, None]
            cover = self._cover(i, dy, dx)[..., None]
            frame = frame * (1 - cover) + cover * _RGB[self.color[:, i]][:, None, None, None]
        return frame.permute(0, 4, 1, 2, 3).contiguous()

    def _texture(self, times: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        def wave(i: int) -> Tensor:
            fy, fx, phase, drift = (self.wave[:, i, j, None, None, None] for j in range(4))
            return torch.sin(fy * rows + fx * columns + phase + drift * times)

        first, second = wave(0), wave(1)
        kinds = torch.stack((first, (first + second) / 2, (4 * first * second).tanh(), 0.5 * (first * 0.5 + second)), 1)
        mix = kinds[torch.arange(len(self.texture)), self.texture][..., None] / 2 + 0.5
        one, two = self.tint[:, 0, None, None, None], self.tint[:, 1, None, None, None]
        return one * mix + two * (1 - mix)

    def _cover(self, i: int, dy: Tensor, dx: Tensor) -> Tensor:
        """Soft coverage [N, F, H, W] of shape `i` around its center."""
        size = self.size[:, i, None, None, None]
        radius = (dy.square() + dx.square()).sqrt()
        triangle = torch.maximum(-dy - 0.8 * size, 0.87 * dx.abs() + 0.5 * dy - 0.4 * size)
        distance = torch.stack(
            (
                radius - size,
                torch.maximum(dy.abs(), dx.abs()) - 0.85 * size,
                triangle,
                (radius - 0.75 * size).abs() - 1.1,
            ),
            1,
        )
        inside = distance[torch.arange(len(self.shape)), self.shape[:, i]]
        return torch.sigmoid(-self.edge * inside)


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """What scenes are drawn from."""

    shapes: int  # the first of SHAPES
    size: tuple[float, float]  # pixels
    slow: tuple[float, float]  # pixels per frame
    fast: tuple[float, float]
    frequency: float  # of textures, at most, in radians per pixel
    drift: float  # of textures, at most, in radians per frame
    edge: float  # how sharp shapes are


# Training begins with hard scenes; the model that ships generates the last ones.
WILD = Difficulty(shapes=4, size=(3, 5.5), slow=(0.25, 0.6), fast=(0.9, 1.6), frequency=0.9, drift=0.25, edge=2.5)
STILL = Difficulty(shapes=4, size=(3, 5.5), slow=(0.25, 0.6), fast=(0.8, 1.2), frequency=0.45, drift=0, edge=2.5)
CALM = Difficulty(shapes=2, size=(3.5, 5.5), slow=(0.15, 0.3), fast=(0.4, 0.7), frequency=0.3, drift=0, edge=1.2)


def sample_scenes(count: int, seed: int, difficulty: Difficulty = CALM) -> Scenes:
    """`count` scenes from `seed`; different seeds give unrelated scenes."""
    g, d = torch.Generator().manual_seed(seed), difficulty

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=g)

    def choice(options: int, *shape: int) -> Tensor:
        return torch.randint(options, (count, *shape), generator=g)

    speed = choice(len(SPEEDS), 2)
    slow, fast = (uniform(2, low=low, high=high) for low, high in (d.slow, d.fast))
    pace = torch.where(speed == 0, slow, fast)
    heading = uniform(2, high=2 * math.pi)
    color = choice(len(COLORS), 2)
    color[:, 1] = (color[:, 0] + torch.randint(1, len(COLORS), (count,), generator=g)) % len(COLORS)
    wave = torch.cat(
        (
            uniform(2, 2, low=-d.frequency, high=d.frequency),
            uniform(2, 1, high=2 * math.pi),
            uniform(2, 1, low=-d.drift, high=d.drift),
        ),
        -1,
    )
    return Scenes(
        shape=choice(d.shapes, 2),
        color=color,
        speed=speed,
        texture=choice(len(TEXTURES)),
        size=uniform(2, low=d.size[0], high=d.size[1]),
        start=uniform(2, 2, high=64.0),
        velocity=pace[..., None] * torch.stack((heading.sin(), heading.cos()), -1),
        wave=wave,
        tint=uniform(2, 3, low=-0.7, high=0.7),
        edge=d.edge,
    )


def embed_captions(tokens: Tensor, tables: dict[str, Tensor] | None = None) -> Tensor:
    """Context [N, CAPTION_LEN, text_dim] of caption tokens [N, CAPTION_LEN]: word plus position embeddings.

    `tables` are "words" [V, text_dim] and "positions" [CAPTION_LEN, text_dim]; by default those that ship.
    """
    tables = load_file(EMBEDDINGS) if tables is None else tables
    return tables["words"][tokens] + tables["positions"]


def null_context() -> Tensor:
    """The embedding of an empty caption, [1, CAPTION_LEN, text_dim], for guidance."""
    return embed_captions(torch.zeros(1, CAPTION_LEN, dtype=torch.long))


def held_back(count: int, *, frames: int = 6, seed: int = HELD_BACK) -> Clips:
    """Clips that training never drew, with their captions."""
    scenes = sample_scenes(count, seed)
    return Clips(scenes.draw(torch.arange(frames)), embed_captions(scenes.tokens()))


def training_clips(count: int, *, frames: int = 9, seed: int = 1_000_000) -> Clips:
    """Clips that training drew from, at any time of their scene, with their captions."""
    scenes = sample_scenes(count, seed)
    start = torch.randint(0, 60, (count, 1), generator=torch.Generator().manual_seed(seed))
    return Clips(scenes.draw(start + torch.arange(frames)), embed_captions(scenes.tokens()))


def words(tokens: Tensor) -> str:
    """The caption of one clip's tokens [CAPTION_LEN], readable."""
    return " ".join(VOCABULARY[int(token)] for token in tokens)
