"""Clips for calibrating, healing and evaluating: one layout for all.

A folder of safetensors shards, each with `latents` [N, C, F, H, W] and `context` [N, T, text_dim] (text embeddings);
every shard of a folder has the same shapes but for N. `null_context.safetensors` may hold the `context` [1, T,
text_dim] of an empty prompt, which guidance needs; it is no shard.
"""

from __future__ import annotations

import hashlib
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlaconvert.config import WanConfig
from mlaconvert.errors import InputError

NULL_CONTEXT = "null_context.safetensors"
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
    for shard in _shards(folder):
        wanted = limit - sum(len(part.latents) for part in parts)
        if wanted <= 0:
            break
        _check_shard(shard, config)
        parts.append(_read(shard, slice(0, wanted)))
        if parts[-1].latents.shape[1:] != parts[0].latents.shape[1:]:
            raise _other_shape(shard, parts[-1].latents.shape[1:], parts[0].latents.shape[1:])
    return Clips(torch.cat([p.latents for p in parts]), torch.cat([p.context for p in parts]))


class ClipFolder:
    """Any clip of a folder by its number, read when it is asked for. Headers are checked at once, values when read.

    `bad` says what becomes of a shard that cannot be read, does not fit the model or has values that are not finite:
    "refuse" raises InputError naming it, "skip" goes on without it and tells `on_bad` its message, once a shard. A
    clip with such values is replaced by the next good one, so the same number always gives the same clip.
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
        self._complained: set[Path] = set()
        self.shards: list[Path] = []
        counts: list[int] = []
        self.clip_shape: tuple[int, ...] = ()  # [C, F, H, W]
        for shard in _shards(folder):
            try:
                count, shape = _check_shard(shard, config)
                self.clip_shape = self.clip_shape or shape
                if shape != self.clip_shape:
                    raise _other_shape(shard, shape, self.clip_shape)
            except InputError as error:
                self._complain(shard, error)
                continue
            self.shards.append(shard)
            counts.append(count)
        self._ends = list(accumulate(counts))
        if not self._ends:
            raise InputError(f"{folder}: no shard is left that can be used; mend them")
        text = " ".join(f"{shard.name}:{count}" for shard, count in zip(self.shards, counts, strict=True))
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> Clips:
        """Clip `number` as latents [1, C, F, H, W] and context [1, T, text_dim], float32."""
        for at in range(number, number + len(self)):
            place = bisect(self._ends, at % len(self))
            row = at % len(self) - (self._ends[place - 1] if place else 0)
            try:
                return _read(self.shards[place], slice(row, row + 1))
            except InputError as error:
                self._complain(self.shards[place], error)
        raise InputError(f"{self.folder}: no clip is left that can be used; mend the shards")

    def some(self, numbers: Sequence[int]) -> Clips:
        """Several clips as one batch."""
        found = [self[number] for number in numbers]
        return Clips(torch.cat([clip.latents for clip in found]), torch.cat([clip.context for clip in found]))

    def _complain(self, shard: Path, error: InputError) -> None:
        if self._bad == "refuse":
            raise error
        if shard not in self._complained and self._on_bad is not None:
            self._on_bad(f"skipped: {error}")
        self._complained.add(shard)


def load_null_context(folder: Path, config: WanConfig) -> Tensor | None:
    """The embedding of an empty prompt [1, T, text_dim], None when the folder has none. Raises InputError."""
    path = folder / NULL_CONTEXT
    if not path.is_file():
        return None
    with _opened(path) as file:
        if "context" not in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            raise InputError(f"{path}: no tensor 'context'; expected the [1, T, {config.text_dim}] of an empty prompt")
        context: Tensor = file.get_tensor("context").float()
    if context.ndim != 3 or len(context) != 1 or context.shape[2] != config.text_dim or not context.isfinite().all():
        raise InputError(f"{path}: context is {list(context.shape)}; expected [1, T, {config.text_dim}], finite")
    return context


def _shards(folder: Path) -> list[Path]:
    shards = sorted(path for path in folder.glob("*.safetensors") if path.name != NULL_CONTEXT)
    if not shards:
        raise InputError(f"{folder} has no *.safetensors shards; expected latents [N, C, F, H, W] and context in each")
    return shards


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None


def _check_shard(shard: Path, config: WanConfig) -> tuple[int, tuple[int, ...]]:
    """Number of clips and shape [C, F, H, W] of one, from the header."""
    with _opened(shard) as file:
        missing = {"latents", "context"} - set(file.keys())
        if missing:
            raise InputError(f"{shard}: no tensor {min(missing)!r}; expected latents and context")
        latents, context = (list(file.get_slice(name).get_shape()) for name in ("latents", "context"))
    if len(latents) != 5 or latents[1] != config.out_dim or latents[0] < 1:
        raise InputError(f"{shard}: latents are {latents}; expected [N, {config.out_dim}, F, H, W]")
    if len(context) != 3 or context[0] != latents[0] or context[2] != config.text_dim:
        raise InputError(f"{shard}: context is {context}; expected [{latents[0]}, T, {config.text_dim}]")
    return latents[0], tuple(latents[1:])


def _read(shard: Path, rows: slice) -> Clips:
    with _opened(shard) as file:
        try:
            latents, context = (file.get_slice(name)[rows].float() for name in ("latents", "context"))
        except (OSError, SafetensorError) as error:
            raise InputError(f"{shard}: cannot be read ({error})") from None
    if not (latents.isfinite().all() and context.isfinite().all()):
        raise InputError(f"{shard}: has values that are not finite; mend or remove this shard")
    return Clips(latents, context)


def _other_shape(shard: Path, found: Sequence[int], expected: Sequence[int]) -> InputError:
    return InputError(
        f"{shard}: latents are {list(found)} a clip, {list(expected)} in the first shard; give clips of one shape"
    )
