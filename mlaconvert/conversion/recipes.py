"""Recipes: found by name, read from YAML, and filled in for a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from mlaconvert.config.budget import default_budget
from mlaconvert.config.geometry import WanConfig, default_video
from mlaconvert.config.mla import MOST_BITS, MLAConfig, MLALayer
from mlaconvert.config.parsing import parse
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.calibration.bits import NORM_BITS
from mlaconvert.conversion.calibration.windows import Regime
from mlaconvert.conversion.recipe import ConvertRecipe, Init, parse_layers
from mlaconvert.errors import ConfigError
from mlaconvert.families.causal import STUDENT
from mlaconvert.files.inputs import is_file, read_yaml
from mlaconvert.files.shipped import RECIPE_KINDS, recipe_folder, recipe_kind, recipe_names
from mlaconvert.latent.pairs import highest_pairs
from mlaconvert.model.flops import forward_work
from mlaconvert.model.schedule import Sampler

# Of clips that the teacher generates: tokens in all, and latent frames each.
CALIBRATION_TOKENS, CALIBRATION_FRAMES = 100_000, 9
# Of a refit of the whole model: steps, and what is left out on a CPU, some ten minutes' worth.
REFIT_STEPS, CPU_FLOPS = 100, 1e14
REFIT_CLIPS = 4  # times as many as are measured


def load_recipe(recipe: str | Path) -> ConvertRecipe:
    """Read a YAML file, or a shipped recipe by its name. Raises ConfigError naming the file and the field."""
    path, data = read_recipe(recipe, recipe_folder(), "recipes", "init: svd")
    if data.get("without") in ([], ()):  # as records of conversions have it, and recipes once could
        data = {name: value for name, value in data.items() if name != "without"}
    if "without" in data:
        raise ConfigError(
            f"{path}: without is {data['without']!r}, which is no setting of a recipe; leave it out (Python code "
            "switches parts of a calibration off, with convert(..., data=CalibrationSetup(method=...)))"
        )
    return parse(ConvertRecipe, data, str(path))


def with_init(recipe: ConvertRecipe, init: Init) -> ConvertRecipe:
    """`recipe` for another way to convert: widths and how the model sees time stay, what was of its own way goes."""
    if init == recipe.init:
        return recipe
    own = ["allocation", "rope", "rope_selection", "key_norm", "q_rank", "present", "refit_steps", "refit_clips"]
    own.append("bytes_per_token")
    own += ["kv_rank", "nope_dim", "rope_dim", "v_dim"] if init == "lossless" else []
    changes: dict[str, Any] = dict.fromkeys(own)
    return dataclasses.replace(recipe, init=init, **changes)


def with_settings(recipe: ConvertRecipe, config: WanConfig, settings: Mapping[str, Any]) -> ConvertRecipe:
    """`recipe` with single `settings` of `StreamingConfig` in place of those that recipe or source have.

    A source of geometry `config` that is not streaming gets a published student's for the others. Raises ConfigError
    for an impossible setting, and for a recipe that says bidirectional.
    """
    if not settings:
        return recipe
    if recipe.bidirectional:
        raise ConfigError(f"bidirectional and {', '.join(settings)} exclude each other; give one of them")
    base = dataclasses.asdict(recipe.streaming or config.streaming or STUDENT)
    return dataclasses.replace(recipe, streaming=parse(StreamingConfig, base | dict(settings), "options"))


def read_recipe(recipe: str | Path, shipped: Path, kind: str, example: str) -> tuple[Path, dict[str, Any]]:
    """The file of a recipe and its fields, not checked yet: a YAML file, or a name in the folder `shipped`.

    Raises ConfigError; its message calls the shipped ones `kind` and shows the field `example`.
    """
    path = Path(recipe)
    if not is_file(path):
        names = recipe_names(shipped)
        path = shipped / f"{recipe}.yaml"
        if str(recipe) not in names:
            _refuse_other_kind(recipe_kind(str(recipe)), shipped, str(recipe))
            raise ConfigError(f"{recipe}: no such recipe file; shipped {kind}: {', '.join(names)}")
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of fields, such as `{example}`")
    if not data.keys() & _TELLING[_kind_of(shipped)]:
        _refuse_other_kind(
            next((kind for kind, fields in _TELLING.items() if data.keys() & fields), None), shipped, path
        )
    return path, data


# Fields that a kind of recipe has, by its folder, and no other kind.
_TELLING: dict[str, set[str]] = {
    "": {"init", "kv_rank", "q_rank", "rope", "key_norm", "present", "allocation", "layout"},
    "heal": {"stage", "steps", "lr", "batch", "train", "optimizer", "ema"},
    "sweep": {"convert", "inits", "kv_ranks", "rope_dims", "nope_dims"},
}


def _kind_of(shipped: Path) -> str:
    return shipped.name if shipped != recipe_folder() else ""


def _refuse_other_kind(kind: str | None, shipped: Path, recipe: str | Path) -> None:
    """Raise ConfigError when `recipe` is one for another command than the one that reads those of `shipped`."""
    wanted = _kind_of(shipped)
    if kind is not None and kind != wanted:
        raise ConfigError(
            f"{recipe} is a recipe of `mlaconvert {RECIPE_KINDS[kind]}`, not of {RECIPE_KINDS[wanted]}; "
            f"`mlaconvert recipes list` shows those of {RECIPE_KINDS[wanted]}"
        )


def resolve_recipe(recipe: ConvertRecipe, config: WanConfig) -> ConvertRecipe:
    """`recipe` with every default filled in for a model of geometry `config`.

    Raises ConfigError for a width larger than the layer, a layer that does not exist, or a video that patches and
    VAE cannot split. Scores and values may not be wider than a head, so that attention never costs more than dense.
    """
    recipe = _with_fixed(recipe, config)
    video, head_dim = default_video(config), config.head_dim
    changes: dict[str, Any] = {
        "layers": _format_layers(
            parse_layers(recipe.layers, config.num_layers) if recipe.layers is not None else range(config.num_layers)
        ),
        "streaming": None if recipe.bidirectional else recipe.streaming or config.streaming,
        "few_step": config.few_step if recipe.few_step is None else recipe.few_step,
        "height": recipe.height or video.height,
        "width": recipe.width or video.width,
        "vae_stride": recipe.vae_stride or video.vae_stride,
    }
    streams = changes["streaming"] is not None
    past = streams and changes["streaming"].window_frames > changes["streaming"].chunk_frames
    exact = recipe.init == "calibrated" and past and recipe.q_rank in (None, "none")
    changes["present"] = recipe.present or ("exact" if exact else "latent")
    if changes["present"] == "exact":
        if not streams:
            raise ConfigError(
                "present exact: a bidirectional model sees whole clips at once, so nothing is past; say how it is to "
                "stream with --window-frames and --chunk-frames, or give present latent"
            )
        if isinstance(recipe.q_rank, int):
            raise ConfigError(f"q_rank is {recipe.q_rank}, but present exact needs the teacher's queries; give none")
    if recipe.init != "lossless":
        budget, calibrated = default_budget(config), recipe.init == "calibrated"
        mode = recipe.rope or (("head" if recipe.nope_dim is None else "latent") if calibrated else "cached")
        if mode == "head" and (recipe.rope_dim or recipe.nope_dim not in (None, head_dim)):
            raise ConfigError("rope head keeps whole heads; leave rope_dim and nope_dim out, or give rope latent")
        # Rotary keys that take no cache of their own are as many as measure best.
        measured = mode == "head" or (mode == "latent" and calibrated)
        rope = recipe.rope_dim or (0 if measured else budget.qk_rope_head_dim)
        latent = budget.kv_lora_rank if mode == "cached" else budget.kv_lora_rank + budget.qk_rope_head_dim
        if recipe.bytes_per_token is not None:
            latent = max(1, min(config.dim // 2, 2 * recipe.bytes_per_token))
        changes |= {
            "kv_rank": latent if recipe.bytes_per_token is not None else recipe.kv_rank or latent,
            "q_rank": recipe.q_rank or ("none" if calibrated or changes["present"] == "exact" else budget.q_lora_rank),
            # A calibrated layer fills its heads up to their width, whatever rotary key it gets.
            "nope_dim": max(0, head_dim - rope) if recipe.nope_dim is None and not calibrated else recipe.nope_dim,
            "rope_dim": rope or None,
            "v_dim": recipe.v_dim or head_dim,
            "key_norm": recipe.key_norm or ("token" if calibrated else "latent"),
            "rope": mode,
        }
        if calibrated:
            changes["allocation"] = recipe.allocation or "adaptive"
        changes["rope_selection"] = recipe.rope_selection or ("energy" if calibrated else "highest")
        if changes["rope_selection"] == "energy" and not calibrated:
            raise ConfigError("rope_selection energy needs measured inputs; use init calibrated")
    resolved = dataclasses.replace(recipe, **changes)
    height, width = token_grid(resolved, config)
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


def _with_fixed(recipe: ConvertRecipe, config: WanConfig) -> ConvertRecipe:
    """`recipe` with the settings that have only one value for the model. Raises ConfigError for another one."""
    if not config.fixed_settings:
        return recipe
    if recipe.init not in ("svd", "random"):
        raise ConfigError(
            f"init is {recipe.init}, and this model is given a camera for every frame: convert it with init svd or "
            f"random (svd with kv_rank {config.dim} keeps everything)"
        )
    if recipe.bidirectional:
        raise ConfigError("bidirectional: of this model only what is past is made of latents; leave it out")
    for name, value in config.fixed_settings.items():
        if getattr(recipe, name) not in (None, value):
            raise ConfigError(
                f"{name} is {getattr(recipe, name)!r}, and where keys turn by cameras too it is {value!r}; leave it out"
            )
    return dataclasses.replace(recipe, **config.fixed_settings)


def _format_layers(layers: Sequence[int]) -> str:
    """(0, 1, 2, 7) -> "0-2,7"."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda item: item[1] - item[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def token_grid(recipe: ConvertRecipe, config: WanConfig) -> tuple[int, int]:
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
    rank, bits = _even_bits(recipe, config.dim)
    layer = MLALayer(
        kv_lora_rank=rank,
        cache_bits=bits,
        qk_nope_head_dim=nope if recipe.nope_dim is None else recipe.nope_dim,
        v_head_dim=recipe.v_dim or config.head_dim,
        rope_components=components,
    )
    chosen = parse_layers(recipe.layers or "", config.num_layers)
    calibration = None
    if recipe.init == "calibrated":
        calibration = {"inputs": "clips", "clips": recipe.clips, **regime_of(recipe).to_json()}
    elif recipe.init != "random":
        height, width = token_grid(recipe, config)
        streaming = recipe.streaming
        calibration = {
            "inputs": "modulation",
            "timesteps": list(timesteps_of(recipe, config)),
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
        present=recipe.present or "latent",
        calibration=calibration,
    )


