"""Frames of videos beside and below each other, with gaps and labels. Pixels are RGB in [-1, 1]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mlaconvert.generation.movies import to_image

COLUMNS = 8  # frames of a video that a contact sheet shows
GAP = 8  # screen pixels between frames
MOVIE_SCALE = 6  # of pixels of the tiny videos, where only two or three frames are shown at a time
_MARGIN, _TEXT = 14, 19  # screen pixels: around everything, and the height of letters
_PAPER, _INK = "#ffffff", "#1b1f24"


def film_strip(frames: Sequence[Image.Image]) -> Image.Image:
    """Frames of one size beside each other; what lies between them is transparent."""
    width, height = frames[0].size
    strip = Image.new("RGBA", (len(frames) * (width + GAP) - GAP, height))
    for i, frame in enumerate(frames):
        strip.paste(frame, (i * (width + GAP), 0))
    return strip


def labelled(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str], *, group: int = 1, below: str = ""
) -> Image.Image:
    """Rows of frames of one size on white, named at their left, under names of the columns.

    `group` rows belong together and stand closer to each other than to the next; `below` is a line of text.
    """
    font = ImageFont.load_default(_TEXT)
    width, height = rows[0][1][0].size
    named = max(round(font.getlength(name)) for name, _ in rows)
    left, top = _MARGIN + (named + _MARGIN if named else 0), _MARGIN + _TEXT + GAP
    places = [top + number * (height + GAP) + number // group * 2 * GAP for number in range(len(rows))]
    bottom = places[-1] + height + (GAP + _TEXT if below else 0) + _MARGIN
    sheet = Image.new("RGB", (left + len(columns) * (width + GAP) - GAP + _MARGIN, bottom), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(columns):
        pen.text((left + i * (width + GAP) + width / 2, top - GAP), name, _INK, font, anchor="ms")
    for (name, frames), y in zip(rows, places, strict=True):
        pen.text((_MARGIN, y + height / 2), name, _INK, font, anchor="lm")
        strip = film_strip(frames)
        sheet.paste(strip, (left, y), strip)
    if below:
        pen.text((left, bottom - _MARGIN), below, _INK, font, anchor="ls")
    return sheet


def contact_sheet(videos: Sequence[Tensor], names: Sequence[str], *, given: int = 0) -> Image.Image:
    """Frames at even steps in time of videos [N, 3, F, H, W]: a row for each model below each other, clip by clip.

    `names` are the models'. Frames are numbered; the first `given` ones are marked.
    """
    total = videos[0].shape[2]
    picked = torch.linspace(0, total - 1, min(COLUMNS, total)).round().long()
    rows = [
        (name, [to_image(frame) for frame in video[clip, :, picked].unbind(1)])
        for clip in range(len(videos[0]))
        for name, video in zip(names, videos, strict=True)
    ]
    numbers = [f"{i} (given)" if i < given else str(i) for i in picked.tolist()]
    return labelled(rows, [f"frame {numbers[0]}", *numbers[1:]], group=len(videos))


def side_by_side(videos: Sequence[Tensor], names: Sequence[str]) -> Iterator[Image.Image]:
    """Frame after frame of videos [N, 3, F, H, W], as pictures: models from left to right, clips from top to bottom."""
    total = videos[0].shape[2]
    for i in range(total):
        rows = [("", [to_image(video[clip, :, i], MOVIE_SCALE) for video in videos]) for clip in range(len(videos[0]))]
        yield labelled(rows, list(names), below=f"frame {i} of {total}")
