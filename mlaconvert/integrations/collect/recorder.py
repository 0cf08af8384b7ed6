"""A random sample of the windows that go by, layer after layer, each proved to be what attention really read.

The past of a chunk is, frame by frame, what was last run at its place: a chunk's clean pass where the codebase makes
one, as it is with what their cache holds. Nothing is guessed from timesteps; from the inputs of past and newest chunk
Wan's attention is computed again, and what it gives must be what theirs gave.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from mlaconvert.config.streaming import Positions, StreamingConfig
from mlaconvert.conversion.collected.record import (
    CollectedWindow,
    Record,
    describe_window,
    remove_windows,
    write_record,
    write_window,
)
from mlaconvert.errors import ConfigError, InputError, OutputError, UnsupportedModelError
from mlaconvert.files.scratch import Scratch
from mlaconvert.integrations.collect.passes import Attention, Pass
from mlaconvert.model.window import frame_positions, seen_frames

_TOLERANCE, _NARROW_TOLERANCE = 2e-3, 0.02  # relative, in float32 on a CPU and for kernels in half precision
_SIDE_BY_SIDE = 8  # videos whose pasts are kept; guidance runs two


@dataclasses.dataclass
class _Video:
    """The past of one video: inputs of each layer's frames, [B, tokens, D] in a file, by their number."""

    number: int
    frames: list[dict[int, Tensor]]
    newest: int = 0  # the end of the last frame that was run


@dataclasses.dataclass
class _Chosen:
    """A window that is being recorded."""

    window: CollectedWindow
    frames: list[int]
    seen: list[int]  # those that are not in the pass itself
    row: int
    kept: bool  # otherwise it is only looked at, as the first of its kind
    replaces: int | None  # its place among the windows, where all are taken
    next_layer: int = 0

    @property
    def kind(self) -> tuple[int, bool]:
        """What windows have in common that one proof is for: their length, and whether frames have left them."""
        return len(self.frames), len(self.frames) < self.frames[-1] + 1


