"""Convert a dense checkpoint to latent attention: `plan_conversion` decides, `convert` applies it layer by layer.

Only one layer's matrices are ever in memory in float64; every other tensor goes from file to file. The same input and
recipe give the same bytes: nothing that is written tells a time or a path of the machine.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from scipy.linalg import LinAlgError
from torch import Tensor

from mlaconvert import __version__
from mlaconvert.attention import AttentionPlan, DenseAttention, LatentAttention
from mlaconvert.calibrate import BATCH_TOKENS, Calibration, Regime, Target, calibrate, refit_layers
from mlaconvert.checkpoint import CONFIG_NAME, TINY, ModelWriter, TensorSpec, check_finite, experts, swap_folders
from mlaconvert.config import (
    ConvertRecipe,
    MLAConfig,
    MLALayer,
    StreamingConfig,
    WanConfig,
    default_budget,
    default_video,
    parse,
    parse_layers,
)
from mlaconvert.data import Clips, load_clips
from mlaconvert.errors import CheckpointError, ConfigError, MLAConvertError, OutputError, UnsupportedModelError
from mlaconvert.factorize import (
    AttentionWeights,
    Factors,
    factorize_layer,
    highest_pairs,
    mean_rotation,
    modulation_moments,
    random_layer,
)
from mlaconvert.families import Checkpoint, open_checkpoint
from mlaconvert.model import load_model, timestep_embedding
from mlaconvert.rollout import Sampler, own_clips, passes
from mlaconvert.rope import rotary
from mlaconvert.spectrum import effective_rank, energy_at, gram, singular_values_from_gram
from mlaconvert.tiny.clips import training_clips

THRESHOLD = 0.99  # share of the energy that the reported effective rank holds
CONVERSION_NAME = "conversion.json"
MOMENTS_NAME = "calibration.json"
CALIBRATION_TOKENS, CALIBRATION_FRAMES = (
    100_000,
    9,
)  # of clips that the teacher generates: in all, and latent frames each
README_NAME = "README.md"

# progress(stage, done, total): layers converted, bytes hashed, layers verified.
Progress = Callable[[str, int, int], None]

# A converted layer's tensors take the dtype of the pretrained ones that they replace.
_REPLACES = {
    "q_a_proj": "q",
    "q_a_layernorm": "norm_q",
    "q_b_proj": "q",
    "kv_a_proj_with_mqa": "k",
    "k_rope_proj": "k",
    "kv_a_layernorm": "norm_k",
    "k_norm_proj": "k",
    "kv_b_proj": "v",
    "o": "o",
}
_VERIFY_GRID = (3, 4, 5)  # frames, height and width in tokens


# --- recipes -----------------------------------------------------------------------------------------------------


def recipe_names(folder: Path | None = None) -> list[str]:
    """Names of the recipes that ship with mlaconvert, or of those in `folder`."""
    return sorted(path.stem for path in (folder or recipe_folder()).glob("*.yaml"))


def load_recipe(recipe: str | Path) -> ConvertRecipe:
    """Read a YAML file, or a shipped recipe by its name. Raises ConfigError naming the file and the field."""
    path, data = read_recipe(recipe, recipe_folder(), "recipes", "init: svd")
    return parse(ConvertRecipe, data, str(path))


def read_recipe(recipe: str | Path, shipped: Path, kind: str, example: str) -> tuple[Path, dict[str, Any]]:
    """The file of a recipe and its fields, not checked yet: a YAML file, or a name in the folder `shipped`.

    Raises ConfigError; its message calls the shipped ones `kind` and shows the field `example`.
    """
    path = Path(recipe)
    if not path.is_file():
        names = recipe_names(shipped)
        path = shipped / f"{recipe}.yaml"
        if str(recipe) not in names:
            raise ConfigError(f"{recipe}: no such recipe file; shipped {kind}: {', '.join(names)}")
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of fields, such as `{example}`")
    return path, data


def recipe_folder() -> Path:
    """`mlaconvert/recipes` of an installed wheel, `recipes` beside the package in a checkout."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def resolve_recipe(recipe: ConvertRecipe, config: WanConfig) -> ConvertRecipe:
    """`recipe` with every default filled in for a model of geometry `config`.

    Raises ConfigError for a width larger than the layer, a layer that does not exist, or a video that patches and
    VAE cannot split. Scores and values may not be wider than a head, so that attention never costs more than dense.
    """
    video, head_dim = default_video(config), config.head_dim
    changes: dict[str, Any] = {
        "layers": _format_layers(
            parse_layers(recipe.layers, config.num_layers) if recipe.layers is not None else range(config.num_layers)
        ),
        "streaming": recipe.streaming or config.streaming,
        "height": recipe.height or video.height,
        "width": recipe.width or video.width,
        "vae_stride": recipe.vae_stride or video.vae_stride,
    }
    if recipe.init != "lossless":
        budget, calibrated = default_budget(config), recipe.init == "calibrated"
        mode = recipe.rope or (("head" if recipe.nope_dim is None else "latent") if calibrated else "cached")
        if mode == "head" and (recipe.rope_dim or recipe.nope_dim not in (None, head_dim)):
            raise ConfigError("rope head keeps whole heads; leave rope_dim and nope_dim out, or give rope latent")
        # Rotary keys that take no cache of their own are as many as measure best.
        measured = mode == "head" or (mode == "latent" and calibrated)
        rope = recipe.rope_dim or (0 if measured else budget.qk_rope_head_dim)
        latent = budget.kv_lora_rank if mode == "cached" else budget.kv_lora_rank + budget.qk_rope_head_dim
        changes |= {
            "kv_rank": recipe.kv_rank or latent,
            "q_rank": recipe.q_rank or ("none" if calibrated else budget.q_lora_rank),
            # A calibrated layer fills its heads up to their width, whatever rotary key it gets.
            "nope_dim": max(0, head_dim - rope) if recipe.nope_dim is None and not calibrated else recipe.nope_dim,
            "rope_dim": rope or None,
            "v_dim": recipe.v_dim or head_dim,
            "key_norm": recipe.key_norm or ("token" if calibrated else "latent"),
            "rope": mode,
        }
        streaming = recipe.streaming or config.streaming
        if calibrated and streaming is not None and streaming.positions == "absolute" and streaming.sink_frames:
            raise ConfigError("init calibrated counts frames from a window's sink; set streaming.positions to window")
        if calibrated:
            changes["allocation"] = recipe.allocation or "adaptive"
        changes["rope_selection"] = recipe.rope_selection or ("energy" if calibrated else "highest")
        if changes["rope_selection"] == "energy" and not calibrated:
            raise ConfigError("rope_selection energy needs measured inputs; use init calibrated")
    resolved = dataclasses.replace(recipe, **changes)
    height, width = _token_grid(resolved, config)
    if recipe.clips is None:
        # As many tokens as a wide layer's moments need; all their activations are held at once.
        fitting = CALIBRATION_TOKENS // (CALIBRATION_FRAMES * height * width)
        resolved = dataclasses.replace(resolved, clips=min(40, max(5, fitting)))
    for name, limit, what in (
        ("kv_rank", config.dim, "layer"),
        ("q_rank", config.dim, "layer"),
        ("rope_dim", head_dim, "head"),
        ("nope_dim", head_dim, "head"),
        ("v_dim", head_dim, "head"),
    ):
        value = getattr(resolved, name)
        if isinstance(value, int) and value > limit:
            raise ConfigError(f"{name} is {value}, larger than the {what}, which is {limit} wide; give at most {limit}")
    nope, rope = resolved.nope_dim or 0, resolved.rope_dim or 0
    if nope + rope > head_dim:
        raise ConfigError(
            f"nope_dim {nope} and rope_dim {rope} are {nope + rope} wide together, a head is {head_dim}; "
            f"give at most {head_dim} in all"
        )
    return resolved


