"""Contact sheets and films: every frame whole, in its place and apart from its neighbours, under its name."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from mlaconvert.generation.movies import save_movie
from mlaconvert.generation.sheets import COLUMNS, GAP, MOVIE_SCALE, contact_sheet, labelled, side_by_side

H, W, SCALE = 5, 7, 4


def numbered(model: int, clips: int, frames: int) -> Tensor:
    """Videos [clips, 3, frames, H, W] whose every frame has a colour of its own."""
    videos = torch.zeros(clips, 3, frames, H, W)
    for clip, frame in itertools.product(range(clips), range(frames)):
        videos[clip, :, frame] = torch.tensor([model / 4, clip / 4, frame / 64])[:, None, None] * 2 - 1
    return videos


def colour(model: int, clip: int, frame: int) -> tuple[int, ...]:
    return tuple(round(255 * value) for value in (model / 4, clip / 4, frame / 64))


def boxes(picture: Image.Image, value: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Where a colour is, which must fill a rectangle."""
    found = (np.asarray(picture).astype(int) - np.array(value)).__abs__().max(-1) <= 1
    ys, xs = found.nonzero()
    assert found[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].all()
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def test_a_sheet_shows_clip_by_clip_the_models_below_each_other() -> None:
    videos = [numbered(model, 2, 60) for model in range(2)]
    sheet = contact_sheet(videos, ["teacher", "converted"])
    shown = [0, 8, 17, 25, 34, 42, 51, 59]
    places = {
        (model, clip, frame): boxes(sheet, colour(model, clip, frame))
        for model, clip, frame in itertools.product(range(2), range(2), shown)
    }
    assert all((right - left, low - top) == (W * SCALE, H * SCALE) for left, top, right, low in places.values())
    for model, clip in itertools.product(range(2), range(2)):
        row = [places[model, clip, frame] for frame in shown]
        assert len({top for _, top, _, _ in row}) == 1
        assert {right[0] - left[2] for left, right in itertools.pairwise(row)} == {GAP}
    tops = {(clip, model): places[model, clip, 0][1] for model, clip in itertools.product(range(2), range(2))}
    assert [key for key, _ in sorted(tops.items(), key=lambda item: item[1])] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    between = [tops[0, 1] - tops[0, 0], tops[1, 0] - tops[0, 1]]
    assert between[1] > between[0] > H * SCALE  # a clip's models stand closer than clips


def test_short_videos_show_every_frame_once() -> None:
    frames = COLUMNS - 5
    sheet = contact_sheet([numbered(1, 1, frames)], ["seed 3"])
    lefts = [boxes(sheet, colour(1, 0, frame))[0] for frame in range(frames)]
    assert lefts == sorted(set(lefts))


def test_names_of_models_frames_and_what_was_given_are_written() -> None:
    """Where a name changes, and nowhere else, the picture does."""
    videos = [numbered(0, 1, 20), numbered(1, 1, 20)]
    plain = contact_sheet(videos, ["teacher", "abcdefghi"])
    other = contact_sheet(videos, ["teacher", "abcdefghj"])
    left, top, right, low = ImageChops.difference(plain, other).getbbox() or (0, 0, 0, 0)
    second = boxes(plain, colour(1, 0, 0))
    assert 0 < left < right < second[0]
    assert second[1] < (top + low) / 2 < second[3]
    marked = ImageChops.difference(plain, contact_sheet(videos, ["teacher", "abcdefghi"], given=3)).getbbox()
    assert marked is not None
    assert 0 < marked[1] < marked[3] <= boxes(plain, colour(0, 0, 0))[1]  # above the frames
    assert marked[2] < boxes(plain, colour(0, 0, 8))[0]  # frames 0, 3, ... of 20: only the first one is given


def test_a_film_shows_models_beside_each_other_under_their_names(tmp_path: Path) -> None:
    frames = list(side_by_side([numbered(model, 2, 6) for model in range(3)], ["a", "b", "c"]))
    assert len(frames) == 6
    place = {(m, c): boxes(frames[4], colour(m, c, 4)) for m, c in itertools.product(range(3), range(2))}
    assert place[0, 0][2] + GAP == place[1, 0][0]
    assert place[1, 0][2] + GAP == place[2, 0][0]
    assert place[0, 1][1] > place[0, 0][3]
    assert place[2, 1][2] - place[2, 1][0] == W * MOVIE_SCALE
    above = frames[0].crop((0, 0, frames[0].width, place[0, 0][1]))
    assert np.asarray(above).min() < 100  # letters
    assert ImageChops.difference(frames[4].crop((0, place[0, 1][3], *frames[4].size)),
                                 frames[5].crop((0, place[0, 1][3], *frames[5].size))).getbbox()  # fmt: skip
    save_movie(frames, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert (film.size, getattr(film, "n_frames", 1)) == (frames[0].size, 6)


def test_rows_without_names_take_no_room() -> None:
    frame = Image.new("RGB", (20, 10))
    named, bare = (labelled([(name, [frame])], [""]) for name in ("teacher", ""))
    assert bare.width < named.width
    left, _, right, _ = boxes(bare, (0, 0, 0))
    assert left == bare.width - right