def _even_bits(recipe: ConvertRecipe, most: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The latent's channels, at most `most`, and `cache_bits` of a layer that is not measured yet: all alike."""
    if recipe.bytes_per_token is None:
        return recipe.kv_rank or most, ()
    room = 8 * recipe.bytes_per_token - NORM_BITS
    bits = next(bits for bits in (4, 8, MOST_BITS) if room // bits <= most or bits == MOST_BITS)
    rank = min(most, room // bits)
    return rank, ((bits, rank), (NORM_BITS, 1))


def regime_of(recipe: ConvertRecipe) -> Regime:
    """Where a calibration takes its windows, whose positions count from the sink.

    Without a sink that makes no difference. Absolute positions would move the sink away as a video goes on; only the
    statistics that layers are fitted to leave that out.
    """
    streaming = recipe.streaming
    return Regime.of(
        dataclasses.replace(streaming, positions="window") if streaming else None,
        recipe.seed,
        few_step=bool(recipe.few_step),
        noisy_past=recipe.noisy_past,
        present=recipe.present or "latent",
    )


def with_refit_steps(recipe: ConvertRecipe, config: WanConfig, device: torch.device) -> ConvertRecipe:
    """A resolved recipe with the default numbers of steps, which depends on what the `device` can do, and of clips."""
    if recipe.init != "calibrated" or recipe.present != "exact":
        return recipe
    steps = recipe.refit_steps
    if steps is None:
        steps = REFIT_STEPS if device.type != "cpu" or refit_flops_of(recipe, config) <= CPU_FLOPS else 0
    clips = recipe.refit_clips or REFIT_CLIPS * (recipe.clips or 1)
    return dataclasses.replace(recipe, refit_steps=steps, refit_clips=clips if steps else None)


def refit_flops_of(recipe: ConvertRecipe, config: WanConfig, steps: int = REFIT_STEPS) -> float:
    """About how many FLOPs so many steps of one clip each take with a resolved recipe.

    The teacher's pass, the student's, its second one on the way back, and the gradients, which are as much as two.
    """
    height, width = token_grid(recipe, config)
    window = min(recipe.streaming.window_frames if recipe.streaming else 1, CALIBRATION_FRAMES)
    return steps * 5 * forward_work(config, torch.ones(window, window, dtype=torch.bool), height * width).flops


def timesteps_of(recipe: ConvertRecipe, config: WanConfig) -> tuple[float, ...]:
    """Where the inputs' statistics are taken: streaming models also run on clean chunks, or cache at one timestep."""
    if config.past_timestep is not None:
        return (config.past_timestep,)
    return (*Sampler.few_step().timesteps, 0.0) if recipe.streaming else Sampler.many_step(8).timesteps
