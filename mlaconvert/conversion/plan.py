"""What a conversion will do, tensor by tensor, known before work starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.conversion.calibration.method import Method
from mlaconvert.conversion.collected.record import Collected
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.recipes import mla_config, resolve_recipe, with_refit_steps
from mlaconvert.errors import UnsupportedModelError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.files.headers import FLOATS
from mlaconvert.files.names import public_name
from mlaconvert.files.writer import TensorSpec

# A converted layer's tensors take the dtype of the pretrained ones that they replace.
_REPLACES = {
    "q_a_proj": "q",
    "q_a_layernorm": "norm_q",
    "q_b_proj": "q",
    "kv_a_proj_with_mqa": "k",
    "k_rope_proj": "k",
    "kv_a_layernorm": "norm_k",
    "k_norm_proj": "k",
    "k_norm": "norm_k",
    "kv_quantizer": "norm_k",
    "kv_b_proj": "v",
    "v_proj": "v",
    "past_out_proj": "o",
    "o": "o",
}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One tensor of the output: passed through under its canonical name, or made by converting `layer`."""

    canonical: str
    spec: TensorSpec
    layer: int | None


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """Everything about a conversion that is known before work starts.

    `source` is a Hub id as given, or the name of a local file or folder without its path; `subfolder` is the
    folder in it ("" for none). `recipe` is resolved, `method` is a calibration's, `source_config` and `config` are the
    geometries before and after. `operations` are in the source's order. `collected` are the windows of its own code
    that a calibration is from, in the place of clips.
    """

    source: str
    subfolder: str
    description: str
    recipe: ConvertRecipe
    method: Method
    source_config: WanConfig
    config: WanConfig
    operations: tuple[Operation, ...]
    source_bytes: int
    collected: Collected | None = None

    @property
    def output_bytes(self) -> int:
        """Bytes of the output's tensors."""
        return sum(operation.spec.nbytes for operation in self.operations)

    @property
    def layers(self) -> dict[int, MLALayer]:
        """The layers that are converted."""
        return {i: layer for i, layer in enumerate(mla_of(self.config).layers) if layer is not None}

    @property
    def dense_scalars(self) -> int:
        """Scalars that the source caches for one token, over all layers."""
        return sum(self.source_config.cached_scalars())

    @property
    def mla_scalars(self) -> int:
        """Scalars that the output caches for one token, over all layers."""
        return sum(self.config.cached_scalars())

    def to_json(self) -> dict[str, Any]:
        """Plain data, without paths or times."""
        return {
            "source": self.source,
            "subfolder": self.subfolder,
            "description": self.description,
            "recipe": recipe_json(self.recipe, self.method),
            "cache_scalars_per_token": {"dense": self.dense_scalars, "mla": self.mla_scalars},
            "bytes": {"source": self.source_bytes, "output": self.output_bytes},
            "tensors": [
                {
                    "name": operation.spec.name,
                    "shape": list(operation.spec.shape),
                    "dtype": str(operation.spec.dtype).removeprefix("torch."),
                    "bytes": operation.spec.nbytes,
                    "converted": operation.layer is not None,
                }
                for operation in self.operations
            ],
        }


def plan_conversion(
    checkpoint: Checkpoint,
    recipe: ConvertRecipe,
    *,
    subfolder: str = "",
    measured: Mapping[int, MLALayer] | None = None,
    method: Method | None = None,
    collected: Collected | None = None,
) -> ConversionPlan:
    """Resolve `recipe` for `checkpoint` and list what becomes of every tensor; reads no weights.

    `measured` are the layers that a calibration decided on. Before it, a calibrated plan shows all layers alike.
    `method` is the calibration's, with all its parts by default, `collected` what it is from if not from clips.

    Raises UnsupportedModelError for a model that is converted already, ConfigError for a recipe that does not fit.
    """
    config = checkpoint.config
    if config.mla is not None:
        raise UnsupportedModelError(f"{checkpoint.store.path}: it is converted already; give the dense model")
    resolved = resolve_recipe(recipe, config)
    mla = mla_config(resolved, config, measured)
    if collected is not None:
        resolved = dataclasses.replace(resolved, clips=None)
        mla = dataclasses.replace(mla, calibration={**collected.record.summary(), "present": mla.present})
    target = dataclasses.replace(
        config,
        mla=mla,
        streaming=resolved.streaming,
        few_step=bool(resolved.few_step),
    )
    return ConversionPlan(
        source=public_name(checkpoint.store.source),
        subfolder=subfolder,
        description=checkpoint.describe(),
        recipe=resolved,
        method=method or Method(),
        source_config=config,
        config=target,
        operations=tuple(_operations(checkpoint, target, resolved)),
        source_bytes=sum(checkpoint.info(name).nbytes for name in checkpoint.names),
        collected=collected,
    )


def on_device(plan: ConversionPlan, device: torch.device) -> ConversionPlan:
    """The plan with what its recipe leaves to the device."""
    return dataclasses.replace(plan, recipe=with_refit_steps(plan.recipe, plan.source_config, device))


def _operations(checkpoint: Checkpoint, target: WanConfig, recipe: ConvertRecipe) -> Iterator[Operation]:
    """One per output tensor; a converted layer's stand where the source has that layer's first."""
    made: dict[int, list[tuple[str, tuple[int, ...]]]] = {
        i: [] for i, layer in enumerate(mla_of(target).layers) if layer is not None
    }
    for name, shape in checkpoint.family.expected_shapes(target).items():
        layer = _attention_layer(name)
        if layer in made:
            made[layer].append((name, shape))

    def operation(name: str, shape: tuple[int, ...], like: str, layer: int | None) -> Operation:
        dtype = checkpoint.info(like).dtype
        if recipe.dtype is not None and dtype in FLOATS:
            dtype = getattr(torch, recipe.dtype)
        spec = TensorSpec(checkpoint.output_name(name, recipe.layout), shape, dtype)
        return Operation(canonical=name, spec=spec, layer=layer)

    for name in checkpoint.names:
        layer = _attention_layer(name)
        if layer is None or mla_of(target).layers[layer] is None:
            yield operation(name, checkpoint.info(name).shape, name, None)
            continue
        for new, shape in made.pop(layer, []):
            prefix, module, leaf = new.rsplit(".", 2)
            # LatentQuery and LatentUp name their parameters like a linear layer; an exact query has no bias.
            like = leaf if leaf in ("weight", "bias") else "weight"
            yield operation(new, shape, f"{prefix}.{_REPLACES[module]}.{like}", layer)


def _attention_layer(canonical: str) -> int | None:
    """The layer whose self-attention a tensor belongs to."""
    parts = canonical.split(".")
    return int(parts[1]) if parts[0] == "blocks" and parts[2:3] == ["self_attn"] else None


def recipe_json(recipe: ConvertRecipe, method: Method) -> dict[str, Any]:
    """A recipe in plain data, with the parts of the method that are off, as every record of a conversion has it."""
    fields: dict[str, Any] = {}
    for name, value in dataclasses.asdict(recipe).items():
        fields[name] = value
        if name == "allocation":  # where the records of earlier versions have it too
            fields["without"] = list(method.off())
    return fields


def mla_of(config: WanConfig) -> MLAConfig:
    """The `mla` section of a model that is known to be converted."""
    assert config.mla is not None
    return config.mla
