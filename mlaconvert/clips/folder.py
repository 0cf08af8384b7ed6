"""Clips for calibrating, healing and evaluating: one layout for all.

A folder of safetensors shards, each with `latents` [N, C, F, H, W] and `context` [N, T, text_dim] (text embeddings);
every shard of a folder has the same shapes but for N. `null_context.safetensors` may hold the `context` [1, T,
text_dim] of an empty prompt, which guidance needs; it is no shard.
"""

from __future__ import annotations

import hashlib
from bisect import bisect, bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.errors import InputError, OutputError
from mlaconvert.files.headers import read_header
from mlaconvert.files.inputs import reason_of
from mlaconvert.files.names import is_hidden
from mlaconvert.files.store import check_floats, read_tensors
from mlaconvert.files.whole import write_whole

NULL_CONTEXT = "null_context.safetensors"
BATCH, BATCH_TOKENS = 8, 2**14  # clips that go through a model at once, and their tokens, but for long clips
_NAMED = 20  # clips of a shard that a message names
_MOST_VALUES = 1 << 27  # of one clip: five minutes of 480 x 832 pixels
BadShards = Literal["refuse", "skip"]


class Clips(NamedTuple):
    """Video latents [N, C, F, H, W] and their text embeddings [N, T, text_dim]."""

    latents: Tensor
    context: Tensor

    def batches(self, size: int) -> Iterator[Clips]:
        """In order, `size` clips at a time."""
        for latents, context in zip(self.latents.split(size), self.context.split(size), strict=True):
            yield Clips(latents, context)


def load_clips(folder: Path, config: WanConfig, limit: int) -> Clips:
    """The first `limit` clips of a folder, in the order of its file names.

    Raises InputError when there are none, or naming the shard that cannot be read or does not fit the model.
    """
    parts: list[Clips] = []
    for shard in clip_files(folder):
        missing = limit - sum(len(part.latents) for part in parts)
        if missing <= 0:
            break
        parts.append(load_shard(shard, config, missing))
        _check_alike(shard, [part[0].shape for part in parts[-1]], [part[0].shape for part in parts[0]])
    return Clips(torch.cat([p.latents for p in parts]), torch.cat([p.context for p in parts]))


def load_shard(path: Path, config: WanConfig, limit: int | None = None) -> Clips:
    """The first `limit` clips of one file. Raises InputError when it is no shard that fits the model."""
    _check_shard(path, config)
    return _read(path, slice(0, limit))


class ClipFolder:
    """Any clip of a folder by its number, from 0 on, read when it is asked for. Headers are checked at once.

    `bad` says what becomes of a shard that cannot be read or does not fit the model, and of a clip with values that are
    not finite. "refuse" raises InputError naming it; values are checked when a clip is read. "skip" leaves it out, so
    that no number leads to it: values are read once here, and `on_bad` is told what is left out, a line a shard.

    `total` counts all clips of the shards that can be used, `unusable` the shards that cannot. `fingerprint` tells
    folders apart by the clips that they give: behind a dash, by which of them are left out.
    """

    def __init__(
        self,
        folder: Path,
        config: WanConfig,
        *,
        bad: BadShards = "refuse",
        on_bad: Callable[[str], None] | None = None,
    ) -> None:
        self.folder, self._bad, self._on_bad = folder, bad, on_bad
        self.shards: list[Path] = []
        counts: list[int] = []
        first: list[Sequence[int]] = []
        files = clip_files(folder)
        for shard in files:
            try:
                count, shapes = _check_shard(shard, config)
                first = first or shapes
                _check_alike(shard, shapes, first)
            except InputError as error:
                self._complain(error)
                continue
            self.shards.append(shard)
            counts.append(count)
        if not counts:
            raise InputError(f"{folder}: no shard is left that can be used; mend them")
        self._ends = list(accumulate(counts))
        self.total, self.unusable = self._ends[-1], len(files) - len(counts)
        self.clip_shape = tuple(first[0])  # [C, F, H, W]
        text = " ".join(f"{shard.name}:{count}" for shard, count in zip(self.shards, counts, strict=True))
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        # The place of each clip among those of all shards.
        self._places: Sequence[int] = range(self.total) if bad == "refuse" else self._usable()
        if not self._places:
            raise InputError(f"{folder}: no clip is left that can be used; mend the shards")
        if len(self._places) < self.total:
            self.fingerprint += f"-{hashlib.sha256(str(self._places).encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Clips:
        """Clip `number` as latents [1, C, F, H, W] and context [1, T, text_dim], float32.

        Raises IndexError beyond the last one, and InputError when it cannot be read.
        """
        place = self._places[number]
        at = bisect(self._ends, place)
        row = place - (self._ends[at - 1] if at else 0)
        return _read(self.shards[at], slice(row, row + 1))

    def split(self, held: int) -> tuple[range, range]:
        """The numbers of all clips but the folder's last `held` ones, and of those.

        What is left out counts too, so the border is the same whichever clips are bad.
        """
        border = bisect_left(self._places, self.total - held)
        return range(border), range(border, len(self))

    def some(self, numbers: Sequence[int]) -> Clips:
        """Several clips as one batch."""
        clips = [self[number] for number in numbers]
        return Clips(torch.cat([clip.latents for clip in clips]), torch.cat([clip.context for clip in clips]))

    def _complain(self, error: InputError, which: str = "") -> None:
        """Raise `error`, or go on without that shard, or without those of its clips."""
        if self._bad == "refuse":
            raise error
        if self._on_bad is not None:
            self._on_bad(f"skipped: {error}{which}")

    def _usable(self) -> list[int]:
        """The places of the clips that can be read and are finite."""
        places: list[int] = []
        for shard, start, end in zip(self.shards, (0, *self._ends), self._ends, strict=False):
            bad: dict[int, InputError] = {}
            for row in range(end - start):
                try:
                    _read(shard, slice(row, row + 1))
                    places.append(start + row)
                except InputError as error:
                    bad[row] = error
            if bad:
                named = [str(row) for row in bad][:_NAMED] + (["..."] if len(bad) > _NAMED else [])
                which = f" ({len(bad)} of its {end - start} clips: {', '.join(named)}, counted from 0)"
                self._complain(next(iter(bad.values())), which)
        return places


