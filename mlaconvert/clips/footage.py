"""Video files as frames, by ffmpeg: resampled in time, scaled and cropped, one frame at a time."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mlaconvert.errors import InputError

ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".gif")
_DURATION = re.compile(r"Duration: (\d+):(\d\d):(\d\d\.\d+)")
_TROUBLE = re.compile(r"^(?:\[[^]]*\] )?\[(?:error|fatal|panic)\] (.*)$", re.MULTILINE)


class Footage:
    """The frames of a video at `fps` frames a second, scaled to cover `height` x `width` pixels and cropped centrally.

    Iterating yields uint8 frames [height, width, 3] and may be done once; leaving the context ends ffmpeg.
    `num_frames` is an estimate from the file's header once a frame was read, None before or without one. Raises
    InputError naming the file when it cannot be decoded to its end.
    """

    def __init__(self, path: Path, *, height: int, width: int, fps: float) -> None:
        self.path, self.size, self.fps = path, (height, width), fps
        self.num_frames: int | None = None

    def __enter__(self) -> Footage:
        import imageio_ffmpeg

        # Anamorphic pixels are squared first. A file may not lead to others: a playlist could name any address.
        cover = f"scale={self.size[1]}:{self.size[0]}:force_original_aspect_ratio=increase:flags=bicubic"
        filters = f"fps={self.fps},scale=iw*sar:ih,setsar=1,{cover},crop={self.size[1]}:{self.size[0]}"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-nostats", "-hide_banner", "-loglevel", "level+info"]
        command += ["-xerror", "-protocol_whitelist", "file", "-i", f"file:{self.path}", "-map", "0:v:0"]
        command += ["-vf", filters, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        self._folder = tempfile.TemporaryDirectory()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process.wait()
        self._folder.cleanup()

    def __iter__(self) -> Iterator[Tensor]:
        height, width = self.size
        stream = self._process.stdout
        assert stream is not None
        while len(raw := stream.read(3 * height * width)) == 3 * height * width:
            if self.num_frames is None:
                self.num_frames = self._estimate()
            yield torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(height, width, 3)
        code = self._process.wait()
        if code or self.num_frames is None:
            said = _TROUBLE.search(self._text())
            reason = said[1].strip()[:200] if said else f"ffmpeg's status {code}" if code else "it holds no frames"
            raise InputError(f"{self.path}: cannot be decoded as video ({reason})")

    def _estimate(self) -> int:
        duration = _DURATION.search(self._text())
        if duration is None:
            return 0
        hours, minutes, seconds = duration.groups()
        return round((3600 * int(hours) + 60 * int(minutes) + float(seconds)) * self.fps)

    @property
    def _log(self) -> Path:
        """What ffmpeg says; a file, since a pipe that nobody reads would stop it."""
        return Path(self._folder.name) / "log"

    def _text(self) -> str:
        return self._log.read_text(errors="replace")


def to_pixels(frame: Tensor) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W] in [-1, 1]."""
    return frame.permute(2, 0, 1).float() / 127.5 - 1
