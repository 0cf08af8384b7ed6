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
from mlaconvert.families.source import AnySource, Source, as_source
from mlaconvert.files.find import experts
from mlaconvert.files.names import CONVERSION_NAME
from mlaconvert.files.origin import folders_around, origin_of
from mlaconvert.files.shipped import TINY
from mlaconvert.progress import Progress, silent


def refuse_dense(opened: Checkpoint, source: AnySource, command: str) -> None:
    """Raise InputError when `opened` (called `source`) is not converted, which `command` needs."""
    if opened.config.mla is None:
        raise InputError(
            f"{source} is not converted; run `mlaconvert convert {source} -o DIR`, then `mlaconvert {command} DIR`"
        )


@contextmanager
def open_teacher(
    source: str,
    conversion: Mapping[str, Any] | None,
    *,
    teacher: AnySource | None = None,
    subfolder: str | None = None,
    progress: Progress | None = None,
) -> Iterator[Checkpoint]:
    """The model that `source` was converted from: `teacher`, or what its `conversion` (conversion.json) records.

    That one is looked for by its name, from here or on the Hub at the recorded commit, then beside `source`, and is
    taken only if its hash is the recorded one. Of two experts it is the recorded one, or `subfolder`. LoRAs that were
    merged before the conversion are looked for in the same places and merged again. Raises InputError when something
    is not found.
    """
    origin = origin_of(conversion)
    inside = origin.subfolder or None
    if teacher is not None:
        named = as_source(teacher)
        pair = () if named.subfolder else experts(named.path, named.revision)
        expert = named.subfolder or next((folder for folder in (inside, subfolder) if folder in pair), None)
        with open_checkpoint(dataclasses.replace(named, subfolder=expert)) as opened:
            # The base of a LoRA that was merged is not the teacher yet; what was merged by hand is.
            base = bool(origin.loras) and source_sha256(opened, progress) == origin.sha256
            with _with_loras(_as_taken(opened, conversion), origin.loras if base else None, source) as merged:
                yield merged
        return
    if origin.name is None:
        raise InputError(f"{source} does not record what it was converted from; name it with --teacher")
    reason, beside = "", origin.beside(source)
    for candidate, revision in (*origin.places, *([(str(beside), None)] if beside is not None else [])):
        try:
            opened = open_checkpoint(Source(candidate, revision=revision, subfolder=inside, state_key=origin.state_key))
        except CheckpointError as error:
            reason = reason or str(error)
            continue
        with opened:
            if source_sha256(opened, progress) == origin.sha256:
                with _with_loras(_as_taken(opened, conversion), origin.loras, source) as merged:
                    yield merged
                return
        reason = f"{candidate} is another model: its SHA-256 differs"
    raise InputError(
        f"{source} was converted from {origin.name}, which was not found ({reason}); name it with --teacher"
    )


def _as_taken(opened: Checkpoint, conversion: Mapping[str, Any] | None) -> Checkpoint:
    """A few-step student whose own files do not say so, as the recipe of its conversion took it."""
    recipe = (conversion or {}).get("recipe") or {}
    if opened.config.streaming is not None or not opened.timing.assumed or recipe.get("few_step") is not True:
        return opened
    section = recipe.get("streaming")
    streaming = None if section is None else parse(StreamingConfig, section, f"{CONVERSION_NAME}: recipe.streaming")
    config = dataclasses.replace(opened.config, streaming=streaming, few_step=True)
    return dataclasses.replace(opened, config=config, timing=Timing(streaming=streaming, few_step=True))


def _with_loras(opened: Checkpoint, records: Any, source: str) -> Checkpoint:
    """`opened` with the recorded LoRAs: from here, beside the converted model, or beside the base."""
    folders = [Path(), *folders_around(source), *folders_around(opened.store.path)]
    return merge_loras(opened, find_recorded(records, folders))


def source_sha256(opened: Checkpoint, progress: Progress | None) -> str:
    """The hash that tells which weights these are."""
    return opened.store.sha256(progress or silent)


def draws_clips(teacher: Checkpoint, conversion: Mapping[str, Any] | None) -> bool:
    """Whether the clips of a model with this conversion.json and `teacher` can be drawn: one is the built-in model."""
    return teacher.is_tiny or origin_of(conversion).sha256 == _tiny_sha256()


@functools.cache
def _tiny_sha256() -> str:
    with open_checkpoint(TINY) as tiny:
        return tiny.store.sha256()
