"""Checkpoints with LoRAs merged as their weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mlaconvert.errors import ConfigError, InputError
from mlaconvert.families.changed import Change, ChangedCheckpoint, fields_of
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.lora import Lora, LoraFile, lora_keys, open_lora, tensors_digest
from mlaconvert.files.inputs import is_file


@dataclass(frozen=True, kw_only=True)
class MergedCheckpoint(ChangedCheckpoint):
    """A checkpoint whose tensors are read with `loras` merged, CheckpointError for one that is not finite."""

    loras: tuple[Lora, ...]

    def describe(self) -> str:
        """The checkpoint's line, and the LoRAs."""
        return ", ".join((super().describe(), *(f"LoRA {lora.name} x {lora.scale:g}" for lora in self.loras)))

    def close(self) -> None:
        """Let go of all files."""
        for lora in self.loras:
            lora.store.close()
        super().close()


def merged(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Records of the LoRAs that reading `checkpoint` merges; [] for a checkpoint as its files are."""
    return [lora.record() for lora in checkpoint.loras] if isinstance(checkpoint, MergedCheckpoint) else []


def remarks(checkpoint: Checkpoint) -> list[str]:
    """What a user should know of how `checkpoint` is read, a line each; that of LoRAs too."""
    loras = checkpoint.loras if isinstance(checkpoint, MergedCheckpoint) else ()
    lines = [*checkpoint.notes, *checkpoint.passengers.remarks(), *(line for lora in loras for line in lora.remarks())]
    file = checkpoint.store.files[0]
    for key in lora_keys(checkpoint.store) if not any(lora.store.files[0].samefile(file) for lora in loras) else ():
        lines.append(
            f"{file.name} also holds a LoRA, {key!r}, which is not applied; convert merges it with --lora {file}"
        )
    return lines


def lora_files(checkpoint: Checkpoint) -> list[Path]:
    """The files of the LoRAs that reading `checkpoint` merges."""
    loras = checkpoint.loras if isinstance(checkpoint, MergedCheckpoint) else ()
    return [file for lora in loras for file in lora.store.files]


def merge_loras(checkpoint: Checkpoint, files: Sequence[LoraFile]) -> Checkpoint:
    """A view of `checkpoint` with `files` merged in order; the checkpoint itself without any.

    Closing the view closes the checkpoint too. Raises CheckpointError for a file that cannot be read, or naming the
    tensor that does not fit, UnsupportedModelError for a LoRA of self-attention that was converted.
    """
    if not files:
        return checkpoint
    with ExitStack() as stack:
        loras = []
        for file in files:
            loras.append(open_lora(file, checkpoint))
            stack.callback(loras[-1].store.close)
        stack.pop_all()
    modules = {module for lora in loras for module in lora.modules}
    changes = {name: _merging(loras, name) for name in checkpoint.names if {name, name.rpartition(".")[0]} & modules}
    return MergedCheckpoint(**fields_of(checkpoint), changes=changes, loras=tuple(loras))


def _merging(loras: Sequence[Lora], canonical: str) -> Change:
    """What merges `loras` into a tensor, in order."""

    def change(tensor: Tensor) -> Tensor:
        for lora in loras:
            tensor = lora.merge(canonical, tensor)
        return tensor

    return change


def find_recorded(records: Any, folders: Sequence[Path]) -> list[LoraFile]:
    """The files of `merged`'s records, as JSON holds them, by name and hash; looked for in `folders` in order.

    Raises InputError naming the one that is not there, ConfigError for records that are none.
    """
    found = []
    for record in records if isinstance(records, list) else [records] if records else []:
        fields = record if isinstance(record, Mapping) else {}
        name, scale = fields.get("name"), fields.get("scale")
        if not isinstance(name, str) or isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise ConfigError(f"conversion.json: source.loras has {record!r}; expected a name, sha256 and scale")
        candidates = (folder / Path(name).name for folder in folders)
        path = next((p for p in candidates if is_file(p) and tensors_digest([p]) == fields.get("sha256")), None)
        if path is None:
            raise InputError(
                f"the LoRA {name} was merged before the conversion and is not here; put it beside the model, or name "
                "a merged teacher with --teacher"
            )
        alpha, scaling = fields.get("alpha"), fields.get("scaling")
        found.append(
            LoraFile(
                path=path,
                scale=float(scale),
                alpha=alpha if isinstance(alpha, str) else None,
                scaling=tuple(scaling) if isinstance(scaling, list) else None,
            )
        )
    return found
