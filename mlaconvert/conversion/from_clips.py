"""Conversion in the metric of real inputs: whose clips, where their statistics are kept, and its layers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mlaconvert.clips.folder import BATCH_TOKENS, ClipFolder, Clips, clip_files, load_clips, load_shard, save_shard
from mlaconvert.clips.teacher_made import OwnClips
from mlaconvert.clips.tiny.clips import training_clips
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLALayer
from mlaconvert.config.parsing import parse
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.calibration.refit_model import refit_model, with_attention
from mlaconvert.conversion.calibration.run import Calibration, KeptWalk, Task, calibrate, refit_layers
from mlaconvert.conversion.calibration.store import MOMENTS_VERSION, moments_file
from mlaconvert.conversion.calibration.target import Target
from mlaconvert.conversion.calibration.windows import Losses, scratch_bytes
from mlaconvert.conversion.collected.record import Collected
from mlaconvert.conversion.from_weights import LayerReport, layer_report
from mlaconvert.conversion.plan import ConversionPlan, mla_of
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.recipes import CALIBRATION_FRAMES, regime_of, token_grid
from mlaconvert.errors import CheckpointError, ConfigError, InputError, OutputError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.merged import merged
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.inputs import file_states, read_json, refuse_links
from mlaconvert.files.whole import write_whole
from mlaconvert.latent.factorize import Factors
from mlaconvert.latent.lapack import LINALG_ERRORS
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.model.load import load_tensors, load_widened
from mlaconvert.model.schedule import Sampler
from mlaconvert.progress import Progress, silent

MOMENTS_NAME = "calibration.json"
# What linear algebra raises for a layer that gives zeros, or values that are not finite.
_DEGENERATE: tuple[type[Exception], ...] = (*LINALG_ERRORS, ZeroDivisionError)
CLIPS_NAME = "clips.safetensors"  # those that the teacher generated
_MORE_NAME = "clips-{}-to-{}.safetensors"  # and those that only the refit of the whole model takes
# What the record of moments says of them, in words.
_ASPECTS = {
    "version": "version of the method",
    "regime": "window, noise or seed",
    "clips": "number of clips",
    "tokens": "size of frames",
    "data": "folder of clips or windows",
    "source": "checkpoint",
    "loras": "LoRA",
}


def from_clips(
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    clips: tuple[Clips | Collected, Clips | None],
    calibration: Calibration,
    losses: Losses,
    device: torch.device,
    *,
    kept: KeptWalk,
) -> Generator[tuple[int, Factors, LayerReport], None, None]:
    """Layers converted in the metric of what the first `clips` bring, and refitted to it; `losses` on the others.

    By what is `kept`, an interrupted walk finds its way back behind the finished layers, some of which come again.
    Raises CheckpointError for a layer that cannot be factorised.
    """
    kept.folder.mkdir(exist_ok=True)
    task = _task(checkpoint, plan, clips[0], device)
    made = refit_layers(task, calibration, validation=clips[1], losses=losses, kept=kept)
    with _factorised(checkpoint):
        for layer, tensors, errors in made:
            report = layer_report(checkpoint.attention(layer), plan, layer, errors, device)
            factors = Factors(tensors={name: tensor.cpu() for name, tensor in tensors.items()}, errors=errors)
            yield layer, factors, report


def refit_converted(
    checkpoint: Checkpoint,
    folder: Path,
    plan: ConversionPlan,
    clips: tuple[Clips, Clips | None],
    losses: Losses,
    device: torch.device,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """What a refit of the whole model changes of the converted model in `folder`, float32, by canonical name."""
    regime = regime_of(plan.recipe)
    teacher = load_widened(checkpoint, regime.streaming, device)
    layers = {}
    with open_checkpoint(folder) as converted:
        for index, layer in plan.layers.items():
            with torch.device("meta"):
                layers[index] = LatentAttention(plan.config, mla_of(plan.config), layer)
            prefix = f"blocks.{index}.self_attn."
            names = {name: prefix + name for name in layers[index].state_dict()}
            load_tensors(layers[index], converted, names, device, torch.float32)
    made = refit_model(
        (teacher, with_attention(teacher, plan.config, layers)),
        clips,
        regime,
        steps=plan.recipe.refit_steps or 0,
        losses=losses,
        progress=progress,
    )
    return {
        f"blocks.{index}.self_attn.{name}": tensor.float().cpu()
        for index, tensors in made.items()
        for name, tensor in tensors.items()
    }


@contextmanager
def _factorised(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what linear algebra raises on a degenerate layer into a CheckpointError."""
    try:
        yield
    # Errors are relative to what the layers and the model give, which may be nothing.
    except _DEGENERATE:
        raise CheckpointError(
            f"{checkpoint.store.path}: a layer's self-attention is degenerate on these clips (zero or not finite) and "
            "cannot be factorised; give more or other clips, or leave the layer dense with --layers"
        ) from None