def load_null_context(folder: Path, config: WanConfig) -> Tensor | None:
    """The embedding of an empty prompt [1, T, text_dim], None when the folder has none. Raises InputError."""
    path = folder / NULL_CONTEXT
    if not path.exists() and not path.is_symlink():
        return None
    context = read_tensors(path, ("context",))["context"]
    if context.ndim != 3 or len(context) != 1 or not _fits(context.shape, config):
        raise InputError(
            f"{path}: context is {list(context.shape)}; expected [1, 1 to {config.text_len}, {config.text_dim}]"
        )
    return context


def _fits(context: Sequence[int], config: WanConfig) -> bool:
    """Whether text embeddings [N, T, text_dim] are of the model's size."""
    return 0 < context[1] <= config.text_len and context[2] == config.text_dim


def save_shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that appears whole or not at all. Raises OutputError."""
    try:
        # save_file would make it readable for its owner only.
        write_whole(path, save({name: t.contiguous() for name, t in tensors.items()}, dict(metadata or {})))
    except OSError as error:
        raise OutputError(f"{path}: writing failed ({reason_of(error)}); make room, or check the folder") from None


def _is_shard(path: Path) -> bool:
    return path.name != NULL_CONTEXT and not is_hidden(path.name)


def clip_files(folder: Path) -> list[Path]:
    """The shards of a folder by name, not opened yet. Raises InputError when there are none."""
    try:
        shards = sorted(path for path in folder.glob("*.safetensors") if _is_shard(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: it cannot be listed ({reason_of(error)}); give a folder of clips") from None
    if not shards:
        raise InputError(f"{folder} has no *.safetensors shards; expected latents [N, C, F, H, W] and context in each")
    return shards


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError, RuntimeError) as error:  # the last for a file that cannot be mapped
        raise InputError(f"{path}: not a readable safetensors file ({reason_of(error)}); make it again") from None


def _check_shard(shard: Path, config: WanConfig) -> tuple[int, list[Sequence[int]]]:
    """Number of clips, and of one the shapes [C, F, H, W] and [T, text_dim], from the header."""
    infos = {info.name: info for info in read_header(shard)}
    missing = {"latents", "context"} - infos.keys()
    if missing:
        raise InputError(f"{shard}: no tensor {min(missing)!r}; expected latents and context")
    for name in ("latents", "context"):
        check_floats(infos[name], shard)
    latents, context = infos["latents"].shape, infos["context"].shape
    if len(latents) != 5 or latents[1] != config.out_dim or min(latents) < 1:
        raise InputError(f"{shard}: latents are {list(latents)}; expected [N, {config.out_dim}, F, H, W]")
    if any(size % patch for size, patch in zip(latents[2:], config.patch_size, strict=True)):
        raise InputError(
            f"{shard}: latents are {list(latents)}; patches of {list(config.patch_size)} do not divide F, H, W"
        )
    if prod(latents[1:]) > _MOST_VALUES:
        raise InputError(f"{shard}: a clip has {prod(latents[1:]):,} values; cut it to at most {_MOST_VALUES:,}")
    if len(context) != 3 or context[0] != latents[0] or not _fits(context, config):
        raise InputError(
            f"{shard}: context is {list(context)}; expected [{latents[0]}, 1 to {config.text_len}, {config.text_dim}]"
        )
    return latents[0], [latents[1:], context[1:]]


def _read(shard: Path, rows: slice) -> Clips:
    with _opened(shard) as file:
        try:
            latents, context = (file.get_slice(name)[rows].float() for name in ("latents", "context"))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise InputError(f"{shard}: cannot be read ({reason_of(error)}); make it again") from None
    if not (latents.isfinite().all() and context.isfinite().all()):
        raise InputError(f"{shard}: has values that are not finite; mend or remove this shard")
    return Clips(latents, context)


def _check_alike(shard: Path, shapes: Sequence[Sequence[int]], first: Sequence[Sequence[int]]) -> None:
    """Raise InputError when a clip is not of the first shard's shape, or its text embedding is not."""
    for name, found, expected in zip(("latents", "context"), shapes, first, strict=True):
        if list(found) != list(expected):
            raise InputError(
                f"{shard}: {name} are {list(found)} a clip, {list(expected)} in the first shard; "
                "give clips of one shape"
            )
