"""The model or the two experts that a source holds, opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mlaconvert.errors import ConfigError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.lora import LoraFile
from mlaconvert.families.merged import merge_loras
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.find import experts


@contextmanager
def open_models(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    state_key: str | None = None,
    config: Path | None = None,
    loras: Sequence[LoraFile] = (),
) -> Iterator[dict[str, Checkpoint]]:
    """The checkpoints of a source: both experts by their subfolder, or the only model under "".

    Arguments and errors are those of `families.open_checkpoint`; a `subfolder` chooses one expert. `loras` are merged
    as weights are read (`lora.merge_loras`). Raises ConfigError for LoRAs and two experts: each has its own.
    """
    folders = (subfolder,) if subfolder else experts(source, revision) or (None,)
    if loras and len(folders) > 1:
        raise ConfigError(f"{source} holds two experts, and a LoRA is made for one; convert each with --subfolder")
    with ExitStack() as stack:
        yield {
            (folder or "") if len(folders) > 1 else "": stack.enter_context(
                merge_loras(
                    stack.enter_context(
                        open_checkpoint(source, revision=revision, subfolder=folder, state_key=state_key, config=config)
                    ),
                    loras,
                )
            )
            for folder in folders
        }
