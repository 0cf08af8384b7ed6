"""A folder of recorded windows: the inputs of every layer's self-attention, as a model's own code brought them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mlaconvert.config.parsing import MOST_LAYERS, STRICT, Count, Frames, Size, check_fields, parse
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.calibration.kept import read_exactly, write_tensors
from mlaconvert.errors import CheckpointError, ConfigError, InputError, OutputError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.files.headers import read_header
from mlaconvert.files.inputs import is_file, read_json, reason_of
from mlaconvert.files.store import check_finite
from mlaconvert.files.whole import write_whole

COLLECTED_NAME = "collected.json"
VERSION = 1
WINDOWS = "windows"  # the folder of their tensors
MOST_WINDOWS = 10_000
_ROWS = 64  # of a weight that tell one model from another
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True)
class CollectedWindow:
    """What one pass of one video attended to: `queries` newest frames, and those of the past before them."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    number: Annotated[int, Field(ge=1, le=2**53)]
    """Of the pass, among all that could have been kept; names its files."""
    video: Annotated[int, Field(ge=1)]
    """Of the video, in the order in which they began."""
    grid: tuple[Frames, Size, Size]
    """Frames, height and width in tokens; past and newest together."""
    queries: Frames
    """The newest frames."""
    positions: tuple[Annotated[int, Field(ge=0, le=2**31)], ...]
    """Of every frame in time, for the rotary embedding."""

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.positions) != self.grid[0] or self.queries > self.grid[0]:
            raise ConfigError(f"window {self.number} has {self.grid[0]} frames; give a position for each, and queries")

    @property
    def tokens(self) -> int:
        """Of past and newest chunk."""
        return prod(self.grid)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What `collected.json` says. Raises ConfigError naming the field."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    version: int
    """Of this layout."""
    dim: Size
    num_heads: Size
    num_layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    weights_dtype: Literal["float32", "bfloat16", "float16"]
    """Of the model's weights while it ran, in which `weights` were taken."""
    weights: tuple[Digest, ...]
    """A digest of each layer's self-attention (`digest`)."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of the recorded inputs."""
    streaming: StreamingConfig | None
    """The window that the windows were seen to follow; None of a model that sees whole clips."""
    wanted: Annotated[int, Field(ge=1, le=MOST_WINDOWS)]
    """How many windows were to be kept, a random sample of all."""
    passes: Count
    """How many there were to choose from."""
    left_out: Annotated[int, Field(ge=0)] = 0
    """Chosen ones that were left out: cut short, or not what attention was seen to make."""
    stopped: str = ""
    """What ended the run before its end, such as KeyboardInterrupt; "" where it came there."""
    windows: tuple[CollectedWindow, ...]

    def __post_init__(self) -> None:
        check_fields(self)
        if self.version != VERSION:
            raise ConfigError(f"version is {self.version}; this mlaconvert reads {VERSION}")
        if len(self.weights) != self.num_layers:
            raise ConfigError(f"weights has {len(self.weights)} digests for {self.num_layers} layers")
        numbers = [window.number for window in self.windows]
        if not 0 < len(numbers) <= self.wanted or len(set(numbers)) < len(numbers):
            raise ConfigError(f"windows has {len(numbers)} entries, expected 1 to {self.wanted}, each another")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return data

    def summary(self) -> dict[str, Any]:
        """For the config and the record of a conversion: how much it saw."""
        found = {"inputs": "collected", "windows": len(self.windows), "passes": self.passes}
        if self.streaming is not None:  # passes of whole clips do not tell which video they are of
            found["videos"] = len({window.video for window in self.windows})
        return found | {"streaming": self.to_json()["streaming"]}


def is_collected(folder: Path) -> bool:
    """Whether a folder has a record of collected windows, damaged or not."""
    return is_file(folder / COLLECTED_NAME)


def window_file(folder: Path, number: int, layer: int) -> Path:
    """Where the inputs of one layer in one window lie."""
    return folder / WINDOWS / f"{number:06d}-{layer:03d}.safetensors"


def write_window(folder: Path, number: int, layer: int, x: Tensor) -> None:
    """Keep the inputs x [1, N, D] of one layer. Raises OutputError, and CheckpointError where they are not finite."""
    path = window_file(folder, number, layer)
    check_finite(x, f"the inputs of layer {layer}", path.parent)
    write_tensors(path, {"x": x}, "the recorded inputs")


def write_record(folder: Path, record: Record) -> None:
    """Write `collected.json`, whole or not at all. Raises OSError."""
    write_whole(folder / COLLECTED_NAME, (json.dumps(record.to_json(), indent=2) + "\n").encode())


