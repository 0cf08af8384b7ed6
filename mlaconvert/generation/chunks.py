"""Finished chunks of a video that is being made, so that an interrupted run goes on from them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.errors import InputError, OutputError
from mlaconvert.files.inputs import is_file, read_json
from mlaconvert.files.staging import Staging, disk_errors
from mlaconvert.files.whole import write_whole
from mlaconvert.generation.marks import raw_bytes
from mlaconvert.generation.plan import GenerationPlan
from mlaconvert.generation.request import KEPT, LATENTS_NAME, MOVIES, REPORT_NAME

_NOTE = "progress.json"


class OtherVideoError(OutputError):
    """What an interrupted run left is of a video with other settings."""


class ChunkFile:
    """A safetensors file that is laid out at once and filled chunk by chunk, with a note of how far it is.

    Both lie in a staging folder that outlives an interrupted run. As a context manager, it leaves that folder as the
    next run wants it.
    """

    def __init__(self, staging: Staging, shape: tuple[int, ...], offset: int, settings: dict[str, Any], done: int):
        self._staging, self._settings, self.done = staging, settings, done
        self._map = np.memmap(staging.content / LATENTS_NAME, dtype="<f4", mode="r+", offset=offset, shape=shape)
        self.latents = torch.from_numpy(self._map)

    @classmethod
    def open(cls, staging: Staging, plan: GenerationPlan, config: WanConfig, settings: dict[str, Any]) -> ChunkFile:
        """Take up what an interrupted run with the same settings left, or begin.

        Raises OutputError for one with other settings, unless the staging may overwrite; then it goes.
        """
        shape = (len(plan.seeds), config.out_dim, plan.frames, *plan.size)
        context = plan.schedule[0][1] if len(plan.schedule) == 1 else None
        header = file_header(shape, None if context is None else tuple(context.shape))
        settings, needed = json.loads(json.dumps(settings)), 4 * math.prod(shape)
        try:
            done = _frames_left(staging, header, shape, settings)
        except OutputError:
            if not staging.overwrite:
                raise
            done = None
        check_staging(staging, needed if done is None else 0)
        with disk_errors(staging.path):
            staging.open()
            try:
                if done is not None:
                    _move_earlier(staging, {"frames": done, "settings": settings})
                    return cls(staging, shape, len(header), settings, done)
                staging.clear()
                staging.content.mkdir()
                with (staging.content / LATENTS_NAME).open("wb") as file:
                    file.write(header)
                    file.seek(needed, os.SEEK_CUR)
                    file.write(b"" if context is None else raw_bytes(context))
                    file.truncate(max(file.tell(), len(header) + needed))
                chunk_file = cls(staging, shape, len(header), settings, 0)
                chunk_file._write_note()
                return chunk_file
            except BaseException:
                staging.close() if done else staging.remove()
                raise

    def write(self, start: int, chunk: Tensor) -> None:
        """Put a chunk [N, C, f, H, W] at frame `start` and note it once it is on the disk."""
        with disk_errors(self._staging.path, KEPT):
            self.latents[:, :, start : start + chunk.shape[2]] = chunk.float().cpu()
            self._map.flush()
            self.done = start + chunk.shape[2]
            self._write_note()

    def _write_note(self) -> None:
        write_json(self._staging.folder / _NOTE, {"frames": self.done, "settings": self._settings})

    def __enter__(self) -> ChunkFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.done:
            self._staging.close()
        else:  # nothing to take up
            self._staging.remove()


def _frames_left(staging: Staging, header: bytes, shape: Sequence[int], settings: dict[str, Any]) -> int | None:
    """How many frames of this video an interrupted run left, None when there is nothing to go on from.

    Raises OtherVideoError for frames of another video, OutputError for damaged ones.
    """
    left = staging.left()
    note = _read_note(staging.folder / _NOTE) if _NOTE in left else None
    if not left - {_NOTE} or (_NOTE not in left and staging.content.is_dir()):
        return None  # killed before it began, or when all was in place
    if _NOTE not in left:  # earlier versions took the note away before they put a finished video in place
        report = _read_note(staging.folder / REPORT_NAME)
        note = None if report is None else {"frames": shape[2], "settings": report["settings"]}
    if note is None or note["settings"] != settings:
        raise OtherVideoError(
            f"{staging.folder} is an unfinished video with other settings; delete it, repeat its settings, "
            "or pass --overwrite"
        )
    places = [folder / LATENTS_NAME for folder in (staging.folder, staging.content)]
    path, frames = next((path for path in places if is_file(path)), None), note["frames"]
    if path is None or path.stat().st_size < len(header) + 4 * math.prod(shape):
        frames = None
    elif path is not None:
        with path.open("rb") as file:
            frames = frames if file.read(len(header)) == header else None
    if type(frames) is not int or not 0 <= frames <= shape[2]:
        raise OutputError(f"{staging.folder} is a damaged unfinished video; delete it, or pass --overwrite")
    return frames


def _move_earlier(staging: Staging, note: Mapping[str, Any]) -> None:
    """Move what earlier versions kept beside the note to where it belongs now, the latents last. Raises OSError."""
    left = sorted(staging.left() - {_NOTE, staging.content.name}, key=lambda name: name == LATENTS_NAME)
    if left:
        write_json(staging.folder / _NOTE, note)
        staging.content.mkdir(exist_ok=True)
        for name in left:
            (staging.folder / name).replace(staging.content / name)


def file_header(latents: tuple[int, ...], context: tuple[int, ...] | None) -> bytes:
    """Header of a safetensors file with `latents` and perhaps `context`, both float32."""
    entries, end = {}, 0
    for name, shape in (("latents", latents), ("context", context)):
        if shape is not None:
            begin, end = end, end + 4 * math.prod(shape)
            entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_note(path: Path) -> dict[str, Any] | None:
    try:
        note = read_json(path)
    except InputError:
        return None
    return note if {"frames", "settings"} <= note.keys() else None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Replace a JSON file at once. Raises OSError."""
    write_whole(path, (json.dumps(data, indent=2) + "\n").encode())


def check_staging(staging: Staging, needed: int) -> None:
    """Raise OutputError when the output cannot be written, or has no room for `needed` bytes."""
    if staging.path.suffix in MOVIES:
        if staging.target.is_dir():
            raise OutputError(f"{staging.path} exists and is a folder; choose another path for a movie")
        staging.check(needed, kind="video", replaceable=Path.is_file)
    else:
        staging.check(needed, kind="video", replaceable=_is_video)


def _is_video(folder: Path) -> bool:
    """Whether a folder may be overwritten as a generated video."""
    return (folder / REPORT_NAME).is_file()
