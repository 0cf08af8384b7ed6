"""What teacher and students are given: clips, noise, rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mlaconvert.clips.folder import BATCH, BATCH_TOKENS, ClipFolder, Clips
from mlaconvert.clips.teacher_made import OwnClips
from mlaconvert.clips.tiny.clips import held_back, null_context
from mlaconvert.config.geometry import default_video
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.provenance import draws_clips
from mlaconvert.errors import ConfigError
from mlaconvert.evaluation.drift import RolloutPlan
from mlaconvert.evaluation.request import Request, SourceRecord
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel
from mlaconvert.progress import Progress

TINY_STEPS, TINY_GUIDANCE = 12, 1.5  # of the built-in model's rollouts


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What teacher and students are given. `rollout` is None when none is wanted.

    `clips_from` and `notes` say in words what the clips are and what to keep in mind.
    """

    clips: Clips
    clips_from: str
    rollout: RolloutPlan | None
    seed: int
    notes: tuple[str, ...] = ()


def draw_conditions(
    opened: Checkpoint,
    teacher: WanModel,
    record: SourceRecord,
    request: Request,
    progress: Progress,
    say: Callable[[str], None] | None = None,
) -> Conditions:
    """What models are compared on, and the notes that a reader of the figures needs."""
    asked: list[str] = []
    if request.teacher is not None:
        asked.append("The teacher was named by hand; its hash was not compared with the recorded one.")
    if request.cache_dtype is not None:
        asked.append(f"The models' caches are narrowed to {request.cache_dtype} as they run, the teacher's is not.")
    if request.data is None and draws_clips(opened, record.conversion):
        drawn = tiny_conditions(
            teacher.config.streaming,
            clips=request.clips or 64,
            frames=request.frames,
            videos=request.videos,
            steps=request.steps or TINY_STEPS,
            seed=request.seed,
        )
        return dataclasses.replace(drawn, notes=(*drawn.notes, *asked))
    notes = ["One seed: small differences mean nothing.", *asked]
    if opened.config.streaming != teacher.config.streaming:
        notes.append("The teacher runs with the converted model's window, which it was not trained with.")
    if record.source.subfolder or record.origin.subfolder:
        notes.append("One expert alone runs at every noise level.")
    recipe = (record.conversion or {}).get("recipe") or {}
    usual = Sampler.usual(few_step=opened.config.few_step)
    sampler = Sampler.many_step(request.steps) if request.steps else usual
    if request.data is not None:
        stored = ClipFolder(request.data, opened.config)
        first, last = stored.split(request.clips or 8)
        clips = stored.some(last)  # a conversion was fitted to the first ones
        clips_from = f"the last clips of the folder {request.data.resolve().name}"
        if recipe.get("init") == "calibrated" and len(first) < recipe.get("clips", 0):
            notes.append(
                f"The folder has {len(stored)} clips, and the conversion was fitted to {recipe['clips']}: if it was "
                "this folder, some of those are measured on."
            )
    else:
        clips = generated_clips(
            teacher, request.clips or 8, recipe, sampler=sampler, seed=request.seed, progress=progress, say=say
        )
        clips_from = "rollouts of the teacher from an empty caption, other ones than a calibration sees"
        notes.append("The clips are the teacher's own, so its loss is lower than on real video.")
    return Conditions(
        clips=clips,
        clips_from=clips_from,
        rollout=_plan(teacher.config.streaming, clips, request.frames, request.videos, sampler, None, request.seed),
        seed=request.seed,
        notes=tuple(notes),
    )


def tiny_conditions(
    streaming: StreamingConfig | None,
    *,
    clips: int = 64,
    frames: int = 60,
    videos: int = 3,
    steps: int = TINY_STEPS,
    seed: int = 0,
) -> Conditions:
    """Held-back clips of the built-in model, and rollouts that continue them with its own guidance.

    `frames`, `videos` and `steps` are as in `Request`.
    """
    drawn = held_back(clips)
    sampler = Sampler.many_step(steps, guidance=TINY_GUIDANCE)
    return Conditions(
        clips=drawn,
        clips_from="clips of the built-in model that training never drew",
        rollout=_plan(streaming, drawn, frames, videos, sampler, null_context(), seed),
        seed=seed,
        notes=("One seed: small differences mean nothing.",),
    )


def _plan(
    streaming: StreamingConfig | None,
    clips: Clips,
    frames: int,
    videos: int,
    sampler: Sampler,
    empty: Tensor | None,
    seed: int,
) -> RolloutPlan | None:
    """Rollouts that continue the first chunk of some clips; a bidirectional model generates whole clips instead."""
    if frames == 0:
        return None
    latents, context = clips.latents[:videos], clips.context[:videos]
    length, height, width = latents.shape[2:]
    prefix = latents[:, :, : streaming.chunk_frames] if streaming and length >= streaming.chunk_frames else None
    if prefix is not None and frames <= prefix.shape[2]:
        raise ConfigError(f"frames is {frames}, of which {prefix.shape[2]} are given; give more, or 0 for no rollout")
    return RolloutPlan(
        context=context,
        prefix=prefix,
        frames=frames if streaming else length,
        height=height,
        width=width,
        sampler=sampler,
        null_context=empty,
        streaming=streaming or _whole(length),
        seed=seed,
    )


def _whole(frames: int) -> StreamingConfig:
    """All frames in one chunk: how a bidirectional model generates."""
    return StreamingConfig(chunk_frames=frames, window_frames=frames, sink_frames=0)


def generated_clips(
    teacher: WanModel,
    count: int,
    recipe: Mapping[str, Any],
    *,
    sampler: Sampler,
    seed: int,
    progress: Progress,
    frames: int = 9,
    say: Callable[[str], None] | None = None,
) -> Clips:
    """`count` clips that the teacher makes of an empty caption, none of which a calibration of that `seed` sees.

    Their size is the one in `recipe`, the fields of a ConvertRecipe; by default what such a model is usually run at.
    `say` is told where that will take long.
    """
    config, video = teacher.config, default_video(teacher.config)
    stride = recipe.get("vae_stride") or video.vae_stride
    size = {name: (recipe.get(name) or getattr(video, name)) // stride for name in ("height", "width")}
    usual = OwnClips.usual(config, frames, streaming=config.streaming or _whole(frames), sampler=sampler)
    wanted = dataclasses.replace(usual, **size)
    seen = min(frames, wanted.streaming.window_frames)
    tokens = seen * config.tokens_per_frame(wanted.height, wanted.width)
    return wanted.make(
        teacher,
        count,
        # A calibration starts its rollouts at the recipe's seed; these are far from it.
        seed=1_000_000_007 + count * seed,
        batch=max(1, min(BATCH, BATCH_TOKENS // tokens)),
        progress=progress,
        say=say,
    )