def read_record(folder: Path) -> Record:
    """Raises CheckpointError for a record that is damaged or of another version."""
    path = folder / COLLECTED_NAME
    try:
        return parse(Record, read_json(path), str(path))
    except ConfigError as error:
        raise CheckpointError(f"{error}; get an intact copy, or collect again") from None


def digest(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """SHA-256 of one layer's self-attention in `dtype`, by the names of `AttentionWeights`: 64 rows of each weight."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        rows = tensor[:: max(1, len(tensor) // _ROWS)] if tensor.ndim > 1 else tensor
        total.update(f"{name} {list(tensor.shape)}".encode())
        total.update(rows.to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


class Collected:
    """The windows in `folder`, whose headers are checked at once. Raises CheckpointError for a damaged folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, read_record(folder)
        self.dtype: torch.dtype = getattr(torch, self.record.dtype)
        # In the order of time, so that the last ones are of the last video.
        self.windows = sorted(self.record.windows, key=lambda window: (window.video, window.number))
        for window in self.windows:
            for layer in range(self.record.num_layers):
                self._check_file(window, layer)

    @property
    def identity(self) -> dict[str, Any]:
        """What its contents follow from, in plain data."""
        return self.record.to_json()

    @property
    def activations(self) -> int:
        """About how many bytes a calibration takes for a while: teacher's outputs, keys and values of newest chunks."""
        newest = sum(window.queries * prod(window.grid[1:]) for window in self.windows)
        return 3 * 4 * self.record.dim * newest

    def read(self, window: CollectedWindow, layer: int) -> Tensor:
        """The inputs x [1, N, D] of one layer in one window. Raises CheckpointError."""
        path = window_file(self.folder, window.number, layer)
        shape = (1, window.tokens, self.record.dim)
        return read_exactly(path, lambda _: {"x": shape}, self.dtype)["x"]

    def split(self) -> tuple[Sequence[CollectedWindow], Sequence[CollectedWindow]]:
        """Windows to fit to, and the last fifth of them to judge by; none of too few."""
        count = len(self.windows) // 5
        return (self.windows[:-count], self.windows[-count:]) if count else (self.windows, ())

    def check(self, checkpoint: Checkpoint, layers: Sequence[int]) -> None:
        """Raise InputError unless the windows are of this model: its geometry, and the weights of those `layers`."""
        config, record = checkpoint.config, self.record
        sizes = ("dim", "num_heads", "num_layers")
        ours, theirs = ([getattr(side, name) for name in sizes] for side in (config, record))
        if ours != theirs:
            raise InputError(
                f"{self.folder} was collected of a model of {_geometry(*theirs)}, and {checkpoint.store.path} has "
                f"{_geometry(*ours)}; collect with this model, or name another folder with --moments"
            )
        dtype = getattr(torch, record.weights_dtype)
        for layer in layers:
            if digest(checkpoint.attention(layer).tensors(), dtype) != record.weights[layer]:
                raise InputError(
                    f"{self.folder} was collected with other weights than {checkpoint.store.path} has (layer {layer}); "
                    "give the checkpoint that ran, with the LoRA that was merged into it, or collect again"
                )

    def _check_file(self, window: CollectedWindow, layer: int) -> None:
        path = window_file(self.folder, window.number, layer)
        infos = [(info.name, info.shape, info.dtype) for info in read_header(path)]
        if infos != [("x", (1, window.tokens, self.record.dim), self.dtype)]:
            raise CheckpointError(f"{path}: not the inputs that {COLLECTED_NAME} tells of; get an intact copy")


def remove_windows(folder: Path, keep: Sequence[CollectedWindow]) -> None:
    """Delete the tensors of all windows but those to `keep`. Raises OutputError."""
    prefixes = tuple(f"{window.number:06d}-" for window in keep)
    try:
        for path in (folder / WINDOWS).iterdir():
            if not path.name.startswith(prefixes):
                path.unlink()
    except OSError as error:
        raise OutputError(f"{folder}: it cannot be tidied up ({reason_of(error)})") from None


def describe_window(streaming: StreamingConfig | None) -> str:
    """How a model sees time, in words."""
    if streaming is None:
        return "whole clips"
    return (
        f"chunks of {streaming.chunk_frames}, a window of {streaming.window_frames} and a sink of "
        f"{streaming.sink_frames} frames, positions {streaming.positions}"
    )


def _geometry(dim: int, heads: int, layers: int) -> str:
    return f"{layers} layers x {dim} wide x {heads} heads"
