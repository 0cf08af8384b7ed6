"""Videos as pictures: contact sheets, GIF and MP4. Pixels are RGB in [-1, 1]."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

from PIL import Image
from torch import Tensor

from mlaconvert.errors import InputError

SCALE = 4  # screen pixels per pixel of the tiny videos
FPS = 16


def can_write_mp4() -> bool:
    """Whether the optional MP4 encoder (the extra `video`) is installed."""
    return importlib.util.find_spec("imageio_ffmpeg") is not None


def to_image(pixels: Tensor, scale: int = SCALE) -> Image.Image:
    """[3, H, W] in [-1, 1] as a picture, enlarged without smoothing."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
    picture = Image.fromarray(values.numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save_movie(
    frames: Iterable[Tensor] | Iterable[Image.Image],
    path: Path,
    *,
    fps: int = FPS,
    scale: int = SCALE,
    comment: str = "",
) -> None:
    """Write frames [3, H, W], enlarged by `scale`, or pictures as a GIF or MP4, by the path's ending.

    The file appears whole or not at all.

    An MP4 is written frame by frame, with a `comment` that players can show; a GIF lies in memory and has none.

    GIF counts hundredths of a second, so its rate is the nearest that this allows. Raises InputError for another
    ending, and for MP4 without its encoder.
    """
    if path.suffix not in (".gif", ".mp4"):
        raise InputError(f"{path}: a movie ends in .gif or .mp4")
    staged = path.with_name(f".{os.getpid()}.partial{path.suffix}")
    images = (frame if isinstance(frame, Image.Image) else to_image(frame, scale) for frame in frames)
    try:
        if path.suffix == ".gif":
            _save_gif(images, staged, fps)
        else:
            _save_mp4(images, staged, fps, comment)
        staged.replace(path)
    finally:
        with suppress(FileNotFoundError):
            staged.unlink()


def remove_unfinished(folder: Path) -> None:
    """Delete the movies that killed runs left half written in a folder that nobody else writes to. Raises OSError."""
    for path in folder.glob(".*.partial.*"):
        if re.fullmatch(r"\.\d+\.partial\.(gif|mp4)", path.name):
            path.unlink()


def _save_gif(images: Iterator[Image.Image], path: Path, fps: int) -> None:
    first = next(images)
    first.save(path, save_all=True, append_images=images, duration=round(100 / fps) * 10, loop=0)


def _save_mp4(images: Iterator[Image.Image], path: Path, fps: int, comment: str) -> None:
    if not can_write_mp4():
        raise InputError("MP4 needs an encoder: pip install 'mlaconvert[video]', or write a GIF")
    import imageio_ffmpeg

    first = next(images)
    # H.264 halves the resolution of colours, so sides must be even; tiny videos are enlarged by an even number.
    writer = imageio_ffmpeg.write_frames(
        str(path),
        first.size,
        fps=fps,
        codec="libx264",
        quality=8,
        macro_block_size=2,
        ffmpeg_log_level="error",
        output_params=["-metadata", f"comment={comment}"] if comment else [],
    )
    writer.send(None)
    try:
        for image in chain((first,), images):
            writer.send(image.tobytes())
    finally:
        writer.close()