def target_of(plan: ConversionPlan) -> Target:
    """What a calibrated plan makes of every layer."""
    mla, recipe = mla_of(plan.config), plan.recipe
    return Target(
        config=plan.source_config,
        key_norm=mla.key_norm,
        q_lora_rank=mla.q_lora_rank,
        rope=mla.rope,
        present=mla.present,
        v_dim=recipe.v_dim or plan.source_config.head_dim,
        nope_dim=recipe.nope_dim,
        rope_dim=recipe.rope_dim if recipe.rope == "latent" or recipe.allocation == "fixed" else None,
        rope_selection=recipe.rope_selection or "energy",
        method=plan.method,
    )


def _task(checkpoint: Checkpoint, plan: ConversionPlan, clips: Clips | Collected, device: torch.device) -> Task:
    return Task(
        checkpoint=checkpoint, clips=clips, regime=regime_of(plan.recipe), target=target_of(plan), device=device
    )


def room_needed(plan: ConversionPlan, data: Path | None) -> tuple[int, int]:
    """Bytes on the disk of a calibrated conversion: of moments, which stay, and about how many of activations."""
    config, recipe = plan.source_config, plan.recipe
    moments = len(plan.layers) * 8 * config.dim * (2 * config.dim + config.head_dim)
    if plan.collected is not None:
        return moments, plan.collected.activations
    if data is None:
        shape: tuple[int, ...] = own_clips(plan).shape(config)
    else:
        shape = ClipFolder(data, config).clip_shape
    return moments, _activations(plan, (recipe.clips or 1, *shape))


def own_clips(plan: ConversionPlan) -> OwnClips:
    """The teacher's own, of the video that the conversion is made for."""
    (rows, columns), (_, high, wide) = token_grid(plan.recipe, plan.source_config), plan.source_config.patch_size
    return OwnClips(
        frames=CALIBRATION_FRAMES,
        height=rows * high,
        width=columns * wide,
        streaming=plan.recipe.streaming or StreamingConfig(),
        sampler=Sampler.usual(few_step=plan.config.few_step),
    )


def _activations(plan: ConversionPlan, shape: Sequence[int]) -> int:
    """Of clips [N, C, F, H, W]."""
    followed = len(plan.layers) if plan.recipe.allocation == "adaptive" else 0
    return scratch_bytes(plan.source_config, shape, regime_of(plan.recipe), followed=followed)