def _format_layers(layers: Sequence[int]) -> str:
    """(0, 1, 2, 7) -> "0-2,7"."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda item: item[1] - item[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _token_grid(recipe: ConvertRecipe, config: WanConfig) -> tuple[int, int]:
    """Height and width in tokens of a resolved recipe's video."""
    grid = []
    for name, patch in zip(("height", "width"), config.patch_size[1:], strict=True):
        pixels, step = getattr(recipe, name), (recipe.vae_stride or 1) * patch
        if pixels % step:
            raise ConfigError(f"{name} is {pixels} pixels: give a multiple of {step}, VAE stride times patch")
        grid.append(pixels // step)
    return grid[0], grid[1]


def mla_config(recipe: ConvertRecipe, config: WanConfig, measured: Mapping[int, MLALayer] | None = None) -> MLAConfig:
    """The `mla` section that a resolved recipe makes of a model of geometry `config`.

    `measured` are the layers that a calibration decided on; without it all are alike.
    """
    lossless = recipe.init == "lossless"
    if lossless:
        components = tuple((pair, config.num_heads) for pair in range(config.head_dim // 2))
    else:
        components = highest_pairs(config.rope_split, (recipe.rope_dim or 0) // 2)
    nope = 0 if lossless else max(0, config.head_dim - (recipe.rope_dim or 0))
    layer = MLALayer(
        kv_lora_rank=recipe.kv_rank or config.dim,
        qk_nope_head_dim=nope if recipe.nope_dim is None else recipe.nope_dim,
        v_head_dim=recipe.v_dim or config.head_dim,
        rope_components=components,
    )
    chosen = parse_layers(recipe.layers or "", config.num_layers)
    calibration = None
    if recipe.init == "calibrated":
        calibration = {"inputs": "clips", "clips": recipe.clips, **_regime(recipe).to_json()}
    elif recipe.init != "random":
        height, width = _token_grid(recipe, config)
        streaming = recipe.streaming
        calibration = {
            "inputs": "modulation",
            "timesteps": list(_timesteps(recipe)),
            "regime": "streaming" if streaming else "bidirectional",
            "frames": streaming.window_frames if streaming else recipe.frames,
            "tokens": [height, width],
        }
    return MLAConfig(
        q_lora_rank=recipe.q_rank if isinstance(recipe.q_rank, int) else None,
        key_norm=recipe.key_norm or "token",
        softmax_scale=config.head_dim**-0.5,
        layers=tuple((measured or {}).get(i, layer) if i in chosen else None for i in range(config.num_layers)),
        rope=recipe.rope or "cached",
        calibration=calibration,
    )


def _regime(recipe: ConvertRecipe) -> Regime:
    """Where a calibration takes its windows. Without a sink, it is the same whether positions count from there."""
    streaming = recipe.streaming
    return Regime.of(dataclasses.replace(streaming, positions="window") if streaming else None, recipe.seed)


def _timesteps(recipe: ConvertRecipe) -> tuple[float, ...]:
    """Where the inputs' statistics are taken: streaming models also run on clean chunks."""
    return (*Sampler.few_step().timesteps, 0.0) if recipe.streaming else Sampler.many_step(8).timesteps


# --- the plan ----------------------------------------------------------------------------------------------------


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
    folder in it ("" for none). `recipe` is resolved, `source_config` and `config` are the geometries
    before and after. `operations` are in the source's order.
    """

    source: str
    subfolder: str
    description: str
    recipe: ConvertRecipe
    source_config: WanConfig
    config: WanConfig
    operations: tuple[Operation, ...]
    source_bytes: int

    @property
    def output_bytes(self) -> int:
        """Bytes of the output's tensors."""
        return sum(operation.spec.nbytes for operation in self.operations)

    @property
    def layers(self) -> dict[int, MLALayer]:
        """The layers that are converted."""
        return {i: layer for i, layer in enumerate(_mla(self.config).layers) if layer is not None}

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
            "recipe": dataclasses.asdict(self.recipe),
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
) -> ConversionPlan:
    """Resolve `recipe` for `checkpoint` and list what becomes of every tensor; reads no weights.

    `measured` are the layers that a calibration decided on. Before it, a calibrated plan shows all layers alike.

    Raises UnsupportedModelError for a model that is converted already, ConfigError for a recipe that does not fit.
    """
    config = checkpoint.config
    if config.mla is not None:
        raise UnsupportedModelError(f"{checkpoint.store.path}: it is converted already; give the dense model")
    resolved = resolve_recipe(recipe, config)
    target = dataclasses.replace(config, mla=mla_config(resolved, config, measured), streaming=resolved.streaming)
    return ConversionPlan(
        source=public_name(checkpoint.store.source),
        subfolder=subfolder,
        description=checkpoint.describe(),
        recipe=resolved,
        source_config=config,
        config=target,
        operations=tuple(_operations(checkpoint, target, resolved.dtype)),
        source_bytes=sum(checkpoint.info(name).nbytes for name in checkpoint.names),
    )


def _operations(checkpoint: Checkpoint, target: WanConfig, dtype: str | None) -> Iterator[Operation]:
    """One per output tensor; a converted layer's stand where the source has that layer's first."""
    made: dict[int, list[tuple[str, tuple[int, ...]]]] = {
        i: [] for i, layer in enumerate(_mla(target).layers) if layer is not None
    }
    for name, shape in checkpoint.family.expected_shapes(target).items():
        layer = _attention_layer(name)
        if layer in made:
            made[layer].append((name, shape))

    def operation(name: str, shape: tuple[int, ...], like: str, layer: int | None) -> Operation:
        chosen = getattr(torch, dtype) if dtype is not None else checkpoint.info(like).dtype
        return Operation(canonical=name, spec=TensorSpec(checkpoint.output_name(name), shape, chosen), layer=layer)

    for name in checkpoint.names:
        layer = _attention_layer(name)
        if layer is None or _mla(target).layers[layer] is None:
            yield operation(name, checkpoint.info(name).shape, name, None)
            continue
        for new, shape in made.pop(layer, []):
            prefix, module, leaf = new.rsplit(".", 2)
            # LatentQuery and LatentUp name their parameters like a linear layer; an exact query has no bias.
            yield operation(new, shape, f"{prefix}.{_REPLACES[module]}.{leaf}", layer)


def _attention_layer(canonical: str) -> int | None:
    """The layer whose self-attention a tensor belongs to."""
    parts = canonical.split(".")
    return int(parts[1]) if parts[0] == "blocks" and parts[2] == "self_attn" else None


def _mla(config: WanConfig) -> MLAConfig:
    assert config.mla is not None
    return config.mla


def public_name(source: str) -> str:
    """A Hub id as given; of a local path only its last part, which says nothing of the machine."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


# --- one layer ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What the conversion of one layer found and lost.

    `singular_values` are those of the pretrained [W_K; W_V], [D] float64 descending; `errors` are
    `factorize.Factors.errors`, in the metric of guessed inputs; of a calibrated layer, the attention output's on the
    calibration inputs after each step.
    """

    layer: int
    kv_lora_rank: int
    singular_values: Tensor
    errors: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain data, to six significant digits."""
        return {
            "layer": self.layer,
            "effective_rank": effective_rank(self.singular_values, THRESHOLD),
            "energy_at_kv_rank": _digits(energy_at(self.singular_values, self.kv_lora_rank)),
            "errors": {name: _digits(value) for name, value in self.errors.items()},
            "singular_values": [_digits(value) for value in self.singular_values.tolist()],
        }


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def _read(checkpoint: Checkpoint, canonical: str) -> Tensor:
    tensor = checkpoint.read(canonical)
    check_finite(tensor, checkpoint.names[canonical], checkpoint.store.path)
    return tensor


def time_modulation(checkpoint: Checkpoint, timesteps: Sequence[float]) -> Tensor:
    """What the time embedding gives to every block's self-attention: (shift, scale), float64 [T, 2, D]."""
    dim = checkpoint.config.dim

    def linear(name: str, x: Tensor, rows: int) -> Tensor:
        weight, bias = (_read(checkpoint, f"{name}.{leaf}")[:rows].double() for leaf in ("weight", "bias"))
        return F.linear(x, weight, bias)

    wave = timestep_embedding(torch.tensor(timesteps, dtype=torch.float64), checkpoint.config.freq_dim)
    embedding = linear("time_embedding.2", F.silu(linear("time_embedding.0", wave, dim)), dim)
    return linear("time_projection.1", F.silu(embedding), 2 * dim).unflatten(-1, (2, dim))


def _layer_modulation(checkpoint: Checkpoint, layer: int, time: Tensor) -> Tensor:
    """(shift, scale) of one block's self-attention, float64 [T, 2, D]."""
    return time + _read(checkpoint, f"blocks.{layer}.modulation")[0, :2].double()


def _convert_layer(
    checkpoint: Checkpoint, plan: ConversionPlan, layer: int, time: Tensor | None, device: torch.device
) -> tuple[Factors, LayerReport]:
    """Factors of one layer; `time` is None when they are drawn at random."""
    config, mla, target = plan.source_config, _mla(plan.config), plan.layers[layer]
    weights = checkpoint.attention(layer)
    if time is None:
        factors = random_layer(
            weights,
            target,
            num_heads=config.num_heads,
            key_norm=mla.key_norm,
            q_lora_rank=mla.q_lora_rank,
            # A generator a layer: a layer comes out the same whichever others are converted.
            generator=torch.Generator().manual_seed((plan.recipe.seed << 16) + layer),
            rope=mla.rope,
        )
    else:
        factors = _factorize(checkpoint, plan, weights, layer, time, device)
    return factors, _layer_report(weights, plan, layer, factors.errors, device)


def _layer_report(
    weights: AttentionWeights, plan: ConversionPlan, layer: int, errors: Mapping[str, float], device: torch.device
) -> LayerReport:
    joint = gram(weights.k_weight.to(device), weights.v_weight.to(device))
    return LayerReport(
        layer=layer,
        kv_lora_rank=plan.layers[layer].kv_lora_rank,
        singular_values=singular_values_from_gram(joint).cpu(),
        errors=errors,
    )


def _factorize(
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    weights: AttentionWeights,
    layer: int,
    time: Tensor,
    device: torch.device,
) -> Factors:
    config, mla, target = plan.source_config, _mla(plan.config), plan.layers[layer]
    height, width = _token_grid(plan.recipe, config)
    rho = mean_rotation(
        config.rope_split, streaming=plan.recipe.streaming, frames=plan.recipe.frames, height=height, width=width
    )
    modulation = _layer_modulation(checkpoint, layer, time).to(device)
    try:
        moments = modulation_moments(weights, modulation, num_heads=config.num_heads, eps=config.eps, rho=rho)
        factors = factorize_layer(
            weights,
            target,
            moments,
            num_heads=config.num_heads,
            key_norm=mla.key_norm,
            q_lora_rank=mla.q_lora_rank,
            rope=mla.rope,
        )
    except (torch.linalg.LinAlgError, LinAlgError):  # type: ignore[attr-defined]
        factors = None
    if factors is None or not all(math.isfinite(error) for error in factors.errors.values()):
        raise CheckpointError(
            f"{checkpoint.store.path}: the self-attention weights of layer {layer} are degenerate (zero or far out of "
            "range) and cannot be factorised; leave the layer dense with --layers"
        )
    return factors


def _cast(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """`tensor` in the planned dtype. Raises ConfigError when a finite value overflows."""
    cast = tensor.to(spec.dtype)
    if spec.dtype != tensor.dtype and not bool(torch.isfinite(cast).all()):
        raise ConfigError(f"tensor {spec.name!r} does not fit {spec.dtype}; choose --dtype bfloat16 or float32")
    return cast


def _write_tensors(
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    writer: ModelWriter,
    made: Iterator[tuple[int, Factors, LayerReport]],
    progress: Progress,
) -> tuple[LayerReport, ...]:
    """Apply the plan tensor by tensor: what passes through, then layer by layer what `made` brings."""
    converted: dict[int, list[Operation]] = {layer: [] for layer in plan.layers}
    for operation in plan.operations:
        if operation.layer is None:
            writer.write(operation.spec.name, _cast(_read(checkpoint, operation.canonical), operation.spec))
        else:
            converted[operation.layer].append(operation)
    reports: list[LayerReport] = []
    progress("convert", 0, len(plan.layers))
    for layer, factors, report in made:
        for operation in converted[layer]:
            tensor = factors.tensors[operation.canonical.split(".", 3)[3]]
            check_finite(tensor, operation.spec.name, writer.path)
            writer.write(operation.spec.name, _cast(tensor, operation.spec))
        reports.append(report)
        _return_memory()
        progress("convert", len(reports), len(plan.layers))
    return tuple(sorted(reports, key=lambda report: report.layer))


def _from_weights(
    checkpoint: Checkpoint, plan: ConversionPlan, device: torch.device
) -> Iterator[tuple[int, Factors, LayerReport]]:
    """Layers converted from their weights alone, or drawn at random."""
    time = None if plan.recipe.init == "random" else time_modulation(checkpoint, _timesteps(plan.recipe))
    for layer in plan.layers:
        factors, report = _convert_layer(checkpoint, plan, layer, time, device)
        yield layer, factors, report


def _from_clips(
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    clips: tuple[Clips, Clips | None],
    calibration: Calibration,
    losses: dict[str, float],
    device: torch.device,
) -> Iterator[tuple[int, Factors, LayerReport]]:
    """Layers converted in the metric of what the first `clips` bring, and refitted to it; `losses` on the others."""
    made = refit_layers(
        checkpoint,
        clips[0],
        _regime(plan.recipe),
        _target(plan),
        calibration,
        validation=clips[1],
        losses=losses,
        device=device,
    )
    for layer, tensors, errors in made:
        report = _layer_report(checkpoint.attention(layer), plan, layer, errors, device)
        yield layer, Factors(tensors={name: tensor.cpu() for name, tensor in tensors.items()}, errors=errors), report


def _target(plan: ConversionPlan) -> Target:
    mla, recipe = _mla(plan.config), plan.recipe
    return Target(
        config=plan.source_config,
        key_norm=mla.key_norm,
        q_lora_rank=mla.q_lora_rank,
        rope=mla.rope,
        v_dim=recipe.v_dim or plan.source_config.head_dim,
        nope_dim=recipe.nope_dim,
        rope_dim=recipe.rope_dim if recipe.rope == "latent" or recipe.allocation == "fixed" else None,
        rope_selection=recipe.rope_selection or "energy",
        without=recipe.without,
    )


def _calibrate(
    checkpoint: Checkpoint, plan: ConversionPlan, clips: Clips, folder: Path, device: torch.device, progress: Progress
) -> Calibration:
    """Decide how each layer divides its scalars."""
    recipe = plan.recipe
    progress("calibrate", 0, plan.config.num_layers)
    try:
        return calibrate(
            checkpoint,
            clips,
            _regime(recipe),
            _target(plan),
            layers=sorted(plan.layers),
            budget=(recipe.kv_rank or 0) + (recipe.rope_dim or 0 if recipe.rope == "cached" else 0),
            adaptive=recipe.allocation == "adaptive",
            folder=folder,
            device=device,
            progress=lambda done, total: progress("calibrate", done, total),
        )
    except (torch.linalg.LinAlgError, LinAlgError):  # type: ignore[attr-defined]
        raise CheckpointError(
            f"{checkpoint.store.path}: a layer's self-attention is degenerate on these clips and cannot be factorised; "
            "give more or other clips, or leave the layer dense with --layers"
        ) from None


def _keep_moments(folder: Path, checkpoint: Checkpoint, plan: ConversionPlan, data: Path | None) -> None:
    """Make `folder` ready: what it holds stays if it belongs to this calibration, and is thrown away if not.

    Raises OutputError when it is no folder of moments.
    """

    def states(files: Sequence[Path]) -> list[list[str | int]]:
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    belongs = {
        "regime": _regime(plan.recipe).to_json(),
        "clips": plan.recipe.clips,
        "tokens": list(_token_grid(plan.recipe, plan.source_config)),  # of a frame that the teacher generates
        "data": None if data is None else states(sorted(data.glob("*.safetensors"))),
        "source": states(checkpoint.store.files),
    }
    record = folder / MOMENTS_NAME
    try:
        folder.mkdir(exist_ok=True, parents=True)
        if any(folder.iterdir()) and not record.exists():
            raise OutputError(f"{folder} is not a folder of moments; move it away, or name another with --moments")
        if record.exists() and json.loads(record.read_text()) != belongs:
            for file in folder.glob("layer-*"):
                file.unlink()
        record.write_text(json.dumps(belongs, indent=2) + "\n")
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder}: moments cannot be kept there ({error}); name another with --moments") from None


def _held_back(clips: Clips) -> tuple[Clips, Clips | None]:
    """Clips to fit to, and a fifth of them to judge by; none of too few."""
    count = len(clips.latents) // 5
    if not count:
        return clips, None
    return Clips(*(part[:-count] for part in clips)), Clips(*(part[-count:] for part in clips))


def calibration_clips(
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    data: Path | None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Clips:
    """Clips of the folder `data`, or without one what the teacher generates on `device` from an empty caption.

    The built-in tiny model draws its own clips. Raises InputError when the folder does not fit the model.
    """
    config, recipe, count = plan.source_config, plan.recipe, plan.recipe.clips or 1
    if data is not None:
        return load_clips(data, config, count)
    if TINY in checkpoint.store.path.parents:
        return training_clips(count)
    if config.in_dim != config.out_dim:
        raise ConfigError("an image-to-video model cannot generate its own clips here; give some with --data DIR")
    height, width = (
        tokens * patch for tokens, patch in zip(_token_grid(recipe, config), config.patch_size[1:], strict=True)
    )
    streaming = recipe.streaming or StreamingConfig()
    model = load_model(checkpoint, dtype=torch.float32, device=device, streaming=streaming)
    # Distilled students are published as training checkpoints; all others need many steps.
    sampler = Sampler.few_step() if checkpoint.state_key else Sampler.many_step(20)
    size = max(1, BATCH_TOKENS // (CALIBRATION_FRAMES * config.tokens_per_frame(height, width)))
    total, done = passes(CALIBRATION_FRAMES, sampler, streaming, slices=-(-count // size)), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("generate clips", done, total)

    return own_clips(
        model,
        count,
        frames=CALIBRATION_FRAMES,
        height=height,
        width=width,
        sampler=sampler,
        seed=recipe.seed,
        streaming=streaming,
        batch=size,
        on_step=step,
    )


def _return_memory() -> None:
    """Give freed matrices back to the system: glibc keeps blocks of up to 32 MB, and a long run fills with gaps."""
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


# --- whole models ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Verification:
    """`passed_through` tensors are the source's bit for bit. `attention_errors` of each converted layer: relative
    error of its output against the dense layer's on random inputs under the layer's own modulation.
    """

    passed_through: int
    attention_errors: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """One converted model. A dry run leaves `sha256`, that of the source's files, and `layers` empty.

    `losses` are those of a calibration: mean squared velocity errors on clips that it did not see, of the "dense" model
    and with all layers after each step of the conversion.
    """

    plan: ConversionPlan
    sha256: str = ""
    layers: tuple[LayerReport, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)
    verification: Verification | None = None

    def to_json(self) -> dict[str, Any]:
        """The plan, and what came of it; without the singular values, which are in conversion.json."""
        data = self.plan.to_json()
        if self.sha256:
            data["sha256"] = self.sha256
            data["layers"] = [
                {k: v for k, v in layer.to_json().items() if k != "singular_values"} for layer in self.layers
            ]
            data["losses"] = {name: _digits(loss) for name, loss in self.losses.items()}
        if self.verification is not None:
            data["verification"] = dataclasses.asdict(self.verification)
        return data


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What `convert` wrote: one model, or the two experts of Wan2.2 A14B, each in its own subfolder of `output`."""

    output: Path | None  # None for a dry run without one
    models: tuple[ModelReport, ...]


@contextmanager
def open_models(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    state_key: str | None = None,
    config: Path | None = None,
) -> Iterator[dict[str, Checkpoint]]:
    """The checkpoints of a source: both experts by their subfolder, or the only model under "".

    Arguments and errors are those of `families.open_checkpoint`; a `subfolder` chooses one expert.
    """
    folders = (subfolder,) if subfolder else experts(source, revision) or (None,)
    with ExitStack() as stack:
        yield {
            (folder or "") if len(folders) > 1 else "": stack.enter_context(
                open_checkpoint(source, revision=revision, subfolder=folder, state_key=state_key, config=config)
            )
            for folder in folders
        }


def resolve_device(name: str) -> torch.device:
    """The torch device of that name. Raises ConfigError when it is not there, or has no float64."""
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).item()
    except Exception as error:  # torch raises whatever its backends raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(f"device {name!r} cannot be used for float64 ({reason[:200]}); use cpu or cuda") from None
    return device


def convert(
    source: str | Path,
    output: str | Path | None,
    recipe: ConvertRecipe | None = None,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    state_key: str | None = None,
    config: Path | None = None,
    device: str | torch.device = "cpu",
    data: Path | None = None,
    moments: Path | None = None,
    overwrite: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    on_plan: Callable[[ConversionPlan], None] | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert `source` into the new model folder `output`, which appears whole or not at all.

    `source`, `revision`, `subfolder`, `state_key` and `config` are those of `open_models`; two experts become two
    subfolders. `on_plan` sees each model's plan once all checks have passed and before work starts; a `dry_run` ends
    there and writes nothing (`output` may then be None). The maths runs on `device`. `data` is a folder of clips
    (`mlaconvert.data`) for init "calibrated"; what it measures of their inputs is kept in `moments`, by default beside
    the output (`OUTPUT.moments`), and taken from there when it was made of the same model, in the same regime, from as
    many clips of the same source. `verify` reads the output back and compares it.

    Raises InputError for bad input, a recipe that does not fit, an output that exists (without `overwrite`) or a disk
    without room, and MLAConvertError when verification fails; the output then stays for inspection.
    """
    chosen_device, report = resolve_device(str(device)), progress or _silent
    folder, recipe = None if output is None else Path(output), recipe or ConvertRecipe()
    for flag, path, use in (("--data", data, "read"), ("--moments", moments, "used")):
        if path is not None and recipe.init != "calibrated":
            raise ConfigError(
                f"{flag} {path} is only {use} by init calibrated; leave it out, or give --init calibrated"
            )
    if folder is None and not dry_run:
        raise ConfigError("no folder to write to; give one with -o DIR (output), or --dry-run to see the plan")
    with open_models(source, revision=revision, subfolder=subfolder, state_key=state_key, config=config) as checkpoints:
        plans = {
            name: plan_conversion(checkpoint, recipe, subfolder=name or subfolder or "")
            for name, checkpoint in checkpoints.items()
        }
        if folder is not None:
            _check_output(folder, checkpoints, plans, overwrite)
        for plan in plans.values():
            if on_plan is not None:
                on_plan(plan)
        if dry_run or folder is None:
            return ConversionReport(output=folder, models=tuple(ModelReport(plan=plan) for plan in plans.values()))
        kept = moments or folder.with_name(f"{folder.name}.moments")
        if "" in plans:
            models = {
                "": _convert_model(checkpoints[""], plans[""], folder, chosen_device, overwrite, data, kept, report)
            }
        else:
            with _staged_folder(folder) as staged:
                models = {
                    name: _convert_model(
                        checkpoints[name], plan, staged / name, chosen_device, False, data, kept / name, report
                    )
                    for name, plan in plans.items()
                }
        if verify:
            models = {
                name: dataclasses.replace(
                    model,
                    verification=verify_conversion(
                        checkpoints[name], folder / name, model.plan, device=chosen_device, progress=report
                    ),
                )
                for name, model in models.items()
            }
    return ConversionReport(output=folder, models=tuple(models.values()))


def _silent(stage: str, done: int, total: int) -> None:
    """The progress of a caller who does not want any."""


def _check_output(
    output: Path, checkpoints: Mapping[str, Checkpoint], plans: Mapping[str, ConversionPlan], overwrite: bool
) -> None:
    """Raise OutputError when `output` cannot be written, or would replace what is read."""
    target = output.expanduser().resolve()
    files = [file.resolve() for checkpoint in checkpoints.values() for file in checkpoint.store.files]
    if any(target == file or target in file.parents for file in files):
        raise OutputError(f"{output} holds the source; choose another path")
    specs = [
        dataclasses.replace(operation.spec, name=f"{name}/{operation.spec.name}")
        for name, plan in plans.items()
        for operation in plan.operations
    ]
    if "" not in plans and overwrite and target.is_dir() and experts(target):
        # A folder of two experts is no model folder: it is replaced here, not by the writer.
        output = output.with_name(f"{output.name}.new")
    ModelWriter(output, specs, metadata={}, overwrite=overwrite)  # checks, and writes nothing before it is entered


@contextmanager
def _staged_folder(output: Path) -> Iterator[Path]:
    """A hidden folder that becomes `output` when the block ends well and vanishes when it does not."""
    target = output.expanduser().resolve()
    staging, aside = (target.with_name(f".{target.name}.{state}") for state in ("partial", "replaced"))
    try:
        staging.mkdir()
        try:
            yield staging
            if target.exists():
                swap_folders(staging, target, aside)
            else:
                staging.rename(target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        raise OutputError(f"{output}: writing failed ({error.strerror or error}); nothing was left there") from None
    shutil.rmtree(aside, ignore_errors=True)


def _convert_model(
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    path: Path,
    device: torch.device,
    overwrite: bool,
    data: Path | None,
    moments: Path,
    progress: Progress,
) -> ModelReport:
    losses: dict[str, float] = {}
    with ExitStack() as stack:
        if plan.recipe.init == "calibrated":
            clips = _held_back(calibration_clips(checkpoint, plan, data, device=device, progress=progress))
            _keep_moments(moments, checkpoint, plan, data)
            calibration = _calibrate(checkpoint, plan, clips[0], moments, device, progress)
            plan = plan_conversion(checkpoint, plan.recipe, subfolder=plan.subfolder, measured=calibration.layers)
            made = _from_clips(checkpoint, plan, clips, calibration, losses, device)
        else:
            made = _from_weights(checkpoint, plan, device)
        specs = [operation.spec for operation in plan.operations]
        writer = stack.enter_context(ModelWriter(path, specs, metadata={"format": "pt"}, overwrite=overwrite))
        layers = _write_tensors(checkpoint, plan, writer, made, progress)
        total = sum(file.stat().st_size for file in checkpoint.store.files)
        hashed = 0

        def count(piece: int) -> None:
            nonlocal hashed
            hashed += piece
            progress("hash", hashed, total)

        report = ModelReport(plan=plan, sha256=checkpoint.store.sha256(count), layers=layers, losses=losses)
        writer.write_text(CONFIG_NAME, json.dumps(_output_config(checkpoint, plan), indent=2) + "\n")
        writer.write_text(CONVERSION_NAME, _conversion_json(checkpoint, report))
        writer.write_text(README_NAME, _readme(plan))
        writer.commit()
    return report


def _output_config(checkpoint: Checkpoint, plan: ConversionPlan) -> dict[str, Any]:
    """The source's config.json with how the model sees time, and its latent attention."""
    streaming = plan.config.streaming
    return checkpoint.raw_config | {
        "streaming": dataclasses.asdict(streaming) if streaming is not None else None,
        "mla": _mla(plan.config).to_json(),
    }


def _conversion_json(checkpoint: Checkpoint, report: ModelReport) -> str:
    """Where the model came from and what its conversion did; one line a layer."""
    plan = report.plan
    data = {
        "mlaconvert": __version__,
        "source": {
            "name": plan.source,
            "subfolder": plan.subfolder,
            "state_key": checkpoint.state_key,
            "description": plan.description,
            "files": [file.name for file in checkpoint.store.files],
            "sha256": report.sha256,
        },
        "recipe": dataclasses.asdict(plan.recipe),
        "cache_scalars_per_token": {"dense": plan.dense_scalars, "mla": plan.mla_scalars},
        "losses": {name: _digits(loss) for name, loss in report.losses.items()},
    }
    head = json.dumps(data, indent=2, ensure_ascii=False).removesuffix("\n}")
    layers = ",\n".join("    " + json.dumps(layer.to_json()) for layer in report.layers)
    return f'{head},\n  "layers": [\n{layers}\n  ]\n}}\n'


def _readme(plan: ConversionPlan) -> str:
    """A stub that says what the folder is."""
    source = f"{plan.source}, {plan.subfolder}" if plan.subfolder else plan.source
    less = 100 * (1 - plan.mla_scalars / plan.dense_scalars)
    return (
        f"# {plan.source}, with latent attention\n\n"
        f"Converted from {source} ({plan.description}) by mlaconvert {__version__}.\n\n"
        f"Self-attention in layers {plan.recipe.layers} is Multi-Head Latent Attention (init {plan.recipe.init}). A "
        f"token caches {plan.mla_scalars:,} scalars instead of {plan.dense_scalars:,} ({less:.1f}% less). All other "
        f"tensors are the source's. `{CONVERSION_NAME}` records the recipe, the source's hash and each layer's "
        "spectrum and errors. The model has not been trained since.\n"
    )


def verify_conversion(
    checkpoint: Checkpoint,
    path: Path,
    plan: ConversionPlan,
    *,
    device: torch.device,
    progress: Progress = _silent,
) -> Verification:
    """Read the model at `path` back and hold it against the `checkpoint` that it was converted from.

    Raises MLAConvertError when a tensor that passed through differs in a bit, or an attention output is not finite.
    """
    passed = [operation for operation in plan.operations if operation.layer is None]
    errors: dict[int, float] = {}
    progress("verify", 0, len(plan.layers))
    with open_checkpoint(path) as converted:
        for operation in passed:
            expected = checkpoint.read(operation.canonical).to(operation.spec.dtype)
            if not _same_bits(expected, converted.read(operation.canonical)):
                raise MLAConvertError(
                    f"{path}: tensor {operation.spec.name!r} differs from the source's; convert again"
                )
        time = time_modulation(checkpoint, _timesteps(plan.recipe))
        for layer in plan.layers:
            x = _random_inputs(_layer_modulation(checkpoint, layer, time), layer).to(device)
            errors[layer] = _attention_error(checkpoint, converted, plan, layer, x)
            if not math.isfinite(errors[layer]):
                raise MLAConvertError(f"{path}: the attention output of layer {layer} is not finite")
            progress("verify", len(errors), len(plan.layers))
    return Verification(passed_through=len(passed), attention_errors=errors)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))


def _random_inputs(modulation: Tensor, seed: int) -> Tensor:
    """Inputs [1, N, D] in float32 as a block's LayerNorm and modulation make them, each frame at its own timestep."""
    frames, height, width = _VERIFY_GRID
    noise = torch.randn(frames, height * width, modulation.shape[-1], generator=torch.Generator().manual_seed(seed))
    steps = torch.linspace(0, len(modulation) - 1, frames).round().long()
    shift, scale = modulation[steps].float().unsqueeze(2).unbind(1)
    return (noise * (1 + scale) + shift).flatten(0, 1).unsqueeze(0)


@torch.no_grad()
def _attention_error(
    checkpoint: Checkpoint, converted: Checkpoint, plan: ConversionPlan, layer: int, x: Tensor
) -> float:
    """|latent - dense| / |dense| of one layer's attention output, in float32."""
    prefix = f"blocks.{layer}.self_attn."
    turn = rotary(torch.arange(_VERIFY_GRID[0], device=x.device), *_VERIFY_GRID[1:], plan.config.rope_split)
    with torch.device("meta"):
        dense = DenseAttention(plan.source_config)
        latent = LatentAttention(plan.config, _mla(plan.config), plan.layers[layer])
    outputs = []
    for module, source in ((dense, checkpoint), (latent, converted)):
        state = {name: source.read(prefix + name).to(x.device, torch.float32) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        outputs.append(module(x, AttentionPlan(query_rotary=turn, key_rotary=turn)))
    return float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
