"""What a converted model was made from: its teacher, found again and checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlaconvert.config.parsing import parse
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import CheckpointError, InputError
from mlaconvert.families.causal import Timing
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.merged import find_recorded, merge_loras
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.find import experts, recorded_places
from mlaconvert.files.names import CONVERSION_NAME
from mlaconvert.files.shipped import TINY
from mlaconvert.progress import Progress


@contextmanager
def open_teacher(
    source: str,
    conversion: Mapping[str, Any] | None,
    *,
    teacher: str | None = None,
    subfolder: str | None = None,
    progress: Progress | None = None,
) -> Iterator[Checkpoint]:
    """The model that `source` was converted from: `teacher`, or what its `conversion` (conversion.json) records.

    That one is looked for by its name, from here or on the Hub at the recorded commit, then beside `source`, and is
    taken only if its hash is the recorded one. Of two experts it is the recorded one, or `subfolder`. LoRAs that were
    merged before the conversion are looked for in the same places and merged again. Raises InputError when something
    is not found.
    """
    recorded = (conversion or {}).get("source") or {}
    inside = recorded.get("subfolder") or None
    if teacher is not None:
        pair = experts(teacher)
        with open_checkpoint(teacher, subfolder=next((f for f in (inside, subfolder) if f in pair), None)) as opened:
            # The base of a LoRA that was merged is not the teacher yet; what was merged by hand is.
            base = bool(recorded.get("loras")) and source_sha256(opened, progress) == recorded.get("sha256")
            with _with_loras(_as_taken(opened, conversion), recorded if base else {}, source) as merged:
                yield merged
        return
    places = recorded_places(recorded)
    if not places:
        raise InputError(f"{source} does not record what it was converted from; name it with --teacher")
    name, reason = places[0][0], ""
    for candidate, revision in (*places, *((path, None) for path in _beside(source, name))):
        try:
            opened = open_checkpoint(
                candidate, revision=revision, subfolder=inside, state_key=recorded.get("state_key")
            )
        except CheckpointError as error:
            reason = reason or str(error)
            continue
        with opened:
            if source_sha256(opened, progress) == recorded.get("sha256"):
                with _with_loras(_as_taken(opened, conversion), recorded, source) as merged:
                    yield merged
                return
        reason = f"{candidate} is another model: its SHA-256 differs"
    raise InputError(f"{source} was converted from {name}, which was not found ({reason}); name it with --teacher")


def _as_taken(opened: Checkpoint, conversion: Mapping[str, Any] | None) -> Checkpoint:
    """A few-step student whose own files do not say so, as the recipe of its conversion took it."""
    recipe = (conversion or {}).get("recipe") or {}
    if opened.config.streaming is not None or not opened.timing.assumed or recipe.get("few_step") is not True:
        return opened
    section = recipe.get("streaming")
    streaming = None if section is None else parse(StreamingConfig, section, f"{CONVERSION_NAME}: recipe.streaming")
    config = dataclasses.replace(opened.config, streaming=streaming, few_step=True)
    return dataclasses.replace(opened, config=config, timing=Timing(streaming=streaming, few_step=True))


def _with_loras(opened: Checkpoint, recorded: Mapping[str, Any], source: str) -> Checkpoint:
    """`opened` with the LoRAs of a recorded source: from here, beside the converted model, or beside the base."""
    folders = [Path(), *_around(source), *_around(str(opened.store.path))]
    return merge_loras(opened, find_recorded(recorded.get("loras"), folders))


def _beside(source: str, name: str) -> list[str]:
    """Where `name` would lie beside a model on this disk."""
    return [str(folder / name) for folder in _around(source)[:1] if "/" not in name]


def _around(source: str) -> list[Path]:
    """The folder that a model on this disk lies in, and its own."""
    path = Path(source).expanduser().absolute()
    folder = path.parent if path.is_file() else path
    return [folder.parent, folder] if path.exists() else []


def source_sha256(opened: Checkpoint, progress: Progress | None) -> str:
    total, done = sum(file.stat().st_size for file in opened.store.files), 0

    def count(piece: int) -> None:
        nonlocal done
        done += piece
        if progress is not None:
            progress("hash", done, total)

    return opened.store.sha256(count)


def comes_from_tiny(conversion: Mapping[str, Any] | None) -> bool:
    """Whether the model with this conversion.json was made from the built-in one, and so knows its drawn clips."""
    recorded = (conversion or {}).get("source") or {}
    return recorded.get("sha256") == _tiny_sha256()


@functools.cache
def _tiny_sha256() -> str:
    with open_checkpoint(TINY) as tiny:
        return tiny.store.sha256()