def choose_splits(
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    clips: Clips | Collected,
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> Calibration:
    """Decide how each layer divides its scalars. Raises OutputError when the disk has no room for the activations."""
    recipe = plan.recipe
    collected = isinstance(clips, Collected)
    needed = clips.activations if isinstance(clips, Collected) else _activations(plan, clips.latents.shape)
    free = shutil.disk_usage(folder).free
    if device.type == "cpu" and needed > free:
        raise OutputError(
            f"{folder}: activations take about {needed / 1e9:.1f} GB there for a while, {free / 1e9:.1f} GB are free; "
            f"make room, or {'write' if collected else 'take fewer --clips, or name a folder with --moments'} "
            "on another disk"
        )
    with _factorised(checkpoint):
        return calibrate(
            _task(checkpoint, plan, clips, device),
            layers=sorted(plan.layers),
            budget=(recipe.kv_rank or 0) + (recipe.rope_dim or 0 if recipe.rope == "cached" else 0),
            adaptive=recipe.allocation == "adaptive",
            bytes_per_token=recipe.bytes_per_token,
            folder=folder,
            progress=progress,
        )


def splits_json(calibration: Calibration) -> dict[str, Any]:
    """How each layer divides its scalars, in plain data."""
    return {str(index): dataclasses.asdict(layer) for index, layer in calibration.layers.items()}


def kept_splits(data: dict[str, Any] | None, folder: Path) -> Calibration | None:
    """The calibration that `splits_json` noted, if the moments of all its layers are still in `folder`."""
    try:
        layers = {int(index): parse(MLALayer, layer, "splits") for index, layer in (data or {}).items()}
    except (AttributeError, ConfigError, ValueError):  # none of ours
        return None
    held = all(moments_file(folder, index).is_file() for index in layers)
    return Calibration(folder=folder, layers=layers) if layers and held else None


def keep_moments(
    folder: Path,
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    data: Path | Collected | None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Make `folder` ready: what it holds stays if it belongs to this calibration, and is thrown away if not.

    `say` is then told why. Raises OutputError when it is no folder of moments.
    """
    belongs: dict[str, Any] = {
        "version": MOMENTS_VERSION,
        "regime": regime_of(plan.recipe).to_json(),
        "clips": plan.recipe.clips,
        "tokens": list(token_grid(plan.recipe, plan.source_config)),  # of a frame that the teacher generates
        "data": data.identity
        if isinstance(data, Collected)
        else None
        if data is None
        else file_states(clip_files(data)),
        "source": file_states(checkpoint.store.files),
    }
    if loras := merged(checkpoint):
        belongs["loras"] = loras
    if plan.config.few_step != checkpoint.config.few_step:  # as the recipe has it; clips are made differently
        belongs["few_step"] = plan.config.few_step
    record = folder / MOMENTS_NAME
    try:
        refuse_links(folder)
        folder.mkdir(exist_ok=True, parents=True)
        if not record.exists() and any(path.suffix != ".partial" for path in folder.iterdir()):
            raise OutputError(f"{folder} is not a folder of moments; move it away, or name another with --moments")
        before = read_json(record) if record.exists() else {}
        if before != belongs:
            files = [*folder.glob("layer-*"), *folder.glob(CLIPS_NAME), *folder.glob(_MORE_NAME.format("*", "*"))]
            if files and say is not None:
                names = [what for name, what in _ASPECTS.items() if before.get(name) != belongs.get(name)]
                what = " and ".join(names) or "calibration"
                say(f"{folder}: what was measured there is of another {what}; it is measured anew")
            for file in files:
                file.unlink(missing_ok=True)
            write_whole(record, (json.dumps(belongs, indent=2) + "\n").encode())
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder}: moments cannot be kept there ({error}); name another with --moments") from None


def held_back(clips: Clips) -> tuple[Clips, Clips | None]:
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
    progress: Progress = silent,
    kept: Path | None = None,
    say: Callable[[str], None] | None = None,
    more: bool = False,
) -> Clips:
    """Clips of the folder `data`, or without one what the teacher generates on `device` from an empty caption.

    Those that are measured, or with `more` those that only the refit of the whole model takes as well. Generated clips
    are kept in a file in the folder `kept`, and taken from there when it exists. The built-in tiny model draws its own
    clips. `say` is told where making them will take long. Raises InputError when the folder does not fit the model, and
    OutputError for `kept`.
    """
    check_clips(checkpoint, data, plan)
    config, recipe, measured = plan.source_config, plan.recipe, plan.recipe.clips or 1
    first, count = (measured, more_clips(recipe)) if more else (0, measured)
    if data is not None or checkpoint.is_tiny:
        found = training_clips(first + count) if data is None else load_clips(data, config, first + count)
        return Clips(*(part[first:] for part in found))
    name = _MORE_NAME.format(first + 1, first + count) if more else CLIPS_NAME
    if kept is not None and (kept / name).exists():
        return _kept_clips(kept / name, config, count)
    wanted = own_clips(plan)
    size = max(1, BATCH_TOKENS // (wanted.frames * config.tokens_per_frame(wanted.height, wanted.width)))
    clips = wanted.make(
        load_widened(checkpoint, wanted.streaming, device),
        count,
        seed=recipe.seed + first,
        batch=size,
        progress=progress,
        stage="generate clips",
        say=say,
    )
    if kept is not None:
        save_shard(kept / name, clips._asdict())
    return clips


def _kept_clips(path: Path, config: WanConfig, count: int) -> Clips:
    """What was generated before. Raises CheckpointError when it is damaged."""
    try:
        clips = load_shard(path, config)
    except InputError:
        clips = None
    if clips is None or len(clips.latents) != count:
        raise CheckpointError(
            f"{path}: not the {count} clips that were generated, or damaged; delete the file and run the command again"
        )
    return clips


def with_more(
    clips: Clips,
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    data: Path | None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    kept: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Clips:
    """`clips`, and behind them those that only the refit of the whole model takes; else as `calibration_clips`."""
    if not more_clips(plan.recipe):
        return clips
    more = calibration_clips(checkpoint, plan, data, device=device, progress=progress, kept=kept, say=say, more=True)
    return Clips(*(torch.cat(parts) for parts in zip(clips, more, strict=True)))


def more_clips(recipe: ConvertRecipe) -> int:
    """How many clips beside the measured ones the refit of the whole model takes with a resolved recipe."""
    return max(0, (recipe.refit_clips or 0) - (recipe.clips or 1))


def makes_clips(checkpoint: Checkpoint, data: Path | None) -> bool:
    """Whether a model without `data` generates its clips: the built-in one draws them."""
    return data is None and not checkpoint.is_tiny


def check_clips(checkpoint: Checkpoint, data: Path | None, plan: ConversionPlan) -> None:
    """Raise ConfigError for a model that reads more than clips hold, and when clips are too short for a past."""
    config, regime = checkpoint.config, regime_of(plan.recipe)
    if config.in_dim != config.out_dim:
        raise ConfigError(
            "clips hold no image or control latents, which this model reads beside noise: collect what its own code "
            "runs (mlaconvert.collect) and give that with --moments DIR, or take --init svd"
        )
    regime.check_frames(CALIBRATION_FRAMES if data is None else ClipFolder(data, config).clip_shape[1])
