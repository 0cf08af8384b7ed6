"""Videos and captions to clips: real files in, shards out that the other commands read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from encode_cases import decoded, movie, scramble

from mlaconvert.clips.footage import Footage
from mlaconvert.errors import InputError
from mlaconvert.generation.movies import save_movie


def test_frames_are_resampled_covered_and_cropped(tmp_path: Path) -> None:
    """Red rises over time; a green middle between blue sides, which a square crop cuts off."""
    frames = torch.full((20, 3, 24, 72), -1.0)
    frames[:, 0] = (torch.arange(20) / 10 - 1)[:, None, None]
    frames[:, 2, :, :20] = frames[:, 2, :, 52:] = 1
    frames[:, 1, :, 24:48] = 1
    save_movie(frames, tmp_path / "a.mp4", fps=20, scale=1)
    found = decoded(tmp_path / "a.mp4", 48, 48, fps=10)
    assert len(found) == 10
    for i, frame in enumerate(found):
        assert frame.shape == (3, 48, 48)
        assert abs(float(frame[0].mean()) - (0.2 * i - 1)) < 0.12
        assert float(frame[1, :, 8:40].mean()) > 0.8
        assert float(frame[2].mean()) < -0.8
    whole = decoded(tmp_path / "a.mp4", 24, 72, fps=20)
    assert float((torch.stack(whole) - frames).abs().mean()) < 0.1


def test_a_video_may_be_left_early(tmp_path: Path) -> None:
    movie(tmp_path / "a.mp4", 40)
    with Footage(tmp_path / "a.mp4", height=32, width=48, fps=16) as footage:
        assert next(iter(footage)).shape == (32, 48, 3)
        assert footage.num_frames == 40
    assert footage._process.returncode != 0


BAD = {
    "text": lambda path: path.write_text("no video"),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "scrambled": lambda path: scramble(path, 0, 0.9),
    "scrambled later": lambda path: scramble(path, 0.7, 0.9),
    "playlist": lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.mp4\n"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_video_is_named(tmp_path: Path, kind: str) -> None:
    path = movie(tmp_path / "a.mp4", 20)
    BAD[kind](path)
    with pytest.raises(InputError, match=r"a\.mp4: cannot be decoded as video \(.+\)"):
        decoded(path)
