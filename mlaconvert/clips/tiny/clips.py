"""Clips for the tiny model, drawn on the fly: a shape that moves before a background, and a caption.

The RGB pixels in [-1, 1] are themselves the latents. Everything about a clip follows from its seed. The caption tells
all but where the shape is and the background's two colors. The shape leaves on one side and comes in on the other; in a
chunk of three frames it moves by four pixels, the model's patch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mlaconvert.clips.folder import Clips

HEIGHT, WIDTH = 24, 32
SIZES = ("small", "large")
COLORS = ("red", "green", "blue", "yellow", "magenta", "cyan", "white", "black")
SHAPES = ("disc", "square", "triangle", "ring")
HEADINGS = ("up", "down", "left", "right")
BACKGROUNDS = ("sky", "dawn", "glow", "stripes")
CAPTION = (SIZES, COLORS, SHAPES, HEADINGS, BACKGROUNDS)  # the words that each place of a caption may have
CAPTION_LEN = len(CAPTION)
VOCABULARY = ("nothing", *(word for allowed in CAPTION for word in allowed))
HELD_BACK = 2_000_000_000  # training takes its seeds from 1,000,000 on
EMBEDDINGS = Path(__file__).with_name("captions.safetensors")

_RADII = torch.tensor([5.0, 7.0])  # pixels, by size
_RGB = torch.tensor(
    [[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [1, -1, 1], [-1, 1, 1], [1, 1, 1], [-1, -1, -1]]
).float()
_VELOCITIES = torch.tensor([[-4, 0], [4, 0], [0, -4], [0, 4]]) / 3  # (row, column) pixels a frame, by heading
_EDGE = 1.5  # how sharp shapes are


@dataclass(frozen=True)
class Scenes:
    """N random scenes; `draw` shows them at any times."""

    choices: Tensor  # [N, CAPTION_LEN] int64: indices into each of CAPTION
    start: Tensor  # [N, 2] pixels (row, column)
    tint: Tensor  # [N, 2, 3] the two colors that the background mixes

    def tokens(self) -> Tensor:
        """Caption tokens, int64 [N, CAPTION_LEN]: indices into VOCABULARY."""
        return self.choices + torch.tensor([1 + sum(map(len, CAPTION[:place])) for place in range(CAPTION_LEN)])

    def draw(self, times: Tensor) -> Tensor:
        """Frames [N, 3, F, HEIGHT, WIDTH] in [-1, 1] at `times` [N, F] or [F] (frames, from 0)."""
        times = times.expand(len(self.choices), -1).float()
        size, color, shape, heading, background = self.choices.unbind(1)
        center = self.start[:, None] + _VELOCITIES[heading][:, None] * times[..., None]  # [N, F, 2]
        dy = _around(torch.arange(HEIGHT)[:, None] - center[..., 0, None, None], HEIGHT)
        dx = _around(torch.arange(WIDTH) - center[..., 1, None, None], WIDTH)
        cover = _cover(shape, _RADII[size][:, None, None, None], dy, dx)[..., None]  # [N, F, H, W, 1]
        mix = _backgrounds()[background][:, None, ..., None]  # [N, 1, H, W, 1]
        one, two = self.tint[:, :, None, None, None].unbind(1)
        frame = (one * mix + two * (1 - mix)) * (1 - cover) + _RGB[color][:, None, None, None] * cover
        return frame.permute(0, 4, 1, 2, 3).contiguous()


def _around(distance: Tensor, extent: int) -> Tensor:
    """The distance [...] to the nearest image, where pictures repeat after `extent` pixels."""
    return (distance + extent / 2).remainder(extent) - extent / 2


def _backgrounds() -> Tensor:
    """How much of its first color each of BACKGROUNDS has, [4, HEIGHT, WIDTH] in [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, HEIGHT), torch.linspace(0, 1, WIDTH), indexing="ij")
    glow = (2 * ((y - 0.5).square() + (x - 0.5).square())).sqrt()
    stripes = 0.5 + 0.5 * (torch.arange(HEIGHT) * math.pi / 6).sin()[:, None].expand(HEIGHT, WIDTH)
    return torch.stack((y, x, glow, stripes))


def _cover(shape: Tensor, size: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
    """Soft coverage [N, F, H, W] of shapes [N] of `size` [N, 1, 1, 1] around their centers."""
    radius = (dy.square() + dx.square()).sqrt()
    distance = torch.stack(
        (
            radius - size,
            torch.maximum(dy.abs(), dx.abs()) - 0.85 * size,
            torch.maximum(dy - 0.7 * size, 0.87 * dx.abs() - 0.5 * dy - 0.5 * size),
            (radius - 0.72 * size).abs() - 0.28 * size,
        ),
        1,
    )
    return torch.sigmoid(-_EDGE * distance[torch.arange(len(shape)), shape])


def sample_scenes(count: int, seed: int) -> Scenes:
    """`count` scenes from `seed`; different seeds give unrelated scenes."""
    g = torch.Generator().manual_seed(seed)
    choices = torch.stack([torch.randint(len(allowed), (count,), generator=g) for allowed in CAPTION], 1)
    # Anywhere on its way, and beside it where all of the shape is seen.
    extent, margin = torch.tensor([HEIGHT, WIDTH]), _RADII[choices[:, :1]] + 1
    place, moves = torch.rand(count, 2, generator=g), _VELOCITIES[choices[:, 3]] != 0
    return Scenes(
        choices=choices,
        start=torch.where(moves, place * extent, margin + place * (extent - 1 - 2 * margin)),
        tint=1.4 * torch.rand(count, 2, 3, generator=g) - 0.7,
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


def held_back(count: int, *, frames: int = 6) -> Clips:
    """Clips that training never drew, with their captions."""
    scenes = sample_scenes(count, HELD_BACK)
    return Clips(scenes.draw(torch.arange(frames)), embed_captions(scenes.tokens()))


def training_clips(count: int, *, frames: int = 9, seed: int = 1_000_000) -> Clips:
    """Clips that training drew from, at any time of their scene, with their captions."""
    scenes = sample_scenes(count, seed)
    start = torch.randint(0, 60, (count, 1), generator=torch.Generator().manual_seed(seed))
    return Clips(scenes.draw(start + torch.arange(frames)), embed_captions(scenes.tokens()))


def words(tokens: Tensor) -> str:
    """The caption of one clip's tokens [CAPTION_LEN], readable."""
    return " ".join(VOCABULARY[int(token)] for token in tokens)