class Recorder:
    """Looks at every call of the `attentions`, and keeps a sample of `record.wanted` windows in `folder`.

    `found` is the record so far; None before the first window. `refused` is set where the window is found not to be the
    model's, so that nothing of it is of use. Raises UnsupportedModelError for attention that
    is not what Wan's would be, OutputError when there is no room, CheckpointError for inputs that are not finite.
    """

    def __init__(self, folder: Path, attentions: list[Attention], start: dict[str, Any], found: Record | None) -> None:
        self.folder, self.attentions, self._start, self.found = folder, attentions, start, found
        self.streaming: StreamingConfig | None = start["streaming"]
        self.passes = found.passes if found is not None else 0
        self.left_out = found.left_out if found is not None else 0
        self.calls, self.refused = 0, False
        self._videos: dict[int, _Video] = {}
        self._video: _Video | None = None  # of the pass that is under way
        self._begun = max((window.video for window in found.windows), default=0) if found is not None else 0
        self._chosen: _Chosen | None = None
        self._scratch = Scratch(folder)
        self._proved: set[tuple[int, bool]] = set()

    def see(self, layer: int, one: Pass, output: Any) -> None:
        """Take in one call of one layer: what it was about, and what it gave."""
        made = output[0] if isinstance(output, (tuple, list)) else output
        tokens = one.grid[0] * one.grid[1] * one.grid[2]
        if one.x.shape[1] < tokens or not isinstance(made, Tensor) or made.shape != one.x.shape:
            raise UnsupportedModelError(
                f"self-attention was given {list(one.x.shape)} tokens for a grid of {list(one.grid)}: the sequence is "
                "divided between processes; collect in one process"
            )
        if layer == 0:
            self.calls += 1
            self._begin(one)
        video, chosen = self._video, self._chosen
        if chosen is not None and chosen.next_layer != layer:
            self._leave_out()
        elif chosen is not None:
            self._record(layer, chosen, one, made[:, :tokens])
        if video is not None:
            self._remember(video, layer, one)

    def _begin(self, one: Pass) -> None:
        """A pass of all layers begins: whose video it is, and whether its window is kept."""
        if self._chosen is not None:
            self._leave_out()
        self._video = None
        frames, end = one.grid[0], one.start + one.grid[0]
        queries = one.queries or frames
        if self.streaming is None and one.cache is not None:
            raise ConfigError(
                "self-attention was called with a cache; say what a chunk sees of it: streaming=StreamingConfig(...)"
            )
        if self.streaming is None or one.cache is None:
            if self.streaming is None or queries < frames:
                self._choose(one, 1, [], list(range(frames)), queries)
            return
        video = self._video = self._video_of(one)
        if video is None:
            return
        newest, video.newest = video.newest, max(video.newest, end)
        if 0 < newest < end and frames > self.streaming.chunk_frames:
            raise ConfigError(
                f"a chunk of {frames} frames was run, and streaming says chunk_frames {self.streaming.chunk_frames}; "
                "give streaming=StreamingConfig(...) as the model is run"
            )
        seen = [frame for frame in seen_frames(end, self.streaming) if frame < one.start]
        known = video.frames[0]
        alike = all(frame in known and known[frame].shape[1] == one.grid[1] * one.grid[2] for frame in seen)
        # Past chunks may be run again, several at once, to write them anew; nothing is made by that.
        if seen and alike and end >= newest and frames <= self.streaming.chunk_frames:
            self._choose(one, video.number, seen, [*seen, *range(one.start, end)], frames)

    def _video_of(self, one: Pass) -> _Video | None:
        """The video that a pass belongs to; None of one whose beginning was not seen."""
        key = id(one.cache)  # of the first layer; each has its own
        video = self._videos.pop(key, None)
        if one.start == 0 and (video is None or video.newest > one.grid[0]):
            self._begun += 1
            video = _Video(self._begun, [{} for _ in self.attentions])
        if video is not None:
            self._videos[key] = video
        while len(self._videos) > _SIDE_BY_SIDE:  # the one that was used longest ago
            del self._videos[next(iter(self._videos))]
        return video

    def _choose(self, one: Pass, video: int, seen: list[int], frames: list[int], queries: int) -> None:
        """Draw whether this window is kept: each is as likely as any other, however many there will be."""
        self.passes += 1
        kept = len(self.found.windows) if self.found is not None else 0
        draw = random.Random(f"window {self.passes}")
        place = draw.randrange(self.passes) if kept >= self._start["wanted"] else None
        drawn = place is None or place < kept
        window = CollectedWindow(
            number=self.passes,
            video=video,
            grid=(len(frames), *one.grid[1:]),
            queries=queries,
            positions=tuple(self._positions(frames, None)),
        )
        chosen = _Chosen(window, frames, seen, draw.randrange(len(one.x)), drawn, place)
        if drawn:
            self._check_room(window, one.x)
        if drawn or chosen.kind not in self._proved:
            self._chosen = chosen

    def _positions(self, frames: list[int], positions: Positions | None) -> list[int]:
        if self.streaming is None:
            return frames
        streaming = dataclasses.replace(self.streaming, positions=positions or self.streaming.positions)
        return frame_positions(frames, frames[-1] + 1, streaming)

    def _record(self, layer: int, chosen: _Chosen, one: Pass, made: Tensor) -> None:
        """Keep one layer's inputs of the chosen window, if attention gave what it gives for them."""
        window, row = chosen.window, slice(chosen.row, chosen.row + 1)
        own = one.x[row, : one.grid[0] * one.grid[1] * one.grid[2]]
        known = self._video.frames[layer] if self._video is not None else {}
        if not all(frame in known for frame in chosen.seen):  # a layer that was skipped
            self._leave_out()
            return
        past = [known[frame][row].to(own) for frame in chosen.seen]
        x = torch.cat((*past, own), 1)
        attention, newest = self.attentions[layer], window.queries * window.grid[1] * window.grid[2]
        expected = made[row, -newest:].float()
        off = self._off(attention.output(x, window.grid, window.positions, window.queries), expected)
        if not off < _tolerance(x, attention):
            if chosen.kind not in self._proved:
                raise UnsupportedModelError(self._unlike(layer, chosen, x, expected, off))
            self._leave_out()
            return
        if chosen.kept:
            write_window(self.folder, window.number, layer, x.to("cpu", self._dtype(x)))
        chosen.next_layer += 1
        if chosen.next_layer == len(self.attentions):
            self._chosen = None
            self._proved.add(chosen.kind)
            if chosen.kept:
                self._keep(chosen, self._dtype(x))

    @staticmethod
    def _off(found: Tensor, expected: Tensor) -> float:
        return float((found.float() - expected).norm() / expected.norm().clamp_min(1e-30))

    def _unlike(self, layer: int, chosen: _Chosen, x: Tensor, expected: Tensor, off: float) -> str:
        """What to say of attention that gives something else than Wan's for the window that was to be recorded."""
        window, streaming = chosen.window, self.streaming
        where = f"{type(self.attentions[layer].module).__name__} of layer {layer}"
        if streaming is not None and chosen.seen:
            for other in get_args(Positions):
                moved = tuple(self._positions(chosen.frames, other))
                found = self.attentions[layer].output(x, window.grid, moved, window.queries)
                if self._off(found, expected) < min(off / 2, _NARROW_TOLERANCE):
                    return (
                        f"{where} counts frames by positions {other!r}; give "
                        f"streaming=StreamingConfig(..., positions={other!r})"
                    )
            seen = f"a chunk of {window.queries} frames that sees {len(chosen.seen)} past ones "
            seen += f"({describe_window(streaming)})"
        else:
            seen = f"a clip of {window.grid[0]} frames at once"
        return (
            f"{where} does not give what Wan's attention gives for {seen}: off by {off:.2g}. Give the window that it "
            "has with streaming=StreamingConfig(...); a mask, mixed frames or kernels in 8 bits cannot be collected"
        )

    def _dtype(self, x: Tensor) -> torch.dtype:
        """Of what is kept: what the projections read."""
        if self.found is not None:
            kept: torch.dtype = getattr(torch, self.found.dtype)
            return kept
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    def _keep(self, chosen: _Chosen, dtype: torch.dtype) -> None:
        """All layers of the window are written: now it counts."""
        windows = list(self.found.windows) if self.found is not None else []
        if chosen.replaces is None:
            windows.append(chosen.window)
        else:
            windows[chosen.replaces] = chosen.window
        self.save(windows, dtype)
        if chosen.replaces is not None:
            remove_windows(self.folder, windows)

    def save(self, windows: list[CollectedWindow], dtype: torch.dtype, stopped: str = "") -> None:
        """Write the record. Raises OutputError."""
        self.found = Record(
            **self._start,
            dtype=cast(Any, str(dtype).removeprefix("torch.")),
            passes=self.passes,
            left_out=self.left_out,
            stopped=stopped,
            windows=tuple(windows),
        )
        try:
            write_record(self.folder, self.found)
        except OSError as error:
            raise OutputError(f"{self.folder}: the record cannot be written ({error.strerror or error})") from None

    def end(self, stopped: str = "") -> Record:
        """Bring the record up to date, and leave only its windows. Raises InputError when there are none."""
        if self._chosen is not None:
            self._leave_out()
        if self.found is None:
            why = "self-attention was never called"
            if self.calls:
                why = f"of {self.calls} passes none was a chunk with a past that was seen from the video's beginning"
            raise InputError(f"nothing was collected: {why}; run at least two chunks of a video within collect(...)")
        return self.pause(stopped)

    def pause(self, stopped: str = "") -> Record:
        """Bring the record of what there is up to date, and leave only its windows. Raises OutputError."""
        assert self.found is not None
        self.save(list(self.found.windows), getattr(torch, self.found.dtype), stopped)
        remove_windows(self.folder, self.found.windows)
        return self.found

    def _leave_out(self) -> None:
        self.left_out += self._chosen is not None and self._chosen.kept
        self._chosen = None

    def _remember(self, video: _Video, layer: int, one: Pass) -> None:
        """Keep a chunk's inputs, in place of those of an earlier pass of it, and forget what no chunk will see."""
        assert self.streaming is not None
        frames, size = video.frames[layer], one.grid[1] * one.grid[2]
        for i in range(one.grid[0]):
            part, known = one.x[:, i * size : (i + 1) * size], frames.get(one.start + i)
            if known is not None and known.shape == part.shape and known.dtype == part.dtype:
                known.copy_(part)
            else:
                frames[one.start + i] = self._scratch.keep(part.detach().cpu())
        for frame in frames.keys() - seen_frames(video.newest, self.streaming):
            del frames[frame]

    def _check_room(self, window: CollectedWindow, x: Tensor) -> None:
        """Raise OutputError when the windows that are still to come have no room."""
        kept = len(self.found.windows) if self.found is not None else 0
        missing = max(1, self._start["wanted"] - kept)
        needed = missing * window.tokens * x.shape[2] * self._dtype(x).itemsize * len(self.attentions)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OutputError(
                f"{self.folder}: {missing} windows take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make "
                "room, collect fewer windows, or write to another disk"
            )


def _tolerance(x: Tensor, attention: Attention) -> float:
    exact = x.dtype == attention.dtype == torch.float32 and x.device.type == "cpu"
    return _TOLERANCE if exact and not torch.is_autocast_enabled("cpu") else _NARROW_TOLERANCE
