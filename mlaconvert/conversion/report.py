"""What `convert` reports: plans, layers and losses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlaconvert import __version__
from mlaconvert.conversion.collected.settings import collected_json
from mlaconvert.conversion.cost import ConversionCost
from mlaconvert.conversion.from_weights import LayerReport, digits
from mlaconvert.conversion.plan import ConversionPlan, recipe_json
from mlaconvert.conversion.verify import Verification
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.merged import merged


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """One converted model. A dry run leaves `sha256`, that of the source's files, and `layers` empty.

    `losses` are those of a calibration: mean squared velocity errors on clips that it did not see, of the "dense" model
    and with all layers after each step of the conversion, behind clean pasts where the model has pasts; `noisy_losses`
    are the same with noisy pasts. `seconds` tell where the time went; what runs side by side
    adds up to more than the time that passed. `cost` is what a dry run that was asked for it estimates.
    """

    plan: ConversionPlan
    sha256: str = ""
    layers: tuple[LayerReport, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)
    noisy_losses: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    verification: Verification | None = None
    cost: ConversionCost | None = None

    def to_json(self) -> dict[str, Any]:
        """The plan, and what came of it; without the singular values, which are in conversion.json."""
        data = self.plan.to_json()
        if self.sha256:
            data["sha256"] = self.sha256
            data["layers"] = [
                {k: v for k, v in layer.to_json().items() if k != "singular_values"} for layer in self.layers
            ]
            data |= self.losses_json()
            data["seconds"] = {kind: round(seconds, 3) for kind, seconds in self.seconds.items()}
        if self.cost is not None:
            data["estimate"] = self.cost.to_json()
        if self.verification is not None:
            data["verification"] = dataclasses.asdict(self.verification)
        return data

    def losses_json(self) -> dict[str, dict[str, float]]:
        """Both losses after each step; those with noisy pasts only where the model has pasts."""
        losses = {"losses": self.losses} | ({"noisy_losses": self.noisy_losses} if self.noisy_losses else {})
        return {kind: {name: digits(loss) for name, loss in steps.items()} for kind, steps in losses.items()}


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What `convert` wrote: one model, or the two experts of Wan2.2 A14B, each in its own subfolder of `output`."""

    output: Path | None  # None for a dry run without one
    models: tuple[ModelReport, ...]


def conversion_json(checkpoint: Checkpoint, report: ModelReport) -> str:
    """Where the model came from and what its conversion did; one line a layer."""
    plan = report.plan
    data = {
        "mlaconvert": __version__,
        "source": {
            "name": plan.source,
            **({} if checkpoint.store.revision is None else {"revision": checkpoint.store.revision}),
            "subfolder": plan.subfolder,
            "state_key": checkpoint.state_key,
            "description": plan.description,
            "files": [file.name for file in checkpoint.store.files],
            "sha256": report.sha256,
            **({"decoded": checkpoint.store.decoded} if checkpoint.store.decoded else {}),
            **({"passengers": checkpoint.passengers.record()} if checkpoint.passengers else {}),
            **({"loras": merged(checkpoint)} if merged(checkpoint) else {}),
        },
        "recipe": recipe_json(plan.recipe, plan.method),
        **({"collected": collected_json(plan.collected)} if plan.collected is not None else {}),
        "cache_scalars_per_token": {"dense": plan.dense_scalars, "mla": plan.mla_scalars},
        **report.losses_json(),
    }
    head = json.dumps(data, indent=2, ensure_ascii=False).removesuffix("\n}")
    layers = ",\n".join("    " + json.dumps(layer.to_json()) for layer in report.layers)
    return f'{head},\n  "layers": [\n{layers}\n  ]\n}}\n'
