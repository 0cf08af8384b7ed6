"""What a conversion has finished, noted in the hidden folder of its output: the same command goes on from there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mlaconvert import __version__
from mlaconvert.clips.folder import clip_files
from mlaconvert.conversion.from_weights import LayerReport
from mlaconvert.conversion.plan import ConversionPlan, recipe_json
from mlaconvert.errors import ConfigError, OutputError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.merged import merged
from mlaconvert.files.inputs import file_states, parse_json
from mlaconvert.files.staging import Staging
from mlaconvert.files.whole import write_whole

COPIED = "copied"  # the note that all tensors that pass through are on the disk
SPLITS = "splits"  # how a calibration divides each layer's scalars
REFIT = "refit"  # the losses of a refit of the whole model, whose tensors lie beside the note
_RUN = "run.json"
# Fields of a recipe that earlier versions did not note, as they then were.
_UNTIL_PASTS = {"present": "latent", "noisy_past": 0.0, "refit_steps": None}
UNTIL_BITS = {"bytes_per_token": None, "refit_clips": None}


def identity(
    checkpoints: Mapping[str, Checkpoint], plans: Mapping[str, ConversionPlan], device: torch.device, data: Path | None
) -> dict[str, Any]:
    """All that the bytes of an output follow from, in plain data, by a name for the user."""
    found: dict[str, Any] = {"mlaconvert": __version__, "torch": torch.__version__, "device": device.type}
    found["data"] = None if data is None else file_states(clip_files(data))
    for name, checkpoint in checkpoints.items():
        plan, of = plans[name], f" of {name}" if name else ""
        found[f"source{of}"] = file_states(checkpoint.store.files)
        found[f"name{of}"], found[f"state_key{of}"] = [plan.source, plan.subfolder], checkpoint.state_key
        found[f"config{of}"], found[f"lora{of}"] = checkpoint.raw_config, merged(checkpoint)
        if plan.collected is not None:
            found[f"windows{of}"] = plan.collected.identity
        found |= {f"{field}{of}": value for field, value in recipe_json(plan.recipe, plan.method).items()}
    data_only: dict[str, Any] = json.loads(json.dumps(found))
    return data_only


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, times: bool = True) -> str | None:
    """The first name in which two identities differ; without `times`, files may have been changed at other times."""

    def comparable(name: str, value: Any) -> Any:
        states = name.startswith(("source", "data")) and value is not None
        return [state[:2] for state in value] if states and not times else value

    return next((n for n, value in ours.items() if comparable(n, value) != comparable(n, theirs.get(n))), None)


class Journal:
    """Notes in a staging folder, on the run with this `identity`. Every note is there whole, or not at all.

    Methods that write raise OSError, those that read OutputError.
    """

    def __init__(self, staging: Staging, identity: Mapping[str, Any]) -> None:
        self.folder, self._model, self.identity = staging.folder, staging.content, identity

    def check(self) -> None:
        """Raise ConfigError when finished layers of another run lie in the folder."""
        changed = difference(self.identity, self.begun()) if self.finished() else None
        if changed is not None:
            other = (
                "another source, or one that was changed since"
                if changed.startswith("source")
                else f"another {changed}"
            )
            raise ConfigError(
                f"{self.folder} holds a conversion with {other}; give the same, or begin again with --restart"
            )

    def begin(self) -> None:
        """Note whose folder this is."""
        write_whole(self.folder / _RUN, json.dumps(self.identity, indent=2).encode())

    def begun(self) -> dict[str, Any]:
        """The identity of the run whose folder this is; {} of nobody's."""
        saved = self._load(_RUN)
        if not isinstance(saved, dict):
            return {}
        for of in (name.removeprefix("init") for name in list(saved) if name == "init" or name.startswith("init of ")):
            # The method of a calibration changed with the first of them.
            before = UNTIL_BITS if saved[f"init{of}"] == "calibrated" else UNTIL_BITS | _UNTIL_PASTS
            # Clips are chosen for what comes last, so older work goes on as ours does.
            before = before | {"refit_clips": self.identity.get(f"refit_clips{of}")}
            saved = {f"{field}{of}": value for field, value in before.items()} | saved
        return saved

    def finished(self) -> int:
        """How many layers are finished, of all models."""
        return len(list(self.folder.glob("*-layer-*.json"))) if self._model.is_dir() else 0

    def keep(self, model: str, note: str, data: Any) -> None:
        """Keep plain `data` under the name `note`, whole or not at all."""
        write_whole(self._note(model, note), json.dumps(data).encode())

    def recall(self, model: str, note: str) -> Any:
        """What was kept under that name, or None."""
        return self._load(self._note(model, note).name)

    def forget(self, model: str) -> None:
        """Throw away the notes on what a model's weight files hold."""
        notes = (self._note(model, COPIED), self._note(model, REFIT), self.refit_file(model))
        for path in (*self.folder.glob(f"{_prefix(model)}layer-*.json"), *notes):
            path.unlink(missing_ok=True)

    def keep_layer(self, model: str, report: LayerReport) -> None:
        """Note that a layer's tensors are on the disk."""
        data = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
        data |= {"errors": dict(report.errors), "singular_values": report.singular_values.tolist()}
        self.keep(model, f"layer-{report.layer:03d}", data)

    def layers(self, model: str, wanted: Sequence[int]) -> dict[int, LayerReport]:
        """Those of the `wanted` layers that are finished, ascending."""
        found = {}
        for layer in sorted(wanted):
            data = self.recall(model, f"layer-{layer:03d}")
            with suppress(TypeError, KeyError, ValueError):  # not there, or not ours
                values = torch.tensor(data["singular_values"], dtype=torch.float64)
                found[layer] = LayerReport(**data | {"singular_values": values})
        return found

    def refit_file(self, model: str) -> Path:
        """Where the tensors that a refit of the whole model changed are kept."""
        return self.folder / f"{_prefix(model)}{REFIT}.safetensors"

    def _note(self, model: str, note: str) -> Path:
        return self.folder / f"{_prefix(model)}{note}.json"

    def _load(self, filename: str) -> Any:
        try:
            return parse_json((self.folder / filename).read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{self.folder / filename}: it cannot be read ({str(error)[:100]}); begin again with --restart"
            ) from None


def _prefix(model: str) -> str:
    return f"{model or 'model'}-"
