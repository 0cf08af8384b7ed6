"""The model or the two experts that a source holds, opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from mlaconvert.errors import ConfigError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import AnySource, as_source
from mlaconvert.files.find import experts


@contextmanager
def open_models(source: AnySource) -> Iterator[dict[str, Checkpoint]]:
    """The checkpoints of a source: both experts by their subfolder, or the only model under "".

    Errors are those of `families.open_checkpoint`; a subfolder chooses one expert. Raises ConfigError for LoRAs and two
    experts: each has its own.
    """
    source = as_source(source)
    folders = (source.subfolder,) if source.subfolder else experts(source.path, source.revision) or (None,)
    if source.loras and len(folders) > 1:
        raise ConfigError(f"{source} holds two experts, and a LoRA is made for one; convert each with --subfolder")
    with ExitStack() as stack:
        yield {
            (folder or "") if len(folders) > 1 else "": stack.enter_context(
                open_checkpoint(dataclasses.replace(source, subfolder=folder))
            )
            for folder in folders
        }
